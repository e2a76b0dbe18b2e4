"""On two CPU cores: a step of fine-tuning in packs, against transformers' own classifier on batches of 8 padded to their longest row. The same weights, rows, LoRA and loss; fp32.

usage: python bench/cpu.py [--layers 4] [--rows 32] [--max-len 1024] [--template 160] [--budget 1024] [--repeat 5]
(SmolLM2's shape with random weights, LMSYS-like lengths, of which all rows share the first `--template` tokens; rows in random order.) Also says what it gains to compute these tokens once a pack."""
import argparse, statistics, time
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification
import competition_kit.model as M
from competition_kit.attention import register_attention
from competition_kit.base import base_path
from competition_kit.model import Judge, add_lora, collate, option_mask, pack_loss
from competition_kit.pack import contest_lengths, pack

p = argparse.ArgumentParser(description=__doc__)
p.add_argument('--layers', type=int, default=4); p.add_argument('--rows', type=int, default=32); p.add_argument('--max-len', type=int, default=1024)
p.add_argument('--batch', type=int, default=8); p.add_argument('--budget', type=int, default=1024); p.add_argument('--repeat', type=int, default=5); p.add_argument('--template', type=int, default=160)
a = p.parse_args()

register_attention()
def judge_of(attention):
    cfg = AutoConfig.from_pretrained(base_path(), num_hidden_layers=a.layers, num_labels=3, pad_token_id=2, attn_implementation=attention)
    torch.manual_seed(0)
    judge = add_lora(Judge(AutoModelForSequenceClassification.from_config(cfg, dtype=torch.float32).requires_grad_(False)), r=16)
    for n, q in judge.named_parameters():
        if 'lora_B' in n: q.data.normal_(0, .02)
    return judge.train()

rng, ns = np.random.default_rng(0), contest_lengths('lmsys', a.rows, a.max_len)
ids = [rng.integers(3, 49152, n).astype(np.int32) for n in ns]
for i in ids: i[:a.template] = ids[0][:a.template][:len(i)]
label = torch.from_numpy(rng.integers(0, 3, a.rows))
ours, theirs = judge_of('packed'), judge_of('sdpa')

def packed():
    out = torch.zeros(a.rows, 3)
    for at in pack(ns, a.budget):
        got = ours(**collate([ids[k] for k in at]))
        pack_loss(got, torch.eye(3)[label[at]], torch.ones(len(at)), option_mask([3]*len(at), 3), a.rows).backward()
        out[at] = got.detach()
    return out

def padded():
    out = torch.zeros(a.rows, 3)
    for at in np.arange(a.rows).reshape(-1, a.batch):
        n = max(ns[at])
        x = torch.from_numpy(np.stack([np.pad(ids[k], (0, n-ns[k]), constant_values=2) for k in at])).long()
        got = theirs.model(input_ids=x, attention_mask=(torch.arange(n) < torch.from_numpy(ns[at])[:, None]).long()).logits
        (torch.nn.functional.cross_entropy(got, label[at], reduction='sum')/a.rows).backward()
        out[at] = got.detach()
    return out

def each(): # the template in every row
    once, M.common = M.common, lambda ids: 0
    try: return packed()
    finally: M.common = once

def step(judge, f):
    judge.zero_grad()
    start = time.perf_counter()
    out = f()
    return time.perf_counter()-start, out, torch.cat([q.grad.flatten() for q in judge.parameters() if q.requires_grad])

runs = [(step(ours, packed), step(ours, each), step(theirs, padded)) for _ in range(a.repeat+1)]
(_, x, g), *others = runs[-1]
print(f'{a.rows} rows, {ns.sum()} tokens, padded to {sum(max(ns[at])*a.batch for at in np.arange(a.rows).reshape(-1, a.batch))}; ratios are medians of {a.repeat} alternating steps')
for k, (name, (_, y, h)) in enumerate(zip(('packs with the template in every row', 'padded'), others), 1):
    ratio = [r[k][0]/r[0][0] for r in runs[1:]]
    print(f'{name}: {statistics.median(ratio):.2f} times as long as packed ({min(ratio):.2f} to {max(ratio):.2f}); largest difference of a logit {(x-y).abs().max():.1e}, of a gradient {(g-h).abs().max():.1e} (gradients up to {h.abs().max():.1e})')
