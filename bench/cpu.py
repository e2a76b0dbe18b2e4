"""A fine-tuning step on two CPU cores: packs, against transformers' own classifier on padded batches of 8.

usage: python bench/cpu.py [--layers 4] [--rows 32] [--max-len 1024] [--template 160] [--budget 1024] [--repeat 5]

The same weights, rows, LoRA and loss, in fp32: SmolLM2's shape with random weights and LMSYS-like lengths. All rows
begin with the same `--template` tokens. The script also measures what the shared prefix saves."""
import argparse, statistics, time
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification
import competition_kit.model as M
from competition_kit.base import base_path
from competition_kit.attention import register_attention
from competition_kit.model import Classifier, add_lora, collate, option_mask, pack_loss
from competition_kit.pack import as_tree, contest_lengths, pack

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for name, default in dict(layers=4, rows=32, max_len=1024, batch=8, budget=1024, repeat=5, template=160).items():
    p.add_argument('--'+name.replace('_', '-'), type=int, default=default)
a = p.parse_args()

register_attention()
def new_model(attention):
    cfg = AutoConfig.from_pretrained(base_path(), num_hidden_layers=a.layers, num_labels=3, pad_token_id=2,
                                     attn_implementation=attention)
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_config(cfg, dtype=torch.float32).requires_grad_(False)
    model = add_lora(Classifier(base), r=16)
    for n, q in model.named_parameters():
        if 'lora_B' in n: q.data.normal_(0, .02)
    return model.train()

rng, ns = np.random.default_rng(0), contest_lengths('lmsys', a.rows, a.max_len)
ids = [rng.integers(3, 49152, n).astype(np.int32) for n in ns]
for i in ids: i[:a.template] = ids[0][:a.template][:len(i)]
label = torch.from_numpy(rng.integers(0, 3, a.rows))
batches = np.arange(a.rows).reshape(-1, a.batch)
ours, theirs = new_model('packed'), new_model('sdpa')

def packed():
    out = torch.zeros(a.rows, 3)
    for at in pack(ns, a.budget):
        logits = ours(**collate([ids[k] for k in at]))
        pack_loss(logits, torch.eye(3)[label[at]], torch.ones(len(at)), option_mask([3]*len(at), 3), a.rows).backward()
        out[at] = logits.detach()
    return out

def padded():
    out = torch.zeros(a.rows, 3)
    for at in batches:
        n = max(ns[at])
        x = np.stack([np.pad(ids[k], (0, n-ns[k]), constant_values=2) for k in at])
        mask = (torch.arange(n) < torch.from_numpy(ns[at])[:, None]).long()
        logits = theirs.model(input_ids=torch.from_numpy(x).long(), attention_mask=mask).logits
        (torch.nn.functional.cross_entropy(logits, label[at], reduction='sum')/a.rows).backward()
        out[at] = logits.detach()
    return out

def without_prefix(): # packs with the template in every row
    shared, M.prefix_tree = M.prefix_tree, lambda ids: as_tree([0, *np.cumsum([len(i) for i in ids])])
    try: return packed()
    finally: M.prefix_tree = shared

def step(model, f): # seconds, logits, gradient
    model.zero_grad()
    start = time.perf_counter()
    out = f()
    seconds = time.perf_counter()-start
    return seconds, out, torch.cat([q.grad.flatten() for q in model.parameters() if q.requires_grad])

runs = [(step(ours, packed), step(ours, without_prefix), step(theirs, padded)) for _ in range(a.repeat+1)]
(_, logits, gradient), *others = runs[-1]
print(f'{a.rows} rows, {ns.sum()} tokens, padded to {sum(max(ns[at])*a.batch for at in batches)}; '
      f'ratios are medians of {a.repeat} alternating steps')
for k, (name, (_, y, h)) in enumerate(zip(('packs with the template in every row', 'padded'), others), 1):
    ratio = [r[k][0]/r[0][0] for r in runs[1:]]
    print(f'{name}: {statistics.median(ratio):.2f} times as long as packed ({min(ratio):.2f} to {max(ratio):.2f}); '
          f'largest difference of a logit {(logits-y).abs().max():.1e}, '
          f'of a gradient {(gradient-h).abs().max():.1e} (gradients up to {h.abs().max():.1e})')
