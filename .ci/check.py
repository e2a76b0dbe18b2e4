"Every test there is, one after the other; the last line counts them."
import hashlib, os, re, shutil, subprocess, sys, tempfile, time
from pathlib import Path

root = Path(__file__).resolve().parents[1]
bin = Path(sys.executable).parent
os.chdir(root)
os.environ.update(OMP_WAIT_POLICY='PASSIVE', TOKENIZERS_PARALLELISM='false', HF_HUB_OFFLINE='1', MPLBACKEND='agg', PATH=f'{bin}:{os.environ["PATH"]}',
                  CK_BASES=os.environ.get('CK_BASES') or str(root/'models/bases'))
passed, failed, seconds = 0, [], {}

def step(what, *cmd, cwd=root, **env):
    global passed
    t = time.time()
    p = subprocess.run([str(c) for c in cmd], cwd=cwd, env={**os.environ, **env}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors='replace')
    ok, seconds[what] = p.returncode == 0, time.time()-t
    print(f"{'ok    ' if ok else 'FAILED'} {time.time()-t:6.1f} s  {what}", flush=True)
    if ok: passed += 1
    else:
        failed.append(what)
        print(p.stdout[-6000:], flush=True)
    return p.stdout

def tree(): return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for d in ('nbs', 'competition_kit') for p in sorted((root/d).rglob('*')) if p.suffix in ('.ipynb', '.py')}

before, book = tree(), (root/'experiments_log.xlsx').read_bytes()
step('nbdev_clean', 'nbdev_clean')
step('nbdev_export', 'nbdev_export')
changed = [k for k, v in tree().items() if before.get(k) != v]
if changed: failed.append('notebooks and package agree'); print('FAILED           clean and export changed', *changed)
else: passed += 1
step('ruff F', 'ruff', 'check', '--select', 'F', 'competition_kit', 'tests', 'bench', '.ci', 'setup.py')
step('README is of the index', sys.executable, '.ci/readme.py', '--check')
step('the embedded base', sys.executable, '-c', 'from competition_kit.base import base_path; base_path()')
for nb in sorted((root/'nbs').rglob('*.ipynb')): step(f'nbdev_test {nb.name}', 'nbdev_test', '--path', nb, '--n_workers', '0')

out = step('pytest', sys.executable, '-m', 'pytest', '-q', '-x' if '--fast' in sys.argv else '--durations=15', 'tests')
counts = {k: int(n) for n, k in re.findall(r'(\d+) (passed|failed|error|errors|skipped)\b', out.splitlines()[-1] if out else '')}
print('\n'.join(out.splitlines()[-22:]), flush=True)
passed += max(0, counts.get('passed', 0)-1)
failed += ['a test of pytest']*max(0, sum(counts.get(k, 0) for k in ('failed', 'error', 'errors'))-1)

with tempfile.TemporaryDirectory() as d:
    shutil.copytree(os.environ['CK_BASES'], Path(d)/'models/bases')  # as a user has them
    os.environ.update(CK_BASES='', CK_ROOT=d)
    tiny = ['-p', 'mix', 'sample_arena:40', '-p', 'lora_r', '4']
    for cwd in (root, root/'nbs'):
        nb = lambda name: os.path.relpath(root/'nbs'/name, cwd)
        where = 'the root' if cwd == root else 'nbs/'
        step(f'ck run 02_split from {where}', 'ck', 'run', nb('02_split.ipynb'), cwd=cwd)
        said = step(f'ck run 04_train from {where}', 'ck', 'run', nb('04_train.ipynb'), *tiny, cwd=cwd)
        if cwd == root: step(f'ck run 10_vote from {where}', 'ck', 'run', nb('10_vote.ipynb'), cwd=cwd)
    if 'is done already' not in said: failed.append('the run that the root made is done already from nbs/')
    step('papermill 04_train, as the README has it', 'papermill', 'nbs/04_train.ipynb', Path(d)/'04_train.ipynb', '-p', 'fold', 0, '-p', 'mix', 'sample_arena:40', '-p', 'lora_r', 4)
    found = list(Path(d).glob('models/vote-*/submission.csv'))
    step('ck check of the submission', 'ck', 'check', found[0] if found else 'no submission', Path(d)/'data/sample_arena/sample_submission.csv')
    step('ck log', 'ck', 'log')

if (root/'experiments_log.xlsx').read_bytes() != book: failed.append('the committed workbook is untouched')
else: passed += 1
print('slowest:', ', '.join(f'{k} {v:.0f} s' for k, v in sorted(seconds.items(), key=lambda o: -o[1])[:5]))
for f in failed: print('failed:', f)
print(f'{passed} passed, {len(failed)} failed')
sys.exit(bool(failed))
