"""ms-swift as a peer of bench/train.py: the same LoRA training (random weights, LMSYS-like lengths, 3 classes).

usage: python bench/ms_swift.py [--layers 4 8] [--of 28] [--whole] [--task seq_cls|causal_lm]
                                [--mode packing|padding_free|padded] [--budget 16384] [--batch 16]
                                [--no-checkpointing] [--no-liger] [--extra name=value ...]
`swift sft` runs with packing, Liger's kernels and flash attention. Needs ms-swift (seen: 4.6.0 with transformers 5.17),
Liger's kernels and flash attention 2. Time is measured at two numbers of layers, each in its own process, and extended
to `--of`; --whole measures that number itself. One JSON line at the end, as bench/train.py prints.
Its LoRA weights are fp32 unless `--extra lora_dtype=bfloat16`. Its packs hold other rows than bench/train.py's unless
`--extra packing_strategy=sequential train_dataloader_shuffle=false dataset_shuffle=false`."""
import argparse, importlib.metadata, json, os, shutil, subprocess, sys, time
from common import report, wait_for_gpu  # beside this file
from competition_kit.cost import known_bases
from competition_kit.pack import contest_lengths
from train import flops, matmul_rate

def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--layers', nargs='+', type=int, default=[4, 8])
    p.add_argument('--of', type=int, default=28)
    p.add_argument('--whole', action='store_true')
    p.add_argument('--hidden', type=int, default=3584)
    p.add_argument('--inner', type=int, default=18944)
    p.add_argument('--heads', type=int, default=28)
    p.add_argument('--kv-heads', type=int, default=4)
    p.add_argument('--vocab', type=int, default=4096, help='as in bench/train.py: rows of the vocabulary that are used')
    p.add_argument('--r', type=int, default=64)
    p.add_argument('--dropout', type=float, default=.05)
    p.add_argument('--task', default='seq_cls', choices=['seq_cls', 'causal_lm'])
    p.add_argument('--mode', default='packing', choices=['packing', 'padding_free', 'padded'])
    p.add_argument('--budget', type=int, default=16384, help='tokens of a pack')
    p.add_argument('--batch', type=int, default=16, help='rows of a step without packing')
    p.add_argument('--accumulate', type=int, default=1)
    p.add_argument('--max-len', type=int, default=2048)
    p.add_argument('--warm', type=int, default=8)
    p.add_argument('--steps', type=int, default=12)
    p.add_argument('--no-checkpointing', action='store_true')
    p.add_argument('--no-liger', action='store_true')
    p.add_argument('--attn', default='flash_attn')
    p.add_argument('--work', default='swift_work')
    p.add_argument('--extra', nargs='+', default=[], help='further arguments of swift, name=value')
    p.add_argument('--one', type=int, help=argparse.SUPPRESS)
    p.add_argument('--log', action='store_true', help='show what swift prints')
    return p.parse_args()

a = arguments()

def letters():
    "As many letters as the vocabulary has room for words of three of them"
    return list(next('abcdefghijklmnopqrstuvwxyz'[:n] for n in range(26, 1, -1) if n+n*n+n**3+259 <= a.vocab))

def save_tokenizer(path):
    "Byte-level; each word of three letters is one token, so that a row's text has just the wanted tokens"
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer
    vocab = ['<pad>', '<eos>', '<unk>']+sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = []
    heads = ['\u0120']+['\u0120'+x for x in letters()]+['\u0120'+x+y for x in letters() for y in letters()]
    for head in heads:
        for x in letters():
            merges.append((head, x))
            vocab.append(head+x)
    ids = {word: i for i, word in enumerate(vocab)}
    special = dict(unk_token='<unk>', eos_token='<eos>', pad_token='<pad>')
    Qwen2Tokenizer(vocab=ids, merges=merges, **special).save_pretrained(path)

def save_base(path, layers):
    "Random weights of standard deviation .02"
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM
    config = Qwen2Config(
        hidden_size=a.hidden, intermediate_size=a.inner, num_hidden_layers=layers, num_attention_heads=a.heads,
        num_key_value_heads=a.kv_heads, vocab_size=a.vocab, max_position_embeddings=32768, rope_theta=1e6,
        tie_word_embeddings=False, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device('cuda' if torch.cuda.is_available() else 'cpu'): model = Qwen2ForCausalLM(config)
    finally: torch.set_default_dtype(torch.float32)
    for weight in model.parameters():
        if weight.dim() > 1: weight.data.normal_(0, .02)
    model.save_pretrained(path)

def save_rows(path, n):
    "Rows of random words; a causal row ends with an answer and the end token, which count as its tokens"
    import numpy as np
    rng, fixed = np.random.default_rng(0), 0 if a.task == 'seq_cls' else 2
    with open(path, 'w') as f:
        for length in contest_lengths('lmsys', n, a.max_len):
            words = rng.choice(letters(), (max(length-fixed, 1), 3))
            question = dict(role='user', content=''.join(' '+''.join(w) for w in words))
            label = int(rng.integers(3))
            row = dict(messages=[question], label=label)
            if a.task != 'seq_cls':
                row = dict(messages=[question, dict(role='assistant', content=' aa'+letters()[label])])
            f.write(json.dumps(row)+'\n')

def swift_arguments(base, rows, total, cuda):
    args = dict(
        model=base, model_type='qwen2', template='qwen', use_chat_template=False, dataset=[rows], task_type=a.task,
        tuner_type='lora', lora_rank=a.r, lora_alpha=2*a.r, lora_dropout=a.dropout, target_modules=['all-linear'],
        torch_dtype='bfloat16', bf16=True, attn_impl=a.attn, max_length=a.max_len,
        per_device_train_batch_size=1 if a.mode == 'packing' else a.batch, gradient_accumulation_steps=a.accumulate,
        gradient_checkpointing=not a.no_checkpointing, use_liger_kernel=not a.no_liger, max_steps=total,
        learning_rate=1e-5, logging_steps=5, save_strategy='no', eval_strategy='no', split_dataset_ratio=0.,
        report_to=['none'], dataloader_num_workers=4 if cuda else 0, dataset_num_proc=4 if cuda else 1,
        check_model=False, output_dir=os.path.join(a.work, 'out'), add_version=False)
    if a.task == 'seq_cls': args['num_labels'] = 3
    if a.task == 'seq_cls' and not a.no_liger:
        # else, with transformers 5.17, Liger's forward of a language model takes the classifier's place at the start of
        # train() and looks for its lm_head; swift's command line cannot parse this argument
        args['liger_kernel_config'] = dict(fused_linear_cross_entropy=False)
    if a.mode == 'packing': args |= dict(packing=True, packing_length=a.budget)
    if a.mode == 'padding_free': args['padding_free'] = True
    if not cuda: args['use_cpu'] = True
    from yaml import safe_load
    return args | {name: safe_load(value) for name, value in (x.split('=', 1) for x in a.extra)}

def row_lengths(n, marks, free):
    "Lengths of the rows of a batch: from the offsets at which positions start anew, or from the mask"
    if not free: return marks.sum(-1).tolist()
    starts = (marks.flatten() == 0).nonzero().flatten().tolist()+[n]
    return [end-start for start, end in zip(starts, starts[1:])]

class Watch:
    "Clocks swift's steps and counts their tokens; nothing else of swift is changed"
    def __init__(self): self.times, self.batches, self.losses, self.model = [], [], [], None

    def install(self):
        import torch, transformers
        from swift.trainers import mixin
        watch = self
        class Clock(transformers.TrainerCallback):
            def on_step_end(self, args, state, control, **kw):
                wait_for_gpu()
                watch.times.append(time.perf_counter())
                if state.global_step == a.warm and torch.cuda.is_available(): torch.cuda.reset_peak_memory_stats()
        callbacks = mixin.SwiftMixin._get_callbacks
        def with_clock(trainer, args): return callbacks(trainer, args)+[Clock()]
        mixin.SwiftMixin._get_callbacks = with_clock
        step = transformers.Trainer.training_step
        def training_step(trainer, model, inputs, *more, **kw):
            ids, mask, position = (inputs.get(k) for k in ('input_ids', 'attention_mask', 'position_ids'))
            watch.batches.append((ids.numel(), (position if mask is None else mask).detach(), mask is None))
            watch.model = model
            loss = step(trainer, model, inputs, *more, **kw)
            watch.losses.append(loss.detach())
            return loss
        transformers.Trainer.training_step = training_step

    def result(self, layers, rate, cuda):
        import torch
        measured = self.batches[a.warm*a.accumulate:(a.warm+a.steps)*a.accumulate]
        ns = [n for batch in measured for n in row_lengths(*batch)]
        learned = [q for q in self.model.parameters() if q.requires_grad]
        norm = self.model.base_model.model.model.norm
        return dict(
            layers=layers, time=self.times[-1]-self.times[a.warm-1], rate=rate, tokens=sum(ns),
            places=sum(n for n, *_ in measured), rows=len(ns), ns=ns,
            GiB=torch.cuda.max_memory_allocated()/2**30 if cuda else 0,
            losses=[round(float(loss), 4) for loss in self.losses],
            step_s=[round(end-start, 3) for start, end in zip(self.times, self.times[1:])],
            trained=sum(q.numel() for q in learned), lora_dtype=str(learned[0].dtype),
            attn=self.model.config._attn_implementation,
            norm=f"{type(norm).__name__}.{getattr(norm.forward, '__module__', '?')}")

def one(layers):
    "Train a base of so many layers in this process and print what was measured"
    os.environ.setdefault('USE_HF', '1')
    os.environ.setdefault('HF_HUB_OFFLINE', '1')
    import torch
    cuda = torch.cuda.is_available()
    rate = matmul_rate()[1] if cuda else 0
    base = os.path.join(a.work, f'base{layers}')
    if not os.path.exists(os.path.join(base, 'config.json')):
        save_tokenizer(base)
        save_base(base, layers)
    if cuda: torch.cuda.empty_cache()
    rows, total = os.path.join(a.work, f'{a.task}{a.max_len}.jsonl'), a.warm+a.steps
    if not os.path.exists(rows):
        save_rows(rows, max(2000 if cuda else 60, 2*total*a.accumulate*max(a.batch, a.budget//700)))
    from swift.arguments import SftArguments
    from swift.pipelines import sft_main
    watch = Watch()
    watch.install()
    sft_main(SftArguments(**swift_arguments(base, rows, total, cuda)))
    print('ONE '+json.dumps(watch.result(layers, rate, cuda)), flush=True)

def measure(layers):
    "`one` in a process of its own"
    command = [sys.executable, os.path.abspath(__file__), '--one', str(layers), *sys.argv[1:]]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    results = [line for line in run.stdout.splitlines() if line.startswith('ONE ')]
    if a.log or run.returncode or not results: print(run.stdout[-20000:], flush=True)
    if not results: raise SystemExit(f'{layers} layers: swift ended with {run.returncode}')
    shutil.rmtree(os.path.join(a.work, f'base{layers}'), ignore_errors=True)
    return json.loads(results[-1][4:])

def extended(results):
    "Seconds and GiB of all layers, from two numbers of them"
    if len(results) == 1: return results[0]['time'], results[0]['GiB']
    few, more = results[:2]
    factor = (a.of-few['layers'])/(more['layers']-few['layers'])
    return tuple(few[k]+(more[k]-few[k])*factor for k in ('time', 'GiB'))

def main():
    start = time.perf_counter()
    results = [measure(k) for k in ([a.of] if a.whole else a.layers)]
    for result in results: print(json.dumps({k: v for k, v in result.items() if k != 'ns'}), flush=True)
    last, share = results[-1], None
    assert all(result['ns'] == last['ns'] for result in results), 'the runs saw other rows'
    seconds, memory = extended(results)
    sizes = ('hidden_size', 'intermediate_size', 'num_hidden_layers')
    known = (a.hidden, a.inner, a.of) == tuple(known_bases['qwen2.5-7b'][k] for k in sizes)
    if last['rate'] and known: share = round(2*flops('qwen2.5-7b', last['ns'])/seconds/last['rate'], 3)
    report(
        'torch', 'transformers', shape=f'qwen2 {a.hidden}x{a.inner}x{a.of}',
        what='ms-swift '+importlib.metadata.version('ms-swift'), rate=round(last['rate']/1e12), share=share,
        task=a.task, mode=a.mode, checkpointing=not a.no_checkpointing, liger=not a.no_liger, attn=last['attn'],
        dropout=a.dropout,
        lora_dtype=last['lora_dtype'], tokens_s=round(last['tokens']/seconds), rows_s=round(last['rows']/seconds, 1),
        GiB=round(memory, 1), budget=a.budget if a.mode == 'packing' else a.batch,
        took=round(time.perf_counter()-start), whole=a.whole or len(results) == 1)

if __name__ == '__main__':  # packing starts its workers by spawn once CUDA is in use, and they read this file again
    if a.one is not None: one(a.one)
    else: main()
