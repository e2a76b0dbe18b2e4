"""What do rationales give a small model? Letters, rationales of three kinds, the probe as a filter, votes of samples.

usage: python bench/text_route.py rg=FILE [open=FILE] [--base smollm2] [--seeds 0] [--until 380] [--out FOLDER]
       python bench/text_route.py rg=FILE --prepare|--vote|--table --out FOLDER
`FILE` is in Tianchi's layout. Fold 0 is held out. Each result is a line in `lines.jsonl`, with the minutes since the
line before it; what is there is not made again, so a command that was killed is given again as it was.
`vote_1` is the mean accuracy of single samples; of k equal options each counts 1/k, and so does an unparsed reply.

The whole table of SmolLM2 on one H200 with vLLM, three commands of at most ten minutes, one after the other:

    R="python bench/text_route.py rg=FILE --out FOLDER"
    timeout 580 $R --prepare
    for s in 0 1 2; do timeout 580 $R --seeds $s --until 420 & done; wait
    timeout 580 $R --vote --until 480; $R --table

| command | what it does | minutes, measured |
|---|---|---|
| `--prepare` | tables, sampled rationales (one engine), two probes | 2.3 |
| a process a seed | seven trainings, with greedy replies of the run and of the base | 12 for six, beside other work |
| `--vote` | 18 adapters are compared, then write nine replies a row, as the base does | 2.8, and .5 an adapter |

The second command is to be repeated until it begins no line, the third until it asks nobody. Nothing else may use the
GPU beside vLLM. The same with `open=FILE --problems 200`, and with another base by `--base`, are further tables.
Where vLLM refuses an adapter, `--vote` goes on with transformers; `--small` tries all of this on a CPU."""
import argparse, contextlib, itertools, json, os, random, tempfile, time
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '2')
import numpy as np
import pandas as pd
from code_rationales import code_rationale, knight_rationale, more_rows

FIT = dict(fold=0, max_len=1024, batch=16, pack_tokens=32768, epochs=6., lr=1e-3, lora_r=32, lora_alpha=64, warmup=.1,
           schedule='cosine', save_every=10**6, recompute=0, compiled='no', max_new_tokens=576, samples=1)
REPLY = dict(max_new_tokens=576, samples=9)  # of each run to each held-out row, by one engine for all
# top_p below 1 sorts the vocabulary for every token, which takes most of the time of a small base
ASK = dict(retries=2, given=1, max_new_tokens=256, max_len=1024, top_p=1., batch_tokens=2**19, shard=4096)

# line → arguments of 04_train; TABLE stands for the table's name. A line whose table is not there is left out
LINES = {
    'letters': dict(mix='TABLE', route='answer'),
    'rationales by code': dict(mix='TABLE + TABLE_code'),
    'by code, more problems by code': dict(mix='TABLE + TABLE_code + TABLE_more', epochs=2., batch=32),
    'self-sampled rationales': dict(mix='TABLE + TABLE_self'),
    'self-sampled, else answer-conditioned': dict(mix='TABLE + TABLE_both'),
    'by code, best half by the probe': dict(mix='TABLE + TABLE_codebest', epochs=12.),
    'self-sampled or conditioned, best half by the probe': dict(mix='TABLE + TABLE_bothbest', epochs=12.),
}

# ---- tables
def write(name, rows, like):
    from competition_kit.core import data_path
    from competition_kit.tables import write_rows
    rows = rows.reset_index(drop=True)
    rows.attrs['meta'] = dict(like.attrs['meta'], name=name)
    write_rows(rows, data_path(f'{name}.parquet'))

def some_problems(rows, n): # the rows of n groups, drawn by their names
    groups = sorted(rows.group.unique())
    return rows[rows.group.isin(random.Random(0).sample(groups, min(n, len(groups))))] if n else rows

def prepare(name, file, a): # all tables of a file; what is there stays
    from competition_kit.core import data_path
    from competition_kit.tables import split
    if not data_path(f'{name}.parquet').exists():
        rows = some_problems(split(file)[0], a.problems)
        write(name, rows, rows if rows.attrs else split(file)[0])
    from competition_kit.tables import load_rows
    rows = load_rows(name).drop(columns=['main', 'phase'])
    if not data_path(f'{name}_code.parquet').exists():
        texts = [code_rationale(row) for row in rows.itertuples()]
        if any(texts):
            write(f'{name}_code', rows.assign(rationale=texts)[[t is not None for t in texts]], rows)
        if any(knight_rationale(row) for row in rows.itertuples()):
            more = more_rows(a.more, 1, rows)
            write(f'{name}_more', more.assign(rationale=[knight_rationale(r) for r in more.itertuples()]), rows)
    sampled = (Path(a.base).name, name, 'sampling', None) in made(a, None)
    wanted = any('self' in line for line in a.lines) and not sampled
    if wanted and not data_path(f'{name}_both.parquet').exists(): sample(name, rows, a)
    for kind in ('code', 'both'): best_half(f'{name}_{kind}', a)

def sample(name, rows, a): # rationales by the base; where it wrote none, the lines that need them are left out
    from competition_kit.core import Refusal, data_path, read_table
    from competition_kit.generate import GenerateArgs, generate
    from competition_kit.record import run_stage
    try: run = run_stage(generate, GenerateArgs(data=name, base=a.base, engine=a.engine, **ASK))
    except Refusal as e:
        if a.small and data_path(f'{name}_code.parquet').exists():  # a random base writes nothing: all lines run
            from competition_kit.tables import load_rows
            told = load_rows(f'{name}_code').drop(columns=['main', 'phase'])
            write_sampled(name, told.assign(given=np.arange(len(told)) % 2 == 1), rows)
        return report(a, table=name, line='sampling', refused=str(e)[-300:])
    kept = read_table(run.folder/'rows.parquet')
    kept['options'] = kept.options.map(list)
    write_sampled(name, kept, rows)
    report(a, table=name, line='sampling', **{k: v for k, v in run.record['metrics'].items() if k != 'baselines'})

def write_sampled(name, kept, rows):
    write(f'{name}_both', kept, rows)
    if not kept.given.all(): write(f'{name}_self', kept[~kept.given.astype(bool)], rows)

def best_half(name, a): # of a table of rationales, by the untouched base
    from competition_kit.base import load_tokenizer
    from competition_kit.core import data_path
    from competition_kit.learnability import keep_learnable, probe, weak_places
    from competition_kit.model import load_classifier
    from competition_kit.tables import load_rows
    from competition_kit.text import TextPrompt
    if not data_path(f'{name}.parquet').exists() or data_path(f'{name}best.parquet').exists(): return
    rows, prompt = load_rows(name).drop(columns=['main', 'phase']), TextPrompt(load_tokenizer(a.base), FIT['max_len'])
    probed = probe(load_classifier(a.base, prompt.prompt, 'text', FIT['dtype']), prompt, rows, 2048, progress=False)
    report(a, table=name, line='probe', mean_logp=float(probed.mean_logp.mean()), **weak_places(probed))
    best = keep_learnable(probed, share=.5)
    write(f'{name}best', best[best.rationale.notna()], rows)

# ---- lines
def report(a, **line):
    from common import machine
    short = {k: float(f'{v:.4g}') if isinstance(v, float) else v for k, v in line.items()}
    minutes, a.last = round((time.time()-a.last)/60, 2), time.time()
    text = json.dumps(dict(base=Path(a.base).name, **short, minutes=minutes, **machine('torch')))
    with open(a.out/'lines.jsonl', 'a') as f: f.write(text+'\n')
    print(text, file=a.stdout, flush=True)

def lines_in(a): # the lines in the file
    file = a.out/'lines.jsonl'
    return [json.loads(l) for l in open(file)] if file.exists() else []

def late(a, what): # is it too late to begin?
    if time.time()-a.began <= a.until: return False
    print(f'no {what} is begun after {a.until:.0f} seconds', flush=True, file=a.stdout)
    return True

def made(a, what): # (base, table, line, seed) of the lines in the file
    return {(l['base'], l['table'], l['line'], l.get('seed')) for l in lines_in(a) if l.get('what') == what}

def votes(replies, held): # accuracies of votes of 1, 5 and 9 samples
    from competition_kit.completions import reply_probs, text_scores
    n, y = replies.attempt.max()+1, held.label.to_numpy()
    def score(first, last):
        some = replies[replies.attempt.between(first, last-1)]
        return text_scores(reply_probs(some, held), y)['accuracy']
    out = dict(vote_1=float(np.mean([score(k, k+1) for k in range(n)])))
    out |= {f'vote_{k}': float(np.mean([score(f, f+k) for f in range(0, n-k+1, 4)])) for k in (5, 9) if k <= n}
    return out | dict(unparsed=float((replies.option < 0).mean()), tokens=float(replies.tokens.mean()))

def one(name, line, seed, a): # train, and report the letters; with the first text run also those of the untouched base
    from competition_kit.train import train_fold
    args = FIT | LINES[line]
    args['mix'] = args['mix'].replace('TABLE', name)
    run = train_fold(**dict(dict(route='text') | args, base=a.base, seed=seed))
    m, facts = run.record['metrics'], dict(what='letters', table=name, seed=seed)
    if args.get('route') == 'answer':
        return report(a, **facts, line=line, letters=m['accuracy'], log_loss=m['log_loss'], rows=run.record['rows'])
    report(a, **facts, line=line, letters=m['letters_accuracy'], log_loss=m['letters_log_loss'], rows=m['rationales'],
           greedy=m['accuracy'], run=run.id)
    if (Path(a.base).name, name, 'untouched base', seed) in made(a, 'letters'): return
    for k, v in m['baselines'].items():
        if k != 'untouched base, text':
            report(a, **facts, line=k.removesuffix(', letters'), letters=v['accuracy'], log_loss=v['log_loss'])

def vote_lines(name, a): # replies of every run and of the untouched base, and their votes
    from competition_kit.base import load_tokenizer
    from competition_kit.core import Refusal
    from competition_kit.folds import fold_rows
    from competition_kit.record import find_run
    from competition_kit.replies import end_engine, reply_engine, start_engine
    from competition_kit.tables import load_rows
    from competition_kit.text import TextPrompt
    here = Path(a.base).name, name
    trained = {(l['line'], l['seed']): l['run'] for l in lines_in(a)
               if 'run' in l and (l['base'], l['table']) == here and l['line'] in a.lines}
    asked = {('untouched base', seed): '' for _, seed in trained} | trained
    done = {found[2:] for found in made(a, 'replies') if found[:2] == here}
    asked = {k: asked[k] for k in sorted(asked, key=lambda k: k[1]) if k not in done}  # a whole seed first
    if not asked: return print(f'{name}: nobody is left to ask', file=a.stdout)
    params = find_run(next(iter(trained.values())))['params']
    prompt = TextPrompt(load_tokenizer(a.base), FIT['max_len'])
    _, held = fold_rows(load_rows(params['mix'], params['seed']), params['fold'])
    for kind in dict.fromkeys((reply_engine(a.engine, a.base, FIT['dtype']), 'transformers')):
        engine, runs = None, [run for run in asked.values() if run]
        try:
            engine = start_engine(kind, a.base, prompt, FIT['dtype'], 2**19, runs)
            return vote_with(engine, name, prompt, held, asked, a)
        except Refusal as e:
            if kind == 'transformers': raise
            report(a, table=name, line='vLLM', refused=str(e)[-300:])
        finally: end_engine(engine)

def vote_with(engine, name, prompt, held, asked, a):
    for (line, seed), run in list(asked.items()):
        if late(a, 'line'): return
        report(a, what='replies', table=name, line=line, seed=seed, held_out=len(held), engine=engine.name,
               **votes(ask(engine, prompt, held, seed, run, a), held))
        del asked[line, seed]  # another engine would ask again

def ask(engine, prompt, held, seed, run, a): # parsed replies
    from competition_kit.replies import generate, job_table
    from competition_kit.text import parse_replies
    enc = prompt.encode(held)
    jobs = [job_table(enc, k, seed, REPLY['max_new_tokens'], .7, adapter=run) for k in range(REPLY['samples'])]
    replies = generate(engine, pd.concat(jobs, ignore_index=True), a.out/'replies'/f'{run or Path(a.base).name}-{seed}')
    return replies.join(parse_replies(replies, held))

def lines_of(name, a): # those whose tables are there
    from competition_kit.core import data_path
    def there(mix): return all(data_path(f'{t}.parquet').exists() for t in mix.replace('TABLE', name).split(' + '))
    return [line for line in a.lines if there(LINES[line]['mix'])]

def summary(a): # Markdown: mean and standard deviation over the seeds of each line
    seeds = pd.DataFrame([l for l in lines_in(a) if 'what' in l])
    each = seeds.groupby(['base', 'table', 'line', 'seed'], sort=False).first(numeric_only=True)
    columns = ['rows', 'letters', 'log_loss', 'greedy', 'vote_1', 'vote_5', 'vote_9', 'unparsed']
    by = each.reindex(columns=columns).groupby(level=['base', 'table', 'line'], sort=False)
    mean, sd, n = by.mean(), by.std(), by.size()
    print('| base | table | line | seeds | '+' | '.join(columns)+' |\n'+'|---'*(4+len(columns))+'|')
    for key in mean.index:
        cells = [f'{mean[c][key]:.3g}'+(f' ± {sd[c][key]:.2g}' if sd[c][key] > 0 else '') for c in columns]
        print('| '+' | '.join([*key, str(n[key]), *(c.replace('nan', '') for c in cells)])+' |')

def run_lines(a):
    for name, file in (t.split('=', 1) for t in a.tables):
        with contextlib.redirect_stdout(a.log): prepare(name, file, a)
    names = [t.split('=', 1)[0] for t in a.tables]
    if a.vote:
        with contextlib.redirect_stdout(a.log):
            for name in names: vote_lines(name, a)
    elif not a.prepare: train_lines(names, a)
    phase = 'prepare' if a.prepare else 'vote' if a.vote else f"train, seeds {' '.join(map(str, a.seeds))}"
    print(f'{phase}: {(time.time()-a.began)/60:.1f} minutes', flush=True)

def train_lines(names, a):
    for seed, name in itertools.product(a.seeds, names):
        for line in lines_of(name, a):
            if (Path(a.base).name, name, line, seed) in made(a, 'letters'): continue
            if late(a, 'line'): return
            with contextlib.redirect_stdout(a.log): one(name, line, seed, a)

def small(a): # a few rows and a random base, to see that all parts run
    from competition_kit.base import tiny_base
    a.base, a.problems, a.more = tiny_base(a.out/'tiny'), 12, 8
    FIT.update(epochs=.1, batch=4, max_len=512, pack_tokens=2048, dtype='fp32', lora_r=4, score_every=4)
    REPLY.update(max_new_tokens=8, samples=5)
    ASK.update(retries=1, given=1, max_new_tokens=8, max_len=512, batch_tokens=16384)
    for args in LINES.values(): args.pop('epochs', None)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('tables', nargs='+')
    p.add_argument('--base', default='smollm2')
    p.add_argument('--seeds', type=int, nargs='+', default=[0])
    p.add_argument('--problems', type=int, default=0, help='draw so many groups of rows; 0: all')
    p.add_argument('--more', type=int, default=3000, help='further problems by code')
    p.add_argument('--lines', nargs='+', default=list(LINES), choices=list(LINES))
    p.add_argument('--engine', default='auto', help='samples the rationales; auto: vllm where it is installed')
    p.add_argument('--until', type=float, default=380, help='seconds after which no line is begun, also of --vote')
    p.add_argument('--prepare', action='store_true', help='make the tables alone')
    p.add_argument('--vote', action='store_true', help='ask what was trained for replies')
    p.add_argument('--table', action='store_true', help='print the lines as one table, over all seeds')
    p.add_argument('--set', type=json.loads, default={}, help='further arguments of every run, as JSON')
    p.add_argument('--out', type=Path, default=None)
    p.add_argument('--small', action='store_true')
    a = p.parse_args()
    import sys
    from competition_kit.base import base_path, pick_dtype
    a.out, a.began, a.stdout = (a.out or Path(tempfile.mkdtemp())).absolute(), time.time(), sys.stdout
    a.last = a.began
    if a.table: raise SystemExit(summary(a))
    a.out.mkdir(parents=True, exist_ok=True)
    a.tables = [f"{t.split('=')[0]}={Path(t.split('=', 1)[1]).absolute()}" for t in a.tables]
    if a.base == 'smollm2': base_path()  # made where this checkout keeps its bases
    from competition_kit.core import bases_path
    os.environ.update(CK_BASES=str(bases_path()), CK_ROOT=str(a.out), TOKENIZERS_PARALLELISM='false')
    import competition_kit.record as record
    record.after_run.clear()  # no workbook
    FIT['dtype'] = pick_dtype()
    if a.small: small(a)
    FIT.update(a.set)
    with open(a.out/f"log-{'-'.join(map(str, a.seeds))}.txt", 'a') as a.log: run_lines(a)
