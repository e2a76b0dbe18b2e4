"Speed of combining votes: python bench/vote.py [rows] [voters]; 0.2 s is the aim for a million rows and nine voters"

import sys, time
import numpy as np
from competition_kit.combine import combine


def timed(f, times=5):
    def once():
        t = time.perf_counter()
        f()
        return time.perf_counter() - t

    return min(once() for _ in range(times))


if __name__ == '__main__':
    n, k = (int(o) for o in (sys.argv[1:] + ['1000000', '9'][len(sys.argv) - 1 :]))
    p = np.random.default_rng(0).random((k, n, 3), np.float32)
    p /= p.sum(-1, keepdims=True)
    for rule in ('mean', 'logits', 'majority'):
        print(f'{rule:9} {k} voters, {n} rows: {timed(lambda: combine(p, rule=rule)):.3f} s')
    some = p[:, : n // 100]
    import pandas as pd

    slow = timed(lambda: pd.DataFrame(some.argmax(-1).T).mode(axis=1), 1) * 100
    print(f'pandas mode(axis=1), scaled from {n // 100} rows: {slow:.1f} s')
