"""How close to the GPU's limit does training come, and how close do others?

LoRA on the true shape of a base with random weights, LMSYS-like lengths.

usage: python bench/train.py [--shape qwen2.5-7b] [--what kit kit-fit kit-shared kit-dropout kit-keep kit-nf4 kit-gptq
    kit-eager kit-liger peft hf hf-grouped frozen teacher teacher-nf4 teacher-gptq distill-ratio] [--layers 4 8]
    [--r 64] [--budget 16384] [--max-len 2048] [--whole] [--warm 3] [--packs 8] [--template 160] [--fixed TOKENS]
    [--recompute LAYERS]     (shape: a name of `known_bases`)
Time is measured at two numbers of layers and extended to all (a + b x layers); --whole measures the whole model
instead. `distill-ratio` trains one whole model with the plain loss and with two teachers' loss, in turns.
Prints the share of the bound of 4N (a frozen base needs a forward and the gradients of its inputs; a teacher the
forward alone, 2N), with the matrix rate measured in the same run; attention counts with the mean causal context.
`ms` is a pack's time, `host_ms` the processor's time to start one (of the last number of layers measured): where the
two come close, the processor was measured, not the GPU."""
import argparse, gc, json, tempfile, time
import numpy as np
import torch
from competition_kit.cost import known_bases
from competition_kit.pack import contest_lengths
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import Trainer, TrainerCallback, TrainingArguments

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
VOCAB = 4096  # the rows of the vocabulary that are used; the others cost nothing here, nor in the kit

def config(shape, layers, **kw):
    d = dict(known_bases[shape], num_hidden_layers=layers, vocab_size=VOCAB, pad_token_id=0,
             max_position_embeddings=32768)
    if d['model_type'] == 'gemma2': d['layer_types'] = None
    d |= kw
    return AutoConfig.for_model(**d)

def build(cls, cfg):
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE): model = cls.from_config(cfg)
    finally: torch.set_default_dtype(torch.float32)
    for p in model.parameters():
        if p.dim() > 1: p.data.normal_(0, .02)
    return model.requires_grad_(False)

def flops(shape, ns): # of one forward of sequences with these lengths, whole model without its vocabulary
    c = known_bases[shape]
    h, f, q, kv = c['hidden_size'], c['intermediate_size'], c['num_attention_heads'], c['num_key_value_heads']
    d, ns = c['head_dim'], np.asarray(ns, float)
    return c['num_hidden_layers']*(2*(h*d*(2*q+2*kv)+3*h*f)*ns.sum()+4*q*d*(ns**2/2).sum())

def matmul_rate(n=8192, seconds=4.):
    "What the GPU does in the first moment, and what it can hold: under load its clock falls to what its power allows"
    a, b = (torch.randn(n, n, device='cuda', dtype=torch.bfloat16) for _ in 'ab')
    def rate():
        torch.cuda.synchronize()
        t = time.perf_counter()
        for _ in range(30): a@b
        torch.cuda.synchronize()
        return 30*2*n**3/(time.perf_counter()-t)
    rate()
    first, start = rate(), time.perf_counter()
    while time.perf_counter()-start < seconds: held = rate()
    return first, held

def lora_config(r, drop, **kw):
    from peft import LoraConfig
    modules = 'q_proj k_proj v_proj o_proj gate_proj up_proj down_proj'.split()
    return LoraConfig(r=r, lora_alpha=2*r, lora_dropout=drop, target_modules=modules, **kw)

def packs_of(ns, budget):
    out, cur = [], []
    for n in ns:
        if sum(cur)+n > budget:
            out.append(cur)
            cur = []
        cur.append(int(n))
    return out

def packed_base(model, format):
    "The same layers in nf4 from bitsandbytes, or as random codes of GPTQ (gptq8: of eight bits) in groups of 128"
    for parent in list(model.modules()):
        for name, lin in list(parent.named_children()):
            if not isinstance(lin, torch.nn.Linear) or lin is model.get_output_embeddings(): continue
            i, o = lin.in_features, lin.out_features
            if format == 'nf4':
                import bitsandbytes as bnb
                kw = dict(quant_type='nf4', compress_statistics=True)
                new = bnb.nn.Linear4bit(i, o, bias=lin.bias is not None, compute_dtype=torch.bfloat16,
                                            device='meta', **kw)  # on a CPU it would draw random weights
                new.weight = bnb.nn.Params4bit(lin.weight.data, requires_grad=False, **kw)
                new.bias = lin.bias
                new = new.to(DEVICE)
            else:
                from competition_kit.quant import GPTQLinear
                bits, middle = (8, 0x7f7f7f7f) if format == 'gptq8' else (4, 0x77777777)
                codes = torch.randint(-2**31, 2**31-1, (i*bits//32, o), device=DEVICE, dtype=torch.int32)
                zeros = torch.full((i//128, o*bits//32), middle, device=DEVICE, dtype=torch.int32)
                scales = torch.rand(i//128, o, device=DEVICE).half()*.01
                new = GPTQLinear(codes, zeros, scales, bias=lin.bias, bits=bits)
            setattr(parent, name, new)
            lin.weight = None
    return model

def liger(shape): # for the rest of the process
    import liger_kernel.transformers as kernels
    apply = getattr(kernels, f"apply_liger_kernel_to_{known_bases[shape]['model_type']}")
    apply(cross_entropy=False, fused_linear_cross_entropy=False)

def kit_model(a, shape, layers, what, checkpointed=None):
    """`what`: kit (fused, compiled), kit-fit (the same in the kit's own training: data, schedule, clipping, checkpoints
    at the end), kit-shared (all rows begin with the same `--template` tokens), kit-nf4, kit-gptq (four bits),
    kit-dropout, kit-full (all weights), kit-keep (the compiler keeps all inputs for the backward pass), kit-eager (not
    compiled), kit-liger (Liger's kernels instead), peft (PEFT's layers, compiled), frozen (no LoRA, compiled), teacher
    (forward alone)"""
    teacher, format = what.startswith('teacher'), what.rpartition('-')[2]
    from competition_kit.attention import register_attention
    from competition_kit.model import Classifier, add_lora
    from competition_kit.speed import checkpoint_activations, compile_layers, fuse
    register_attention()
    if what == 'kit-liger': liger(shape)
    model = build(AutoModelForCausalLM, config(shape, layers, attn_implementation='packed'))
    if format in ('nf4', 'gptq', 'gptq8'): packed_base(model, format)
    classifier = Classifier(model, [5, 6, 7])
    drop = .05 if what == 'kit-dropout' else getattr(a, 'dropout', 0.)
    if what == 'kit-full': classifier.model.requires_grad_(True)
    elif what != 'frozen' and not teacher: add_lora(classifier, r=a.r, alpha=2*a.r, dropout=drop)
    if what.startswith('kit') and what != 'kit-full': fuse(classifier)
    for n, p in classifier.named_parameters():
        if 'lora_B' in n: p.data.normal_(0, .01)
    if what == 'frozen':
        embeddings = classifier.model.get_input_embeddings()
        embeddings.register_forward_hook(lambda m, i, o: o.requires_grad_(True))
    if checkpointed is None: checkpointed = a.recompute if layers == known_bases[shape]['num_hidden_layers'] else 0
    checkpoint_activations(classifier, checkpointed)
    classifier.to(DEVICE).train(not teacher)
    if what not in ('kit-eager', 'kit-liger') and getattr(a, 'compiled', True): compile_layers(classifier)
    if what == 'kit-keep': torch._functorch.config.ban_recompute_materialized_backward = True
    return classifier

def wait():
    if DEVICE == 'cuda': torch.cuda.synchronize()

def kit(a, shape, layers, what, checkpointed=None):
    "Our packs through a loop of this file"
    return train_packs(a, kit_model(a, shape, layers, what, checkpointed), what)

def train_packs(a, classifier, what): # seconds of the packs behind `a.warm`, and their lengths
    from competition_kit.fit import KahanAdamW
    from competition_kit.model import collate, option_mask, pack_loss
    teacher = what.startswith('teacher')
    learn = [p for p in classifier.parameters() if p.requires_grad]
    if what == 'kit-full': opt = KahanAdamW(learn)
    else: opt = torch.optim.AdamW(learn, 1e-5, fused=DEVICE == 'cuda') if learn else None
    lengths = getattr(a, 'lengths', 'lmsys')
    ns = contest_lengths(lengths, 4000, a.max_len) if a.fixed is None else [a.fixed]*4000
    packs = packs_of(ns, a.budget)[:a.warm+a.packs]
    rng = np.random.default_rng(0)
    head = rng.integers(0, VOCAB, a.template).astype(np.int32)
    if what != 'kit-shared': head = head[:0]
    def row(n): return np.append(head[:n-1], rng.integers(0, VOCAB, max(1, n-len(head))).astype(np.int32))
    made = [collate([row(n) for n in p]) for p in packs]
    tiny = collate([np.full(48, k, np.int32) for k in (7, 8)])
    def step(b):
        k = len(b['bounds'])-1
        b = {n: v.to(DEVICE, non_blocking=True) if torch.is_tensor(v) else v for n, v in b.items()}
        if teacher:
            with torch.no_grad(): return classifier(**b)
        y = torch.eye(3, device=DEVICE)[torch.zeros(k, dtype=torch.long, device=DEVICE)]
        pack_loss(classifier(**b), y, torch.ones(k, device=DEVICE), option_mask([3]*k, 3).to(DEVICE), k).backward()
        if opt:
            opt.step()
            opt.zero_grad()
    for b in made[:a.warm]: step(b)
    wait()
    if DEVICE == 'cuda': torch.cuda.reset_peak_memory_stats()
    t = time.perf_counter()
    for b in made[a.warm:]: step(b)
    wait()
    took = time.perf_counter()-t
    for k in range(6): # so little that all of the time goes into starting it
        if k == 2:
            wait()
            t = time.perf_counter()
        step(tiny)
    wait()
    a.host = (time.perf_counter()-t)/4
    return took, packs[a.warm:]

def two_teachers(lines): # random probabilities and the loss of `07_distill` over them
    import functools
    from competition_kit.distill import distill_loss, named_form
    p = torch.randn(lines, 2, 3, generator=torch.Generator().manual_seed(0)).softmax(-1)
    more = dict(teacher=p, use=torch.ones(lines, 3, dtype=torch.bool))
    return more, functools.partial(distill_loss, form=named_form('seed', 2))

def fit_seconds(a, classifier, distill=False): # of the packs behind `a.warm` steps, and their lengths
    from pathlib import Path
    import pandas as pd
    from competition_kit import fit as f
    from competition_kit.pack import plan_steps
    from competition_kit.rows import tasks
    rng, ns, times = np.random.default_rng(0), contest_lengths('lmsys', 32*(a.warm+a.packs), a.max_len), []
    ids = [rng.integers(0, VOCAB, n).astype(np.int32) for n in ns]
    enc = pd.DataFrame(dict(row=np.arange(len(ns)), view=0, n=ns, ids=ids))
    rows, steps = pd.DataFrame(dict(label=0, target=[None]*len(ns), weight=1.)), plan_steps(enc, 32, 1., a.budget, 0)
    bar = f.ProgressBar
    class Clock(bar):
        def on_step_end(self, args, state, control, **kw):
            super().on_step_end(args, state, control, **kw)
            if state.global_step not in (a.warm, len(steps)): return
            torch.cuda.synchronize()
            if not times: torch.cuda.reset_peak_memory_stats()
            times.append(time.perf_counter())
    f.ProgressBar = Clock
    more, loss = two_teachers(len(enc)) if distill else ({}, f.pack_loss)
    data = f.Steps(enc, rows, tasks['preference'], steps, more=more)
    with tempfile.TemporaryDirectory() as d: f.fit(classifier, data, Path(d), lr=1e-5, save_every=10**6, loss=loss)
    f.ProgressBar = bar
    return times[1]-times[0], [ns[p].tolist() for packs, in steps[a.warm:] for p in packs]

def kit_fit(a, shape, layers, what):
    "Our packs through `fit`, 32 rows a step; `kit-fit-distill`: with the probabilities of two teachers"
    return fit_seconds(a, kit_model(a, shape, layers, what), what == 'kit-fit-distill')

def distill_ratio(a, shape, times=3): # one whole model, compiled once; both losses in turns
    classifier = kit_model(a, shape, known_bases[shape]['num_hidden_layers'], 'kit-fit')
    fit_seconds(a, classifier)
    pairs = [[fit_seconds(a, classifier, distill)[0] for distill in (False, True)] for _ in range(times)]
    plain, distill = np.array(pairs).T
    return dict(shape=shape, what='distill-ratio', plain_s=plain.round(2).tolist(), distill_s=distill.round(2).tolist(),
                ratio=round(float(np.median(distill/plain)), 4))

def hf(a, shape, layers, what):
    """transformers' Trainer with PEFT's LoRA: padded batches of 8; `hf`: in random order; `hf-grouped`: of like
    lengths, and Liger's kernels; both with checkpointing, without which 28 layers do not fit"""
    from peft import get_peft_model
    if what == 'hf-grouped': liger(shape)
    warm = a.warm+5
    made = config(shape, layers, num_labels=3, attn_implementation='sdpa')
    model = build(AutoModelForSequenceClassification, made)
    model = get_peft_model(model, lora_config(a.r, 0., task_type='SEQ_CLS'))
    ns, rng = contest_lengths('lmsys', 8*(warm+a.packs)+8, a.max_len), np.random.default_rng(0)
    data = [dict(input_ids=rng.integers(1, VOCAB, n).tolist(), labels=0, length=int(n)) for n in ns]
    seen = []
    def pad(rows):
        n = max(r['length'] for r in rows)
        seen.append([r['length'] for r in rows])
        ids = torch.tensor([r['input_ids']+[0]*(n-r['length']) for r in rows])
        return dict(input_ids=ids, attention_mask=(ids != 0).long(), labels=torch.zeros(len(rows), dtype=torch.long))
    grouped = {}
    if what == 'hf-grouped':
        names = set(TrainingArguments.__dataclass_fields__)
        grouped = dict(group_by_length=True)
        if 'train_sampling_strategy' in names: grouped = dict(train_sampling_strategy='group_by_length')
    args = TrainingArguments(output_dir=tempfile.mkdtemp(), max_steps=warm+a.packs, per_device_train_batch_size=8,
                             learning_rate=1e-5, bf16=True, gradient_checkpointing=True, report_to='none',
                             save_strategy='no', logging_steps=10000, disable_tqdm=True, remove_unused_columns=False,
                             **grouped)
    times = []
    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kw):
            torch.cuda.synchronize()
            times.append(time.perf_counter())
            if state.global_step == warm: torch.cuda.reset_peak_memory_stats()
    Trainer(model=model, args=args, train_dataset=data, data_collator=pad, callbacks=[Clock()]).train()
    return times[-1]-times[warm-1], seen[warm:warm+a.packs]

def measure(a, shape, layers, what, checkpointed=None):
    left, a.host = torch.cuda.memory_allocated() if DEVICE == 'cuda' else 0, 0  # by what ran before: not this one's
    if what.startswith('hf'): t, rows = hf(a, shape, layers, what)
    elif what.startswith('kit-fit'): t, rows = kit_fit(a, shape, layers, what)
    else: t, rows = kit(a, shape, layers, what, checkpointed)
    mem = (torch.cuda.max_memory_allocated()-left)/2**30 if DEVICE == 'cuda' else 0.
    torch._dynamo.reset()
    gc.collect()
    if DEVICE == 'cuda': torch.cuda.empty_cache()
    return t, rows, mem

def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add('--shape', nargs='+', default=['qwen2.5-7b'])
    add('--what', nargs='+', default=['kit', 'kit-dropout', 'kit-eager', 'peft', 'hf', 'hf-grouped', 'frozen'])
    add('--layers', nargs=2, type=int, default=[4, 8])
    add('--r', type=int, default=64)
    add('--budget', type=int, default=16384)
    add('--max-len', type=int, default=2048)
    add('--warm', type=int, default=3)
    add('--packs', type=int, default=8)
    add('--whole', action='store_true')
    add('--recompute', type=int, default=0, help='layers with activation checkpointing')
    add('--template', type=int, default=160)
    add('--fixed', type=int, help='every row has so many tokens')
    return p.parse_args()

def extended(a, shape, what): # measured at two numbers of layers, extended to all
    if what.startswith('hf'): measure(a, shape, a.layers[0], what)  # kernels are chosen and compiled in a first run
    (t1, rows, m1), (t2, _, m2) = (measure(a, shape, k, what) for k in a.layers)
    (k1, k2), n = a.layers, known_bases[shape]['num_hidden_layers']
    return t1+(t2-t1)/(k2-k1)*(n-k1), rows, m1+(m2-m1)/(k2-k1)*(n-k1)

def result(a, shape, what):
    (first, rate), start = matmul_rate(), time.perf_counter()
    layers = known_bases[shape]['num_hidden_layers']
    t, rows, mem = measure(a, shape, layers, what) if a.whole else extended(a, shape, what)
    ns, passes = [n for r in rows for n in r], 1 if what.startswith('teacher') else 2
    return dict(shape=shape, what=what, first=round(first/1e12), rate=round(rate/1e12),
                share=round(passes*flops(shape, ns)/t/rate, 3), tokens_s=round(sum(ns)/t), rows_s=round(len(ns)/t, 1),
                GiB=round(mem, 1), host_ms=round(1e3*a.host), ms=round(1e3*t/len(rows)), budget=a.fixed or a.budget,
                took=round(time.perf_counter()-start), whole=a.whole)

if __name__ == '__main__':
    a = arguments()
    for shape in a.shape:
        for what in a.what:
            try:
                line = distill_ratio(a, shape) if what == 'distill-ratio' else result(a, shape, what)
                print(json.dumps(line), flush=True)
            except Exception as e: print(shape, what, repr(e)[:500], flush=True)
