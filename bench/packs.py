"""Planning of steps and packs: python bench/packs.py [rows]

LMSYS-like lengths of at most 2,048 tokens, both views, packs of 16,384 tokens; the aim is 0.5 s for a million rows.

The prefix tree: python bench/packs.py tree FOLDER [--rows 300] [--models smollm2:30 qwen2.5-7b:4] [--budget 16384]
           [--times 3]

FOLDER holds pairs_open.parquet and logic_open.jsonl. Each line compares one view with two views, in packs with one
shared prefix and with a tree: computed tokens of all rows, and the time of `--rows` rows, interleaved. A model is a
name and a number of layers, all but SmolLM2 with random weights; a GPU computes in bf16, a CPU in fp32 (CPU seconds).
Training is forward and backward of a LoRA in steps of 32 rows, not compiled."""
import argparse, sys, time
from functools import partial
from pathlib import Path
import numpy as np
import pandas as pd
import torch
import competition_kit.model as M
from competition_kit.base import base_path, load_tokenizer
from competition_kit.cost import known_bases
from competition_kit.pack import contest_lengths, pack, plan_steps, prefix_tree
from competition_kit.prompt import Prompt, pick_rows
from competition_kit.rows import read_raw

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

# ---- the prefix tree
GPU = torch.cuda.is_available()
one_prefix = partial(prefix_tree, least=2**31)
texts = dict(pairs_open=('pairs_open.parquet', 'preference', 1024), logic_open=('logic_open.jsonl', 'choice', 512))

def encoded(folder, name): # all rows in two views, in the order of shuffled groups
    file, task, max_len = texts[name]
    rows, *_ = read_raw(Path(folder)/file)
    order = {g: k for k, g in enumerate(np.random.default_rng(0).permutation(rows.group.unique()))}
    rows = rows.iloc[rows.group.map(order).argsort(kind='stable')].reset_index(drop=True)
    return Prompt(load_tokenizer(), task, max_len).encode(rows)

def packs_of(enc, work, tree, budget): # as the kit predicts and trains
    if work == 'predict': return pack(enc.n, budget, enc.ids if tree else None)
    steps = plan_steps(enc if tree else enc.drop(columns='ids'), 32, 1, budget, 0)
    return [p for step in steps for packs in step for p in packs]

def computed(enc, packs, tree): # tokens
    make = prefix_tree if tree else one_prefix
    return sum(make([enc.ids.array[k] for k in p]).ends[-1] for p in packs)

def model_of(name): # with a LoRA that does something
    from competition_kit.attention import register_attention
    from competition_kit.speed import fuse
    from transformers import AutoConfig, AutoModelForCausalLM
    register_attention()
    (name, layers), kw = name.split(':'), dict(attn_implementation='packed')
    dtype = torch.bfloat16 if GPU else torch.float32
    if name == 'smollm2':
        model = AutoModelForCausalLM.from_pretrained(base_path(name), dtype=dtype, num_hidden_layers=int(layers), **kw)
    else:
        shape = dict(known_bases[name], num_hidden_layers=int(layers), vocab_size=49152, pad_token_id=0)
        with torch.device('cuda' if GPU else 'cpu'):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape, **kw), dtype=dtype)
    classifier = M.add_lora(M.Classifier(model.requires_grad_(False), list(range(330, 337))), r=16)
    for n, p in classifier.named_parameters():
        if 'lora_B' in n: p.data.normal_(0, .01)
    return fuse(classifier.to('cuda' if GPU else 'cpu'))

def seconds_of(classifier, made, work): # seconds, and the logits of each pack
    clock, out = time.perf_counter if GPU else time.process_time, []
    if GPU: torch.cuda.synchronize()
    start = clock()
    for b in made:
        with torch.set_grad_enabled(work == 'train'): y = classifier(**b)
        if work == 'train': y.log_softmax(-1)[:, 0].sum().backward()
        out.append(y.detach())
    if GPU: torch.cuda.synchronize()
    return clock()-start, out

ways = {'one': (1, False), 'one, tree': (1, True), 'two': (2, False), 'two, tree': (2, True)}  # views, tree?

def collated(enc, packs, tree):
    M.prefix_tree = prefix_tree if tree else one_prefix
    try: return [M.collate([enc.ids.array[k] for k in p], 'cuda' if GPU else 'cpu') for p in packs]
    finally: M.prefix_tree = prefix_tree

def compare(classifier, enc, work, budget, times): # tokens and seconds of each way; how far the tree moves a logit
    views = {1: enc[enc.view == 0].reset_index(drop=True), 2: enc}
    plans = {k: packs_of(views[v], work, tree, budget) for k, (v, tree) in ways.items()}
    made = {k: collated(views[v], plans[k], tree) for k, (v, tree) in ways.items()}
    took, logits = {k: [] for k in ways}, {}
    for turn in range(times+GPU):  # a GPU's first turn, of a few packs, chooses kernels
        for k in ways:
            warm = turn < GPU
            seconds, out = seconds_of(classifier, made[k][:8] if warm else made[k], work)
            if warm: continue
            took[k].append(seconds)
            logits[k] = torch.cat(out)[np.argsort(np.concatenate(plans[k]))]
    tokens = {k: sum(b['input_ids'].numel() for b in m) for k, m in made.items()}
    moved = (logits['two']-logits['two, tree']).abs().max().item()
    return tokens, {k: min(t) for k, t in took.items()}, moved

def ratios(x): # of two views to one
    return dict(two_to_one=x['two']/x['one'], tree_to_one=x['two, tree']/x['one'],
                tree_to_one_tree=x['two, tree']/x['one, tree'])

def tree_bench(argv):
    p = argparse.ArgumentParser()
    p.add_argument('folder')
    p.add_argument('--rows', type=int, default=300)
    p.add_argument('--models', nargs='*', default=['smollm2:30', 'qwen2.5-7b:4'])
    p.add_argument('--budget', type=int, default=16384)
    p.add_argument('--times', type=int, default=3)
    a = p.parse_args(argv)
    tokens, encs = [], {name: encoded(a.folder, name) for name in texts}
    for name, enc in encs.items():
        one = enc[enc.view == 0].reset_index(drop=True)
        for work in ('predict', 'train'):
            n = {k: computed(e, packs_of(e, work, tree, a.budget), tree)
                 for k, (views, tree) in ways.items() for e in [one if views == 1 else enc]}
            tokens.append(dict(data=name, rows=len(one), work=work, **n, **ratios(n)))
    table(tokens)
    for model in a.models:
        classifier = model_of(model)
        for name, enc in encs.items():
            for work in ('predict', 'train'):
                some = pick_rows(enc, np.arange(a.rows))
                n, took, moved = compare(classifier.train(work == 'train'), some, work, a.budget, a.times)
                table([dict(model=model, data=name, work=work, **took, **ratios(took),
                            tokens_tree_to_one=n['two, tree']/n['one'], moved=f'{moved:.0e}')])
        del classifier

if __name__ == '__main__':
    if sys.argv[1:2] == ['tree']: sys.exit(tree_bench(sys.argv[2:]))
    k = int((sys.argv[1:]+['1000000'])[0])
    n = contest_lengths('lmsys', k).repeat(2)
    enc = pd.DataFrame(dict(row=np.arange(k).repeat(2), n=n))
    table([one_rank(enc, n, rows) for rows in (16, 32, 64, 128, 512)])
    table([eight_ranks(enc, n, rows) for rows in (1, 2, 4, 8, 16, 32)])
    table([inference(n, b) for b in (4096, 8192, 16384)])
