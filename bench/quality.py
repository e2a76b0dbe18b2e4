"""Log-loss and accuracy on real rows: every fold of a table under several settings, beside the table's baselines.

usage: python bench/quality.py NAME=FILE [NAME=FILE ...] [--settings 'ROUTE, METHOD[, LEVER ...]' ...]
           [--folds 0 1 2 3 4] [--seeds 0] [--jobs 2] [--set name=value ...] [--until SECONDS] [--out FOLDER]
       python bench/quality.py --read FOLDER [FOLDER ...]
The first table is trained on and held out fold by fold; further ones may be mixed in by a setting.
Each run is `train_fold` in a root of its own; a GPU is shared by `--jobs` processes.
The predictions of every run go to FOLDER/said.parquet, so that the table can be made again. Log-loss and
accuracy are of all rows, each predicted by the model that had not seen it; "tempered" divides log-probabilities by a
temperature fitted on the other folds."""

import argparse, ast, contextlib, io, json, multiprocessing, os, sys, tempfile, time, traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '2')  # many processes share the cores
import numpy as np
import pandas as pd

COMMON = dict(
    max_len=640,
    batch=32,
    pack_tokens=32768,
    warmup=0.1,
    schedule='cosine',
    save_every=10**6,
    epochs=2.0,
    recompute=0,
    compiled='yes',
    dtype='bf16',
)
METHODS = {'full': dict(method='full', lr=1e-4, clip=0.0), 'LoRA': dict(lr=1e-3, lora_r=16, lora_alpha=32)}
LEVERS = {
    'nf4': dict(dtype='nf4'),
    'one view': dict(views=1),
    'cut left': dict(truncation='left'),
    'cut right': dict(truncation='right'),
    '1024 tokens': dict(max_len=1024),
    'dropout .1': dict(lora_dropout=0.1),
    'decay .1': dict(weight_decay=0.1),
    '1 epoch': dict(epochs=1.0),
    '3 epochs': dict(epochs=3.0),
    '5 epochs': dict(epochs=5.0),
    'hard labels': dict(mix='{0}_hard'),
    'more rows': dict(mix='{0} + {1}'),
    **{f'lr {x}': dict(lr=float(x)) for x in '1e-5 2e-5 3e-5 5e-5 1e-4 2e-4 5e-4 1e-3 2e-3'.split()},
}


def setting(name):  # parameters of `train_fold`
    route, method, *levers = name.split(', ')
    out = dict(METHODS[method], route=route)
    for n in levers:
        out |= LEVERS[n]
    return out


def value(s):
    try:
        return ast.literal_eval(s)
    except (ValueError, SyntaxError):
        return s


def begin(root, cards, counter):
    with counter.get_lock():
        counter.value += 1
        k = counter.value
    os.environ.update(CK_ROOT=root, CUDA_VISIBLE_DEVICES=cards[k % len(cards)], TOKENIZERS_PARALLELISM='false')
    import competition_kit.train as train

    train.baselines = lambda *a: {}  # once a fold, below, not once a run


def one(setting, params):
    from competition_kit.train import held_out, train_fold

    t = time.time()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            run = train_fold(**params)
            rows, p = held_out(run)
    except Exception:
        return traceback.format_exc()[-900:]
    m = run.record['metrics']
    print(
        f"{setting} | fold {params['fold']} seed {params['seed']}: "
        f"{m['log_loss']:.4f} {m['accuracy']:.4f} {m['ece']:.3f}  "
        f"{run.record['tokens_s']:.0f} tokens/s, {time.time() - t:.0f} s",
        flush=True,
    )
    return pd.DataFrame(
        dict(setting=setting, fold=params['fold'], seed=params['seed'], id=rows.id, label=rows.label, p=list(p))
    )


def guesses(table, fold):
    from competition_kit.probs import baselines
    from competition_kit.tables import load_rows
    from competition_kit.folds import fold_rows

    rows = load_rows(table)
    return len(rows[rows.fold == fold]), baselines(*fold_rows(rows, fold), rows.attrs['meta']['task'])


def tempered(d):  # log-loss and mean temperature: each fold with the temperature that suits the other folds
    from competition_kit.probs import fit_temperature, log_loss, temper

    p, y, out, ts = np.stack(d.p), d.label.to_numpy(), 0, []
    for f in d.fold.unique():
        mine = (d.fold == f).to_numpy()
        ts.append(fit_temperature(p[~mine], y[~mine]))
        out += log_loss(temper(p[mine], ts[-1]), y[mine]) * mine.sum() / len(d)
    return out, np.mean(ts)


def line(d):  # scores of rows that were all predicted by models that had not seen them; `d` has one line a row
    from competition_kit.probs import scores

    p, y = np.stack(d.p), d.label.to_numpy()
    out = scores(p, y)
    if p.shape[1] == 3:
        out['decided'] = ((p[y < 2, 1] > p[y < 2, 0]) == y[y < 2]).mean()  # A or B, on rows that are no tie
    return dict(out, **dict(zip(('tempered', 'T'), tempered(d) if d.fold.nunique() > 1 else (np.nan, np.nan))))


def voted(d):  # the mean of several predictions of a row
    p = d.groupby('id', sort=False).p.apply(lambda v: np.mean(list(v), 0))
    return d.drop_duplicates('id').drop(columns='p').merge(p.reset_index(), on='id')


def table(*folders):
    from competition_kit.probs import log_loss

    d, out = pd.concat([pd.read_parquet(Path(f) / 'said.parquet') for f in folders], ignore_index=True), []
    most = d.groupby('setting').id.nunique()
    for name, s in d.groupby('setting', sort=False):
        seeds = [g for _, g in s.groupby('seed') if len(g) == most[name]]
        each = pd.DataFrame(map(line, seeds))
        folds = [
            g.groupby('fold').apply(lambda f: log_loss(np.stack(f.p), f.label.to_numpy()), include_groups=False).std()
            for g in seeds
        ]
        out.append(
            dict(
                setting=name,
                folds=s.fold.nunique(),
                seeds=len(seeds),
                **each.mean(),
                sd=each.log_loss.std(),
                acc_sd=each.accuracy.std(),
                fold_sd=np.mean(folds),
            )
        )
        if len(seeds) > 1:
            out.append(
                dict(
                    setting=f'{name}: vote of its seeds',
                    folds=s.fold.nunique(),
                    seeds=len(seeds),
                    **line(voted(pd.concat(seeds))),
                )
            )
    whole = [n for n in most.index if most[n] == most.max()]
    if len(whole) > 1:
        out.append(
            dict(setting=f'vote of {len(whole)}', folds=d.fold.nunique(), **line(voted(d[d.setting.isin(whole)])))
        )
    got = json.loads((Path(folders[0]) / 'baselines.json').read_text())
    for name in got[0][1] if got else ():
        w = np.array([n for n, _ in got])
        out.append(
            dict(
                setting=name,
                folds=len(got),
                **{
                    k: float(np.average([b[name][k] for _, b in got], weights=w))
                    for k in ('log_loss', 'accuracy', 'ece')
                },
            )
        )
    cols = [
        c
        for c in 'setting folds seeds log_loss sd fold_sd tempered T accuracy acc_sd decided ece'.split()
        if c in pd.DataFrame(out)
    ]
    print(pd.DataFrame(out)[cols].to_string(index=False, float_format=lambda v: f'{v:.4f}', na_rep=''))


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('tables', nargs='*')
    p.add_argument(
        '--settings',
        nargs='+',
        default=['answer, full', 'answer, LoRA', 'score, full', 'score, LoRA'],
        help='ROUTE, METHOD and any LEVERS, separated by commas',
    )
    p.add_argument('--folds', type=int, nargs='+', default=list(range(5)))
    p.add_argument('--seeds', type=int, nargs='+', default=[0])
    p.add_argument('--jobs', type=int, default=2)
    p.add_argument('--set', nargs='*', default=[])
    p.add_argument('--out', default='.')
    p.add_argument('--read', nargs='+')
    p.add_argument('--until', type=float, default=1e9, help='seconds after which no run is begun')
    a = p.parse_args()
    if a.read:
        table(*a.read)
        sys.exit()
    began, folder = time.time(), Path(a.out)
    folder.mkdir(parents=True, exist_ok=True)
    from competition_kit.core import bases_path, data_path
    from competition_kit.tables import split, write_rows

    os.environ.update(CK_BASES=str(bases_path()), CK_ROOT=tempfile.mkdtemp())
    data_path().mkdir(parents=True)
    names = []
    for name, file in (o.split('=') for o in a.tables):
        rows, _ = split(str(Path(file).resolve()))
        write_rows(rows, data_path(f'{name}.parquet'), task=rows.attrs['meta']['task'])
        write_rows(rows.assign(target=None), data_path(f'{name}_hard.parquet'), task=rows.attrs['meta']['task'])
        names.append(name)
    import torch

    spawn, cards = (
        multiprocessing.get_context('spawn'),
        (os.environ.get('CUDA_VISIBLE_DEVICES') or ','.join(map(str, range(max(1, torch.cuda.device_count()))))).split(
            ','
        ),
    )
    pool = ProcessPoolExecutor(a.jobs * len(cards), spawn, begin, (os.environ['CK_ROOT'], cards, spawn.Value('i', -1)))
    more = {k: value(v) for k, v in (o.split('=', 1) for o in a.set)}
    jobs = [
        (n, {**COMMON, 'mix': names[0], 'fold': f, 'seed': s, **setting(n), **more})
        for s in a.seeds
        for n in a.settings
        for f in a.folds
    ]
    todo, said = [], []
    for n, d in jobs:
        todo.append(pool.submit(one, n, dict(d, mix=d['mix'].format(*names))))
    with ProcessPoolExecutor(2, spawn) as cpu:
        base = list(cpu.map(guesses, [names[0]] * len(a.folds), a.folds))
    (folder / 'baselines.json').write_text(json.dumps(base))
    for r in as_completed(todo):
        if r.cancelled():
            continue
        if isinstance(r.result(), str):
            print('FAILED', r.result(), flush=True)
        else:
            said.append(r.result())
            pd.concat(said).to_parquet(folder / 'said.parquet')
        if time.time() - began > a.until:
            [t.cancel() for t in todo]
    if said:
        table(folder)
