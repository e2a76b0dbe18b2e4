"""A real step of every training and every prediction of the recipes at scale `seed`, beside what the planner expects.

usage: python bench/rehearse.py [--recipes NAME ...] [--seconds 280] [--out rehearse.jsonl] [--compiled] [--small]
    [--table] [--gpu NAME]
Shapes, dtypes, LoRA and packs are those of the recipe, weights are random. A model is cut to 2 and 4 layers, with and
without activation checkpointing, and time and memory are extended to all layers: a + b x layers. Equal work is done
once, at its longest rows. One JSON line each goes to `--out`; work that stands there is not done again, and no work is
begun after `--seconds`. Layers are not compiled unless asked for: compiling takes longer than the steps. `--small`
tries it on a CPU with narrow layers; `--table` prints the lines of `--out` as a table.
`gb` is of one GPU without sharding: a job over several GPUs is measured as one GPU would do all of it."""
import argparse, ast, gc, json, time
from pathlib import Path
import numpy as np
import torch
import train
from competition_kit.core import Refusal
from competition_kit.cost import (Job, base_config, find_gpu, known_bases, layers_to_checkpoint, mean_context, memory,
                                  pack_seconds, prediction_memory, shape)
from competition_kit.graph import expand, read_recipe, stage_parameters
from competition_kit.speed import checkpoint_activations

SYSTEMS = 'arena_distill arena_answer_distill logic_reflect logic_vote arena_pseudo wsdm_first'.split()
LENGTHS = dict(arena_distill='lmsys', logic_reflect='logic', logic_vote='logic')  # all others: wsdm
SIZES = 'model_type num_hidden_layers hidden_size intermediate_size num_attention_heads'.split()

# What there is to do

def shape_name(config): # Its name in `known_bases`
    found = [n for n, c in known_bases.items() if all(c[k] == getattr(config, k) for k in SIZES)]
    if not found: raise Refusal(f'no known shape of {config.model_type} with {config.num_hidden_layers} layers')
    return found[0]

def linked(job, arg): return [n for part in job.links.get(arg, ()) if isinstance(part, list) for n in part]

def arguments_of(job): # All arguments of a job that are no references
    defaults = {k: o['default'] for k, o in stage_parameters(job.stage).items()}
    return {k: ast.literal_eval(v) if isinstance(v, str) else v for k, v in defaults.items()} | job.args

def trained(job): # A training as a dict
    a, config = arguments_of(job), base_config(arguments_of(job)['base'])
    bits = (getattr(config, 'quantization_config', None) or {}).get('bits')
    dtype = f'gptq{bits}' if bits else a['dtype'] if a['dtype'] != 'auto' else 'bf16'
    return dict(shape=shape_name(config), dtype=dtype, method=a['method'], r=a['lora_r'], dropout=a['lora_dropout'],
                tokens=a['pack_tokens'], max_len=a['max_len'], shards=a['gpus'] if a['sharded'] else 1)

def model_of(jobs, name): # The model that a job makes, as `trained`
    job = jobs[name]
    if job.stage in ('train', 'distill'): return trained(job)
    if job.stage == 'merge': return dict(model_of(jobs, linked(job, 'members')[0]), method='full', dtype='bf16')
    if job.stage == 'gptq':
        return dict(model_of(jobs, linked(job, 'start')[0]), method='full', dtype=f"gptq{job.args.get('bits', 4)}")
    raise Refusal(f'{name} makes no model')

def asked(job): # Jobs whose models predict in this one
    names = {'distill': 'teachers', 'pseudo': 'teachers', 'vote': 'runs'}
    return linked(job, names[job.stage]) if job.stage in names else []

def work_of(recipe): # Dicts: the work of each training and of each model that predicts
    jobs = expand(read_recipe(recipe, 'seed'))
    for job in jobs.values():
        step, lengths = f'{recipe}:{job.step}', LENGTHS.get(recipe, 'wsdm')
        if job.stage in ('train', 'distill'): yield dict(trained(job), what='train', step=step, lengths=lengths)
        for name in asked(job):
            model = model_of(jobs, name)
            tokens = 4*model['tokens'] if job.stage == 'distill' else arguments_of(job)['pack_tokens']
            model |= dict(dropout=0., tokens=max(tokens, model['max_len']), shards=1)
            yield dict(model, what='predict', step=step, lengths=lengths)

def all_work(recipes): # Equal work once, at its longest rows, with the steps that do it
    found = {}
    for work in (w for recipe in recipes for w in work_of(recipe)):
        key = json.dumps({k: v for k, v in work.items() if k not in ('step', 'lengths', 'max_len')}, sort_keys=True)
        _, steps = found.get(key, (None, ()))
        longest = max(work, found[key][0], key=lambda w: w['max_len']) if key in found else work
        found[key] = longest, dict.fromkeys([*steps, work['step']])
    return [dict({k: v for k, v in work.items() if k != 'step'}, steps=list(steps)) for work, steps in found.values()]

# What the planner expects

def expected(work, base, gpu, compiled): # Layers to checkpoint; gigabytes and seconds of a pack on one GPU
    job = Job(base, work['method'], work['dtype'], r=work['r'], dropout=work['dropout'], compiled=compiled,
              shards=work['shards'])
    ns = train.contest_lengths(work['lengths'], 4000, work['max_len'])
    tokens = int(np.mean([sum(p) for p in train.packs_of(ns, work['tokens'])[:-1] or [ns]]))
    if work['what'] == 'predict':
        layer = 2*base['linear']+4*base['layers']*base['q']*mean_context(ns)
        return dict(checkpointed=0, gb=prediction_memory(job, tokens)['peak']/1e9, s=tokens*layer/gpu['rate']/.85)
    n = layers_to_checkpoint(job, work['tokens'], gpu['free'], max(8, work['shards']))
    alone = Job(**{**vars(job), 'shards': 1})
    return dict(checkpointed=n, gb=memory(alone, tokens, n)['peak']/1e9,
                s=pack_seconds(alone, gpu, mean_context(ns), tokens, n))

# What a step takes

def kind_of(work): # The `what` of `train.py`
    four = {'nf4': '-nf4', 'gptq4': '-gptq', 'gptq8': '-gptq8'}.get(work['dtype'], '')
    if work['what'] == 'predict': return f'teacher{four}'
    return 'kit-full' if work['method'] == 'full' else f'kit{four}'

def steps_of(work, checkpointed, compiled, packs, cut):
    "A pack's (seconds, GB) with `cut[1]` layers, with some of them checkpointed, and with `cut[0]`; a pack's tokens"
    (few, more), what = cut, kind_of(work)
    a = argparse.Namespace(r=work['r'], budget=work['tokens'], max_len=work['max_len'], warm=1, packs=packs,
                           recompute=0, template=0, fixed=None, lengths=work['lengths'], dropout=work['dropout'],
                           compiled=compiled)
    cuda = torch.cuda.is_available()
    left = torch.cuda.memory_allocated() if cuda else 0  # by what ran before: not this work's
    classifier, out = train.kit_model(a, work['shape'], more, what, 0), []
    train.train_packs(a, classifier, what)  # compiles the kernels for packs of these sizes
    for layers, again in [(more, 0), *([(more, more-few)] if checkpointed else []), (few, 0)]:
        classifier.backbone.layers = classifier.backbone.layers[:layers]
        checkpoint_activations(classifier, again)
        gc.collect()
        if cuda: torch.cuda.empty_cache()
        t, rows = train.train_packs(a, classifier, what)
        gb = (torch.cuda.max_memory_allocated()-left)/1e9 if cuda else 0.
        out.append(np.array([t/len(rows), gb]))
    torch._dynamo.reset()
    return out, sum(map(sum, rows))/len(rows)

def extended(work, total, checkpointed, compiled, packs, cut=(2, 4)):
    "From two numbers of layers to all, of which the first `checkpointed` compute their activations twice"
    few, more = cut
    out, tokens = steps_of(work, checkpointed, compiled, packs, cut)
    plain = again = (out[0]-out[-1])/(more-few)  # seconds and gigabytes of a layer
    # beside `few` plain layers, which hold more than the one layer that is computed again
    if checkpointed: again = (out[1]-out[-1])/(more-few)
    kept = np.array([total-checkpointed, max(total-checkpointed, 1)])  # one layer is whole while its gradients are made
    return *(out[-1]+(kept-few)*plain+(total-kept)*again), tokens

def rehearse(work, gpu, compiled, packs): # One line of the result
    config = train.config(work['shape'], known_bases[work['shape']]['num_hidden_layers'])
    base, start = dict(shape(config), name=work['shape']), time.perf_counter()
    plan = expected(work, base, gpu, compiled)
    s, gb, tokens = extended(work, base['layers'], plan['checkpointed'], compiled, packs)
    return dict(work, layers=base['layers'], compiled=compiled, checkpointed=plan['checkpointed'], pack=round(tokens),
                s=round(s, 3), s_planned=round(plan['s'], 3), gb=round(gb, 1), gb_planned=round(plan['gb'], 1),
                tokens_s=round(tokens/s), took=round(time.perf_counter()-start, 1), gpu=gpu['name'])

def make_small(): # Narrow layers, for a try on a CPU
    for c in known_bases.values():
        c.update(hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, head_dim=64)

def shown(lines): # A table for `results.md`
    rows = ['| step | work | pack, tokens | layers, checkpointed | s a pack | planned | GB | planned | tokens/s |',
            '|---|---|---|---|---|---|---|---|---|']
    for o in lines:
        work = f"{o['what']} {o['shape']}, {o['dtype']}, {o['method']}"
        if o['method'] == 'lora': work += f" r {o['r']}"
        if 'refused' in o: rows.append(f"| {', '.join(o['steps'])} | {work} | | | {o['refused']} | | | | |")
        else: rows.append(f"| {', '.join(o['steps'])} | {work} | {o['pack']:,} | {o['layers']}, {o['checkpointed']} | "
                          f"{o['s']} | {o['s_planned']} | {o['gb']} | {o['gb_planned']} | {o['tokens_s']:,} |")
    return '\n'.join(rows)

def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add('--recipes', nargs='+', default=SYSTEMS)
    add('--seconds', type=float, default=280.)
    add('--out', type=Path, default=Path('rehearse.jsonl'))
    add('--compiled', action='store_true')
    add('--small', action='store_true')
    add('--table', action='store_true')
    add('--gpu', metavar='NAME', help='plan for this GPU of `known_gpus` instead of the one at hand')
    return p.parse_args()

if __name__ == '__main__':
    a, start = arguments(), time.perf_counter()
    done = [json.loads(l) for l in a.out.read_text().splitlines()] if a.out.exists() else []
    if a.table:
        print(shown(done))
        raise SystemExit
    todo = all_work(a.recipes)
    if a.small: make_small()
    gpu, slowest = find_gpu(a.gpu or 'this machine'), 0.
    for work in todo:
        if any(all(o.get(k) == v for k, v in dict(work, compiled=a.compiled).items()) for o in done): continue
        if time.perf_counter()-start+slowest > a.seconds:
            print('no time is left; the same command goes on', flush=True)
            break
        begun = time.perf_counter()
        try: line = rehearse(work, gpu, a.compiled, 1 if a.small else 2)
        except (Refusal, torch.OutOfMemoryError, RuntimeError) as e:
            line = dict(work, compiled=a.compiled, refused=f'{type(e).__name__}: {e}'[:300])
        slowest = max(slowest, time.perf_counter()-begun)
        with a.out.open('a') as f: f.write(json.dumps(line)+'\n')
        print(json.dumps(line), flush=True)
