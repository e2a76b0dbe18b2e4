"""Which engine does a vote take, and does it answer as packs do?

usage: python bench/vote_engines.py [--loras pairs_open.parquet] [--auto pairs_open.parquet] [--texts logic_rg.jsonl]
           [--bits 8 4] [--shape qwen2.5-32b] [--layers 8] [--rows 1500] [--memory GB] [--small]
loras: SmolLM2 is quantised by 09_gptq, two seeds train a LoRA over it on 300 pairs, and vote by packs and by vLLM.
auto: a base of this shape in int4, random codes, cut to some layers; a LoRA over it; so many rows are voted on by
    `auto`, by vLLM and by packs. `auto` measures from 5 seconds of packs on (the kit's limit is a minute).
texts: SmolLM2 learns rationales by code; its run and one of letters vote with the defaults, then without vLLM.
`--memory` limits each model, so that other work can use the GPU beside it. `--small`: few rows and layers."""
import argparse, contextlib, io, itertools, os, tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from common import report, timed

FIT = dict(max_len=512, batch=4, pack_tokens=8192, save_every=10**6, recompute=0, compiled='no')

def quiet(f, *args, **kw): # (result, seconds)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return timed(f, *args, **kw)

def fitted(**how):
    from competition_kit.train import train_fold
    return quiet(train_fold, **FIT | how)[0].id

def voted(runs, **how): # (record, [rows, options])
    from competition_kit.probs import read_probs
    from competition_kit.record import run_stage
    from competition_kit.vote import VoteArgs, vote
    run, seconds = quiet(run_stage, vote, VoteArgs(runs=' '.join(runs), pack_tokens=FIT['pack_tokens'], **how))
    p = list(read_probs(run.folder/'votes.parquet').p)
    width = max(map(len, p))  # rows may have fewer options
    return run.record | dict(seconds=seconds), np.stack([np.pad(row, (0, width-len(row))) for row in p])

def beside(p, q): # two votes on the same rows
    return dict(rows=len(p), mean_difference=float(abs(p-q).mean()), largest_difference=float(abs(p-q).max()),
                same_answers=float((p.argmax(1) == q.argmax(1)).mean()))

def loras(a):
    from competition_kit.gptq import GptqArgs, gptq
    from competition_kit.record import run_stage
    base, asked = 'smollm2-2' if a.small else 'smollm2', pairs(a.loras, 60 if a.small else 400)
    for bits in a.bits:
        # what this costs is measured in gptq.py; here nothing fails
        how = GptqArgs(base=base, mix='pairs', bits=bits, max_loss=99., max_flips=1.)
        run, seconds = quiet(run_stage, gptq, how)
        runs = [fitted(base=f'models/{run.id}/model', mix='pairs', seed=k) for k in (0, 1)]
        packs, p = voted(runs, **asked)
        vllm, q = voted(runs, **asked, engine='vllm', max_memory_gb=a.memory)
        report('vllm', what=f'two LoRAs over GPTQ int{bits}', base=base, seconds_of_09_gptq=seconds, **beside(p, q),
               packs_seconds=packs['seconds'], vllm_seconds=vllm['seconds'], engine=vllm['engine'])

def first_rows(file, n): # a raw file of its first rows, or of its last ones where n is negative
    small = Path(tempfile.mkdtemp())/Path(file).name
    if small.suffix == '.parquet':
        df = pd.read_parquet(file)
        (df.head(n) if n > 0 else df.tail(-n)).to_parquet(small)
    else: small.write_text(''.join(itertools.islice(Path(file).open(), n)))
    return str(small)

def pairs(file, n): # what to vote on: so many rows from the end; the first 300 become the table `pairs`
    from distill import write_tables
    from competition_kit.core import data_path
    from competition_kit.tables import split
    data_path().mkdir(parents=True, exist_ok=True)
    write_tables('pairs', split(first_rows(file, 300))[0])
    return dict(data='pairs', test=first_rows(file, -n), views=1)

def random_gptq(a): # a folder
    from competition_kit.base import load_tokenizer
    from competition_kit.cost import known_bases
    from engine import config, small, write_gptq
    tok, folder = load_tokenizer('smollm2'), Path(tempfile.mkdtemp())/'base'
    shape = known_bases[a.shape] | (small if a.small else {})
    folder.mkdir()
    write_gptq(folder, config(shape, a.layers, len(tok)))
    tok.save_pretrained(folder)
    return str(folder)

def auto(a):
    import competition_kit.engine as engine
    engine._least_seconds = 0. if a.small else 5.
    how, got = pairs(a.auto, a.rows) | dict(max_memory_gb=a.memory), {}
    run = fitted(base=random_gptq(a), mix='pairs', max_len=1024, batch=8, lr=5e-3)
    for name in ('packs', 'vllm', 'auto'): got[name] = voted([run], engine=name, **how)
    chosen = got['auto'][0]['engine']
    report('vllm', what='auto over GPTQ int4', shape=a.shape, layers=a.layers,
           **beside(got['packs'][1], got['vllm'][1]),
           seconds={name: round(got[name][0]['seconds'], 1) for name in ('packs', 'vllm')}, auto=chosen,
           vllm=got['vllm'][0]['engine'])

def reasoned_tables(name, file): # of the rows, and of those with a rationale by code
    from code_rationales import code_rationale
    from competition_kit.core import data_path
    from competition_kit.tables import split
    from text_route import write
    data_path().mkdir(parents=True, exist_ok=True)
    rows, _ = split(str(Path(file).resolve()))
    told = rows.assign(rationale=[code_rationale(row) for row in rows.itertuples()])
    write(name, rows, rows)
    write(f'{name}_code', told[told.rationale.notna()], rows)

def texts(a):
    import competition_kit.engine as engine
    import competition_kit.replies as replies
    new, file = (192, first_rows(a.texts, 8)) if a.small else (576, a.texts)
    reasoned_tables('rg', file)
    how = dict(epochs=.1 if a.small else 6., batch=16, lora_r=32, lora_alpha=64)
    text = fitted(mix='rg + rg_code', route='text', max_len=1024, max_new_tokens=new, score_every=20, **how)
    letters, got = fitted(mix='rg', max_len=1024, **how), {}
    asked = dict(data='rg', test=first_rows(file, 4 if a.small else 60), samples=1, views=1, max_memory_gb=a.memory)
    for name in ('by default', 'without vLLM'):
        if name == 'without vLLM': engine.vllm_version = replies.vllm_version = lambda: ''
        record, p = voted([letters, text], **asked)
        written = pd.read_parquet(Path(os.environ['CK_ROOT'])/f"models/{record['run_id']}/replies.parquet")
        got[name] = p
        report('vllm', what=f'letters and texts, {name}', seconds=record['seconds'], replies=len(written),
               tokens=int(written.tokens.sum()), wrote=sorted(set(written.engine+' '+written.version)),
               unparsed=record['metrics']['unparsed'], engine=record['engine'])
    report('vllm', what='both votes', **beside(*got.values()))

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--loras', metavar='FILE')
    p.add_argument('--auto', metavar='FILE')
    p.add_argument('--texts', metavar='FILE')
    p.add_argument('--bits', nargs='+', type=int, default=[8, 4])
    p.add_argument('--shape', default='qwen2.5-32b')
    p.add_argument('--layers', type=int, default=8)
    p.add_argument('--rows', type=int, default=1500)
    p.add_argument('--memory', type=float, default=0., help='limit of each model, in 1e9 bytes')
    p.add_argument('--small', action='store_true')
    a = p.parse_args()
    from competition_kit.core import bases_path
    os.environ.update(CK_BASES=str(bases_path()), CK_ROOT=os.environ.get('CK_ROOT') or tempfile.mkdtemp())
    import competition_kit.record as record
    record.after_run.clear()  # no workbook
    for wanted, part in ((a.loras, loras), (a.auto, auto), (a.texts, texts)):
        if wanted: part(a)
