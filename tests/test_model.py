"Packed forwards, gradients and adapters of tiny random models of many kinds, against transformers and peft themselves"
import json, shutil
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, Gemma2Config, Gemma3Config,
                          Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config)
from competition_kit.base import _fetch, base_hash, base_path, fetched_base, load_tokenizer, pick_dtype
from competition_kit.core import Refusal, damage, models_path
from competition_kit.model import (Classifier, add_lora, collate, continue_from, load_classifier, option_mask,
                                   pack_loss, packed_attention, predict, view_probs, with_adapter)
from competition_kit.prompt import Prompt
from competition_kit.speed import fuse, layers
from competition_kit.rows import swap_probs, tasks

# ---- tiny models in folders. Wide initial weights, so that attention looks at something
SHAPE = dict(vocab_size=49152, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=16, initializer_range=.25,
             max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=2)
def config(cls, **kw): return cls(**SHAPE | kw)
CONFIGS = dict(
    llama=lambda: config(LlamaConfig, tie_word_embeddings=False),
    llama_tied=lambda: config(LlamaConfig, tie_word_embeddings=True, num_key_value_heads=1, head_dim=32),
    qwen2=lambda: config(Qwen2Config, tie_word_embeddings=True, num_hidden_layers=3, use_sliding_window=True,
                         sliding_window=9, max_window_layers=1),
    qwen3=lambda: config(Qwen3Config, tie_word_embeddings=False),
    mistral=lambda: config(MistralConfig, sliding_window=8, tie_word_embeddings=False),
    gemma2=lambda: config(Gemma2Config, sliding_window=8, attn_logit_softcapping=3., final_logit_softcapping=2.,
                          query_pre_attn_scalar=24, num_hidden_layers=4, pad_token_id=0),
    gemma3=lambda: config(Gemma3TextConfig, sliding_window=8, num_hidden_layers=4,
                          layer_types=['sliding_attention', 'full_attention']*2, query_pre_attn_scalar=24))

def save(folder, cfg, tokenizer, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(cfg, dtype=torch.float32)
    for n, p in model.named_parameters():
        if p.dim() == 1: p.data.normal_(p.data.mean().item(), .2)  # norms and biases that do something
    model.save_pretrained(folder)
    for f in Path(tokenizer).iterdir():
        if 'token' in f.name or f.suffix == '.jinja': shutil.copy(f, folder)
    return folder

@pytest.fixture(scope='session')
def tiny(tmp_path_factory, smollm2):
    "A folder of each kind, made when first asked for"
    made = {}
    def get(kind):
        if kind not in made: made[kind] = str(save(tmp_path_factory.mktemp('bases')/kind, CONFIGS[kind](), smollm2))
        return made[kind]
    return get

@pytest.fixture(scope='session')
def prompt(tok): return Prompt(tok, 'preference', 128)

@pytest.fixture(params=CONFIGS)
def kind(request): return request.param

def sequences(lengths=(1, 2, 7, 8, 9, 10, 33, 20, 3), seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 49152, k).astype(np.int32) for k in lengths]

def classifier_of(base, prompt, route='answer', dtype='fp32', **kw):
    torch.manual_seed(0)  # a new score head is random
    return load_classifier(base, prompt, route, dtype, **kw)

def reference(base, cls=AutoModelForCausalLM, **kw):
    return cls.from_pretrained(base, dtype=torch.float32, attn_implementation='eager', **kw).eval()

def sequence_classifier(base, classifier):
    "transformers' own, with the head of our classifier"
    ref = reference(base, AutoModelForSequenceClassification, num_labels=3)
    ref.config.pad_token_id = ref.config.get_text_config().pad_token_id = ref.config.eos_token_id
    ref.score.weight.data.copy_(classifier.base.score.weight)
    return ref

def one(i): return torch.tensor(np.asarray(i))[None].long()
def letter_logits(model, ids, prompt):
    "One sequence at a time"
    with torch.no_grad(): return torch.stack([model(one(i)).logits[0, -1, prompt.letters] for i in ids])
def packed(classifier, ids):
    with torch.no_grad(): return classifier(**collate(ids))
def lora_on(classifier, **kw): return randomise(add_lora(classifier, **dict(r=4) | kw))
def close(a, b, eps=1e-5): torch.testing.assert_close(a, b, atol=eps, rtol=eps)

# ---- logits
def test_answer_route_is_transformers_own(kind, tiny, prompt):
    ref, classifier, ids = reference(tiny(kind)), classifier_of(tiny(kind), prompt), sequences()
    got, want = packed(classifier, ids), letter_logits(ref, ids, prompt)
    assert want.std() > .1
    assert got.dtype == torch.float32
    assert got.shape == (len(ids), 3)
    close(got, want)
    order = np.random.default_rng(1).permutation(len(ids))
    close(packed(classifier, [ids[k] for k in order]), want[order.tolist()])
    close(torch.cat([packed(classifier, [i]) for i in ids]), want)
    one_sequence = dict(collate(ids), bounds=[0, sum(map(len, ids))])
    with torch.no_grad(): leaked = classifier(**one_sequence)
    assert (leaked-want[-1:]).abs().max() > 1e-3  # sequences that see each other would be noticed

def test_a_shared_prefix_is_computed_once(kind, tiny, prompt):
    "Also one longer than Gemma's and Mistral's windows; logits and gradients are those of single sequences"
    head = sequences((21,), 5)[0]
    ids = [np.concatenate([head, i]) for i in sequences()]
    classifier = lora_on(classifier_of(tiny(kind), prompt))
    assert collate(ids)['input_ids'].shape[1] == 21+sum(map(len, ids))-21*len(ids)
    def grads(packs):
        classifier.zero_grad()
        out = torch.cat([classifier(**collate(p)) for p in packs])
        out.log_softmax(-1)[:, 0].sum().backward()
        return out.detach(), torch.cat([p.grad.flatten() for p in classifier.parameters() if p.requires_grad])
    together, apart = grads([ids]), grads([[i] for i in ids])
    for a, b in zip(together, apart): assert (a-b).abs().max() < 1e-5*b.abs().max()

def test_score_route_is_transformers_own(kind, tiny, prompt):
    classifier, ids = classifier_of(tiny(kind), prompt, 'score'), sequences()
    ref = sequence_classifier(tiny(kind), classifier)
    with torch.no_grad(): want = torch.cat([ref(one(i)).logits for i in ids])
    got = packed(classifier, ids)
    assert want.std() > .1
    assert got.shape == (len(ids), 3)
    assert classifier.base.score.weight.dtype == torch.float32
    close(got, want)

def padded(ids, side, pad):
    n = max(map(len, ids))
    x, m = torch.full((len(ids), n), pad), torch.zeros(len(ids), n, dtype=torch.long)
    for k, i in enumerate(ids):
        at = slice(0, len(i)) if side == 'right' else slice(n-len(i), n)
        x[k, at], m[k, at] = torch.tensor(i).long(), 1
    return x, m

@pytest.mark.parametrize('side', ['right', 'left'])
def test_pooled_position_beside_padded_batches(tiny, prompt, side):
    """pad = eos, and eos inside the text: transformers' padded batches and our packs read the same token, the last of
    the text"""
    base = tiny('llama')
    classifier = classifier_of(base, prompt, 'score')
    ref = sequence_classifier(base, classifier)
    eos = ref.config.eos_token_id
    assert eos == ref.config.pad_token_id == classifier.base.config.pad_token_id
    ids = sequences((5, 9, 17, 30))
    ids[1][3] = ids[2][:2] = ids[3][15] = eos
    x, m = padded(ids, side, eos)
    pos = (m.cumsum(1)-1).clip(0)
    with torch.no_grad(): want = ref(x, attention_mask=m, position_ids=pos).logits
    close(packed(classifier, ids), want)
    answer, causal = classifier_of(base, prompt), reference(base)
    last = [len(i)-1 if side == 'right' else -1 for i in ids]
    with torch.no_grad(): out = causal(x, attention_mask=m, position_ids=pos).logits
    close(packed(answer, ids), torch.stack([out[k, l, prompt.letters] for k, l in enumerate(last)]))

def test_pooled_position_when_the_text_ends_with_eos(tiny, prompt):
    "Here transformers' classifier looks at an earlier token; ours stays with the last"
    classifier = classifier_of(tiny('llama'), prompt, 'score')
    ref = sequence_classifier(tiny('llama'), classifier)
    ids = sequences((5, 9, 12))
    ids[0][-1] = ids[2][-3:] = 2
    with torch.no_grad(): want = torch.cat([ref.score(ref.model(one(i)).last_hidden_state[:, -1]) for i in ids])
    close(packed(classifier, ids), want)

def test_pad_token_zero_stays(tiny, prompt):
    assert classifier_of(tiny('gemma2'), prompt, 'score').base.config.pad_token_id == 0

def test_by_path_with_its_tokenizer(tiny, tok):
    t = load_tokenizer(tiny('qwen2'))
    pr = Prompt(t, 'preference', 128)
    assert t.pad_token_id is not None
    assert pr.hash == Prompt(tok, 'preference', 128).hash
    classifier = load_classifier(tiny('qwen2'), pr)
    assert isinstance(classifier, Classifier)
    assert not classifier.training
    assert classifier.letters == pr.letters
    assert load_classifier(tiny('qwen2'), pr, 'score').letters is None

def test_more_tokens_than_rows_in_the_base(tmp_path, smollm2, prompt):
    "A tokenizer that knows more tokens than the base has rows (tokens added, never resized)"
    base = save(tmp_path/'small', config(LlamaConfig, vocab_size=40_000), smollm2)
    with pytest.raises(Refusal): load_classifier(str(base), prompt)

def test_attention_alone():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 21, 8, generator=g) for h in (4, 2, 2))
    bounds = [0, 1, 6, 21]
    for cap, window in ((None, None), (2., None), (None, 4), (2., 4), (None, 99)):
        got, _ = packed_attention(None, q, k, v, None, scaling=.3, bounds=bounds, softcap=cap, sliding_window=window)
        s = q@k.repeat_interleave(2, 1).transpose(2, 3)*.3
        if cap: s = cap*torch.tanh(s/cap)
        i = torch.arange(21)
        of = torch.bucketize(i, torch.tensor(bounds[1:]), right=True)
        far = (i[:, None] < i) | (of[:, None] != of) | ((i[:, None]-i >= window) if window else False)
        want = (s.masked_fill(far, -torch.inf).softmax(-1)@v.repeat_interleave(2, 1)).transpose(1, 2)
        close(got, want)

@given(st.lists(st.lists(st.sampled_from([3, 3, 3, 4]), min_size=1, max_size=9), min_size=1, max_size=6))
def test_collate(rows):
    ids = pd.Series([np.array(r, np.int32) for r in rows],
                    index=range(len(rows))[::-1])  # labels in another order than the places
    c = collate(ids)
    p, n = c['bounds'][0], sum(map(len, rows))
    assert c['input_ids'].dtype == torch.int64
    assert c['input_ids'].shape == c['position_ids'].shape == (1, n-p*(len(rows)-1))
    for x, want in (('input_ids', rows), ('position_ids', [list(range(len(r))) for r in rows])):
        x = c[x][0].tolist()
        assert [x[:p]+x[s:e] for s, e in zip(c['bounds'], c['bounds'][1:])] == want
    shared = [k for k in range(min(map(len, rows))) if len({tuple(r[:k]) for r in rows}) == 1]
    assert p == (max(shared) if len(rows) > 1 else 0)  # every sequence keeps its own last token

# ---- shapes in the proportions of real bases: rope scaled, queries wider than the model, seven of them a key,
# windows shorter than the text
B = dict(vocab_size=49152, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, pad_token_id=2,
         initializer_range=.2)
REAL = dict(
    llama3=lambda: LlamaConfig(**B, hidden_size=128, intermediate_size=448, num_hidden_layers=3, num_attention_heads=8,
                               num_key_value_heads=2,
                               rope_parameters=dict(rope_type='llama3', rope_theta=5e5, factor=8., low_freq_factor=1.,
                                                    high_freq_factor=4., original_max_position_embeddings=64)),
    qwen2=lambda: Qwen2Config(**B, hidden_size=112, intermediate_size=592, num_hidden_layers=3, num_attention_heads=28,
                              num_key_value_heads=4),
    gemma2=lambda: Gemma2Config(**B, hidden_size=112, intermediate_size=448, num_hidden_layers=4,
                                num_attention_heads=16, num_key_value_heads=8, head_dim=8, sliding_window=16,
                                query_pre_attn_scalar=8, attn_logit_softcapping=50., final_logit_softcapping=30.),
    gemma3=lambda: Gemma3TextConfig(**B, hidden_size=128, intermediate_size=512, num_hidden_layers=6,
                                    num_attention_heads=16, num_key_value_heads=8, head_dim=8, sliding_window=16,
                                    query_pre_attn_scalar=8),
    mistral=lambda: MistralConfig(**B, hidden_size=128, intermediate_size=448, num_hidden_layers=3,
                                  num_attention_heads=8, num_key_value_heads=2, sliding_window=16))

@pytest.mark.parametrize('real', REAL)
@pytest.mark.parametrize('common', [0, 18])
def test_real_proportions(real, common, smollm2, prompt, tmp_path):
    "Unpadded, and padded with eos on either side, with eos inside the text and at its end, with and without a prefix"
    base = str(save(tmp_path/real, REAL[real](), smollm2))
    classifier, ref = classifier_of(base, prompt), reference(base)
    ids = sequences((5, 17, 40, 90))
    ids[1][3] = ids[2][:2] = ids[3][-1] = 2
    ids = [np.concatenate([sequences((common,), 5)[0], i]) for i in ids]
    got, want = packed(classifier, ids), letter_logits(ref, ids, prompt)
    assert want.std() > .1
    close(got, want, 1e-4)
    for side in ('right', 'left'):
        x, m = padded(ids, side, 2)
        with torch.no_grad(): out = ref(x, attention_mask=m, position_ids=(m.cumsum(1)-1).clip(0)).logits
        last = [len(i)-1 if side == 'right' else -1 for i in ids]
        close(got, torch.stack([out[k, at, prompt.letters] for k, at in enumerate(last)]), 1e-4)

# ---- bases that also see
@pytest.fixture(scope='session', params=['old names', 'new names'])
def seeing(request, tmp_path_factory, smollm2):
    "A tiny Gemma 3 with eyes, its tensors named as in the first checkpoints and as its classes name them now"
    text = dict(SHAPE, num_hidden_layers=4, sliding_window=8, layer_types=['sliding_attention', 'full_attention']*2,
                query_pre_attn_scalar=24, initializer_range=.25)
    cfg = Gemma3Config(text_config=text,
                       vision_config=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                          num_attention_heads=2, image_size=28, patch_size=14),
                       mm_tokens_per_image=4, image_token_index=49000, boi_token_index=49001, eoi_token_index=49002)
    folder = save(tmp_path_factory.mktemp('seeing')/'gemma3', cfg, smollm2)
    from safetensors.torch import load_file, save_file
    if request.param == 'new names':
        tensors = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        t = {k: v.clone() for k, v in tensors.items() if k != 'lm_head.weight'}
        assert any(k.startswith('model.language_model.layers') for k in t)
        save_file(t, folder/'model.safetensors', metadata=dict(format='pt'))
    else: assert any(k.startswith('language_model.model.layers') for k in load_file(folder/'model.safetensors'))
    return str(folder)

@pytest.mark.parametrize('how', ['plain', 'mapped', 'nf4'])
def test_a_base_that_also_sees_is_its_text_model(seeing, how, prompt, tmp_path):
    "The logits are those of the whole model; LoRAs, layers and what is saved are those of a text model"
    if how == 'nf4': pytest.importorskip('bitsandbytes')
    ids, dtype = sequences(), 'nf4' if how == 'nf4' else 'fp32'
    ref, classifier = reference(seeing), classifier_of(seeing, prompt, dtype=dtype, mapped=how == 'mapped')
    assert hasattr(ref.model, 'vision_tower')
    assert not any('vision' in n for n, _ in classifier.named_modules())
    assert len(layers(classifier)) == 4
    if how != 'nf4':
        want = letter_logits(ref, ids, prompt)
        assert want.std() > .1
        close(packed(classifier, ids), want)
        classifier.model.save_pretrained(tmp_path/'b')
        close(packed(classifier_of(str(tmp_path/'b'), prompt), ids), want)
    classifier = lora_on(classifier)
    got = packed(classifier, ids)
    assert on(classifier) == ALL
    assert sum(hasattr(m, 'lora_A') for m in classifier.modules()) == 28
    classifier.model.save_pretrained(tmp_path/'a')
    close(packed(classifier_of(seeing, prompt, dtype=dtype, adapter=str(tmp_path/'a')), ids), got)

@pytest.mark.parametrize('route', ['score', 'score2'])
def test_a_base_that_also_sees_gets_a_head(seeing, route, prompt, tmp_path):
    ids, ref = sequences(), reference(seeing)
    for mapped in (False, True):
        classifier = classifier_of(seeing, prompt, route, mapped=mapped)
        with torch.no_grad():
            want = torch.cat([classifier.base.score(ref.model(one(i)).last_hidden_state[:, -1]) for i in ids])
        close(packed(classifier, ids), want)
        classifier.model.save_pretrained(tmp_path/'b')
        close(packed(classifier_of(str(tmp_path/'b'), prompt, route), ids), want)

def test_a_gptq_base_that_also_sees(seeing, prompt, tmp_path):
    from gptq_writer import checkpoint
    from safetensors.torch import load_file, save_file
    meant, dense = checkpoint(seeing, tmp_path/'q', group=32), tmp_path/'dense'
    shutil.copytree(seeing, dense)
    tensors = load_file(dense/'model.safetensors')
    tensors |= {k: torch.from_numpy(w).contiguous() for k, w in meant.items()}
    save_file(tensors, dense/'model.safetensors', metadata=dict(format='pt'))
    classifier, ids = classifier_of(str(tmp_path/'q'), prompt), sequences()
    assert sum(type(m).__name__ == 'GPTQLinear' for m in classifier.modules()) == 28
    close(packed(classifier, ids), packed(classifier_of(str(dense), prompt), ids), 1e-4)
    assert (packed(classifier, ids)-packed(classifier_of(seeing, prompt), ids)).abs().max() > 1e-2

# ---- gradients
def randomise(classifier, seed=0, scale=.1):
    g = torch.Generator().manual_seed(seed)
    for n, p in classifier.named_parameters():
        if 'lora_B' in n: p.data.normal_(0, scale, generator=g)
    return classifier

def step(classifier, ids, y, packs, w=None):
    classifier.zero_grad()
    w, total, options = torch.ones(len(ids)) if w is None else torch.tensor(w), 0., y.shape[1]
    for p in packs:
        logits = classifier(**collate([ids[i] for i in p]))
        loss = pack_loss(logits, y[p], w[p], option_mask([options]*len(p), options), float(w.sum()))
        loss.backward()
        total += loss.item()
    return total, {n: p.grad.clone() for n, p in classifier.named_parameters() if p.requires_grad}

def alike(a, b, eps=1e-5):
    assert a[0] == pytest.approx(b[0], abs=eps)
    assert set(a[1]) == set(b[1])
    assert max(g.abs().max() for g in a[1].values()) > 1e-3
    for n in a[1]: close(a[1][n], b[1][n], eps)

@pytest.mark.parametrize('route', ['answer', 'score'])
def test_gradients_packed_and_not(kind, route, tiny, prompt):
    classifier = lora_on(classifier_of(tiny(kind), prompt, route)).train()
    ids, y = sequences((3, 12, 9, 20)), torch.tensor([[1., 0, 0], [0, 1, 0], [.2, .3, .5], [0, 0, 1]])
    whole = step(classifier, ids, y, [[0, 1, 2, 3]])
    alike(whole, step(classifier, ids, y, [[3], [0], [2], [1]]))
    alike(whole, step(classifier, ids, y, [[2, 0], [3, 1]]))
    assert any('lora_A' in n for n in whole[1])
    assert any('score' in n for n in whole[1]) == (route == 'score')
    assert all(p.grad is None for p in classifier.parameters() if not p.requires_grad)

@pytest.mark.parametrize('kind', ['llama', 'gemma2'])
def test_gradients_are_those_of_plain_peft(kind, tiny, prompt):
    classifier = lora_on(classifier_of(tiny(kind), prompt)).train()
    plain = get_peft_model(reference(tiny(kind)), classifier.model.peft_config['default']).train()
    plain.load_state_dict({n: p for n, p in classifier.model.state_dict().items()})
    ids, y = sequences((3, 12, 9)), torch.tensor([0, 2, 1])
    _, got = step(classifier, ids, F.one_hot(y, 3).float(), [[0, 1, 2]])
    logits = torch.cat([plain(one(i)).logits[:, -1, prompt.letters] for i in ids])
    F.cross_entropy(logits, y).backward()
    want = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    assert set(want) == {n.removeprefix('model.') for n in got}
    for n, g in got.items():
        w = want[n.removeprefix('model.')]
        assert (g-w).abs().max() <= 1e-5*max(1, w.abs().max()), n

@pytest.mark.parametrize('route', ['answer', 'score'])
def test_everything_learns_over_a_bf16_base(route, tiny, prompt):
    classifier = add_lora(classifier_of(tiny('llama'), prompt, route, 'bf16'), r=4, dropout=.1).train()
    weights = dict(classifier.named_parameters())
    trainable = {n for n, p in weights.items() if p.requires_grad}
    assert {weights[n].dtype for n in trainable} == {torch.float32}
    assert {p.dtype for n, p in weights.items() if n not in trainable} <= {torch.bfloat16, torch.float32}
    assert next(p for n, p in weights.items() if 'q_proj.base_layer' in n).dtype == torch.bfloat16
    assert any('score' in n for n in trainable) == (route == 'score')

    before = {n: p.detach().clone() for n, p in weights.items()}
    opt = torch.optim.AdamW([weights[n] for n in trainable], 1e-5, weight_decay=0)
    ids, losses = sequences((3, 12, 9)), []
    for k in range(12):
        for g in opt.param_groups: g['lr'] = 1e-5 if k < 2 else 1e-2
        loss, _ = step(classifier, ids, torch.eye(3), [[0, 1, 2]])
        opt.step()
        losses.append(loss)
        if k == 1: assert all((weights[n] != before[n]).any() for n in trainable), 'a step of 1e-5 is rounded away'
    assert losses[-1] < .5*losses[0]
    for n in weights.keys()-trainable: assert torch.equal(weights[n], before[n]), n
    assert packed(classifier.eval(), ids).dtype == torch.float32

# ---- the loss
def test_option_mask():
    assert option_mask([2, 3, 1], 3).tolist() == [[False, False, True], [False]*3, [False, True, True]]
    assert option_mask(pd.Series([7]), 7).sum() == 0
    assert option_mask([], 3).shape == (0, 3)

@settings(max_examples=60)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 999))
def test_loss_is_the_weighted_mean_over_the_rows_own_options(n, seed):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(n), 5, generator=g)*3
    logits.requires_grad_()
    w, missing, y = torch.rand(len(n), generator=g)+.1, option_mask(n, 5), torch.zeros(len(n), 5)
    for k, m in enumerate(n): y[k, :m] = torch.rand(m, generator=g).softmax(-1)
    loss = pack_loss(logits, y, w, missing, float(w.sum()))
    want = sum(w[k]*F.cross_entropy(logits[k:k+1, :m], y[k:k+1, :m]) for k, m in enumerate(n))/w.sum()
    close(loss, want)
    loss.backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[missing] == 0).all()
    rows = [slice(k, k+1) for k in range(len(n))]
    row_by_row = sum(pack_loss(logits[k], y[k], w[k], missing[k], float(w.sum())) for k in rows)
    close(row_by_row, loss)

def test_weight_two_is_the_row_twice(tiny, prompt):
    classifier = lora_on(classifier_of(tiny('llama'), prompt)).train()
    ids, y = sequences((3, 12, 9)), torch.tensor([[1., 0, 0], [.5, .5, 0], [.2, .3, .5]])
    twice = step(classifier, [*ids, ids[1]], y[[0, 1, 2, 1]], [[0, 1], [2, 3]])
    without = step(classifier, [ids[0], ids[2]], y[[0, 2]], [[0, 1]])
    alike(step(classifier, ids, y, [[0, 1, 2]], [1., 2., 1.]), twice)
    alike(step(classifier, ids, y, [[0, 1, 2]], [1., 0., 1.]), without)

def test_a_step_that_weighs_nothing(tiny, prompt):
    classifier = lora_on(classifier_of(tiny('llama'), prompt)).train()
    loss, grads = step(classifier, sequences((3, 12)), torch.eye(3)[[0, 1]], [[0, 1]], [0., 0.])
    assert loss == 0
    assert len(grads)
    assert all((g == 0).all() for g in grads.values())

def test_soft_target_is_the_mixture(tiny, prompt):
    classifier = lora_on(classifier_of(tiny('llama'), prompt)).train()
    [i] = sequences((9,))
    soft = step(classifier, [i], torch.tensor([[.25, .75, 0]]), [[0]])
    hard = step(classifier, [i]*4, torch.eye(3)[[0, 1, 1, 1]], [[0, 1, 2, 3]])
    alike(soft, hard)

# ---- LoRA
ALL = {'q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'}
def on(classifier): return {n.split('.')[-1] for n, m in classifier.model.named_modules() if hasattr(m, 'lora_A')}

@pytest.mark.parametrize('route', ['answer', 'score'])
def test_all_linear(kind, route, tiny, prompt):
    want = packed(classifier_of(tiny(kind), prompt, route), sequences())
    classifier = add_lora(classifier_of(tiny(kind), prompt, route), r=4)
    trainable = {n for n, p in classifier.named_parameters() if p.requires_grad}
    assert on(classifier) == ALL
    assert all('lora_' in n or 'score' in n for n in trainable)
    assert any('score' in n for n in trainable) == (route == 'score')
    close(packed(classifier, sequences()), want)

def test_named_modules(tiny, prompt):
    def found(modules): return on(add_lora(classifier_of(tiny('llama'), prompt), r=4, modules=modules))
    assert found('q_proj,v_proj') == {'q_proj', 'v_proj'}
    assert found(' q_proj , v_proj') == {'q_proj', 'v_proj'}
    assert found('layers.1.self_attn.q_proj') == {'q_proj'}

@pytest.mark.parametrize('modules', ['q_prj', 'q_proj,q_prj', 'proj', 'q_proj,proj', 'q_proj,', '', 'mlp',
                                     'q_proj,norm', 'q_proj,embed_tokens', 'layers.1'])
def test_unknown_modules(tiny, prompt, modules):
    "peft ignores a name that fits nothing as long as another one fits"
    with pytest.raises(Refusal, match='no module'): add_lora(classifier_of(tiny('llama'), prompt), modules=modules)

def test_output_matrix_is_refused_or_learns(tiny, prompt):
    "The letters' logits are computed from the bare matrix: a LoRA on it would be trained by nothing"
    try: classifier = add_lora(classifier_of(tiny('llama'), prompt), r=4, modules='q_proj,lm_head')
    except Refusal: return
    ids = sequences((3, 12))
    before = packed(classifier, ids)
    randomise(classifier, scale=.5)
    for n, p in classifier.named_parameters():
        if 'q_proj' in n and 'lora_B' in n: p.data.zero_()
    assert (packed(classifier, ids)-before).abs().max() > 1e-2

@pytest.mark.parametrize('rslora,scale', [(False, 32/16), (True, 32/4)])
def test_scale(tiny, prompt, rslora, scale):
    classifier = lora_on(classifier_of(tiny('llama'), prompt), r=16, alpha=32, rslora=rslora, modules='q_proj')
    loras = [m for m in classifier.model.modules() if hasattr(m, 'lora_A')]
    assert all(m.scaling == {'default': scale} for m in loras)
    ref, ids = reference(tiny('llama')), sequences((3, 12))
    for layer, m in zip(ref.model.layers, loras):
        layer.self_attn.q_proj.weight.data += scale*m.lora_B['default'].weight.data@m.lora_A['default'].weight.data
    close(packed(classifier, ids), letter_logits(ref, ids, prompt))

def test_seed_decides_a(tiny, prompt):
    def lora_a(seed):
        classifier = add_lora(classifier_of(tiny('llama'), prompt), r=4, seed=seed)
        return torch.cat([p.flatten() for n, p in classifier.named_parameters() if 'lora_A' in n])
    a = lora_a(3)
    assert torch.equal(a, lora_a(3))
    assert not torch.equal(a, lora_a(4))

@pytest.mark.parametrize('kind', ['llama_tied', 'gemma2'])
def test_adapter_in_plain_peft(kind, tiny, prompt, tmp_path):
    classifier, ids = lora_on(classifier_of(tiny(kind), prompt)), sequences()
    want = packed(classifier, ids)
    classifier.model.save_pretrained(tmp_path/'a')
    plain = PeftModel.from_pretrained(reference(tiny(kind)), tmp_path/'a').eval()
    close(letter_logits(plain, ids, prompt), want)
    close(packed(classifier_of(tiny(kind), prompt, adapter=str(tmp_path/'a')), ids), want)
    assert (packed(classifier_of(tiny(kind), prompt), ids)-want).abs().max() > .01
    assert not [f for f in (tmp_path/'a').iterdir() if f.suffix in ('.bin', '.pt', '.pkl')]

@pytest.mark.parametrize('dtype', ['fp32', 'bf16'])
def test_score_adapter_carries_its_head(dtype, tiny, prompt, tmp_path):
    classifier, ids = lora_on(classifier_of(tiny('llama'), prompt, 'score', dtype)), sequences()
    for n, p in classifier.named_parameters():
        if p.requires_grad and 'score' in n: p.data.normal_(generator=torch.Generator().manual_seed(5))
    want = packed(classifier, ids)
    classifier.model.save_pretrained(tmp_path/'a')
    torch.manual_seed(99)  # another random head under it
    again = load_classifier(tiny('llama'), prompt, 'score', dtype, adapter=str(tmp_path/'a'))
    assert torch.equal(packed(again, ids), want)
    over = with_adapter(classifier.model, tmp_path/'a')  # in place of one that was trained
    assert not any(p.requires_grad for model in (again, over) for p in model.parameters())
    if dtype == 'fp32':
        ref = reference(tiny('llama'), AutoModelForSequenceClassification, num_labels=3)
        plain = PeftModel.from_pretrained(ref, tmp_path/'a').eval()
        with torch.no_grad(): close(torch.cat([plain(one(i)).logits for i in ids]), want)

def saved(tiny, prompt, folder, route='answer', kind='llama'):
    lora_on(classifier_of(tiny(kind), prompt, route)).model.save_pretrained(folder)
    return folder

def test_adapters_that_do_not_fit(tiny, prompt, tmp_path):
    "Wrong route, wrong base, a tensor lost: an error, never random weights in silence"
    from safetensors.torch import load_file, save_file
    a, s = saved(tiny, prompt, tmp_path/'a'), saved(tiny, prompt, tmp_path/'s', 'score')
    faults = {}
    def attempt(name, *args, **kw):
        try: load_classifier(*args, **kw)
        except Exception as e: faults[name] = e
        else: faults[name] = 'loaded'
    attempt('an answer adapter on the score route', tiny('llama'), prompt, 'score', 'fp32', adapter=str(a))
    attempt('a score adapter on the answer route', tiny('llama'), prompt, 'answer', 'fp32', adapter=str(s))
    attempt('an adapter of a shallower base', tiny('qwen2'), prompt, 'answer', 'fp32', adapter=str(a))
    attempt('an adapter of another shape', tiny('llama_tied'), prompt, 'answer', 'fp32', adapter=str(a))
    t = load_file(a/'adapter_model.safetensors')
    t.pop(next(k for k in t if 'lora_B' in k))
    save_file(t, a/'adapter_model.safetensors')
    attempt('an adapter that lost a tensor', tiny('llama'), prompt, 'answer', 'fp32', adapter=str(a))
    attempt('no adapter', tiny('llama'), prompt, 'answer', 'fp32', adapter=str(tmp_path/'none'))
    assert not {k: repr(e) for k, e in faults.items() if not isinstance(e, Refusal)}

def test_missing_adapter_is_refused_by_name(tiny, prompt, tmp_path):
    with pytest.raises(Refusal, match='none'): load_classifier(tiny('llama'), prompt, adapter=str(tmp_path/'none'))

@pytest.mark.parametrize('new', [dict(), dict(alpha=320), dict(rslora=True), dict(alpha=7, rslora=True)])
@pytest.mark.parametrize('old', [dict(), dict(alpha=8, rslora=True)])
def test_a_continued_adapter_gives_the_same_logits(tiny, prompt, tmp_path, old, new):
    "Whatever the old and the new one are scaled by"
    classifier, ids = lora_on(classifier_of(tiny('llama'), prompt), **old), sequences()
    classifier.model.save_pretrained(tmp_path/'a')
    after = continue_from(add_lora(classifier_of(tiny('llama'), prompt), r=4, seed=1, **new), tmp_path/'a')
    close(packed(after, ids), packed(classifier, ids), 2e-5)
    if old == new: assert all(torch.equal(a, b) for a, b in zip(classifier.parameters(), after.parameters()))

@pytest.mark.parametrize('rslora', [False, True])
def test_layers_with_a_rank_and_an_alpha_of_their_own(tiny, prompt, tmp_path, rslora):
    "They give plain peft's logits, also fused, and where a training continues from them"
    ids, own = sequences(), dict(alpha_pattern={'layers.0.self_attn.v_proj': 3, 'q_proj': 40})
    for name, more in (('ranks', dict(own, rank_pattern={'q_proj': 2, r'layers\.1\.mlp\.up_proj': 8})),
                       ('alphas', own)):
        torch.manual_seed(1)
        lora = LoraConfig(r=4, lora_alpha=8, use_rslora=rslora, init_lora_weights=False, task_type='CAUSAL_LM',
                          target_modules=['q_proj', 'v_proj', 'up_proj'], **more)
        plain = get_peft_model(reference(tiny('llama')), lora).eval()
        plain.save_pretrained(tmp_path/name)
        want = letter_logits(plain, ids, prompt)
        classifier = classifier_of(tiny('llama'), prompt, adapter=str(tmp_path/name))
        close(packed(classifier, ids), want, 1e-4)
        close(packed(fuse(classifier), ids), want, 1e-4)
    after = continue_from(add_lora(classifier_of(tiny('llama'), prompt), r=4, alpha=5, modules='q_proj,v_proj,up_proj'),
                          tmp_path/'alphas')
    close(packed(after, ids), want, 1e-4)

def test_another_rank_cannot_continue(tiny, prompt, tmp_path):
    with pytest.raises(Refusal, match='do not fit'):
        continue_from(add_lora(classifier_of(tiny('llama'), prompt), r=8), saved(tiny, prompt, tmp_path/'a'))

# ---- heads of earlier full runs
def run_of(tiny, prompt, folder, route, dtype='fp32'):
    classifier = classifier_of(tiny('llama'), prompt, route, dtype)
    g = torch.Generator().manual_seed(3)
    for p in classifier.base.score.parameters(): p.data.normal_(generator=g)
    classifier.model.save_pretrained(folder)
    return str(folder), packed(classifier, sequences())

@pytest.mark.parametrize('mapped', [False, True])
@pytest.mark.parametrize('dtype', ['fp32', 'bf16'])
@pytest.mark.parametrize('route', ['score', 'score2'])
def test_a_full_run_keeps_its_head(tiny, prompt, tmp_path, route, dtype, mapped):
    "In fp32, whatever the dtype of its base"
    folder, want = run_of(tiny, prompt, tmp_path/'m', route, dtype)
    torch.manual_seed(99)
    again = load_classifier(folder, prompt, route, dtype, mapped=mapped)
    assert torch.equal(packed(again, sequences()), want)
    assert {p.dtype for p in again.base.score.parameters()} == {torch.float32}

@pytest.mark.parametrize('mapped', [False, True])
@pytest.mark.parametrize('route, asked, task',
                         [('score2', 'score', 'preference'), ('score', 'score2', 'preference'),
                          ('score', 'score', 'choice'), ('score2', 'score2', 'choice')])
def test_another_head_is_refused(tiny, prompt, tok, tmp_path, route, asked, task, mapped):
    folder, _ = run_of(tiny, prompt, tmp_path/'m', route)
    with pytest.raises(Refusal, match=f"a head of {{'{route}': 3}}"):
        load_classifier(folder, Prompt(tok, task, 128), asked, 'fp32', mapped=mapped)

class Evil:
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return (Path.write_text, (Path(self.mark), 'ran'))

def test_no_pickle_is_loaded(tiny, prompt, tmp_path):
    "A base or adapter in pickle form runs nothing, and is not loaded at all"
    mark = tmp_path/'mark'
    a, b = saved(tiny, prompt, tmp_path/'a'), tmp_path/'b'
    (a/'adapter_model.safetensors').unlink()
    shutil.copytree(tiny('llama'), b)
    (b/'model.safetensors').unlink()
    loaded = []
    for evil in (True, False):
        torch.save(Evil(mark) if evil else {'base_model.model.x': torch.zeros(1)}, a/'adapter_model.bin')
        torch.save(Evil(mark) if evil else AutoModelForCausalLM.from_pretrained(tiny('llama')).state_dict(),
                   b/'pytorch_model.bin')
        for base, kw in ((tiny('llama'), dict(adapter=str(a))), (str(b), {})):
            try: load_classifier(base, prompt, **kw)
            except Exception: pass
            else: loaded.append((evil, 'adapter' if kw else 'base'))
            assert not mark.exists()
    assert not loaded

@pytest.mark.parametrize('known', [True, False])
def test_no_code_of_a_base_runs(tiny, prompt, tmp_path, known):
    b, mark = tmp_path/'b', tmp_path/'mark'
    shutil.copytree(tiny('llama'), b)
    c = json.loads((b/'config.json').read_text())
    c['auto_map'] = dict(AutoConfig='evil.C', AutoModelForCausalLM='evil.M')
    if not known: c['model_type'] = 'evil'
    (b/'config.json').write_text(json.dumps(c))
    (b/'evil.py').write_text(f'open({str(mark)!r}, "w")\nclass C: pass\nclass M: pass\n')
    try: load_classifier(str(b), prompt)
    except Exception: assert not known
    assert not mark.exists()

def test_broken_bases(tiny, prompt, tmp_path):
    b = tmp_path/'b'
    shutil.copytree(tiny('llama'), b)
    raw = (b/'model.safetensors').read_bytes()
    (b/'model.safetensors').write_bytes(raw[:len(raw)//2])
    with pytest.raises(Refusal): load_classifier(str(b), prompt)
    (b/'model.safetensors').unlink()
    with pytest.raises(Refusal): load_classifier(str(b), prompt)
    for f in ('tokenizer.json', 'tokenizer_config.json'): (b/f).unlink()
    with pytest.raises(Refusal): load_tokenizer(str(b))
    (b/'config.json').write_text('{')
    with pytest.raises(Refusal): load_classifier(str(b), prompt)

def test_route_is_refused(tiny, prompt):
    with pytest.raises(Refusal, match='route'): load_classifier(tiny('llama'), prompt, 'logits')

# ---- bases
@pytest.mark.parametrize('base', ['', ' ', '.', './no/such', '/no/such', '~/no_such_base', 'smolm2', 'a/b/c',
                                  'SmolLM2', '../x', 'tests', 'a\nb'])
def test_no_such_base(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refusal, match='no base'): base_path(base)

def test_base_path(tiny, smollm2, tmp_path, monkeypatch):
    assert base_path() == base_path('smollm2') == smollm2
    assert not damage(smollm2)
    assert base_path(tiny('llama')) == tiny('llama')
    assert base_path('Qwen/Qwen2.5-14B-Instruct') == 'Qwen/Qwen2.5-14B-Instruct'
    monkeypatch.chdir(Path(tiny('llama')).parent)
    assert base_path('llama') == 'llama'
    assert base_path('./llama')
    assert base_hash('llama') == base_hash('./llama') == base_hash(tiny('llama'))
    shutil.copytree(tiny('llama'), models_path('some-run/model'))
    (tmp_path/'nbs').mkdir()
    monkeypatch.chdir(tmp_path/'nbs')  # a notebook's folder: the root's paths hold there
    assert base_path('models/some-run/model') == str(models_path('some-run/model'))
    assert base_hash('models/some-run/model') == base_hash(tiny('llama'))

@pytest.mark.parametrize('base', ['nobody/nothing', 'a b/c', '-/x'])
def test_hub_ids_without_a_network(base, prompt):
    with pytest.raises(Refusal, match='tokenizer'): load_tokenizer(base)
    with pytest.raises(Refusal, match='base'): load_classifier(base, prompt)

def test_pick_dtype(monkeypatch):
    for d in ('bf16', 'fp16', 'fp32'): assert pick_dtype(d) == d
    assert pick_dtype() in ('bf16', 'fp32')
    for amx, want in ((True, 'bf16'), (False, 'fp32')):
        monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: amx)
        assert pick_dtype() == want
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    for ok, want in ((True, 'bf16'), (False, 'fp16')):
        monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: ok)
        assert pick_dtype() == want
    for bad in ('fp64', 'float32', '', None, torch.float32):
        with pytest.raises(Refusal): pick_dtype(bad)

def test_base_hash(tiny, tmp_path):
    b = tmp_path/'b'
    shutil.copytree(tiny('llama'), b)
    weights, config = b/'model.safetensors', b/'config.json'
    raw, first = weights.read_bytes(), base_hash(str(b))
    assert first == base_hash(tiny('llama'))

    (b/'manifest.json').write_text('{}')
    (b/'README.md').write_text('x')
    config.write_text(config.read_text()+' ')  # it means the same
    assert base_hash(str(b)) == first

    hashes = [first]
    flipped = [raw[:at]+bytes([raw[at]^1])+raw[at+1:] for at in (9, 2**16-1, len(raw)-2**16, len(raw)-1)]
    for data in (*flipped, raw+b'\0', raw[:2**20]+raw[2**20+4:]):
        weights.write_bytes(data)
        hashes.append(base_hash(str(b)))
    weights.write_bytes(raw)
    config.write_text(config.read_text().replace('silu', 'gelu'))
    hashes.append(base_hash(str(b)))
    weights.rename(b/'model-00001-of-00001.safetensors')
    hashes.append(base_hash(str(b)))
    assert len(set(hashes)) == len(hashes)
    with pytest.raises(Refusal, match='could not be fetched'): base_hash('nobody/nothing')

@pytest.fixture
def hub(tiny, tmp_path, monkeypatch):
    "The Hub's cache with the snapshot of a base `some/base`, still empty, and a Hub that fetches into it"
    import huggingface_hub
    cache, real = tmp_path/'hub', huggingface_hub.snapshot_download
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(cache))
    snapshot = cache/'models--some--base/snapshots'/('a'*40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1]/'refs').mkdir()
    (snapshot.parents[1]/'refs/main').write_text('a'*40)
    def download(base, local_files_only=False, **how):
        if base == 'some/base' and not local_files_only: shutil.copytree(tiny('llama'), snapshot, dirs_exist_ok=True)
        return real(base, local_files_only=local_files_only, **how)
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
    yield snapshot
    _fetch.cache_clear()

@pytest.mark.parametrize('there', [[], ['config.json'], ['config.json', 'tokenizer.json', 'tokenizer_config.json']])
def test_a_base_on_the_hub_has_one_hash_before_and_after_it_is_fetched(hub, tiny, there):
    for name in there: shutil.copy(Path(tiny('llama'))/name, hub)
    assert fetched_base('some/base') is None
    assert base_hash('some/base') == base_hash(tiny('llama'))
    assert fetched_base('some/base') == hub
    _fetch.cache_clear()
    assert base_hash('some/base') == base_hash(tiny('llama'))

def test_an_adapter_on_the_hub_is_no_base(hub, tiny):
    "transformers would load the base that it names, and put it over that"
    (hub/'adapter_config.json').write_text('{}')
    with pytest.raises(Refusal, match='holds an adapter'): base_hash('some/base')

def test_a_file_that_no_prediction_needs_may_be_missing(hub, tiny):
    from huggingface_hub._tree_cache import TreeCacheEntry, write_tree_cache
    shutil.copytree(tiny('llama'), hub, dirs_exist_ok=True)
    names = ['README.md', 'consolidated.safetensors', 'onnx/model.safetensors', *(f.name for f in hub.iterdir())]
    files = {n: TreeCacheEntry(size=1, blob_id='b', lfs_sha256=None, lfs_size=None, xet_hash=None) for n in names}
    write_tree_cache(hub.parents[1], hub.name, files)
    assert fetched_base('some/base') == hub
    shutil.copy(hub/'model.safetensors', hub/'consolidated.safetensors')
    assert base_hash('some/base') == base_hash(tiny('llama'))
    (hub/'model.safetensors').rename(hub/'other.safetensors')
    assert fetched_base('some/base') is None

# ---- probabilities
TEXTS = ['one', 'two three', '', 'the quick brown fox '*30, 'no', '骑士']
def pairs():
    texts = enumerate(zip(TEXTS, TEXTS[1:]+TEXTS[:1], TEXTS[::-1]))
    return pd.DataFrame([dict(id=str(i), prompt=[a], response_a=[b], response_b=[c]) for i, (a, b, c) in texts])

def questions(counts):
    rows = [dict(id=str(k), problem='P', question='Q?', options=TEXTS[:k]+['x']*(k-6)) for k in counts]
    return pd.DataFrame(rows)

def swapped(rows, task):
    if task == 'choice': return rows.assign(options=[options[::-1] for options in rows.options])
    return rows.rename(columns=dict(response_a='response_b', response_b='response_a'))

def same(p, want): np.testing.assert_allclose(p, want, atol=1e-5)

@pytest.mark.parametrize('route', ['answer', 'score'])
@pytest.mark.parametrize('task', ['preference', 'preference2', 'choice'])
def test_predict(tiny, tok, route, task):
    pr, width = Prompt(tok, task, 128), len(tasks[task].options)
    n = [1, 2, 3, 5, 7] if task == 'choice' else [width]*len(TEXTS)
    rows = questions(n) if task == 'choice' else pairs()
    classifier = classifier_of(tiny('llama'), pr, route)
    def probs(rows, **kw): return predict(classifier, pr, rows, progress=False, **kw)

    one, two = probs(rows, views=1), probs(rows)
    assert one.shape == two.shape == (len(rows), width)
    for p in (one, two):
        same(p.sum(1), 1)
        assert (p >= 0).all()
        for k, row in zip(n, p): assert (row[k:] == 0).all()
    for budget in (1, 64, 10_000): same(probs(rows, budget=budget), two)
    order = [3, 0, 4, 1, 2]
    same(probs(rows.iloc[order]), two[order])

    other = swapped(rows, task)
    same(swap_probs(probs(other), n, task), two)  # two views: the shown order has no influence
    same((one+swap_probs(probs(other, views=1), n, task))/2, two)
    assert np.abs(one-two).max() > 1e-3

def test_view_probs_are_the_letters_of_the_row(tiny, tok):
    pr = Prompt(tok, 'choice', 128)
    classifier, ref = classifier_of(tiny('qwen2'), pr), reference(tiny('qwen2'))
    enc = pr.encode(questions([2, 5]))
    got, want = view_probs(classifier, enc, [2, 5], progress=False), letter_logits(ref, enc.ids, pr)
    for p, logits, row in zip(got, want, enc.row):
        k = [2, 5][row]
        same(p[:k], logits[:k].softmax(-1))

def test_no_rows(tiny, tok):
    pr = Prompt(tok, 'preference', 128)
    assert predict(classifier_of(tiny('llama'), pr), pr, pairs().iloc[:0], progress=False).shape == (0, 3)

def test_the_embedded_base(smollm2, tok):
    "Real weights, both routes, packed against one at a time"
    pr = Prompt(tok, 'preference', 96)
    ids = pr.encode(pairs().iloc[:3]).ids
    close(packed(classifier_of('smollm2', pr), ids), letter_logits(reference(smollm2), ids, pr), 2e-4)

@pytest.mark.parametrize('dtype', ['fp32', 'nf4'])
def test_a_base_that_lacks_a_tensor_is_refused(tiny, prompt, tmp_path, dtype):
    "transformers would make one up"
    from safetensors.torch import load_file, save_file
    if dtype == 'nf4': pytest.importorskip('bitsandbytes')
    shutil.copytree(tiny('llama'), tmp_path/'b')
    t = load_file(tmp_path/'b/model.safetensors')
    del t['model.layers.1.mlp.up_proj.weight']
    save_file(t, tmp_path/'b/model.safetensors', metadata=dict(format='pt'))
    for route in ('answer', 'score'):
        with pytest.raises(Refusal, match='1 tensors are missing, such as model.layers.1.mlp.up_proj.weight'):
            load_classifier(str(tmp_path/'b'), prompt, route, dtype)

# ---- what a GPU computes for a pack with a shared prefix; its kernel in plain operations
def _varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, scale=None, window_size=(-1, 0), enable_gqa=True):
    "As flash attention computes it: causal to the bottom right where there are more keys than queries"
    n, m = cu_q.diff(), cu_k.diff()
    assert n.max() <= max_q and m.max() <= max_k
    i, j = torch.arange(len(q)), torch.arange(len(k))
    a, b = (torch.bucketize(x, cu[1:].contiguous(), right=True) for x, cu in ((i, cu_q), (j, cu_k)))
    i, j = (i-cu_q[a]+(m-n)[a])[:, None], j-cu_k[b]
    sees = (a[:, None] == b) & (j <= i)
    if window_size[0] >= 0: sees &= i-j <= window_size[0]
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, sees, scale=scale, enable_gqa=True)[0].transpose(0, 1)

@pytest.mark.parametrize('kind', ['qwen2', 'mistral', 'gemma3', 'gemma2'])
def test_keys_that_all_sequences_see(kind, monkeypatch):
    torch._dynamo.reset()  # a FlexAttention for packs of any size does not compile for a CPU (torch 2.13)
    rng, cfg = np.random.default_rng(0), REAL[kind]()
    cfg._attn_implementation = 'packed'
    torch.manual_seed(0)
    classifier = Classifier(AutoModelForCausalLM.from_config(cfg), [5, 6, 7])
    head = rng.integers(3, 500, 21).astype(np.int32)
    own = [rng.integers(3, 500, k).astype(np.int32) for k in (30, 5, 61, 1)]
    packs = collate([np.append(head, i) for i in own]), collate(own)
    assert [p['bounds'][0] for p in packs] == [21, 0]
    def said(pack):
        classifier.zero_grad()
        with torch.set_grad_enabled(kind != 'gemma2'): out = classifier(**pack)  # FlexAttention has no CPU gradients
        if kind != 'gemma2': out.square().sum().backward()
        grads = [p.grad.flatten() for p in classifier.parameters() if p.grad is not None]
        return out.detach(), torch.cat([torch.zeros(1), *grads])
    want = [said(p) for p in packs]
    monkeypatch.setattr('competition_kit.attention.varlen_attn', _varlen_attn)
    monkeypatch.setattr(Classifier, 'varlen', True)
    for pack, w in zip(packs, want) if kind != 'gemma2' else [(packs[0], want[0])]:
        for got, same in zip(said(pack), w): assert (got-same).abs().max() <= 1e-5*(1+same.abs().max())
