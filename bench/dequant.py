"""How fast is a GPTQ weight dequantised on this GPU? Beside the memory floor (the bytes read and written, at the rate of a
large copy) and bitsandbytes' nf4.

usage: python bench/dequant.py [--sweep]     (shapes of Qwen2.5-32B; --sweep tries block shapes of the kernel)"""
import argparse, itertools, statistics
import pandas as pd
import torch
from competition_kit.core import device_name
from competition_kit.quant import GPTQLinear, _unpack_triton, dense_weight

args = argparse.ArgumentParser()
args.add_argument('--sweep', action='store_true')
args = args.parse_args()
flush = torch.empty(256*2**20, dtype=torch.uint8, device='cuda')  # larger than the L2 cache

def seconds(f, n=20):
    "Median over single calls, the cache emptied before each"
    for _ in range(3): f()
    out = []
    for _ in range(n):
        flush.zero_()
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        a.record()
        f()
        b.record()
        b.synchronize()
        out.append(a.elapsed_time(b)/1e3)
    return statistics.median(out)

def layer(n_in, n_out, bits, group=128, act=False):
    def ints(*s): return torch.randint(-2**31, 2**31-1, s, dtype=torch.int32, device='cuda')
    g = (torch.randperm(n_in, device='cuda')//group).int() if act else None
    scales = torch.rand(n_in//group, n_out, device='cuda').half()/100
    return GPTQLinear(ints(n_in*bits//32, n_out), ints(n_in//group, n_out*bits//32), scales, g, bits=bits)

def copy_rate(n=2**29): # bytes a second, read and written
    a, b = (torch.empty(n, dtype=torch.uint8, device='cuda') for _ in 'ab')
    return 2*n/seconds(lambda: b.copy_(a))

rate = copy_rate()
print(f'{device_name()}: copies at {rate/1e12:.2f} TB/s')
rows = []
for n_in, n_out in ((5120, 5120), (5120, 27648), (27648, 5120)):
    def add(what, m, read):
        s, floor = seconds(lambda: dense_weight(m, torch.bfloat16)), (read+2*n_in*n_out)/rate
        rows.append(dict(weight=f'{n_out}x{n_in}', what=what, us=s*1e6, floor_us=floor*1e6, of_floor=floor/s))
    for bits, act in ((4, False), (8, False), (4, True)):
        m = layer(n_in, n_out, bits, act=act)
        add(f'gptq {bits} bits{", act order" if act else ""}', m, sum(p.nbytes for p in m.parameters()))
        if args.sweep:
            for R, C, w in itertools.product((1, 2, 4), (256, 512, 1024, 2048), (4, 8)):
                weights = m.qweight, m.qzeros, m.scales, m.g_idx
                s = seconds(lambda: _unpack_triton(*weights, bits, torch.bfloat16, R, C, w), 10)
                what = f'  {bits} bits{", act" if act else ""} R={R} C={C} warps={w}'
                rows.append(dict(weight=f'{n_out}x{n_in}', what=what, us=s*1e6))
    try: import bitsandbytes as bnb
    except ImportError: continue
    m = bnb.nn.Linear4bit(n_in, n_out, bias=False, compute_dtype=torch.bfloat16, quant_type='nf4',
                          compress_statistics=True, device='cpu').bfloat16().cuda()
    add('nf4, double', m, n_in*n_out*(.5+1/64))
    xs = torch.randn(512, n_in, device='cuda', dtype=torch.bfloat16)
    g, w = layer(n_in, n_out, 4), torch.randn(n_out, n_in, device='cuda', dtype=torch.bfloat16)
    for what, f in (('512 tokens through dense bf16', lambda: xs@w.T), ('512 tokens through gptq 4 bits', lambda: g(xs))):
        rows.append(dict(weight=f'{n_out}x{n_in}', what=what, us=seconds(f)*1e6))
print(pd.DataFrame(rows).to_string(index=False, float_format=lambda v: f'{v:.2f}'))
