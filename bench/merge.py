"""Merging five LoRAs of rank 64 at the shape of a 14B model, on a CPU: seconds, CPU seconds, memory.

usage: python bench/merge.py [--layers 48] [--members 5] [--rank 64] [--to 64] [--threads 2] [--folder DIR]
                             [--ways concat svd base]

Random adapters are written once, tensor by tensor, and for `base` a random base in shards of two layers. Each way to
merge runs in a process of its own, so its peak is its own; the peak before the merge (Python, torch) stands beside it.
A base of 48 layers takes 25 GiB on the disk, and the merged one as much."""
import argparse, resource, subprocess, sys, tempfile, time
from pathlib import Path
import torch
from common import report
from competition_kit.core import seal, write_json
from competition_kit.lora import merge_into_base, merge_loras, read_lora, write_tensors

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

def write_base(folder, layers): # without embeddings, which the merge copies
    config = dict(model_type='llama', architectures=['LlamaForCausalLM'], num_hidden_layers=layers, hidden_size=5120,
                  intermediate_size=13824, num_attention_heads=40, num_key_value_heads=8, vocab_size=4096)
    write_json(folder/'config.json', config)
    for first in range(0, layers, 2):
        shapes = {f'model.layers.{k}.{module}.weight': (torch.bfloat16, size)
                  for k in range(first, min(first+2, layers)) for module, size in SIZES.items()}
        g = torch.Generator().manual_seed(first)
        write_tensors(folder/f'model-{first:02d}.safetensors', shapes,
                      ((k, torch.randn(s, generator=g, dtype=torch.bfloat16)*.02) for k, (_, s) in shapes.items()))
    seal(folder)

def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20

def one(how, folders, out, to, threads):
    torch.set_num_threads(threads)
    before, start, cpu = peak(), time.perf_counter(), time.process_time()
    loras = [read_lora(f) for f in folders]
    read = time.perf_counter()-start
    if how == 'base': merge_into_base(str(out.with_name('plain')), loras, None, out)
    else: merge_loras(loras, None, out, how, rank=to)
    size = sum(f.stat().st_size for f in out.glob('*.safetensors'))/2**30
    report('torch', how=how, rank=to if how == 'svd' else None, seconds=time.perf_counter()-start, read_s=read,
           cpu_s=time.process_time()-cpu, gib=size, peak_gib=peak(), before_gib=before, threads=threads)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(layers=48, members=5, rank=64, to=64, threads=2).items():
        p.add_argument(f'--{name}', type=int, default=default)
    p.add_argument('--folder', default='')
    p.add_argument('--ways', nargs='+', default=['concat', 'svd'], choices=['concat', 'svd', 'base'])
    p.add_argument('--how', default='', help='the way of one process, for this script itself')
    a = p.parse_args()
    root = Path(a.folder or tempfile.mkdtemp())
    folders = [root/f'member{k}' for k in range(a.members)]
    if a.how: sys.exit(one(a.how, folders, root/a.how, a.to, a.threads))
    for k, f in enumerate(folders):
        if not (f/'manifest.json').exists(): write_member(f, a.layers, a.rank, k)
    if 'base' in a.ways and not (root/'plain/manifest.json').exists(): write_base(root/'plain', a.layers)
    for how in a.ways:
        subprocess.run([sys.executable, __file__, *sys.argv[1:], '--folder', str(root), '--how', how], check=True)
