"Planning of steps and packs: python bench/packs.py [rows]; arena lengths cut at 2,048, both views, packs of 16,384 tokens; 0.5 s is the aim for a million rows"
import sys, time
import numpy as np
import pandas as pd
from competition_kit.pack import contest_lengths, pack, plan_steps

def timed(f, times=3):
    took = []
    for _ in range(times):
        t = time.process_time(); out = f()
        took.append(time.process_time()-t)
    return min(took), out

def first_fit(lengths, budget):
    "First-fit decreasing, as a loop"
    packs, free = [], []
    for i in np.argsort(-lengths, kind='stable'):
        k = next((k for k, f in enumerate(free) if f >= lengths[i]), None)
        if k is None: packs.append([i]); free.append(budget-lengths[i])
        else: packs[k].append(i); free[k] -= lengths[i]
    return packs

def table(rows): print(pd.DataFrame(rows).round(4).to_string(index=False), flush=True)

if __name__ == '__main__':
    k, budget = int((sys.argv[1:]+['1000000'])[0]), 16384
    n = contest_lengths('lmsys', k).repeat(2)
    enc, out = pd.DataFrame(dict(row=np.arange(k).repeat(2), n=n)), []
    for rows in (16, 32, 64, 128, 512):
        t, steps = timed(lambda: [s for (s,) in plan_steps(enc, rows, 1, budget, 0)])
        some = steps[:6400//rows]
        sizes = [np.array([n[p].sum() for p in s]) for s in some]
        old, classic = timed(lambda: [first_fit(n[np.concatenate(s)], budget) for s in some], 1)
        classic = [np.array([n[np.concatenate(s)][p].sum() for p in c]) for s, c in zip(some, classic)]
        equal = lambda sizes: sum(s.sum() for s in sizes)/sum(len(s)*s.max() for s in sizes)
        out.append(dict(rows_a_step=rows, seconds=t, fill=n.sum()/(budget*sum(map(len, steps))), packs_to_bound=sum(map(len, some))/sum(-(-s.sum()//budget) for s in sizes),
                        packs_to_first_fit=sum(map(len, some))/sum(map(len, classic)), equal=equal(sizes), first_fit_equal=equal(classic), first_fit_time=old*len(steps)/len(some)/t))
    table(out); out = []
    for rows in (1, 2, 4, 8, 16, 32):
        t, steps = timed(lambda: plan_steps(enc, 8*rows, 1, budget, 0, ranks=8), 1)
        size = [[[n[p].sum() for p in r] for r in s] for s in steps[:-1][:4000]]
        work, meet = np.array([[sum(r) for r in s] for s in size]), sum(max(p) for s in size for p in zip(*s))
        shuffled = np.random.default_rng(0).permutation(n[::2])[:k//(8*rows)*8*rows].reshape(-1, 8, rows).sum(2)
        out.append(dict(rows_a_rank=rows, rows_a_step=8*rows, seconds=t, real_to_slowest=work.sum()/(8*work.max(1).sum()), same_pack_by_pack=work.sum()/(8*meet),
                        undealt=shuffled.sum()/(8*shuffled.max(1).sum())))
    table(out); out = []
    for b in (4096, 8192, 16384):
        t, packs = timed(lambda: pack(n, b), 1)
        out.append(dict(budget=b, seconds=t, fill=n.sum()/(b*len(packs))))
    table(out)
