"""Merging five LoRAs of rank 64 at the shape of a 14B model, on a CPU: seconds, CPU seconds, memory.

usage: python bench/merge.py [--layers 48] [--members 5] [--rank 64] [--to 64] [--threads 2] [--folder DIR]

Random adapters are written once, tensor by tensor. Each way to merge runs in a process of its own,
so its peak is its own; the peak before the merge (Python, torch) stands beside it."""
import argparse, resource, subprocess, sys, tempfile, time
from pathlib import Path
import torch
from common import report
from competition_kit.core import seal, write_json
from competition_kit.lora import merge_loras, read_lora, write_tensors

# Qwen2.5-14B: 5120 wide, 13824 in the MLP, 8 of 40 heads for keys and values
SIZES = {'self_attn.q_proj': (5120, 5120), 'self_attn.k_proj': (1024, 5120), 'self_attn.v_proj': (1024, 5120),
         'self_attn.o_proj': (5120, 5120), 'mlp.gate_proj': (13824, 5120), 'mlp.up_proj': (13824, 5120),
         'mlp.down_proj': (5120, 13824)}

def write_member(folder, layers, rank, seed):
    names = sorted(k.rpartition('.')[2] for k in SIZES)
    write_json(folder/'adapter_config.json', dict(peft_type='LORA', task_type='CAUSAL_LM', r=rank, lora_alpha=2*rank,
               lora_dropout=0., target_modules=names, bias='none', use_rslora=False))
    shapes = {}
    for k in range(layers):
        for module, (out, n) in SIZES.items():
            name = f'base_model.model.model.layers.{k}.{module}.lora_'
            shapes |= {f'{name}A.weight': (torch.float32, (rank, n)), f'{name}B.weight': (torch.float32, (out, rank))}
    g = torch.Generator().manual_seed(seed)
    write_tensors(folder/'adapter_model.safetensors', shapes,
                  ((k, torch.randn(s, generator=g)*.02) for k, (_, s) in shapes.items()))
    seal(folder)

def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20

def one(how, folders, out, to, threads):
    torch.set_num_threads(threads)
    before, start, cpu = peak(), time.perf_counter(), time.process_time()
    loras = [read_lora(f) for f in folders]
    read = time.perf_counter()-start
    merge_loras(loras, None, out, how, rank=to)
    size = (Path(out)/'adapter_model.safetensors').stat().st_size/2**30
    report('torch', how=how, rank=to if how == 'svd' else None, seconds=time.perf_counter()-start, read_s=read,
           cpu_s=time.process_time()-cpu, gib=size, peak_gib=peak(), before_gib=before, threads=threads)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(layers=48, members=5, rank=64, to=64, threads=2).items():
        p.add_argument(f'--{name}', type=int, default=default)
    p.add_argument('--folder', default='')
    p.add_argument('--how', default='')
    a = p.parse_args()
    root = Path(a.folder or tempfile.mkdtemp())
    folders = [root/f'member{k}' for k in range(a.members)]
    if a.how: sys.exit(one(a.how, folders, root/a.how, a.to, a.threads))
    for k, f in enumerate(folders):
        if not (f/'manifest.json').exists(): write_member(f, a.layers, a.rank, k)
    for how in ('concat', 'svd'):
        subprocess.run([sys.executable, __file__, *sys.argv[1:], '--folder', str(root), '--how', how], check=True)
