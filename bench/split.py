"Speed of grouping and folding: python bench/split.py [rows]"
import resource, sys, time
import numpy as np, pandas as pd
from competition_kit.split import group_rows, make_folds

def timed(f, *args, **kw):
    t = time.perf_counter()
    out = f(*args, **kw)
    return out, time.perf_counter()-t

def texts(n, planted, rng): # n texts of 45 words in the mean, each of the last `planted` a copy of an earlier one with one or two words changed
    words = np.array([f'{a}{b}{c}' for a in 'bcdfghjklmnprst' for b in 'aeiou' for c in ('n', 'r', 's', 'mo', 'ti', 'lab', 'ker')])
    zipf = 1/np.arange(1, len(words)+1)**.8
    rows = [rng.choice(words, k, p=zipf/zipf.sum()) for k in rng.poisson(45, n-planted).clip(3)]
    copies = []
    for i in range(planted):
        t = rows[i].copy()
        t[rng.integers(0, len(t), rng.integers(1, 3))] = 'changed'
        copies.append(t)
    return [' '.join(t) for t in rows+copies]

def groups(n, rng):
    group = np.repeat(np.arange(n), rng.geometric(.6, n))[:n]
    return np.array([f'{g*7919%2**32:016x}' for g in group], object), rng.choice(3, n, p=[.35, .34, .31])

if __name__ == '__main__':
    n, rng = int((sys.argv[1:] or [100_000])[0]), np.random.default_rng(0)
    t = texts(n, n//20, rng)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    g, took = timed(group_rows, t)
    found = (g[:n//20] == g[-(n//20):]).mean()
    rss = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-before)/n
    print(f'group_rows   {n} rows: {took:.2f} s, {rss:.2f} KB a row, {found:.1%} of the planted copies found, largest group {pd.Series(g).value_counts().iloc[0]}')
    group, label = groups(n, rng)
    fold, took = min((timed(make_folds, group, label) for _ in range(5)), key=lambda o: o[1])
    share = pd.crosstab(fold, label, normalize='index')
    spread = (share-np.bincount(label)/n).abs().to_numpy().max()
    print(f'make_folds   {n} rows: {took:.3f} s, label shares within {spread:.4%}, fold sizes {np.bincount(fold).tolist()}, '
          f'groups cut {(pd.Series(fold).groupby(group).nunique() > 1).sum()}')
    from sklearn.model_selection import StratifiedGroupKFold
    _, slow = timed(lambda: list(StratifiedGroupKFold(5, shuffle=True, random_state=0).split(label, label, group)))
    print(f'scikit-learn {n} rows: {slow:.1f} s, {slow/took:.0f} times as long')
