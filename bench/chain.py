"""Five folds, merged, quantised, voted, checked: is the submission the same after SIGKILL in the middle of each stage?

usage: python bench/chain.py [--base FOLDER] [--out FOLDER]
The chain runs twice through `ck run`, over a random base of two layers or over `--base`. In the second root every stage
is killed once, with its kernel, half-way between the start of its run and the end that the first root has seen."""
import argparse, json, os, signal, subprocess, sys, tempfile, time
from pathlib import Path
import psutil
from common import report
from competition_kit.base import tiny_base
from competition_kit.core import bases_path, sha256

def command(root, *words): # a process of `ck`
    env = os.environ | dict(CK_ROOT=str(root), CK_BASES=str(bases_path()))
    with open(root/'log.txt', 'a') as log:
        return subprocess.Popen([sys.executable, '-m', 'competition_kit.ck', *words], env=env, stdout=log, stderr=log)

def records(root): # of all runs, the newest last
    files = sorted(root.glob('models/*/record.json'), key=lambda f: f.stat().st_ctime)
    return [json.loads(f.read_text()) for f in files]

def done(root, stage): # ids of finished runs
    return ' '.join(sorted(r['run_id'] for r in records(root) if r['stage'] == stage and r['status'] == 'done'))

def stage(root, name, **params): # seconds until the run has begun, and until the command ends
    p, start, old, began = words(root, name, params), time.time(), len(records(root)), None
    while p.poll() is None:
        if not began and len(records(root)) > old: began = time.time()-start
        time.sleep(.05)
    if p.returncode: raise SystemExit(f'{name} failed: {root}/log.txt')
    return began, time.time()-start

def words(root, name, params):
    return command(root, 'run', name, *(w for k, v in params.items() for w in ('-p', k, str(v))))

def killed_stage(root, name, times, **params): # status of the run that was killed
    p, old, began = words(root, name, params), len(records(root)), time.time()
    while len(records(root)) == old and p.poll() is None: time.sleep(.05)
    time.sleep((times[1]-times[0])/2)
    family = [p.pid, *(c.pid for c in psutil.Process(p.pid).children(recursive=True))] if p.poll() is None else []
    for pid in family: os.kill(pid, signal.SIGKILL)
    p.wait()
    status = records(root)[-1]['status']
    stage(root, name, **params)
    return dict(stage=name, after=round(time.time()-began, 1), status=status)

def chain(root, base, run): # hash of the submission; `run` runs a stage
    fit = dict(base=base, mix='sample_arena', max_len=160, lora_r=4, lr=.01, dtype='fp32', epochs=1., save_every=2)
    for fold in range(5): run(root, '04_train', fold=fold, **fit)
    run(root, '08_merge', members=done(root, 'train'), how='base')
    run(root, '09_gptq', start=done(root, 'merge'), bits=8, max_loss=9., max_flips=1.)
    run(root, '10_vote', data='sample_arena', runs=done(root, 'gptq'))
    file = next(root.glob('models/vote-*/submission.csv'))
    checked = command(root, 'check', str(file), str(root/'data/sample_arena/sample_submission.csv')).wait()
    if checked: raise SystemExit(f'ck check refuses the submission: {root}/log.txt')
    return sha256(file)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--base', default='')
    p.add_argument('--out', default='')
    a = p.parse_args()
    out = Path(a.out or tempfile.mkdtemp())
    base = a.base or tiny_base(out/'tiny')
    took, killed, roots = [], [], [out/'undisturbed', out/'killed']
    for r in roots: r.mkdir(parents=True)
    whole = chain(roots[0], base, lambda *names, **params: took.append(stage(*names, **params)))
    def kill(root, name, **params): killed.append(killed_stage(root, name, took[len(killed)], **params))
    again = chain(roots[1], base, kill)
    report('torch', 'gptqmodel', base=str(base), seconds=[round(b, 1) for _, b in took], killed=killed,
           same_bytes=whole == again)
