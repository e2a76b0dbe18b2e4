"""What does attention with soft caps cost (Gemma 2: 16 heads of 256, 8 of keys and values), and which form of FlexAttention
costs least? One pack of LMSYS-like lengths, forward and backward, bf16.

usage: python bench/capped.py [--budget 8192] [--size 256]
Prints the milliseconds of each form and of a varlen call without the cap, and the difference of each form's result and
gradients from the first form's."""
import argparse, time
import numpy as np
import torch
from competition_kit.attention import Layout, block_mask, compiled_flex, launch_options, mask_mod, varlen_attention
from torch.nn.attention.flex_attention import BlockMask
from competition_kit.pack import contest_lengths
from train import packs_of  # beside this file

def tanh(s, b, h, i, j): return 50.*torch.tanh(s/50.)
def sigmoid(s, b, h, i, j): return 50.*(2*torch.sigmoid(s*.04)-1)  # the same function

def with_full(ends, n, size=128): # blocks of which everything is seen need no mask
    doc = torch.bucketize(torch.arange(n, device=ends.device), ends[1:].contiguous(), right=True)
    start = torch.arange(0, n, size, device=ends.device)
    stop = (start+size).clamp(max=n)-1
    first, last, behind = doc[start], doc[stop], start[:, None]-start
    some = (behind >= 0) & (last >= first[:, None])
    every = (behind > 0) & (first == last[:, None]) & (start[:, None]+size <= n)
    def listed(x):
        order = x.int().argsort(dim=1, descending=True, stable=True).int()
        return x.sum(1, dtype=torch.int32)[None, None], order[None, None]
    return BlockMask.from_kv_blocks(*listed(some & ~every), *listed(every), BLOCK_SIZE=size, mask_mod=mask_mod(doc, None),
                                    seq_lengths=(n, n))

def ms(f, k=20):
    for _ in range(3): f()
    torch.cuda.synchronize()
    t = time.perf_counter()
    for _ in range(k): f()
    torch.cuda.synchronize()
    return 1e3*(time.perf_counter()-t)/k

def bwd(warps, stages, m1, n1, m2, n2):
    return dict(bwd_num_warps=warps, bwd_num_stages=stages, bwd_BLOCK_M1=m1, bwd_BLOCK_N1=n1, bwd_BLOCK_M2=m2, bwd_BLOCK_N2=n2)

def fwd(warps, stages, m, n):
    return dict(fwd_num_warps=warps, fwd_num_stages=stages, fwd_BLOCK_M=m, fwd_BLOCK_N=n)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--budget', type=int, default=8192)
    p.add_argument('--size', type=int, default=256)
    a = p.parse_args()
    rows = packs_of(contest_lengths('lmsys', 4000), a.budget)[5]
    n, ends = sum(rows), torch.tensor(np.r_[0, np.cumsum(rows)], dtype=torch.int32, device='cuda')
    kw = dict(device='cuda', dtype=torch.bfloat16, requires_grad=True)
    q, k, v = (torch.randn(1, h, n, a.size, **kw) for h in (16, 8, 8))
    dy, plain, full = torch.randn_like(q), block_mask(ends, n, None), with_full(ends, n)
    blocks = ms(lambda: with_full(ends, n))
    print(f'{len(rows)} rows, {n} tokens, {torch.cuda.get_device_name()}; the blocks take {blocks:.2f} ms a pack')
    def timed(name, f, gaps=''):
        forward, both = ms(lambda: f().detach()), ms(lambda: torch.autograd.grad(f(), (q, k, v), dy))
        print(f'{name:40s} forward {forward:6.2f}  with backward {both:6.2f} ms  {gaps}', flush=True)
    def varlen(): return varlen_attention(q, k, v, .0625, Layout(ends, max(rows))).transpose(1, 2)
    timed('varlen, no cap', varlen)
    first, ours = None, launch_options[torch.cuda.get_device_capability() == (9, 0)] if a.size > 128 else {}
    forms = [('as torch would', tanh, plain, {}), ('the kit', sigmoid, plain, ours), ('with tanh', tanh, plain, ours),
             ('with full blocks', sigmoid, full, ours)]
    forms += [(f'forward {c}', sigmoid, plain, ours | fwd(*c)) for c in ((8, 3, 128, 32), (8, 2, 64, 64))]
    backward = (8, 2, 32, 64, 64, 32), (8, 2, 32, 32, 32, 32), (8, 2, 16, 64, 64, 16), (8, 2, 32, 128, 128, 32)
    forms += [(f'backward {c}', sigmoid, plain, ours | bwd(*c)) for c in backward]
    for name, score, mask, options in forms:
        try:
            torch._dynamo.reset()
            def flex():
                return compiled_flex()(q, k, v, score_mod=score, block_mask=mask, scale=.0625, enable_gqa=True,
                                       kernel_options=dict(options, BACKEND='TRITON'))
            got = [flex(), *torch.autograd.grad(flex(), (q, k, v), dy)]
            first = first or got
            gaps = [f'{((x-y).float().norm()/y.float().norm()).item():.1e}' for x, y in zip(got, first)]
            timed(name, flex, f"gaps {' '.join(gaps)}")
        except Exception as e: print(name, repr(e)[:300], flush=True)
