"""GPTQ: the time of a layer beside plain GPTQModel, and what quantising costs a fine-tuned model.

usage: python bench/gptq.py time [--layers 4] [--rows 128] [--tokens 2047] [--bits 4 8] [--kind llama qwen2]
                                    [--group 128] [--shape JSON]
       python bench/gptq.py kill [--layers 4] [--rows 128] [--tokens 2047] [--bits 4] [--kind llama]
                                    [--group 128] [--shape JSON]
       python bench/gptq.py quality open=FILE alpaca=FILE [--folds 5] [--first 0] [--seeds 3] [--first-seed 0]
                                    [--jobs 4] [--lines …] [--set JSON] [--quantise JSON]
                                    [--until SECONDS] [--out FOLDER]
`time` makes a model of the 14B shape with random weights, cut to some layers, and quantises it twice in each of the
settings: by GPTQModel alone, and by the kit. `kill` ends the kit's run by SIGKILL when half of the layers are finished,
continues it, and compares its bytes with those of a whole run. `quality` trains the folds of the first table, quantises
each run in every line's way, and compares it with its 16-bit model on the held-out rows; the second table gives other
prompts. With CK_ROOT=FOLDER the same command takes up what an earlier call has finished there. After `--until` seconds
nothing new is begun, and the table has the lines that are there."""
import argparse, contextlib, io, json, multiprocessing, os, shutil, tempfile, time, traceback
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '4')
import numpy as np
import pandas as pd

SHAPE = dict(hidden_size=5120, intermediate_size=13824, num_attention_heads=40, num_key_value_heads=8)
FIT = dict(mix='open', max_len=640, batch=32, pack_tokens=32768, warmup=.1, schedule='cosine', save_every=10**6,
           epochs=2., lr=1e-3, recompute=0, compiled='no', dtype='bf16')
WIDE = dict(max_loss=99., max_flips=1.)  # measure, and fail nothing
LINES = {
    '8 bits, group 64': dict(bits=8),
    '4 bits, group 64': dict(bits=4),
    '4 bits, group 32': dict(bits=4, group=32),
    '4 bits, damping .1': dict(bits=4, damp=.1),
    '4 bits, act order': dict(bits=4, act_order=True),
    '4 bits, 512 rows': dict(bits=4, rows=512),
    '4 bits, calibrated at 256 tokens': dict(bits=4, calibration='cut'),
    '4 bits, calibrated on other prompts': dict(bits=4, calibration='other'),
}
USUAL = '4 bits, group 64'  # the other lines are compared with it

# Time of a layer

def random_model(folder, kind, layers, shape):
    "Write a model with random weights; a small vocabulary, since it is not quantised"
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    config = AutoConfig.for_model(kind, vocab_size=4096, num_hidden_layers=layers, max_position_embeddings=4096,
                                  tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2, **shape)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    torch.manual_seed(0)
    with torch.device(device): model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    from competition_kit.base import load_tokenizer
    load_tokenizer('smollm2').save_pretrained(folder)

class Clock:
    "The seconds of each layer, as GPTQModel's callback"
    def __init__(self): self.ends = [time.perf_counter()]
    def layer_complete(self, layer_idx, submodule_finalized):
        if submodule_finalized: self.ends.append(time.perf_counter())

def plain(source, out, ids, bits, group):
    "GPTQModel alone with its defaults; the seconds of each layer"
    import torch
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    config = QuantizeConfig(bits=bits, group_size=group, offload_to_disk_path=str(out)+'.offload')
    model = GPTQModel.load(str(source), config, dtype=torch.bfloat16)
    rows = [dict(input_ids=torch.tensor(i)[None], attention_mask=torch.ones(1, len(i), dtype=torch.long)) for i in ids]
    model.layer_callback = clock = Clock()
    with contextlib.chdir(Path(out).parent):  # it writes a folder `logs`
        model.quantize(rows, batch_size=8 if torch.cuda.is_available() else 4, backend=BACKEND.TORCH)
    model.save(str(out))
    return np.diff(clock.ends).tolist()

def kit(source, out, ids, bits, group):
    "The same by the kit"
    from competition_kit.quantise import quantise
    return quantise(source, out, [np.array(i, np.int32) for i in ids], bits, group, dtype='bf16').seconds.tolist()

def measure_time(a):
    from common import report
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as d:
        for kind in a.kind:
            source = Path(d)/kind
            random_model(source, kind, a.layers, json.loads(a.shape) if a.shape else SHAPE)
            ids = [rng.integers(3, 4096, a.tokens).tolist() for _ in range(a.rows)]
            for bits in a.bits:
                took = {}
                for name, f in dict(plain=plain, kit=kit, plain2=plain, kit2=kit).items():
                    out = Path(d)/f'{kind}-{bits}-{name}'
                    start, cpu = time.perf_counter(), time.process_time()
                    try:
                        with contextlib.redirect_stdout(io.StringIO()): layers = f(source, out, ids, bits, a.group)
                    except Exception: print('FAILED', kind, bits, name, traceback.format_exc()[-1500:], flush=True)
                    else: took[name] = layers, time.perf_counter()-start, time.process_time()-cpu
                    shutil.rmtree(out, ignore_errors=True)
                for name, (layers, whole, cpu) in took.items():
                    report('torch', 'gptqmodel', what=f'{kind} {bits} bits', who=name.rstrip('2'), layers=layers,
                           seconds_a_layer=float(np.median(layers[1:] or layers)), whole=whole, cpu_s=cpu)

def kit_in_silence(*args):
    with contextlib.redirect_stdout(io.StringIO()): return kit(*args)

def measure_kill(a):
    from common import report
    from competition_kit.core import sha256
    kind, bits = a.kind[0], a.bits[0]
    ids = [np.random.default_rng(k).integers(3, 4096, a.tokens).tolist() for k in range(a.rows)]
    with tempfile.TemporaryDirectory() as d:
        source, whole, killed = (Path(d)/n for n in (kind, 'whole', 'killed'))
        random_model(source, kind, a.layers, json.loads(a.shape) if a.shape else SHAPE)
        start = time.perf_counter()
        layers = kit_in_silence(source, whole, ids, bits, a.group)
        took = time.perf_counter()-start
        spawn, args = multiprocessing.get_context('spawn'), (source, killed, ids, bits, a.group)
        child = spawn.Process(target=kit_in_silence, args=args)
        child.start()
        half = f'layers-*/{a.layers//2-1:03d}/manifest.json'
        while child.is_alive() and not list(Path(f'{killed}.work').glob(half)): time.sleep(.02)
        child.kill()
        child.join()
        kept = list(Path(f'{killed}.work').glob('layers-*/*/manifest.json'))
        size = sum(f.stat().st_size for f in Path(f'{killed}.work').glob('layers-*/*/*'))
        start = time.perf_counter()
        kit_in_silence(*args)
        report('torch', 'gptqmodel', what=f'{kind} {bits} bits, SIGKILL', layers=layers, whole=took,
               kept_layers=len(kept), kept_gib=size/2**30, continued=time.perf_counter()-start,
               same_bytes=sha256(whole/'model.safetensors') == sha256(killed/'model.safetensors'))

# Quality

def begin():
    import competition_kit.record as record
    import competition_kit.train as train
    train.baselines = lambda *a: {}
    record.after_run.clear()  # no workbook: hundreds of runs

def one(name, how):
    began = time.time()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return name, how, _train(how) if name == 'train' else _quantise(how), time.time()-began
    except Exception: return name, how, traceback.format_exc()[-1500:], time.time()-began

def _train(how):
    from competition_kit.train import train_fold
    return train_fold(**how).id

def _quantise(how):
    from competition_kit.gptq import GptqArgs, gptq
    from competition_kit.record import run_stage
    args = dict(how, **WIDE)
    if args.get('calibration') in ('cut', 'other'): args['calibration'] = _texts(args)
    run = run_stage(gptq, GptqArgs(**args))
    return run.record['metrics'] | dict(minutes=run.record['minutes'])

def _texts(args): # a calibration file: prompts cut to 256 tokens, or the plain prompts of the second table
    from competition_kit.core import data_path
    from competition_kit.gptq import GptqArgs, calibration_ids
    from competition_kit.tables import load_rows
    file = data_path(f"{args['calibration']}-{args['start']}.jsonl")
    if args['calibration'] == 'other':
        rows = load_rows('alpaca')
        texts = ['\n'.join([*p, *a]) for p, a in zip(rows.prompt, rows.response_a)][:2000]
    else:
        own = GptqArgs(**{k: v for k, v in args.items() if k != 'calibration'})
        texts = [own.prompt.tok.decode(i[:256]) for i in calibration_ids(own, 128, 0)]
    file.write_text(''.join(json.dumps(dict(text=t))+'\n' for t in texts))
    return str(file)

def quality_table(said): # a line a way to quantise: means over runs, and the spread over seeds
    out, usual = [], said[said.line == USUAL].set_index(['seed', 'fold']).d_log_loss
    for line, d in said.groupby('line', sort=False):
        by_seed = d.groupby('seed').d_log_loss.mean()
        gap = (d.set_index(['seed', 'fold']).d_log_loss-usual).dropna()  # of the same runs
        out.append(dict(line=line, runs=len(d), log_loss=d.log_loss.mean(), accuracy=d.accuracy.mean(),
                        d_log_loss=d.d_log_loss.mean(), least=2*d.d_log_loss.std()/len(d)**.5,
                        sd_of_seeds=by_seed.std(), against_usual=gap.mean(), its_least=2*gap.std()/max(1, len(gap))**.5,
                        d_accuracy=d.d_accuracy.mean(), flips=d.flips.mean(), kl=d.kl.mean(), minutes=d.minutes.mean()))
    return pd.DataFrame(out)

def write_quality_tables(parts): # once: a later call finds them
    from competition_kit.core import data_path
    from competition_kit.tables import split, write_rows
    data_path().mkdir(parents=True, exist_ok=True)
    for part in parts:
        name, file = part.split('=')
        if data_path(f'{name}.parquet').exists(): continue
        rows, _ = split(str(Path(file).resolve()))
        write_rows(rows, data_path(f'{name}.parquet'), task=rows.attrs['meta']['task'])

def measure_quality(a):
    from common import results, workers
    from competition_kit.core import bases_path
    os.environ.update(CK_BASES=str(bases_path()), CK_ROOT=os.environ.get('CK_ROOT') or tempfile.mkdtemp())
    write_quality_tables(a.tables)
    began, said = time.time(), []
    until = began+a.until
    with workers(a.jobs, begin) as pool:
        folds = range(a.first, a.folds)
        wanted = [('train', FIT | a.set | dict(fold=f, seed=s)) for s in range(a.first_seed, a.seeds)
                  for f in folds]
        runs = {}
        for _, how, run, took in results(pool, one, wanted, until):
            print('train', how['fold'], how['seed'], run, f'{took:.0f} s', flush=True)
            if run.startswith('train-'): runs[run] = how
        order = sorted(runs, key=lambda r: (runs[r]['seed'], runs[r]['fold']))
        jobs = [(n, LINES[n] | a.quantise | dict(start=run)) for run in order for n in a.lines]  # whole runs first
        for name, how, found, took in results(pool, one, jobs, until):
            own = runs[how['start']]
            place = f"{name} | fold {own['fold']} seed {own['seed']}:"
            if isinstance(found, str): print('FAILED', place, found, flush=True)
            else:
                said.append(dict(found, line=name, fold=own['fold'], seed=own['seed'], baselines=None))
                print(place, f"{found['d_log_loss']:+.4f}, {found['flips']:.1%} flips, {took:.0f} s,",
                      f'{time.time()-began:.0f} s in all', flush=True)
    print(f'{len(runs)} of {len(wanted)} trainings, {len(said)} of {len(wanted)*len(a.lines)} quantised models')
    if not said: return
    said = pd.DataFrame(said).sort_values(['line', 'seed', 'fold'], key=_order)
    t = quality_table(said)
    for d, name in ((t, 'gptq'), (said, 'gptq_runs')): d.to_json(Path(a.out)/f'{name}.json', orient='records', indent=1)
    print(t.to_string(index=False, float_format=lambda v: f'{v:.4f}'))

def _order(column): # lines in the order of `LINES`
    return column.map(list(LINES).index) if column.name == 'line' else column

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_subparsers(dest='what', required=True)
    for t in (what.add_parser('time'), what.add_parser('kill')):
        t.add_argument('--layers', type=int, default=4)
        t.add_argument('--rows', type=int, default=128)
        t.add_argument('--tokens', type=int, default=2047)
        t.add_argument('--group', type=int, default=128)
        t.add_argument('--bits', type=int, nargs='+', default=[4, 8])
        t.add_argument('--kind', nargs='+', default=['llama'])
        t.add_argument('--shape', default='', help='JSON: another shape than that of 14B')
    q = what.add_parser('quality')
    q.add_argument('tables', nargs=2)
    q.add_argument('--lines', nargs='+', default=list(LINES), choices=list(LINES))
    q.add_argument('--folds', type=int, default=5, help='end of the folds, exclusive')
    q.add_argument('--first', type=int, default=0, help='fold to begin with')
    q.add_argument('--seeds', type=int, default=3, help='end of the seeds, exclusive')
    q.add_argument('--first-seed', type=int, default=0, help='seed to begin with')
    q.add_argument('--jobs', type=int, default=4, help='processes a GPU')
    q.add_argument('--set', type=json.loads, default={}, help='further arguments of every training, as JSON')
    q.add_argument('--quantise', type=json.loads, default={}, help='further arguments of every quantisation, as JSON')
    q.add_argument('--until', type=float, default=1e9, help='seconds after which no training or quantisation is begun')
    q.add_argument('--out', default='.')
    a = p.parse_args()
    dict(time=measure_time, kill=measure_kill, quality=measure_quality)[a.what](a)
