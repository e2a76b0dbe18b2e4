"""Grouped queries in the varlen kernel: keys as they are, beside keys repeated for every query head.
One pack of LMSYS-like lengths, forward and backward, bf16, in turns. Then one row in fp32, for which torch has no flash
attention, as on a T4: `exact_attention`, which repeats keys there, beside SDPA that shares them itself.

usage: python bench/grouped.py [--budget 32768] [--rows 512 2048]
Prints the milliseconds of each form, the memory that a layer's attention keeps for its backward pass, and how far the
results and gradients of the two forms are apart."""
import argparse
import numpy as np
import torch
import torch.nn.functional as F
from capped import ms
from common import report
from competition_kit.attention import Layout, exact_attention, varlen_attention
from competition_kit.pack import contest_lengths
from train import packs_of

SHAPES = {'smollm2': (9, 3, 64), 'qwen2.5-0.5b': (14, 2, 64), 'qwen2.5-7b': (28, 4, 128), 'qwen2.5-14b': (40, 8, 128)}

def repeated(q, k, v, layout): # as many heads of keys as of queries
    k, v = (x.repeat_interleave(q.shape[1]//x.shape[1], 1) for x in (k, v))
    return varlen_attention(q, k, v, q.shape[-1]**-.5, layout)

def grouped(q, k, v, layout): return varlen_attention(q, k, v, q.shape[-1]**-.5, layout)

def sdpa(q, k, v, scale): return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)

def one_row(name, n):
    heads, kv, size = SHAPES[name]
    kw = dict(device='cuda', requires_grad=True)
    q, k, v = (torch.randn(1, h, n, size, **kw) for h in (heads, kv, kv))
    dy, took, memory = torch.randn(1, heads, n, size, device='cuda'), {}, {}
    for form in (sdpa, exact_attention, sdpa, exact_attention):
        def run(): return form(q, k, v, size**-.5)
        memory[form.__name__] = round(kept(run)[0]/1e6, 1)
        both = ms(lambda: torch.autograd.grad(run(), (q, k, v), dy))
        took.setdefault(form.__name__, []).append(round(both, 3))
    report('torch', shape=name, fp32_row=n, both_ms=took, kept_mb=memory)

def kept(f): # bytes between the forward and the backward pass
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = f()
    return torch.cuda.memory_allocated()-before, out

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--budget', type=int, default=32768)
    p.add_argument('--rows', type=int, nargs='*', default=[512, 2048], help='lengths of a row in fp32')
    a = p.parse_args()
    rows = packs_of(contest_lengths('lmsys', 4000), a.budget)[5]
    layout = Layout(torch.tensor(np.r_[0, np.cumsum(rows)], dtype=torch.int32, device='cuda'), max(rows))
    for name, (heads, kv, size) in SHAPES.items():
        kw = dict(device='cuda', dtype=torch.bfloat16, requires_grad=True)
        q, k, v = (torch.randn(1, h, sum(rows), size, **kw) for h in (heads, kv, kv))
        dy, got, took, memory = torch.randn(1, sum(rows), heads, size, device='cuda').bfloat16(), {}, {}, {}
        for form in (repeated, grouped, repeated, grouped):
            def run(): return form(q, k, v, layout)
            memory[form.__name__], out = kept(run)
            got[form.__name__] = [out.detach(), *torch.autograd.grad(out, (q, k, v), dy)]
            del out
            forward, both = ms(lambda: run().detach()), ms(lambda: torch.autograd.grad(run(), (q, k, v), dy))
            took.setdefault(form.__name__, []).append((round(forward, 3), round(both, 3)))
        gaps = [float((x-y).float().norm()/y.float().norm()) for x, y in zip(got['grouped'], got['repeated'])]
        mb = {k: round(m/1e6, 1) for k, m in memory.items()}
        report('torch', shape=name, tokens=sum(rows), forward_and_both_ms=took, kept_mb=mb,
               gaps=[f'{g:.1e}' for g in gaps])
        assert max(gaps) < .01, gaps
    for n in a.rows:
        for name in ('smollm2', 'qwen2.5-7b'): one_row(name, n)
