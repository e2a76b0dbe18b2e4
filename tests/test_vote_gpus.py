"Votes in several processes: the same numbers, and what a process that dies or stalls costs"

import os, time
from functools import partial
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
import competition_kit.engine as E
import competition_kit.parallel as P
from competition_kit.choose import simulated_voters
from competition_kit.clock import Clock
from competition_kit.core import Refusal
from competition_kit.parallel import parallel_vote, row_parts
from competition_kit.probs import align, read_probs
from competition_kit.record import run_stage
from competition_kit.submission import check_submission, find_sample
from competition_kit.tables import load_rows
from competition_kit.vote import VoteArgs, vote

N = 40
ASKER = '''
import os, signal, time
import numpy as np
from competition_kit.choose import simulated_voters
from competition_kit.core import Refusal
from competition_kit.staged import no_answers

class Asker:
    "Two simulated voters; the process that has row 0 does what `fate` says at its second voter"
    def __init__(self, rows, clock, fate, folder='.'):
        self.rows, self.clock, self.fate, self.run = rows, clock, fate, 0
        self.p = simulated_voters([1.5, 1.5], 40)[0][:, rows.id.astype(int)]
        self.answers, self.sizes = no_answers([0, 1], len(rows), 3), np.ones(len(rows))
        self.families = np.arange(len(rows))
    def __enter__(self): return self
    def __exit__(self, *error): pass
    def load(self, run): self.run = run
    def load_seconds(self, run): return 0.
    def keeps(self, run): return False
    def added(self, tokens, rows): return tokens
    def ask_views(self, run, at, views):
        if run and 0 in set(self.rows.id):
            if self.fate == 'dies': os.kill(os.getpid(), signal.SIGKILL)
            if self.fate == 'stalls': time.sleep(600)
            if self.fate == 'refuses': raise Refusal('an adapter is damaged')
            if self.fate == 'raises': raise RuntimeError('CUDA error: device lost')
        return len(views)*self.p[run, at]
'''


@pytest.fixture
def asker(tmp_path, monkeypatch):
    "A function that makes simulated askers of a fate; the processes can import it"
    (tmp_path / 'simulated_asker.py').write_text(ASKER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(tmp_path), str(Path(P.__file__).parents[1])]))
    monkeypatch.delitem(__import__('sys').modules, 'simulated_asker', raising=False)
    return __import__('simulated_asker').Asker


def voted(asker, fate, minutes, folder):
    "(the driver's asker, why it stopped, how often it saved)"
    saves, make = [], partial(asker, fate=fate)
    rows = pd.DataFrame(dict(id=np.arange(N)))
    rows.attrs['meta'] = {}
    driver = make(rows=rows, clock=Clock(minutes))
    how = dict(weights=[1, 1], prior=np.full((N, 3), 1 / 3), views=1)
    return driver, saves, lambda: parallel_vote(driver, make, how, 2, folder, lambda: saves.append(1))


@pytest.mark.parametrize('n', [1, 3, 4])
def test_parts_hold_every_row_once_and_about_as_many_tokens(n):
    sizes, problem = np.random.default_rng(n).integers(1, 1000, 301), np.arange(301) // 5
    parts = row_parts(sizes, problem, n)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(301))
    tokens = [sizes[part].sum() for part in parts]
    assert max(tokens) - min(tokens) <= 2 * sizes.max()
    assert sum(len(set(problem[part])) for part in parts) <= len(set(problem)) + n - 1, 'problems are cut'


def test_two_processes_vote_like_one(runs):
    def votes(**how):
        run = run_stage(vote, VoteArgs(runs=' '.join(runs[:2]), **how))
        return align(read_probs(run.folder / 'votes.parquet'), load_rows('sample_arena_test')), run

    (alone, _), (both, run) = votes(), votes(gpus=2)
    np.testing.assert_allclose(both, alone, atol=2e-5)
    assert run.record['stopped'] == '' and run.record['missing']['no_model'] == 0
    assert check_submission(run.folder / 'submission.csv', find_sample('sample_arena'), 'preference')


class StandIn:
    "A vLLM engine by transformers and peft; `made`: the GPU, the limit of memory and the adapters of each"

    made, shared, version, dies = [], [], 'stand-in', False

    def __init__(self, base, adapters=(), dtype='auto', max_len=0, limit_gb=0.0, **how):
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        def model():
            return AutoModelForCausalLM.from_pretrained(base)

        self.models = [model(), *(PeftModel.from_pretrained(model(), a) for a in adapters)]
        self.n_adapters = len(adapters)
        self.gpu = os.environ.get('CUDA_VISIBLE_DEVICES', '')
        self.made.append((self.gpu, limit_gb, len(adapters)))
        self.shared.append(how['tensor_parallel'])

    def letters(self, ids, letters, adapter=0, fresh=False):
        slots = np.broadcast_to(adapter, len(ids))
        if self.dies and self.gpu in ('', '0') and not np.ptp(slots):  # the gate asks for several adapters
            raise E.EngineDied('the vLLM engine died (exit code -9); its log ends with\nfour\nlines')
        with torch.no_grad():
            logits = [self.models[k].eval()(torch.tensor(i)[None].long()).logits[0, -1] for i, k in zip(ids, slots)]
        return torch.stack(logits).log_softmax(-1)[:, list(letters)].numpy()

    def close(self):
        pass


@pytest.fixture
def vllm(monkeypatch, parts_here):
    "vLLM seems to be installed"
    StandIn.made.clear()
    StandIn.shared.clear()
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    monkeypatch.setattr(E, 'Engine', StandIn)
    monkeypatch.setattr(E, 'vllm_version', lambda: '1.2.3')


@pytest.mark.parametrize('engine', ['vllm', 'auto'])
def test_each_process_has_an_engine_on_its_own_gpu(runs, vllm, monkeypatch, engine):
    "the gate is passed on every GPU, the memory is limited, and the votes are those of packs"
    monkeypatch.setattr(E, '_least_seconds', 0.0)
    monkeypatch.setattr(E, 'faster', lambda packs, vllm, start: ('vllm', 'vLLM is faster'))
    named = ' '.join(runs[:2])
    alone = run_stage(vote, VoteArgs(runs=named))
    run = run_stage(vote, VoteArgs(runs=named, engine=engine, gpus=2, max_memory_gb=8.0))
    rows = load_rows('sample_arena_test')
    want, got = (align(read_probs(r.folder / 'votes.parquet'), rows) for r in (alone, run))
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert StandIn.made == [('0', 8.0, 2), ('1', 8.0, 2)]
    facts = run.record['engine']
    assert set(facts) == {'process 0', 'process 1'} and run.record['memory']['limit_gb'] == 8
    for process in facts.values():
        assert process[named]['engine'] == 'vllm stand-in' and set(process[named]['parity']) == set(runs[:2])
    assert run.record['missing']['no_model'] == 0 and 'CUDA_VISIBLE_DEVICES' not in os.environ


@pytest.mark.parametrize('how, gpus', [(dict(gpus=2), ['0,1', '2,3']), (dict(budget=60), ['']), (dict(), [''])])
def test_gpus_share_a_model(runs, vllm, how, gpus):
    "each process takes its own GPUs, and vLLM all that it sees; the votes are those of packs"
    alone = run_stage(vote, VoteArgs(runs=runs[0]))
    run = run_stage(vote, VoteArgs(runs=runs[0], engine='vllm', tensor_parallel=2, **how))
    rows = load_rows('sample_arena_test')
    want, got = (align(read_probs(r.folder / 'votes.parquet'), rows) for r in (alone, run))
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert [gpu for gpu, *_ in StandIn.made] == gpus and set(StandIn.shared) == {2}


def test_a_model_too_large_for_the_comparison_is_refused(runs, vllm, monkeypatch):
    def full(*args, **how):
        raise torch.OutOfMemoryError('CUDA out of memory')

    monkeypatch.setattr(E.RunAsker, 'load', full)
    with pytest.raises(Refusal, match='does not fit on one GPU.*09_gptq'):
        run_stage(vote, VoteArgs(runs=runs[0], engine='vllm', tensor_parallel=2))


@pytest.mark.parametrize('gpus', [1, 2])
def test_an_engine_that_dies_costs_the_rows_of_its_gpu(runs, vllm, monkeypatch, gpus):
    "under a budget the vote is finished and says why; without one it is refused"
    monkeypatch.setattr(StandIn, 'dies', True)
    how = dict(runs=' '.join(runs[:2]), engine='vllm', gpus=gpus)
    r = run_stage(vote, VoteArgs(budget=60, **how)).record
    assert r['status'] == 'done' and r['stopped'] == 'RuntimeError: the vLLM engine died (exit code -9)'
    assert r['missing']['no_model'] == len(load_rows('sample_arena_test')) // gpus
    with pytest.raises(Refusal, match='engine died'):
        run_stage(vote, VoteArgs(**how))


@pytest.mark.parametrize('fate, why', [('dies', 'process [01] ended with -9'), ('raises', 'device lost')])
def test_a_process_that_dies_costs_its_own_rows(asker, tmp_path, fate, why):
    driver, saves, work = voted(asker, fate, 60, tmp_path / 'parts')
    began = time.monotonic()
    assert __import__('re').search(why, work())
    assert time.monotonic() - began < 60 and len(saves) >= 2
    seen = driver.answers.views
    assert seen[0].all() and seen[1].sum() == N / 2 and seen[1, 0] == 0  # the other process has done its part
    again, _, work = voted(asker, '', 60, tmp_path / 'parts')
    again.answers.total[:], again.answers.views[:] = driver.answers.total, driver.answers.views
    assert work() == ''
    np.testing.assert_allclose(again.answers.total, simulated_voters([1.5, 1.5], N)[0], atol=1e-6)
    assert (again.answers.views == 1).all()


def test_a_process_that_stalls_is_ended_in_time(asker, tmp_path):
    driver, _, work = voted(asker, 'stalls', 0.25, tmp_path / 'parts')
    why = work()
    assert 'did not end in time' in why and driver.clock.used() < 20
    assert driver.answers.views[0].all()


def test_without_a_budget_a_dead_process_is_an_error_and_its_answers_stay(asker, tmp_path):
    driver, _, work = voted(asker, 'dies', 0, tmp_path / 'parts')
    with pytest.raises(RuntimeError, match='ended with -9'):
        work()
    assert driver.answers.views[0].all()
    _, _, work = voted(asker, 'refuses', 60, tmp_path / 'parts')
    with pytest.raises(Refusal, match='an adapter is damaged'):
        work()


def test_bad_numbers_of_gpus():
    shared = dict(tensor_parallel=2)
    for bad in dict(gpus=0), dict(gpus=2, rule='ranks'), dict(gpus=2, rescore=0), shared, shared | dict(engine='auto'):
        with pytest.raises(Refusal):
            VoteArgs(**bad)


def test_a_part_ends_when_the_vote_does(asker, tmp_path, monkeypatch):
    "a part that was written 20 seconds before its process looks at the clock has 10 of its 30 seconds left"
    driver, _, _ = voted(asker, 'lives', 0, tmp_path)
    part = P.Part(partial(asker, fate='lives'), driver.rows, driver.answers,
                  dict(weights=[1, 1], prior=np.full((N, 3), 1 / 3), views=1), time.monotonic() + 30 - 20, 0, 4096)
    (tmp_path / '0.part').write_bytes(P.pickle.dumps(part))
    clocks = []
    monkeypatch.setattr(P, 'Clock', lambda minutes, safety: clocks.append(Clock(minutes, safety=safety)) or clocks[0])
    P.answer_part(tmp_path / '0.part')
    assert 9 < 60 * clocks[0].minutes <= 10


def test_packs_take_over_from_an_engine_that_dies(runs, vllm, monkeypatch, tmp_path):
    "the run that it had answered stays its, the other is predicted by packs, and the gate's figures stay in the record"
    monkeypatch.setattr(E, '_least_seconds', 0.0)
    monkeypatch.setattr(E, 'faster', lambda packs, vllm, start: ('vllm', 'vLLM is faster'))
    rows, two, folder, ask = load_rows('sample_arena_test'), runs[:2], tmp_path / 'v', E.EngineAsker._ask_server
    folder.mkdir()

    def ask_server(self, run, at, view):
        if run == two[1]: raise E.EngineDied('the vLLM engine died (exit code -9)')
        monkeypatch.setattr(E.RunAsker, 'ask', None)  # from here on packs predict by `predict_runs` alone
        return ask(self, run, at, view)

    monkeypatch.setattr(E.EngineAsker, '_ask_server', ask_server)
    got = E.ask_engine(two, rows, folder, engine='auto', progress=False, tensor_parallel=1)
    want = E.predict_runs(two, rows, tmp_path / 'packs', progress=False)
    for r in two: np.testing.assert_allclose(np.stack(got[r].p), np.stack(want[r].p), atol=1e-4)
    assert [got[r].attrs['meta'].get('engine') for r in two] == ['vllm 1.2.3', None]
    facts = E.engine_facts(folder)[' '.join(two)]
    assert facts['engine'] == 'packs' and 'died' in facts['why'] and set(facts['parity']) == set(two)


def test_what_the_gate_measured_before_a_restart_stays(runs, vllm, tmp_path):
    E.write_json(tmp_path / 'engine.json', {'of another base': dict(engine='vllm 1.2.3', parity={})})
    E.ask_engine(runs[:1], load_rows('sample_arena_test'), tmp_path, engine='vllm', progress=False, tensor_parallel=1)
    assert set(E.engine_facts(tmp_path)) == {'of another base', runs[0]}


def test_a_limit_below_the_cuda_contexts_is_refused(monkeypatch):
    monkeypatch.setattr(E, 'vllm_version', lambda: '1.2.3')
    monkeypatch.setattr(E, '_has_gpu', lambda: True)
    with pytest.raises(Refusal, match='more than 1.5 GB.*Raise max_memory_gb'): E.ServedModel('smollm2', limit_gb=1.5)


def test_predictions_of_parts_are_kept_and_joined(runs, tmp_path, monkeypatch):
    "a process that fails is an error that names its log; the next call predicts only what is missing"
    rows, run = load_rows('sample_arena_test'), runs[0]
    want = P.predict_runs([run], rows, tmp_path / 'one')[run]
    start, begun = P._start, []

    def fails(path, gpu):
        begun.append(path.name)
        if begun == ['0.part', '1.part']: path.write_bytes(b'damaged')
        return start(path, gpu)

    monkeypatch.setattr(P, '_start', fails)
    with pytest.raises(RuntimeError, match='process 1 ended with 1'):
        P.predict_parallel([run], rows, tmp_path / 'two', gpus=2)
    first = tmp_path / f'two/parts-2/0/{run}.parquet'
    P.predict_runs([run], P.pickle.loads((tmp_path / 'two/parts-2/0.part').read_bytes()).rows, first.parent)
    written = first.stat().st_mtime_ns
    got = P.predict_parallel([run], rows, tmp_path / 'two', gpus=2)[run]
    assert first.stat().st_mtime_ns == written, 'a part that was finished is not predicted again'
    assert list(got.id) == list(rows.id) and got.attrs['meta']['made_of'] == want.attrs['meta']['made_of']
    np.testing.assert_allclose(np.stack(got.p), np.stack(want.p), atol=1e-5)
