"Merged runs are models like any other; what cannot be merged is refused; a killed merge ends the same."
import shutil, weakref
import numpy as np
import pytest
import torch
from competition_kit import lora, merge
from competition_kit.core import Refusal, data_path, models_path, read_json, root_at, seal, write_json
from competition_kit.lora import merge_into_base, merge_loras, read_lora
from competition_kit.merge import MergeArgs, comparison_rows, merge_runs, past_rows, row_logits
from competition_kit.probs import read_probs
from competition_kit.record import find_run, write_record
from competition_kit.tables import load_rows, write_rows
from competition_kit.teachers import ask_teacher, members
from competition_kit.train import train_fold
from competition_kit.trained import ancestors, load_run, predict_runs, recipe_key, rows_seen, trusted_prompt
from competition_kit.vote import score_vote, voters
from safetensors.torch import load_file, save_file

small = dict(max_len=160, lr=1e-2, lora_r=2, dtype='fp32', epochs=.5)


def seeds(ids, fold): # the two runs of a fold
    return ' '.join(r for r in ids[:4] if find_run(r)['fold'] == fold)


def weights(run):
    return (run.folder/'adapter/adapter_model.safetensors').read_bytes()


def test_plain_peft_gives_the_merged_logits(runs, tiny):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    run = merge_runs(members=seeds(runs, 0), weights='3 1')
    prompt, rows = trusted_prompt(run.record), load_rows('sample_arena')[:8]
    ours = row_logits(load_run(run.record, prompt), prompt, rows)
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, run.folder/'adapter')
    with torch.no_grad():
        ids = [torch.tensor(np.array(i))[None].long() for i in prompt.encode(rows, 1).ids]
        theirs = [plain(i).logits[0, -1, prompt.letters] for i in ids]
    assert np.abs(ours-torch.stack(theirs).numpy()).max() < 1e-5
    line = run.record['logits']
    assert line['no adapter']['max'] > .01 > 1e-5 > [v for k, v in line.items() if k.startswith('members')][0]['max']


def test_a_merge_votes_teaches_and_continues(runs, tiny, tmp_path):
    merged = [merge_runs(members=seeds(runs, k)) for k in (0, 1)]
    assert [r.record['fold'] for r in merged] == [0, 1]
    assert recipe_key(merged[0].record) == recipe_key(merged[1].record)
    mixed = merge_runs(members=f'{runs[0]} {runs[3]}')  # two folds, so it held out none
    assert [r['run_id'] for r in members(merged[0].id)] == [r.id for r in (*merged, mixed)]
    assert MergeArgs(members=merged[0].id, folds=True).members.split() == [r.id for r in merged]
    assert MergeArgs(members=mixed.id, folds=True).members == mixed.id
    shutil.rmtree(mixed.folder)
    rows = load_rows('sample_arena')
    assert set(rows_seen(merged[0].id).id) == set(rows.id[rows.fold != 0])
    ballot = voters('sample_arena', ' '.join(r.id for r in merged))
    assert ballot.voter.nunique() == 1
    assert score_vote(ballot, 'sample_arena')['metrics']['rows'] == rows.fold.isin([0, 1]).sum()
    teacher = ask_teacher(merged[1].id, rows, 'preference', tmp_path)
    assert (teacher.has == rows.fold.isin([0, 1])).all()
    test = load_rows('sample_arena_test')
    assert not predict_runs([merged[0].id], test, tmp_path, progress=False)[merged[0].id].seen.any()
    args = dict(small, base=tiny, lora_r=4, lora_alpha=4)
    assert ancestors(train_fold(start=merged[0].id, **args).id)[1]['run_id'] == merged[0].id
    with pytest.raises(Refusal, match='was trained on'): train_fold(start=merged[0].id, fold=1, **args)


@pytest.mark.parametrize('gate', [{}, dict(fold=0, held_out=8)])  # of `09_gptq`, which compares on seen rows too
def test_a_merge_of_folds_has_no_score_beside_a_run_that_has_one(runs, own_root, gate):
    mixed = merge_runs(members=f'{runs[0]} {runs[3]}')
    write_record(mixed.folder/'record.json', find_run(mixed.id) | gate)
    alone, both = (score_vote(voters(runs=names), 'sample_arena') for names in (runs[0], f'{mixed.id} {runs[0]}'))
    assert (alone['rows'].fold == 0).all() and len(alone['rows']) == 8
    assert both['metrics'] == alone['metrics']
    assert both['sentence'].endswith('It is of 1 of the 2 voters; the others have no out-of-fold rows.')


def test_a_merge_does_not_vote_beside_its_members(runs, own_root):
    from competition_kit.vote import candidates, left_out
    merged = merge_runs(members=seeds(runs, 0)).id
    assert merged not in {r['run_id'] for r in candidates()}
    assert left_out(voters()) == {'made of runs that vote': [merged]}
    assert list(voters(runs=merged).run) == [merged], 'it votes where it is named'
    write_record(models_path(f := merged, 'record.json'), find_run(f) | dict(stage='gptq', params=dict(start=runs[0])))
    assert f not in {r['run_id'] for r in candidates()}, 'a quantised model neither'
    for r in seeds(runs, 0).split(): shutil.rmtree(models_path(r))
    assert f in {r['run_id'] for r in candidates()}, 'the runs that it was made of are gone'
    with pytest.raises(Refusal, match='of the stage gptq'): merge_runs(members=f)
    assert f not in MergeArgs().members, 'without names the newest trained run, and no quantised model, is merged'


def test_members_of_two_folds_leave_no_new_rows(runs):
    run = merge_runs(members=runs[0], folds=True)
    assert run.record['members'] == runs[:2]
    assert run.record['fold'] is None and run.record['metrics'] == {}
    assert read_probs(run.folder/'probs.parquet').seen.all()
    assert 'Give a table of new rows' in run.record['sentence']
    new = load_rows('sample_arena')[:12].assign(
        id=[f'n{i}' for i in range(12)], prompt=[[f'What is {i} and {i*i+7} in words?'] for i in range(12)],
        response_a=[[f'one {i}'] for i in range(12)], response_b=[[f'another {i*3}'] for i in range(12)],
        group=[f'g{i}' for i in range(12)], fold=-1)
    write_rows(new.drop(columns=['main', 'phase']), data_path('new.parquet'), task='preference')
    scored = merge_runs(members=runs[0], folds=True, held='new')
    assert not read_probs(scored.folder/'probs.parquet').seen.any()
    assert scored.record['metrics']['log_loss'] == scored.record['table']['merged']['log_loss']
    assert scored.record['sentence'].startswith('On 12 rows that no member has seen')
    old = load_rows('sample_arena')[:9].drop(columns=['main', 'phase'])
    write_rows(old, data_path('old.parquet'), task='preference')
    args = dict(members=runs[0], folds=True)
    assert comparison_rows(MergeArgs(**args, held='old'))[1].all()
    assert comparison_rows(MergeArgs(**args, held='old + new'))[1].all(), 'seen and new rows are not compared together'
    write_rows(old.assign(label=3), data_path('old.parquet'), task='preference')
    with pytest.raises(Refusal, match='labels that preference does not have'):
        comparison_rows(MergeArgs(**args, held='old'))


def test_rows_of_all_members_count_where_two_tables_share_ids(runs, tiny):
    rows = load_rows('sample_arena')
    train = rows.assign(prompt=[[f'Another prompt {i} about {i*i}'] for i in range(len(rows))],
                        group=[f'g{i}' for i in range(len(rows))])
    write_rows(train.drop(columns=['main', 'phase']), data_path('other.parquet'), task='preference')
    other = train_fold(mix='other', base=tiny, **small).id
    past = past_rows(MergeArgs(members=f'{runs[0]} {other}'))
    assert len(past) == 2*(rows.fold != 0).sum()


def test_a_table_without_labels_is_refused_before_work(runs):
    with pytest.raises(Refusal, match='sample_arena_test: no row has a label.*held='):
        merge_runs(members=seeds(runs, 0), held='sample_arena_test')
    assert not list(models_path().glob('merge-*/adapter'))


def test_score_heads_are_averaged(runs, tiny, tmp_path):
    from transformers import AutoModelForSequenceClassification
    second = train_fold(route='score', seed=1, base=tiny, **small).id
    both = f'{runs[4]} {second}'
    run = merge_runs(members=both, weights='1 3')
    name = 'base_model.model.score.weight'
    heads = [load_file(models_path(r, 'adapter/adapter_model.safetensors'))[name] for r in (runs[4], second, run.id)]
    assert torch.allclose(heads[2], .25*heads[0]+.75*heads[1], atol=1e-7)
    assert [v for k, v in run.record['logits'].items() if k.startswith('members')][0]['max'] < 1e-5
    whole = merge_runs(members=both, weights='1 3', how='base')
    prompt, rows = trusted_prompt(run.record), load_rows('sample_arena')[:6]
    want = row_logits(load_run(run.record, prompt), prompt, rows)
    assert np.abs(row_logits(load_run(whole.record, prompt), prompt, rows)-want).max() < 1e-5
    plain = AutoModelForSequenceClassification.from_pretrained(whole.folder/'model', dtype=torch.float32)
    with torch.no_grad(): theirs = plain(torch.tensor(np.array(prompt.encode(rows, 1).ids[0]))[None].long()).logits[0]
    assert np.abs(theirs.numpy()-want[0]).max() < 1e-4
    assert plain.config.id2label[2] == 'tie'


def test_a_model_with_the_mean_added_is_a_base(runs, tmp_path):
    run, exact = (merge_runs(members=seeds(runs, 0), how=how) for how in ('base', 'concat'))
    assert np.allclose(*(np.stack(read_probs(r.folder/'probs.parquet').p) for r in (run, exact)), atol=1e-5)
    copy = shutil.copytree(run.folder/'model', tmp_path/'elsewhere')
    for base in (f'models/{run.id}/model', str(copy)):
        with pytest.raises(Refusal, match='was trained on'): train_fold(base=base, fold=1, **small)
    child = train_fold(base=str(copy), method='full', **{k: v for k, v in small.items() if k != 'lora_r'})
    assert [r['run_id'] for r in ancestors(child.id)] == [child.id, run.id, *exact.record['members']]
    with pytest.raises(Refusal, match='all weights'): merge_runs(members=f'{child.id} {runs[0]}')


def test_members_that_make_no_model_are_refused(runs, tiny, tmp_path):
    other = train_fold(base=tiny, **dict(small, max_len=150)).id
    with pytest.raises(Refusal, match='differ in their prompt'): merge_runs(members=f'{runs[0]} {other}')
    with pytest.raises(Refusal, match='differ in their route'): merge_runs(members=f'{runs[0]} {runs[4]}')
    with pytest.raises(Refusal, match='merged twice'): merge_runs(members=f'{runs[0]} {runs[0][:16]}')
    assert MergeArgs(members=seeds(runs, 0), weights='2 2') == MergeArgs(members=seeds(runs, 0)), 'the same run'
    with pytest.raises(Refusal, match='for 2 adapters'): merge_runs(members=f'{runs[0]} {runs[2]}', weights='1 2 3')
    with pytest.raises(Refusal, match='no shared start'): merge_runs(members=seeds(runs, 0), how='factors')
    for what, field in {'task': 'task', 'base': 'base', 'tokenizer': 'tokenizer', 'letters': 'letters'}.items():
        rec = find_run(runs[2])
        write_record(models_path(runs[2], 'record.json'), rec | {field: 'another'})
        with pytest.raises(Refusal, match=f'differ in their {what}'): merge_runs(members=f'{runs[0]} {runs[2]}')
        write_record(models_path(runs[2], 'record.json'), rec)


def test_members_of_another_option_order_are_refused(runs):
    from competition_kit.core import read_table, write_table
    file = models_path(runs[2], 'probs.parquet')
    probs = read_table(file)
    meta = {k: v for k, v in probs.attrs['meta'].items() if k != 'content'}
    write_table(probs, file, **meta | dict(options=['model_b', 'model_a', 'tie']))
    with pytest.raises(Refusal, match='differ in their option order'): merge_runs(members=f'{runs[0]} {runs[2]}')


def planted(runs, tmp_path, name, tensors=(), **config):
    folder = shutil.copytree(models_path(runs[0], 'adapter'), tmp_path/name)
    write_json(folder/'adapter_config.json', read_json(folder/'adapter_config.json') | config)
    if tensors: save_file(load_file(folder/'adapter_model.safetensors') | tensors, folder/'adapter_model.safetensors')
    seal(folder)
    return folder


def test_other_kinds_of_adapters_are_refused(runs, tmp_path, tiny):
    first = 'base_model.model.model.layers.0.self_attn.q_proj.lora_'
    sizes = dict(A=(2, 64), B=(49152, 2))
    head = {f'base_model.model.lm_head.lora_{k}.weight': torch.ones(s) for k, s in sizes.items()}
    faults = {'use_dora': planted(runs, tmp_path, 'dora', use_dora=True),
              'lora_bias': planted(runs, tmp_path, 'bias', lora_bias=True),
              'output matrix': planted(runs, tmp_path, 'head', head),
              'not finite': planted(runs, tmp_path, 'nan', {f'{first}A.weight': torch.full((2, 64), torch.nan)})}
    for what, folder in faults.items():
        with pytest.raises(Refusal, match=what): read_lora(folder)
    good = read_lora(models_path(runs[0], 'adapter'))
    wide = {f'{first}{k}.weight': torch.ones(s) for k, s in dict(A=(2, 32), B=(64, 2)).items()}
    with pytest.raises(Refusal, match='is 64 → 64 in the first, and 32 → 64'):
        merge_loras([good, read_lora(planted(runs, tmp_path, 'wide', wide))], None, tmp_path/'out')
    with pytest.raises(Refusal, match='not in the base'): merge_into_base('smollm2', [good], None, tmp_path/'out')


def test_a_quantised_base_needs_its_twin(tiny, tmp_path, own_root, monkeypatch):
    from gptq_writer import checkpoint
    checkpoint(tiny, tmp_path/'gptq')
    base = str(tmp_path/'gptq')
    run = train_fold(base=base, **small).id
    over = merge_runs(members=run)
    assert [v for k, v in over.record['logits'].items() if k.startswith('members')][0]['max'] < 1e-4
    with pytest.raises(Refusal, match='never merged into it'): merge_runs(members=run, how='base')
    with pytest.raises(Refusal, match='is for how=base'): merge_runs(members=run, twin=tiny)
    from transformers import AutoModelForCausalLM
    wrong = AutoModelForCausalLM.from_pretrained(shutil.copytree(tiny, tmp_path/'wrong'))
    for p in wrong.parameters(): p.data.normal_(0, .02)
    wrong.save_pretrained(tmp_path/'wrong')
    with pytest.raises(Refusal, match='not the base that was quantised'):
        merge_runs(members=run, how='base', twin=str(tmp_path/'wrong'))
    together, loaded = merge.members_together, []
    def alone(*args):
        assert not any(m() for m in loaded), 'the quantised base is gone when its twin is loaded'
        model, logits = together(*args)
        loaded.append(weakref.ref(model))
        return model, logits
    monkeypatch.setattr(merge, 'members_together', alone)
    merged = merge_runs(members=run, how='base', twin=tiny)
    shift = {k: v['mean'] for k, v in merged.record['logits'].items()}
    assert len(loaded) == 2 and len(shift) == 3 and shift.pop('no adapter') > .1
    assert all(0 < v < .01 for v in shift.values())
    assert load_run(merged.record, trusted_prompt(merged.record)).device.type == 'cpu'


def test_a_lora_over_nf4_goes_into_its_own_base_only(tiny, tmp_path, own_root):
    pytest.importorskip('bitsandbytes')
    run = train_fold(base=tiny, **small | dict(dtype='nf4')).id
    assert find_run(merge_runs(members=run).id)['model']['dtype'] == 'nf4', 'served over nf4'
    with pytest.raises(Refusal, match='in nf4, and a LoRA is never merged into it'): merge_runs(members=run, how='base')
    other = shutil.copytree(tiny, tmp_path/'other')
    tensors = load_file(other/'model.safetensors')
    save_file({k: t+1e-3 for k, t in tensors.items()}, other/'model.safetensors', metadata=dict(format='pt'))
    with pytest.raises(Refusal, match='is another base'): merge_runs(members=run, how='base', twin=str(other))
    merged = merge_runs(members=run, how='base', twin=tiny)
    shift = {k: v['mean'] for k, v in merged.record['logits'].items()}
    assert [k.rpartition(' in ')[2] for k in shift] == ['no adapter', 'nf4', '16 bits']
    assert merged.record['model']['dtype'] != 'nf4' and all(v < .01 for k, v in shift.items() if k != 'no adapter')


def test_a_killed_merge_ends_with_the_same_weights(runs, own_root, tmp_path, monkeypatch):
    whole = {}
    with root_at(shutil.copytree(own_root, tmp_path/'undisturbed')):
        for how in ('svd', 'base'):
            run = merge_runs(members=seeds(runs, 0), how=how, rank=3)
            whole[how] = {f.name: f.read_bytes() for f in run.folder.rglob('*.safetensors')}
    stack, calls = lora.stack_factors, []
    def stops(*args):
        calls.append(args)
        if len(calls) == 5: raise KeyboardInterrupt
        return stack(*args)
    for how in whole:
        monkeypatch.setattr(lora, 'stack_factors', stops)
        calls.clear()
        with pytest.raises(KeyboardInterrupt): merge_runs(members=seeds(runs, 0), how=how, rank=3)
        monkeypatch.undo()
        folder, = models_path().glob('merge-*/'+('model' if how == 'base' else 'adapter'))
        (folder/'.model.safetensors.0a1b2c3d.tmp').write_bytes(b'half a file, which SIGKILL leaves')
        run = merge_runs(members=seeds(runs, 0), how=how, rank=3)
        assert {f.name: f.read_bytes() for f in run.folder.rglob('*.safetensors')} == whole[how]
        assert not [f for f in run.record['outputs'] if 'tmp' in f], 'an input of a later run'
        assert not list(run.folder.rglob('*.tmp'))
