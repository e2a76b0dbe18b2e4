"Prompts over many kinds of tokenizer and template: ends, truncation, control tokens, swaps, hashes, the token cache"
import copy, itertools, json, multiprocessing, os, subprocess, sys, time
from functools import lru_cache
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from competition_kit import prompt as P
from competition_kit.core import Refusal, damage, root_at
from competition_kit.prompt import (Prompt, Tokens, allot, captions, control_tokens, encode_cached, encode_texts,
                                    fields, instructions, length_report, load_encoded, pick_rows, prefix_suffix,
                                    save_encoded, swapped, tokenizer_hash, truncate, whole_share)
from competition_kit.rows import tasks

# ---- tokenizers, trained here on a few lines
LINES = [*instructions.values(), 'Answer: A B C D E F G',
         'the quick brown fox jumps over the lazy dog one two three four five six '
         'word0 word1 word2 user assistant system',
         'abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789 .,:?![]()/<>|_\n']*3
SPECIAL = ['<unk>', '<s>', '</s>', '<|im_start|>', '<|im_end|>']
BYTES = [f'<0x{i:02X}>' for i in range(256)]

def _bytelevel():  # GPT-2, Qwen, Llama 3
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return t, trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())

def _sentencepiece(*first):  # Llama 2 with a prepended space, Gemma without
    t = Tokenizer(models.BPE(unk_token='<unk>', fuse_unk=True, byte_fallback=True))
    t.normalizer = normalizers.Sequence([*first, normalizers.Replace(' ', '▁')])
    t.pre_tokenizer = pre_tokenizers.Split('▁', 'merged_with_next')
    strip = [decoders.Strip(' ', 1, 0)] if first else []
    t.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return t, trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL+BYTES, show_progress=False)

def _unigram():  # XGLM
    t = Tokenizer(models.Unigram())
    t.pre_tokenizer, t.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return t, trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIAL, unk_token='<unk>', show_progress=False)

def _wordpiece():
    t = Tokenizer(models.WordPiece(unk_token='<unk>'))
    t.normalizer, t.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    t.decoder = decoders.WordPiece()
    return t, trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)

def _llama2(): return _sentencepiece(normalizers.Prepend('▁'))

KINDS = dict(bytelevel=_bytelevel, llama2=_llama2, gemma=_sentencepiece, unigram=_unigram, wordpiece=_wordpiece)

@lru_cache
def backend(kind):
    t, trainer = KINDS[kind]()
    t.train_from_iterator(LINES, trainer)
    d = json.loads(t.to_str())
    d['added_tokens'] = [a for a in d['added_tokens'] if a['content'] in SPECIAL]
    if kind in ('llama2', 'gemma'): d['pre_tokenizer'] = None
    return json.dumps(d)

TURN = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
CHATML = ("{% for m in messages %}"+TURN+"{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
TEMPLATES = dict(
    system=CHATML,
    default_system="{% if messages[0]['role'] != 'system' %}<|im_start|>system\n"
                   "You are a helpful assistant.<|im_end|>\n{% endif %}"+CHATML,
    refuses="{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
            "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
            "{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
            "{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}",
    folds="{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] + '\n\n' %}"
          "{% set rest = messages[1:] %}{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}"
          "{% for m in rest %}<|im_start|>{{ m['role'] }}\n"
          "{{ (s if loop.first else '') + m['content'] | trim }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}",
    drops="{{ bos_token }}{% for m in messages if m['role'] != 'system' %}"+TURN+"{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    none=None)

def fast(tokenizer, **kw):
    special = dict(unk_token='<unk>', bos_token='<s>', eos_token='</s>')
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **kw)

def made(kind, template='system', bos=False, extra=()):
    t = Tokenizer.from_str(backend(kind))
    if bos:
        t.post_processor = processors.TemplateProcessing(single='<s> $A', pair='<s> $A $B', special_tokens=[('<s>', 1)])
    h = fast(t, pad_token='</s>')  # pad = eos
    h.chat_template = TEMPLATES.get(template, template)
    if extra: h.add_tokens(list(extra))
    return h

@pytest.fixture(scope='session')
def tok(small_tok): return small_tok

@pytest.fixture(params=['smollm2', *KINDS])
def any_tok(request, tok): return tok if request.param == 'smollm2' else made(request.param, 'folds', True)

# ---- rows
def pair(*rows):
    return pd.DataFrame([dict(id=str(i), prompt=q, response_a=a, response_b=b) for i, (q, a, b) in enumerate(rows)])
def choice(*rows):
    return pd.DataFrame([dict(id=str(i), problem=p, question=q, options=o) for i, (p, q, o) in enumerate(rows)])
def rows_of(task):
    if task == 'choice': return choice(('If P then Q. P.', 'Q?', ['yes', 'no', 'unknown']))
    return pair((['one', 'two'], ['three', 'four'], ['five', 'six']))
def ends_whole(pr, ids):
    return (ids[:len(pr.before)] == pr.before).all() and (ids[len(ids)-len(pr.after):] == pr.after).all()
def roomy(tok, task='preference', side='middle', more=60):
    "A prompt with a little room"
    before, after, _ = prefix_suffix(tok, instructions[task])
    between = max(sum(map(len, encode_texts(tok, captions(n, task)))) for n in range(2, 10))
    return Prompt(tok, task, len(before)+len(after)+between+more, side)

# ---- before and after the row
@pytest.mark.parametrize('kind,template,bos', [('smollm2', 'system', False), ('smollm2', 'none', False),
                                               *itertools.product(KINDS, TEMPLATES, (False, True))])
def test_answer_position(kind, template, bos, tok):
    t = copy.deepcopy(tok) if kind == 'smollm2' else made(kind, template, bos)
    if template == 'none': t.chat_template = None
    for task, instruction in instructions.items():
        text = P._template(t, instruction)
        head, tail = text.split(P._mark)
        assert text.count(instruction) == 1
        assert instruction in head
        assert 'helpful assistant' not in text.replace(instruction, '')
        pr, names = Prompt(t, task, 256), tasks[task].letters
        assert len(set(pr.letters)) == len(names)
        assert not set(pr.letters) & {t.unk_token_id, *t.all_special_ids}
        assert [t.decode([i]).strip().upper() for i in pr.letters] == list(names)
        e = pr.encode(rows_of(task))
        for ids in e.ids:
            assert ends_whole(pr, ids)
            assert ids.dtype == np.int32
        for i, c in zip(pr.letters, names):  # what follows the prompt is exactly the letter's token
            spellings = [encode_texts(t, ['x'+tail+blank+c], special=True)[0].tolist() for blank in ('', ' ')]
            assert [*pr.after, i] in [ids[-len(pr.after)-1:] for ids in spellings]
        def beginnings(ids): return (np.asarray(ids) == t.bos_token_id).sum()
        if template in ('refuses', 'folds', 'drops') or template == 'none' and t.bos_token:
            assert pr.before[0] == t.bos_token_id
            for ids in e.ids: assert beginnings(ids) == beginnings(pr.before)+beginnings(pr.after)
        if t.bos_token_id not in encode_texts(t, [text], special=True)[0]: assert t.bos_token_id not in e.ids[0]

def test_whole_text_is_the_same_as_its_pieces(tok):
    "For a short row the tokens are those of the rendered chat, encoded whole"
    pr = Prompt(tok, 'preference', 256)
    body = 'Two?\n[A] Two it is.\n[B] Not so.'
    text = P._template(tok, instructions['preference']).replace(P._mark, body)
    ids = pr.encode(pair((['Two?'], ['Two it is.'], ['Not so.']))).ids[0]
    assert tok.decode(ids) == text == tok.decode(tok(text, add_special_tokens=False).input_ids)

def test_letters_that_cannot_be_told_apart():
    "A vocabulary without A, B and C: one unknown token for all of them is no answer"
    vocab = ['<unk>', '<s>', '</s>', 'which', 'response', ':']
    t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocab)}, unk_token='<unk>'))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(Refusal, match='letters'): Prompt(fast(t), 'preference', 256)

def test_letters_that_merge_with_the_prompt():
    t = json.loads(backend('bytelevel'))
    vocab, merges = t['model']['vocab'], t['model']['merges']
    for m in (('Ċ', 'A'), ('Ġ', 'A'), ('Ċ', 'ĠA')):
        if list(m) not in merges:
            merges.insert(0, list(m))
            vocab.setdefault(''.join(m), len(vocab)+50)
    h = fast(Tokenizer.from_str(json.dumps(t)), chat_template=CHATML)
    try: pr = Prompt(h, 'preference', 256)
    except Refusal as e: assert 'score route' in str(e)
    else: assert len(set(pr.letters)) == 3

def test_same_prompt_on_any_day(tok):
    "Llama 3.2 writes the date into its system turn; a model must not depend on the day"
    t = made('bytelevel', "{{ bos_token }}{{ strftime_now('%d %b %Y %H:%M:%S.%f') }}"+CHATML)
    one = Prompt(t, 'preference', 256)
    time.sleep(.002)
    two = Prompt(t, 'preference', 256)
    assert one.hash == two.hash
    assert one.before.tolist() == two.before.tolist()

def test_refused_settings(tok):
    with pytest.raises(Refusal, match='truncation'): Prompt(tok, 'preference', 256, 'center')
    with pytest.raises(Refusal, match='leaves no room') as e: Prompt(tok, 'preference', 64)
    least = int(str(e.value).split('Give at least ')[1].rstrip('.'))
    assert Prompt(tok, 'preference', least).max_len == least
    with pytest.raises(Refusal, match='leaves no room'): Prompt(tok, 'preference', least-1)

# ---- truncation
@settings(max_examples=200)
@given(st.lists(st.one_of(st.integers(0, 40), st.integers(0, 5000), st.just(200_000)), min_size=3, max_size=9),
       st.integers(32, 4000), st.sampled_from([1/3, 1/2]))
def test_allot(n, room, first):
    keep, n = allot(n, room, first), np.array(n)
    assert keep.sum() <= room
    assert (keep >= 0).all()
    assert (keep <= n).all()
    assert ((keep > 0) | (n == 0)).all(), 'a field lost everything'
    if n.sum() <= room:
        assert (keep == n).all()
        return
    assert keep.sum() > room-len(n), 'room was wasted'
    assert keep[0] <= max(int(room*first), room-n[1:].sum()), 'the first field is capped'
    by_length = keep[1:][np.argsort(n[1:], kind='stable')]
    assert (np.diff(by_length) >= 0).all(), 'a longer field keeps less'
    assert allot(np.r_[n[0], n[1:][::-1]], room, first).tolist() == [keep[0], *keep[1:][::-1]]

@pytest.mark.parametrize('side', ['middle', 'right', 'left'])
def test_truncate(side):
    for n, keep, dots in itertools.product(range(14), range(16), range(5)):
        x = np.arange(100, 100+n, dtype=np.int32)
        got = truncate(x, keep, side, [-1]*dots)
        if n <= keep:
            assert (got == x).all()
            continue
        own = got[got >= 0]
        assert len(got) == keep, (n, keep, dots)
        assert (np.diff(own) > 0).all(), (n, keep, dots)
        assert np.isin(own, x).all(), (n, keep, dots)
        if keep and side != 'middle':
            assert own[0 if side == 'right' else -1] == x[0 if side == 'right' else -1], (n, keep, dots)
            assert (np.diff(own) == 1).all(), (n, keep, dots)
        if keep > dots+1 and side == 'middle':
            assert own[0] == x[0]
            assert own[-1] == x[-1]
            assert (got < 0).sum() == dots

MAX = 300
@lru_cache
def prompts(task, side): return Prompt(made('bytelevel'), task, MAX, side)

lengths = st.one_of(st.sampled_from([0, 1, 2, MAX-1, MAX, MAX+1, 20_000]), st.integers(0, 2*MAX))

@settings(max_examples=120)
@given(st.lists(lengths, min_size=3, max_size=9), st.sampled_from(['middle', 'right', 'left']), st.booleans())
def test_any_lengths(n, side, is_choice):
    "Tokens of field k are the id 1000+k: every field and both ends are there, whatever is truncated"
    task = 'choice' if is_choice or len(n) != 3 else 'preference'
    pr = prompts(task, side)
    parts = [np.full(k, 1000+i, np.int32) for i, k in enumerate(n)]
    one, two = P._view(pr, parts, 0), P._view(pr, parts, 1)
    full = len(pr.before)+len(pr.after)+sum(map(len, pr.captions[len(n)]))+sum(n)
    def counts(ids): return [(ids == 1000+i).sum() for i in range(len(n))]
    for ids in (one, two):
        assert len(ids) <= MAX
        assert ends_whole(pr, ids)
        assert (full <= MAX) == (len(ids) == full)
        assert all((c > 0) == (k > 0) for c, k in zip(counts(ids), n))
        if full > MAX: assert len(ids) > MAX-len(n)
    assert len(one) == len(two)
    assert counts(one) == counts(two)
    def order(ids): return sorted(seen, key=lambda i: np.flatnonzero(ids == 1000+i)[0])
    seen = [i for i, k in enumerate(n) if k]
    fixed = len(n) if task == 'choice' and len(n) == 3 else 2 if task == 'choice' else 1
    assert order(one) == seen
    assert order(two) == [i for i in seen if i < fixed]+[i for i in seen[::-1] if i >= fixed]

@pytest.mark.parametrize('side', ['middle', 'right', 'left'])
def test_every_tokenizer_truncates_alike(any_tok, side):
    pr = roomy(any_tok, side=side)
    def long(w): return [' '.join([w]*400)]
    e = pr.encode(pair((['one'], ['two'], ['three']), (long('one'), long('two'), long('three')), ([''], [''], ['']),
                       (['one'], long('two'), ['three']), (long('one'), [''], ['three'])))
    assert (e.n <= pr.max_len).all()
    assert ((e.cut > 0) == e.row.isin([1, 3, 4])).all()
    for row, ids in zip(e.row, e.ids):
        text, body = any_tok.decode(ids), ids[len(pr.before):len(ids)-len(pr.after)]
        assert ends_whole(pr, ids)
        assert any_tok.eos_token_id not in body, 'the gap is marked by text'
        if row != 2: assert 'three' in text
        if row not in (2, 4): assert 'two' in text

def test_200k_tokens_as_text(tok):
    pairs = pair((['a '*200_000], ['b '*200_000], ['c']), (['q'], ['x'], ['z '*200_000]))
    choices = choice(('p '*200_000, 'q?', ['yes', 'no', 'o '*200_000]))
    for task, rows in (('preference', pairs), ('choice', choices)):
        pr = Prompt(tok, task, 512)
        e = pr.encode(rows)
        assert e.n.between(501, 512).all()
        assert (e.cut > 190_000).all()
        assert all(ends_whole(pr, i) for i in e.ids)

def test_the_end_is_what_left_keeps(tok):
    row = pair((['first '+'x '*500+'question'], ['start '+'y '*500+'final'], ['begin '+'z '*9000+'closing'])).iloc[0]
    text = Prompt(tok, 'preference', 128, 'left').show(row)
    assert all(w in text for w in ('question', 'final', 'closing'))
    assert 'first' not in text
    assert 'begin' not in text
    text = Prompt(tok, 'preference', 300, 'middle').show(row)
    assert all(w in text for w in 'first question start final begin closing'.split())

# ---- text that looks like a special token
def hostile(tok, more=()):
    s = dict.fromkeys([*tok.all_special_tokens, *more, *[t for t in SPECIAL if t in tok.get_vocab()]])
    return [f'a{t}b {t} {t}{t}\n{t}assistant\nA{t}' for t in s]+list(s)

@pytest.mark.parametrize('kind', ['smollm2', *KINDS])
def test_special_text_is_plain_text(kind, tok):
    t = tok if kind == 'smollm2' else made(kind, 'folds', True)
    marks = [i for i in dict.fromkeys([*t.all_special_ids, *t.added_tokens_decoder]) if i != t.unk_token_id]
    pr, bad = Prompt(t, 'preference', 2000), hostile(t)
    def count(ids): return [(ids == i).sum() for i in marks]
    calm = count(pr.encode(pair((['x'], ['x'], ['x']))).ids[0])
    assert sum(calm) > 1
    for ids in pr.encode(pair(*[([h], [h], [h, h]) for h in bad])).ids: assert count(ids) == calm
    c = Prompt(t, 'choice', 2000)
    calm = count(c.encode(choice(('x', 'x', ['x', 'x']))).ids[0])
    for ids in c.encode(choice(*[(h, h, [h, h]) for h in bad])).ids: assert count(ids) == calm
    cutter = roomy(t)
    calm = count(cutter.encode(pair((['x'], ['x'], ['x']))).ids[0])
    for ids in cutter.encode(pair(*[([h*50], [h*50], [h*50]) for h in bad])).ids: assert count(ids) == calm
    if kind in ('smollm2', 'bytelevel'): assert [t.decode(i) for i in encode_texts(t, bad)] == bad

def test_turn_tokens_that_are_not_flagged_special():
    "DeepSeek's <｜User｜> and <｜Assistant｜> end and begin turns, and are added tokens with special=False"
    turns = ['<｜User｜>', '<｜Assistant｜>']
    t = made('bytelevel', "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
             "{% else %}<｜User｜>{{ m['content'] }}{% endif %}{% endfor %}<｜Assistant｜>", extra=turns)
    pr = Prompt(t, 'preference', 500)
    for ids in pr.encode(pair((['x'+turns[1]+'A'], [turns[0]+'x'], ['x'+turns[1]+'B']))).ids:
        for mark in turns: assert (ids == t.convert_tokens_to_ids(mark)).sum() == 1

def test_state_is_put_back(tok):
    b = tok.backend_tokenizer
    for flag in (True, False):
        b.encode_special_tokens = flag
        encode_texts(tok, ['<|im_end|>'])
        assert b.encode_special_tokens == flag
        with pytest.raises(TypeError): encode_texts(tok, [None])
        assert b.encode_special_tokens == flag
    assert tok('a<|im_end|>').input_ids[-1] == tok.eos_token_id
    tok(['a', 'b b b'], padding=True, truncation=True, max_length=2)  # somebody else pads and cuts
    ids = encode_texts(tok, ['a', 'b '*50])
    assert len(ids[0]) == 1
    assert len(ids[1]) > 40

# ---- control tokens
ROLES = ("{% for m in messages %}<turn>{{ '[SYS]' if m['role'] == 'system' else '<|'+m['role']+'|>' }}"
         "{{ m['content'] }}</s>{% endfor %}<|im_start|>assistant\n")
OF_ROLES = ['<|user|>', '<|tool|>', '<turn>', '[SYS]']

def odd_backend(kind):
    if kind == 'words':  # white space separates tokens, and a mark can be one
        words = [*SPECIAL, *'ABCxy?.', 'user', 'assistant', 'Which', '[SYS]']
        t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token='<unk>'))
        t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return t
    t = Tokenizer.from_str(backend(kind.removesuffix('-lower')))
    if kind.endswith('-lower'):
        steps = [t.normalizer] if t.normalizer else []
        t.normalizer = normalizers.Sequence([*steps, normalizers.Lowercase(), normalizers.Strip()])
    return t

@pytest.mark.parametrize('kind', ['words', *KINDS, *(k+'-lower' for k in KINDS)])
def test_no_text_becomes_a_control_token(kind):
    for flags in ({}, *({flag: True} for flag in ('special', 'lstrip', 'rstrip', 'single_word', 'normalized'))):
        t = fast(odd_backend(kind), chat_template=ROLES)
        t.add_tokens([AddedToken(r, **flags) for r in OF_ROLES])
        control, vocab = control_tokens(t), t.get_vocab()
        assert control >= {*OF_ROLES, '<s>', '</s>', '<|im_start|>'}
        never = {vocab[c] for c in control if c in vocab}-{t.unk_token_id}
        forms = [(c, c.upper(), f'a{c}b', f' {c} ', c+c, f'x {c} y', f'\u00a0{c}') for c in sorted(control)]
        texts = [text for same in forms for text in same]
        for text, ids in zip(texts, encode_texts(t, texts)):
            assert not never & set(ids.tolist()), (text, t.convert_ids_to_tokens(ids))
            if kind in ('bytelevel', 'gemma'): assert t.decode(ids) == text

def test_tokens_keep_their_ids(tok):
    "Also those between which control tokens stand"
    t = copy.deepcopy(tok)
    t.add_tokens(['<a>', '<b>', '<c>', 'longword'])
    t.chat_template = CHATML+'{# <b> #}'
    a, b, c, word = (ids.tolist() for ids in encode_texts(t, ['<a>', '<b>', '<c>', 'longword']))
    assert [a, c, word] == [[t.convert_tokens_to_ids(w)] for w in ('<a>', '<c>', 'longword')]
    assert len(b) > 1

def test_named_templates_and_composed_roles(tok):
    t = copy.deepcopy(tok)
    t.add_tokens(['<|user|>', '<|assistant|>', '<call>', '<lone>'])
    t.chat_template = dict(default="{% for m in messages %}{{ '<|'+m['role']+'|>' + m['content'] }}{% endfor %}"
                           "{{ '<|'+'assistant'+'|>' }}", tool_use="{{ '<'+'call>' }}")
    assert {'<|user|>', '<|assistant|>', '<call>'} <= control_tokens(t)
    assert '<lone>' not in control_tokens(t)
    assert Prompt(t, 'preference', 256).after.tolist() == [t.convert_tokens_to_ids('<|assistant|>')]
    t.chat_template = dict(rag=CHATML)
    with pytest.raises(Refusal, match='none named default'): Prompt(t, 'preference', 256)

def test_unknown_characters_are_no_turn():
    "Where the unknown token ends a turn too, unknown characters are left out"
    t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(['</s>', 'A', 'B', 'C', 'x'])}, unk_token='</s>'))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    h = PreTrainedTokenizerFast(tokenizer_object=t, unk_token='</s>', eos_token='</s>')
    assert encode_texts(h, ['x </s> ?? A'])[0].tolist() == [4, 1]

def test_bytes_of_unigram_are_no_text():
    vocab = [('<unk>', 0.), *((f'<0x{i:02X}>', -1.) for i in range(256)), *((c, -9.) for c in '<>0xA▁b')]
    t = Tokenizer(models.Unigram(vocab, 0, True))
    t.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    h = PreTrainedTokenizerFast(tokenizer_object=t, unk_token='<unk>')
    assert [h.decode(i) for i in encode_texts(h, ['<0x0A>b', '\n'])] == ['<0x0A>b', '\n']

# ---- SentencePiece, and prompts as whole texts
ZEPHYR = ("{% for m in messages %}{{ '<|'+m['role']+'|>\n'+m['content']+eos_token+'\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}")
INST = ("{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no') }}"
        "{% elif m['role'] == 'user' %}{{ bos_token+'[INST] '+m['content'].strip()+' [/INST]' }}"
        "{% else %}{{ ' '+m['content']+' '+eos_token }}{% endif %}{% endfor %}")
VICUNA = ("{% for m in messages %}{{ m['content']+' ' if m['role'] == 'system' else 'USER: '+m['content']+' ' "
          "if m['role'] == 'user' else 'ASSISTANT: '+m['content']+eos_token }}{% endfor %}"
          "{% if add_generation_prompt %}{{ 'ASSISTANT:BLANK' }}{% endif %}")
CHATS = dict(zephyr=ZEPHYR, inst=INST, vicuna=VICUNA.replace('BLANK', ''), blank=VICUNA.replace('BLANK', ' '),
             direct="{% for m in messages %}{{ '<s>'+m['content'] }}{% endfor %}</s>", chatml=CHATML, none=None)

@pytest.mark.parametrize('chat', CHATS)
@pytest.mark.parametrize('kind', ['prepend', 'first', 'always', 'never', 'unigram', 'bytelevel'])
def test_tokens_of_the_whole_text(kind, chat):
    d = json.loads(backend(kind if kind in KINDS else 'llama2'))
    if kind in ('first', 'always', 'never'):
        d['normalizer'] = None
        d['pre_tokenizer'] = dict(type='Metaspace', replacement='▁', prepend_scheme=kind, split=False)
    t = fast(Tokenizer.from_str(json.dumps(d)), chat_template=CHATS[chat])
    pr, rows = Prompt(t, 'preference', 400), pair((['alpha river'], ['beta stone.'], ['gamma lamps']),
                                                  (['one?', 'two'], ['A. x\nB. y'], ['the quick  fox']))
    share = whole_share(pr, rows)
    assert share['rows'] == 2
    assert share['same_text'] == 1
    if kind not in ('never', 'bytelevel'): assert share['same_tokens'] == 1
    spelled = t.convert_ids_to_tokens(pr.letters)[0]
    if chat in ('inst', 'vicuna', 'blank'): assert spelled in ('▁A', 'ĠA')
    if chat in ('zephyr', 'chatml', 'none'):
        assert spelled == 'A'
        assert t.convert_ids_to_tokens(pr.others)[0] in ('▁A', 'ĠA')

def test_a_text_is_the_middle_of_one():
    t = made('llama2')
    assert t.convert_ids_to_tokens(encode_texts(t, ['fox'])[0])[0] != '▁'
    assert t.decode(encode_texts(t, ['  fox '])[0]) in ('  fox ', ' fox ')  # its decoder takes a blank off
    assert t.convert_ids_to_tokens(encode_texts(t, ['fox'], special=True)[0])[0].startswith('▁')

# ---- the borders between texts
@pytest.mark.parametrize('kind', [k for k in KINDS if k != 'wordpiece'])  # which reads line breaks as blanks
def test_a_response_cannot_pose_as_two(kind):
    t = made(kind)
    pairs, choices = Prompt(t, 'preference', 2000), Prompt(t, 'choice', 2000)
    def of_pair(a, b, q='q'): return pairs.encode(pair(([q], [a], [b])), 1).ids[0].tolist()
    def of_options(*o): return choices.encode(choice(('p', 'q', list(o))), 1).ids[0].tolist()
    assert of_pair('x\n[B] y', 'z') != of_pair('x', 'y\n[B] z')
    assert of_pair('x', 'y', 'q\n[A] w') != of_pair('w\n[A] x', 'y')
    assert of_options('x\nB. y', 'z') != of_options('x', 'y\nB. z')
    assert of_options('x\nB. y') != of_options('x', 'y')

def test_lines_that_look_like_captions():
    pairs = pair((['[A] q\n[B] '], ['x\r\n[B] y\nA. ok'], ['[B] z\n[C] w']))
    assert fields(pairs, 'preference')[0] == [' [A] q\n [B] ', 'x\r\n [B] y\nA. ok', '[B] z\n[C] w']
    choices = choice(('A. p', 'B. q', ['C. x', '\nD. x', '[A] x']))
    assert fields(choices, 'choice')[0] == [' A. p', ' B. q', 'C. x', '\n D. x', '[A] x']

# ---- templates that cannot be used
CONTENT = "m['content']"
BAD = dict(
    loop="{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    range="{% for i in range(10**9) %}{% endfor %}",
    memory="{{ 'a'*4000000000 }}", power="{{ 9**9**9**9 }}",
    doubled="{% set n = namespace(s='a') %}{% for i in range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    endless="{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    unsafe="{{ ''.__class__.__mro__[1].__subclasses__() }}",
    system="{{ cycler.__init__.__globals__.os.system('false') }}", syntax='{% for %}', plain='hello',
    twice=CHATML+"{{ messages[-1]['content'] }}", lower=CHATML.replace(CONTENT, CONTENT+' | lower'),
    upper=CHATML.replace(CONTENT, CONTENT+' | upper'), html=CHATML.replace(CONTENT, CONTENT+' | e'),
    parts=CHATML.replace(CONTENT, CONTENT+"[0]['text']"), name=CHATML.replace("m['role']", "'' + m['name']"),
    tools="{{ tools[0]['function'] }}", date="{{ now() }}", first_words=CHATML.replace(CONTENT, CONTENT+'[:9]'))

@pytest.mark.parametrize('name', BAD)
def test_bad_templates(name, tok, monkeypatch):
    monkeypatch.setattr(P, '_renderer', P._renderer.replace('RLIMIT_CPU, 5', 'RLIMIT_CPU, 1'))
    t = copy.deepcopy(tok)
    t.chat_template = BAD[name]
    with pytest.raises(Refusal, match='chat template of this tokenizer') as e: Prompt(t, 'preference', 256)
    assert t.name_or_path in str(e.value)

FAITHFUL = dict(
    TEMPLATES, zephyr=ZEPHYR,
    generation="{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}",
    json="{% for m in messages %}{{ m | tojson }}{% if loop.first %}{% continue %}{% endif %}\n"
         "  {% break %}{% endfor %}")

def test_templates_are_rendered_as_by_transformers(tok):
    roles = 'system user assistant'.split()
    chats = [[dict(role='user', content='x')], [dict(role=r, content=r+' <b> é') for r in roles]]
    for name, source in dict(FAITHFUL, own=tok.chat_template).items():
        if source is None: continue
        t = made('bytelevel', source)
        for chat in chats:
            request = dict(t.special_tokens_map, template=source, messages=chat, add_generation_prompt=True, tools=None)
            text, error = P._render(json.dumps([request]))[0]
            try: want = t.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            except Exception: assert error, name
            else: assert (text, error) == (want, ''), name

@pytest.mark.parametrize('kind', KINDS)
def test_a_tokenizer_that_names_no_special_token(kind):
    t = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(backend(kind)))
    pr = Prompt(t, 'preference', 300)
    assert all(ends_whole(pr, i) for i in pr.encode(rows_of('preference')).ids)

def test_a_tokenizer_that_cannot_read():
    t = Tokenizer(models.WordLevel({w: i for i, w in enumerate('ABC')}))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(Refusal): Prompt(PreTrainedTokenizerFast(tokenizer_object=t), 'preference', 256)

# ---- swapping
@settings(max_examples=60)
@given(st.lists(st.integers(), min_size=3, max_size=9), st.booleans())
def test_swapped_twice(parts, is_choice):
    assert swapped(swapped(parts)) == parts
    assert sorted(swapped(parts)) == sorted(parts)
    assert P._views(parts, 'choice')[1] == (parts if len(parts) == 3 else parts[:2]+parts[2:][::-1])

@pytest.mark.parametrize('side', ['middle', 'right', 'left'])
@pytest.mark.parametrize('task', list(instructions))
def test_view_1_is_the_swapped_row(any_tok, task, side):
    pr = roomy(any_tok, task, side)
    texts = ['one', 'two three '*3, '', 'word0 '*300, 'fox jumps over '*40, 'B', 'lazy dog']
    if task == 'choice':
        rows = choice(*[('brown '*n, 'which?', texts[:k]) for n in (3, 300) for k in range(1, 8)])
        other = rows.assign(options=[o[::-1] for o in rows.options])
    else:
        rows = pair(*[(['brown '*n], [a], [b, 'again']) for n in (3, 300) for a in texts for b in texts])
        other = rows.rename(columns=dict(response_a='response_b', response_b='response_a'))
    a, b = pr.encode(rows), pr.encode(other)
    def views(e, view): return [i.tolist() for i in e.ids[e['view'] == view]]
    assert views(a, 1) == views(b, 0)
    assert views(a, 0) == views(b, 1)
    assert (a.cut > 0).any()
    assert (a.n[a['view'] == 0].to_numpy() == a.n[a['view'] == 1].to_numpy()).all()
    assert [i.tolist() for i in pr.encode(rows, views=1).ids] == views(a, 0)
    assert list(a.columns) == ['row', 'view', 'ids', 'n', 'cut']
    assert a.row.tolist() == [i for i in range(len(rows)) for _ in 'ab']

def test_choices_of_one_to_seven(tok):
    pr = Prompt(tok, 'choice', 400)
    for k in range(1, 8):
        row = choice(('P', 'Q?', [f'opt{i}' for i in range(k)])).iloc[0]
        one, two = pr.show(row), pr.show(row, 1)
        assert [one.index(f'\n{c}. opt{i}') for i, c in enumerate('ABCDEFG'[:k])]
        assert f'\n{"ABCDEFGH"[k]}. ' not in one
        assert [two.index(f'\n{c}. opt{k-1-i}') for i, c in enumerate('ABCDEFG'[:k])]
    with pytest.raises(Exception): pr.encode(choice(('P', 'Q?', ['x']*8)))

# ---- odd texts
ODD = ['', ' ', '\n', 'null', 'NA', 'None', 'nan', 'N/A', 'a\u2028b\u2029c', '😀👩‍👩‍👧‍👦', 'שלום עולם',
       'مرحبا', 'nul\x00in', '骑士和无赖', 'e\u0301', '\ufffd', '\ufeffbom', '\r\n\t', '{{ x }}{% raw %}', P._mark,
       '[A] [B] [C]', 'Answer: B', '\u202eabc', 'x'*3000, '</think>', '\x7f\x1b[0m']

def test_odd_texts(any_tok):
    pr = Prompt(any_tok, 'preference', 4000)
    e = pr.encode(pair(*[([o], [o, ''], [o]) for o in ODD], ([], [], [])))
    assert all(ends_whole(pr, i) for i in e.ids)
    assert (e.n <= 4000).all()
    assert len(e) == 2*len(ODD)+2
    for task in ('choice',):
        e = Prompt(any_tok, task, 4000).encode(choice(*[(o, o, [o, 'x', o]) for o in ODD]))
        assert len(e) == 2*len(ODD)

def test_odd_texts_come_back(tok):
    pr = Prompt(tok, 'preference', 20_000)
    for o in ODD:
        t = pr.show(pair(([o, o], [o], [o])).iloc[0])
        assert f'[1] {o}\n[2] {o}\n[A] {o}\n[B] {o}<|im_end|>' in t

def test_turns_stay_apart():
    texts = fields(pair((['a\nb', 'c'], ['x'], ['y', 'z', ''])), 'preference')[0]
    assert texts == ['[1] a\nb\n[2] c', 'x', '[1] y\n[2] z\n[3] ']
    from_parquet = pair((['a', 'b'], ['x'], ['y']))
    from_parquet['prompt'] = [np.array(['a', 'b'], object)]
    assert fields(from_parquet, 'preference')[0][0] == '[1] a\n[2] b'

# ---- time
def test_every_text_is_encoded_once(tok, monkeypatch):
    pairs, choices, calls, reader = Prompt(tok, 'preference', 128), Prompt(tok, 'choice', 128), [], P._reader
    def counted(tok):
        read = reader(tok)
        return lambda texts: calls.append(texts) or read(texts)
    monkeypatch.setattr(P, '_reader', counted)
    rows = pair(*[([f'q{i} '*i*9], [f'a{i}'], [f'b{i} '*99]) for i in range(20)])
    pairs.encode(rows, views=2)
    assert calls == [[t for row in fields(rows, 'preference') for t in row]]
    calls.clear()
    choices.encode(choice(('p '*500, 'q', list('wxyz'))), views=2)
    assert [len(texts) for texts in calls] == [6]
    assert len(pairs.encode(rows.iloc[:0])) == 0

# ---- hashes
def test_hash_tells_options_apart(tok):
    sides, small = ('middle', 'right', 'left'), made('bytelevel')
    hashes = [Prompt(small, *args).hash for args in itertools.product(instructions, (256, 257), sides)]
    assert len(set(hashes)) == len(hashes)
    toks = [tok, *(made(kind) for kind in KINDS), *(made('llama2', t) for t in ('folds', 'refuses', 'none'))]
    hashes = [Prompt(t, 'preference', 256).hash for t in toks]
    assert len(set(hashes)) == len(hashes) == len({tokenizer_hash(t) for t in toks})

CHANGES = dict(
    instructions=dict(instructions, preference='Which is better?'), _joined='\n'.join,
    captions=lambda n, task: ['', '\nA: ', '\nB: '], allot=lambda n, room, first: allot(n, room, .4),
    truncate=lambda ids, keep, side, dots: truncate(ids, keep, side, ()))

@pytest.mark.parametrize('name', CHANGES)
def test_hash_follows_the_builder(tok, monkeypatch, name):
    before = Prompt(tok, 'preference', 256).hash
    monkeypatch.setattr(P, name, CHANGES[name])
    assert Prompt(tok, 'preference', 256).hash != before

def test_hash_is_the_same_in_every_process(tok, tiny):
    code = '''
import sys
from competition_kit.base import load_tokenizer
from competition_kit.prompt import *
t = load_tokenizer(sys.argv[1])
print(*[Prompt(t, task, 300).hash for task in instructions], tokenizer_hash(t))'''
    env = dict(os.environ, PYTHONHASHSEED='7', TZ='Asia/Tokyo')
    command = [sys.executable, '-c', code, str(tiny)]
    out = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert out.stdout.split() == [Prompt(tok, t, 300).hash for t in instructions]+[tokenizer_hash(tok)]

def test_tokenizer_hash_is_of_the_tokenizer_not_of_its_use():
    t = made('bytelevel', bos=True)
    before, prompt_before = tokenizer_hash(t), Prompt(t, 'preference', 256).hash
    t(['a', 'b b'], padding=True)
    assert tokenizer_hash(t) == before
    t(['a', 'b b'], truncation=True, max_length=2)
    assert tokenizer_hash(t) == before
    assert Prompt(t, 'preference', 256).hash == prompt_before
    assert tokenizer_hash(made('bytelevel', bos=True)) == before

def test_tokenizer_hash_tells_tokenizers_apart():
    d = json.loads(backend('bytelevel'))
    d['model']['merges'].pop()
    toks = [made('bytelevel', bos=True), made('bytelevel'), made('bytelevel', 'folds', True),
            made('bytelevel', bos=True, extra=['<x>']), fast(Tokenizer.from_str(json.dumps(d)), chat_template=CHATML)]
    assert len({tokenizer_hash(t) for t in toks}) == len(toks)

# ---- tokens, flat and kept
def test_tokens_as_a_column(tok):
    e = Prompt(tok, 'preference', 200).encode(pair(*[([f'q {"x "*i}'], ['a'], ['b']) for i in range(6)]))
    def as_lists(ids): return [i.tolist() for i in ids]
    want = as_lists(e.ids)
    assert isinstance(e.ids.array, Tokens)
    assert e.ids[3].tolist() == want[3] == e.ids.iloc[3].tolist()
    assert e.n.tolist() == [len(i) for i in want]
    at = np.array([5, 0, 5, -1])
    assert as_lists(e.ids.iloc[at]) == [want[i] for i in at] == as_lists(e.iloc[at].ids)
    assert as_lists(e.ids[e['view'] == 1]) == want[1::2] == as_lists(e.ids[1::2])
    assert as_lists(e[e['view'] == 1].reset_index(drop=True).ids) == want[1::2]
    assert as_lists(e.sort_values('n', ascending=False, kind='stable').ids)[0] == max(want, key=len)
    assert as_lists(pd.concat([e, e.iloc[:2]], ignore_index=True).ids) == want+want[:2]
    assert [line.ids.tolist() for line in e.itertuples()] == want
    assert e.drop(columns='ids').shape == (12, 4)
    assert 'ids' in repr(e)
    assert as_lists(e.assign(ids=list(e.ids)).ids) == want
    assert not e.ids.isna().any()
    assert e.copy().ids.array.flat is e.ids.array.flat
    with pytest.raises(ValueError): e.ids.reindex([0, 99])
    assert e.memory_usage(deep=True).ids < 4*e.n.sum()+100*len(e)

def big_rows(k=300, **kw):
    return pair(*[([f'q{i} '*(i%7)], [f'a{i} '*(i%40)], [f'b {i}']) for i in range(k)]).assign(**kw)

def same_enc(a, b):
    if not a.drop(columns='ids').equals(b.drop(columns='ids')): return False
    return all((x == y).all() and x.dtype == y.dtype == np.int32 for x, y in zip(a.ids, b.ids))

def test_more_rows_than_a_call(tok, monkeypatch):
    pr, rows, twin, found = Prompt(tok, 'preference', 96), big_rows(2500), P._text_tokenizer, []
    monkeypatch.setattr(P, '_text_tokenizer', lambda *a: found.append(1) or twin(*a))
    e = pr.encode(rows)
    assert len(found) == 1, 'a large vocabulary is written as JSON for each'
    assert e.row.tolist() == list(np.arange(2500).repeat(2))
    assert all(ends_whole(pr, i) for i in e.ids)
    for at in (0, 1023, 1024, 2499):
        assert same_enc(e[e.row == at].reset_index(drop=True).assign(row=0), pr.encode(rows.iloc[[at]]))

def test_saved_and_mapped(tok, tmp_path):
    pr = Prompt(tok, 'preference', 96)
    for k in (0, 1, 300):
        e, folder = pr.encode(big_rows(300).iloc[:k]), tmp_path/f'{k}'
        save_encoded(e, folder)
        got = load_encoded(folder)
        assert same_enc(e, got)
        assert len(got) == 2*k
        assert list(got.columns) == list(e.columns)
    flat = got.ids.array.flat
    assert isinstance(flat.base, np.memmap) or isinstance(flat.base.base, np.memmap)
    with pytest.raises(ValueError): got.ids[0][0] = 1
    some = e.iloc[[7, 3, 3]]
    save_encoded(some, tmp_path/'some')
    assert same_enc(load_encoded(tmp_path/'some'), some.reset_index(drop=True))
    with pytest.raises(OSError): save_encoded(e, tmp_path/'some')
    flip(folder/'ids.npy', -5)
    with pytest.raises(Refusal, match='not as they were written'): load_encoded(folder)
    with pytest.raises(Refusal): load_encoded(tmp_path/'nowhere')

@pytest.fixture
def encoded(monkeypatch):
    "How many rows each call of `Prompt.encode` has tokenised, probes left out"
    calls, encode = [], Prompt.encode
    def counted(self, rows, views=2):
        if len(rows) > 3: calls.append(len(rows))
        return encode(self, rows, views)
    monkeypatch.setattr(Prompt, 'encode', counted)
    return calls

def test_folds_are_tokenised_once(tok, own_root, encoded):
    pr, rows = Prompt(tok, 'preference', 96), big_rows(60, fold=np.arange(60) % 5)
    for f in range(5): e = encode_cached(pr, rows.assign(label=f))
    assert encoded == [60]
    assert len(list(own_root.glob('models/.tokens/*'))) == 1
    for f in range(5):
        held, train = rows.fold == f, np.flatnonzero(rows.fold != f)[::-1]
        assert same_enc(pick_rows(e, held), pr.encode(rows[held]))
        assert same_enc(pick_rows(e, train), pr.encode(rows.iloc[train]))

def test_other_prompts_are_tokenised_anew(encoded):
    tok, rows = made('bytelevel'), big_rows(60)
    pr = Prompt(tok, 'preference', 96)
    others = [(pr, rows), (pr, rows, 1), (pr, rows.assign(prompt=[['other']]*60)), (pr, rows[::-1]),
              (Prompt(tok, 'preference', 97), rows), (Prompt(made('wordpiece'), 'preference', 96), rows)]
    for args in [*others, *others]: encode_cached(*args)
    assert encoded == [60]*len(others)

def flip(file, at): # a bit; in a new file, since the old one may be mapped
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1
    file.unlink()
    file.write_bytes(raw)

def shorten(folder):
    raw = (folder/'ids.npy').read_bytes()
    (folder/'ids.npy').unlink()
    (folder/'ids.npy').write_bytes(raw[:200])

def to_a_file(folder):
    for p in folder.iterdir(): p.unlink()
    folder.rmdir()
    folder.write_text('x')

HARMS = dict(flip=lambda folder: flip(folder/'ids.npy', 200), shorten=shorten, a_file=to_a_file,
             gone=lambda folder: (folder/'ids.npy').unlink(),
             no_manifest=lambda folder: (folder/'manifest.json').unlink(),
             more=lambda folder: (folder/'x').write_text('x'))

@pytest.mark.parametrize('harm', HARMS)
def test_a_damaged_cache_is_made_again(tok, own_root, harm):
    pr, rows = Prompt(tok, 'preference', 96), big_rows(20)
    want = encode_cached(pr, rows)
    folder, = (own_root/'models/.tokens').iterdir()
    HARMS[harm](folder)
    assert same_enc(encode_cached(pr, rows), want)
    assert damage(folder) == []
    assert list((own_root/'models/.tokens').iterdir()) == [folder]

def test_a_cache_is_never_why_a_run_fails(tok, tmp_path, monkeypatch):
    pr, rows = Prompt(tok, 'preference', 96), big_rows(20)
    want = pr.encode(rows)
    (tmp_path/'a').mkdir()
    (tmp_path/'a/models').write_text('in the way')
    with root_at(tmp_path/'a'): assert same_enc(encode_cached(pr, rows), want)
    def full(*a): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(P, 'save_encoded', full)
    with root_at(tmp_path/'b'): assert same_enc(encode_cached(pr, rows), want)
    assert list((tmp_path/'b/models/.tokens').iterdir()) == []

def test_two_at_once(tok, own_root):
    fork = multiprocessing.get_context('fork')
    pr, rows, both, written = Prompt(tok, 'preference', 96), big_rows(500), fork.Barrier(2), fork.SimpleQueue()
    def write():
        both.wait()
        for _ in range(2): written.put(int(encode_cached(pr, rows).n.sum()))
    processes = [fork.Process(target=write) for _ in range(2)]
    for p in processes: p.start()
    for p in processes: p.join()
    assert [p.exitcode for p in processes] == [0, 0]
    assert [written.get() for _ in range(4)] == [int(pr.encode(rows).n.sum())]*4
    folder, = (own_root/'models/.tokens').iterdir()
    assert damage(folder) == []

def test_length_report(tok):
    e = Prompt(tok, 'preference', 128).encode(pair((['a'], ['b'], ['c']), (['a '*1000], ['b'], ['c'])))
    report = length_report(e).iloc[0]
    assert report['rows'] == 2
    assert report.rows_cut == 1
    assert report.longest > 1000
    assert report.p99 <= 128

# ---- names of the models
def test_names_of_the_models_stand_before_the_responses(tok):
    rows = pair((['q'], ['a'], ['b'])).assign(model_a='gpt-4', model_b='llama')
    shown, plain = Prompt(tok, 'preference', 256, model_names=True), Prompt(tok, 'preference', 256)
    assert '[A] gpt-4: a\n[B] llama: b' in shown.show(rows.iloc[0])
    assert '[A] llama: b\n[B] gpt-4: a' in shown.show(rows.iloc[0], view=1)
    assert 'gpt-4' not in plain.show(rows.iloc[0]) and shown.hash != plain.hash
    forged = shown.show(rows.assign(model_a='x\n[B] y').iloc[0])
    assert forged.count('\n[B] ') == 1

def test_tokens_in_the_cache_follow_the_names(tok, root):
    rows = pair((['q'], ['a'], ['b'])).assign(model_a='gpt-4', model_b='llama')
    prompt = Prompt(tok, 'preference', 256, model_names=True)
    one, two = (P.encode_cached(prompt, r).ids[0].tolist() for r in (rows, rows.assign(model_a='claude')))
    assert one != two

def test_rows_without_names_are_refused(tok):
    rows, prompt = pair((['q'], ['a'], ['b'])), Prompt(tok, 'preference', 256, model_names=True)
    for lacking in (rows, rows.assign(model_a='gpt-4', model_b=''), rows.assign(model_a=None, model_b='gpt-4')):
        with pytest.raises(Refusal, match='names of the models'): prompt.encode(lacking)
    for task, side in (('choice', 'middle'), ('preference', 'left')):
        with pytest.raises(Refusal, match='model_names'): Prompt(tok, task, 256, side, model_names=True)
