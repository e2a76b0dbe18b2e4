"""What does it cost to know a base: the hash of its content, and the comparison of its packed forward with its own?
The first time, and when nothing has changed.

usage: python bench/identity.py [shape] [--tokenizer FOLDER]
(shape: a name that `ck cost` knows, with random weights; makes a base of its size on disk)"""
import argparse, tempfile, time
from pathlib import Path
import torch
from competition_kit.base import base_hash, load_tokenizer
from competition_kit.core import device_name, root_at
from competition_kit.model import load_classifier
from competition_kit.cost import base_config
from competition_kit.prompt import Prompt
from transformers import AutoModelForCausalLM

p = argparse.ArgumentParser()
p.add_argument('shape', nargs='?', default='qwen2.5-7b')
p.add_argument('--tokenizer', default='smollm2')
a = p.parse_args()
tok, config = load_tokenizer(a.tokenizer), base_config(a.shape)
with root_at(tempfile.mkdtemp()), tempfile.TemporaryDirectory() as base:
    with torch.device('cuda' if torch.cuda.is_available() else 'cpu'):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(base)
    tok.save_pretrained(base)
    torch.cuda.empty_cache()
    time.sleep(2)  # a file that has just been written is hashed and not remembered
    gb, took = sum(f.stat().st_size for f in Path(base).glob('*.safetensors'))/1e9, {}
    def timed(name, f):
        start = time.perf_counter()
        f()
        took[name] = time.perf_counter()-start
    for k in ('first', 'again'): timed(f'hash, {k}', lambda: base_hash(base))
    prompt = Prompt(load_tokenizer(base), 'preference', 2048)
    for route in ('answer', 'score'):
        for k in ('first', 'again'):
            timed(f'load {route}, {k}', lambda: load_classifier(base, prompt, route, 'bf16'))
            torch.cuda.empty_cache()
    print(device_name(), a.shape, f'{gb:.1f} GB')
    for k, t in took.items(): print(f'{k:22} {t:7.2f} s  {t/gb:6.3f} s a GB')
