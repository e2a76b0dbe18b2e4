"Teachers, distillation and pseudo-labels: planted faults are refused or counted; a killed run ends the same."
import json, re, shutil, signal, subprocess, sys
import numpy as np
import pandas as pd
import pytest
from competition_kit.adopt import adopt_files
from competition_kit import trained
from competition_kit.ck import main
from competition_kit.core import Refusal, data_path, models_path, read_json, read_table
from competition_kit.distill import DistillArgs, distill_fold, own_run, student_and_teachers
from competition_kit.probs import read_probs, scores
from competition_kit.pseudo import PseudoArgs, pseudo, round_of
from competition_kit.record import read_record, records, run_stage, write_record
from competition_kit.rows import tasks
from competition_kit.tables import load_rows, publish, write_rows
from competition_kit.teachers import adopted_table, ask_teacher, distinct_teachers, members
from competition_kit.train import held_out, plot_run, train_fold
from competition_kit.vote import score_vote, voters

small = dict(mix='sample_arena:60', lora_r=4, max_len=192, epochs=.5)
options = list(tasks['preference'].options)
pytestmark = pytest.mark.usefixtures('baselines_once', 'samples')


def skilled(rows, skill=2., seed=0):
    "Probabilities that lean to the label"
    z = np.random.default_rng(seed).normal(size=(len(rows), 3)) + skill*np.eye(3)[rows.label.clip(0)]
    return np.exp(z)/np.exp(z).sum(1, keepdims=True)


def foreign(path, rows, p=None):
    "A file as another team would write it"
    p = skilled(rows) if p is None else p
    pd.DataFrame(p, columns=options).assign(id=list(rows.id)).to_csv(path, index=False)
    return str(path)


@pytest.fixture
def rows(samples):
    return load_rows('sample_arena')


def test_permuted_teachers_are_refused(rows, tmp_path):
    faults = dict(exchanged=skilled(rows)[:, [1, 0, 2]], shifted=np.roll(skilled(rows), 1, 0))
    for name, p in faults.items():
        with pytest.raises(Refusal, match='standard errors'):
            adopt_files([foreign(tmp_path/f'{name}.csv', rows, p)], 'sample_arena', name, seen='no')


def test_a_teacher_of_other_rows_is_named(rows, tmp_path, tiny):
    shuffled = skilled(rows)[np.random.default_rng(1).permutation(len(rows))]
    adopt_files([foreign(tmp_path/'shuffled.csv', rows, shuffled)], 'sample_arena', 'shuffled', seen='no')
    run = distill_fold(teachers='shuffled', base=tiny, **dict(small, mix='sample_arena', epochs=.05))
    assert any('knows nothing about them' in s for s in run.record['signs'])


def test_files_of_another_task_or_table_are_refused(rows, tmp_path):
    other = foreign(tmp_path/'x.csv', rows.assign(id=[f'x{i}' for i in rows.id]))
    with pytest.raises(Refusal, match='ids that the table does not have'): adopt_files([other], 'sample_arena', 'x')
    twice = foreign(tmp_path/'twice.csv', pd.concat([rows, rows[:2]]))
    with pytest.raises(Refusal, match='an id occurs twice'): adopt_files([twice], 'sample_arena', 'x')
    with pytest.raises(Refusal, match='no columns for the options'):
        pd.DataFrame(dict(id=rows.id, yes=.5, no=.5)).to_csv(tmp_path/'two.csv', index=False)
        adopt_files([str(tmp_path/'two.csv')], 'sample_arena', 'x')


@pytest.mark.parametrize('cell', ['x', None, float('inf')])
@pytest.mark.parametrize('logits', [False, True])
def test_a_cell_that_is_no_number_is_named(rows, tmp_path, cell, logits):
    "a softmax of it was nan, which a file of the run was refused for; a list of texts ended in a traceback"
    df = pd.DataFrame(dict(id=rows.id, p_model_a=.5, p_model_b=.3, p_tie=.2)).astype(object)
    df.loc[3, 'p_tie'] = cell
    df.to_csv(file := tmp_path/'odd.csv', index=False)
    columns = 'p_model_a p_model_b p_tie'
    with pytest.raises(Refusal, match=rf'odd.csv: a cell is no number. Rows \(1\): {rows.id[3]}'):
        adopt_files([str(file)], 'sample_arena', 'x', columns=columns, logits=logits)
    if cell != 'x': return
    pd.DataFrame(dict(id=rows.id, p=[['.5', cell, '.2']]*len(rows))).to_parquet(file := tmp_path/'odd.parquet')
    with pytest.raises(Refusal, match='odd.parquet: a cell is no number'):
        adopt_files([str(file)], 'sample_arena', 'x', logits=logits)


def test_a_teacher_that_may_have_seen_the_rows_is_refused_with_what_to_say(rows, tmp_path, tiny):
    "it had a probability for each row, and the refusal said that it had none"
    adopt_files([foreign(tmp_path/'t.csv', rows)], 'sample_arena', 't')
    with pytest.raises(Refusal, match='t has no out-of-fold probability for .* --seen no or fold'):
        distill_fold(**dict(small, mix='sample_arena', teachers='t', base=tiny))


def test_missing_rows_are_refused_or_trained_on_their_label(rows, tmp_path, tiny):
    part = rows[rows.fold != 3]
    adopt_files([foreign(tmp_path/'part.csv', part)], 'sample_arena', 'part', seen='no')
    args = dict(small, mix='sample_arena', teachers='part', base=tiny)
    with pytest.raises(Refusal, match='has no out-of-fold probability for'): distill_fold(**args)
    use = DistillArgs(**args, missing='label').targets.use
    assert use[:, 0].all()
    assert (~use[:, 1]).sum() == (rows.fold == 3).sum()
    for silent in (dict(form='kl'), dict(label_weight=0.)):
        with pytest.raises(Refusal, match='no label that counts'): distill_fold(**args, missing='label', **silent)


def test_students_of_the_same_rows_share_what_a_teacher_said(rows, tmp_path, tiny):
    adopt_files([foreign(tmp_path/'t.csv', rows)], 'sample_arena', 't', seen='no')
    def taught(mix, **args): return len(DistillArgs(mix=mix, base=tiny, teachers='t', **args).taught[0].p)
    assert taught('sample_arena:20') < taught('sample_arena:60') < taught('sample_arena')
    assert taught('sample_arena', seed=1, form='soft') == (rows.fold != 0).sum()
    assert len(list(models_path('.teachers').glob('*.parquet'))) == 3


def test_unknown_rows_are_no_out_of_fold_rows(rows, tmp_path):
    adopt_files([foreign(tmp_path/'u.csv', rows)], 'sample_arena', 'u')
    assert not ask_teacher('u', rows, 'preference', tmp_path).has.any()
    assert ask_teacher('u', rows, 'preference', tmp_path, in_sample=True).has.all()


def test_an_in_sample_file_said_to_be_out_of_fold_is_named(rows, tmp_path, tiny, capsys):
    short = dict(small, mix='sample_arena', epochs=.05, base=tiny)
    train_fold(**short)
    adopt_files([foreign(tmp_path/'sure.csv', rows, skilled(rows, 9.))], 'sample_arena', 'sure', seen='no')
    run = distill_fold(teachers='sure', **short)
    assert 'claims not to have seen' in run.record['signs'][0]
    assert 'claims not to have seen' in capsys.readouterr().out


def test_the_same_ids_with_other_texts_are_refused(tiny, tmp_path, rows):
    train = rows[:60].assign(prompt=[[f'Another prompt {i} about {i*i}'] for i in range(60)])
    train.attrs['meta'] = rows.attrs['meta']
    write_rows(train.drop(columns=['main', 'phase']), data_path('other.parquet'))
    teacher = train_fold(base=tiny, **dict(small, mix='other')).id
    with pytest.raises(Refusal, match='knows other texts under these ids'):
        distill_fold(teachers=teacher, base=tiny, **small)


def test_a_teacher_of_another_task_with_the_same_ids_is_refused(tiny):
    logic = load_rows('sample_logic')[:60].drop(columns=['main', 'phase'])
    write_rows(logic.assign(id=[str(i) for i in range(60)]), data_path('logic.parquet'))
    teacher = train_fold(base=tiny, **dict(small, mix='logic', max_len=256)).id
    with pytest.raises(Refusal, match='knows other texts under these ids'):
        distill_fold(teachers=teacher, base=tiny, **small)


def test_a_student_is_compared_with_teachers_on_its_own_rows_alone(rows, tmp_path, tiny):
    kw = dict(small, base=tiny, missing='label')
    other = train_fold(base=tiny, **dict(small, mix='sample_arena', score_every=2)).id
    adopt_files([foreign(tmp_path/'t.csv', rows)], 'sample_arena', 't', seen='no')
    run = distill_fold(**kw, teachers=f'{other} t')
    table = student_and_teachers(run, DistillArgs(**kw, teachers=f'{other} t'))
    assert other not in table.index
    adopted, = members('t')
    held = rows[rows.id.isin(held_out(run)[0].id)]
    p = read_probs(models_path(adopted['run_id'], 'probs.parquet')).set_index('id').p[held.id]
    assert table.log_loss[adopted['run_id']] == scores(np.stack(p), held.label.to_numpy())['log_loss']
    assert len(plot_run(run).axes) == 3


def test_a_teacher_whose_table_was_split_again_is_refused(five_runs, rows, tmp_path):
    adopt_files([foreign(tmp_path/'t.csv', rows)], 'sample_arena', 'adopted', seen='no')
    again = rows.assign(fold=(rows.fold+1) % 5).drop(columns=['main', 'phase'])
    write_rows(again, data_path('sample_arena.parquet'))
    for name in (five_runs[0].id, 'adopted'):
        with pytest.raises(Refusal, match='has changed since'):
            ask_teacher(name, load_rows(small['mix']), 'preference', tmp_path)


def test_each_row_is_predicted_by_the_run_that_held_it_out(five_runs, tmp_path):
    rows = load_rows(small['mix'])
    t = ask_teacher(five_runs[2].id[:12], rows, 'preference', tmp_path)
    assert [r['run_id'] for r in members(five_runs[0].id)] == [r.id for r in five_runs]
    assert distinct_teachers([r.id for r in five_runs]) == [five_runs[0].id]
    for run in five_runs:
        held = read_probs(run.folder/'probs.parquet').set_index('id').p
        here = rows.id.isin(held.index).to_numpy()
        assert np.allclose(t.p[here], np.stack(held[rows.id[here]]))
    assert (t.seen == 0).all()
    own = ask_teacher(five_runs[1].id, rows, 'preference', tmp_path, fold=1, in_sample=True)
    assert (own.seen == 1).sum() == (rows.fold != 1).sum()


def test_a_student_of_itself_votes_beside_its_teacher(five_runs, tiny):
    args = dict(small, base=tiny, teachers='self', form='soft')
    runs = [distill_fold(fold=k, **args) for k in (0, 1)]
    assert distill_fold(fold=0, **args).id == runs[0].id
    table = student_and_teachers(runs[1], DistillArgs(fold=1, **args))
    assert table.log_loss[five_runs[1].id] == five_runs[1].record['metrics']['log_loss']
    ballot = voters('sample_arena')
    assert ballot.voter.nunique() == 2
    assert {r.id for r in runs} < set(ballot.run)


def test_a_student_of_itself_may_use_other_packs_and_gpus(five_runs, tiny):
    args = dict(small, base=tiny)
    same = DistillArgs(**args, pack_tokens=512, save_every=7, gpus=2)
    assert own_run(same) in [r.id for r in five_runs]
    with pytest.raises(Refusal, match='no run of 04_train has these arguments'): own_run(DistillArgs(**args, lr=1e-4))


kill_after = """
import json, os, signal, sys
from importlib import import_module
from competition_kit.record import read_record, records, run_stage, write_record
module, name, calls, stage, args = json.loads(sys.argv[1])
module, stage_module = import_module(f'competition_kit.{module}'), import_module(f'competition_kit.{stage}')
real, done = getattr(module, name), []
def watched(*a, **kw):
    result = real(*a, **kw)
    done.append(1)
    if len(done) == calls: os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(module, name, watched)
run_stage(getattr(stage_module, stage), getattr(stage_module, f'{stage.title()}Args')(**args))
"""


def killed(*job):
    "Do a stage in a process that is killed after some calls of a function"
    p = subprocess.run([sys.executable, '-c', kill_after, json.dumps(job)], capture_output=True, text=True)
    assert p.returncode == -signal.SIGKILL, p.stderr


def content(folder, *patterns):
    "The tables of a run as values, its weights as bytes"
    files = sorted(f for p in patterns for f in folder.glob(p))
    assert len(files) >= len(patterns)
    return {f.name: read_table(f).drop(columns='views', errors='ignore').to_json() if f.suffix == '.parquet'
            else f.read_bytes() for f in files}


def test_a_killed_distillation_continues_to_the_same_weights(tiny, rows, tmp_path):
    adopt_files([foreign(tmp_path/'t.csv', rows)], 'sample_arena', 't', seen='no')
    args = dict(small, base=tiny, teachers='t', save_every=4)
    killed('fit', 'save_checkpoint', 2, 'distill', args)
    assert [r['status'] for r in records() if r['stage'] == 'distill'] == ['interrupted']
    again = distill_fold(**args)
    found = content(again.folder, 'probs.parquet', 'adapter/*.safetensors')
    assert len(again.record['attempts']) == 2
    shutil.rmtree(again.folder)
    whole = distill_fold(**args)
    assert whole.id == again.id
    assert content(whole.folder, 'probs.parquet', 'adapter/*.safetensors') == found


def test_killed_pseudo_labels_keep_what_was_predicted(tiny, rows):
    teachers = ' '.join(train_fold(fold=k, seed=k, base=tiny, **small).id for k in (0, 1))
    args = dict(data='sample_arena_test', teachers=teachers, margin=0.)
    killed('trained', '_predict_run', 1, 'pseudo', args)
    left, = models_path().glob('pseudo-*')
    predicted, = left.glob('asked/*.parquet')
    then = predicted.stat().st_mtime_ns
    again = run_stage(pseudo, PseudoArgs(**args))
    assert predicted.stat().st_mtime_ns == then
    found = content(again.folder, 'rows.parquet', 'reasons.json')
    shutil.rmtree(again.folder)
    assert content(run_stage(pseudo, PseudoArgs(**args)).folder, 'rows.parquet', 'reasons.json') == found


def test_other_filters_need_no_new_predictions(tiny, rows, monkeypatch):
    args = dict(data='sample_arena_test', teachers=train_fold(base=tiny, **small).id, margin=0.)
    first = run_stage(pseudo, PseudoArgs(**args))
    monkeypatch.setattr(trained, '_predict_run', None)
    second = run_stage(pseudo, PseudoArgs(**args, weight=2.))
    assert second.id != first.id
    p = [read_table(r.folder/'rows.parquet').target.tolist() for r in (first, second)]
    assert np.array_equal(*map(np.stack, p))


def test_an_online_teacher_of_two_ranks_teaches_as_kept_probabilities_do(tiny):
    teacher = train_fold(base=tiny, **dict(small, mix='sample_arena:20')).id
    args = dict(small, mix='sample_arena:20', base=tiny, teachers=teacher, in_sample=True, dtype='fp32')
    kept, online = distill_fold(**args), distill_fold(online=True, gpus=2, **args)
    assert (kept.record['teachers'][teacher]['missing'], online.record['teachers'][teacher]['missing']) == (0, 14)
    loss = [[l for _, l, _ in read_json(r.folder/'loss.json')] for r in (kept, online)]
    assert np.allclose(*loss, atol=1e-4)
    a, b = (np.stack(read_probs(r.folder/'probs.parquet').p) for r in (kept, online))
    assert np.abs(a-b).max() < 1e-4


def test_two_processes_ask_a_teacher(tiny):
    teacher = train_fold(base=tiny, **dict(small, mix='sample_arena:20')).id
    args = dict(small, mix='sample_arena:20', base=tiny, teachers=teacher, in_sample=True, dtype='fp32')
    one, file = np.stack([t.p for t in DistillArgs(**args).taught]), next(models_path('.teachers').glob('*.parquet'))
    shutil.rmtree(file.parent)
    two = np.stack([t.p for t in DistillArgs(**args, gpus=2, batch=32).taught])
    assert len(list(models_path('.teachers').glob(f'*/parts-2/*/{teacher}.parquet'))) == 2
    assert np.abs(one-two).max() < 1e-5


def test_two_processes_ask_the_teachers_of_pseudo_labels(tiny):
    args = dict(data='sample_arena_test', teachers=train_fold(base=tiny, **small).id, margin=0.)
    runs = []
    for n in (1, 2):
        runs.append(run_stage(pseudo, PseudoArgs(**args, name=f'by{n}', gpus=n)))
        if n == 1: shutil.rmtree(runs[0].folder/'asked')  # the second run would take its predictions
    one, two = (np.stack(read_table(r.folder/'rows.parquet').target) for r in runs)
    assert len(list(runs[1].folder.glob('asked/parts-2/*.part'))) == 2 and np.abs(one-two).max() < 1e-5
    other = run_stage(pseudo, PseudoArgs(**args, name='other', gpus=2, weight=2.))
    assert not list(other.folder.glob('asked/parts-*')), 'another weight asks no teacher again'


def test_a_damaged_cache_is_refused(rows, tmp_path, tiny):
    adopt_files([foreign(tmp_path/'t.csv', rows)], 'sample_arena', 't', seen='no')
    args = dict(small, base=tiny, teachers='t')
    kept = DistillArgs(**args).taught
    file, = models_path('.teachers').glob('*.parquet')
    whole = file.read_bytes()
    for at in (len(whole)//3, len(whole)//2, len(whole)-900):
        file.write_bytes(whole[:at]+bytes([whole[at] ^ 4])+whole[at+1:])
        try: assert np.array_equal(DistillArgs(**args).taught[0].p, kept[0].p)
        except Refusal as e: assert 'not a whole table of teachers' in str(e)
    file.write_bytes(whole[:-900])
    with pytest.raises(Refusal, match='Delete it: teachers are asked again'): DistillArgs(**args).taught


def test_an_adopted_voter_has_rows_of_both_tables(rows, tmp_path, tiny):
    test = load_rows('sample_arena_test')
    adopt_files([foreign(tmp_path/'train.csv', rows)], 'sample_arena', 'athene', seen='no')
    adopt_files([foreign(tmp_path/'test.csv', test)], 'sample_arena_test', 'athene', seen='no')
    assert len(adopted_table('athene')) == len(rows) + len(test)
    ballot = voters('sample_arena', 'athene')
    score = score_vote(ballot)
    assert score['metrics']['rows'] == len(rows)


def test_two_files_of_one_row_are_averaged_where_neither_is_out_of_fold(rows, tmp_path):
    files = [foreign(tmp_path/f'{k}_preds.csv', rows, skilled(rows, seed=k)) for k in (0, 1)]
    adopt_files(files, 'sample_arena', 'two', seen='fold')
    p = adopted_table('two').set_index('id').loc[list(rows.id)]
    assert p.seen.eq(False).tolist() == rows.fold.isin([0, 1]).tolist()
    mean = np.mean([skilled(rows, seed=k) for k in (0, 1)], 0)
    other = (~rows.fold.isin([0, 1])).to_numpy()
    assert np.allclose(np.stack(p.p)[other], mean[other], atol=1e-5)


def test_an_older_file_is_no_teacher_in_silence(rows, tmp_path):
    def adopted_again(seed):
        file = foreign(tmp_path/'t.csv', rows, skilled(rows, seed=seed))
        return adopt_files([file], 'sample_arena', 't', seen='no')[0]
    file = adopted_again(0).folder/'record.json'
    write_record(file, read_record(file) | dict(started='2026-01-01T00:00:00Z'))
    adopted_again(1)
    with pytest.raises(Refusal, match='was adopted later under this name'): adopted_again(0)


def test_near_copies_of_test_rows_are_dropped_counted_or_refused(rows, tmp_path):
    test = load_rows('sample_arena_test')
    extra = rows[:20].assign(id=[f'e{i}' for i in range(20)], label=-1, fold=-1)
    extra['prompt'] = [[f'An unrelated question number {i}: name {i+3} rivers'] for i in range(18)] + \
        [[t[0]+' !'] for t in test.prompt[:2]]
    extra.attrs['meta'] = rows.attrs['meta']
    write_rows(extra.drop(columns=['main', 'phase']), data_path('extra.parquet'))
    adopt_files([foreign(tmp_path/'r.csv', rows)], 'sample_arena', 'x', seen='no')
    adopt_files([foreign(tmp_path/'e.csv', extra)], 'extra', 'x', seen='no')
    args = dict(data='extra', teachers='x', margin=0.)
    with pytest.raises(Refusal, match='2 rows of extra are equal or nearly equal'):
        run_stage(pseudo, PseudoArgs(**args, near='refuse'))
    run = run_stage(pseudo, PseudoArgs(**args))
    assert run.record['metrics']['near sample_arena_test'] == 2
    publish(run.folder, 'extra_pseudo')
    soft = load_rows('extra_pseudo')
    assert len(soft) == 18
    assert (soft.label == -1).all()
    assert set(soft.source) == {'pseudo'}
    mixed = load_rows('extra_pseudo > sample_arena')
    assert mixed[mixed.phase == 0].id.str.startswith('e').all()


def test_labels_of_the_test_set_are_called_that(rows, tmp_path):
    test = load_rows('sample_arena_test')
    adopt_files([foreign(tmp_path/'t.csv', test)], 'sample_arena_test', 'x', seen='no')
    run = run_stage(pseudo, PseudoArgs(data='sample_arena_test', teachers='x'))
    assert run.record['labels_test_set']
    assert pd.read_parquet(run.folder/'rows.parquet').source.eq('test_pseudo').all()


def test_a_second_round_relabels_with_the_newer_student(rows, tmp_path, tiny):
    test = load_rows('sample_arena_test')
    adopt_files([foreign(tmp_path/'t.csv', test)], 'sample_arena_test', 'x', seen='no')
    args = dict(data='sample_arena_test', margin=0., near='keep')
    first = run_stage(pseudo, PseudoArgs(teachers='x', **args))
    publish(first.folder, 'sample_arena_test_pseudo')
    student = train_fold(base=tiny, **dict(small, mix='sample_arena_test_pseudo > sample_arena:20'))
    second = run_stage(pseudo, PseudoArgs(teachers=student.id, name='second', **args))
    assert (first.record['round'], second.record['round']) == (1, 2)
    assert second.record['rows'] == len(test)
    child = train_fold(base=tiny, start=student.id, **dict(small, mix='sample_arena:20'))
    assert round_of([child.id]) == 2, 'its parent learned from labels of a model'


def test_soft_labels_of_people_are_not_predicted_by_a_run_that_learned_them(tiny, tmp_path):
    rows, n = load_rows('sample_arena')[20:32], 12
    for source in ('people', 'pseudo'):
        told = dict(id=source+rows.id, source=source, label=-1, target=[[.5, .3, .2]]*n)
        told['prompt'] = [[f'{source} ask {k}?'] for k in range(n)]
        write_rows(rows.assign(**told), data_path(f'{source}.parquet'))
    mix = 'sample_arena:20 + people + pseudo'
    run, rows = train_fold(base=tiny, **dict(small, mix=mix)), load_rows(mix)
    told = ask_teacher(run.id, rows, 'preference', tmp_path)
    assert told.has.tolist() == ((rows.fold == 0) & rows.main | (rows.source == 'pseudo')).tolist()


def test_denoised_labels_keep_folds_and_labels(rows, tmp_path):
    adopt_files([foreign(tmp_path/'r.csv', rows)], 'sample_arena', 'x', seen='no')
    run = run_stage(pseudo, PseudoArgs(teachers='x', own=.6, margin=0.))
    soft = pd.read_parquet(run.folder/'rows.parquet')
    assert soft.fold.tolist() == rows.fold.tolist()
    assert soft.label.tolist() == rows.label.tolist()
    target = np.stack(soft.target)
    assert np.allclose(target, .4*skilled(rows) + .6*np.eye(3)[rows.label], atol=1e-4)


def test_the_command_adopts(rows, tmp_path, capsys):
    files = [foreign(tmp_path/f'{k}_preds.csv', rows) for k in (0, 1)]
    assert main(['adopt', *files, '--rows', 'sample_arena', '--name', 'athene', '--seen', 'fold']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [re.match(r'adopt-f(\d)', l)[1] for l in lines] == ['0', '1']
    assert main(['adopt', *files, '--rows', 'sample_arena', '--name', 'athene']) == 2
    assert '2 files of one teacher' in capsys.readouterr().err
