"""What do teachers and pseudo-labels give a small student? Every fold of a table, beside labels alone.

usage: python bench/distill.py open=FILE alpaca=FILE --teacher BASE [--lines labels …] [--folds 5] [--seeds 3]
                                [--teacher-seeds 1] [--jobs 4] [--set JSON] [--until SECONDS] [--out FOLDER]
The first table is trained on and held out; the second gives unlabelled rows (its labels are hidden), or real labels.
Each line of the result is compared with `labels`, or with the line that it names, fold by fold and seed by seed;
`least` is the smallest difference that two standard errors of these pairs can tell."""
import argparse, contextlib, io, json, multiprocessing, os, tempfile, time, traceback
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '2')  # many processes share the cores
import numpy as np
import pandas as pd

FIT = dict(mix='open', max_len=640, batch=32, pack_tokens=32768, warmup=.1, schedule='cosine', save_every=10**6,
           epochs=2., lr=1e-3, recompute=0, compiled='no', dtype='bf16')
TWO_TABLES = 'open + alpaca'

# name → seeds, arguments; `needs`: lines whose runs must be finished first; `against`: the line to compare with
LINES = { # in the order in which they begin
    'teacher: qwen': dict(seeds=1, args=dict(base='TEACHER', lr=3e-4, pack_tokens=8192)),
    'labels': dict(seeds=3),
    'labels, asked in one view': dict(seeds=3, needs=['labels'], views=1),
    'labels, score route': dict(seeds=3, args=dict(route='score')),
    'labels, twice the steps': dict(seeds=1, args=dict(epochs=2.)),
    'labels, alpaca rows with real labels': dict(seeds=3, args=dict(mix=TWO_TABLES)),
    'qwen, seed form': dict(seeds=3, needs=['teacher: qwen'], args=dict(form='seed')),
    'qwen, soft form (T = 5)': dict(seeds=3, needs=['teacher: qwen'], args=dict(form='soft')),
    'qwen, soft form, T = 2': dict(seeds=3, needs=['teacher: qwen'], args=dict(form='soft', temperature=2.),
                                   against='qwen, soft form (T = 5)'),
    'qwen, soft form, T = 1': dict(seeds=3, needs=['teacher: qwen'], args=dict(form='soft', temperature=1.),
                                   against='qwen, soft form (T = 5)'),
    'qwen, kl form': dict(seeds=3, needs=['teacher: qwen'], args=dict(form='kl')),
    'qwen, seed form, in-sample': dict(seeds=3, needs=['teacher: qwen'], args=dict(form='seed', in_sample=True),
                                       against='qwen, seed form'),
    'qwen, seed form, cleaned below .3': dict(seeds=3, needs=['teacher: qwen'], args=dict(clean_below=.3)),
    'teacher with more rows, kl form': dict(seeds=3, needs=['labels, alpaca rows with real labels'],
                                            args=dict(form='kl')),
    'self, soft form': dict(seeds=3, needs=['labels'], args=dict(form='soft')),
    'self, kl form': dict(seeds=1, needs=['labels'], args=dict(form='kl')),
    'self, kl form, asked online': dict(seeds=1, needs=['labels'], args=dict(form='kl', online=True),
                                        against='self, kl form'),
    'denoised labels (half their own)': dict(seeds=3, needs=['labels'], table='denoised', pseudo=dict(
        data='open', own=.5, margin=0., near='keep')),
    'alpaca pseudo-labelled, filtered': dict(seeds=3, needs=['labels', 'teacher: qwen'], table='pseudo', pseudo=dict(
        data='hidden', margin=.1)),
    'alpaca pseudo-labelled, not filtered': dict(seeds=1, needs=['labels', 'teacher: qwen'], table='every', pseudo=dict(
        data='hidden', margin=0., near='keep')),
    'alpaca labelled by the folds of labels alone, filtered': dict(seeds=1, needs=['labels'], table='own', pseudo=dict(
        data='hidden', margin=.1)),
    'alpaca labelled by the folds of labels alone, not filtered': dict(seeds=1, needs=['labels'], table='own_every',
        pseudo=dict(data='hidden', margin=0., near='keep')),
    'alpaca labelled by the folds of labels alone, near-copies left out': dict(seeds=1, needs=['labels'],
        table='own_far', pseudo=dict(data='hidden', margin=0.)),
    'PandaLM alone, majority of three people': dict(seeds=3, args=dict(mix='pandalm_majority'), against=''),
    'PandaLM alone, shares of three people': dict(seeds=3, args=dict(mix='pandalm'),
                                                  against='PandaLM alone, majority of three people'),
}

def write_tables(name, rows): # the table, and those that are made of it
    from competition_kit.core import data_path
    from competition_kit.tables import write_rows
    panda, made = rows[rows.source == 'pandalm'].reset_index(drop=True), {name: rows}
    if name == 'alpaca': made['hidden'] = rows.assign(label=-1, target=None, fold=-1)
    if len(panda): made |= dict(pandalm=panda, pandalm_majority=panda.assign(target=None))
    for k, table in made.items(): write_rows(table, data_path(f'{k}.parquet'), task=rows.attrs['meta']['task'])

def begin(root, cards, counter):
    with counter.get_lock():
        counter.value += 1
        k = counter.value
    os.environ.update(CK_ROOT=root, CUDA_VISIBLE_DEVICES=cards[k % len(cards)], TOKENIZERS_PARALLELISM='false')
    import competition_kit.record as record
    import competition_kit.train as train
    train.baselines = lambda *a: {}  # once a fold, below
    record.after_run.clear()         # no workbook: hundreds of runs

def one(name, stage, args):
    began = time.time()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return name, _run(stage, args), time.time()-began
    except Exception: return name, traceback.format_exc()[-1500:], time.time()-began

def _run(stage, args):
    from competition_kit.distill import distill_fold
    from competition_kit.probs import align
    from competition_kit.pseudo import PseudoArgs, pseudo
    from competition_kit.record import run_stage
    from competition_kit.tables import publish
    from competition_kit.train import held_out, train_fold
    from competition_kit.trained import predict_runs
    if stage == 'pseudo':
        run = run_stage(pseudo, PseudoArgs(**args))
        publish(run.folder, args['name'])
        return run.id, run.record['metrics']
    run = (distill_fold if stage == 'distill' else train_fold)(**args)
    rows, p = held_out(run)
    if stage == 'one view': p = align(predict_runs([run.id], rows, run.folder/'one', views=1)[run.id], rows)
    return run.id, pd.DataFrame(dict(fold=args['fold'], seed=args['seed'], id=rows.id, label=rows.label, p=list(p)))

def jobs_of(name, ids, folds): # (stage, arguments) of a line, once the lines that it needs are finished
    line = LINES[name]
    args = dict(FIT, **line.get('args', {}))
    if 'pseudo' in line: args['mix'] = line['table'] if line['table'] == 'denoised' else f"open + {line['table']}"
    elif 'needs' in line and 'views' not in line: args['teachers'] = ' '.join(ids[n] for n in line['needs'])
    stage = 'distill' if 'teachers' in args else 'one view' if 'views' in line else 'train'
    return [(stage, dict(args, fold=f, seed=s)) for s in range(line['seeds']) for f in range(folds)]

def compared(own, peer): # log-losses of two lines, in pairs of seed and fold
    d = (own.log_loss-peer.log_loss).dropna()
    least = 2*d.std()/len(d)**.5
    told = 'gain' if d.mean() < -least else 'worse' if d.mean() > least else 'no gain'
    return dict(difference=d.mean(), least=least, told=told)

def table(said): # one line a way to teach
    from competition_kit.probs import log_loss
    loss = said.groupby(['line', 'seed', 'fold']).apply(lambda d: pd.Series(dict(
        log_loss=log_loss(np.stack(d.p), d.label.to_numpy()), accuracy=(np.stack(d.p).argmax(1) == d.label).mean())),
        include_groups=False)
    out, there = [], set(said.line)
    for name in dict.fromkeys(said.line):
        own, peer = loss.loc[name], LINES[name].get('against', 'labels')
        line = dict(line=name, runs=len(own), log_loss=own.log_loss.mean(), accuracy=own.accuracy.mean(),
                    sd_of_seeds=own.log_loss.groupby('seed').mean().std())
        out.append(line | (compared(own, loss.loc[peer]) | dict(against=peer) if peer in there - {name} else {}))
    return pd.DataFrame(out)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('tables', nargs=2)
    p.add_argument('--teacher', default='smollm2')
    p.add_argument('--lines', nargs='+', default=list(LINES))
    p.add_argument('--folds', type=int, default=5)
    p.add_argument('--seeds', type=int, default=3, help='the most seeds of a line')
    p.add_argument('--teacher-seeds', type=int, default=1, help='of the teacher; one of them teaches, all are scored')
    p.add_argument('--jobs', type=int, default=4)
    p.add_argument('--until', type=float, default=1e9, help='seconds after which no run is begun')
    p.add_argument('--set', type=json.loads, default={}, help='further arguments of every run, as JSON')
    p.add_argument('--out', default='.')
    a = p.parse_args()
    FIT.update(a.set)
    LINES['teacher: qwen'].update(seeds=a.teacher_seeds, args=dict(LINES['teacher: qwen']['args'], base=a.teacher))
    for line in LINES.values(): line['seeds'] = min(line['seeds'], a.seeds)
    began = time.time()
    from competition_kit.core import bases_path, data_path
    from competition_kit.tables import split
    os.environ.update(CK_BASES=str(bases_path()), CK_ROOT=os.environ.get('CK_ROOT') or tempfile.mkdtemp())
    data_path().mkdir(parents=True, exist_ok=True)
    for part in a.tables:
        name, file = part.split('=')
        rows, _ = split(str(Path(file).resolve()))
        write_tables(name, rows)
    from common import gpus
    cards = gpus()
    spawn = multiprocessing.get_context('spawn')
    pool = ProcessPoolExecutor(a.jobs*len(cards), spawn, begin, (os.environ['CK_ROOT'], cards, spawn.Value('i', -1)))
    ids, said, running, left = {}, [], {}, {}
    waiting = [n for n in LINES if n in a.lines]
    made = set()
    while waiting or running:
        for n in list(waiting):
            line = LINES[n]
            if any(k not in ids or left[k] for k in line.get('needs', [])): continue
            if 'pseudo' in line and n not in made:
                made.add(n)
                teachers = ' '.join(ids[k] for k in line['needs'])
                args = dict(line['pseudo'], name=line['table'], teachers=teachers, pack_tokens=4*FIT['pack_tokens'])
                running[pool.submit(one, n, 'pseudo', args)] = None
                left[n] = 1
                continue
            if 'pseudo' in line and left.get(n): continue
            waiting.remove(n)
            jobs = jobs_of(n, ids, a.folds)
            left[n] = len(jobs)
            if time.time()-began > a.until: continue
            for stage, args in jobs: running[pool.submit(one, n, stage, args)] = args
        if not running: break
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for f in done:
            args, (n, result, took) = running.pop(f), f.result()
            left[n] -= 1
            if isinstance(result, str):
                print('FAILED', n, args, result, flush=True)
                continue
            run, held = result
            if isinstance(held, dict): print(f'{n}: {run} {held}, {took:.0f} s', flush=True)
            else:
                ids.setdefault(n, run)
                said.append(held.assign(line=n))
                which = f"{n} | fold {args['fold']} seed {args['seed']}"
                print(f'{which}: {took:.0f} s, {time.time()-began:.0f} s in all', flush=True)
                pd.concat(said).to_parquet(Path(a.out)/'said.parquet')
    t = table(pd.concat(said))
    t.to_json(Path(a.out)/'distill.json', orient='records', indent=1)
    print(t.to_string(index=False, float_format=lambda v: f'{v:.4f}'))
