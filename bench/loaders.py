"""Do peft, transformers and vLLM read what the kit writes? Two runs of SmolLM2 are trained for some steps and merged,
and the merged model is quantised to 4 and 8 bits. Each loader answers the same rows in a process of its own.

usage: python bench/loaders.py [--rows 32] [--loaders kit peft transformers vllm] [--folder DIR] [--base smollm2]
Prints one JSON line for each loader, model and dtype: the largest and mean difference of a letter's probability, and
the largest of its logit (each row's mean taken off), against the kit in fp32 and in the same dtype. --folder keeps what was made."""
import argparse, functools, json, os, subprocess, sys, tempfile, time
from pathlib import Path

# which models a loader reads; `+ LoRA` is an adapter over the model before it
MODELS = 'base + LoRA', 'merged', '4 bits', '8 bits', '4 bits + LoRA', '8 bits + LoRA'
READS = {'kit': MODELS, 'peft': [m for m in MODELS if 'LoRA' in m], 'transformers': ('merged', '4 bits', '8 bits'),
         'vllm': MODELS}
ENGINES = ['base + LoRA'], ['merged'], ['4 bits', '4 bits + LoRA'], ['8 bits', '8 bits + LoRA']  # one process each

def make(a, root):
    "Train, merge and quantise through the stages; `work.json` says where everything is"
    from competition_kit.base import base_path
    from competition_kit.gptq import GptqArgs, gptq
    from competition_kit.merge import merge_runs
    from competition_kit.record import run_stage
    from competition_kit.tables import load_rows
    from competition_kit.train import train_fold
    from competition_kit.trained import trusted_prompt
    fit = dict(base=a.base, mix='sample_arena:120', max_len=384, lora_r=8, lr=1e-3, epochs=1., compiled='no')
    members = ' '.join(train_fold(seed=s, **fit).id for s in (0, 1))
    lora, merged = (merge_runs(members=members, how=how) for how in ('concat', 'base'))
    wide = dict(start=merged.id, rows=48, max_loss=9., max_flips=1.)
    bits = {b: run_stage(gptq, GptqArgs(bits=b, **wide)) for b in (4, 8)}
    prompt = trusted_prompt(merged.record)
    ids = prompt.encode(load_rows('sample_arena_test').iloc[:a.rows], 1).ids
    folders = {f'{b} bits': r.folder/'model' for b, r in bits.items()}
    folders |= {'base': base_path(a.base), 'merged': merged.folder/'model'}
    (root/'work.json').write_text(json.dumps(dict(
        run=merged.id, adapter=str(lora.folder/'adapter'), folders={k: str(v) for k, v in folders.items()},
        ids=[i.tolist() for i in ids], letters=[int(t) for t in prompt.letters])))

def of(work, model): # folder, adapter or None, bits or None
    name, _, lora = model.partition(' + ')
    bits = int(name[0]) if 'bits' in name else None
    return work['folders'][name], work['adapter'] if lora else None, bits

def kit(work, model, dtype):
    import numpy as np
    import pandas as pd
    import torch
    from competition_kit.model import collate, load_classifier
    from competition_kit.record import find_run
    from competition_kit.trained import load_adapter, trusted_prompt
    folder, adapter, _ = of(work, model)
    classifier = load_classifier(folder, trusted_prompt(find_run(work['run'])), dtype=dtype)
    if adapter: classifier = load_adapter(classifier, adapter)
    ids = pd.Series([np.array(i, np.int32) for i in work['ids']])
    with torch.no_grad():
        parts = [classifier(**collate(ids.iloc[k:k+8], classifier.device)).float().cpu() for k in range(0, len(ids), 8)]
    return torch.cat(parts).numpy()

def transformers(work, model, dtype):
    import torch
    from competition_kit.model import dtypes
    from transformers import AutoModelForCausalLM, GPTQConfig
    folder, adapter, bits = of(work, model)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    quantised = dict(quantization_config=GPTQConfig(bits=bits, backend='torch')) if bits else {}
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtypes[dtype], device_map=device, **quantised)
    if adapter:
        from peft import PeftModel
        loaded = PeftModel.from_pretrained(loaded, adapter)
    loaded.eval()
    with torch.no_grad():
        rows = [loaded(torch.tensor([i], device=device)).logits[0, -1, work['letters']] for i in work['ids']]
    return torch.stack(rows).float().cpu().numpy()

peft = transformers

@functools.cache
def engine(folder, adapter, dtype): # vLLM with room for one adapter
    from vllm import LLM
    lora = dict(enable_lora=True, max_loras=2, max_lora_rank=16) if adapter else {}
    return LLM(folder, dtype=dict(bf16='bfloat16', fp16='float16', fp32='float32')[dtype], enforce_eager=True, seed=0,
               max_model_len=1024, max_num_seqs=32, gpu_memory_utilization=.12, kv_cache_memory_bytes=2**30,
               max_logprobs=-1, **lora)

def vllm(work, model, dtype):
    import numpy as np
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    folder, adapter, _ = of(work, model)
    llm = engine(folder, model != 'merged', dtype)
    try: params = SamplingParams(temperature=0., max_tokens=1, logprob_token_ids=work['letters'], detokenize=False)
    except TypeError: params = SamplingParams(temperature=0., max_tokens=1, logprobs=-1, detokenize=False)
    prompts = [dict(prompt_token_ids=i) for i in work['ids']]
    request = LoRARequest('lora', 1, adapter) if adapter else None
    found = [o.outputs[0].logprobs[0] for o in llm.generate(prompts, params, use_tqdm=False, lora_request=request)]
    return np.array([[row[t].logprob for t in work['letters']] for row in found], np.float32)

def answer(a, root): # one loader in this process: its models, one after the other
    import numpy as np
    work = json.loads((root/'work.json').read_text())
    for model in a.models:
        for dtype in a.dtypes:
            start = time.perf_counter()
            np.save(root/f'{a.one} {model} {dtype}.npy', globals()[a.one](work, model, dtype))
            print(f'{time.perf_counter()-start:.1f} s: {a.one}, {model}, {dtype}', flush=True)

def compare(root, loader, model, dtype):
    import numpy as np
    from common import report
    def read(who, d): return np.load(root/f'{who} {model} {d}.npy')
    def p(z): return np.exp(z-z.max(1, keepdims=True))/np.exp(z-z.max(1, keepdims=True)).sum(1, keepdims=True)
    def centred(z): return z-z.mean(1, keepdims=True)
    try: own = read(loader, dtype)
    except FileNotFoundError: return report(loader=loader, model=model, dtype=dtype, failed=True)
    out = dict(rows=len(own))
    for name, other in {'kit_fp32': read('kit', 'fp32'), 'kit_same': read('kit', dtype)}.items():
        d, z = np.abs(p(own)-p(other)), np.abs(centred(own)-centred(other))
        out |= {f'{name}_dp': float(d.max()), f'{name}_mean_dp': float(d.mean()), f'{name}_dlogit': float(z.max()),
                f'{name}_flips': int((own.argmax(1) != other.argmax(1)).sum())}
    report('torch', 'transformers', 'peft', 'gptqmodel', 'vllm', loader=loader, model=model, dtype=dtype, **out)

def begin(a, root, one, models, dtypes): # a process with a log
    command = [sys.executable, __file__, '--one', one, '--folder', str(root), '--base', a.base, '--rows', str(a.rows),
               '--models', *models, '--dtypes', *dtypes]
    return subprocess.Popen(command, stdout=open(root/f'{one} {models[0]}.log', 'w'), stderr=subprocess.STDOUT)

def main(a, root):
    import torch
    half = 'bf16' if torch.cuda.is_available() else 'fp32'
    dtypes = {loader: ['bf16'] if loader == 'vllm' else list(dict.fromkeys(['fp32', half])) for loader in READS}
    start = time.perf_counter()
    if not (root/'work.json').exists(): begin(a, root, 'make', ['all'], ['bf16']).wait()
    if not (root/'work.json').exists(): sys.exit((root/'make all.log').read_text()[-3000:])
    print(f'{time.perf_counter()-start:.0f} s: trained, merged and quantised', flush=True)
    groups = [(who, models) for who in a.loaders for models in (ENGINES if who == 'vllm' else [READS[who]])]
    for job in [begin(a, root, who, models, dtypes[who]) for who, models in groups]: job.wait()
    print(f'{time.perf_counter()-start:.0f} s: answered', flush=True)
    for loader in a.loaders:
        for model in READS[loader]:
            for dtype in dtypes[loader]:
                if (loader, dtype) != ('kit', 'fp32'): compare(root, loader, model, dtype)
    for log in sorted(root.glob('*.log')):
        if 'Traceback' in log.read_text(): print('FAILED', log.name, log.read_text()[-2500:])

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--rows', type=int, default=32)
    p.add_argument('--loaders', nargs='+', default=list(READS))
    p.add_argument('--folder', default='')
    p.add_argument('--base', default='smollm2')
    p.add_argument('--one', default='', help=argparse.SUPPRESS)
    p.add_argument('--models', nargs='+', default=[], help=argparse.SUPPRESS)
    p.add_argument('--dtypes', nargs='+', default=[], help=argparse.SUPPRESS)
    a = p.parse_args()
    folder = Path(a.folder or tempfile.mkdtemp()).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    from competition_kit.core import bases_path
    os.environ.update(CK_BASES=os.environ.get('CK_BASES', str(bases_path())), CK_ROOT=str(folder), HF_HUB_OFFLINE='1')
    if not a.one: main(a, folder)
    elif a.one == 'make': make(a, folder)
    else: answer(a, folder)
