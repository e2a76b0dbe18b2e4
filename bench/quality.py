"""How good are the judgements on real rows? Folds of a table under several settings, beside the table's baselines.

usage: python bench/quality.py TABLE [--folds 0 1] [--seeds 0] [--jobs 4] [--only NAME ...]     (TABLE: a split table of this project, `ck run 02_split -p data TABLE`)
Each setting changes the parameters of `train_fold`; runs are recorded under models/ as always, and a finished one is not repeated."""
import argparse, concurrent.futures, json, subprocess, sys
import pandas as pd

COMMON = dict(max_len=1024, batch=16, pack_tokens=16384, warmup=.1, schedule='cosine', save_every=10**6, epochs=2., recompute=0, compiled='no')
SETTINGS = {
    'answer, LoRA':              dict(lr=5e-4, lora_r=16, lora_alpha=32),
    'answer, LoRA, one view':    dict(lr=5e-4, lora_r=16, lora_alpha=32, views=1),
    'score, LoRA':               dict(lr=5e-4, lora_r=16, lora_alpha=32, route='score'),
    'answer, full':              dict(lr=3e-5, method='full', clip=0., dtype='fp32'),
    'score, full':               dict(lr=3e-5, method='full', clip=0., dtype='fp32', route='score'),
    'score2, full, bf16 Kahan':  dict(lr=3e-5, method='full', clip=0., dtype='bf16', route='score2'),
    'answer, LoRA, nf4':         dict(lr=5e-4, lora_r=16, lora_alpha=32, dtype='nf4'),
    'answer, LoRA, cut left':    dict(lr=5e-4, lora_r=16, lora_alpha=32, truncation='left'),
    'answer, LoRA, cut right':   dict(lr=5e-4, lora_r=16, lora_alpha=32, truncation='right'),
    'answer, LoRA, dropout':     dict(lr=5e-4, lora_r=16, lora_alpha=32, lora_dropout=.1),
    'answer, LoRA, 2e-4':        dict(lr=2e-4, lora_r=16, lora_alpha=32),
}
JOB = 'import json,sys; from competition_kit.train import train_fold; r = train_fold(**json.loads(sys.argv[1])); print("RESULT"+json.dumps(r.record["metrics"]))'

def run(args):
    name, params = args
    p = subprocess.run([sys.executable, '-c', JOB, json.dumps(params)], capture_output=True, text=True)
    line = [l for l in p.stdout.splitlines() if l.startswith('RESULT')]
    if not line: print(name, params['fold'], 'FAILED', p.stderr.strip().splitlines()[-3:], flush=True); return None
    m = json.loads(line[0][6:])
    print(f"{name}, fold {params['fold']}, seed {params['seed']}: {m['log_loss']:.4f} {m['accuracy']:.4f} {m['ece']:.4f}  {m['tokens_s']:.0f} tokens/s", flush=True)
    return dict(setting=name, fold=params['fold'], seed=params['seed'], **{k: m[k] for k in ('log_loss', 'accuracy', 'ece')}, baselines=m['baselines'])

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('table'); p.add_argument('--folds', type=int, nargs='+', default=[0, 1]); p.add_argument('--seeds', type=int, nargs='+', default=[0]); p.add_argument('--jobs', type=int, default=4)
    p.add_argument('--only', nargs='+'); p.add_argument('--set', nargs='*', default=[], help='name=value for all settings')
    a = p.parse_args()
    more = {k: json.loads(v) for k, v in (o.split('=') for o in a.set)}
    todo = [(n, dict(COMMON, mix=a.table, fold=f, seed=s, **{**SETTINGS[n], **more})) for s in a.seeds for n in (a.only or SETTINGS) for f in a.folds]
    with concurrent.futures.ThreadPoolExecutor(a.jobs) as pool: got = [r for r in pool.map(run, todo) if r]
    d = pd.DataFrame(got)
    by_seed = d.groupby(['setting', 'seed'], sort=False)[['log_loss', 'accuracy', 'ece']].mean()
    print(by_seed.groupby('setting', sort=False).agg(['mean', 'std']).round(4).to_string())
    base = pd.DataFrame([{(k, m): v[m] for k, v in r['baselines'].items() for m in v} for r in got]).mean()
    print(base.unstack().round(4).to_string())
