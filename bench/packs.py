"""Planning of steps and packs: python bench/packs.py [rows]

LMSYS-like lengths of at most 2,048 tokens, both views, packs of 16,384 tokens; the aim is 0.5 s for a million rows."""
import sys, time
import numpy as np
import pandas as pd
from competition_kit.pack import contest_lengths, pack, plan_steps

budget = 16384

def timed(f, times=3): # least CPU seconds, result
    took = []
    for _ in range(times):
        start = time.process_time()
        out = f()
        took.append(time.process_time()-start)
    return min(took), out

def first_fit(lengths, budget):
    "First-fit decreasing, as a loop"
    packs, free = [], []
    for i in np.argsort(-lengths, kind='stable'):
        k = next((k for k, f in enumerate(free) if f >= lengths[i]), None)
        if k is None:
            packs.append([i])
            free.append(budget-lengths[i])
        else:
            packs[k].append(i)
            free[k] -= lengths[i]
    return packs

def equal(sizes): # real tokens / (packs x largest pack of the step)
    return sum(s.sum() for s in sizes)/sum(len(s)*s.max() for s in sizes)

def one_rank(enc, n, rows): # packs of steps of so many rows, beside first-fit's
    seconds, steps = timed(lambda: [packs for packs, in plan_steps(enc, rows, 1, budget, 0)])
    some = steps[:6400//rows]
    sizes = [np.array([n[p].sum() for p in packs]) for packs in some]
    lines = [np.concatenate(packs) for packs in some]
    old_seconds, old = timed(lambda: [first_fit(n[l], budget) for l in lines], 1)
    old_sizes = [np.array([n[l][p].sum() for p in packs]) for l, packs in zip(lines, old)]
    packs, old_packs, bound = sum(map(len, sizes)), sum(map(len, old)), sum(-(-s.sum()//budget) for s in sizes)
    return dict(rows_a_step=rows, seconds=seconds, fill=n.sum()/(budget*sum(map(len, steps))),
                packs_to_bound=packs/bound, packs_to_first_fit=packs/old_packs,
                equal=equal(sizes), first_fit_equal=equal(old_sizes),
                first_fit_time=old_seconds*len(steps)/len(some)/seconds)

def eight_ranks(enc, n, rows): # how long ranks wait, with so many rows a rank
    seconds, steps = timed(lambda: plan_steps(enc, 8*rows, 1, budget, 0, ranks=8), 1)
    sizes = [[[n[p].sum() for p in packs] for packs in step] for step in steps[:-1][:4000]]
    work = np.array([[sum(packs) for packs in step] for step in sizes])
    slowest_packs = sum(max(same) for step in sizes for same in zip(*step))
    whole = len(n)//2//(8*rows)*8*rows
    shuffled = np.random.default_rng(0).permutation(n[::2])[:whole].reshape(-1, 8, rows).sum(2)
    return dict(rows_a_rank=rows, rows_a_step=8*rows, seconds=seconds, real_to_slowest=work.sum()/(8*work.max(1).sum()),
                same_pack_by_pack=work.sum()/(8*slowest_packs), undealt=shuffled.sum()/(8*shuffled.max(1).sum()))

def inference(n, budget):
    seconds, packs = timed(lambda: pack(n, budget), 1)
    return dict(budget=budget, seconds=seconds, fill=n.sum()/(budget*len(packs)))

def table(rows): print(pd.DataFrame(rows).round(4).to_string(index=False), flush=True)

if __name__ == '__main__':
    k = int((sys.argv[1:]+['1000000'])[0])
    n = contest_lengths('lmsys', k).repeat(2)
    enc = pd.DataFrame(dict(row=np.arange(k).repeat(2), n=n))
    table([one_rank(enc, n, rows) for rows in (16, 32, 64, 128, 512)])
    table([eight_ranks(enc, n, rows) for rows in (1, 2, 4, 8, 16, 32)])
    table([inference(n, b) for b in (4096, 8192, 16384)])
