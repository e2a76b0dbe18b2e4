"A run's life: ids, seals, outputs, failures, kills, and the workbook at the end of every run"
import multiprocessing, os, shutil, signal, subprocess, sys, time
from dataclasses import make_dataclass
from python_calamine import CalamineWorkbook
import pytest
from competition_kit import record
from competition_kit.core import Refusal, models_path, read_json, write_json
from competition_kit.record import check_outputs, find_run, from_notebook, records, run_id, start_run

fork = multiprocessing.get_context('fork')

def run(fold=0):
    with start_run('train', dict(fold=fold), {}, fold) as r:
        if not r.done: r.finish(dict(log_loss=.9, accuracy=.5))
    return r.id

@pytest.mark.parametrize('given, kind', [(dict(rslora='false'), 'True or False'), (dict(rslora=0), 'True or False'),
    (dict(fold=2.), 'a whole number'), (dict(fold=True), 'a whole number'), (dict(lr='1e-3x'), 'a number'),
    (dict(lr=None), 'a number')])
def test_a_parameter_of_another_kind_is_refused(given, kind):
    "as papermill hands them on: `-p rslora false` is a text, and a text is true"
    Args = make_dataclass('Args', [('rslora', bool, False), ('fold', int, 0), ('lr', float, 1e-3), ('most', int, None)])
    usual = dict(rslora=True, fold=2, lr=1, most=None)
    assert from_notebook(Args, usual) == Args(**usual)
    with pytest.raises(Refusal, match=f'Write {kind}'): from_notebook(Args, usual | given)

def test_a_parameter_that_papermill_knows_nothing_of_is_refused():
    "`papermill -p flod 2` trained fold 0"
    Args = make_dataclass('Args', [('fold', int, 0), ('note', str, '')])
    cells = ['', 'fold: int = 0', '# Parameters\nfold = 2\nnote = "a\\nflod = 1"\n']
    names = dict(fold=2, note='a', In=cells)
    assert from_notebook(Args, names) == Args(2, 'a')
    with pytest.raises(Refusal, match='unknown parameters: flod. It takes fold, note'):
        from_notebook(Args, names | dict(In=[*cells, '# Parameters\nflod = 2\nfold = 2\n']))

def test_only_finite_numbers(root):
    with pytest.raises(Refusal, match='params.lr'): start_run('train', dict(lr=float('inf')), {})
    with pytest.raises(Refusal, match='metrics.baselines.prior.ece'):
        with start_run('train', {}, {}) as r: r.finish(dict(log_loss=1., baselines=dict(prior=dict(ece=float('nan')))))
    assert find_run('train')['status'] == 'failed'
    with pytest.raises(Refusal, match='not the name of a stage'): run_id('../x', {}, {})

FINISH = '''
from competition_kit.record import start_run
with start_run('train', {}, {}) as r: r.finish(dict(log_loss=.5))
print(r.id)
'''
def test_every_run_ends_in_the_workbook(root):
    "a process that imports nothing but `record` updates the workbook too"
    p = subprocess.run([sys.executable, '-c', FINISH], env=os.environ | dict(CK_ROOT=str(root)), capture_output=True,
                       text=True, check=True)
    rows = CalamineWorkbook.from_path(str(root/'experiments_log.xlsx')).get_sheet_by_name('runs').to_python()
    assert rows[1][0] == p.stdout.strip()

def test_done_returns_at_once(root, capsys):
    id = run(3)
    before = {p: p.read_bytes() for p in root.rglob('*') if p.is_file()}
    with start_run('train', dict(fold=3), {}, 3) as r: assert r.done
    assert {p: p.read_bytes() for p in root.rglob('*') if p.is_file()} == before
    with pytest.raises(Refusal, match='finished'): r.finish({})
    assert find_run(id)['metrics'] == dict(log_loss=.9, accuracy=.5)
    printed = capsys.readouterr().out
    assert printed.startswith(f'{id} is done already, nothing was run (it took 0.0 minutes, until 20')
    assert 'changed since' not in printed

def with_output():
    with start_run('train', dict(fold=3), {}, 3) as r:
        if not r.done:
            (r.folder/'w').write_bytes(b'weights')
            r.finish(dict(log_loss=.5), ['w'])
    return r

def test_a_done_run_is_checked_and_can_be_repeated(root, monkeypatch):
    r = with_output()
    (r.folder/'w').write_bytes(b'weighty')
    with pytest.raises(Refusal, match='w is not the file that the run wrote.*--again'): with_output()
    (r.folder/'w').unlink()
    with pytest.raises(Refusal, match='w is missing'): check_outputs(r.record)
    monkeypatch.setenv('CK_AGAIN', '1')
    assert with_output().done
    assert (r.folder/'w').read_bytes() == b'weights'
    assert len(list((root/'models/.old').glob(f'{r.id}-*'))) == 1
    assert [o['run_id'] for o in records()] == [r.id]

@pytest.mark.parametrize('old, new', [('"log_loss": 0.9', '"log_loss": 0.1'), ('"fold": 3', '"fold": 1'),
    ('"status": "done"', '"status": "dond"'), ('"seal": "', '"seal": "0'), ('"device"', '"devise"')])
def test_a_changed_record_is_refused(root, old, new):
    f = root/'models'/run(3)/'record.json'
    assert old in f.read_text()
    f.write_text(f.read_text().replace(old, new))
    with pytest.raises(Refusal, match='not as its run wrote it'): find_run(f.parent.name)
    with pytest.raises(Refusal, match='not as its run wrote it'): run(3)
    with pytest.warns(UserWarning, match='not as its run wrote it'): assert records() == []

def test_a_record_in_another_folder_is_refused(root):
    id = run(3)
    shutil.copytree(root/'models'/id, root/'models'/f'{id[:-1]}x')
    with pytest.raises(Refusal, match='of that name'): find_run(f'{id[:-1]}x')

def test_changed_modules_are_named(root, monkeypatch, capsys):
    run(3)
    capsys.readouterr()
    today = record.module_hashes()
    monkeypatch.setattr(record, 'module_hashes', lambda: today | dict(core='0'*10))
    run(3)
    assert 'changed since: core; `ck run --again` repeats it' in capsys.readouterr().out

def test_files_of_killed_processes_are_swept(root):
    old, new = root/'models/.people.json.ab12cd34.tmp', root/'models/.x.zz12cd34.tmp'
    sample, git, tokens = root/'data/.sample_arena.ab12_d34', root/'data/.git', root/'models/.tokens/.tmpx'
    for p in (sample, git, tokens): p.mkdir(parents=True)
    for p in (old, new): p.write_text('')
    for p in (sample, git, tokens, old): os.utime(p, (0, 0))
    run(3)
    assert [p.exists() for p in (new, git)] == [True, True]
    assert [p.exists() for p in (old, sample, tokens)] == [False]*3

@pytest.mark.parametrize('error, text', [(KeyboardInterrupt(), 'interrupted'), (ValueError('x'*5000), 'x'*2000),
                                         (SystemExit(0), 'SystemExit: 0')])
def test_an_error_is_recorded_and_raised(root, error, text):
    with pytest.raises(type(error)):
        with start_run('train', {}, {}) as r: raise error
    assert (r.record['status'], r.record['error']) == ('failed', text)

def test_a_failed_run_continues(root, monkeypatch):
    monkeypatch.setenv('CK_RUN_FILE', str(root/'made'))
    with start_run('train', {}, {}) as r: pass
    assert find_run(r.id)['error'] == 'ended without a result'
    with start_run('train', {}, {}) as r: r.finish({})
    assert 'error' not in find_run(r.id)
    assert len(find_run(r.id)['attempts']) == 2
    assert (root/'made').read_text().split() == [r.id]*2

def test_outputs_are_summed(root):
    with start_run('train', {}, {}) as r:
        (r.folder/'adapter').mkdir()
        (r.folder/'adapter/w').write_bytes(b'w')
        (r.folder/'p').write_bytes(b'')
        r.finish({}, outputs=['adapter', 'p'])
    assert set(r.record['outputs']) == {'adapter/w', 'p'}
    assert all(len(h) == 64 for h in r.record['outputs'].values())

def _hold(ready):
    with start_run('train', dict(a=1), {}):
        ready.set()
        time.sleep(60)

def test_a_second_process_is_refused_and_a_killed_run_continues(root):
    ready = fork.Event()
    p = fork.Process(target=_hold, args=(ready,))
    p.start()
    ready.wait(20)
    with pytest.raises(Refusal, match=f'process {p.pid} '): start_run('train', dict(a=1), {})
    assert find_run('train')['status'] == 'running'
    os.kill(p.pid, signal.SIGKILL)
    p.join()
    assert find_run('train')['status'] == 'interrupted'
    left = models_path(find_run('train')['run_id'], '.record.json.abc.tmp')
    left.touch()
    with start_run('train', dict(a=1), {}) as r: r.finish(dict(log_loss=1))
    assert len(r.record['attempts']) == 2
    assert not left.exists()

def test_broken_records_are_skipped(root):
    run()
    broken = dict(a='{"run_id"', b='[]', c='{"run_id": "c", "params": 3}', d='{"run_id": "other"}', e='\xff')
    for name, text in broken.items():
        models_path(name).mkdir()
        models_path(name, 'record.json').write_text(text, encoding='latin-1')
    with pytest.warns(UserWarning, match='skipped'): assert len(records()) == 1

def test_a_run_reads_no_other_record(root, monkeypatch):
    for i in range(50): write_json(models_path(f'train-{i}', 'record.json'), {})
    read = []
    monkeypatch.setattr(record, 'after_run', {})
    monkeypatch.setattr(record, 'read_json', lambda p: read.append(p) or read_json(p))
    run()
    assert read == []

def test_two_and_two_point_zero_are_one_run(root):
    "papermill and a parameters cell give `epochs=2`, `ck run` gives `2.0`"
    from dataclasses import dataclass
    from competition_kit.record import run_stage
    @dataclass(frozen=True)
    class CountArgs:
        epochs:float=1.
        rows:int=1
        def inputs(self): return {}
    def count(run, args): run.finish(dict(rows=args.rows))
    first, second = (run_stage(count, CountArgs(epochs=n, rows=3)) for n in (2, 2.))
    assert first.id == second.id and first.record['params'] == dict(epochs=2., rows=3)
    assert type(first.record['params']['rows']) is int

def test_the_kits_own_notebooks_have_a_hash_in_every_project(root):
    "a recipe of another project must see that the code of a stage has changed"
    from competition_kit.record import code_hash
    kits = code_hash('02_split')
    assert kits and code_hash('02_split.ipynb') == kits and code_hash('') is code_hash('99_none') is None
    write_json(root/'nbs/02_split.ipynb', dict(cells=[dict(cell_type='code', source=['x'], metadata={})]))
    assert code_hash('02_split') not in (None, kits), "the project's own notebook comes first"
