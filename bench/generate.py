"""Does the predicted time of generated texts hold?

usage: python bench/generate.py [--base smollm2 | --shape qwen2.5-7b [--layers N]] [--texts 256] [--new 256]
           [--engines generate transformers vllm] [--batch-tokens 16384] [--gpus 1] [--top-p .95] [--cpu-time]
Texts for the problems of `sample_logic` by the engines of `03s_replies`: measured, predicted from the GPU's data, and
predicted from the speed that `measured_speed` finds. `--shape` writes random weights of a known base. `--cpu-time`
counts the process's own time, for a busy CPU. `generate` is the peer: transformers' own `generate`, padded batches.
Aims: predicted within 25 % of the measured time; vLLM 6 times as fast as `generate` with 256 sequences of a 7B shape:
    python bench/generate.py --shape qwen2.5-7b --engines generate transformers vllm --batch-tokens 150000"""
import argparse, contextlib, os, io, tempfile, time
from pathlib import Path
import numpy as np
import pandas as pd
import torch
from common import report, wait_for_gpu
from competition_kit.base import load_tokenizer
from competition_kit.core import sandbox
from competition_kit.engine import free_gpu
from competition_kit.cost import find_gpu, known_bases, shape
from competition_kit.replies import (TransformersEngine, batches, end_engine, generate, job_table, read_text,
                                     start_engine)
from competition_kit.reply_cost import generation_seconds, gpu_speed, measured_speed, sequences_at_once, shared_gpu
from competition_kit.tables import load_rows
from competition_kit.text import TextPrompt

def random_base(folder, name, layers):
    "Random weights of a known shape, with SmolLM2's tokenizer"
    from transformers import AutoConfig, AutoModelForCausalLM
    sizes = dict(known_bases[name], max_position_embeddings=32768)
    if layers: sizes['num_hidden_layers'] = layers
    config = AutoConfig.for_model(**sizes)
    torch.manual_seed(0)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device): AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    finally: torch.set_default_dtype(torch.float32)
    free_gpu()
    load_tokenizer().save_pretrained(folder)
    return str(folder)

class Generate(TransformersEngine):
    "transformers' own `generate`; requests of one call have one temperature and one limit"
    name = 'generate'
    def stream(self, requests):
        how = requests[0]
        for batch in batches(requests, self.batch_tokens):
            longest = max(len(requests[k].ids) for k in batch)
            pad = [longest-len(requests[k].ids) for k in batch]
            ids = torch.tensor([[min(self.ends)]*n+requests[k].ids.tolist() for n, k in zip(pad, batch)])
            mask = torch.arange(longest)[None] >= torch.tensor(pad)[:, None]
            made = self.model.base.generate(ids.to(self.model.device), attention_mask=mask.long().to(self.model.device),
                                            max_new_tokens=how.max_new_tokens, do_sample=True, top_p=how.top_p, top_k=0,
                                            temperature=how.temperature, pad_token_id=min(self.ends),
                                            eos_token_id=[*self.ends])
            for k, tokens in zip(batch, made[:, longest:].tolist()):
                end = next((i for i, t in enumerate(tokens, 1) if t in self.ends), 0)
                yield k, read_text(self.tok, tokens[:end or len(tokens)], 'stop' if end else 'length')

def jobs_of(prompt, a): # as `05_generate` asks
    enc = prompt.encode(load_rows('sample_logic'))
    attempts = [job_table(enc, k, 0, a.new, .8, a.top_p) for k in range(-(-a.texts//len(enc)))]
    return pd.concat(attempts, ignore_index=True)[:a.texts]

def prompt_length(name, requests, batch_tokens): # mean tokens, with transformers those of padding included
    parts = batches(requests, batch_tokens if name == 'transformers' else 1)
    return float(np.average([max(len(requests[k].ids) for k in b) for b in parts], weights=[len(b) for b in parts]))

def measure(name, base, prompt, jobs, a):
    clock = time.process_time if a.cpu_time else time.perf_counter
    gpu = shared_gpu(find_gpu(), a.gpus) if torch.cuda.is_available() else find_gpu(dtype='fp32')
    dtype = 'bf16' if torch.cuda.is_available() else 'fp32'
    if name == 'generate': engine, name = Generate(base, prompt, dtype, a.batch_tokens), 'transformers'
    else: engine = start_engine(name, base, prompt, dtype, a.batch_tokens, gpus=a.gpus)
    try:
        sizes, length = shape(base), prompt_length(name, list(jobs.request), a.batch_tokens)
        engine.replies([r._replace(max_new_tokens=a.new) for r in jobs.request[:2]]) # warm
        n = min(len(jobs), sequences_at_once(sizes, gpu, dtype, name, length, a.new, a.new, a.batch_tokens))
        speeds = dict(from_gpu_data=gpu_speed(sizes, gpu, dtype, name, n, a.top_p))
        if name == 'transformers': speeds['from_measured_speed'] = measured_speed(engine, clock=clock)
        with tempfile.TemporaryDirectory() as folder:
            wait_for_gpu()
            start = clock()
            made = generate(engine, jobs, folder, len(jobs), False)
            seconds = clock()-start
        new = float(made.tokens.mean())
        predicted = {k: generation_seconds(s, len(jobs), length, new, a.new, n, name) for k, s in speeds.items()}
        report(what='generation', base=a.shape or a.base, layers=sizes['layers'], engine=engine.name,
               version=engine.version, gpu=gpu['name'], gpus=a.gpus, texts=len(jobs),
               prompt_tokens=length, new_tokens=new, sequences=n, seconds=seconds,
               new_tokens_s=new*len(jobs)/seconds, top_p=a.top_p, cpu_time=a.cpu_time,
               predicted_seconds=predicted, predicted_to_measured={k: v/seconds for k, v in predicted.items()},
               speeds={k: s._asdict() for k, s in speeds.items()})
    finally: end_engine(engine)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--base', default='smollm2')
    p.add_argument('--shape', default='', choices=['', *known_bases])
    p.add_argument('--layers', type=int, default=0)
    p.add_argument('--engines', nargs='+', default=['transformers'])
    p.add_argument('--texts', type=int, default=256)
    p.add_argument('--new', type=int, default=256)
    p.add_argument('--batch-tokens', type=int, default=16384)
    p.add_argument('--gpus', type=int, default=1, help='that vLLM shares one model over')
    p.add_argument('--top-p', type=float, default=.95, help='below 1 the vocabulary is sorted for every token')
    p.add_argument('--cpu-time', action='store_true')
    a = p.parse_args()
    if a.cpu_time: torch.set_num_threads(1)
    if 'CK_ROOT' not in os.environ: sandbox()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        base = random_base(Path(folder)/'base', a.shape, a.layers) if a.shape else a.base
        prompt = TextPrompt(load_tokenizer(base))
        for name in a.engines: measure(name, base, prompt, jobs_of(prompt, a), a)
