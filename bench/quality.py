"""How good are the judgements on real rows? Every fold of a table under several settings, beside the table's baselines.

usage: python bench/quality.py NAME=FILE [NAME=FILE ...] [--settings TEXT ...] [--folds 0 1 2 3 4] [--seeds 0] [--jobs 2] [--set name=value ...] [--out FOLDER]
       python bench/quality.py --read FOLDER
The first table is trained on and held out fold by fold; further ones may be mixed in by a setting. Each run is `train_fold` in a root of its own; a GPU is shared by `--jobs` processes. What every run said of
every row goes to FOLDER/said.parquet, so that the table can be made again. Log-loss and accuracy are of all rows, each predicted by the model that had not seen it; "tempered" divides
log-probabilities by a temperature fitted on the other folds."""
import argparse, ast, contextlib, io, json, multiprocessing, os, sys, tempfile, time, traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '2')  # many processes share the cores
import numpy as np
import pandas as pd

COMMON = dict(max_len=1024, batch=32, pack_tokens=32768, warmup=.1, schedule='cosine', save_every=10**6, epochs=3., recompute=0, compiled='yes', dtype='bf16')
FULL, LORA = dict(method='full', lr=5e-5, clip=0.), dict(lr=5e-4, lora_r=16, lora_alpha=32)
SETTINGS = {
    'answer, full':               FULL,
    'score, full':                dict(FULL, route='score'),
    'score2, full':               dict(FULL, route='score2'),
    'answer, LoRA':               LORA,
    'score, LoRA':                dict(LORA, route='score'),
    'answer, LoRA, nf4':          dict(LORA, dtype='nf4'),
    'answer, LoRA, dropout .1':   dict(LORA, lora_dropout=.1),
    'answer, full, one view':     dict(FULL, views=1),
    'answer, LoRA, one view':     dict(LORA, views=1),
    'answer, full, cut left':     dict(FULL, truncation='left'),
    'answer, full, cut right':    dict(FULL, truncation='right'),
    'answer, full, 512 tokens':   dict(FULL, max_len=512),
    'answer, full, 1536 tokens':  dict(FULL, max_len=1536),
    'answer, full, 1 epoch':      dict(FULL, epochs=1.),
    'answer, full, 2 epochs':     dict(FULL, epochs=2.),
    'answer, full, 5 epochs':     dict(FULL, epochs=5.),
    'answer, full, lr 2e-5':      dict(FULL, lr=2e-5),
    'answer, full, lr 1e-4':      dict(FULL, lr=1e-4),
    'answer, full, lr 2e-4':      dict(FULL, lr=2e-4),
    'answer, LoRA, lr 2e-4':      dict(LORA, lr=2e-4),
    'answer, LoRA, lr 1e-3':      dict(LORA, lr=1e-3),
    'score, LoRA, lr 1e-3':       dict(LORA, lr=1e-3, route='score'),
    'answer, LoRA r 64, lr 5e-4': dict(LORA, lora_r=64, lora_alpha=128),
    'answer, full, more rows':    dict(FULL, mix='{0} + {1}'),
    'score, full, more rows':     dict(FULL, mix='{0} + {1}', route='score'),
    'answer, LoRA, more rows':    dict(LORA, mix='{0} + {1}'),
    'score, LoRA, more rows':     dict(LORA, mix='{0} + {1}', route='score'),
    'answer, full, first others': dict(FULL, mix='{1} > {0}'),
}

def value(s):
    try: return ast.literal_eval(s)
    except (ValueError, SyntaxError): return s

def begin(root, gpus, counter):
    with counter.get_lock(): counter.value += 1; k = counter.value
    os.environ.update(CK_ROOT=root, CUDA_VISIBLE_DEVICES=str(k % gpus), TOKENIZERS_PARALLELISM='false')
    import competition_kit.train as train
    train.baselines = lambda *a: {}  # once a fold, below, not once a run

def one(setting, params):
    from competition_kit.train import held_out, train_fold
    t = time.time()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            run = train_fold(**params)
            rows, p = held_out(run)
    except Exception: return traceback.format_exc()[-900:]
    m = run.record['metrics']
    print(f"{setting} | fold {params['fold']} seed {params['seed']}: {m['log_loss']:.4f} {m['accuracy']:.4f} {m['ece']:.3f}  {run.record['tokens_s']:.0f} tokens/s, {time.time()-t:.0f} s", flush=True)
    return pd.DataFrame(dict(setting=setting, fold=params['fold'], seed=params['seed'], id=rows.id, label=rows.label, p=list(p)))

def guesses(table, fold):
    from competition_kit.probs import baselines
    from competition_kit.split import load_rows
    from competition_kit.train import fold_rows
    rows = load_rows(table)
    return len(rows[rows.fold == fold]), baselines(*fold_rows(rows, fold), rows.attrs['meta']['task'])

def tempered(d): # log-loss and mean temperature: each fold with the temperature that suits the other folds
    from competition_kit.probs import fit_temperature, log_loss, temper
    p, y, out, ts = np.stack(d.p), d.label.to_numpy(), 0, []
    for f in d.fold.unique():
        mine = (d.fold == f).to_numpy()
        ts.append(fit_temperature(p[~mine], y[~mine]))
        out += log_loss(temper(p[mine], ts[-1]), y[mine])*mine.sum()/len(d)
    return out, np.mean(ts)

def table(folder):
    from competition_kit.probs import scores
    d, out = pd.read_parquet(Path(folder)/'said.parquet'), []
    for name, s in d.groupby('setting', sort=False):
        seeds = [dict(scores(np.stack(g.p), g.label), **dict(zip(('tempered', 'T'), tempered(g) if g.fold.nunique() > 1 else (np.nan, np.nan)))) for _, g in s.groupby('seed')]
        folds = s.groupby(['seed', 'fold']).apply(lambda g: scores(np.stack(g.p), g.label)['log_loss'], include_groups=False)
        m, sd = pd.DataFrame(seeds).mean(), pd.DataFrame(seeds).std(ddof=0)
        out.append(dict(setting=name, folds=s.fold.nunique(), seeds=len(seeds), log_loss=m.log_loss, sd=sd.log_loss, fold_sd=folds.groupby('seed').std(ddof=0).mean(), accuracy=m.accuracy, acc_sd=sd.accuracy,
                        ece=m.ece, tempered=m.tempered, T=m['T']))
    got = json.loads((Path(folder)/'baselines.json').read_text())
    for name in got[0][1] if got else ():
        w = np.array([n for n, _ in got])
        out.append(dict(setting=name, folds=len(got), **{k: float(np.average([b[name][k] for _, b in got], weights=w)) for k in ('log_loss', 'accuracy', 'ece')}))
    print(pd.DataFrame(out).to_string(index=False, float_format=lambda v: f'{v:.4f}'))

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('tables', nargs='*'); p.add_argument('--settings', nargs='+'); p.add_argument('--folds', type=int, nargs='+', default=list(range(5))); p.add_argument('--seeds', type=int, nargs='+', default=[0])
    p.add_argument('--jobs', type=int, default=2); p.add_argument('--set', nargs='*', default=[]); p.add_argument('--out', default='.'); p.add_argument('--read'); p.add_argument('--until', type=float, default=1e9, help='seconds after which no run is begun')
    a = p.parse_args()
    if a.read: table(a.read); sys.exit()
    began, folder = time.time(), Path(a.out)
    folder.mkdir(parents=True, exist_ok=True)
    from competition_kit.core import bases_path, data_path
    from competition_kit.split import split, write_rows
    os.environ.update(CK_BASES=str(bases_path()), CK_ROOT=tempfile.mkdtemp())
    data_path().mkdir(parents=True)
    names = []
    for name, file in (o.split('=') for o in a.tables):
        rows, _ = split(str(Path(file).resolve()))
        write_rows(rows, data_path(f'{name}.parquet'), task=rows.attrs['meta']['task'])
        names.append(name)
    import torch
    spawn, gpus = multiprocessing.get_context('spawn'), max(1, torch.cuda.device_count())
    pool = ProcessPoolExecutor(a.jobs*gpus, spawn, begin, (os.environ['CK_ROOT'], gpus, spawn.Value('i', -1)))
    more = {k: value(v) for k, v in (o.split('=', 1) for o in a.set)}
    jobs = [(n, {**COMMON, 'mix': names[0], 'fold': f, 'seed': s, **SETTINGS[n], **more}) for s in a.seeds for n in (a.settings or SETTINGS) for f in a.folds]
    todo, said = [], []
    for n, d in jobs: todo.append(pool.submit(one, n, dict(d, mix=d['mix'].format(*names))))
    with ProcessPoolExecutor(2, spawn) as cpu: base = list(cpu.map(guesses, [names[0]]*len(a.folds), a.folds))
    (folder/'baselines.json').write_text(json.dumps(base))
    for r in as_completed(todo):
        if r.cancelled(): continue
        if isinstance(r.result(), str): print('FAILED', r.result(), flush=True)
        else:
            said.append(r.result())
            pd.concat(said).to_parquet(folder/'said.parquet')
        if time.time()-began > a.until: [t.cancel() for t in todo]
    table(folder)
