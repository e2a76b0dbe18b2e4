"""Rationales → training on them → a vote → a submission, each stage killed once:
python bench/text_chain.py [FOLDER] [--rows 48]

The embedded base writes about rows of the logic sample, is trained on what was accepted, and votes by texts beside a
letter run. Everything happens below FOLDER (default: a new one). Says the minutes of each stage and the minutes of
CPU, kills included, how many shards of replies each kill left, and the scores beside their baselines."""
import argparse, json, os, resource, signal, subprocess, sys, tempfile, time
from pathlib import Path
from common import report

CODE = '''
import sys, json
from competition_kit.core import root_at
from competition_kit.record import run_stage
from competition_kit.tables import publish
stage, params, root = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
import importlib
module = importlib.import_module(f'competition_kit.{stage}')
with root_at(root):
    args = getattr(module, stage.capitalize()+'Args')(**params)
    run = run_stage(getattr(module, stage), args)
    if stage == 'generate': publish(run.folder, args.name)
    print(run.id)
'''

def started(stage, params, root):
    "A stage in a process of its own"
    command = [sys.executable, '-c', CODE, stage, json.dumps(params), str(root)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

def cpu_minutes(): # of all processes so far
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime+u.ru_stime for u in used)/60

def shards(root): return list(root.glob('models/*/replies/**/*.parquet'))

def stage(name, params, root, kill_at=0):
    "(run id, minutes, shards that the kill left); with `kill_at` it is killed when so many new shards are there"
    began, before = time.monotonic(), len(shards(root))
    if kill_at:
        p = started(name, params, root)
        while p.poll() is None and len(shards(root)) < before+kill_at: time.sleep(.2)
        p.send_signal(signal.SIGKILL)
        p.wait()
    kept = {f: f.stat().st_mtime_ns for f in shards(root)}
    p = started(name, params, root)
    out, _ = p.communicate()
    assert p.returncode == 0, f'{name} failed'
    assert all(f.stat().st_mtime_ns == t for f, t in kept.items()), 'a complete shard was written again'
    return out.split()[-1], (time.monotonic()-began)/60, len(kept)-before

def main(root, rows):
    how = dict(max_len=512, epochs=3., batch=4, lora_r=8, pack_tokens=1024)
    mix = f'sample_logic:{rows}'
    written = dict(data=mix, name='written', retries=4, given=2, temperature=.6, max_len=1024, max_new_tokens=96)
    made, first, a = stage('generate', written | dict(shard=24), root, kill_at=2)
    answers = dict(route='text', max_new_tokens=96, score_every=2)
    text, second, _ = stage('train', dict(mix=f'{mix} + written', **answers, **how), root)
    letters, third, _ = stage('train', dict(mix=mix, **how), root)
    vote, fourth, b = stage('vote', dict(data='sample_logic', runs=f'{letters} {text}', samples=1, retries=1,
                                         rescore=.25, views=1), root, kill_at=1)
    read = {run: json.loads((root/f'models/{run}/record.json').read_text()) for run in (made, text, letters, vote)}
    record, metrics = read[vote], {run: r['metrics'] for run, r in read.items()}
    counts = {k: record['metrics'].get(k) for k in ('replies', 'unparsed', 'retried', 'rows_without_answer')}
    minutes = dict(generate=first, train_text=second, train_letters=third, vote=fourth)
    report(what='text chain', rows=rows, minutes={k: round(m, 2) for k, m in minutes.items()},
           all_minutes=sum(minutes.values()), cpu_minutes=cpu_minutes(), kept_by_the_kills=[a, b],
           rationales=read[made]['rows'], written=metrics[made], text=metrics[text], letters=metrics[letters],
           vote=counts, vote_scores=metrics[vote],
           submission=(root/record['submission']).is_file(), load=os.getloadavg()[0])

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folder', nargs='?', default='')
    p.add_argument('--rows', type=int, default=48)
    a = p.parse_args()
    main(Path(a.folder or tempfile.mkdtemp()).resolve(), a.rows)
