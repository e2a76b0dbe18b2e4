"The command: light, self-explanatory, refusing cleanly, repeating runs."
import json, os, re, shlex, subprocess, sys
from pathlib import Path
import nbformat, openpyxl, pytest
from competition_kit.ck import (_ancestors, _command, _pairs, _cost, _parser, doctor, log_plan, log_repro, log_table,
                                main, uncommitted)
from competition_kit.core import Refusal
from competition_kit.log import plan_runs, sync_log
from competition_kit.record import find_run, start_run, write_record

HEAVY = {'torch', 'transformers', 'pandas', 'numpy', 'papermill', 'openpyxl', 'nbformat', 'jupyter_client', 'pyarrow'}

HELP = 'import competition_kit.ck as k\ntry: k.main([{}"--help"])\nexcept SystemExit: pass'
@pytest.mark.parametrize('code', ['import competition_kit', HELP.format(''), HELP.format('"cost", '),
                                  'import competition_kit.ck as k\nassert k.main(["log"]) == 0'])
def test_light(root, code):
    command = [sys.executable, '-c', f'{code}\nimport sys; print("\\n"+" ".join(sys.modules))']
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert not HEAVY & {o.split('.')[0] for o in out.splitlines()[-1].split()}

@pytest.mark.parametrize('words', ['', 'run', 'log', 'log sync', 'log show', 'log plan', 'log repro', 'check', 'doctor',
                                   'cost'])
def test_help(words, capsys):
    with pytest.raises(SystemExit) as e: main([*words.split(), '--help'])
    printed = capsys.readouterr().out
    assert e.value.code == 0
    assert 'example' in printed
    assert f'ck {words}' in printed

@pytest.mark.parametrize('argv', [['nonsense'], ['run'], ['run', 'x', '-p', 'fold'], ['log', 'show'],
                                  ['run', 'x', '--gpus', 'two'], []])
def test_wrong_usage_is_2(argv):
    with pytest.raises(SystemExit) as e: main(argv)
    assert e.value.code == 2

@pytest.mark.parametrize('command, what', [('run no_such', 'no notebook'), ('run x -p a 1 -p a 2', 'given twice'),
    ('log show x', "no run 'x'"), ('log repro x', "no run 'x'")])
def test_refusals_are_one_message(root, capsys, command, what):
    assert main(command.split()) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith('ck: ')
    assert what in printed.err
    assert not printed.out

def test_as_a_process(root):
    ck = f'{shlex.quote(sys.executable)} -m competition_kit.ck'
    p = subprocess.run(f'{ck} log show x', shell=True, capture_output=True, text=True)
    assert p.returncode == 2
    assert p.stderr.startswith('ck: no run') and 'Traceback' not in p.stderr
    p = subprocess.run(f'{ck} doctor | head -1', shell=True, capture_output=True, text=True)
    assert p.stdout.startswith('python')
    assert not p.stderr

def test_values_with_dashes():
    rest, pairs = _pairs(['run', 'x', '-p', 'a', '--gpus', '-p', 'b', '-p'])
    assert rest == ['run', 'x']
    assert pairs == dict(a='--gpus', b='-p')

def test_command_is_read_back():
    params = dict(a='$(touch x); "\'', b=1e-4, c=None, d=True, e=['a', None], f='', g='-x')
    argv = shlex.split(_command('my nb', params))
    rest, got = _pairs(argv[1:])
    assert _parser().parse_args(rest).notebook == 'my nb'
    assert got == dict(a=params['a'], b='0.0001', c='None', d='true', e='["a", null]', f='', g='-x')

def test_doctor(root):
    text = doctor()
    lines = r'python +3\.', r'cpu +\d+ cores, .* GiB memory', r'disk .*GiB free', r'\[gpu\]', 'packages', 'git hooks'
    for line in lines:
        assert re.search(f'^{line}', text, re.M), line
    assert main(['doctor']) == 0

def test_empty_project(root, capsys):
    assert main(['log']) == 0 and 'No runs yet' in capsys.readouterr().out
    assert main(['log', 'plan']) == 0
    assert main(['log', 'sync']) == 0
    assert not (root/'models').exists() or not list((root/'models').glob('*/record.json'))

def test_a_folder_that_cannot_be_written_is_one_message(root, capsys):
    (root/'models').touch()
    assert main(['recipe', 'run', 'quickstart']) == 1
    assert re.fullmatch(r"ck: .*Not a directory: .*models.*\n", capsys.readouterr().err)

def test_table(root, capsys):
    baselines = dict(prior=dict(log_loss=1.1, accuracy=.3), longer=dict(accuracy=.5))
    with start_run('train', dict(fold=1), {}, fold=1) as run:
        run.finish(dict(log_loss=.9, accuracy=.6, baselines=baselines))
    with pytest.raises(RuntimeError), start_run('train', dict(fold=2), {}, fold=2): raise RuntimeError('out of luck')
    _, first, second = log_table().splitlines()
    assert '0.9000 (1.1000)' in first and '0.6000 (0.5000)' in first
    assert 'failed' in second
    assert main(['log', 'show', 'train-f2']) == 0
    assert 'out of luck' in capsys.readouterr().out

def test_check_is_thin(root, tmp_path, monkeypatch, capsys):
    import types
    fake = types.ModuleType('competition_kit.submission')
    def check_submission(path, sample):
        if path == 'bad.csv': raise Refusal('rows are missing', path, [7])
        return f'{path} is valid'
    fake.check_submission = check_submission
    monkeypatch.setitem(sys.modules, 'competition_kit.submission', fake)
    assert main(['check', 'good.csv', 'sample.csv']) == 0
    assert 'good.csv is valid' in capsys.readouterr().out
    assert main(['check', 'bad.csv', 'sample.csv']) == 2
    assert 'bad.csv: rows are missing. Rows (1): 7' in capsys.readouterr().err

# ---- runs that start kernels
CELLS = ['fold: int = 0\nlr: float = 1e-4\nnote: str = ""', '''import os
from competition_kit.core import atomic, data_path, models_path
from competition_kit.record import start_run
inputs = dict(rows=data_path("rows.txt").read_text(), teacher="teach-0123456789")
with start_run("demo", dict(lr=lr, note=note), inputs, fold=fold, notebook="90_demo.ipynb") as run:
    if not run.done:
        teacher = models_path("teach-0123456789/w.txt").read_text()
        (run.folder/"w.txt").write_text(note + teacher + os.environ.get("MOOD", ""))
        with atomic(data_path("more/table.txt")) as tmp: tmp.write_text(os.environ.get("MOOD", "none"))
        run.finish(dict(accuracy=.5), ["w.txt"])''']

@pytest.fixture
def project(root):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in CELLS])
    nb.cells[0].metadata.tags = ['parameters']
    for d in ('nbs', 'data', 'models/teach-0123456789'): (root/d).mkdir(parents=True)
    nbformat.write(nb, root/'nbs/90_demo.ipynb')
    (root/'data/rows.txt').write_text('1 2 3')
    (root/'models/teach-0123456789/w.txt').write_text('teacher')
    return root

def test_repro(project, capsys, monkeypatch):
    assert main(['run', 'demo', '-p', 'fold', '2', '-p', 'note', "it's $HOME"]) == 0
    id = next((project/'models').glob('demo-f2-*')).name
    capsys.readouterr()
    assert main(['log', 'repro', id[:9]]) == 0
    line = capsys.readouterr().out.splitlines()[0]
    rest, params = _pairs(shlex.split(line)[1:])
    assert rest == ['run', 'nbs/90_demo.ipynb'] and params == dict(fold='2', lr='0.0001', note="it's $HOME")
    before = {p: p.read_bytes() for p in (project/'models'/id).iterdir()}
    assert main(['log', 'repro', id, '--go']) == 0
    assert 'came out equal' in capsys.readouterr().out
    assert not (project/'models/.repro'/id).exists()
    monkeypatch.setenv('MOOD', 'grim')
    (project/'data/rows.txt').write_text('1 2 4')
    assert main(['log', 'repro', id, '--go']) == 1
    printed = capsys.readouterr().out
    assert 'w.txt: other content' in printed
    assert 'the inputs have changed' in printed
    assert before == {p: p.read_bytes() for p in (project/'models'/id).iterdir()}
    assert (project/'data/rows.txt').exists() and (project/'models/teach-0123456789/w.txt').exists()
    assert (project/'data/more/table.txt').read_text() == 'none'  # the repetition has published its own
    assert (project/'models/.repro'/id/'data/more/table.txt').read_text() == 'grim'

def test_a_repetition_keeps_its_folder_to_itself(project, capsys):
    "a second one of the same run is refused; a run that ends meanwhile deletes no folder in use, however old"
    from filelock import FileLock
    with start_run('demo', {}, {}, notebook='90_demo.ipynb') as run: run.finish({})
    copy = project/'models/.repro'/run.id
    copy.mkdir(parents=True)
    lock = copy.with_name(f'{run.id}.lock')
    with FileLock(lock):
        assert main(['log', 'repro', run.id, '--go']) == 2
        assert 'another process is repeating it' in capsys.readouterr().err
        for p in (copy, lock): os.utime(p, (0, 0))
        with start_run('demo', dict(lr=1), {}): assert copy.exists() and lock.exists()
    with start_run('demo', dict(lr=2), {}): assert not copy.exists() and not lock.exists()

WEIGH = ['of: str = ""\nfile: str = ""', '''from competition_kit.core import project_root
from competition_kit.log import people
from competition_kit.record import start_run
inputs = dict(weight=str(people(of)['vote_weight']), file=(project_root()/file).read_text())
with start_run("weigh", dict(of=of, file=file), inputs, notebook="91_weigh.ipynb") as run:
    if not run.done: run.finish({})''']

def test_repro_sees_what_people_wrote_and_files_of_the_root(project, capsys):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in WEIGH])
    nb.cells[0].metadata.tags = ['parameters']
    nbformat.write(nb, project/'nbs/91_weigh.ipynb')
    (project/'mine').mkdir()
    (project/'mine/test.csv').write_text('id')
    with start_run('demo', {}, {}) as first: first.finish({})
    book = openpyxl.load_workbook(project/'experiments_log.xlsx')
    at = {c.value: c.column for c in book['runs'][1]}
    book['runs'].cell(2, at['vote_weight'], .5)
    book.save(project/'experiments_log.xlsx')
    assert main(['run', 'weigh', '-p', 'of', first.id, '-p', 'file', 'mine/test.csv']) == 0
    run = find_run('weigh')
    assert run['inputs'] == dict(weight='0.5', file='id')
    before = (project/'experiments_log.xlsx').read_bytes()
    assert main(['log', 'repro', run['run_id'], '--go']) == 0
    assert 'came out equal' in capsys.readouterr().out
    assert (project/'experiments_log.xlsx').read_bytes() == before

def test_repro_borrows_the_runs_behind_its_inputs(project, capsys):
    with start_run('demo', dict(lr=1.), {}, fold=0) as first: first.finish({})
    with start_run('demo', dict(lr=2.), dict(start=first.id), fold=0) as second: second.finish({})
    rec = dict(run_id='x', params=dict(base=f'models/{second.id}/model'), inputs={})
    assert _ancestors(rec) == sorted([first.id, second.id])

def test_uncommitted_defaults_are_named(project, capsys):
    def git(*args):
        command = ['git', '-c', 'user.name=x', '-c', 'user.email=x', *args]
        subprocess.run(command, cwd=project, check=True, capture_output=True)
    assert uncommitted(project/'nbs/90_demo.ipynb') == []  # no git here
    git('init')
    assert uncommitted(project/'nbs/90_demo.ipynb') == []  # nothing committed
    git('add', 'nbs')
    git('commit', '-m', 'x')
    nb = project/'nbs/90_demo.ipynb'
    nb.write_text(nb.read_text().replace('1e-4', '0.25'))
    assert main(['run', 'demo', '-p', 'lr', '1']) == 0
    assert 'not given' not in capsys.readouterr().err
    assert main(['run', 'demo']) == 0
    assert 'not given: lr = 0.25 in this notebook, 0.0001 in the committed one' in capsys.readouterr().err

def test_repro_says_what_changed(project, capsys):
    with start_run('demo', dict(lr=1e-4, gone=3), {}, fold=0, notebook='90_demo.ipynb') as run: run.finish({})
    rec = find_run(run.id)
    rec['versions']['torch'], rec['code_hash'] = '1.0', 'beef'
    write_record(project/'models'/run.id/'record.json', rec)
    assert log_repro(run.id) == 0
    printed = capsys.readouterr().out
    assert 'not a parameter of the notebook today: gone = 3' in printed
    assert 'torch: 1.0 then' in printed
    assert 'code of the notebook: beef then' in printed

def test_plan(project, capsys):
    with start_run('train', {}, {}) as run: run.finish({})
    wb = openpyxl.load_workbook(project/'experiments_log.xlsx')
    ws = wb['runs']
    cols = {c.value: c.column for c in ws[1]}
    for row, cells in {5: dict(fold=1, params='note=a b'), 6: dict(params='flod=1')}.items():
        for c, v in dict(status='planned', stage='demo', **cells).items(): ws.cell(row, cols[c]).value = v
    wb.save(project/'experiments_log.xlsx')
    assert log_plan() == 0
    commands = ["ck run demo -p note 'a b' -p fold 1   # row 5", 'ck run demo -p flod 1   # row 6']
    assert capsys.readouterr().out.splitlines() == commands
    assert log_plan(go=True) == 2
    assert "unknown parameter 'flod'" in capsys.readouterr().err
    assert len(list((project/'models').glob('demo-f1-*/90_demo.ipynb'))) == 1
    assert 'CK_PLANNED_ROW' not in os.environ
    sync_log(wait=True)
    ws = openpyxl.load_workbook(project/'experiments_log.xlsx')['runs']
    assert ws.cell(5, cols['run_id']).value.startswith('demo-f1-')

def test_a_plan_that_its_notebook_refuses_is_not_planned_again(project, capsys):
    nb = nbformat.read(project/'nbs/90_demo.ipynb', 4)
    nb.cells[1].source = 'from competition_kit.core import Refusal\nraise Refusal("fold 7 does not exist")'
    nbformat.write(nb, project/'nbs/90_demo.ipynb')
    sync_log()
    plan_runs([dict(stage='demo', params=dict(fold=7))])
    assert main(['log', 'plan', '--go']) == 2
    assert 'refused: fold 7 does not exist' in capsys.readouterr().err
    assert main(['log', 'plan']) == 0 and 'No row' in capsys.readouterr().out

def test_cost_of_a_training(root, capsys):
    job = '--base Qwen/Qwen2.5-7B-Instruct --gpu H200 --rows 57477 --lengths lmsys --max-len 2048 --lora-r 64'
    assert main(['cost', *job.split()]) == 0
    printed = capsys.readouterr().out
    for text in ('7.62 B', 'none of 28', 'GPU-hours'): assert text in printed
    assert 'extrapolated' not in printed
    assert main('cost --base qwen2.5-72b --format nf4 --gpu T4'.split()) == 2
    assert 'such GPUs' in capsys.readouterr().err

def test_cost_passes_every_option_on():
    import inspect
    from competition_kit.cost import cost
    from competition_kit.reply_cost import generation_cost
    sub = next(a for a in _parser()._actions if hasattr(a, 'choices') and a.choices).choices['cost']
    assert {a.dest for a in sub._actions} - {'help'} == {
        *inspect.signature(cost).parameters, *inspect.signature(generation_cost).parameters} - {'compiled'}
    assert vars(_parser().parse_args(['cost'])) == dict(cmd='cost', do=_cost)

def test_a_stage_is_added_as_contributing_says(root, capsys):
    text = (Path(__file__).parents[1]/'CONTRIBUTING.md').read_text(encoding='utf-8')
    blocks = re.findall(r'```python\n(.*?)```', text, re.S)
    exported = '\n'.join(b for b in blocks if b.startswith('#| export'))
    ruff = [sys.executable, '-m', 'ruff', 'check', '--isolated', '--select', 'F', '-']
    checked = subprocess.run(ruff, input=exported, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(b) for b in blocks])
    for c in nb.cells:
        if c.source.startswith('data: str'): c.metadata.tags = ['parameters']
        if 'nbdev_export()' in c.source: c.metadata.tags = ['skip-execution']
    (root/'nbs').mkdir()
    nbformat.write(nb, root/'nbs/06_count.ipynb')
    assert main(['run', 'count', '-p', 'least', '2']) == 0
    folder, = (root/'models').glob('count-*')
    record = json.loads((folder/'record.json').read_text())
    assert record['notebook'] == '06_count.ipynb'
    assert record['metrics'] == dict(labels=3)
    assert (folder/'labels.txt').exists()
    assert main(['run', 'count', '-p', 'least', '2']) == 0
    assert 'is done already' in capsys.readouterr().out
    assert main(['run', 'count', '-p', 'least', '0']) == 2
    assert 'least=0. Take 1 or more' in capsys.readouterr().err
    assert main(['log']) == 0
    assert folder.name in capsys.readouterr().out
    sheet = openpyxl.load_workbook(root/'experiments_log.xlsx')['runs']
    assert folder.name in [row[0].value for row in sheet.iter_rows()]
