"Text generation: replies that depend on their request alone, shards, kills, adapters"
import json, os, shutil, signal, subprocess, sys, time
import numpy as np
import pandas as pd
import pytest
import torch
from competition_kit.base import load_tokenizer, tiny_base
from competition_kit.core import Refusal
from competition_kit.engine import vllm_version
from competition_kit import engine as E, replies as R
from competition_kit.replies import (Request, Text, TransformersEngine, attempt_seed, batches, decode_batch,
                                     generate, job_table, read_replies, reply_engine, sample_tokens, start_engine)
from competition_kit.text import TextPrompt

ROWS = pd.DataFrame([dict(id=f'r{k}', problem='Anna is older than Ben. '*(1+k % 5), question='Who is older?',
                          options=['Anna', 'Ben']) for k in range(10)])

class Counted(TransformersEngine):
    "A real engine that counts what it is asked"
    asked = 0
    def stream(self, requests):
        self.asked += len(requests)
        yield from super().stream(requests)

@pytest.fixture(scope='module')
def base(tmp_path_factory): return tiny_base(tmp_path_factory.mktemp('tiny'))

@pytest.fixture(scope='module')
def engine(base): return Counted(base, TextPrompt(load_tokenizer(base)), batch_tokens=1500)

@pytest.fixture(scope='module')
def enc(engine): return TextPrompt(engine.tok).encode(ROWS)

def requests(enc, n=6, **more):
    return [Request(ids, n, .12, .9, attempt_seed(0, i, k), **more)
            for i, ids in zip(enc.id, enc.ids) for k in range(2)]

def test_a_reply_does_not_depend_on_its_batch(engine, enc):
    asked = requests(enc)
    together = engine.replies(asked)
    assert [engine.replies([r])[0] for r in asked[::3]] == together[::3]
    assert engine.replies(asked[::-1])[::-1] == together
    assert len({t.text for t in together}) > 10, 'seeds give different replies'
    assert all(t.n_tokens == 6 and t.finish == 'length' for t in together)

def test_greedy_is_that_of_transformers(engine, enc):
    "left padding, positions and cache are right"
    ids = [torch.tensor(enc.ids[k]).long()[None] for k in (0, 4)]
    with torch.no_grad(): theirs = [engine.model.base.generate(i, max_new_tokens=6, do_sample=False) for i in ids]
    ours = decode_batch(engine.model.base, [Request(enc.ids[k], 6, 0., 1., 0, '') for k in (0, 4)], {-1}, 0)
    assert ours == [t[0, i.shape[1]:].tolist() for t, i in zip(theirs, ids)]

def test_sequences_end_apart(engine, enc):
    asked = [Request(enc.ids[k], n, .03, 1., k, '') for k, n in ((0, 3), (4, 7), (2, 5))]
    free = decode_batch(engine.model.base, asked, {-1}, 0)
    assert list(map(len, free)) == [3, 7, 5]
    stopped = decode_batch(engine.model.base, asked, {free[1][2]}, 0)
    assert stopped[1] == free[1][:free[1].index(free[1][2])+1] and free[0][:len(stopped[0])] == stopped[0]

def test_sampling():
    logits, rng = torch.tensor([[2., 1., 0., -9.]]), torch.Generator().manual_seed(0)
    def draw(logits, t, top_p, n=20000):
        u = torch.rand(n*len(logits), logits.shape[1], generator=rng)
        return sample_tokens(logits.repeat(n, 1), [t]*len(u), [top_p]*len(u), u)
    shares = np.bincount(draw(logits, 1., 1.), minlength=4)/20000
    assert np.abs(shares-logits.softmax(-1)[0].numpy()).max() < .015  # 4 standard errors
    sharp = np.bincount(draw(logits, .5, 1.), minlength=4)/20000
    assert np.abs(sharp-(2*logits).softmax(-1)[0].numpy()).max() < .015
    assert set(draw(logits, 1., .7).tolist()) == {0, 1}
    assert set(draw(logits, 0., 1.).tolist()) == set(draw(logits, 1., 1e-9).tolist()) == {0}
    falling, one = -1e-4*torch.arange(2000)[None], 9.*(torch.arange(2000) == 7)[None]
    drawn = draw(torch.cat([falling, one]), 1., .5, 1000).reshape(1000, 2)
    assert 900 < drawn[:, 0].max() < 1000 and set(drawn[:, 1].tolist()) == {7}, 'more than 512 tokens may stay'

def test_a_neighbour_with_top_p_changes_nothing():
    "with `top_p=1` every token may come, also where the sum of those before it rounds to 1"
    for seed in range(6):
        logits = 2.*torch.randn(1, 49152, generator=torch.Generator().manual_seed(seed)).repeat(2, 1)
        rare, u = logits[0].argmin(), torch.full_like(logits, 1e-30)
        u[0, rare] = 1-6e-8
        assert sample_tokens(logits, [1., 1.], [1., .9], u)[0] == rare

def test_a_model_that_gives_nan_is_refused(base, enc):
    engine = TransformersEngine(base, TextPrompt(load_tokenizer(base)))
    engine.model.base.model.norm.weight.data.fill_(torch.nan)
    for how in ((0., 1.), (.7, 1.), (.7, .9)):
        with pytest.raises(Refusal, match='gives NaN.*bf16'): engine.replies([Request(enc.ids[0], 3, *how)])

def test_rounding_does_not_change_a_token():
    "Logits of another batch differ in their last digits, half of the vocabulary alike"
    rng = torch.Generator().manual_seed(0)
    logits, u = (torch.randn(400, 5000, generator=rng), torch.rand(400, 5000, generator=rng))
    moved = logits+1e-5*(torch.arange(5000) < 2500)
    for top_p in (1., .9):
        how = [.7]*400, [top_p]*400, u
        assert (sample_tokens(logits, *how) == sample_tokens(moved, *how)).all()

def test_batches(enc):
    asked = requests(enc[:5])+requests(enc[5:], adapter='run')
    found = batches(asked, 700)
    assert sorted(k for b in found for k in b) == list(range(20))
    for b in found:
        lengths = [len(asked[k].ids) for k in b]
        assert len({asked[k].adapter for k in b}) == 1 and lengths == sorted(lengths, reverse=True)
        assert len(b) == 1 or len(b)*max(n+6 for n in lengths) <= 700

def test_a_restart_asks_for_what_is_missing(engine, enc, tmp_path):
    first = job_table(enc, 0, max_new_tokens=3)
    generate(engine, first[:4], tmp_path, 3, progress=False)
    engine.asked = 0
    done = generate(engine, first, tmp_path, 3, progress=False)
    assert engine.asked == 6 and list(done.id) == list(ROWS.id) and not done.text.isna().any()
    generate(engine, first, tmp_path, 3, progress=False)
    assert engine.asked == 6
    other = [job_table(enc, 1, max_new_tokens=3), job_table(enc, 0, seed=1, max_new_tokens=3)]
    more = generate(engine, pd.concat(other, ignore_index=True), tmp_path, progress=False)
    assert engine.asked == 26 and more.key.nunique() == 20
    kept = read_replies(tmp_path)
    assert set(kept.version) == {engine.version} and set(kept.engine) == {'transformers'} and (kept.tokens == 3).all()
    with pytest.raises(Refusal, match='twice'): generate(engine, pd.concat([first, first]), tmp_path)

def test_the_end_of_the_time_loses_no_finished_batch(engine, enc, tmp_path, monkeypatch):
    class Steps: # a clock of eight steps, of which each batch needs three
        n = 8
        def left(self):
            self.n -= 1
            return self.n
    jobs, engine.asked = job_table(enc, 0, max_new_tokens=3), 0
    monkeypatch.setattr(engine, 'batch_tokens', 400)
    first, second, *others = batches(list(jobs.request), 400)
    monkeypatch.setattr(engine, 'clock', Steps())
    with pytest.raises(TimeoutError): generate(engine, jobs, tmp_path, progress=False)
    assert others and set(read_replies(tmp_path).id) == {enc.id[k] for k in first+second}
    monkeypatch.setattr(engine, 'clock', None)
    generate(engine, jobs, tmp_path, progress=False)
    assert engine.asked == 10+10-len(first+second)

KILLED = '''
import sys
sys.path.insert(0, sys.argv[3])
import torch
torch.set_num_threads(1)
from test_generate import *
base, folder = sys.argv[1:3]
prompt = TextPrompt(load_tokenizer(base))
generate(TransformersEngine(base, prompt), job_table(prompt.encode(ROWS), 0, max_new_tokens=60), folder, 1, False)
'''

def test_a_kill_loses_one_shard(base, enc, tmp_path):
    folder = tmp_path/'replies'
    here = os.path.dirname(__file__)
    p = subprocess.Popen([sys.executable, '-c', KILLED, base, str(folder), here], stderr=subprocess.DEVNULL)
    end = time.monotonic()+120
    while len(list(folder.glob('*.parquet'))) < 3 and p.poll() is None and time.monotonic() < end: time.sleep(.01)
    p.send_signal(signal.SIGKILL)
    p.wait()
    kept = {f.name: f.stat().st_mtime_ns for f in folder.glob('*.parquet')}
    assert len(kept) >= 3 and len(read_replies(folder)) == len(kept)
    engine = Counted(base, TextPrompt(load_tokenizer(base)))
    done = generate(engine, job_table(enc, 0, max_new_tokens=60), folder, 1, False)
    assert engine.asked == 10-len(kept) and len(done) == 10
    assert all((folder/n).stat().st_mtime_ns == t for n, t in kept.items()), 'a complete shard was written again'

def test_a_thought_that_the_prompt_opens_is_told(base):
    "a chat template as DeepSeek-R1 has it: a reply begins within a thought, and training repeats no tag"
    import copy
    from competition_kit.completions import encode_completions
    from competition_kit.text import parse_reply
    tok = copy.deepcopy(load_tokenizer(base))
    tok.chat_template = tok.chat_template.replace('<|im_start|>assistant\n', '<|im_start|>assistant\n<think>\n')
    prompt = TextPrompt(tok)
    assert prompt.opened == '<think>' and TextPrompt(load_tokenizer(base)).opened == ''
    reply, = TransformersEngine(base, prompt).replies([Request(prompt.encode(ROWS[:1]).ids[0], 3, 0.)])
    assert reply.text.startswith('<think>') and reply.n_tokens == 3
    read = [parse_reply(prompt.opened+t, ['Anna', 'Ben']).how for t in ('The answer is B, or', 'Hm.</think>\n\nB')]
    assert read == ['cut off', 'last line']
    for text in ('Hm.</think>\n\nB', '<think>Hm.</think>\n\nB'):
        line, = encode_completions(prompt, ROWS[:1].assign(rationale=text, label=1)).itertuples()
        assert tok.decode(line.ids[:-1]).endswith('assistant\n<think>\nHm.</think>\n\nB')

def test_lengths_are_checked(engine, enc):
    with pytest.raises(Refusal): engine.replies([Request(enc.ids[0], 10**6)])

def test_adapters(engine, enc, samples, base):
    from competition_kit.train import train_fold
    run = train_fold(mix='sample_logic', base=base, lora_r=4, lr=.5, epochs=.3, max_len=512, dtype='fp32')
    asked = requests(enc[:3])
    plain = engine.replies(asked)
    mixed = engine.replies(asked+[r._replace(adapter=run.id) for r in asked])
    assert mixed[:6] == plain and mixed[6:] != plain
    assert engine.replies(asked) == plain, 'the adapter stays on the base'
    score = train_fold(mix='sample_logic', base=base, lora_r=4, epochs=.1, max_len=512, route='score')
    with pytest.raises(Refusal, match='no adapter of the answer route'):
        engine.replies([asked[0]._replace(adapter=score.id)])

# ---- the stage
RIGHT = '<thinking>Ben is older than Cleo and Anna is older than Ben, so she is last.</thinking><output>{}</output>'

class Planted:
    "Replies of a person, for the stage's own work: row → texts by attempt; it cannot stand for a model's speed"
    name, version = 'planted', '1'
    def __init__(self, texts, tok, die_at=99): self.texts, self.tok, self.die_at, self.asked = texts, tok, die_at, []
    def replies(self, requests):
        out = []
        for r in requests:
            if len(self.asked) == self.die_at: raise KeyboardInterrupt
            text = self.tok.decode(r.ids)
            row = next(k for k in self.texts if f'Row {k}.' in text)
            said = self.texts[row]
            self.asked.append((row, 'The right option is' in text, r.seed))
            made = said[min(sum(a[0] == row for a in self.asked), len(said))-1]
            out.append(Text(made, 'stop', len(made)))
        return out

LOOP = '<thinking>So Ben lies. Then Anna lies. '+'So Ben lies. Then Anna lies. '*9
TEXTS = dict(first=[RIGHT.format('C')], third=['The answer is A or B', RIGHT.format('Ｄ'), RIGHT.format('Ｃ')],
             text=['Cleo', RIGHT.format('Cleo')], wrong=[RIGHT.format('B')],
             told=["I'm sorry, I cannot answer.", LOOP]+[RIGHT.format('B')]*4+[RIGHT.format('C')],
             leak=[RIGHT.format('A')]*6+[RIGHT.format('C').replace('Ben', 'The given answer is C. Ben', 1)]*2)

@pytest.fixture
def planted(own_root):
    "A table of rows with planted replies, and the stage's arguments"
    from competition_kit.core import data_path
    from competition_kit.tables import write_rows
    rows = pd.DataFrame([dict(id=k, group=k, source='t', fold=0, label=2, target=None, weight=1.,
                              problem=f'Row {k}. Anna is older than Ben. Ben is older than Cleo.',
                              question='Who is the youngest?', options=['Anna', 'Ben', 'Cleo']) for k in TEXTS])
    rows.attrs['meta'] = dict(name='t', task='choice', folds=5, seed=0, part='train')
    write_rows(rows, data_path('t.parquet'))
    return rows

def run_planted(engine=None, **more):
    from competition_kit.generate import GenerateArgs, generate as stage
    from competition_kit.record import run_stage
    args = GenerateArgs(**(dict(data='t', retries=6, given=2, max_new_tokens=9, shard=1) | more))
    vars(args)['teacher'] = engine or Planted(TEXTS, args.prompt.prompt.tok)
    return args, run_stage(stage, args)

def test_planted_replies_through_the_stage(planted):
    from competition_kit.core import read_table
    from competition_kit.rows import correct, read_corrections
    from competition_kit.tables import load_rows, publish
    args, run = run_planted()
    m, asked = run.record['metrics'], args.teacher.asked
    assert {k for k, *_ in asked} == set(TEXTS) and len({seed for *_, seed in asked}) == len(asked)
    assert [given for k, given, _ in asked if k == 'told'] == [False]*6+[True]
    assert not any(given for k, given, _ in asked if k == 'third')
    assert (m['sampled'], m['given'], m['doubtful']) == (3, 1, 2)
    assert m['accuracy'] == pytest.approx(2/6), 'the first attempts of `first` and `text` are right'
    reasons = 'two answers', 'outside the options', 'no reasoning', 'refusal', 'repeats itself', 'leaks the instruction'
    assert [m[f'refused: {r}'] for r in reasons] == [1, 1, 1, 1, 1, 2]
    publish(run.folder, args.name)
    rows = load_rows('t_rationale').set_index('id')
    assert set(rows.index) == {'first', 'third', 'text', 'told'} and rows.given.to_dict()['told']
    assert rows.pass_rate.round(2).to_dict() == dict(first=1, third=.33, text=1, told=0)
    assert rows.rationale['third'] == RIGHT.format('Ｃ') and list(rows.options['first']) == ['Anna', 'Ben', 'Cleo']
    raw = read_table(run.folder/'replies.parquet')
    assert len(raw) == len(asked) == m['replies'] and set(raw.engine) == {'planted'}
    fixes = read_corrections(run.folder/'corrections.csv')
    assert {f['id']: (f['old'], f['new']) for f in fixes} == dict(wrong=('C', 'B'), leak=('C', 'A'))
    assert correct(planted, fixes, 'choice').label.tolist() == [2, 2, 2, 1, 2, 0]

def test_a_stopped_stage_goes_on(planted):
    from competition_kit.generate import GenerateArgs
    tok = GenerateArgs(data='t').prompt.prompt.tok
    with pytest.raises(KeyboardInterrupt): run_planted(Planted(TEXTS, tok, die_at=4))
    args, run = run_planted()
    first_round = [k for k, *_ in args.teacher.asked[:2]]
    assert len(first_round) == len(set(first_round)) == 2 and run.done
    assert len(read_replies(run.folder/'replies')) == len(args.teacher.asked)+4

def test_a_writer_without_an_accepted_text_is_refused(planted, own_root, capsys):
    only = {k: [RIGHT.format('B')] for k in TEXTS}
    tok = load_tokenizer()
    for asked in (24, 0):  # the second time nothing is asked for again
        engine = Planted(only, tok)
        with pytest.raises(Refusal, match='24 wrong.*more retries.*replies.parquet|replies.parquet.*24 wrong'):
            run_planted(engine, retries=3, given=1)
        assert len(engine.asked) == asked
        folder, = (own_root/'models').glob('generate-*')
        names = {f.name for f in folder.iterdir()}
        assert {'replies.parquet', 'pass_rates.parquet', 'corrections.csv'} <= names and 'rows.parquet' not in names
    said = capsys.readouterr().out
    assert '6 rows x at most 4 attempts: at most 24 texts' in said and '24 replies are there: at most 0 texts' in said

def test_a_run_takes_over_what_an_earlier_one_has_written(planted, capsys):
    "more retries, or another shard: only what is missing is asked for; another model or engine shares nothing"
    only, tok = {k: [RIGHT.format('B')]*3+[RIGHT.format('C')] for k in TEXTS}, load_tokenizer()
    with pytest.raises(Refusal, match='18 wrong'): run_planted(Planted(only, tok), retries=3, given=0)
    capsys.readouterr()
    more = Planted({k: [RIGHT.format('C')] for k in TEXTS}, tok)
    _, run = run_planted(more, retries=4, given=0)
    assert len(more.asked) == 6 and run.record['metrics']['replies'] == 24 == len(read_replies(run.folder/'replies'))
    assert capsys.readouterr().out.count('6 replies are from an earlier run') == 3
    same = Planted(only, tok)
    _, again = run_planted(same, retries=4, given=0, shard=5)
    assert not same.asked and again.id != run.id and again.record['metrics'] == run.record['metrics']
    other, hotter, dtype = (Planted(only, tok) for _ in range(3))
    other.version = '2'
    run_planted(other, retries=4, given=0, shard=7)
    run_planted(hotter, retries=4, given=0, temperature=.9)
    run_planted(dtype, retries=4, given=0, dtype='fp32')
    assert len(other.asked) == len(hotter.asked) == len(dtype.asked) == 24

def test_the_plan_tells_of_truncated_rows(planted):
    from types import SimpleNamespace
    from competition_kit.core import data_path
    from competition_kit.generate import GenerateArgs, writing_plan
    from competition_kit.tables import write_rows
    write_rows(planted.assign(problem=[p+' Dora sings.'*200*(k < 2) for k, p in enumerate(planted.problem)]),
               data_path('t.parquet'))
    def told(max_len): return writing_plan(SimpleNamespace(name='planted'), GenerateArgs(data='t', max_len=max_len))
    assert told(512).startswith('6 rows (2 truncated to max_len=512) x at most 22 attempts')
    assert told(2048).startswith('6 rows x at most 22 attempts')

WRONG = dict(temperature=.5), dict(top_p=0.), dict(retries=0), dict(name='t'), dict(agree=2.)
@pytest.mark.parametrize('wrong', WRONG)
def test_arguments(planted, wrong):
    from competition_kit.generate import GenerateArgs
    with pytest.raises(Refusal): GenerateArgs(**(dict(data='t') | wrong))

def test_other_tables_are_refused(samples):
    from competition_kit.generate import GenerateArgs
    with pytest.raises(Refusal, match='task preference'): GenerateArgs(data='sample_arena').rows
    with pytest.raises(Refusal, match='without a label'): GenerateArgs(data='sample_logic_test').rows

def test_a_doubtful_label_is_corrected_by_a_person(own_root):
    "raw file → split → attempts against the label → workbook and correction file → split again"
    import json, openpyxl
    from competition_kit.core import data_path
    from competition_kit.log import LOG
    from competition_kit.record import run_stage
    from competition_kit.split import SplitArgs, make_split
    from competition_kit.tables import load_rows, publish
    def story(name): return f'Row {name}. '+' '.join(f'{name}{k*k}' for k in range(60))
    asked = [dict(question='Who is the youngest?', options=['Anna', 'Ben', 'Cleo'], answer='C')]
    raw = [dict(id=f'p{k}', problem=story(name), questions=asked)
           for k, name in enumerate(['first', 'wrong', 'leak', 'third'])]
    data_path('t').mkdir(parents=True)
    data_path('t/train.jsonl').write_text('\n'.join(json.dumps(r, ensure_ascii=False) for r in raw))
    publish(run_stage(make_split, SplitArgs('t', folds=2)).folder, 't')
    ids = {next(k for k in TEXTS if f'Row {k}.' in p): i for i, p in zip(load_rows('t').id, load_rows('t').problem)}
    _, run = run_planted()
    assert run.record['doubtful'] == [f"{ids['wrong']}: C or B?", f"{ids['leak']}: C or A?"]
    sheet = openpyxl.load_workbook(own_root/LOG)['runs']
    at = {c.value: c.column for c in sheet[1]}
    row = next(r for r in range(2, sheet.max_row+1) if sheet.cell(r, at['run_id']).value == run.id)
    assert sheet.cell(row, at['doubtful']).value == ', '.join(run.record['doubtful'])
    assert set(load_rows('t').label) == {2}, 'nothing is changed without a person'
    file = run.folder/'corrections.csv'
    kept = [line for line in file.read_text().splitlines(keepends=True) if not line.startswith(ids['leak'])]
    (own_root/'fix.csv').write_text(''.join(kept))
    publish(run_stage(make_split, SplitArgs('t', corrections='fix.csv', folds=2)).folder, 't')
    assert load_rows('t').set_index('id').label.to_dict() == {i: 1 if k == 'wrong' else 2 for k, i in ids.items()}

def test_held_out_answers_count_as_attempts(planted, tmp_path):
    "three models and one attempt against the label; an answer of a model that has seen the row, or a tie, is none"
    from competition_kit.adopt import adopt_files
    from competition_kit.generate import GenerateArgs, held_out_answers
    from competition_kit.rows import correct, read_corrections
    def adopted(name, seen, **p): # probability of C by row; B has the rest
        file = tmp_path/f'{name}.parquet'
        pd.DataFrame([dict(id=k, p=[0., 1-p.get(k, .9), p.get(k, .9)]) for k in TEXTS]).to_parquet(file)
        adopt_files([file], 't', name, seen=seen)
    adopted('one', 'no', wrong=.1, told=.5)
    for name in ('two', 'three'): adopted(name, 'no', wrong=.2, told=.1)
    adopted('four', 'yes', leak=0.)
    answers = held_out_answers(['one', 'two', 'three'], planted)
    assert len(answers) == 18 and set(answers.option[answers.id == 'told']) == {-1, 1}
    _, run = run_planted(held_out='one two three', retries=1, given=0, doubt=4)
    fix, = read_corrections(run.folder/'corrections.csv')
    assert (fix['id'], fix['old'], fix['new']) == ('wrong', 'C', 'B')
    assert fix['why'] == '1 of 1 parsed attempts and 3 of 3 held-out answers say B'
    assert correct(planted, [fix], 'choice').label.tolist() == [2, 2, 2, 1, 2, 2]
    assert len([k for k in run.record['inputs'] if k.startswith('teacher.')]) == 3
    with pytest.raises(Refusal, match='no held-out answer.*four|four.*no held-out answer'):
        GenerateArgs(data='t', held_out='one four').inputs()

def test_a_tie_is_no_doubt_and_every_reply_counts_once():
    from competition_kit.generate import doubtful_labels, judge_replies
    rows = pd.DataFrame([dict(id='a', label=2, options=['Anna', 'Ben', 'Cleo'])])
    def doubts(n_a, n_b, agree): # letters of attempts against C
        return list(doubtful_labels(pd.DataFrame(dict(id='a', option=[0]*n_a+[1]*n_b)), rows, 2, agree).new)
    assert doubts(2, 2, .5) == doubts(13, 12, .56) == [] and doubts(2, 1, .5) == doubts(14, 11, .56) == ['A']
    one = pd.DataFrame(dict(id=['a'], text=['<output>A</output>'], finish='stop'))
    assert judge_replies(pd.concat([one, one.replace('A', 'B', regex=True)]), rows).option.tolist() == [0, 1]

# ---- engines
def test_which_engine_generates(monkeypatch):
    from competition_kit import replies as R
    from competition_kit.generate import GenerateArgs
    assert R.reply_engine('packs', 'smollm2') == 'transformers' and R.reply_input('transformers') == {}
    monkeypatch.setattr(R, 'vllm_version', lambda: '')
    assert R.reply_engine('auto', 'smollm2') == 'transformers'
    with pytest.raises(Refusal, match='vLLM is not installed'): GenerateArgs(engine='vllm')
    with pytest.raises(Refusal, match='no engine named'): GenerateArgs(engine='tgi')
    monkeypatch.setattr(R, 'vllm_version', lambda: '9.9')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert R.reply_engine('packs', 'smollm2') == 'vllm'  # in a vote
    assert R.reply_engine('auto', 'smollm2') == 'vllm' and R.reply_input('vllm') == dict(engine='vllm 9.9')
    assert R.reply_engine('auto', 'smollm2', 'nf4') == 'transformers'
    with pytest.raises(Refusal, match='nf4'): R.reply_engine('vllm', 'smollm2', 'nf4')

class Streamed:
    "Replies one by one, the last request first, as vLLM may finish them"
    name, version = 'streamed', '1'
    def __init__(self, die_at=99): self.die_at, self.given = die_at, 0
    def stream(self, requests):
        for k in reversed(range(len(requests))):
            if self.given == self.die_at: raise KeyboardInterrupt
            self.given += 1
            yield k, Text(f'reply to {len(requests[k].ids)}', 'stop', 3)

def test_streamed_replies_belong_to_their_rows_and_an_error_loses_none(enc, tmp_path):
    jobs = job_table(enc, 0, max_new_tokens=3)
    with pytest.raises(KeyboardInterrupt): generate(Streamed(die_at=8), jobs, tmp_path, 3, progress=False)
    assert len(read_replies(tmp_path)) == 8
    engine = Streamed()
    done = generate(engine, jobs, tmp_path, 3, progress=False)
    assert engine.given == 2 and list(done.text) == [f'reply to {len(i)}' for i in enc.ids]

def test_an_engine_gives_one_reply_to_each_request(enc, tmp_path):
    class Twice:
        name, version = 'twice', '1'
        def replies(self, requests): return [Text('x', 'stop', 1)]*2*len(requests)
    with pytest.raises(Refusal, match='twice gave 6 replies to 3 requests'):
        generate(Twice(), job_table(enc, 0), tmp_path, 3, progress=False)
    assert not len(read_replies(tmp_path))

needs_vllm = pytest.mark.skipif(not vllm_version(), reason='vLLM is not installed')

@needs_vllm
def test_vllm_writes_what_transformers_writes(samples, tmp_path):
    "greedy replies of the base and of an adapter are equal; an adapter that vLLM does not read is refused"
    import shutil
    from safetensors.torch import load_file, save_file
    from transformers import LlamaConfig, LlamaForCausalLM
    from competition_kit import replies as R
    from competition_kit.train import train_fold
    tok, base = load_tokenizer(), str(tmp_path/'wide')
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), hidden_size=128, intermediate_size=128, num_hidden_layers=2,
                                 num_attention_heads=2, num_key_value_heads=1)).save_pretrained(base)
    tok.save_pretrained(base)
    run = train_fold(mix='sample_logic', base=base, lora_r=4, lr=.3, epochs=.3, max_len=512, dtype='fp32')
    prompt = TextPrompt(load_tokenizer(base), 512)
    asked = [Request(ids, 8, 0., 1., 1, adapter) for ids in prompt.encode(ROWS[:3]).ids for adapter in ('', run.id)]
    want = TransformersEngine(base, prompt).replies(asked)
    assert want[::2] != want[1::2]
    with R.VllmEngine(base, prompt, adapters=[run.id]) as served:
        assert served.replies(asked) == want
        sampled = [r._replace(temperature=.9, seed=k) for k, r in enumerate(asked)]
        assert served.replies(sampled)[3:] == served.replies(sampled[3:]), 'a reply depends on its own request'
    good, bad = R.run_adapter(run.id, base), tmp_path/'renamed'
    shutil.copytree(good, bad)
    tensors = load_file(good/'adapter_model.safetensors')
    save_file({k.replace('layers.', 'layers.9'): t for k, t in tensors.items()}, bad/'adapter_model.safetensors')
    with R.VllmEngine(base, prompt, adapters=[run.id]) as served:
        served.folders = [bad]
        with pytest.raises(Refusal, match='does not answer as the kit does|vLLM failed'): served.replies(asked)

@pytest.fixture
def served(monkeypatch): # what vLLM is started with, on a machine that has it and a GPU
    started = []
    monkeypatch.setattr(E, '_has_gpu', lambda: True)
    monkeypatch.setattr(R, 'vllm_version', lambda: '0.26.0')
    monkeypatch.setattr(R, 'Engine', lambda *a, **kw: started.append(kw))
    return started

def test_a_model_too_large_for_one_gpu_is_shared(base, served):
    start_engine('vllm', base, TextPrompt(load_tokenizer(base)), gpus=4).started(12)
    assert served[0]['tensor_parallel'] == 4
    with pytest.raises(Refusal, match='gpus=4: transformers writes on one GPU'): reply_engine('auto', base, gpus=4)

def test_vllm_has_room_for_prompts_longer_than_those_of_the_kit(base, served, monkeypatch):
    "`05a_pairs` asks for whole prompts; vLLM would end their replies early, or refuse them"
    class Room:
        limit = 9.
        def __init__(self, base, folders, dtype, max_len, **how): self.max_len = max_len
        def close(self): pass
        def stream(self, ids, seed, new, *how, **more):
            assert max(len(i)+n for i, n in zip(ids, new)) <= self.max_len
            for k in range(len(ids)): yield k, dict(tokens=[5], finish='stop')
    monkeypatch.setattr(R, 'Engine', Room)
    engine = start_engine('vllm', base, TextPrompt(load_tokenizer(base), 512))
    short, long = Request(np.arange(40), 12), Request(np.arange(700), 12)
    assert len(engine.replies([short])) == 1 and engine.longest == 524
    assert len(engine.replies([short, long])) == 2 and engine.longest == 712
    with pytest.raises(Refusal, match='2048'): engine.replies([Request(np.arange(2040), 12)])

def test_vllm_writes_with_a_base_that_the_kit_cannot_read(base, served, tmp_path):
    shutil.copytree(base, tmp_path/'fp8')
    file = tmp_path/'fp8/config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(quantization_config=dict(quant_method='fp8'))))
    fp8, prompt = str(tmp_path/'fp8'), TextPrompt(load_tokenizer(base))
    start_engine(reply_engine('vllm', fp8), fp8, prompt).started(12)
    assert len(served) == 1
    with pytest.raises(Refusal, match='quantised by fp8'): TransformersEngine(fp8, prompt)

def test_an_ended_engine_gives_its_model_back(base):
    import weakref
    engine = start_engine('transformers', base, TextPrompt(load_tokenizer(base)))
    model = weakref.ref(engine.model.base)
    R.end_engine(engine)
    assert model() is None and engine.version

def test_another_fold_of_the_writer_does_not_change_a_run(runs):
    "a stage that was killed goes on, though a further fold of its writer has finished since"
    from competition_kit.core import models_path
    from competition_kit.generate import GenerateArgs
    from competition_kit.pairs import PairsArgs
    from competition_kit.synthetic import SyntheticArgs
    def inputs():
        return [GenerateArgs(run=runs[0]).inputs(), SyntheticArgs(by='model', run=runs[0]).inputs(),
                PairsArgs(data='sample_arena', name='p', models=f'{runs[0]} smollm2', against='none').inputs()]
    models_path(runs[1]).rename(models_path('later'))
    before = inputs()
    models_path('later').rename(models_path(runs[1]))
    assert inputs() == before and all(f'teacher.{runs[0]}' in i for i in before)

def test_a_writer_that_is_no_model_is_refused(runs):
    from competition_kit.core import models_path
    from competition_kit.record import read_record, write_record
    file = models_path(runs[0], 'record.json')
    write_record(file, read_record(file) | dict(status='failed'))
    with pytest.raises(Refusal, match='no finished run with a model'): R.reply_input('transformers', runs[0])

def test_a_shard_does_not_limit_a_batch(samples, base, monkeypatch):
    import competition_kit.generate as G
    monkeypatch.setattr(G, 'measured_speed', lambda engine: G.gpu_speed(G.writer_shape(base), G.find_gpu('H200'),
                                                                        'bf16', 'transformers', 8))
    how = dict(data='sample_logic:12', base=base, max_new_tokens=40)
    minutes = {n: G.most_minutes(G.GenerateArgs(**how).teacher, G.GenerateArgs(**how, shard=n), 120, 180.)[0]
               for n in (1, 64)}
    assert minutes[1] == minutes[64]

def test_a_mix_has_a_correction_file_for_each_table(planted):
    from competition_kit.core import data_path
    from competition_kit.generate import doubt_lines
    from competition_kit.rows import correct, read_corrections
    from competition_kit.tables import write_rows
    for name, part in (('t', planted[planted.id != 'leak']), ('more', planted[planted.id == 'leak'])):
        write_rows(part, data_path(f'{name}.parquet'))
    _, run = run_planted(data='t + more')
    files = {t: run.folder/f'corrections_{t}.csv' for t in ('t', 'more')}
    fixes = {t: read_corrections(f) for t, f in files.items()}
    assert {t: [f['id'] for f in found] for t, found in fixes.items()} == dict(t=['wrong'], more=['leak'])
    assert correct(planted[planted.id == 'leak'], fixes['more'], 'choice').label.tolist() == [0]
    assert {f.name for f in files.values()} <= set(run.record['outputs'])
    many = pd.DataFrame(dict(id=list('abc'), old='A', new='B'))
    more = doubt_lines(many, [f.name for f in files.values()], 2)[-1]
    assert more == '1 more in corrections_t.csv, corrections_more.csv'

def test_a_table_of_another_stage_is_never_replaced(planted, own_root):
    "refused before the work, and again when a run publishes; the same stage may replace its own"
    from competition_kit.core import data_path
    from competition_kit.generate import GenerateArgs
    from competition_kit.tables import load_rows, publish, write_rows
    args, run = run_planted()
    for _ in range(2): publish(run.folder, args.name)
    _, again = run_planted(seed=1)
    publish(again.folder, args.name)
    assert load_rows(args.name).attrs['meta']['run'] == again.id
    write_rows(planted, data_path('mine.parquet'))
    planted.to_parquet(data_path('foreign.parquet'))
    for name, maker in (('mine', 'split'), ('foreign', 'another program')):
        before = data_path(f'{name}.parquet').read_bytes()
        with pytest.raises(Refusal, match=f'{maker} made this table, and generate would replace it'):
            publish(run.folder, name)
        with pytest.raises(Refusal, match=f'{name}.parquet'): GenerateArgs(data='t', name=name)
        assert data_path(f'{name}.parquet').read_bytes() == before
    data_path('broken.parquet').write_bytes(b'PAR1')
    publish(run.folder, 'broken')
    assert len(load_rows('broken')) == 4
