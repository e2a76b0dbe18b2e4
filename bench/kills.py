"""Does a recipe that is killed again and again end in the submission of an undisturbed run?

usage: python bench/kills.py NAME ... [--small] [--kills 4] [--scale tiny] [--set NAME=VALUE ...] [--seed 0]
    [--out FOLDER]
Each recipe runs once undisturbed, then once with kills: after a random time, SIGKILL ends a random one of the command
(`runner`), Snakemake (`engine`), a job's process (`job`) and its notebook's kernel (`kernel`), and
`ck recipe resume` goes on. One JSON line a recipe: who was killed after how many seconds, and whether the submissions
are the same bytes. `--small` takes the values of `tests/test_recipes.py`: models of one to three layers. `--out` keeps
both roots, so that an undisturbed run there is not made again."""
import argparse, json, os, random, subprocess, sys, tempfile, time
from pathlib import Path
import psutil
from common import report
from competition_kit.core import bases_path, sha256

KINDS = dict(runner='competition_kit.ck recipe', engine='snakemake', job='competition_kit.jobs',
             kernel='ipykernel_launcher')

WRITERS = dict(deepseek='smollm2', llama='smollm2', rows=':32', retries=2, new=128)  # smaller ones write nothing right

def small(name): # NAME=VALUE of each value
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]/'tests'))
    from test_recipes import SMALL
    values = SMALL[name] | (WRITERS if name == 'logic_reflect' else {})
    return [f'{k}={json.dumps(v) if isinstance(v, list) else v}' for k, v in values.items()]

def environment(root): # of a command that works in `root`
    return os.environ | dict(CK_ROOT=str(root), CK_BASES=str(bases_path()), OMP_NUM_THREADS='1')

def begin(verb, name, root, a): # a process of `ck recipe`
    given = [*(small(name) if a.small else ()), *a.set]
    values = [w for v in given for w in ('--set', v)] if verb == 'run' else []
    command = [sys.executable, '-m', 'competition_kit.ck', 'recipe', verb, name, '--scale', a.scale, *values]
    with open(root/'log.txt', 'a') as log:
        return subprocess.Popen(command, env=environment(root), stdout=log, stderr=subprocess.STDOUT)

def found(root): # [(kind, process)] of all processes that work in `root`
    out = []
    for p in psutil.process_iter():
        try:
            if p.environ().get('CK_ROOT') != str(root): continue
            words = ' '.join(p.cmdline())
        except psutil.Error: continue
        out += [(kind, p) for kind, w in KINDS.items() if w in words][:1]
    return out

def wait_for_all(root): # until no process of the root is left: what a killed runner left goes on by itself
    while found(root): time.sleep(.5)

def submission(root): # its hash, or None
    files = sorted(root.glob('models/vote-*/submission.*'))
    return sha256(files[-1]) if files else None

def undisturbed(name, root, a): # seconds
    start = time.time()
    if not submission(root) and begin('run', name, root, a).wait():
        raise SystemExit(f'{name} fails without a kill: {root}/log.txt')
    return time.time()-start

def with_kills(name, root, a, seconds, rng): # [(kind, seconds after the start of the command)]
    killed, verb = [], 'run'
    while True:
        p, start = begin(verb, name, root, a), time.time()
        verb, wait = 'resume', rng.uniform(4, max(10, seconds/(a.kills+1)))
        while time.time()-start < wait and p.poll() is None: time.sleep(.2)
        if p.poll() is None and len(killed) < a.kills and (there := found(root)):
            kind = rng.choice(sorted({k for k, _ in there}))
            rng.choice([q for k, q in there if k == kind]).kill()
            killed.append((kind, round(time.time()-start, 1)))
        if p.wait() == 0: return killed
        if len(killed) == a.kills: break
    wait_for_all(root)
    if begin('resume', name, root, a).wait(): raise SystemExit(f'{name} does not end: {root}/log.txt')
    return killed

def kill_one(name, a, rng):
    roots = [a.out/name/k for k in ('undisturbed', 'killed')]
    for r in roots: r.mkdir(parents=True, exist_ok=True)
    seconds = undisturbed(name, roots[0], a)
    start = time.time()
    killed = with_kills(name, roots[1], a, seconds, rng)
    wait_for_all(roots[1])
    same = submission(roots[0]) is not None and submission(roots[0]) == submission(roots[1])
    report(recipe=name, scale=a.scale, killed=killed, same_submission=same, undisturbed_s=seconds,
           with_kills_s=time.time()-start)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('names', nargs='+')
    p.add_argument('--small', action='store_true')
    p.add_argument('--kills', type=int, default=4)
    p.add_argument('--scale', default='tiny')
    p.add_argument('--set', action='append', default=[], help='a value of the recipe, as for `ck recipe run`')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--out', type=Path)
    a = p.parse_args()
    a.out = (a.out or Path(tempfile.mkdtemp())).absolute()
    for name in a.names: kill_one(name, a, random.Random(f'{a.seed} {name}'))
