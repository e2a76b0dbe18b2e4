"The text route: exact masks, transformers' loss, resumed runs, replies that are learned, planted rows"
import json, shutil, signal, subprocess, sys, time
import numpy as np
import pytest
import torch
from competition_kit.base import load_tokenizer
from competition_kit.completions import (CompletionSteps, completion_loss, encode_completions, has_rationale,
                                         reply_probs, trusted_text_prompt)
from competition_kit.core import Refusal, data_path, models_path, read_table
from competition_kit.distill import DistillArgs
from competition_kit.learnability import keep_learnable, probe
from competition_kit.model import load_classifier, predict
from competition_kit.pack import plan_steps
from competition_kit.probs import align, read_probs
from competition_kit.record import find_run
from competition_kit.replies import Request, TransformersEngine
from competition_kit.rows import tasks
from competition_kit.tables import load_rows, split, write_rows
from competition_kit.text import TextPrompt
from competition_kit.train import TrainArgs, _cost, held_out, run_table, train_fold
from competition_kit.trained import load_run, predict_runs, trusted_prompt

pytestmark = pytest.mark.usefixtures('baselines_once', 'samples')
FORM = '<thinking>{} is {}.</thinking><output>{}</output>'
small = dict(mix='told', route='text', batch=4, lora_r=4, dtype='fp32', max_new_tokens=64, pack_tokens=2048,
             max_len=700)

def told(n=40, options=2, **columns):
    "Write the table `told`: rows of two options with a rationale"
    rows = load_rows('sample_logic')
    rows = rows[rows.options.map(len) == options].iloc[:n].reset_index(drop=True)
    texts = [FORM.format(q[:9], o[k], 'AB'[k]) for q, o, k in zip(rows.question, rows.options, rows.label)]
    rows = rows.assign(rationale=texts).assign(**columns)
    rows.attrs['meta'] = load_rows('sample_logic').attrs['meta']
    write_rows(rows, data_path('told.parquet'))
    return rows

@pytest.fixture(scope='module')
def prompt(tiny): return TextPrompt(load_tokenizer(tiny), 700)

# ---- sequences and loss
def test_a_sequence_is_the_prompt_of_generation_and_the_reply(prompt):
    rows, tok = told(12), prompt.prompt.tok
    enc, asked = encode_completions(prompt, rows), prompt.encode(rows)
    for k, line in enumerate(enc.itertuples()):
        assert line.ids[:line.start].tolist() == asked.ids[k].tolist()
        assert tok.decode(line.ids[line.start:-1]) == rows.rationale[k]
        assert line.ids[-1] == tok.eos_token_id and len(line.ids) == line.n

def test_a_written_reply_is_the_sequence_that_is_trained_on(prompt, tiny):
    "a model that writes a rationale token by token has seen exactly these tokens, and stops at the same end"
    rows = told(6)
    engine, asked = TransformersEngine(tiny, prompt, 'fp32'), prompt.encode(rows)
    texts = [t.text for t in engine.replies([Request(i, 12, .7, 1., k) for k, i in enumerate(asked.ids)])]
    enc = encode_completions(prompt, rows.assign(rationale=texts))
    again = engine.tok.batch_decode([list(ids[s:-1]) for ids, s in zip(enc.ids, enc.start)])
    assert again == texts and all(ids[-1] in engine.tok.all_special_ids for ids in enc.ids)

def test_the_mask_counts_rationales_alone(prompt):
    rows = told(9, weight=np.arange(9)+1.)
    enc = encode_completions(prompt, rows)
    steps = plan_steps(enc, 3, 1., 2048, 0)
    data = CompletionSteps(enc, rows, tasks['choice'], steps)
    for step, packs in zip(steps, data):
        for lines, pack in zip(step[0], packs):
            for k, line in enumerate(lines):
                mine, seq = pack['of'] == k, enc.iloc[line]
                assert pack['after'][mine].tolist() == seq.ids[seq.start:].tolist()
                assert pack['input_ids'][0][pack['at'][mine]].tolist() == seq.ids[seq.start-1:-1].tolist()
        lines = np.concatenate(step[0])
        total = sum((enc.n-enc.start).iloc[k]*rows.weight[enc.row[k]] for k in lines)
        assert packs[0]['total'] == pytest.approx(total)

def test_loss_and_gradients_are_those_of_transformers(prompt, tiny):
    "one step in packs with shared prefixes, against one sequence at a time with labels of -100"
    rows = told(8, weight=[1., 2.]*4)
    enc = encode_completions(prompt, rows)
    steps = plan_steps(enc, 8, 1., 1200, 0)
    ours, theirs = (load_classifier(tiny, prompt.prompt, 'text', 'fp32') for _ in range(2))
    theirs.base.set_attn_implementation('sdpa')
    for m in (ours, theirs):
        for p in m.parameters(): p.requires_grad_(True)
    packs, loss, total = CompletionSteps(enc, rows, tasks['choice'], steps)[0], 0., 0.
    assert len(packs) > 1 and any(p['input_ids'].shape[1] < sum(enc.n[k] for k in lines)
                                  for p, lines in zip(packs, steps[0][0])), 'prefixes are shared'
    for pack in packs:
        logps = ours(**{k: pack[k] for k in ('input_ids', 'position_ids', 'bounds', 'at', 'after')})
        part = completion_loss(logps, pack['of'], pack['weight'], pack['total'])
        part.backward()
        loss += part.item()
    for line in enc.itertuples():
        ids = torch.from_numpy(line.ids[None]).long()
        labels = ids.where(torch.arange(line.n) >= line.start, -100)
        n, weight = line.n-line.start, rows.weight[line.row]
        (theirs.base(input_ids=ids, labels=labels).loss*n*weight/packs[0]['total']).backward()
        total += theirs.base(input_ids=ids, labels=labels).loss.item()*n*weight
    assert loss == pytest.approx(total/packs[0]['total'], rel=1e-5)
    for a, b in zip(ours.parameters(), theirs.parameters()): assert torch.allclose(a.grad, b.grad, atol=1e-5)

# ---- runs
def test_it_learns_to_answer(tiny):
    "all rationales say A, so all replies must; the run is read back as a model with its two prompts"
    told(40, label=0, rationale='<thinking>A.</thinking><output>A</output>')
    kw = dict(small, method='full', lr=2e-2, epochs=6., batch=2)
    run = train_fold(base=tiny, **kw)
    rec, rows, m = run.record, *held_out(run)[:1], run.record['metrics']
    assert m['accuracy'] == 1 and m['unparsed'] == 0 and m['log_loss'] < 1e-6
    assert m['baselines']['untouched base, text']['accuracy'] < 1
    replies = read_table(run.folder/'replies.parquet')
    assert set(replies.text) == {'<thinking>A.</thinking><output>A</output>'} and set(replies.how) == {'tag'}
    assert set(replies.finish) == {'stop'}
    trained_on = TrainArgs(**kw, base=tiny).completions
    assert set(replies.tokens) == set(trained_on.n-trained_on.start), 'written and trained token by token'
    assert np.array_equal(reply_probs(replies, rows), align(read_probs(run.folder/'probs.parquet'), rows))
    text, letters = trusted_text_prompt(rec), trusted_prompt(rec)
    p = predict(load_run(rec, letters), letters, rows, 1, progress=False)
    assert float((p.argmax(1) == 0).mean()) == m['letters_accuracy']
    assert text.hash == rec['text_prompt'] and 'its letters' in run_table(run).index
    with pytest.raises(Refusal, match='answers by text'): predict_runs([run.id], rows, models_path('p'))

def test_every_third_row_and_several_samples(tiny):
    told(40)
    run = train_fold(base=tiny, **small, epochs=.2, score_every=3, samples=2)
    held, p = held_out(run)
    all_held = load_rows('told').query('fold == 0')
    assert list(held.id) == list(all_held.id[::3]) and len(p) == len(held)
    assert run.record['metrics']['replies'] == 2*len(held) and run.record['held_out'] == len(held)
    replies = read_table(run.folder/'replies.parquet')
    assert replies.groupby('id').seed.nunique().eq(2).all() and (replies.temperature > 0).all()
    kept = {f: f.stat().st_mtime_ns for f in models_path('.replies').rglob('*.parquet')}
    again = train_fold(base=tiny, **small, epochs=.3, score_every=3, samples=2)
    assert again.id != run.id
    assert kept == {f: f.stat().st_mtime_ns for f in models_path('.replies').rglob('*.parquet')}, 'asked again'

def weights(run): return (run.folder/'adapter/adapter_model.safetensors').read_bytes()

def test_killed_runs_end_with_the_same_weights_and_replies(tiny, tmp_path, monkeypatch):
    told(20)
    kw = dict(small, base=tiny, epochs=1., save_every=3, lora_dropout=.1, samples=3)
    code = f'import torch; torch.set_num_threads(1)\nfrom competition_kit.train import train_fold; train_fold(**{kw!r})'
    p, until = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.DEVNULL), time.time()+120
    while not list(models_path().glob('train-*/replies-*/*.parquet')) and p.poll() is None and time.time() < until:
        time.sleep(.01)
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert not (record := find_run(next(models_path().glob('train-*')).name)).get('metrics'), record
    again = train_fold(**kw)
    shutil.copytree(data_path(), tmp_path/'other'/'data')
    monkeypatch.setenv('CK_ROOT', str(tmp_path/'other'))
    whole = train_fold(**kw)
    assert again.id == whole.id and weights(again) == weights(whole)
    texts = [read_table(r.folder/'replies.parquet').text.tolist() for r in (again, whole)]
    assert texts[0] == texts[1]

def test_two_processes_are_one(tiny):
    told(20)
    one, two = (train_fold(base=tiny, **small, epochs=.4, gpus=n) for n in (1, 2))
    rows, p = held_out(one)
    assert np.array_equal(held_out(two)[1], p) and list(held_out(two)[0].id) == list(rows.id)
    a, b = (read_table(r.folder/'replies.parquet') for r in (one, two))
    assert list(a.id) == list(b.id) and len(b) == len(rows)
    a, b = (r.record['metrics']['letters_log_loss'] for r in (one, two))
    assert a == pytest.approx(b, abs=1e-3)

def test_a_mix_holds_out_rows_without_a_rationale(tiny):
    rows = told(40)
    some = rows[rows.index % 2 == 0].reset_index(drop=True)
    some.attrs['meta'] = rows.attrs['meta']
    write_rows(rows.drop(columns='rationale'), data_path('plain.parquet'))
    write_rows(some, data_path('told.parquet'))
    args = TrainArgs(**dict(small, mix='plain + told'), base=tiny)
    assert args.rows.rationale.notna().sum() == len(some) and len(args.rows) == len(rows)
    assert set(args.rows.id.iloc[args.completions.row]) == set(some.id[some.fold != 0])
    assert len(args.fold_at[1]) == (rows.fold == 0).sum()

def test_rationales_of_a_raw_file_are_trained_on(tiny):
    rows = told(20)
    asked = [dict(question=q, options=o, answer='AB'[k], rationale=None if i % 4 else t) for i, (q, o, k, t) in
             enumerate(zip(rows.question, rows.options, rows.label, rows.rationale))]
    file = data_path('raw/train.jsonl')
    file.parent.mkdir(exist_ok=True)
    file.write_text('\n'.join(json.dumps(dict(id=i, problem=p, questions=[q]))
                              for i, p, q in zip(rows.id, rows.problem, asked)))
    write_rows(split('raw')[0], data_path('raw.parquet'))
    args = TrainArgs(**dict(small, mix='raw'), base=tiny)
    texts = dict(zip(rows.id+'-0', rows.rationale))
    taught = args.rows.iloc[args.completions.row]
    assert taught.rationale.tolist() == [texts[i] for i in taught.id]
    assert 0 < len(taught) == (args.rows.rationale.notna() & (args.rows.fold != 0)).sum()

def test_the_cost_is_of_the_route(tiny):
    told(12, fold=[0]*3+[1]*9)
    args = TrainArgs(**dict(small, score_every=2), base=tiny, samples=3)
    said = _cost(args, args.completions)
    assert 'text route' in said and f'{args.completions.n.sum():,} tokens' in said
    assert 'ck cost --generate 12 ' in said  # three replies of the model and of its base to two rows

# ---- refusals, before work begins
def test_planted_rows_are_refused(tiny):
    rows = told(12, fold=1)
    def refused(match, **columns):
        told(12, fold=[0]*2+[1]*10, **columns)
        with pytest.raises(Refusal, match=match) as e: TrainArgs(**small, base=tiny).inputs()
        return str(e.value)
    texts = rows.rationale.tolist()
    assert rows.id[5] in refused('rationales without text', rationale=texts[:5]+[' \n']+texts[6:])
    k = next(k for k in range(2, 11) if rows.label[k] != rows.label[k+1])
    shifted = refused('with another option than the label', rationale=texts[:k]+[texts[k+1]]+texts[k+1:])
    assert rows.id[k] in shifted and rows.id[k+1] not in shifted
    said = refused('more than max_new_tokens=64', rationale=texts[:7]+['Thus '*200]+texts[8:])
    assert rows.id[7] in said and rows.id[6] not in said and 'Give max_new_tokens=' in said
    assert '05_generate' in refused('no row has a rationale', rationale=[None]*12)
    held = refused('all 2 rationales are of rows that fold 0 holds out', rationale=texts[:2]+[None]*10)
    assert rows.id[0] in held and rows.id[2] not in held
    with pytest.raises(Refusal, match='ck run 05_generate'):
        TrainArgs(**dict(small, mix='sample_logic'), base=tiny).inputs()

@pytest.mark.parametrize('wrong,match', [
    (dict(mix='sample_arena'), 'for choice rows'), (dict(route='answer', samples=2), 'samples'),
    (dict(sharded=True, gpus=2), 'sharded'), (dict(score_every=0), 'score_every')], ids=str)
def test_arguments_are_refused(tiny, wrong, match):
    with pytest.raises(Refusal, match=match): TrainArgs(**(dict(small, base=tiny) | wrong)).inputs()

def test_distillation_refuses_the_route():
    with pytest.raises(Refusal, match="route='text'"): DistillArgs(route='text', mix='sample_logic')

# ---- the probe
def test_the_probe_reads_what_the_loss_counts(prompt, tiny):
    "mean and least log-probability are transformers' own; rows without a rationale have none"
    rows = told(8)
    rows.loc[3, 'rationale'] = None
    model, plain = (load_classifier(tiny, prompt.prompt, 'text', 'fp32') for _ in range(2))
    plain.base.set_attn_implementation('sdpa')
    probed = probe(model, prompt, rows, budget=1200, progress=False)
    assert probed.loc[3, ['mean_logp', 'least_logp', 'least_at', 'weakest']].isna().all()
    for line in encode_completions(prompt, rows).itertuples():
        ids = torch.from_numpy(line.ids[None]).long()
        with torch.no_grad(): logps = plain.base(ids).logits[0, :-1].log_softmax(-1)
        own = logps.gather(1, ids[0, 1:, None])[line.start-1:, 0]
        got = probed.iloc[line.row]
        assert [got.mean_logp, got.least_logp] == pytest.approx([own.mean().item(), own.min().item()], abs=1e-4)
        assert got.least_at == pytest.approx(int(own.argmin())/(len(own)-1))

def test_the_filter_keeps_the_best(prompt, tiny):
    rows = told(10)
    with pytest.raises(Refusal, match='probe'): keep_learnable(rows)
    probed = probe(load_classifier(tiny, prompt.prompt, 'text', 'fp32'), prompt, rows, progress=False)
    best = keep_learnable(probed, share=.3)
    assert list(best.id[best.rationale.notna()]) == list(probed.nlargest(3, 'least_logp').id)
    assert len(best) == len(rows) and not has_rationale(best)[3:].any()
    middle = float(probed.least_logp.median())
    assert has_rationale(keep_learnable(probed, lowest=middle)).sum() == 5
