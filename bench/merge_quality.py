"""What does merging cost? Folds and seeds, merged in every way, on a table that no run has seen.

usage: python bench/merge_quality.py pairs_open.parquet [--seeds 3] [--first 0] [--folds 5] [--jobs 4] [--base B]
                                     [--int4] [--families …] [--set JSON] [--until SECONDS] [--out FOLDER]
A fifth of the groups is set apart. Three families of runs are trained on the rest: folds with one seed (a shared
start), folds with a seed each (independent starts), and as many seeds on all rows. Every draw is one more repetition.
Each line is compared with the mean of the five folds' probabilities, row by row; `least` is the smallest difference
that two standard errors over groups can tell. With `--int4`, one LoRA a draw is trained over that checkpoint of
`--base`. On one H200, 45 trainings with `--jobs 5` took 7.7 minutes, and eight merges at once 2.7."""
import argparse, contextlib, io, json, os, tempfile, time, traceback
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '2')  # many processes share the cores
import numpy as np
import pandas as pd

FIT = dict(max_len=640, batch=32, pack_tokens=32768, warmup=.1, schedule='cosine', save_every=10**6, epochs=2., lr=1e-3,
           recompute=0, compiled='no')
HOW = {'exact merge': dict(), 'rank 16': dict(how='svd', rank=16), 'rank 32': dict(how='svd', rank=32),
       'factors': dict(how='factors')}

FAMILIES = 'folds, shared start', 'folds, independent starts', 'seeds on all rows'

def begin():
    import competition_kit.lora as lora
    import competition_kit.merge as merge
    import competition_kit.record as record
    import competition_kit.train as train
    train.baselines = merge.baselines = lambda *a: {}
    lora._largest_drift = np.inf  # what the stage refuses is measured here
    record.after_run.clear()      # no workbook: hundreds of runs

def one(name, stage, args):
    began, work = time.time(), dict(train=_train, merge=_merge, quantise=_quantise)[stage]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return name, work(args), time.time()-began
    except Exception: return name, traceback.format_exc()[-1500:], time.time()-began

def _quantise(args): # the folder of the quantised base
    from competition_kit.gptq import GptqArgs, gptq
    from competition_kit.record import run_stage
    return str(run_stage(gptq, GptqArgs(**args)).folder/'model'), None, {}

def _train(args):
    from competition_kit.train import train_fold
    return train_fold(**args).id, None, {}

def _merge(args): # the merge and its members on the rows set apart
    from competition_kit.merge import merge_runs
    from competition_kit.probs import align, read_probs
    from competition_kit.tables import load_rows
    run, rows = merge_runs(held='held', **args), load_rows('held')
    files = {'merged': run.folder/'probs.parquet'}
    files |= {m: run.folder/f'members/{m}.parquet' for m in run.record['members']}
    facts = {k: run.record[k] for k in ('energy', 'drift', 'factor_error') if k in run.record}
    return run.id, {k: align(read_probs(f), rows) for k, f in files.items()}, dict(facts, shift=run.record['logits'])

def trainings(a, int4): # (family, draw) → list of arguments; `int4` is the quantised base, or ''
    fit = dict(FIT, base=a.base, **a.set)
    out = {}
    for d in range(a.first, a.seeds):
        out['folds, shared start', d] = [dict(fit, mix='open', fold=f, seed=d) for f in range(a.folds)]
        out['folds, independent starts', d] = [dict(fit, mix='open', fold=f, seed=100+10*d+f) for f in range(a.folds)]
        out['seeds on all rows', d] = [dict(fit, mix='every', fold=0, seed=200+10*d+f) for f in range(a.folds)]
        if int4: out['over int4', d] = [dict(fit, mix='every', fold=0, seed=d, base=int4)]
    return {k: v for k, v in out.items() if k[0] in (*a.families, 'over int4')}

def merges(family, a):
    if family == 'over int4':
        return {'served over int4': {}, 'merged into the 16-bit twin': dict(how='base', twin=a.base)}
    return {k: v for k, v in HOW.items() if family == 'folds, shared start' or not k.startswith('rank')}

def tables(file): # once: a later call finds them
    from competition_kit.core import data_path
    from competition_kit.tables import split, write_rows
    data_path().mkdir(parents=True, exist_ok=True)
    if data_path('every.parquet').exists(): return
    rows, _ = split(str(Path(file).resolve()))
    task, groups = rows.attrs['meta']['task'], rows.group.drop_duplicates().sort_values()
    apart = rows.group.isin(set(groups.sample(frac=.2, random_state=0)))
    every = rows.assign(fold=np.where(apart, 0, -1))  # fold 0 of it is the rows set apart
    for name, part in dict(open=rows[~apart], held=rows[apart].assign(fold=-1), every=every).items():
        write_rows(part.reset_index(drop=True), data_path(f'{name}.parquet'), task=task)

def lines(results): # (line, draw) → [rows, options]
    out = {}
    for (family, how, draw), (_, p, _) in results.items():
        members = [q for k, q in p.items() if k != 'merged']
        out[f'{family}: {how}', draw] = [p['merged']]
        if len(members) == 1: continue
        out[f'{family}: single', draw] = members
        out[f'{family}: mean of probabilities', draw] = [np.mean(members, 0)]
    return out

def summary(out, rows):
    from competition_kit.gate import paired_difference
    label, at = rows.label.to_numpy(), np.arange(len(rows))
    def losses(q): return -np.log(np.clip(q[at, label].astype(float), 1e-15, 1))
    each = {k: np.mean([losses(q) for q in models], 0) for k, models in out.items()}
    right = {k: np.mean([(q.argmax(1) == label).mean() for q in models]) for k, models in out.items()}
    names = list(dict.fromkeys(name for name, _ in each))
    mean = {n: np.mean([v for (name, _), v in each.items() if name == n], 0) for n in names}
    reference = next((n for n in names if n.endswith('mean of probabilities')), names[0])
    table = []
    for n in names:
        draws = [v.mean() for (name, _), v in each.items() if name == n]
        gap, error = paired_difference(mean[n], mean[reference], rows.group)
        told = 'no difference' if abs(gap) <= 2*error else 'better' if gap < 0 else 'worse'
        table.append(dict(line=n, draws=len(draws), log_loss=np.mean(draws), sd_of_draws=np.std(draws, ddof=1)
                          if len(draws) > 1 else np.nan, accuracy=np.mean([v for (k, _), v in right.items() if k == n]),
                          against_mean=gap, least=2*error, told='' if n == reference else told))
    return pd.DataFrame(table)

def quantised(a): # name → job
    wide = dict(max_loss=99., max_flips=1.)
    how = {k: v for k, v in (FIT | a.set).items() if k in ('max_len', 'dtype')}
    return {('int4',): ('quantise', dict(how, base=a.base, mix='every', fold=0, **wide))} if a.int4 else {}

def measure(a):
    from common import results, workers
    from competition_kit.core import bases_path
    from competition_kit.tables import load_rows
    os.environ.update(CK_BASES=str(bases_path()), CK_ROOT=os.environ.get('CK_ROOT') or tempfile.mkdtemp())
    tables(a.table)
    began = time.time()
    until = began+a.until
    def run(jobs): # name → result, of jobs (stage, arguments) that did not fail
        out = {}
        for name, result, took in results(pool, one, [(name, *job) for name, job in jobs.items()], until):
            failed = isinstance(result, str)
            print('FAILED' if failed else '', *name, result if failed else result[0], f'{took:.0f} s,',
                  f'{time.time()-began:.0f} s in all', flush=True)
            if not failed: out[name] = result
        return out
    with workers(a.jobs, begin) as pool:
        int4 = run(quantised(a)).get(('int4',), ('',))[0]
        families = trainings(a, int4)
        ids = {name: result[0] for name, result in run({(*k, i): ('train', args) for k, every in families.items()
                                                        for i, args in enumerate(every)}).items()}
        jobs = {}
        for (family, draw), every in families.items():
            members = [ids.get((family, draw, i)) for i in range(len(every))]
            if None in members: continue  # a merge of some of the members is another line
            for how, args in merges(family, a).items():
                jobs[family, how, draw] = 'merge', dict(args, members=' '.join(members))
        first = {k: v for k, v in jobs.items() if k[1] in ('exact merge', 'served over int4')}  # they ask the members
        merged = run(first) | run({k: v for k, v in jobs.items() if k not in first})
    for name, (_, _, facts) in merged.items(): print(*name, json.dumps(facts))
    print(f'{len(ids)} of {sum(map(len, families.values()))} trainings, {len(merged)} of {len(jobs)} merges of those')
    if not merged: return
    table = summary(lines({k: merged[k] for k in jobs if k in merged}), load_rows('held'))
    table.to_json(Path(a.out)/'merge_quality.json', orient='records', indent=1)
    print(table.to_string(index=False, float_format=lambda v: f'{v:.4f}'))

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('table')
    p.add_argument('--base', default='smollm2')
    p.add_argument('--int4', action='store_true', help='also train over the base in 4 bits')
    p.add_argument('--seeds', type=int, default=3, help='end of the draws, exclusive')
    p.add_argument('--first', type=int, default=0, help='draw to begin with')
    p.add_argument('--families', nargs='*', default=FAMILIES, choices=FAMILIES)
    p.add_argument('--folds', type=int, default=5)
    p.add_argument('--jobs', type=int, default=4, help='processes on each GPU')
    p.add_argument('--set', type=json.loads, default={}, help='further arguments of every run, as JSON')
    p.add_argument('--until', type=float, default=1e9, help='seconds after which no training or merge is begun')
    p.add_argument('--out', default='.')
    a = p.parse_args()
    measure(a)
