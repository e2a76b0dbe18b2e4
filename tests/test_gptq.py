"The whole stage on models of two layers: chain, resume, the gate, and what it refuses"
import json, shutil, signal, subprocess, sys
import numpy as np
import pytest
pytest.importorskip('gptqmodel')
import torch
from safetensors.torch import load_file, save_file
from competition_kit import quantise as Q
from competition_kit.core import Refusal, data_path, models_path, read_json, root_at
from competition_kit.gate import Limits
from competition_kit.gptq import (GptqArgs, calibration_ids, draw_spread, gptq, layer_errors, plot_quantised,
                                  report_table)
from competition_kit.probs import align, read_probs
from competition_kit.record import Run, find_run, run_stage
from competition_kit.sample import write_arena
from competition_kit.tables import load_rows, write_rows
from competition_kit.text import reasoning
from competition_kit.train import train_fold
from competition_kit.trained import ancestors, load_run, predict_runs, recipe_key, trusted_prompt

wide = dict(max_loss=9., max_flips=1.)

@pytest.fixture(scope='module')
def full_root(tmp_path_factory, tiny):
    "A root with four finished runs: all weights and a LoRA on both routes"
    with root_at(tmp_path_factory.mktemp('full')) as root:
        data_path('sample_arena').mkdir(parents=True)
        write_arena(data_path('sample_arena'), 60, 12, 0)
        kw = dict(base=tiny, max_len=160, lr=1e-3, batch=8, dtype='fp32')
        ids = dict(full=train_fold(method='full', **kw).id, lora=train_fold(lora_r=2, **dict(kw, lr=1e-2)).id,
                   score=train_fold(method='full', route='score', **kw).id,
               score_lora=train_fold(lora_r=2, route='score', **dict(kw, lr=1e-2)).id)
    return root, ids

@pytest.fixture
def made(full_root, own_root):
    "The ids of these runs, copied into the test's own root"
    shutil.copytree(full_root[0], own_root, dirs_exist_ok=True)
    return full_root[1]

def quantised(**args): return run_stage(gptq, GptqArgs(rows=24, **args))

def test_chain_from_a_full_run_to_the_vote(made):
    from competition_kit.vote import VoteArgs, check_submission, vote
    run = quantised(start=made['full'], draws=2, **wide)
    rec, found = run.record, read_json(run.folder/'report.json')
    assert run.id.startswith('gptq-f0-') and rec['quantised']['group'] == 64
    assert [r['run_id'] for r in ancestors(run.id)] == [run.id, made['full']]
    assert len(report_table(run)) == 2 and draw_spread(run)['flips'] >= 0
    assert [t['warning'] for t in found['tries']] == ['']
    assert len(layer_errors(run)) == 2 and (layer_errors(run).error > 0).all()
    before, after = found['tries'][0]['rows_s']
    assert rec['worth'].startswith('The weights take 1 MiB instead of 1 (74%). The model predicts '
                                   f'{after:,.1f} rows a second instead of {before:,.1f}: ')
    assert len(plot_quantised(run).axes) == 3
    assert recipe_key(rec) != recipe_key(find_run(made['full']))
    rows = load_rows('sample_arena_test')
    p = predict_runs([made['full'], run.id], rows, models_path('p'), progress=False)
    a, b = (align(p[k], rows) for k in (made['full'], run.id))
    assert 0 < np.abs(a-b).max() < .1
    won = run_stage(vote, VoteArgs(data='sample_arena', runs=run.id))
    check_submission(won.folder/'submission.csv', data_path('sample_arena/sample_submission.csv'))
    assert quantised(start=made['full'], draws=2, **wide).done
    assert not (run.folder/'tries').exists(), 'the models of the other draws are deleted'

def a_chain(base): # run id → hashes of its files
    from competition_kit.distill import distill_fold
    from competition_kit.merge import merge_runs
    from competition_kit.vote import VoteArgs, vote
    how = dict(mix='sample_arena:40', base=base, max_len=160, lora_r=2, dtype='fp32')
    folds = [train_fold(fold=k, **how) for k in (0, 1)]
    names = ' '.join(run.id for run in folds)
    runs = [*folds, distill_fold(teachers=names, missing='label', seed=1, **how), merge_runs(members=names),
            merge_runs(members=names, how='base')]
    runs += [quantised(start=runs[-1].id, **wide), run_stage(vote, VoteArgs(runs=names))]
    return {run.id: run.record['outputs'] for run in runs}

def test_a_chain_has_the_same_bytes_in_every_folder(tiny, tmp_path):
    chains = []
    for name in 'here', 'elsewhere':
        with root_at(tmp_path/name) as root:
            shutil.copytree(tiny, root/'bases/tiny')
            chains.append(a_chain('bases/tiny'))
            config, = root.glob('models/train-f0-*/adapter/adapter_config.json')
            assert read_json(config)['base_model_name_or_path'] == 'bases/tiny'
    assert chains[0] == chains[1] and len(chains[0]) == 7

def test_transformers_reads_the_folder(made):
    from transformers import AutoModelForCausalLM
    run = quantised(start=made['full'], bits=8, **wide)
    rec = find_run(run.id)
    own = load_run(rec, trusted_prompt(rec)).model
    ids = torch.tensor([[5, 900, 31, 7, 7, 2000]])
    theirs = AutoModelForCausalLM.from_pretrained(run.folder/'model', dtype=torch.float32)
    with torch.no_grad(): x, y = own.lm_head(_hidden(own, ids)), theirs(ids).logits
    assert (x-y).abs().max() < .02
    config = (run.folder/'model/config.json').read_text()
    assert 'offload' not in config and str(run.folder.parent) not in config

def _hidden(model, ids): # without the packed attention
    model.config._attn_implementation = 'eager'
    return model.model(input_ids=ids, use_cache=False).last_hidden_state

def test_templates_beside_the_chat_template_stay(tiny, tmp_path):
    base = shutil.copytree(tiny, tmp_path/'tools')
    (base/'additional_chat_templates').mkdir()
    (base/'additional_chat_templates/tool_use.jinja').write_text('tools')
    (base/'model.gguf').write_text('weights in another format')
    run = quantised(base=str(base), mix='sample_arena:40', max_len=160, dtype='fp32', **wide)
    assert 'model/additional_chat_templates/tool_use.jinja' in run.record['outputs']
    assert not (run.folder/'model/model.gguf').exists()

def test_score_head_is_grafted(made):
    run = quantised(start=made['score'], **wide)
    before = load_file(models_path(made['score'], 'model/model.safetensors'))
    after = load_file(run.folder/'model/model.safetensors')
    plain = [k for k in before if k in after]
    assert 'score.weight' in plain and 'model.embed_tokens.weight' in plain
    assert all(torch.equal(before[k], after[k]) for k in plain)
    assert sum(k.endswith('.qweight') for k in after) == 14
    held = align(read_probs(run.folder/'probs.parquet'), GptqArgs(start=made['score']).parts[1])
    before = align(read_probs(run.folder/'before.parquet'), GptqArgs(start=made['score']).parts[1])
    assert 0 < np.abs(held-before).max() < .1

@pytest.mark.parametrize('which', ['lora', 'score_lora'])
def test_lora_is_added_into_its_base(made, which):
    run = quantised(start=made[which], bits=8, **wide)
    found = read_json(run.folder/'report.json')['tries'][0]
    assert found['kl'] < 1e-3, 'the model that is compared is the LoRA over its base'
    assert not (run.folder/'merged').exists() and not (run.folder/'model/adapter_config.json').exists()

def test_tokens_of_the_training_are_used_again(made):
    kept = set(models_path('.tokens').iterdir())
    args = GptqArgs(start=made['full'])
    for rows, enc in zip(args.parts, args.encoded):
        want = args.prompt.encode(rows, args.views)
        assert enc.drop(columns='ids').equals(want.drop(columns='ids')) and all(map(np.array_equal, enc.ids, want.ids))
    assert set(models_path('.tokens').iterdir()) == kept

def test_a_lora_is_measured_as_it_is_quantised(made, own_root, monkeypatch):
    "Its largest activations are of the merged model, and both speeds of the same rows, of which the first are longer"
    from competition_kit import gptq as G
    spent, real = [0], G.predict
    def predict(*args, **kw):
        spent[0] += int((kw.get('enc', args[-1]).n**2).sum())  # a clock that every run reads alike
        return real(*args, **kw)
    monkeypatch.setattr(G, 'predict', predict)
    monkeypatch.setattr(G, '_clock', lambda model: lambda: spent[0])
    load = G.load_source
    def strong(args): # the LoRA, whose q_proj gives more than it gets
        model = load(args)
        for name, p in model.named_parameters(): p.data *= 1e4 if 'q_proj.lora_B' in name else 1
        return model
    monkeypatch.setattr(G, 'load_source', strong)
    args = GptqArgs(start=made['lora'], rows=24)
    train = args.parts[0].assign(size=lambda d: d.response_a.map(str).map(len)).sort_values('size', ascending=False)
    train.attrs = args.table.attrs
    held = train.iloc[:40].drop(columns='size').reset_index(drop=True)
    args.__dict__.update(parts=[args.parts[0], held], encoded=[args.encoded[0], args.prompt.encode(held)])
    source, _, facts = G.measure_source(args, own_root/'measured')
    model = G.load_classifier(str(source), args.prompt, args.route, args.dtype)
    *_, took = G.measure(model, args)
    assert G.rows_a_second(model, args, took) == facts['speed'] != 40/took
    found = Q.activations(model, calibration_ids(args, 24, 0))
    assert np.allclose([facts['activations'][k] for k in found.index], found, rtol=1e-4)
    (own_root/'measured/before.json').unlink()  # as of a run that was killed after it wrote the merged model
    assert G.measure_source(args, own_root/'measured')[2] == facts

def test_a_killed_quantisation_continues_with_the_same_bytes(tiny, tmp_path, monkeypatch):
    ids = [np.array(i) for i in np.random.default_rng(0).integers(3, 400, (32, 40))]
    make = dict(source=tiny, ids=ids, dtype='fp32', progress=False)
    table = Q.quantise(out=tmp_path/'whole', **make)
    assert _kill_in_second_layer(tiny, tmp_path/'killed', ids) == -signal.SIGKILL
    written, seconds = [], read_json(next((tmp_path/'killed.work').glob('layers-*/000/seconds.json')))
    real = Q._Kept.write
    monkeypatch.setattr(Q._Kept, 'write', lambda self, layer, *a: (written.append(layer), real(self, layer, *a)))
    again = Q.quantise(out=tmp_path/'killed', **make)
    assert set(written) == {1}, 'the first layer was finished'
    one, two = ((tmp_path/n/'model.safetensors').read_bytes() for n in ('whole', 'killed'))
    assert one == two and again.error.equals(table.error) and again.seconds[0] == round(seconds, 2)

def _kill_in_second_layer(base, out, ids): # its exit code
    np.save(out.with_suffix('.npy'), ids)
    code = f"""
import os, signal, time
import numpy as np
from pathlib import Path
from competition_kit import quantise as Q
def write(self, layer, name, result, real=Q._Kept.write):
    if layer == 1:
        while not (self.folder/'000/manifest.json').exists(): time.sleep(.01)
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, layer, name, result)
Q._Kept.write = write
Q.quantise({str(base)!r}, {str(out)!r}, list(np.load({str(out.with_suffix('.npy'))!r})), dtype='fp32', progress=False)
"""
    return subprocess.run([sys.executable, '-c', code], timeout=300).returncode

def test_the_layers_of_a_multimodal_model_are_quantised(small_tok, tmp_path):
    "GPTQModel gives them other names than the files do; its vision tower stays as it is"
    from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration
    from competition_kit.quant import dense_weight, load_mapped
    text = dict(vocab_size=len(small_tok), hidden_size=64, intermediate_size=128, num_hidden_layers=2, head_dim=16,
                num_attention_heads=4, num_key_value_heads=2)
    sight = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28,
                 patch_size=14)
    config = Gemma3Config(text_config=text, vision_config=sight, mm_tokens_per_image=4)
    Gemma3ForConditionalGeneration(config).float().save_pretrained(tmp_path/'sees')
    small_tok.save_pretrained(tmp_path/'sees')
    ids = list(np.random.default_rng(0).integers(3, 400, (32, 40)))
    Q.quantise(tmp_path/'sees', tmp_path/'out', ids, 8, 32, dtype='fp32', progress=False)
    before, after = (load_file(tmp_path/n/'model.safetensors') for n in ('sees', 'out'))
    assert all(torch.equal(before[k], after[k]) for k in before if 'vision' in k)
    plain, packed = (load_mapped(str(tmp_path/n), AutoModelForCausalLM, torch.float32, 'cpu') for n in ('sees', 'out'))
    layers = [n for n, m in packed.named_modules() if hasattr(m, 'qweight')]
    weights = [[dense_weight(m.get_submodule(n), torch.float32) for m in (plain, packed)] for n in layers]
    assert len(layers) == 14 and all(0 < (a-b).norm() < .02*a.norm() for a, b in weights)

def test_matrices_without_a_place_are_refused(tiny, tmp_path, monkeypatch):
    (tmp_path/'made').mkdir()
    name = 'model.layers.0.mlp.{}_proj.qweight'
    save_file({name.format(k): torch.zeros(1) for k in ('up', 'fused')}, tmp_path/'made/model.safetensors')
    monkeypatch.setattr(Q, '_packed', ('qweight',))
    with pytest.raises(Refusal, match='1 quantised matrices have no place.*fused_proj'):
        Q.graft(tmp_path/'made', tiny, tmp_path/'out', {})

def test_every_calibration_token_counts(tiny, tmp_path, monkeypatch):
    "Those of short rows too, and no padding"
    from gptqmodel.quantization.gptq import GPTQ
    real, tokens, rng = GPTQ.quantize, set(), np.random.default_rng(0)
    monkeypatch.setattr(GPTQ, 'quantize', lambda self, *a, **kw: (tokens.add(self.nsamples), real(self, *a, **kw))[1])
    ids = [rng.integers(3, 400, n) for n in (*range(1, 9), *range(30, 50))]
    Q.quantise(tiny, tmp_path/'out', ids, dtype='fp32', progress=False)
    assert tokens == {sum(map(len, ids))}
    with pytest.raises(Refusal, match='has 2100 tokens, and the model has 2048 positions'):
        Q.quantise(tiny, tmp_path/'long', [rng.integers(3, 400, 2100)], dtype='fp32', progress=False)

def test_a_matrix_that_no_token_reaches_is_refused(tiny, tmp_path, monkeypatch):
    from gptqmodel.looper.gptq_processor import GPTQProcessor
    monkeypatch.setattr(GPTQProcessor, 'has_captured_input_ids', lambda self, name: name != 'mlp.up_proj')
    ids = list(np.random.default_rng(0).integers(3, 400, (32, 40)))
    with pytest.raises(Refusal, match='2 matrices were left as they are.*up_proj'):
        Q.quantise(tiny, tmp_path/'out', ids, dtype='fp32', progress=False)

def test_an_interrupted_run_continues_and_removes_its_finished_layers(made, monkeypatch):
    real = Q._Progress.layer_complete
    def stop(self, layer_idx, submodule_finalized):
        real(self, layer_idx, submodule_finalized)
        if layer_idx == 0: raise KeyboardInterrupt
    monkeypatch.setattr(Q._Progress, 'layer_complete', stop)
    with pytest.raises(KeyboardInterrupt): quantised(start=made['full'], **wide)
    assert list(models_path().glob('gptq-*/tries/*.work/layers-*/000/manifest.json'))
    monkeypatch.undo()
    first = quantised(start=made['full'], **wide)
    assert not (first.folder/'tries').exists()
    shutil.rmtree(first.folder)
    again = quantised(start=made['full'], **wide)
    assert again.record['outputs'] == first.record['outputs'], 'a run made again is another input of a vote'

def test_the_gate_fails_keeps_its_report_and_tries_the_rest(made, monkeypatch):
    strict = dict(start=made['full'], group=64)
    monkeypatch.setattr('competition_kit.gptq.limits', lambda args, bits: Limits(-1., 0.))  # nothing gains a nat
    with pytest.raises(Refusal, match='Try group=32, bits=8, rows=96') as e: quantised(**strict)
    run = models_path(str(e.value).split('models/')[1].split('/')[0])
    assert find_run(run.name)['status'] == 'failed'
    found = read_json(run/'report.json')['tries']
    assert [t['passed'] for t in found] == [False]
    failed = Run(find_run(run.name))
    assert len(layer_errors(failed)) == 2 and len(plot_quantised(failed).axes) == 2, 'its layers and its calibration'
    kept = {f: f.stat().st_mtime_ns for f in run.glob('tries/*/manifest.json')}
    with pytest.raises(Refusal, match='Failed: the log-loss'): quantised(**strict)
    assert kept and all(f.stat().st_mtime_ns == t for f, t in kept.items()), 'the quantised model is not made again'
    tried = _tries_of(dict(strict, retry=True))
    order = ['4 bits, group 64, 24 rows', '4 bits, group 32, 24 rows', '8 bits, group 64, 24 rows',
             '4 bits, group 64, 96 rows']
    assert tried == order
    monkeypatch.setattr('competition_kit.gptq.verdict', lambda found, limits: (len(found['calibration']) > 90, ''))
    run = quantised(**strict, retry=True, draws=2)
    assert run.record['quantised']['rows'] == 96 and len(report_table(run)) == 4, 'no other draw of all rows'
    monkeypatch.undo()
    assert quantised(**strict, **wide).done
    assert all(f.exists() for f in kept), 'another run leaves the models of a failed one'

def _tries_of(args): # names of the tries in their order
    with pytest.raises(Refusal, match='the gate failed') as e: quantised(**args)
    folder = models_path(str(e.value).split('models/')[1].split('/')[0])
    return [t['name'].split(', draw')[0] for t in read_json(folder/'report.json')['tries']]

def test_bad_input_is_refused_before_work(made, tmp_path, tiny):
    with pytest.raises(Refusal, match='does not divide'): quantised(start=made['full'], group=128)
    with pytest.raises(Refusal, match='Leave out max_len'): GptqArgs(start=made['full'], max_len=100)
    for limit in (-.5, float('nan')):
        with pytest.raises(Refusal, match='-1 for the default'): GptqArgs(max_loss=limit)
        with pytest.raises(Refusal, match='-1 for the default'): GptqArgs(max_flips=limit)
    with pytest.raises(Refusal, match='no head'): quantised(base=tiny, route='score')
    two = tmp_path/'two.jsonl'
    two.write_text('{"text": "one two"}\n{"text": "three"}\n')
    with pytest.raises(Refusal, match='2 calibration rows'): quantised(start=made['full'], calibration=str(two))
    args = GptqArgs(start=made['full'])
    two.write_text(json.dumps(dict(text='one'))+'\n'+json.dumps(dict(text=args.prompt.tok.decode(args.encoded[1].ids.iloc[0]))))
    with pytest.raises(Refusal, match='1 texts begin with prompts of held-out rows, the first of them text 2'):
        quantised(start=made['full'], calibration=str(two))
    with pytest.raises(Refusal, match='no such calibration'): quantised(start=made['full'], calibration='lost.jsonl')
    with pytest.raises(Refusal, match='held-out rows stand in'):
        quantised(start=made['full'], calibration='sample_arena')
    run = quantised(start=made['full'], **wide)
    with pytest.raises(Refusal, match='quantised already'): GptqArgs(start=run.id)

def test_a_changed_table_of_an_ancestor_is_refused_before_work(made, tiny):
    rows = load_rows('sample_arena').drop(columns=['main', 'phase'])
    write_rows(rows, data_path('later.parquet'))
    how = dict(base=tiny, mix='later', method='full', max_len=160, batch=8, dtype='fp32', epochs=.2)
    child = train_fold(start=made['full'], **how).id
    write_rows(rows.assign(weight=2.), data_path('sample_arena.parquet'))
    with pytest.raises(Refusal, match='has changed since'): GptqArgs(start=child, rows=24).inputs()

def test_a_base_that_is_a_run_has_seen_its_rows(made):
    "by its folder, with `start` or as a copy: the rows of the fold are no held-out rows"
    copy = shutil.copytree(models_path(made['full'], 'model'), data_path('copied'))
    for base in (f"models/{made['full']}/model", str(copy)):
        run = quantised(base=base, mix='sample_arena', fold=1, max_len=160, dtype='fp32', **wide)
        assert read_probs(run.folder/'probs.parquet').seen.all() and 'log_loss' not in run.record['metrics']
    run = quantised(base=str(copy), mix='sample_arena', fold=0, max_len=160, dtype='fp32', **wide)
    assert not read_probs(run.folder/'probs.parquet').seen.any() and 'log_loss' in run.record['metrics']

def test_a_teacher_that_sees_the_names_of_models_can_be_used(tiny, made):
    teacher = train_fold(model_names=True, base=tiny, max_len=160, lr=1e-3, dtype='fp32', lora_r=2, epochs=.2)
    run = quantised(start=teacher.id, bits=8, **wide)
    rows = load_rows('sample_arena')[:6]
    p = predict_runs([teacher.id, run.id], rows, models_path('p'), progress=False)
    assert np.abs(np.subtract(*(align(p[k], rows) for k in (teacher.id, run.id)))).max() < .01

def test_text_is_calibrated_with_its_prompt_and_rationales(tiny, own_root):
    rows = load_rows('sample_logic')
    meta, rows = rows.attrs['meta'], rows.iloc[:60].reset_index(drop=True)
    rows['rationale'] = [f'<output>{"ABCDEFG"[k]}</output>' if i % 2 else None for i, k in enumerate(rows.label)]
    rows.attrs['meta'] = meta
    write_rows(rows, data_path('told.parquet'))
    run = train_fold(mix='told', route='text', method='full', base=tiny, max_len=448, max_new_tokens=32, dtype='fp32',
                     epochs=.1, score_every=8, batch=4)
    args = GptqArgs(start=run.id, rows=16)
    texts = args.prompt.tok.batch_decode(calibration_ids(args, 16, 0))
    assert all(any(r in t for r in reasoning.values()) for t in texts), 'the prompt asks for reasoning'
    assert np.mean(['</output>' in t.rpartition('assistant')[2] for t in texts]) > .6, 'at the length of inference'
    assert len(args.sequences) == len(args.parts[0])
    assert quantised(start=run.id, **wide).done
    own = own_root/'own.jsonl'
    prompt = args.prompt.tok.decode(args.text.encode(args.parts[1]).ids[0])
    own.write_text(json.dumps(dict(text=prompt+'<output>A</output>')))
    with pytest.raises(Refusal, match='begin with prompts of held-out rows'):
        quantised(start=run.id, calibration=str(own))

def test_nan_in_a_weight_is_refused_by_name(tiny, tmp_path):
    base = tmp_path/'nan'
    shutil.copytree(tiny, base)
    t = load_file(base/'model.safetensors')
    t['model.layers.1.mlp.down_proj.weight'][3, 4] = float('nan')
    save_file(t, base/'model.safetensors', metadata=dict(format='pt'))
    with pytest.raises(Refusal, match='layers.1.mlp.down_proj.weight has 1 values'):
        quantised(base=str(base), mix='sample_arena:40', max_len=160, dtype='fp32')
