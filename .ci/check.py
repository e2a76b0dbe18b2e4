"Run every test there is, one step after the other; the last line counts them."
import hashlib, os, re, shutil, subprocess, sys, tempfile, time
from pathlib import Path

root = Path(__file__).resolve().parents[1]
tools = Path(sys.executable).parent
passed, failed, seconds = 0, [], {}

def report(what, ok, start, output=''):
    "Count a step and print its line; the output of a step that failed"
    global passed
    seconds[what] = time.time()-start
    print(f"{'ok    ' if ok else 'FAILED'} {seconds[what]:6.1f} s  {what}", flush=True)
    if ok:
        passed += 1
        return
    failed.append(what)
    print(output[-6000:], flush=True)

def step(what, *command, cwd=root):
    "Run a command; its output"
    start = time.time()
    p = subprocess.run([str(c) for c in command], cwd=cwd, text=True, stdout=subprocess.PIPE,
                       stderr=subprocess.STDOUT, errors='replace')
    report(what, p.returncode == 0, start, p.stdout)
    return p.stdout

def expect(what, ok, output=''): report(what, ok, time.time(), output)

def tree():
    "File → hash, of notebooks and package"
    files = [p for d in ('nbs', 'competition_kit') for p in sorted((root/d).rglob('*'))]
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files if p.suffix in ('.ipynb', '.py')}

def source_checks():
    before = tree()
    step('nbdev_clean', 'nbdev_clean')
    step('nbdev_export', 'nbdev_export')
    changed = [k for k, v in tree().items() if before.get(k) != v]
    expect('notebooks and package agree', not changed, f'clean and export changed {changed}')
    step('ruff F', 'ruff', 'check', '--select', 'F', 'competition_kit', 'tests', 'bench', '.ci', 'setup.py')
    step('ruff E501, E731', 'ruff', 'check', '--select', 'E501,E731', 'nbs', 'tests', 'bench', '.ci')
    step('the site', sys.executable, '.ci/docs.py')
    step('links of the site', sys.executable, '.ci/links.py')
    step('README is of the index', sys.executable, '.ci/readme.py', '--check')
    step('the embedded base', sys.executable, '-c', 'from competition_kit.base import base_path; base_path()')

def notebook_tests(paths):
    "Each notebook in a fork of this process, which has imported the slow libraries once for all of them"
    import matplotlib.pyplot, pandas, peft, sklearn.linear_model, torch, transformers  # noqa: F401
    from nbdev.config import get_config
    from nbdev.test import test_nb
    flags = get_config().tst_flags.split()
    for path in paths:
        start = time.time()
        with tempfile.TemporaryFile() as out:
            pid = os.fork()
            if not pid: run_and_exit(lambda: test_nb(path, skip_flags=flags, basepath=root)[0], out.fileno())
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            out.seek(0)
            report(f'nbdev_test {path.name}', code == 0, start, out.read().decode(errors='replace'))

def run_and_exit(work, out):
    "In a fork: do the work with its output in a file, and end with 0 if it is true"
    os.dup2(out, 1)
    os.dup2(out, 2)
    code = 1
    try: code = 0 if work() else 1
    finally:
        import atexit
        atexit._run_exitfuncs()  # temporary folders of the notebook
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

def pytest():
    "All of tests/; its own counts join ours"
    global passed
    how = '-x' if '--fast' in sys.argv else '--durations=15'
    out = step('pytest', sys.executable, '-m', 'pytest', '-q', how, 'tests')
    lines = out.splitlines()
    print('\n'.join(lines[-22:]), flush=True)
    counts = {k: int(n) for n, k in re.findall(r'(\d+) (passed|failed|error)', lines[-1] if lines else '')}
    passed += max(0, counts.get('passed', 0)-1)
    failed.extend(['a test of pytest']*max(0, counts.get('failed', 0)+counts.get('error', 0)-1))

def command_line(home):
    "The commands of the README in a project of their own, from the root and from nbs/"
    shutil.copytree(os.environ['CK_BASES'], home/'models/bases')  # as a user has them
    os.environ.update(CK_BASES='', CK_ROOT=str(home))
    tiny = ['-p', 'mix', 'sample_arena:40', '-p', 'lora_r', '4']
    step('ck run 02_split', 'ck', 'run', 'nbs/02_split.ipynb')
    step('ck run 04_train', 'ck', 'run', 'nbs/04_train.ipynb', *tiny)
    step('ck run 10_vote', 'ck', 'run', 'nbs/10_vote.ipynb')
    step('ck run 02_split from nbs/', 'ck', 'run', '02_split.ipynb', cwd=root/'nbs')
    again = step('ck run 04_train from nbs/', 'ck', 'run', '04_train.ipynb', *tiny, cwd=root/'nbs')
    expect('the run that the root made is done already from nbs/', 'is done already' in again, again)
    step('papermill 04_train, as the README has it', 'papermill', 'nbs/04_train.ipynb', home/'04_train.ipynb',
         '-p', 'fold', 0, *tiny)
    found = list(home.glob('models/vote-*/submission.csv'))
    sample = home/'data/sample_arena/sample_submission.csv'
    step('ck check of the submission', 'ck', 'check', found[0] if found else 'no submission', sample)
    step('ck log', 'ck', 'log')

def main():
    os.chdir(root)
    os.environ.update(OMP_WAIT_POLICY='PASSIVE', TOKENIZERS_PARALLELISM='false', HF_HUB_OFFLINE='1', MPLBACKEND='agg',
                      PATH=f'{tools}:{os.environ["PATH"]}')
    os.environ['CK_BASES'] = os.environ.get('CK_BASES') or str(root/'models/bases')
    workbook = (root/'experiments_log.xlsx').read_bytes()
    source_checks()
    notebook_tests(sorted((root/'nbs/lib').glob('*.ipynb')))
    for nb in sorted((root/'nbs').glob('*.ipynb')):
        step(f'nbdev_test {nb.name}', 'nbdev_test', '--path', nb, '--n_workers', '0')
    pytest()
    with tempfile.TemporaryDirectory() as d: command_line(Path(d))
    expect('the committed workbook is untouched', (root/'experiments_log.xlsx').read_bytes() == workbook)
    slowest = sorted(seconds, key=seconds.get)[:-6:-1]
    print('slowest:', ', '.join(f'{k} {seconds[k]:.0f} s' for k in slowest))
    for what in failed: print('failed:', what)
    print(f'{passed} passed, {len(failed)} failed')
    sys.exit(bool(failed))

if __name__ == '__main__': main()
