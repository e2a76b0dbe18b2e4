"Run every test there is, two tasks at a time; the last line counts them."
import hashlib, multiprocessing, os, re, shutil, subprocess, sys, tempfile, time, traceback
from dataclasses import astuple, dataclass
from multiprocessing.connection import wait
from pathlib import Path

root = Path(__file__).resolve().parents[1]
tools = Path(sys.executable).parent
slow_imports = ['matplotlib.pyplot', 'nbdev.test', 'pandas', 'peft', 'sklearn.linear_model', 'torch', 'transformers']

@dataclass
class Result:
    "A line of the report"
    what: str
    seconds: float
    passed: int
    failed: int
    output: str  # Printed where something failed

def single(what, ok, seconds=0., output=''):
    "The result of a step that counts as one test"
    return Result(what, seconds, int(ok), int(not ok), output)

def show(r):
    print(f"{'FAILED' if r.failed else 'ok    '} {r.seconds:6.1f} s  {r.what}", flush=True)
    if r.failed: print(r.output[-6000:], flush=True)

# ---- one step
def step(what, *command, cwd=root):
    "Run a command"
    start = time.time()
    p = subprocess.run([str(c) for c in command], cwd=cwd, text=True, stdout=subprocess.PIPE,
                       stderr=subprocess.STDOUT, errors='replace')
    return single(what, p.returncode == 0, time.time()-start, p.stdout)

def in_process(what, work):
    "Call `work` with everything that it prints in a file; it returns whether it passed. The last act of a process"
    start, ok = time.time(), False
    with tempfile.TemporaryFile() as out:
        for fd in (1, 2): os.dup2(out.fileno(), fd)
        try: ok = bool(work())
        except BaseException: traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        out.seek(0)
        return single(what, ok, time.time()-start, out.read().decode(errors='replace'))

# ---- tasks: functions that return results
def tree():
    "File → hash, of notebooks and package"
    files = [p for d in ('nbs', 'competition_kit') for p in sorted((root/d).rglob('*'))]
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files if p.suffix in ('.ipynb', '.py')}

def source_checks():
    "What must hold before anything is imported: the package is that of the notebooks"
    before = tree()
    yield step('nbdev_clean', 'nbdev_clean')
    yield step('nbdev_export', 'nbdev_export')
    changed = [k for k, v in tree().items() if before.get(k) != v]
    yield single('notebooks and package agree', not changed, output=f'clean and export changed {changed}')
    yield step('ruff F', 'ruff', 'check', '--select', 'F', 'competition_kit', 'tests', 'bench', '.ci', 'setup.py')
    yield step('ruff E501, E731', 'ruff', 'check', '--select', 'E501,E731', 'nbs', 'tests', 'bench', '.ci')
    yield step('the embedded base', sys.executable, '-c', 'from competition_kit.base import base_path; base_path()')

def site():
    yield step('the site', sys.executable, '.ci/docs.py')
    yield step('links of the site', sys.executable, '.ci/links.py')
    yield step('README is of the index', sys.executable, '.ci/readme.py', '--check')

def notebook(path):
    "A notebook as `nbdev_test` runs it"
    from nbdev.config import get_config
    from nbdev.test import test_nb
    flags = get_config().tst_flags.split()
    yield in_process(f'nbdev_test {path.name}', lambda: test_nb(path, skip_flags=flags, basepath=root)[0])

def tests(path, *only):
    "A file of tests, or some of it; its counts are pytest's own"
    import pytest
    how = ['-q', '-p', 'no:cacheprovider', '--durations=5', *(['-x'] if '--fast' in sys.argv else []), *only]
    what = ' '.join(['pytest', path.name, *only])
    r = in_process(what, lambda: pytest.main([*how, str(path)]) in (0, 5))  # 5: all deselected
    found = re.findall(r'(\d+) (passed|skipped|failed|error)', r.output.rstrip().rpartition('\n')[2])
    counts = {k: int(n) for n, k in found}
    r.passed = counts.get('passed', 0)
    if r.failed: r.failed = max(1, counts.get('failed', 0)+counts.get('error', 0))
    r.what += ''.join(f', {n} {k}' for k, n in counts.items())
    yield r

def command_line():
    """The commands of the README in a project of their own, from the root and from nbs/. papermill executes every cell
    of 04_train, so this notebook needs no other test; its run is done already"""
    home = Path(tempfile.mkdtemp())
    shutil.copytree(os.environ['CK_BASES'], home/'models/bases')  # as a user has them
    os.environ.update(CK_BASES='', CK_ROOT=str(home))
    tiny = ['-p', 'mix', 'sample_arena:40', '-p', 'lora_r', '4', '-p', 'max_len', '192', '-p', 'epochs', '0.25']
    yield step('ck run 02_split', 'ck', 'run', 'nbs/02_split.ipynb')
    yield step('ck run 04_train', 'ck', 'run', 'nbs/04_train.ipynb', *tiny)
    yield step('ck run 10_vote', 'ck', 'run', 'nbs/10_vote.ipynb')
    again = step('ck run 04_train from nbs/', 'ck', 'run', '04_train.ipynb', *tiny, cwd=root/'nbs')
    yield again
    done = 'is done already' in again.output
    yield single('the run that the root made is done already from nbs/', done, output=again.output)
    yield step('papermill 04_train, as the README has it', 'papermill', 'nbs/04_train.ipynb', home/'04_train.ipynb',
               '-p', 'fold', 0, *tiny)
    found = list(home.glob('models/vote-*/submission.csv'))
    sample = home/'data/sample_arena/sample_submission.csv'
    yield step('ck check of the submission', 'ck', 'check', found[0] if found else 'no submission', sample)
    yield step('ck log', 'ck', 'log')

# ---- two at a time
def work_in(folder, results, task, *args):
    "In a process of its own: send the results of a task, and None at its end; its temporary files lie in `folder`"
    os.environ['TMPDIR'] = tempfile.tempdir = str(folder)
    for r in task(*args): results.send(astuple(r))  # a notebook may have replaced `__main__`, where `Result` is from
    results.send(None)

def two_at_a_time(tasks, temporary):
    """The results of all tasks as they come. Each task gets a fresh process, forked from one that has imported the
    slow libraries once for all of them."""
    context, running, waiting = multiprocessing.get_context('forkserver'), {}, list(enumerate(tasks))
    context.set_forkserver_preload(slow_imports)
    while waiting or running:
        while waiting and len(running) < 2:
            k, task = waiting.pop(0)
            (temporary/str(k)).mkdir()
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=work_in, args=(temporary/str(k), sender, *task))
            process.start()
            sender.close()
            running[receiver] = process, task
        for receiver in wait(list(running)):
            process, task = running[receiver]
            try:
                if result := receiver.recv():
                    yield Result(*result)
                    continue
            except EOFError:
                process.join()
                why = f'its process ended early, with {process.exitcode}'
                yield single(f'{task[0].__name__} {task[1:]}', False, output=why)
            del running[receiver]
            process.join()

def all_tasks():
    "The long ones first: the commands, the site, the tests by the size of their file, the notebooks"
    files = sorted((root/'tests').glob('test_*.py'), key=lambda p: -p.stat().st_size)
    books = sorted(p for p in (root/'nbs').rglob('*.ipynb') if p.name != '04_train.ipynb')  # papermill executes it
    package = tests, root/'tests/test_bundle.py', '-m', 'offline', '-k', 'none'  # where that can be
    return [(command_line,), (site,), package, *((tests, p) for p in files), *((notebook, p) for p in books)]

def main():
    os.chdir(root)
    os.environ.update(OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE', TOKENIZERS_PARALLELISM='false',
                      HF_HUB_OFFLINE='1', MPLBACKEND='agg', PATH=f'{tools}:{os.environ["PATH"]}')
    os.environ['CK_BASES'] = os.environ.get('CK_BASES') or str(root/'models/bases')
    workbook = (root/'experiments_log.xlsx').read_bytes()
    results = []
    def add(r):
        show(r)
        results.append(r)
    for r in source_checks(): add(r)
    with tempfile.TemporaryDirectory() as folder:
        for r in two_at_a_time(all_tasks(), Path(folder)): add(r)
    untouched = (root/'experiments_log.xlsx').read_bytes() == workbook
    add(single('the committed workbook is untouched', untouched))
    summary(results)
    sys.exit(any(r.failed for r in results))

def summary(results):
    "The slowest tests and steps, what failed, and the counts"
    timed = [found for r in results for found in re.findall(r'^ *([\d.]+)s (?:call|setup) +(.+)', r.output, re.M)]
    for seconds, test in sorted(timed, key=lambda t: -float(t[0]))[:10]: print(f'{float(seconds):13.1f} s  {test}')
    slowest = sorted(results, key=lambda r: -r.seconds)[:5]
    print('slowest:', ', '.join(f'{r.what} {r.seconds:.0f} s' for r in slowest))
    for r in results:
        if r.failed: print('failed:', r.what)
    print(f'{sum(r.passed for r in results)} passed, {sum(r.failed for r in results)} failed')

if __name__ == '__main__': main()
