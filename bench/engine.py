"""Packs and vLLM for letters, vLLM and transformers for text:
python bench/engine.py [parity] [letters] [gptq] [text] [replies]

parity: SmolLM2 with two LoRAs: the gate's figures, and tokens a second of both engines.
letters: the 7B shape with random weights and a LoRA of rank 16, cut to `--layers` layers; LMSYS-like rows of at most
    2,048 tokens. Tokens a second are those of the cut model; the last column extends them to all layers.
gptq: the same for the 32B shape in int4 with groups of 128, without a LoRA.
text: the 1B shape of Llama 3.2 with random weights: 256 prompts, 256 new tokens each; transformers in one batch.
replies: the embedded base and rows of the logic sample through both engines of `05_generate`, in turns; with 256 new
    tokens on a GPU and 32 on a CPU. Says whether the replies of temperature 0 are the same.
Every part starts one engine, and says how long that took. `--small` makes everything tiny, for a CPU."""
import argparse, gc, json, tempfile, time
from pathlib import Path
import numpy as np
import pandas as pd
import torch
from common import report, timed
from competition_kit.attention import register_attention
from competition_kit.cost import known_bases
from competition_kit.engine import Engine, parity
from competition_kit.model import Classifier, add_lora, load_classifier, view_probs
from competition_kit.pack import contest_lengths
from competition_kit.quant import load_mapped
from competition_kit.speed import compile_layers, fuse
from transformers import AutoConfig, AutoModelForCausalLM

device = 'cuda' if torch.cuda.is_available() else 'cpu'
dtype = 'bf16' if device == 'cuda' else 'fp32'
llama_1b = dict(model_type='llama', num_hidden_layers=16, hidden_size=2048, num_attention_heads=32,
                num_key_value_heads=8, head_dim=64, intermediate_size=8192, vocab_size=128256, tie_word_embeddings=True)
small = dict(hidden_size=128, num_attention_heads=2, num_key_value_heads=1, head_dim=64, intermediate_size=256)

def config(shape, layers, vocab):
    return AutoConfig.for_model(**shape | dict(num_hidden_layers=layers, vocab_size=vocab, pad_token_id=0,
                                bos_token_id=1, eos_token_id=2, max_position_embeddings=32768))

def random_model(cfg):
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if device == 'cuda' else torch.float32)
    try:
        with torch.device(device): model = AutoModelForCausalLM.from_config(cfg)
    finally: torch.set_default_dtype(torch.float32)
    for p in model.parameters():
        if p.dim() > 1: p.data.normal_(0, .02)
    return model.requires_grad_(False)

def write_base(folder, cfg): random_model(cfg).save_pretrained(folder)

def write_gptq(folder, cfg, group=128):
    "Random codes in GPTQ's format"
    from safetensors.torch import save_file
    with torch.device('meta'): model = AutoModelForCausalLM.from_config(cfg)
    torch.manual_seed(0)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != 'lm_head'}
    tensors = {n: torch.ones(p.shape) if p.dim() == 1 and 'norm' in n else torch.zeros(p.shape) if p.dim() == 1 else
               torch.randn(p.shape)*.02 for n, p in model.named_parameters() if n.rpartition('.')[0] not in linear}
    for n, m in linear.items():
        i, o = m.in_features, m.out_features
        tensors[f'{n}.qweight'] = torch.randint(-2**31, 2**31-1, (i//8, o), dtype=torch.int32)
        tensors[f'{n}.qzeros'] = torch.full((i//group, o//8), 0x77777777, dtype=torch.int32)
        tensors[f'{n}.scales'] = torch.rand(i//group, o)*.01
        tensors[f'{n}.g_idx'] = (torch.arange(i)//group).int()
        if m.bias is not None: tensors[f'{n}.bias'] = torch.zeros(o)
    half = torch.float16
    save_file({k: t.to(half) if t.is_floating_point() else t for k, t in tensors.items()}, folder/'model.safetensors',
              metadata=dict(format='pt'))
    quant = dict(quant_method='gptq', bits=4, group_size=group, sym=True, desc_act=False, checkpoint_format='gptq')
    cfg.quantization_config, cfg.dtype, cfg.architectures = quant, 'float16', [type(model).__name__]
    cfg.save_pretrained(folder)

def random_adapter(classifier, folder, seed):
    "A LoRA whose B is not zero, saved; the classifier has it"
    add_lora(classifier, r=16, alpha=32, seed=seed)
    torch.manual_seed(seed)
    for n, p in classifier.named_parameters():
        if 'lora_B' in n: p.data.normal_(0, .02)
    classifier.model.save_pretrained(folder)
    return classifier.to(device).eval()

def lengths(k, most, least=16): return np.clip(contest_lengths('lmsys', k), least, most)

def sequences(ns, vocab, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocab, n).astype(np.int32) for n in ns]

def as_enc(ids): return pd.DataFrame(dict(row=np.arange(len(ids)), view=0, ids=ids, n=[len(i) for i in ids]))

def free():
    gc.collect()
    if device == 'cuda': torch.cuda.empty_cache()

def by_packs(classifier, gate, ids, compiled=True, budget=16384):
    "Probabilities of the gate's rows, and the tokens a second of the others"
    n = np.full(max(len(gate), len(ids)), len(classifier.letters))
    if device == 'cuda':
        fuse(classifier)
        if compiled: compile_layers(classifier)
    p = view_probs(classifier, as_enc(gate), n, budget, progress=False)
    view_probs(classifier, as_enc(ids), n, budget, progress=False)
    seconds = timed(view_probs, classifier, as_enc(ids), n, budget, progress=False)[1]
    return p, sum(map(len, ids))/seconds

def by_vllm(engine, gate, ids, letters, adapter):
    "Log-probabilities of the gate's rows, and the tokens a second of the others"
    logp = engine.letters(gate, letters, adapter)
    engine.letters(ids[:32], letters, adapter)
    seconds = timed(engine.letters, ids, letters, adapter, True)[1]
    return logp, sum(map(len, ids))/seconds

def measure_parity(a):
    from competition_kit.base import base_path, load_tokenizer
    from competition_kit.prompt import Prompt
    most = 128 if a.small else 1024
    prompt = Prompt(load_tokenizer(), 'preference', most)
    k, m = (8, 4) if a.small else (64, 1024)
    ids, gate = sequences(lengths(m, most), len(prompt.tok)), sequences(lengths(k, most), len(prompt.tok), 1)
    n, kit, speed = np.full(k, 3), [], []
    with tempfile.TemporaryDirectory() as folder:
        adapters = [Path(folder)/str(k) for k in (1, 2)]
        for k, f in enumerate(adapters):
            p, s = by_packs(random_adapter(load_classifier('smollm2', prompt, dtype=dtype), f, k), gate, ids, False)
            kit.append(p)
            speed.append(s)
            free()
        engine, start = timed(Engine, base_path(), adapters, dtype, most+1, enforce_eager=True)
        with engine:
            base = engine.letters(gate, prompt.letters)
            for k in 0, 1:
                logp, fast = by_vllm(engine, gate, ids, prompt.letters, k+1)
                facts = parity(kit[k], logp, n, base)
                report('vllm', what='engine parity', shape='smollm2', lora=k+1, **facts, packs_tokens_s=speed[k],
                       vllm_tokens_s=fast, start_seconds=start, engine_version=engine.version)

def measure_letters(a, name='qwen2.5-7b', bits=16):
    layers, most = a.layers if bits == 16 else max(2, a.layers//2), 128 if a.small else 2048
    whole, vocab, letters = known_bases[name], 4096, [5, 6, 7]
    cfg = config(whole | (small if a.small else {}), layers, vocab)
    ids, gate = sequences(lengths(16 if a.small else 512, most), vocab), sequences(lengths(64, most), vocab, 1)
    n, slots, how = np.full(64, 3), [1, 0] if bits == 16 else [0], 'bf16' if device == 'cuda' else 'fp32'
    with tempfile.TemporaryDirectory() as folder:
        base, adapter = Path(folder)/'base', Path(folder)/'lora'
        base.mkdir()
        (write_base if bits == 16 else write_gptq)(base, cfg)
        free()
        register_attention()
        if bits == 16:
            kw = dict(dtype=torch.bfloat16 if device == 'cuda' else torch.float32, attn_implementation='packed')
            model = AutoModelForCausalLM.from_pretrained(base, **kw).to(device)
            classifier = random_adapter(Classifier(model, letters), adapter, 0)
        else:
            how = 'fp16'
            kw = dict(num_labels=None, attn_implementation='packed')
            model = load_mapped(base, AutoModelForCausalLM, torch.float16, None, **kw)
            classifier = Classifier(model.to(device), letters).eval()
        kit, packs = by_packs(classifier, gate, ids)
        del classifier, model
        free()
        engine, start = timed(Engine, base, [adapter] if bits == 16 else [], how, most+1, enforce_eager=True,
                              skip_tokenizer_init=True)
        with engine:
            for slot in slots:
                logp, fast = by_vllm(engine, gate, ids, letters, slot)
                facts = {} if bits == 16 and not slot else parity(kit, logp, n, limit=.02 if bits == 16 else .05)
                all_layers = layers/whole['num_hidden_layers']
                report('vllm', what='engine letters', shape=name, bits=bits, layers=layers, lora=slot,
                       packs_tokens_s=packs, vllm_tokens_s=fast, vllm_to_packs=fast/packs,
                       whole=[round(packs*all_layers), round(fast*all_layers)], start_seconds=start, **facts)

def measure_text(a):
    k, new, most = (8, 8, 64) if a.small else (256, 256, 1024)
    cfg = config(llama_1b | (small if a.small else {}), 2 if a.small else 16, 4096 if a.small else 128256)
    ids = sequences(lengths(k, most), cfg.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(cfg)
        model.save_pretrained(folder)
        width = max(map(len, ids))
        padded = torch.tensor(np.stack([np.pad(i, (width-len(i), 0)) for i in ids]), device=device).long()
        mask = torch.tensor(np.stack([np.arange(width) >= width-len(i) for i in ids]), device=device).long()
        how = dict(attention_mask=mask, do_sample=True, temperature=1., top_k=0, pad_token_id=0)
        with torch.no_grad():
            model.generate(padded[:4], **how | dict(attention_mask=mask[:4]), max_new_tokens=4)
            out, peer = timed(model.generate, padded, **how, max_new_tokens=new, min_new_tokens=new)
        assert out.shape[1] == width+new
        del model, out
        free()
        engine, start = timed(Engine, folder, (), dtype, most+new, skip_tokenizer_init=True)
        with engine:
            how = dict(max_new=new, ignore_eos=True, detokenize=False)
            engine.text(ids[:8], range(8), **how | dict(max_new=8))
            texts, own = timed(engine.text, ids, range(k), **how)
        assert all(len(o['tokens']) == new for o in texts)
        report('vllm', what='engine text', shape='llama-3.2-1b', sequences=k, new_tokens=new,
               transformers_seconds=peer, vllm_seconds=own, transformers_tokens_s=k*new/peer, vllm_tokens_s=k*new/own,
               vllm_to_transformers=peer/own, start_seconds=start)

def measure_replies(a):
    from common import alternate
    from statistics import median
    from competition_kit.base import load_tokenizer
    from competition_kit.replies import TransformersEngine, VllmEngine, job_table
    from competition_kit.tables import load_rows
    from competition_kit.text import TextPrompt
    k, new = (8, 32) if device == 'cpu' else (64 if a.small else 256, 256)
    rows, prompt = load_rows('sample_logic'), TextPrompt(load_tokenizer(), 1024)
    enc = prompt.encode(rows)
    def jobs(attempt, temperature, n): return list(job_table(enc[:n], attempt, 0, new, temperature, .95).request)
    asked = [r for t in range(-(-k//len(rows))) for r in jobs(t, .8, k)][:k]
    own = TransformersEngine('smollm2', prompt)
    with VllmEngine('smollm2', prompt, enable_prefix_caching=False) as served:  # the rounds ask the same prompts
        same = np.mean([x == y for x, y in zip(own.replies(jobs(0, 0., 8)), served.replies(jobs(0, 0., 8)))])
        texts = {}
        def run(engine): texts[engine.name] = engine.replies(asked)
        seconds = alternate(dict(transformers=lambda: run(own), vllm=lambda: run(served)), repeat=3, warm=0)
    speed = {name: sum(t.n_tokens for t in texts[name])/median(seconds[name]) for name in seconds}
    report('vllm', what='engine replies', shape='smollm2', sequences=k, most_new_tokens=new, greedy_same=float(same),
           transformers_tokens_s=speed['transformers'], vllm_tokens_s=speed['vllm'], seconds=seconds,
           vllm_to_transformers=speed['vllm']/speed['transformers'])

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('what', nargs='*', default=['parity', 'text', 'letters'])
    p.add_argument('--layers', type=int, default=8)
    p.add_argument('--small', action='store_true')
    a = p.parse_args()
    parts = dict(parity=measure_parity, letters=measure_letters, text=measure_text, replies=measure_replies,
                 gptq=lambda a: measure_letters(a, 'qwen2.5-32b', 4))
    for name in a.what:
        began = time.perf_counter()
        try: parts[name](a)
        except Exception as e:
            print(json.dumps(dict(what=f'engine {name}', failed=f'{type(e).__name__}: {e}'[-1500:])), flush=True)
        print(json.dumps(dict(what=f'engine {name}', seconds=round(time.perf_counter()-began, 1))), flush=True)
