"Packs and steps: budgets, both views in a step, seeds, ranks, phases"
import os, subprocess, sys
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from competition_kit.core import Refusal
from competition_kit.pack import contest_lengths, pack, plan_steps, shared_prefix

def lines(k, views=2, seed=0):
    "What `Prompt.encode` says of rows, without their tokens"
    n = np.random.default_rng(seed).integers(5, 300, k).repeat(views)
    return pd.DataFrame(dict(row=np.arange(k).repeat(views), view=np.tile(np.arange(views), k), n=n))

def arena(k, seed=0):
    n = contest_lengths('lmsys', k, seed=seed).repeat(2)
    return pd.DataFrame(dict(row=np.arange(k).repeat(2), view=np.tile([0, 1], k), n=n))

def of_one_rank(*args, **kw): return [packs for packs, in plan_steps(*args, **kw)]
def as_lists(steps): return [[p.tolist() for p in packs] for packs in steps]

@settings(max_examples=100)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=4))
def test_shared_prefix(ids):
    got = shared_prefix([np.array(i) for i in ids])
    want = 0
    if len(ids) > 1:
        while want < min(map(len, ids))-1 and len({tuple(i[:want+1]) for i in ids}) == 1: want += 1
    assert got == want

# ---- packs
@settings(max_examples=100)
@given(st.lists(st.integers(1, 300), max_size=80), st.integers(50, 400))
def test_pack(n, budget):
    packs = pack(n, budget)
    longest = [max(n[i] for i in p) for p in packs]
    assert sorted(int(i) for p in packs for i in p) == list(range(len(n)))
    for p in packs: assert sum(n[i] for i in p) <= budget or len(p) == 1
    assert longest == sorted(longest, reverse=True)
    assert sum(sum(n[i] for i in p) <= budget/2 for p in packs) <= 1
    assert [p.tolist() for p in pack(pd.Series(n, dtype=int), budget)] == [p.tolist() for p in packs]

def test_packs_of_nothing():
    assert pack([], 10) == []
    assert [p.tolist() for p in pack([0, 0], 10)] == [[0, 1]]
    assert pack([5000, 10], 1024)[0].tolist() == [0]

@pytest.mark.parametrize('budget', [2048, 4096, 8192])
def test_packs_are_full(budget):
    for seed in range(5):
        n = np.random.default_rng(seed).lognormal(6.5, .8, 2000).astype(int).clip(20, 2048)
        assert n.sum()/(budget*len(pack(n, budget))) >= .9

def test_packs_of_a_step_are_few_and_equal():
    enc = arena(16384)
    n = enc.n.to_numpy()
    for rows in (32, 128, 512):
        sizes = [np.array([n[p].sum() for p in packs]) for packs in of_one_rank(enc, rows, 1, 16384, 0)]
        packs = sum(map(len, sizes))
        assert packs <= 1.02*sum(-(-s.sum()//16384) for s in sizes)
        assert n.sum() >= .98*sum(len(s)*s.max() for s in sizes)
    assert n.sum() >= .97*16384*packs  # steps of 512 rows
    assert n.sum() >= .97*16384*len(pack(n, 16384))

# ---- steps
@settings(max_examples=60)
@given(st.integers(1, 40), st.integers(1, 9), st.sampled_from([.2, .5, 1, 1.5, 2, 3]), st.integers(1, 2),
       st.integers(0, 99))
def test_steps(k, rows_a_step, epochs, views, seed):
    enc = lines(k, views)
    steps = of_one_rank(enc, rows_a_step, epochs, 512, seed)
    assert as_lists(steps) == as_lists(of_one_rank(enc, rows_a_step, epochs, 512, seed))
    sizes, total = [sum(map(len, packs)) for packs in steps], round(k*epochs)
    assert sum(sizes) == total*views
    assert all(size == rows_a_step*views for size in sizes[:-1])
    assert not sizes or 0 < sizes[-1] <= rows_a_step*views
    for packs in steps:
        for p in packs: assert enc.n[p].sum() <= 512 or len(p) == 1
        used = enc.iloc[np.concatenate(packs)]
        for _, same_row in used.groupby('row'):
            assert same_row['view'].nunique() == views, 'both views of a row belong to one step'
            assert len(same_row) % views == 0
    times = enc.row[np.concatenate([p for packs in steps for p in packs])].value_counts()/views if steps else []
    assert set(times) <= {np.floor(epochs), np.ceil(epochs)}-{0.}

def test_steps_follow_their_seed():
    enc = lines(30)
    def rows(**kw):
        kw = dict(rows_a_step=4, epochs=2, budget=512, seed=0) | kw
        return [sorted(enc.row[np.concatenate(packs)]) for packs in of_one_rank(enc, **kw)]
    assert rows() != rows(seed=1)
    assert rows() == rows(budget=4096), 'the budget decides packs, not steps'
    assert rows()[:7] == rows(epochs=1)[:7], 'a longer training begins like a shorter one'

def test_steps_are_the_same_in_every_process():
    code = ('import pandas as pd, numpy as np; from competition_kit.pack import plan_steps\n'
            'enc = pd.DataFrame(dict(row=np.arange(30).repeat(2), n=9))\n'
            'print([p.tolist() for packs, in plan_steps(enc, 4, 1, 99, 5) for p in packs])')
    def said(seed):
        env = dict(os.environ, PYTHONHASHSEED=seed)
        return subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, check=True).stdout
    enc = pd.DataFrame(dict(row=np.arange(30).repeat(2), n=9))
    assert said('1').strip() == str([p for packs in as_lists(of_one_rank(enc, 4, 1, 99, 5)) for p in packs])

def test_steps_of_nothing():
    assert plan_steps(lines(0), 4, 1, 512, 0) == []
    assert plan_steps(lines(1), 4, .2, 512, 0) == []

def test_steps_of_odd_rows():
    with pytest.raises(Refusal, match='fewer views'): plan_steps(lines(5).iloc[1:], 2, 1, 512, 0)
    with pytest.raises(Refusal, match='fewer views'): plan_steps(lines(6).iloc[[0, 1, 2, 3, 4, 6]], 2, 1, 512, 0)
    part = lines(20)
    part = part[part.row % 3 > 0].reset_index(drop=True)  # of a fold, with the positions of the whole table
    steps = of_one_rank(part, 4, 1, 512, 0, phase=np.arange(20) >= 10)
    assert sorted(np.concatenate([p for packs in steps for p in packs])) == list(range(len(part)))
    assert set(part.row[np.concatenate(steps[0])]) <= set(range(10))
    mixed = lines(9).sample(frac=1, random_state=0)
    for packs in of_one_rank(mixed, 3, 1, 512, 0):
        assert mixed.row.iloc[np.concatenate(packs)].value_counts().tolist() == [2, 2, 2]

def test_phases():
    phase = np.random.default_rng(0).integers(0, 3, 50)*5-2
    enc = lines(50)
    for epochs, ranks in ((1, 1), (2, 1), (1.5, 2)):
        steps = [sum(step, []) for step in plan_steps(enc, 4, epochs, 512, 3, ranks=ranks, phase=phase)]
        seen = [set(phase[enc.row[np.concatenate(packs)]]) for packs in steps]
        assert all(len(phases) == 1 for phases in seen), 'a step mixes phases'
        assert seen == sorted(seen, key=min)
        rows = enc.row[np.concatenate([p for packs in steps for p in packs])]
        for p in set(phase): assert (phase[rows] == p).sum() == 2*round((phase == p).sum()*epochs)
    def plan(**kw): return as_lists(of_one_rank(enc, 4, 1, 512, 3, **kw))
    assert plan() == plan(phase=np.zeros(50, int)) == plan(phase=[7]*50)
    with pytest.raises(Refusal, match='takes none of the 3 rows of a phase'):
        plan_steps(enc, 4, .1, 512, 3, phase=[0]*47+[1]*3)

# ---- ranks
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 4), st.integers(2, 5), st.sampled_from([.5, 1, 2]), st.integers(1, 2),
       st.sampled_from([150, 512, 4096]), st.integers(0, 99))
def test_steps_of_ranks(k, rows_a_rank, ranks, epochs, views, budget, seed):
    enc, size = lines(k, views, seed), rows_a_rank*ranks
    one, many = (plan_steps(enc, size, epochs, budget, seed, ranks=r) for r in (1, ranks))
    def sequences(packs): return sorted(np.concatenate([np.empty(0, int), *packs]).tolist())
    assert len(one) == len(many)
    for at, ((alone,), step) in enumerate(zip(one, many)):
        assert sequences(alone) == sequences([p for packs in step for p in packs]), 'other rows in this step'
        assert len(step) == ranks
        rows = [enc.row[sequences(packs)] for packs in step]
        assert all((r.value_counts() % views == 0).all() for r in rows), 'the views of a row are on two ranks'
        n = [len(r)//views for r in rows]
        assert max(n)-min(n) <= 1
        assert at == len(many)-1 or set(n) == {rows_a_rank}
        if min(n) == max(n): assert len(set(map(len, step))) == 1, 'a rank has fewer packs'
        for packs in step:
            for p in packs: assert len(p) and (enc.n[p].sum() <= budget or len(p) == 1)

def test_ranks_have_equal_work():
    for seed in range(3):
        enc = arena(8192, seed)
        n = enc.n.to_numpy()
        steps = plan_steps(enc, 128, 1, 16384, seed, ranks=8)
        work = np.array([[sum(n[p].sum() for p in packs) for packs in step] for step in steps])
        assert work.sum()/(8*work.max(1).sum()) >= .99

def test_rows_that_ranks_cannot_share():
    with pytest.raises(Refusal, match='multiple of 3'): plan_steps(lines(9), 8, 1, 512, 0, ranks=3)
