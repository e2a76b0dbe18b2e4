"Runs of the text route in a vote: shares, retries, abstentions, the clock, a kill, and what is refused"
import shutil
from types import SimpleNamespace
import numpy as np
import pandas as pd
import pytest
from competition_kit import text_voters as T
from competition_kit.base import load_tokenizer, tiny_base
from competition_kit.clock import Clock
from competition_kit.completions import answer_rows
from competition_kit.core import Refusal, data_path, models_path, read_table, root_at, write_table
from competition_kit.engine import EngineDied
from competition_kit.probs import read_probs
from competition_kit.predictions import write_sample
from competition_kit.record import read_record, run_stage, start_run, write_record
from competition_kit.replies import Text, generate, read_replies
from competition_kit.submission import check_submission, find_sample
from competition_kit.tables import load_rows, write_rows
from competition_kit.text import TextPrompt
from competition_kit.vote import VoteArgs, prior_probs, rows_to_predict, run_staged, score_vote, vote, voters

def write_few(name, rows):
    "A small table; a letter is a rationale that a small model can learn to write"
    meta = rows.attrs['meta'] | dict(name=name)
    rows = rows.reset_index(drop=True).assign(rationale=['ABCDEFG'[max(k, 0)] for k in rows.label])
    rows.attrs['meta'] = meta
    write_rows(rows, data_path(f'{name}.parquet'))

@pytest.fixture(scope='module')
def trained_text(tmp_path_factory, sample_tables):
    "A root with a letter run and a text run over one random base, and their ids"
    from competition_kit.train import train_fold
    with root_at(tmp_path_factory.mktemp('texts')) as root:
        shutil.copytree(sample_tables, root, dirs_exist_ok=True)
        write_few('few', load_rows('sample_logic').head(40))
        write_few('few_test', load_rows('sample_logic_test').head(8))
        data_path('few').mkdir()
        write_sample(load_rows('few_test'), data_path('few'))
        base = tiny_base(root/'tiny')
        how = dict(mix='few', base=base, max_len=448, dtype='fp32', batch=4, score_every=4)
        letters = train_fold(lora_r=2, epochs=.2, **how)
        text = train_fold(route='text', method='full', lr=1e-2, epochs=4., max_new_tokens=8, **how)
        return root, letters.id, text.id

@pytest.fixture
def both(trained_text, own_root):
    root, letters, text = trained_text
    shutil.copytree(root, own_root, dirs_exist_ok=True)
    return letters, text

class Planted:
    "Replies by the row: attempt → text; it counts what it is asked"
    name, version, clock, die_at = 'planted', '1', None, 10**6
    def __init__(self, plan): self.plan, self.asked = plan, []
    def replies(self, requests):
        if len(self.asked)+len(requests) > self.die_at: raise KeyboardInterrupt
        out = []
        for r in requests:
            row, turn = tuple(r.ids), sum(o == tuple(r.ids) for o in self.asked)
            self.asked.append(row)
            out.append(Text(self.plan(list(dict.fromkeys(self.asked)).index(row), turn), 'stop', 3))
        return out

def planted(monkeypatch, plan):
    engine = Planted(plan)
    def start(*a, **kw):
        engine.how = kw
        return engine
    monkeypatch.setattr(T, 'start_engine', start)
    return engine

def held(letters, text, **kw):
    names = ' '.join(filter(None, (letters, text)))
    return run_stage(vote, VoteArgs('few', names, **(dict(samples=3) | kw)))

def tables(run):
    "The vote, and its voters: name → [rows, options], NaN where a voter has no answer"
    votes = read_probs(run.folder/'votes.parquet')
    def wide(col): return np.array([np.full(7, np.nan) if o is None else np.pad(o, (0, 7-len(o))) for o in votes[col]])
    return wide('p'), [wide(v) for v in votes.attrs['meta']['voters']]

def plan(row, turn):
    "Row 0: always B; row 1: A, A, B; row 2: an answer at the second round; the others never"
    return ['B', 'AAB'[turn % 3], '?' if turn < 3 else 'A', 'I am not sure.'][min(row, 3)]

def test_texts_and_letters_vote_together(both, monkeypatch, capsys):
    engine = planted(monkeypatch, plan)
    run = held(*both, weights='1 3', retries=1)
    p, (letters, text) = tables(run)
    replies = read_table(run.folder/'replies.parquet')
    counts = replies.groupby('id').option.agg([lambda o: (o == 0).sum(), lambda o: (o == 1).sum()]).to_numpy()
    order = list(dict.fromkeys(replies.id))
    rows = load_rows('few_test')
    share = counts/np.maximum(counts.sum(1, keepdims=True), 1)
    share = pd.DataFrame(share, sorted(order)).loc[rows.id].to_numpy()
    answered = share.sum(1) > 0
    assert answered.sum() == 3 and sorted(share[answered].max(1).round(2)) == [.67, 1, 1]
    np.testing.assert_allclose(text[answered, :2], share[answered], atol=1e-6)
    assert np.isnan(text[~answered]).all() and not np.isnan(letters).any()
    np.testing.assert_allclose(p[answered], .25*letters[answered]+.75*text[answered], atol=1e-6)
    np.testing.assert_allclose(p[~answered], letters[~answered], atol=1e-6)
    m = run.record['metrics']
    assert (m['replies'], m['retried'], m['unparsed']) == (24+18, 18, 3+15+15) and m['rows_without_answer'] == 5
    missing = run.record['missing']
    assert missing['runs'][both[1]] == 5 and missing['no_model'] == 0, 'a reply without an answer is missing'
    assert len(engine.asked) == 42 and len({*zip(replies.id, replies.seed)}) == 42 and set(replies.run) == {both[1]}
    unparsed = '33 of 42 replies are unparsed (79%); 5 of the rows asked have no parsed reply.'
    assert capsys.readouterr().out.strip().splitlines()[-1] == f'The vote is complete. {unparsed}'
    assert run.record['sentence'].endswith(unparsed)

@pytest.mark.parametrize('samples', [1, 3])
def test_a_score_asks_as_a_vote(tmp_path, samples):
    rows = pd.DataFrame([dict(id='a', problem='Ann lies.', question='What is Ann?', options=['knight', 'knave'])])
    prompt, asked = TextPrompt(load_tokenizer()), {}
    for name in 'score', 'vote':
        engine = Planted(lambda row, turn: 'A')
        engine.replies = lambda requests: asked.update({name: requests}) or [Text('A', 'stop', 1) for _ in requests]
        if name == 'score': answer_rows(engine, prompt, rows, tmp_path/name, 9, samples, progress=False)
        else: T.sample_texts(engine, prompt.encode(rows), rows, tmp_path/name, samples, max_new_tokens=9)
    assert [r[1:] for r in asked['score']] == [r[1:] for r in asked['vote']] and len(asked['vote']) == samples

def test_the_score_does_not_depend_on_the_order_of_the_runs(both):
    "the text run alone has its untouched base as a baseline"
    one, other = (score_vote(voters('few', ' '.join(names)), 'few') for names in (both, both[::-1]))
    assert 'untouched base, text' in one['metrics']['baselines']
    assert one['metrics'] == other['metrics'] and one['sentence'] == other['sentence']

def test_rows_without_an_answer_get_the_prior_when_nobody_else_votes(both, monkeypatch):
    planted(monkeypatch, lambda row, turn: 'A' if row == 0 else '我不知道。')
    run = held('', both[1], retries=0)
    p, (text,) = tables(run)
    rows, none = load_rows('few_test'), np.isnan(text).all(1)
    rows.attrs['meta'] = dict(task='choice')
    assert none.sum() == 7
    np.testing.assert_allclose(p[none], prior_probs(load_rows('few'), rows)[none], atol=1e-6)
    assert (p[~none, 0] == 1).all() and run.record['missing']['one_view'] == 0
    assert run.record['missing']['no_model'] == 7

def test_what_the_gate_of_a_writing_engine_measured_is_in_the_record(both, monkeypatch):
    engine = planted(monkeypatch, plan)
    engine.parity = {both[1]: dict(median=.01, limit=.1)}
    assert held(*both).record['engine'] == {both[1]: dict(engine='planted 1', parity=engine.parity)}

@pytest.mark.parametrize('gate', [None, Refusal('far off'), EngineDied('out of memory')])
def test_vllm_writes_where_it_is_if_its_gate_passes(both, monkeypatch, capsys, gate):
    kinds, measured = [], {both[1]: dict(median=.01, limit=.1)}
    def start(kind, *a, **kw):
        kinds.append(kind)
        return Planted(plan)
    def served_parity(engine, ids, new):
        assert len(ids) == 8 and new == 8
        if gate: raise gate
        return measured
    for name, f in dict(is_full=lambda rec: False, reply_engine=lambda *a: 'vllm', start_engine=start,
                        served_parity=served_parity).items(): monkeypatch.setattr(T, name, f)
    run = held(*both)
    assert kinds == (['vllm', 'transformers'] if gate else ['vllm'])
    assert ('Transformers writes in place of vLLM. '+str(gate) in capsys.readouterr().out) == bool(gate)
    assert run.record['engine'] == ({} if gate else {both[1]: dict(engine='planted 1', parity=measured)})
    T.TextAsker([both[1]], load_rows('few_test'), run.folder, Clock(0), engine='vllm').load(both[1])
    assert kinds[-1] == 'vllm'  # asked for by name: the gate's refusal ends the vote

def test_the_version_of_vllm_is_an_input_of_a_vote_with_texts(both, monkeypatch):
    monkeypatch.setattr('competition_kit.engine.vllm_version', lambda: '9.9')
    assert VoteArgs('few', ' '.join(both)).inputs()['engine'] == 'auto: vllm 9.9'
    assert 'engine' not in VoteArgs('few', both[0]).inputs()

def test_a_killed_vote_asks_for_what_is_missing(both, monkeypatch):
    planted(monkeypatch, plan).die_at = 20
    monkeypatch.setattr(T, 'generate', lambda *a, **kw: generate(*a, 4, **kw))
    with pytest.raises(KeyboardInterrupt): held(*both, retries=0)
    folder, = models_path().glob('vote-*')
    assert len(read_replies(folder/'replies'/both[1])) == 20
    engine = planted(monkeypatch, plan)
    run = held(*both, retries=0)
    assert len(engine.asked) == 4 and run.record['metrics']['replies'] == 24
    assert len(read_table(run.folder/'replies.parquet')) == 24

def test_a_vote_with_more_samples_takes_over_those_of_an_earlier_vote(both, monkeypatch):
    "of the same engine, and of a run that is the same file by file"
    def asked(version='1', **kw):
        engine = planted(monkeypatch, lambda row, turn: 'A')
        engine.version = version
        assert held(*both, retries=0, **kw).record['metrics']['replies'] == 8*kw['samples']
        return len(engine.asked)
    assert asked(samples=2) == 16 and asked(samples=3) == 8
    assert asked(samples=3, weights='1 2') == 0 and asked(samples=3, rule='majority', version='2') == 24
    for file in models_path().glob('vote-*/record.json'):
        rec = read_record(file)
        write_record(file, rec | dict(inputs=rec['inputs'] | {both[1]: 'another'}))
    assert asked(samples=2, weights='1 3') == 16

def test_a_cascade_asks_texts_for_the_rows_in_doubt(both, monkeypatch):
    engine = planted(monkeypatch, lambda row, turn: 'A')
    run = held(*both, rescore=.5, retries=0, samples=2, weights='1 9')
    p, (letters, text) = tables(run)
    asked = ~np.isnan(text).all(1)
    margin = np.sort(letters, 1)[:, -1]-np.sort(letters, 1)[:, -2]
    assert asked.sum() == 4 and margin[asked].max() <= margin[~asked].min() and len(engine.asked) == 8
    assert 'every voter for every row; here 1.5 of 2 runs were asked on average.' in run.record['sentence']

class SlowClock(Clock):
    "A clock on which each look takes a second"
    def __init__(self, minutes):
        self.t = 0.
        super().__init__(minutes, now=self.tick)
    def tick(self):
        self.t += 1
        return self.t

def test_the_time_is_up_within_a_text(both):
    "a real engine: the letters are there, some texts are not, and the submission is valid"
    args = VoteArgs('few', ' '.join(both), budget=.35, samples=2, retries=0, views=1)
    rows = rows_to_predict(args.ballot, 'few')
    with start_run('vote', dict(of='a test'), {}) as run:
        sample = find_sample('few')
        run_staged(run, args, args.ballot, rows, sample, SlowClock(.35))
    assert run.record['stopped'].startswith(('TimeoutError', 'the time is up'))
    assert run.record['missing']['runs'][both[0]] == 0 and run.record['missing']['runs'][both[1]] > 0
    assert check_submission(run.folder/'submission.jsonl', sample, 'choice', rows)

def test_the_time_is_up_before_a_text(both):
    args = VoteArgs('few', ' '.join(both), budget=.001)
    with start_run('vote', dict(of='a test'), {}) as run:
        run_staged(run, args, args.ballot, rows_to_predict(args.ballot, 'few'), find_sample('few'), Clock(.001))
    assert run.record['metrics']['replies'] == 0 and 'unparsed' not in run.record['sentence']

def test_a_row_has_an_answer_if_one_of_its_texts_is_parsed(tmp_path):
    rows = pd.DataFrame([dict(id=i, options=['yes', 'no']) for i in 'abc'])
    rows.attrs['meta'] = dict(task='choice')
    asker = SimpleNamespace(recs=('one', 'two'), rows=rows, samples=1, folder=tmp_path)
    for run, texts in dict(one='A??', two='?A?').items():
        replies = pd.DataFrame(dict(id=list('abc'), attempt=0, text=list(texts)))
        (tmp_path/run).mkdir()
        write_table(replies, tmp_path/run/'0.parquet')
    counts = T.save_texts(asker, tmp_path/'replies.parquet', 'vote-1')
    assert counts == dict(replies=6, unparsed=4, retried=0, rows_without_answer=1)

def test_a_trained_run_answers(both):
    run = held('', both[1], samples=2, retries=1)
    assert 0 < run.record['metrics']['replies'] <= 8*4 and 'predicted_minutes' not in run.record
    p, _ = tables(run)
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-5)

def test_several_gpus_share_the_texts(both, parts_here, monkeypatch):
    "each process asks for its own rows; the votes, replies and counts are those of one"
    def answer(row, turn): return 'AAB'[turn % 3]
    engine = planted(monkeypatch, answer)
    alone, asked = held(*both, retries=0), len(engine.asked)
    engine = planted(monkeypatch, answer)
    engine.version = '2'  # else it takes over the replies of the vote before
    run = held(*both, retries=0, gpus=2, budget=60)
    for a, b in zip(tables(run), tables(alone)): np.testing.assert_allclose(a, b, atol=2e-5)
    assert len(engine.asked) == asked == 24 and run.record['stopped'] == ''
    for count in 'replies', 'unparsed', 'retried': assert run.record['metrics'][count] == alone.record['metrics'][count]
    assert set(read_table(run.folder/'replies.parquet').id) == set(load_rows('few_test').id)

def test_batches_of_texts_are_made_to_fit(both, monkeypatch):
    rows, text = load_rows('few_test'), both[1]
    wide = T.plan_texts([text], rows, 100.)
    assert wide['batch_tokens'] == 16384
    limit = wide['texts_gb']*.7
    tight = T.plan_texts([text], rows, limit)
    assert 448 <= tight['batch_tokens'] < 16384 and tight['texts_gb'] <= limit+1e-6
    with pytest.raises(Refusal, match=f'{text}.*max_memory_gb is 0.001'): T.plan_texts([text], rows, 1e-3)
    engine = planted(monkeypatch, lambda row, turn: 'A')
    run = held(*both, retries=0, samples=1, max_memory_gb=limit)
    assert engine.how['batch_tokens'] == tight['batch_tokens'] and engine.how['limit_gb'] == limit
    memory = run.record['memory']
    assert memory['batch_tokens'] == tight['batch_tokens'] and max(memory['planned_gb'], memory['texts_gb']) <= limit

REFUSED = [(dict(rule='logits'), 'logits.*answer by text'), (dict(rule='ranks'), 'ranks'),
           (dict(samples=0), 'samples'), (dict(retries=-1), 'retries')]
@pytest.mark.parametrize('wrong, why', REFUSED)
def test_what_texts_cannot_be_combined_with(both, wrong, why):
    with pytest.raises(Refusal, match=why): held(*both, **wrong)
