"Prefix trees: planning, attention, logits and gradients of packs against each sequence alone"
from dataclasses import replace
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, Gemma2Config, LlamaConfig,
                          MistralConfig)
from competition_kit.attention import exact_attention, pack_layout, packed_attention, register_attention
from competition_kit.model import Classifier, add_lora, collate
from competition_kit.pack import Tree, as_tree, least_run, pack, plan_steps, prefix_tree, shared_prefix

# ---- random trees of tokens: runs that depend on all choices before them, then a few tokens of a small alphabet
def sequence(choices, tail, run=least_run):
    runs = [np.random.default_rng([7, *choices[:k]]).integers(3, 500, run+k) for k in range(1, len(choices)+1)]
    return np.concatenate([*runs, [3+t for t in tail]]).astype(np.int32)
some = st.builds(sequence, st.lists(st.integers(0, 1), max_size=3), st.lists(st.integers(0, 1), min_size=1, max_size=4))
packs = st.lists(some, min_size=1, max_size=7)
head = sequence([0, 1, 0], [])
deep = [ # identical, one a prefix of another, one token of difference, nothing in common
    [head, head], [head, head[:-1], head[:20]], [head, np.append(head[:-1], 9).astype(np.int32), sequence([1, 1], [0])],
    [sequence([0, a, b], [a]*k) for a in (0, 1) for b in (0, 1) for k in (1, 3)]]

def on_paths(tree, ids): # for each sequence its tokens' places in the pack
    places = []
    for m, (s, e) in enumerate(zip(tree.ends, tree.ends[1:])):
        before = places[tree.parent[m]] if tree.parent[m] >= 0 else []
        places.append([*before, *range(s, e)])
    return [places[k] for k in tree.leaf]

@settings(max_examples=100, deadline=None)
@given(packs, st.sampled_from([1, 4, least_run]))
def test_a_tree_holds_every_sequence(ids, least):
    tree = prefix_tree(ids, least)
    tokens = np.concatenate([ids[k][a:b] for k, a, b in zip(tree.sequence, tree.start, tree.stop)])
    paths = on_paths(tree, ids)
    for i, path in zip(ids, paths):
        assert tokens[path].tolist() == i.tolist()
        assert tree.position[path].tolist() == list(range(len(i)))
    assert len({int(k) for k in tree.leaf}) == len(ids), 'the last token of each is its own'
    assert [p[-1] for p in paths] == tree.last.tolist()
    assert len(tokens) <= sum(map(len, ids))-shared_prefix(ids)*(len(ids)-1)
    sees = np.zeros((len(tokens),)*2, bool)
    for path in paths: sees[np.ix_(path, path)] = True
    i = np.arange(len(tokens))
    below = i[:, None] >= i
    assert (sees & below == (below & (i[:, None] < tree.seen_to))).all()
    if least == 1: assert len(tokens) == len({tuple(s[:k]) for s in ids for k in range(1, len(s))})+len(ids)

def test_one_level_keeps_its_order():
    ids = [sequence([], t) for t in ([1, 1, 0], [0, 1], [1, 0, 1, 1])]
    assert collate(ids)['bounds'] == [0, 3, 5, 9]
    ids = [np.append(head, i).astype(np.int32) for i in ids]
    assert collate(ids)['bounds'] == [len(head)]+[len(head)+k for k in (3, 5, 9)]
    for bounds in ([0, 3, 5], [4, 5, 9], [0, 7]):
        tree = as_tree(bounds)
        assert tree.ends.tolist()[-len(bounds):] == bounds
        assert tree.last.tolist() == [e-1 for e in bounds[1:]]
        assert as_tree(tree) is tree

# ---- planning
def table(ids, views): return pd.DataFrame(dict(row=np.arange(len(ids)) // views, ids=ids, n=[len(i) for i in ids]))

@settings(max_examples=60, deadline=None)
@given(st.lists(some, min_size=1, max_size=30), st.integers(40, 400))
def test_packs_count_what_is_computed(ids, budget):
    n = np.array([len(i) for i in ids])
    found = pack(n, budget, ids)
    assert sorted(np.concatenate(found)) == list(range(len(ids)))
    for p in found: assert len(p) == 1 or prefix_tree([ids[k] for k in p]).ends[-1] <= budget
    longest = [n[p].max() for p in found]
    assert longest == sorted(longest, reverse=True)

def test_packs_of_what_shares_nothing_are_as_before():
    ids = [np.random.default_rng(k).integers(3, 500, 5+7*k % 60).astype(np.int32) for k in range(80)]
    n = [len(i) for i in ids]
    assert [p.tolist() for p in pack(n, 200, ids)] == [p.tolist() for p in pack(n, 200)]
    assert pack([], 10, []) == []

@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(some, some), min_size=1, max_size=20), st.integers(100, 400), st.sampled_from([1, 2]))
def test_views_of_a_row_share_a_pack(rows, budget, ranks):
    rows = [[np.append(head, i).astype(np.int32) for i in views] for views in rows]
    enc = table([i for views in rows for i in views], 2)
    steps, before = (plan_steps(e, 4, 1, budget, 0, ranks=ranks) for e in (enc, enc.drop(columns='ids')))
    def lines(step): return sorted(np.concatenate([p for packs in step for p in packs]))
    assert list(map(lines, steps)) == list(map(lines, before)), 'a step has other rows'
    for packs_of_step in steps:
        for p in [p for packs in packs_of_step for p in packs]:
            computed = prefix_tree([enc.ids[k] for k in p]).ends[-1]
            assert computed <= budget or len(p) == 1
            for k in p:
                if k ^ 1 not in p: assert enc.n[[k, k ^ 1]].sum()-(len(head)-least_run)*3//4 > budget
    one = enc[::2].reset_index(drop=True)
    for a, b in zip(plan_steps(one, 4, 1, budget, 0), plan_steps(one.drop(columns='ids'), 4, 1, budget, 0)):
        assert [p.tolist() for p in a[0]] == [p.tolist() for p in b[0]]

# ---- attention
def close(a, b, eps=1e-6): assert (a-b).abs().max() <= eps*b.abs().max().clamp(min=1), (a-b).abs().max()

def varlen_attn(q, k, v, ends, key_ends, longest_q, longest_k, scale, window_size, enable_gqa=True):
    "torch's kernel in plain operations: each sequence is causal to its last key"
    assert ends.diff().max() <= longest_q and key_ends.diff().max() <= longest_k
    out = []
    for s, e, a, b in zip(ends, ends[1:], key_ends, key_ends[1:]):
        part = (x[i:j].transpose(0, 1)[None] for x, i, j in ((q, s, e), (k, a, b), (v, a, b)))
        out.append(exact_attention(*part, scale, window=window_size[0]+1 or None)[0].transpose(0, 1))
    return torch.cat(out)

@pytest.mark.parametrize('cap, window', [(None, None), (None, 9), (2., None), (2., 9)])
@pytest.mark.parametrize('ids', deep, ids=['identical', 'prefix', 'one token', 'four levels'])
def test_attention_of_a_tree(ids, cap, window, monkeypatch):
    "One call a segment, the varlen kernel's copies and gradients, and FlexAttention's mask"
    torch._dynamo.reset()
    monkeypatch.setattr('competition_kit.attention.varlen_attn', varlen_attn)
    tree, g = prefix_tree(ids, 4), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, tree.ends[-1], 16, generator=g, requires_grad=True) for h in (4, 2, 2))
    kw = dict(scaling=.3, softcap=cap, sliding_window=window)
    want = torch.zeros(1, tree.ends[-1], 4, 16)
    for path in on_paths(tree, ids):
        alone = exact_attention(*(x[:, :, path] for x in (q, k, v)), .3, cap, window).transpose(1, 2)
        want = want.index_copy(1, torch.tensor(path), alone)
    dy = torch.randn(want.shape, generator=g)
    want_grad = torch.autograd.grad(want, (q, k, v), dy)
    ways = [dict(bounds=tree), dict(layout=pack_layout(tree, torch.from_numpy))]
    for way in ways:
        learns = not (cap and 'layout' in way)  # FlexAttention has no gradients on a CPU
        inputs = (q, k, v) if learns else [x.detach() for x in (q, k, v)]
        got = packed_attention(None, *inputs, None, **kw, **way)[0]
        close(got, want)
        if learns:
            for a, b in zip(torch.autograd.grad(got, (q, k, v), dy), want_grad): close(a, b)

# ---- models
SHAPE = dict(vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=16, initializer_range=.05, pad_token_id=0, num_labels=3)
KINDS = dict(
    plain=LlamaConfig(**SHAPE), window=MistralConfig(**SHAPE, sliding_window=9),
    capped=Gemma2Config(**SHAPE, sliding_window=9, attn_logit_softcapping=3., final_logit_softcapping=2.,
                        query_pre_attn_scalar=24))

def tiny(kind, route='answer'):
    register_attention()
    torch.manual_seed(0)
    config = KINDS[kind]
    config._attn_implementation = 'packed'
    cls = AutoModelForCausalLM if route == 'answer' else AutoModelForSequenceClassification
    model = cls.from_config(config, dtype=torch.float32).requires_grad_(False)
    classifier = add_lora(Classifier(model, [5, 6, 7] if route == 'answer' else None), r=4, dropout=0.)
    for n, p in classifier.named_parameters():
        if 'lora_B' in n: p.data.normal_(0, .05)
    return classifier.train()

def step(classifier, packs): # logits, and the gradient of a mean loss
    classifier.zero_grad()
    out = torch.cat([classifier(**collate(p)) for p in packs])
    (out.log_softmax(-1)*torch.arange(out.numel()).reshape(out.shape).sin()).sum(1).mean().backward()
    return out.detach(), torch.cat([p.grad.flatten() for p in classifier.parameters() if p.requires_grad])

made = {}
@settings(max_examples=12, deadline=None)
@given(packs, st.sampled_from([(k, r) for k in KINDS for r in ('answer', 'score')]))
def test_a_pack_is_its_sequences(ids, kind):
    if kind not in made: made[kind] = tiny(*kind)
    together, alone = step(made[kind], [ids]), step(made[kind], [[i] for i in ids])
    for a, b in zip(together, alone): close(a, b)

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('ids', deep, ids=['identical', 'prefix', 'one token', 'four levels'])
def test_a_deep_pack_is_its_sequences(ids, kind):
    test_a_pack_is_its_sequences.hypothesis.inner_test(ids, (kind, 'answer'))
    if len(ids) > 2: assert isinstance(collate(ids)['bounds'], Tree)

def test_a_wrong_path_would_be_noticed():
    "A segment under another parent of the same length gives other logits"
    classifier, pack = tiny('plain'), collate(deep[3])
    tree = pack['bounds']
    moved, at = tree.parent.copy(), [k for k, p in enumerate(tree.parent) if p > 0]
    moved[at[-1]] = next(p for p in moved[at] if p != moved[at[-1]] and tree.stop[p] == tree.start[at[-1]])
    wrong = dict(pack, bounds=replace(tree, parent=moved))
    with torch.no_grad(): assert (classifier(**wrong)-classifier(**pack)).abs().max() > 1e-3
