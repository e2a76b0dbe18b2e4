"Votes under a budget: the same numbers when there is time, and a valid submission whenever the process is killed"

import os, random, shutil, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, pandas as pd, pytest
from competition_kit.cascade import least_certain, rescore
from competition_kit.choose import simulated_voters
from competition_kit.clock import Clock
from competition_kit.combine import fit_weights
from competition_kit.core import Refusal, data_path, models_path, read_json, root_at
from competition_kit.probs import align, read_probs
from competition_kit.record import read_record, run_stage, start_run, write_record
from competition_kit.rows import tasks
from competition_kit.submission import check_submission, find_sample, make_submission
from competition_kit.tables import load_rows, write_rows
from competition_kit.vote import (
    VoteArgs,
    by_strength,
    limit_memory,
    plan_memory,
    run_staged,
    rows_to_predict,
    vote,
    voters,
    write_sample,
)


def held(**kw):
    return run_stage(vote, VoteArgs(**kw))


def votes_of(run):
    return align(read_probs(run.folder / 'votes.parquet'), load_rows('sample_arena_test'))


@pytest.mark.parametrize('rule', ['mean', 'logits', 'majority'])
def test_with_time_enough_the_budget_changes_nothing(runs, rule):
    plain, timed = held(rule=rule), held(rule=rule, budget=600)
    np.testing.assert_allclose(votes_of(timed), votes_of(plain), atol=2e-5)
    r = timed.record
    assert r['stopped'] == '' and r['missing']['no_model'] == 0 and r['runs_per_row'] == 5
    assert r['weights'] == plain.record['weights'] and r['sentence'] == plain.record['sentence']
    assert set(r['metrics']) == set(plain.record['metrics'])
    for metric in {'log_loss', 'accuracy', 'practice_log_loss', 'ties'} & set(r['metrics']):
        assert r['metrics'][metric] == pytest.approx(plain.record['metrics'][metric], abs=1e-4)


def test_the_exact_rule_of_a_majority_keeps_every_answer(runs):
    full, stopped = held(rule='majority', views=1), held(rule='majority', views=1, change=0.001)
    np.testing.assert_array_equal(votes_of(full).argmax(1), votes_of(stopped).argmax(1))
    assert stopped.record['runs_per_row'] <= 5


def test_a_share_is_rescored(runs):
    run = held(rescore=0.25, weights='1 3 1', views=1)  # the first asks for all, and weighs little
    table = read_probs(run.folder / 'votes.parquet')
    first, *others = table.attrs['meta']['voters']
    assert table[first].notna().all()
    assert [table[o].notna().sum() for o in others] == [len(table) // 4] * 2
    assert table.agreement.between(0, 1).all()


def test_the_share_is_chosen_from_the_budget_and_recorded(runs):
    r = held(runs=f'{runs[0]} {runs[2]}', weights='1 3', views=1, rescore=0, budget=60).record
    curve, asked = r['cascade']['curve'], len(load_rows('sample_arena_test')) - r['missing']['runs'][runs[2]]
    best = min(curve, key=lambda share: curve[share][r['cascade']['metric']])
    assert r['share'] == float(best)
    assert asked == round(r['share'] * r['missing']['rows'])
    assert 0 < r['predicted_minutes'] < 1 and r['stopped'] == ''


def test_a_cascade_killed_before_its_record_ends_in_the_next_attempt(runs, monkeypatch):
    "all rows are answered, so no model is loaded when the share is chosen again"
    import competition_kit.vote as V

    how = dict(runs=f'{runs[0]} {runs[2]}', weights='1 3', rescore=0)
    monkeypatch.setattr(V, 'cascade_plan', lambda *a: dict(share=1.0, predicted_minutes=1, metric='', curve=EMPTY))
    with monkeypatch.context() as m:
        m.setattr(V, 'finish_staged', lambda *a, **kw: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            held(**how)
    monkeypatch.undo()
    r = held(**how).record
    assert r['status'] == 'done' and len(r['attempts']) == 2


EMPTY = pd.DataFrame(dict(minutes=[1.0]), [1.0])


@pytest.mark.parametrize('rule', ['mean', 'logits'])
def test_a_voter_that_is_fitted_away_is_not_asked(rule):
    for seed in range(4):
        p, label = simulated_voters([1.5, 1.4, 0, 0.1, 0.2], 400, 0.3, seed=seed)
        w = fit_weights(p, label, rule)
        assert (w[:2] > 0.2).all() and (w[2:] == 0).all()


def test_files_alone_are_a_cascade(own_root, samples):
    from competition_kit.probs import write_probs

    test = load_rows('sample_arena_test')
    p = np.random.default_rng(0).dirichlet([1] * 3, (2, len(test)))
    for k in 0, 1:
        write_probs(own_root / f'{k}.parquet', test, p[k], 'preference', seen=False)
    how = dict(runs='0.parquet 1.parquet')
    np.testing.assert_allclose(votes_of(held(**how, rescore=0)), p.mean(0), atol=1e-5)  # without scores: all fit
    want = rescore(p[0], p[1][rows := least_certain(p[0], 0.25)], rows)
    np.testing.assert_allclose(votes_of(few := held(**how, rescore=0.25)), want, atol=1e-5)
    submitted = pd.read_csv(few.folder / 'submission.csv')
    columns = submitted[[f'winner_{o}' for o in tasks['preference'].options]]
    np.testing.assert_allclose(columns, want, atol=1e-5)
    assert read_json(few.folder / 'missing.json') == few.record['missing']


def test_a_restarted_cascade_may_take_more_rows_of_a_file(own_root, samples, monkeypatch):
    "another pace, another share: what the first attempt left out of the file is read again"
    import competition_kit.vote as V
    from competition_kit.probs import write_probs

    test = load_rows('sample_arena_test')
    p = np.random.default_rng(0).dirichlet([1] * 3, (2, len(test)))
    for k in 0, 1:
        write_probs(own_root / f'{k}.parquet', test, p[k], 'preference', seen=False)
    how = dict(runs='0.parquet 1.parquet', rescore=0)
    for share in 0.25, 0.5:
        plan = dict(share=share, predicted_minutes=1, metric='')
        monkeypatch.setattr(V, 'cascade_plan', lambda *a, plan=plan: plan | dict(curve=EMPTY))
        if share == 0.25:
            with monkeypatch.context() as m, pytest.raises(ZeroDivisionError):
                m.setattr(V, 'finish_staged', lambda *a, **kw: 1 / 0)
                held(**how)
    want = rescore(p[0], p[1][rows := least_certain(p[0], 0.5)], rows)
    np.testing.assert_allclose(votes_of(held(**how)), want, atol=1e-5)


def test_a_first_run_without_weight_begins_no_cascade(runs):
    with pytest.raises(Refusal, match='has weight 0'):
        held(runs=f'{runs[0]} {runs[2]}', weights='0 1', rescore=0.1)


@pytest.mark.parametrize('budget', [0, 60])
def test_nan_of_a_model_is_no_answer(runs, monkeypatch, budget):
    import competition_kit.model as model

    real = model.view_probs

    def overflows(classifier, enc, *args, **kw):
        p = real(classifier, enc, *args, **kw)
        p[enc.row == 7] = np.nan
        return p

    monkeypatch.setattr(model, 'view_probs', overflows)
    if budget:
        r = held(runs=runs[0], budget=budget).record
        assert 'its probabilities are NaN' in r['stopped'] and r['missing']['no_model'] > 0
    else:
        with pytest.raises(Refusal, match=r'its probabilities are NaN. Rows \(1\)'):
            held(runs=f'{runs[0]} {runs[2]}', rescore=0.9)


def test_a_budget_has_a_forecast(runs, capsys):
    r = held(budget=60, views=1).record
    assert 0 < r['predicted_minutes'] < 2
    assert 'The whole vote needs about' in capsys.readouterr().out


def test_a_file_of_probabilities_votes_under_a_budget(runs, own_root):
    from competition_kit.probs import write_probs

    test = load_rows('sample_arena_test')
    p = np.random.default_rng(0).dirichlet([1] * 3, len(test))
    write_probs(own_root / 'other/p.parquet', test, p, 'preference', seen=False, run='elsewhere')
    both = f'{runs[4]} other/p.parquet'
    np.testing.assert_allclose(votes_of(held(runs=both, budget=600)), votes_of(held(runs=both)), atol=2e-5)


def test_questions_vote_under_a_budget(own_root, tiny):
    from competition_kit.train import train_fold

    train_fold(mix='sample_logic', fold=0, base=tiny, max_len=256, epochs=0.1, lora_r=2, dtype='fp32')
    rows = load_rows('sample_logic_test')
    plain, timed = (read_probs(held(data='sample_logic', budget=b).folder / 'votes.parquet') for b in (0, 60))
    np.testing.assert_allclose(align(timed, rows), align(plain, rows), atol=2e-5)


class SlowClock(Clock):
    "A clock on which each look takes three seconds"

    def __init__(self, minutes):
        self.t = 0.0
        super().__init__(minutes, now=self.tick)

    def tick(self):
        self.t += 3
        return self.t


def test_a_vote_that_runs_out_of_time_says_so(runs):
    args = VoteArgs(budget=2, pack_tokens=512)
    ballot = voters()
    rows, sample = rows_to_predict(ballot, args.data), find_sample(args.data)
    with start_run('vote', dict(of='a test'), {}) as run:
        run_staged(run, args, ballot, rows, sample, SlowClock(2))
    r = run.record
    assert r['status'] == 'done' and r['stopped'] == 'the time is up'
    assert 'The vote stopped early (the time is up)' in r['sentence']
    assert check_submission(run.folder / 'submission.csv', sample, 'preference', rows)
    assert read_json(run.folder / 'missing.json')['runs'] == r['missing']['runs']
    assert sum(r['missing']['runs'].values()) > 0


def test_an_engine_that_dies_under_a_budget_costs_no_submission(runs, monkeypatch):
    import competition_kit.model as model

    real, calls = model.view_probs, []

    def dies(*args, **kw):
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError('CUDA error: device lost')
        return real(*args, **kw)

    monkeypatch.setattr(model, 'view_probs', dies)
    r = held(budget=60).record
    assert r['status'] == 'done' and 'device lost' in r['stopped']
    assert check_submission(models_path(r['run_id'], 'submission.csv'), find_sample('sample_arena'), 'preference')


SLOW_VOTE = '''
import time
import competition_kit.model as model
from competition_kit.record import run_stage
from competition_kit.vote import VoteArgs, vote
real = model.view_probs
def slow(*args, **kw):
    time.sleep(.2)
    return real(*args, **kw)
model.view_probs = slow
run_stage(vote, VoteArgs(budget=60, pack_tokens=512))
'''

VOTE = '''
from competition_kit.record import run_stage
from competition_kit.vote import VoteArgs, vote
run_stage(vote, VoteArgs(budget=3, pack_tokens=512))
'''


def killed(code, seconds):
    "Run code in a process and kill it so long after its submission lies there; its submission, valid and complete"
    env = dict(os.environ, CK_ROOT=str(models_path().parent))
    p = subprocess.Popen([sys.executable, '-c', code], env=env, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not (found := list(models_path().glob('vote-*/submission.csv'))) and time.monotonic() < end:
        assert p.poll() is None
        time.sleep(0.05)
    try:
        p.wait(seconds)
    except subprocess.TimeoutExpired:
        p.send_signal(signal.SIGKILL)
    assert p.wait() in (0, -signal.SIGKILL)
    assert check_submission(found[0], find_sample('sample_arena'), 'preference', load_rows('sample_arena_test'))
    return found[0]


def test_killed_at_a_random_second_a_valid_submission_lies_there(runs, own_root):
    seconds, missing = random.Random(os.getpid()), []
    for most in 0, 3, 3:
        path = killed(SLOW_VOTE, seconds.uniform(0, most))
        missing.append(read_json(path.with_name('missing.json'))['no_model'])
        if missing[-1] == len(load_rows('sample_arena_test')):  # killed before the first pass
            assert len(pd.read_csv(path).drop(columns='id').drop_duplicates()) == 1  # the class prior
    assert missing == sorted(missing, reverse=True)  # each attempt goes on where the one before was killed
    run = held(budget=60, pack_tokens=512)
    assert run.id == path.parent.name and run.done and run.record['stopped'] == ''
    np.testing.assert_allclose(votes_of(run), votes_of(held()), atol=2e-5)


@pytest.mark.skipif('CK_SLOW' not in os.environ, reason='takes ten minutes: set CK_SLOW')
def test_ten_kills_under_a_budget_of_three_minutes(samples, own_root, smollm2):
    "SmolLM2 on the sample; a vote that ends before its kill is followed by a new one"
    from competition_kit.train import train_fold

    for fold in (0, 1):
        train_fold(mix='sample_arena:40', fold=fold, base=smollm2, lora_r=4, epochs=0.5)
    seconds, finished = random.Random(os.getpid()), 0
    for _ in range(10):
        path = killed(VOTE, seconds.uniform(0, 60))
        record = path.with_name('record.json')
        if record.is_file() and read_json(record)['status'] == 'done':
            assert read_json(record)['vote_minutes'] < 3
            finished += 1
            shutil.rmtree(path.parent)
    print(f'{finished} votes ended, {10 - finished} were killed')


@pytest.mark.parametrize(
    'bad, why',
    [
        (dict(budget=-1), 'budget'),
        (dict(change=1), 'change'),
        (dict(rescore=-0.1), 'rescore'),
        (dict(rescore=0.5, change=0.1), 'both choose'),
        (dict(rule='ranks', budget=5), 'every voter'),
    ],
)
def test_bad_arguments(bad, why):
    with pytest.raises(Refusal, match=why):
        VoteArgs(**bad)


# ---- direct prediction: a finished model and a test file, nothing else
@pytest.mark.parametrize('budget', [0, 60])
def test_a_model_folder_and_a_test_file_are_enough(runs, own_root, tmp_path_factory, budget):
    expected = votes_of(held(runs=runs[0]))
    ids = list(load_rows('sample_arena_test').id)
    elsewhere = tmp_path_factory.mktemp('input')
    shutil.copytree(models_path(runs[0]), elsewhere / runs[0])
    shutil.copy(own_root / 'data/sample_arena/test.csv', elsewhere / 'test.csv')
    with root_at(tmp_path_factory.mktemp('offline')):
        kw = dict(data='lmsys', runs=str(elsewhere / runs[0]), test=str(elsewhere / 'test.csv'), budget=budget)
        run = held(**kw)
        assert 'no score' in run.record['sentence']
        assert run.record['members'] == [runs[0]]
        got = pd.read_csv(run.folder / 'submission.csv', dtype={'id': str}).set_index('id').loc[ids]
        np.testing.assert_allclose(got.to_numpy(), expected, atol=2e-5)
        assert held(**kw).id == run.id
        assert not data_path().exists(), 'a sample made there would give the next vote a score, and another id'


def test_a_training_table_beside_a_test_file_is_part_of_the_name(runs, own_root):
    "its labels make the score, fitted weights and the class prior"
    rows, args = load_rows('sample_arena'), VoteArgs(runs=runs[0], test='data/sample_arena/test.csv')
    before = args.inputs()
    write_rows(rows.assign(label=(rows.label + 1) % 3), data_path('sample_arena.parquet'))
    assert args.inputs() != before
    data_path('sample_arena.parquet').unlink()
    assert set(args.inputs()) == set(before) - {'sample_arena'}


def test_whole_models_predict_without_their_base(runs, own_root, tmp_path_factory, monkeypatch):
    "two seeds merged into their base, and quantised; neither the base nor the members are there"
    from competition_kit import trained
    from competition_kit.gptq import GptqArgs, gptq
    from competition_kit.merge import merge_runs

    merged = merge_runs(members=f'{runs[0]} {runs[2]}', how='base')
    small = run_stage(gptq, GptqArgs(start=merged.id, rows=24, max_loss=9.0, max_flips=1.0))
    expected = {run.id: votes_of(held(runs=run.id, views=1)) for run in (merged, small)}
    elsewhere, ids = tmp_path_factory.mktemp('input'), list(load_rows('sample_arena_test').id)
    for run in merged, small:
        shutil.copytree(run.folder, elsewhere / run.id)
    shutil.copy(own_root / 'data/sample_arena/test.csv', elsewhere / 'test.csv')
    monkeypatch.setattr(trained, '_is_here', lambda base: False)
    with root_at(tmp_path_factory.mktemp('offline')):
        for run, p in expected.items():
            got = held(data='lmsys', runs=str(elsewhere / run), test=str(elsewhere / 'test.csv'), views=1)
            table = pd.read_csv(got.folder / 'submission.csv', dtype={'id': str}).set_index('id').loc[ids]
            np.testing.assert_allclose(table.to_numpy(), p, atol=2e-5)


@pytest.mark.parametrize('here', ['repeated', 'under way', 'without a record', 'the same'])
def test_a_folder_does_not_become_the_run_of_that_id_here(runs, tmp_path_factory, here):
    folder, own = tmp_path_factory.mktemp('input') / runs[0], models_path(runs[0], 'record.json')
    shutil.copytree(models_path(runs[0]), folder)
    rec = read_record(own)
    other = {'repeated': rec | dict(outputs={'probs.parquet': '0'}), 'the same': rec | dict(minutes=9.)}
    if here == 'without a record': own.unlink()
    else: write_record(own, other.get(here, {k: v for k, v in rec.items() if k != 'outputs'}))
    if here == 'the same':
        assert list(voters(runs=str(folder)).run) == [runs[0]]
        return
    with pytest.raises(Refusal, match=f'models/{runs[0]} has other results.*Move'):
        voters(runs=str(folder))


def test_two_votes_may_link_a_folder_at_once(runs, tmp_path_factory, monkeypatch):
    folder, real = tmp_path_factory.mktemp('input') / runs[0], Path.symlink_to
    shutil.move(models_path(runs[0]), folder)

    def twice(self, target):
        real(self, target)
        real(self, target)

    monkeypatch.setattr(Path, 'symlink_to', twice)
    assert list(voters(runs=str(folder)).run) == [runs[0]]


def test_a_folder_without_a_record_is_refused(own_root):
    (own_root / 'merged').mkdir()
    with pytest.raises(Refusal, match='without record.json'):
        voters(runs='./merged')


def test_a_sample_is_written_for_questions(own_root):
    rows = pd.DataFrame(dict(id=['a-0', 'a-1', 'b-0'], options=[['x', 'y']] * 3))
    rows.attrs['meta'] = dict(task='choice')
    path = write_sample(rows, own_root)
    p = np.tile([0.2, 0.8, 0, 0, 0, 0, 0], (3, 1))
    assert '2 problems with 3 answers' in make_submission(p, rows, 'choice', path, own_root / 'submission.jsonl')


# ---- memory
def test_packs_are_made_to_fit_and_a_model_that_cannot_is_refused(runs, monkeypatch):
    ballot, rows = voters(runs=runs[0]), load_rows('sample_arena_test')
    wide = plan_memory(ballot, rows, 2, 4096, 100)
    assert wide['pack_tokens'] == 4096
    limit = wide['planned_gb'] * 0.7
    tight = plan_memory(ballot, rows, 2, 4096, limit)
    assert 160 <= tight['pack_tokens'] < 4096
    assert tight['planned_gb'] <= limit + 5e-4
    with pytest.raises(Refusal, match='max_memory_gb is 0.0001'):
        plan_memory(ballot, rows, 2, 4096, 1e-4)
    import competition_kit.vote as V

    limits = []
    monkeypatch.setattr(V, 'limit_memory', limits.append)
    run = held(runs=runs[0], max_memory_gb=limit)
    assert run.record['memory'] == tight
    np.testing.assert_allclose(votes_of(run), votes_of(held(runs=runs[0])), atol=2e-5)
    assert limits == [limit, 0], 'the second vote in this process has no limit'


def test_a_limit_of_the_gpu_is_lifted(monkeypatch):
    import torch

    shares, begun = [], [True]
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_initialized', begun.pop)
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda: (0, 80e9))
    monkeypatch.setattr(torch.cuda, 'set_per_process_memory_fraction', shares.append)
    for limit in 16, 0, 100: limit_memory(limit)
    assert shares == [0.2, 1, 1]
    begun.append(False)
    limit_memory(0)  # a driver that uses no GPU starts none
    assert len(shares) == 3


def test_voters_of_one_weight_are_asked_base_after_base(runs):
    "the score head stands between the two seeds by its log-loss, and would cost two more loads of a base"
    ballot = voters()
    first, second, head = dict.fromkeys(ballot.voter)
    label = pd.DataFrame(dict(label=[0] * 9))
    oof = {v: np.tile([p, 1 - p, 0], (9, 1)) for v, p in ((first, 0.9), (second, 0.5), (head, 0.7))}
    score = dict(weights=[1, 1, 1], oof=oof, rows=label)
    assert list(dict.fromkeys(by_strength(ballot, score)[0].voter)) == [first, second, head]
    score['weights'] = [1, 1, 2]
    assert list(dict.fromkeys(by_strength(ballot, score)[0].voter)) == [head, first, second]
    score['weights'] = [1, 1, 0]  # nobody over the head's base is left
    assert list(dict.fromkeys(by_strength(ballot, score)[0].voter)) == [first, second]
