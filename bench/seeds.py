"""How far do scores move from seed to seed? Train folds of a table with several seeds and print the spread.


usage: python bench/seeds.py [--mix sample_arena] [--folds 0 1] [--seeds 0 1 2] [--set name=value ...]
(name=v1,v2 tries several values)
Runs are ordinary runs of stage 04_train: they are recorded, continued and found again."""

import argparse, ast, itertools
import pandas as pd
from competition_kit.train import train_fold


def value(v):
    try:
        return ast.literal_eval(v)
    except (ValueError, SyntaxError):
        return v


a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
a.add_argument('--mix', default='sample_arena')
a.add_argument('--folds', type=int, nargs='+', default=[0, 1])
a.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
a.add_argument('--set', nargs='+', default=[], metavar='NAME=VALUE', help='other parameters of the stage')
a = a.parse_args()
grid = {k: [value(o) for o in v.split(',')] for k, v in (s.split('=') for s in a.set)}

out, base = [], {}
for setting in itertools.product(*grid.values()):
    given = dict(zip(grid, setting))
    for fold, seed in itertools.product(a.folds, a.seeds):
        r = train_fold(mix=a.mix, fold=fold, seed=seed, **given).record
        m = r['metrics']
        base[fold] = m['baselines']
        out.append(
            dict(
                **given,
                fold=fold,
                seed=seed,
                **{k: m[k] for k in ('log_loss', 'accuracy', 'ece')},
                minutes=r['minutes'],
                peak_gib=r['peak_gib'],
                device=r['device'],
            )
        )
d = pd.DataFrame(out)
by_seed = d.groupby([*grid, 'seed'])[
    ['log_loss', 'accuracy', 'ece', 'minutes']
].mean()  # mean over folds, a line a seed
print(d.to_string(index=False))
print('\nmean over folds, then mean and standard deviation over seeds')
print(
    (by_seed.groupby(list(grid)) if grid else by_seed.groupby(lambda _: a.mix))
    .agg(['mean', 'std'])
    .round(3)
    .to_string()
)
print('\nbaselines, mean over folds')
print(pd.concat({f: pd.DataFrame(b).T for f, b in base.items()}).groupby(level=1).mean().round(3).to_string())
