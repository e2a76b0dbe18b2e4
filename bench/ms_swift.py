"""ms-swift as a peer of bench/train.py: the same LoRA training (random weights, LMSYS-like lengths, 3 classes) through `swift sft`, with packing, Liger's kernels and flash attention.

usage: python bench/ms_swift.py [--layers 4 8] [--of 28] [--whole] [--task seq_cls|causal_lm] [--mode packing|padding_free|padded] [--budget 16384] [--batch 16] [--no-checkpointing] [--no-liger] [--extra ...]
Needs ms-swift (seen: 4.6.0 with transformers 5.17), Liger's kernels and flash attention 2. Time is measured at two numbers of layers, each in its own process, and extended to `--of`; --whole measures that number
itself. One JSON line at the end, as bench/train.py prints. Its LoRA weights are fp32 unless `--extra lora_dtype=bfloat16`; its packs hold other rows than bench/train.py's unless
`--extra packing_strategy=sequential train_dataloader_shuffle=false dataset_shuffle=false`."""
import argparse, json, os, shutil, subprocess, sys, time
from competition_kit.cost import contest_lengths, known_bases
from train import flops, matmul_rate  # beside this file

p = argparse.ArgumentParser(description=__doc__)
p.add_argument('--layers', nargs='+', type=int, default=[4, 8]); p.add_argument('--of', type=int, default=28); p.add_argument('--whole', action='store_true')
p.add_argument('--hidden', type=int, default=3584); p.add_argument('--inner', type=int, default=18944); p.add_argument('--heads', type=int, default=28); p.add_argument('--kv-heads', type=int, default=4)
p.add_argument('--vocab', type=int, default=4096, help='as in bench/train.py: rows of the vocabulary that are used'); p.add_argument('--r', type=int, default=64); p.add_argument('--dropout', type=float, default=.05)
p.add_argument('--task', default='seq_cls', choices=['seq_cls', 'causal_lm']); p.add_argument('--mode', default='packing', choices=['packing', 'padding_free', 'padded'])
p.add_argument('--budget', type=int, default=16384, help='tokens of a pack'); p.add_argument('--batch', type=int, default=16, help='rows of a step without packing'); p.add_argument('--accumulate', type=int, default=1)
p.add_argument('--max-len', type=int, default=2048); p.add_argument('--warm', type=int, default=8); p.add_argument('--steps', type=int, default=12)
p.add_argument('--no-checkpointing', action='store_true'); p.add_argument('--no-liger', action='store_true'); p.add_argument('--attn', default='flash_attn'); p.add_argument('--work', default='swift_work')
p.add_argument('--extra', nargs='+', default=[], help='further arguments of swift, name=value'); p.add_argument('--one', type=int, help=argparse.SUPPRESS); p.add_argument('--log', action='store_true', help='show what swift prints')
a = p.parse_args()

def letters(): return list(next('abcdefghijklmnopqrstuvwxyz'[:n] for n in range(26, 1, -1) if n+n*n+n**3+259 <= a.vocab))

def checkpoint(path, layers):
    "Random weights of std .02 and a byte-level tokenizer whose words of three letters are one token each, so that a row's text has just the wanted tokens"
    import torch
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
    vocab = ['<pad>', '<eos>', '<unk>']+sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = []
    for head in ['\u0120']+['\u0120'+x for x in letters()]+['\u0120'+x+y for x in letters() for y in letters()]:
        for x in letters(): merges.append((head, x)); vocab.append(head+x)
    Qwen2Tokenizer(vocab={w: i for i, w in enumerate(vocab)}, merges=merges, unk_token='<unk>', eos_token='<eos>', pad_token='<pad>').save_pretrained(path)
    cfg = Qwen2Config(hidden_size=a.hidden, intermediate_size=a.inner, num_hidden_layers=layers, num_attention_heads=a.heads, num_key_value_heads=a.kv_heads, vocab_size=a.vocab, max_position_embeddings=32768,
                      rope_theta=1e6, tie_word_embeddings=False, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device('cuda' if torch.cuda.is_available() else 'cpu'): model = Qwen2ForCausalLM(cfg)
    finally: torch.set_default_dtype(torch.float32)
    for q in model.parameters():
        if q.dim() > 1: q.data.normal_(0, .02)
    model.save_pretrained(path)

def data(path, rows):
    import numpy as np
    rng, fixed = np.random.default_rng(0), 0 if a.task == 'seq_cls' else 2  # a causal row: the answer and the end too
    with open(path, 'w') as f:
        for n in contest_lengths("lmsys", rows, a.max_len):
            text = ''.join(' '+''.join(w) for w in rng.choice(letters(), (max(n-fixed, 1), 3)))
            row = dict(messages=[dict(role='user', content=text)], label=int(rng.integers(3))) if a.task == 'seq_cls' else dict(messages=[dict(role='user', content=text), dict(role='assistant', content=' aa'+letters()[rng.integers(3)])])
            f.write(json.dumps(row)+'\n')

def one(layers):
    os.environ.setdefault('USE_HF', '1'); os.environ.setdefault('HF_HUB_OFFLINE', '1')
    import torch
    cuda = torch.cuda.is_available()
    rate = matmul_rate()[1] if cuda else 0
    sync = torch.cuda.synchronize if cuda else lambda: None
    base = os.path.join(a.work, f'base{layers}')
    if not os.path.exists(os.path.join(base, 'config.json')): checkpoint(base, layers)
    if cuda: torch.cuda.empty_cache()
    rows = os.path.join(a.work, f'{a.task}{a.max_len}.jsonl')
    total = a.warm+a.steps
    if not os.path.exists(rows): data(rows, max(2000 if cuda else 60, 2*total*a.accumulate*max(a.batch, a.budget//700)))
    from swift.arguments import SftArguments
    from swift.pipelines import sft_main
    from yaml import safe_load as yaml
    from swift.trainers import mixin
    import transformers
    # the clock and the count of tokens; nothing else is changed
    times, seen, losses, kept = [], [], [], {}
    class Clock(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kw):
            sync()
            times.append(time.perf_counter())
            if state.global_step == a.warm and cuda: torch.cuda.reset_peak_memory_stats()
    old = mixin.SwiftMixin._get_callbacks
    mixin.SwiftMixin._get_callbacks = lambda self, args: old(self, args)+[Clock()]
    step = transformers.Trainer.training_step
    def training_step(self, model, inputs, *x, **kw):
        ids, mask, pos = (inputs.get(k) for k in ('input_ids', 'attention_mask', 'position_ids'))
        seen.append((ids.numel(), (pos if mask is None else mask).detach(), mask is None))
        kept['model'] = model
        loss = step(self, model, inputs, *x, **kw)
        losses.append(loss.detach())
        return loss
    transformers.Trainer.training_step = training_step
    args = dict(model=base, model_type='qwen2', template='qwen', use_chat_template=False, dataset=[rows], task_type=a.task, tuner_type='lora', lora_rank=a.r, lora_alpha=2*a.r, lora_dropout=a.dropout, target_modules=['all-linear'],
                torch_dtype='bfloat16', bf16=True, attn_impl=a.attn, max_length=a.max_len, per_device_train_batch_size=1 if a.mode == 'packing' else a.batch, gradient_accumulation_steps=a.accumulate,
                gradient_checkpointing=not a.no_checkpointing, use_liger_kernel=not a.no_liger, max_steps=total, learning_rate=1e-5, logging_steps=5, save_strategy='no', eval_strategy='no', split_dataset_ratio=0.,
                report_to=['none'], dataloader_num_workers=4 if cuda else 0, dataset_num_proc=4 if cuda else 1, check_model=False, output_dir=os.path.join(a.work, 'out'), add_version=False)
    if a.task == 'seq_cls':
        args.update(num_labels=3)
        # else, with transformers 5.17, Liger's forward of a language model takes the classifier's place at the start of train() and looks for its lm_head; swift's command line cannot parse this argument
        if not a.no_liger: args.update(liger_kernel_config=dict(fused_linear_cross_entropy=False))
    if a.mode == 'packing': args.update(packing=True, packing_length=a.budget)
    if a.mode == 'padding_free': args.update(padding_free=True)
    if not cuda: args.update(use_cpu=True)
    args.update({n: yaml(v) for n, v in (x.split('=', 1) for x in a.extra)})
    sft_main(SftArguments(**args))
    k = a.accumulate
    part = seen[a.warm*k:(a.warm+a.steps)*k]
    def rows_of(n, x, free): # lengths of the rows of a batch: from where positions start anew, or from the mask
        if not free: return x.sum(-1).tolist()
        at = (x.flatten() == 0).nonzero().flatten().tolist()+[n]
        return [v-u for u, v in zip(at, at[1:])]
    ns = [n for b in part for n in rows_of(*b)]
    base_model = kept['model']
    out = dict(layers=layers, time=times[-1]-times[a.warm-1], rate=rate, tokens=sum(ns), places=sum(n for n, *_ in part), rows=len(ns), ns=ns,
               GiB=torch.cuda.max_memory_allocated()/2**30 if cuda else 0, losses=[round(float(l), 4) for l in losses], step_s=[round(v-u, 3) for u, v in zip(times, times[1:])],
               trained=sum(q.numel() for q in base_model.parameters() if q.requires_grad), lora_dtype=str(next(q for q in base_model.parameters() if q.requires_grad).dtype),
               attn=base_model.config._attn_implementation, norm=type(base_model.base_model.model.model.norm).__name__+'.'+getattr(base_model.base_model.model.model.norm.forward, '__module__', '?'))
    print('ONE '+json.dumps(out), flush=True)

def measure(layers):
    r = subprocess.run([sys.executable, os.path.abspath(__file__), '--one', str(layers)]+sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    got = [l for l in r.stdout.splitlines() if l.startswith('ONE ')]
    if a.log or r.returncode or not got: print(r.stdout[-20000:], flush=True)
    if not got: raise SystemExit(f'{layers} layers: swift ended with {r.returncode}')
    shutil.rmtree(os.path.join(a.work, f'base{layers}'), ignore_errors=True)
    return json.loads(got[-1][4:])

if __name__ == "__main__":  # packing starts its workers by spawn once CUDA is in use, and they read this file again
    if a.one is not None: one(a.one)
    else:
        start, got = time.perf_counter(), [measure(k) for k in ([a.of] if a.whole else a.layers)]
        for g in got: print(json.dumps({k: v for k, v in g.items() if k != 'ns'}), flush=True)
        if len(got) == 1: t, mem = got[0]['time'], got[0]['GiB']
        else:
            (k1, t1, m1), (k2, t2, m2) = ((g['layers'], g['time'], g['GiB']) for g in got[:2])
            t, mem = t1+(t2-t1)/(k2-k1)*(a.of-k1), m1+(m2-m1)/(k2-k1)*(a.of-k1)
        g, share = got[-1], None
        assert all(x['ns'] == g['ns'] for x in got), 'the runs saw other rows'
        c = known_bases['qwen2.5-7b']
        if g['rate'] and (a.hidden, a.inner, a.of) == (c['hidden_size'], c['intermediate_size'], c['num_hidden_layers']): share = round(2*flops('qwen2.5-7b', g['ns'])/t/g['rate'], 3)
        import importlib.metadata as md
        print(json.dumps(dict(shape=f'qwen2 {a.hidden}x{a.inner}x{a.of}', what='ms-swift '+md.version('ms-swift'), rate=round(g['rate']/1e12), share=share, task=a.task, mode=a.mode, checkpointing=not a.no_checkpointing, liger=not a.no_liger, attn=g['attn'], dropout=a.dropout, lora_dtype=g['lora_dtype'],
                              tokens_s=round(g['tokens']/t), rows_s=round(g['rows']/t, 1), GiB=round(mem, 1), budget=a.budget if a.mode == 'packing' else a.batch, took=round(time.perf_counter()-start), whole=a.whole or len(got) == 1)), flush=True)
