"Running notebooks headless: parameters, ends of every kind, signals, kills, GPUs. Needs Linux's /proc for the kills."
import json, os, signal, subprocess, sys, tempfile, threading, time
from pathlib import Path
import nbformat, pytest
from competition_kit.core import Refusal, root_at
from competition_kit.run import _running, check_params, find_notebook, gpu_ids, lease_gpus, run_notebook, sweep

CK = [sys.executable, '-m', 'competition_kit.ck']
START = 'from competition_kit.record import start_run\n'

def notebook(path, *cells, params='fold: int = 0  # Fold that is held out'):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in (params, *cells)])
    nb.cells[0].metadata.tags = ['parameters']
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, path)
    return Path(path)

def record(root, id): return json.loads((root/'models'/id/'record.json').read_text())

# ---- parameters
TYPED = '''i: int = 1
f: float = 0.5
s: str = 'a'
b: bool = False
l: list[str] = []
d: dict = {}
t: tuple = (1, 2)
o: int | None = None
u: "float | str" = 1.
bare = 3
nothing = None'''

@pytest.mark.parametrize('name,given,want', [
    ('i', '7', 7), ('i', '-7', -7), ('i', 7, 7), ('f', '2', 2.), ('f', '1e-4', 1e-4), ('f', 3, 3.),
    ('s', '007', '007'), ('s', 'None', 'None'), ('s', 'no', 'no'), ('s', '', ''), ('s', Path('a b'), 'a b'),
    ('b', 'true', True), ('b', 'False', False), ('b', True, True),
    ('l', '["a", "b"]', ['a', 'b']), ('l', "['a']", ['a']), ('d', '{"a": null}', {'a': None}), ('t', '(1, 2)', (1, 2)),
    ('o', 'None', None), ('o', '4', 4), ('o', None, None), ('u', 'x', 'x'), ('u', '2', 2.), ('bare', '4', 4),
    ('nothing', 'text', 'text'), ('nothing', '5', 5), ('nothing', 'None', None)])
def test_types(tmp_path, name, given, want):
    got = check_params(notebook(tmp_path/'n.ipynb', params=TYPED), {name: given})[name]
    assert got == want
    assert type(got) is type(want)

@pytest.mark.parametrize('name,given', [
    ('i', '2.5'), ('i', 'two'), ('i', ''), ('i', True), ('i', 2.), ('i', None),
    ('f', 'high'), ('f', 'nan'), ('f', 'inf'), ('f', float('nan')), ('f', True), ('s', 3), ('s', None),
    ('b', '1'), ('b', 'yes'), ('b', 1), ('l', 'a,b'), ('l', '{}'), ('l', '['*500), ('d', '[]'), ('o', 'x'),
    ('bare', '4.5')])
def test_wrong_types(tmp_path, name, given):
    nb = notebook(tmp_path/'n.ipynb', params=TYPED)
    with pytest.raises(Refusal, match=f"parameter '{name}'"): check_params(nb, {name: given})

def test_unknown_name_is_refused_with_the_nearest_and_the_list(tmp_path):
    nb = notebook(tmp_path/'n.ipynb')
    message = r"unknown parameter 'foldd', did you mean 'fold'\?(.|\n)*Fold that is held out"
    with pytest.raises(Refusal, match=message): check_params(nb, dict(foldd='2'))
    with pytest.raises(Refusal, match="unknown parameter 'zzz'"): check_params(nb, dict(zzz=1))

CELL = '{"cell_type": "code", "metadata": {}, "source": "x", "outputs": [], "execution_count": null}'
TAGGED = CELL.replace('"metadata": {}', '"metadata": {"tags": ["parameters"]}')
@pytest.mark.parametrize('text,word', [
    ('', 'valid JSON'), ('[]', 'not a notebook'), ('null', 'not a notebook'), ('{}', 'not a notebook'),
    ('{"cells": []}', 'not a notebook'), ('{"worksheets": [{"cells": []}], "nbformat": 3}', 'not a notebook'),
    ('{"cells": {"a": 1}}', 'not a notebook'), ('{"cells": [1]}', r'cell 0 \(from 0\)'),
    ('{"cells": [%s, {"cell_type": "code"}]}' % CELL, r'cell 1 \(from 0\)'),
    ('{"cells": [{"cell_type": "code", "metadata": {}, "source": 3}]}', 'cell 0'),
    ('{"cells": [%s], "metadata": {"kernelspec": {"language": "R"}}}' % CELL, 'notebook for r'),
    ('{"cells": [%s, %s]}' % (TAGGED, TAGGED), '2 cells have the tag parameters')])
def test_files_that_are_no_notebooks(root, text, word):
    (root/'odd.ipynb').write_text(text)
    with pytest.raises(Refusal, match=word): run_notebook(root/'odd.ipynb')

def test_tags_may_be_null(tmp_path):
    nb = json.loads(notebook(tmp_path/'n.ipynb').read_text())
    nb['cells'].append(dict(json.loads(CELL), metadata=dict(tags=None)))
    (tmp_path/'n.ipynb').write_text(json.dumps(nb))
    assert check_params(tmp_path/'n.ipynb', dict(fold='2')) == dict(fold=2)

def test_names_mean_the_same_from_everywhere(tmp_path, monkeypatch):
    home = tmp_path/'pro ject'
    want = notebook(home/'nbs/77_demo.ipynb')
    with root_at(home):
        for cwd, names in {home: ['77_demo', 'nbs/77_demo.ipynb', 'demo', str(want)],
                           home/'nbs': ['77_demo.ipynb', 'nbs/77_demo.ipynb', '77_demo'],
                           tmp_path: ['77_demo', 'nbs/77_demo', 'demo']}.items():
            monkeypatch.chdir(cwd)
            for name in names: assert find_notebook(name) == want
        for bad in ('77_dem', '../../etc/passwd', 'no\0such', 'x'*300, '', '*'):
            with pytest.raises(Refusal): find_notebook(bad)

# ---- ends
def test_everything_arrives_as_it_was_given(root, tmp_path):
    text = '"; import os; os.system("touch PWNED"); "$(touch PWNED)`touch PWNED`\\\n\u2028\'\'\' {x} é😀'
    show = 'import json, os\nprint(json.dumps([note, i, os.environ["CUDA_VISIBLE_DEVICES"]]))'
    nb = notebook(tmp_path/'a {b} & c/note book.ipynb', show, params='note: str = ""\ni: int = 0')
    command = [*CK, 'run', str(nb), '-p', 'note', text, '-p', 'i', '-3', '--gpus', '1']
    env = dict(os.environ, CUDA_VISIBLE_DEVICES='6,7', TMPDIR=str(tmp_path))
    p = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert p.returncode == 0, p.stderr
    assert json.loads(next(o for o in p.stdout.splitlines() if o.startswith('["'))) == [text, -3, '6']
    assert not list(tmp_path.rglob('PWNED'))
    assert not list(tmp_path.glob('ck-*'))
    assert 'WARNING' not in p.stderr

def test_leaving_early_is_a_failure(root, tmp_path):
    r = run_notebook(notebook(tmp_path/'n.ipynb', 'import sys\nsys.exit(0)', 'fold'))
    assert r['code'] == 1
    assert 'before its last cell' in r['error']
    assert r['notebook'].exists()

def test_failing_cell(root, tmp_path, capsys):
    from competition_kit.ck import main
    nb = notebook(tmp_path/'n.ipynb', START+'with start_run("demo", dict(fold=fold), {}) as run: 1/0')
    assert main(['run', str(nb)]) == 1
    said = capsys.readouterr().err
    assert 'ZeroDivisionError: division by zero' in said
    assert 'notebook: models/demo-' in said
    folder, = (root/'models').glob('demo-*')
    assert record(root, folder.name)['status'] == 'failed'
    assert 'ZeroDivisionError' in (folder/'n.ipynb').read_text()
    assert not list((root/'models/.running').iterdir())

def test_a_kernel_that_dies_leaves_a_closed_record(root, tmp_path):
    nb = notebook(tmp_path/'n.ipynb', START+'import os\nwith start_run("demo", {}, {}) as run: os._exit(0)')
    r = run_notebook(nb)
    rec = record(root, r['run'])
    assert (r['code'], rec['status']) == (1, 'failed')
    assert 'DeadKernel' in rec['error']
    assert r['notebook'].parent.name == r['run']

def test_refusal_in_a_cell(root, tmp_path, capsys):
    from competition_kit.ck import main
    refuse = 'from competition_kit.core import Refusal\nraise Refusal("no such fold", "rows.parquet")'
    assert main(['run', str(notebook(tmp_path/'n.ipynb', refuse))]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith('rows.parquet: no such fold')
    assert 'Traceback' not in printed

def test_a_finished_run_keeps_its_notebook(root, tmp_path):
    work = '''with start_run("demo", dict(fold=fold), {}) as run:
    if not run.done:
        print("first")
        run.finish({})'''
    nb = notebook(tmp_path/'n.ipynb', START+work, 'print("x"*3_000_000)')
    a, b = run_notebook(nb), run_notebook(nb)
    assert a['code'] == b['code'] == 0
    assert a['notebook'] == b['notebook']
    assert a['notebook'].stat().st_size < 1_500_000
    text = a['notebook'].read_text()
    assert 'first' in text
    assert 'characters not kept' in text

# ---- kills
SLEEPER = ['''import os, subprocess, time
from pathlib import Path
p = subprocess.Popen(['sleep', '1000'], start_new_session=True)''', START+'''
with start_run('demo', dict(name=name), {}) as run:
    Path(where+'.tmp').write_text(f"{os.environ['CK_TOKEN']} {os.getpid()} {p.pid} {run.id}")
    os.rename(where+'.tmp', where)
    while True:
        try: time.sleep(1000)
        except KeyboardInterrupt:
            if name != 'deaf': raise''']

def carriers(token):
    found = []
    for f in Path('/proc').glob('[0-9]*/environ'):
        try: found += [f.parent.name] if f'CK_TOKEN={token}'.encode() in f.read_bytes() else []
        except OSError: pass
    return found

@pytest.fixture(scope='module')
def sleepers(tmp_path_factory): # All are started at once, which takes half the time
    tmp, born = tmp_path_factory.mktemp('kills'), time.time()
    nb = notebook(tmp/'n.ipynb', *SLEEPER, params='name: str = ""\nwhere: str = ""')
    env = dict(os.environ, CK_ROOT=str(tmp/'project'))
    (tmp/'project').mkdir()
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # children of a background job ignore it
    def start(name, where):
        command = [*CK, 'run', str(nb), '-p', 'name', name, '-p', 'where', str(tmp/where)]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                start_new_session=True)
    procs = {o: start(o, o) for o in ('term', 'int', 'deaf', 'ck', 'kernel', 'both', 'group')}
    end = time.time()+90
    while time.time() < end and not all((tmp/o).exists() for o in procs): time.sleep(.1)
    class S: pass
    s = S()
    s.root, s.procs, s.start = tmp/'project', procs, start
    s.facts = {o: (t[0], int(t[1]), int(t[2]), t[3]) for o in procs for t in [(tmp/o).read_text().split()]}
    temps = set(Path(tempfile.gettempdir()).glob('ck-*'))
    yield s
    signal.signal(signal.SIGINT, ignored)
    for p in procs.values():
        if p.poll() is None: p.kill()
    for f in s.facts.values(): sweep(f[0], 0)
    time.sleep(.3)
    assert not [o for o in temps if o.exists() and o.stat().st_mtime > born]

def all_gone(token, since, limit=5):
    while carriers(token) and time.monotonic() < since+limit: time.sleep(.05)
    assert carriers(token) == []

def test_second_starter_exits_75(sleepers):
    before = record(sleepers.root, sleepers.facts['term'][3])
    p = sleepers.start('term', 'second')
    out = p.communicate(timeout=60)[0]
    assert p.returncode == 75
    assert 'is being worked on by process' in out
    assert 'models/.running/' in out
    assert record(sleepers.root, sleepers.facts['term'][3]) == before
    assert sleepers.procs['term'].poll() is None

@pytest.mark.parametrize('name,sig,code', [('term', signal.SIGTERM, 143), ('int', signal.SIGINT, 130),
                                           ('deaf', signal.SIGTERM, 143)])
def test_signals(sleepers, name, sig, code):
    p, (token, _, _, id) = sleepers.procs[name], sleepers.facts[name]
    assert len(carriers(token)) >= 2
    start = time.monotonic()
    p.send_signal(sig)
    out = p.communicate(timeout=20)[0]
    assert time.monotonic()-start < 5, out
    assert p.returncode == code, out
    assert carriers(token) == []
    assert 'notebook: models/' in out
    rec = record(sleepers.root, id)
    assert rec['status'] == 'failed'
    assert 'interrupted' in rec['error'].lower()
    assert (sleepers.root/'models'/id/'n.ipynb').exists()

@pytest.mark.parametrize('name', ['ck', 'kernel', 'both', 'group'])
def test_kill_9_leaves_nothing(sleepers, name):
    p, (token, kernel, child, id) = sleepers.procs[name], sleepers.facts[name]
    assert str(child) in carriers(token)
    start = time.monotonic()
    if name in ('ck', 'both'): p.kill()
    if name in ('kernel', 'both'): os.kill(kernel, signal.SIGKILL)
    if name == 'group': os.killpg(p.pid, signal.SIGKILL)
    all_gone(token, start)
    p.wait(10)
    if name == 'kernel': assert p.returncode == 1 and record(sleepers.root, id)['status'] == 'failed'

def test_beginners_do_not_sweep_each_other(root):
    failed = []
    def begin(name):
        try:
            for k in range(50):
                with _running(f'{name}-{k}', '') as folder: assert (folder/'lock').exists()
        except Exception as e: failed.append(e)
    ts = [threading.Thread(target=begin, args=(i,)) for i in range(4)]
    for t in ts: t.start()
    for t in ts: t.join(60)
    assert not failed
    assert len(list((root/'models/.running').iterdir())) == 200

# ---- GPUs
@pytest.fixture
def locks(tmp_path, monkeypatch):
    monkeypatch.setattr('competition_kit.run._locks', tmp_path)

def test_lease(tmp_path, monkeypatch, locks):
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '0,3')
    got = []
    def third():
        with lease_gpus(1, poll=.05) as ids: got.extend(ids)
    with lease_gpus(1) as a:
        with lease_gpus(1) as b:
            assert (a, b) == (['0'], ['3'])
            t = threading.Thread(target=third)
            t.start()
            time.sleep(.3)
            assert got == []
        t.join(5)
        assert got == ['3']
    with pytest.raises(Refusal, match='3 GPUs are asked for and this process may use 2'), lease_gpus(3): pass
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
    with pytest.raises(Refusal), lease_gpus(1): pass
    with pytest.raises(Refusal, match='--gpus is -1'), lease_gpus(-1): pass
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '../x,GPU-1a')
    with lease_gpus(2) as ids: assert ids == ['../x', 'GPU-1a']
    assert {p.name for p in tmp_path.rglob('*.lock')} == {'gpu0.lock', 'gpu3.lock', 'gpu___x.lock', 'gpuGPU-1a.lock'}

def test_other_people_can_read_the_locks(tmp_path, monkeypatch, locks):
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '0')
    old = os.umask(0o077)
    try:
        with lease_gpus(1): assert (tmp_path/'gpu0.lock').stat().st_mode & 0o777 == 0o666
    finally: os.umask(old)

def test_two_pairs_do_not_wait_for_each_other(tmp_path, monkeypatch, locks):
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '0,1,2')
    done = []
    def pair(i):
        for _ in range(5):
            with lease_gpus(2, poll=.01): time.sleep(.005)
        done.append(i)
    ts = [threading.Thread(target=pair, args=(i,)) for i in range(4)]
    for t in ts: t.start()
    for t in ts: t.join(30)
    assert len(done) == 4

def test_a_killed_holder_gives_its_gpu_back(tmp_path, monkeypatch):
    "It has another TMPDIR, and holds the GPU all the same"
    gpu = f'test-{os.getpid()}'
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', gpu)
    code = 'from competition_kit.run import lease_gpus\nwith lease_gpus(1) as g: print(g, flush=True); input()'
    p = subprocess.Popen([sys.executable, '-c', code], env=dict(os.environ, TMPDIR=str(tmp_path)), text=True,
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert p.stdout.readline().strip() == f"['{gpu}']"
    assert gpu_ids() == [gpu]
    threading.Timer(.3, p.kill).start()
    start = time.monotonic()
    with lease_gpus(1, poll=.05) as ids:
        assert ids == [gpu]
        assert time.monotonic()-start > .2
    p.wait()
    Path(f'/tmp/competition_kit/gpu{gpu}.lock').unlink()

def test_one_gpu_by_number_and_by_uuid(tmp_path, monkeypatch, locks):
    def smi(query): return [['0', 'GPU-aa-1'], ['1', 'GPU-bb-2']] if query == 'gpu=index,uuid' else []
    monkeypatch.setattr('competition_kit.run.nvidia_smi', smi)
    got = []
    def take(name):
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', name)
        with lease_gpus(1, poll=.02) as ids: got.extend(ids)
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '0')
    with lease_gpus(1):
        for name in ('GPU-aa', '1'):
            t = threading.Thread(target=take, args=(name,))
            t.start()
            time.sleep(.2)
        assert got == ['1']
    for _ in range(100):
        if len(got) == 2: break
        time.sleep(.05)
    assert got == ['1', 'GPU-aa']

def test_busy_gpu_is_waited_for(tmp_path, monkeypatch, locks):
    fake = tmp_path/'nvidia-smi'
    fake.write_text(f'''#!/bin/sh
case "$1" in
  *gpu=index*) echo "0, GPU-aa"; echo "1, GPU-bb";;
  *) [ $(date +%s) -lt {int(time.time())+2} ] && echo "GPU-aa, 4242, python";; esac
exit 0''')
    fake.chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}:{os.environ["PATH"]}')
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    assert gpu_ids() == ['0', '1']
    start = time.monotonic()
    with lease_gpus(2) as ids: assert ids == ['0', '1'] and time.monotonic()-start > .5
