"""How long do nine voters take beside one, and does the forecast of a vote under a budget hold?

usage: python bench/vote_gpu.py open=FILE alpaca=FILE --teacher BASE [--what cascade nine forecasts gpus] [--seeds 3]
           [--set JSON] [--pack-tokens 32768] [--gpus 2] [--engines packs vllm] [--memory GB] [--jobs 4] [--small]
cascade: the 135M, then the teacher for as many rows as are worth it; nine: below; forecasts: six votes of the nine;
gpus: voters without a score head by packs on one GPU, then by packs and by vLLM on `--gpus`, one process each.
`--small`: 60 rows and one seed, for a CPU.
Nine voters (fold 0 of the three families of `vote_quality.py`, three seeds) predict the rows of the second file. They
are trained if they do not lie in CK_ROOT. Aims: nine voters at most 6 times one, with the answers of the full vote in
99.9 % of the rows; predicted within 15 % of the measured minutes."""
import argparse, contextlib, io, json, os, tempfile
from pathlib import Path

import distill
import numpy as np
from common import report, results, timed, workers
from vote_quality import FAMILIES, TEACHER, jobs

def make_tables(files): # as distill.py makes them
    from competition_kit.core import bases_path, data_path
    from competition_kit.tables import split
    os.environ.update(CK_BASES=str(bases_path()), CK_ROOT=os.environ.get('CK_ROOT') or tempfile.mkdtemp())
    data_path().mkdir(parents=True, exist_ok=True)
    for part in files:
        name, file = part.split('=')
        if not data_path(f'{name}.parquet').exists(): distill.write_tables(name, split(str(Path(file).resolve()))[0])

def first_rows(table, n=60): # the same `name=FILE` with a file of its first rows
    import pandas as pd
    name, file = table.split('=')
    small = Path(tempfile.mkdtemp())/Path(file).name
    pd.read_parquet(file).head(n).to_parquet(small)
    return f'{name}={small}'

def begin(): # in a process that trains
    import competition_kit.record as record
    import competition_kit.train as train
    train.baselines = lambda *a: {}
    record.after_run.clear()  # no workbook

def fit(args):
    from competition_kit.train import train_fold
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return train_fold(**args).id

def trained(a): # line → runs of fold 0
    wanted = [(line, args) for line, args in jobs(1, a.seeds) if line != TEACHER or 'cascade' in a.what]
    with workers(a.jobs, begin) as pool:
        for _ in results(pool, fit, [(args,) for _, args in wanted]): pass
    out = {}
    for line, args in wanted: out.setdefault(line, []).append(fit(args))  # they are finished
    return out

def held(runs, a, **how): # (record, [rows, options], seconds) of a vote
    from competition_kit.probs import read_probs
    from competition_kit.record import run_stage
    from competition_kit.vote import VoteArgs, vote
    args = VoteArgs(data='open', runs=' '.join(runs), pack_tokens=a.pack_tokens, budget=60, test=a.test, **how)
    with contextlib.redirect_stderr(io.StringIO()): run, seconds = timed(run_stage, vote, args)
    return run.record, np.stack(read_probs(run.folder/'votes.parquet').p), seconds

def watch(): # print what a forecast knew, and how long each run then took: seconds to load, and for 100,000 tokens
    import competition_kit.vote as vote
    from competition_kit.predictions import BallotAsker
    plain, load, ask, took = vote.forecast, BallotAsker.load, BallotAsker.ask_views, {}
    def told(asker, *how):
        report(what='a forecast knows', used=asker.clock.used(), loads=np.round(asker.expected()[1], 3).tolist(),
               pieces=[round(s/u*1e5, 4) for u, s in asker.clock.pieces])
        return plain(asker, *how)
    def timed_load(asker, k):
        _, seconds = timed(load, asker, k)
        took.setdefault(asker.names[k], []).append(round(seconds, 3))
    def timed_ask(asker, k, at, views):
        p, seconds = timed(ask, asker, k, at, views)
        took[asker.names[k]].append(round(seconds/asker.sizes[at].sum()*1e5, 4))
        return p
    vote.forecast, BallotAsker.load, BallotAsker.ask_views = told, timed_load, timed_ask
    return took

def forecast(what, record, seconds):
    predicted, measured = record['predicted_minutes'], record['vote_minutes']
    report(what=f'forecast: {what}', predicted_minutes=predicted, measured_minutes=measured,
           off_by=predicted/measured-1, seconds_of_the_stage=seconds, share=record.get('share'))

def full_vote(runs, a, took, rule, weights='log'):
    took.clear()
    full, p, seconds = held(runs, a, views=1, rule=rule, weights=weights)
    forecast(f'{len(runs)} voters, {rule}', full, seconds)
    report(what='seconds to load, then of each piece for 100,000 tokens', runs=list(took.values()))
    return full, p, seconds

def forecasts(runs, a, rounds=3): # of the same vote, whose equal weights are other numbers each time: it is done anew
    held(runs[:1], a, views=1)  # kernels and caches are warm
    took = watch()
    for k in range(2, rounds+2):
        for rule in ('mean', 'majority'): full_vote(runs, a, took, rule, ' '.join([str(k)]*len(runs)))

def nine_over_one(runs, a):
    held(runs[:1], a, views=1)  # kernels and caches are warm
    took = watch()
    one, _, seconds = held(runs[:1], a, views=1, weights='1')
    report(what='one voter', rows=one['missing']['rows'], minutes=one['vote_minutes'], seconds_of_the_stage=seconds)
    for rule, changes in dict(mean=(.001, .01), majority=(.001,)).items():
        full, p, seconds = full_vote(runs, a, took, rule)
        for change in changes:
            some, q, seconds = held(runs, a, views=1, rule=rule, change=change)
            report(what=f'{len(runs)} voters one after another, {rule}, change {change:g}',
                   voters_a_row=some['runs_per_row'], times_one=some['vote_minutes']/one['vote_minutes'],
                   full_times_one=full['vote_minutes']/one['vote_minutes'],
                   same_answers=float((p.argmax(1) == q.argmax(1)).mean()), seconds_of_the_stage=seconds)

def a_cascade(runs, a):
    small, large = runs['labels'][0], runs[TEACHER][0]
    cascade, _, seconds = held([small, large], a, weights='1 2.5', rescore=0)
    forecast('a cascade', cascade, seconds)

def several_gpus(runs, a):
    one, p, _ = held(runs, a, views=1)
    for engine in a.engines:
        record, q, seconds = held(runs, a, views=1, engine=engine, gpus=a.gpus, max_memory_gb=a.memory)
        report(what=f'{len(runs)} voters on {a.gpus} GPUs, {engine}', minutes=record['vote_minutes'],
               packs_on_one_gpu=one['vote_minutes'], times_faster=one['vote_minutes']/record['vote_minutes'],
               mean_difference=float(abs(p-q).mean()), largest_difference=float(abs(p-q).max()),
               same_answers=float((p.argmax(1) == q.argmax(1)).mean()), memory_limit_gb=a.memory,
               seconds_of_the_stage=seconds, engines=record.get('engine'))

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('tables', nargs=2)
    p.add_argument('--teacher', default='smollm2')
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--set', type=json.loads, default={}, help='further arguments of every run, as JSON')
    p.add_argument('--pack-tokens', type=int, default=32768)
    p.add_argument('--what', nargs='*', default=['cascade', 'nine'], choices=['cascade', 'nine', 'forecasts', 'gpus'])
    p.add_argument('--gpus', type=int, default=2)
    p.add_argument('--engines', nargs='+', default=['packs', 'vllm'], choices=['packs', 'vllm'])
    p.add_argument('--memory', type=float, default=0., help='limit of a model on several GPUs, in 1e9 bytes')
    p.add_argument('--jobs', type=int, default=4, help='processes a GPU that train')
    p.add_argument('--small', action='store_true')
    a = p.parse_args()
    if a.small: a.seeds, a.pack_tokens, a.tables = 1, 4096, [first_rows(table) for table in a.tables]
    a.test = str(Path(a.tables[1].split('=')[1]).resolve())
    distill.FIT.update(a.set)
    distill.LINES[TEACHER]['args']['base'] = a.teacher
    make_tables(a.tables)
    import competition_kit.vote_score as vote_score
    begin()
    guess = {'class prior': dict(log_loss=1.1, accuracy=.4, ece=0.)}  # these runs were trained without baselines
    vote_score._known_baselines = lambda ballot, rows: {k: guess for k in set(rows.fold)}
    runs = trained(a)
    if 'cascade' in a.what: a_cascade(runs, a)
    if 'nine' in a.what: nine_over_one([r for line in FAMILIES for r in runs[line]], a)
    if 'forecasts' in a.what: forecasts([r for line in FAMILIES for r in runs[line]], a)
    if 'gpus' in a.what: several_gpus(runs['labels']+runs[FAMILIES[1]][:2], a)
