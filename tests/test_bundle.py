"The offline package: what is refused before copying, what a packed model predicts, and what a broken one leaves"
import json, os, shutil, subprocess, sys, time, zipfile
from dataclasses import replace
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
from competition_kit.bundle import (adapter_config, bundle, check_fp16, check_model, copy_bases, copy_run, file_faults,
                                    found_gpus, guarded_vote, host_test, ids_of, install, link_bases, missing_on_target,
                                    needed_packages, package_bases, package_engine, package_facts, package_packs,
                                    package_runs, prior_submission, resolve, submission_cells, take_submission, targets,
                                    torch_faults, vote_arguments, whole_runs)
from competition_kit.ck import main
from competition_kit.combine import majority
from competition_kit.core import Refusal, models_path, read_json, root_at, write_json
from competition_kit.record import find_run, read_record, run_stage, start_run, write_record
from competition_kit.submission import check_submission, find_sample
from competition_kit.tables import load_rows
from competition_kit.trained import model_params, predict_runs
from competition_kit.vote import VoteArgs, run_weights, vote, voter_weights, voters

sys.path.insert(0, str(Path(__file__).resolve().parents[1]/'bench'))

@pytest.fixture
def no_wheels(monkeypatch):
    monkeypatch.setattr('competition_kit.bundle.resolve', lambda *a: [])
    monkeypatch.setattr('competition_kit.bundle.write_wheels', lambda *a: None)

# ---- runs and weights
def test_a_vote_brings_its_voters_and_weights(runs):
    held = run_stage(vote, VoteArgs(weights='3 1 0', rule='logits', views=1))
    recs, how = package_runs([held.id])
    ballot = voters(runs=' '.join(r['run_id'] for r in recs))
    assert how['rule'] == 'logits' and how['views'] == 1
    assert [r['run_id'] for r in recs] == held.record['members'][:4], 'a voter of weight 0 stays at home'
    packed = voter_weights(ballot, ' '.join(str(w) for w in {r['voter']: r['weight'] for r in how['runs']}.values()))
    np.testing.assert_allclose(run_weights(ballot, packed), held.record['weights'][:4])

def test_a_tie_of_a_vote_is_a_tie_in_its_package(runs):
    "four rounded sixths and a third decide what nobody has decided"
    held = run_stage(vote, VoteArgs(rule='majority', views=1))
    weights = {r['voter']: r['weight'] for r in package_runs([held.id])[1]['runs']}
    share, tied = majority(np.eye(3)[:, None], list(weights.values()))
    assert tied.all() and np.ptp(share) < 1e-6

def test_a_vote_brings_its_arguments(runs):
    "else a package would ask five times for each reply, or leave the memory limit at home"
    given = dict(weights='3 1 1', views=1, rescore=.5, pack_tokens=1024, max_memory_gb=8., samples=1, retries=0)
    how = package_runs([run_stage(vote, VoteArgs(**given)).id])[1]
    packed = vote_arguments(how.pop('runs'), how, 30, 'test.csv', 'sample.csv')
    kept = {k: v for k, v in vars(VoteArgs(**packed)).items() if k in given and k != 'weights'}
    assert kept == {k: v for k, v in given.items() if k != 'weights'}

def test_a_cascade_brings_the_share_that_was_best_out_of_fold(runs):
    "the platform has no out-of-fold rows, and would re-score as many rows as fit"
    held = run_stage(vote, VoteArgs(runs=f'{runs[2]} {runs[0]} {runs[1]}', weights='1 3', rescore=0.))
    file = held.folder/'record.json'
    def share(*scores, metric='log_loss'):
        curve = {str(k/4): {metric: score} for k, score in enumerate(scores)}
        write_record(file, read_record(file) | dict(cascade=dict(metric=metric, curve=curve)))
        return package_runs([held.id])[1]['rescore']
    assert share(1., .8, .7, .7, .9) == .5 and share(.2, .4, .9, metric='accuracy') == .5
    assert share(None, None) == share() == 0
    with pytest.raises(Refusal, match=rf'worth nothing.*alone: {runs[2]}\.$'): share(.7, .8, .9)


def test_all_gpus_vote_where_rows_can_be_cut():
    one = dict(run='train-f0-1', voter=0, weight=1.)
    def gpus(n, **how): return vote_arguments([one], dict(rule='mean') | how, 9, 'test.csv', 's.csv', n)['gpus']
    assert [gpus(n) for n in (0, 1, 4)] == [1, 1, 4]
    assert gpus(4, rescore=.5) == 4 and gpus(4, rescore=0.) == gpus(4, rule='ranks') == 1
    VoteArgs(**vote_arguments([one], dict(rule='ranks', rescore=1.), 9, 'test.csv', 's.csv', 4))

def test_a_torch_that_cannot_use_the_gpus_is_a_fault(own_root):
    "an old driver: the vote would run on the CPU without a word"
    python = own_root/'python'
    old = 'echo "RuntimeError: the driver is too old" >&2\nexit 1\n'
    python.write_text(f'#!/bin/sh\necho "$2" | grep -q "range(2)" || exit 0\n{old}')
    python.chmod(0o755)
    assert torch_faults(python, 0) == torch_faults(python, 1) == []
    assert torch_faults(python, 2) == ['torch cannot compute on 2 GPUs: RuntimeError: the driver is too old']
    assert 'torch_faults(python' in submission_cells(targets['t4x2'])[2]

def test_a_failing_nvidia_smi_shows_no_gpu(own_root, monkeypatch):
    (own_root/'nvidia-smi').write_text('#!/bin/sh\necho "Tesla T4, 15360 MiB, 550"\nexit $FAILS\n')
    (own_root/'nvidia-smi').chmod(0o755)
    monkeypatch.setenv('PATH', f"{own_root}:{os.environ['PATH']}")
    for code, n in (('0', 1), ('9', 0)):
        monkeypatch.setenv('FAILS', code)
        assert len(found_gpus()) == n

def test_faults_come_together_and_before_any_file(runs, own_root):
    for run in runs[:2]:
        file = models_path(run, 'adapter/adapter_model.safetensors')
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(Refusal) as e: bundle(runs, 'cpu', own_root/'package')
    assert all(run in str(e.value) for run in runs[:2]) and runs[2] not in str(e.value)
    with pytest.raises(Refusal, match='no run .*x'): bundle(['train-x', runs[3]], 'cpu', own_root/'package')
    with pytest.raises(Refusal, match='of stage vote|its own runs'):
        bundle([run_stage(vote, VoteArgs(runs=runs[3])).id, runs[3]], 'cpu', own_root/'package')
    assert not list(own_root.glob('*package*'))

def test_a_run_that_is_named_twice_is_refused(runs):
    with pytest.raises(Refusal, match=f'named twice: {runs[0]}\\.'): package_runs([runs[0], runs[1], runs[0][:-1]])

def test_a_package_is_made_by_one_process_at_a_time(runs, own_root, monkeypatch):
    "the second would delete what the first has copied; what a killed one left is deleted"
    out, said = own_root/'zip', []
    (own_root/'.zip.tmp/left').mkdir(parents=True)
    def meanwhile(*a):
        with pytest.raises(Refusal, match='another process is packing') as e: bundle(runs[:1], 'adapter', out)
        said.append(str(e.value))
        return {}
    monkeypatch.setattr('competition_kit.bundle.file_list', meanwhile)
    assert bundle(runs[:1], 'adapter', out) == out and str(out) in said[0]
    assert {p.name for p in out.iterdir()} == {'bundle.json', 'submission.zip'}
    assert not list(own_root.glob('.zip*'))

def test_runs_that_weigh_nothing_are_refused_here_and_not_by_the_platform(runs, monkeypatch):
    monkeypatch.setattr('competition_kit.bundle.people', lambda: {runs[0]: dict(vote_weight=0.)})
    with pytest.raises(Refusal, match='weight 0'): package_runs(runs[:1])
    assert [r['weight'] for r in package_runs(runs[:2])[1]['runs']] == [.5, .5]

def test_a_base_that_is_gone_is_named(runs):
    rec = find_run(runs[0])
    gone = dict(rec, params=dict(rec['params'], base='./gone'))
    with pytest.raises(Refusal, match='no base'): package_bases([gone])

# ---- the T4
def quantised(run, most): # a finished run of 09_gptq that measured `most`
    with start_run('gptq', dict(start=run), {}, notebook='09_gptq.ipynb') as q:
        write_json(q.folder/'report.json', dict(fp16=f'The largest activation is {most:.4g}, in model.norm: ...'))
        q.finish({}, ['report.json'])

def test_fp16_needs_a_measurement(runs):
    rec = find_run(runs[0])
    half = dict(rec, params=dict(rec['params'], dtype='bf16'))  # as 04_train records `auto` on most GPUs
    with pytest.raises(Refusal, match=f'ck run 09_gptq -p start {runs[0]}'): check_fp16(half)
    with pytest.raises(Refusal, match='twin of its base by 08_merge'):  # 09_gptq refuses a LoRA over a quantised base
        check_fp16(dict(rec, params=dict(rec['params'], dtype='nf4')))
    quantised(runs[0], 912.5)
    check_fp16(half)
    quantised(runs[1], 21000)
    with pytest.raises(Refusal, match='21000'): check_fp16(dict(half, run_id=runs[1]))

def test_weights_must_fit_into_the_gpu(runs):
    small = replace(targets['t4x2'], gpu_gb=.001)
    with pytest.raises(Refusal, match='T4 has 0.001'): check_model(find_run(runs[0]), small)

def test_packs_of_a_large_gpu_are_cut_for_a_small_one(runs, own_root, no_wheels):
    "else the vote would end with a full memory on the platform"
    held, small = run_stage(vote, VoteArgs(pack_tokens=131072)).id, replace(targets['h100'], gpu_gb=.1)
    def packs(target): return read_json(bundle([held], target, own_root/target)/'bundle.json')['how']['pack_tokens']
    assert packs('h100') == 131072
    recs, how = package_runs([held])
    cut = package_packs(recs, how, small)['pack_tokens']
    assert 1024 < cut < 131072 and package_packs(recs, how | dict(pack_tokens=512), small) == dict(pack_tokens=512)
    assert package_packs(recs, {}, small) == {}, 'the default of a vote'
    with pytest.MonkeyPatch.context() as m:
        m.setitem(targets, 'small', small)
        assert packs('small') == cut

# ---- what a package predicts
def packed(rec, folder): # the run and its base in a package
    copy_run(rec, folder/'models')
    bases = package_bases([rec])
    names = copy_bases(bases, folder/'bases')
    facts = package_facts(folder, targets['cpu'], [rec], dict(runs=[]), bases, names)
    link_bases(folder, facts['bases'], facts['files'], folder/'root')
    return names

def predictions_there(rec, package, rows, root, monkeypatch): # in another root, with the package's models and bases
    with root_at(root):
        monkeypatch.setenv('CK_BASES', str(package/'root/bases'))
        (root/'models').symlink_to(package/'models')
        return predict_runs([rec['run_id']], rows, root/'out')[rec['run_id']]

@pytest.mark.parametrize('method', ['lora', 'full'])
def test_a_packed_model_predicts_the_same_where_its_base_is_gone(samples, own_root, tiny, monkeypatch, method):
    from competition_kit.train import train_fold
    shutil.copytree(tiny, own_root/'base')
    run = train_fold(mix='sample_arena:40', base='base', method=method, max_len=160, lora_r=2, dtype='fp32', epochs=.3)
    rows = load_rows('sample_arena_test').head(6)
    before = predict_runs([run.id], rows, own_root/'out')[run.id]
    names = packed(run.record, own_root/'package')
    assert bool(names) == (method == 'lora'), 'a model with weights of its own leaves its base at home'
    (own_root/'base').rename(own_root/'elsewhere')
    after = predictions_there(run.record, own_root/'package', rows, own_root/'there', monkeypatch)
    np.testing.assert_array_equal(np.stack(before.p), np.stack(after.p))
    if method == 'full': return
    config = own_root/'package/bases'/names['base']/'config.json'
    write_json(config, read_json(config) | dict(rms_norm_eps=.1))
    with pytest.raises(Refusal, match='not the one it was trained on'):
        predictions_there(run.record, own_root/'package', rows, own_root/'again', monkeypatch)

def test_a_model_in_bf16_is_packed_for_fp16(samples, own_root, tiny, monkeypatch, no_wheels):
    "the packed run votes in fp16, and the run here stays what it is"
    from competition_kit.train import train_fold
    monkeypatch.setattr('competition_kit.bundle.check_fp16', lambda rec: None)
    run = train_fold(mix='sample_arena:40', base=tiny, max_len=160, lora_r=2, dtype='bf16', epochs=.3)
    rows, dtypes = load_rows('sample_arena_test').head(6), {}
    before = predict_runs([run.id], rows, own_root/'out')[run.id]
    for target in 'cpu', 't4x2':
        package = bundle([run.id], target, own_root/target)
        dtypes[target] = model_params(read_record(package/'models'/run.id/'record.json'))['dtype']
    link_bases(package, (facts := read_json(package/'bundle.json'))['bases'], facts['files'], package/'root')
    assert dtypes == dict(cpu='bf16', t4x2='fp16') and not file_faults(package, facts['files'])
    assert model_params(find_run(run.id))['dtype'] == 'bf16'
    after = predictions_there(run.record, package, rows, own_root/'there', monkeypatch)
    assert 0 < np.abs(np.stack(before.p)-np.stack(after.p)).max() < .02

def test_rows_that_no_model_has_seen_get_the_class_prior_of_the_package(runs, own_root):
    rec, shares = find_run(runs[0]), dict(model_a=.5, model_b=.3, tie=.2)
    copy_run(rec, own_root/'package/models', shares=shares)
    test = own_root/'data/sample_arena/test.csv'
    with root_at(own_root/'package'):
        done = run_stage(vote, VoteArgs(data='gone', runs=runs[0], budget=1e-9, test=str(test)))
        table = pd.read_csv(models_path(done.id, 'submission.csv'))
    assert done.record['missing']['no_model'] == len(table)
    np.testing.assert_allclose(table[[f'winner_{o}' for o in shares]], [[.5, .3, .2]]*len(table))

def test_a_base_of_the_platform_is_named_and_may_have_more_files(runs, own_root, monkeypatch):
    from competition_kit.base import base_hash
    rec = find_run(runs[0])
    platform = own_root/'platform'
    bases = package_bases([rec], {rec['base']: str(platform)})
    names = copy_bases(bases, own_root/'package/bases')
    assert not list(own_root.glob('package/bases/*')), 'it stays at home'
    (own_root/'package').mkdir()
    facts = package_facts(own_root/'package', targets['cpu'], [rec], dict(runs=[]), bases, names)
    assert len(file_faults(own_root/'package', facts['files'])) == len(facts['files'])
    shutil.copytree(rec['params']['base'], platform)
    (platform/'extra.json').write_text('{}')
    assert not file_faults(own_root/'package', facts['files'])
    link_bases(own_root/'package', {'moved': facts['bases'][rec['params']['base']]}, facts['files'], own_root/'root')
    monkeypatch.setenv('CK_BASES', str(own_root/'root/bases'))
    assert base_hash('moved') == rec['base'] != base_hash(str(platform))

def test_damaged_files_are_named_and_their_runs_stay_out(runs, own_root):
    recs, how = package_runs(runs[:3])
    for rec in recs: copy_run(rec, own_root/'package/models')
    names = copy_bases(bases := package_bases(recs), own_root/'package/bases')
    facts = package_facts(own_root/'package', targets['cpu'], recs, how, bases, names)
    assert not file_faults(own_root/'package', facts['files'])
    adapter = f'models/{runs[1]}/adapter/adapter_model.safetensors'
    data = (own_root/'package'/adapter).read_bytes()
    (own_root/'package'/adapter).write_bytes(data[:-1]+bytes([data[-1] ^ 1]))
    faults = file_faults(own_root/'package', facts['files'])
    assert faults == {adapter: 'other content'}
    assert whole_runs(facts['runs'], faults)[1] == [runs[1]]
    weights = next(name for name in facts['files'] if name.startswith('bases/') and name.endswith('.safetensors'))
    assert not whole_runs(facts['runs'], {weights: 'missing'})[0], 'all of them need the base'

def test_a_voter_goes_whole_where_another_has_its_recipe(runs, own_root):
    "else the folds of both would be sorted into voters anew, and the weights be too many or go to others"
    from competition_kit.train import train_fold
    rec = find_run(runs[0])
    twin = train_fold(**rec['params'] | dict(pack_tokens=512)).id  # the same recipe and fold
    held = run_stage(vote, VoteArgs(runs=f'{runs[0]} {runs[1]} {twin} {runs[2]} {runs[3]}', weights='2 1 1'))
    recs, how = package_runs([held.id])
    names = copy_bases(bases := package_bases(recs), own_root/'package/bases')
    facts = package_facts(own_root/'package', targets['cpu'], recs, how, bases, names)
    def left(broken):
        whole, out = whole_runs(facts['runs'], [f'models/{broken}/adapter/adapter_model.safetensors'])
        given = vote_arguments(whole, facts['how'], 9, 'test.csv', 'sample.csv')
        ballot = voters(runs=given['runs'])
        return out, dict(zip(ballot.run, run_weights(ballot, voter_weights(ballot, given['weights'])).round(3)))
    assert left(runs[0]) == (runs[:2], {twin: .5, runs[2]: .25, runs[3]: .25})
    assert left(twin) == ([twin], {runs[0]: .333, runs[1]: .333, runs[2]: .167, runs[3]: .167})
    assert left(runs[3]) == ([runs[3]], {runs[0]: .25, runs[1]: .25, twin: .25, runs[2]: .25})

# ---- the guard
def one_vote(own_root, no_model, text): # the folder of a vote that is under way
    folder = own_root/'root/models/vote-1'
    folder.mkdir(parents=True, exist_ok=True)
    (folder/'submission.csv').write_text(text)
    write_json(folder/'missing.json', dict(rows=8, no_model=no_model))

def test_only_a_valid_submission_of_a_model_replaces_the_prior(samples, own_root):
    sample, out = find_sample('sample_arena'), own_root/'submission.csv'
    prior_submission(sample, out, dict(model_a=.5, model_b=.3, tie=.2))
    assert check_submission(out, sample, 'preference')
    first, text = out.read_bytes(), sample.read_text()
    one_vote(own_root, 8, text)
    assert take_submission(own_root/'root', sample, out) is None, 'no model has seen a row'
    one_vote(own_root, 3, text.replace('\n', '\n\n', 1).rsplit('\n', 2)[0]+'\n')
    assert take_submission(own_root/'root', sample, out) is None and out.read_bytes() == first, 'a row is missing'
    one_vote(own_root, 3, text)
    assert take_submission(own_root/'root', sample, out)['no_model'] == 3
    assert out.read_bytes() == sample.read_bytes()

@pytest.mark.parametrize('data', [
    b'\xef\xbb\xbfid,winner_model_a,winner_model_b,winner_tie\r\n1,.3,.3,.4\r\n2,.3,.3,.4\r\n',
    b'id,winner_model_a,winner_model_b,winner_tie\n1,.3,.3,.4\n2,.3,.3,.4\n\n',
    b'\xef\xbb\xbf{"id": "x", "questions": [{"answer": ""}]}\n\n'])
def test_a_sample_with_a_byte_order_mark_or_an_empty_line(own_root, data):
    sample = own_root/f"sample_submission.{'csv' if b',winner' in data else 'jsonl'}"
    sample.write_bytes(data)
    out = own_root/f'submission{sample.suffix}'
    prior_submission(sample, out, dict(model_a=.5, model_b=.3, tie=.2))
    assert check_submission(out, sample, 'preference' if sample.suffix == '.csv' else 'choice')
    clean = own_root/f'clean{sample.suffix}'
    clean.write_bytes(data.removeprefix(b'\xef\xbb\xbf').rstrip()+b'\n')
    assert ids_of(clean) == ids_of(sample) == ids_of(out), 'else no submission of the vote would be taken'

def test_the_newest_submission_is_taken(samples, own_root):
    "the folder of an earlier vote lies there too where WORK is used again"
    sample, out = find_sample('sample_arena'), own_root/'submission.csv'
    text = sample.read_text()
    for k, name in enumerate('bca'):
        folder = own_root/f'root/models/vote-{name}'
        folder.mkdir(parents=True)
        (folder/'submission.csv').write_text(text)
        os.utime(folder/'submission.csv', (k, k if name != 'c' else 9))
        write_json(folder/'missing.json', dict(rows=8, no_model=k))
    assert take_submission(own_root/'root', sample, out)['no_model'] == 1

@pytest.mark.parametrize('files, found', [
    (['test.csv', 'train.csv'], 'test.csv'), (['Test.parquet', 'latest.csv', 'a/test.csv'], 'Test.parquet'),
    (['sample_submission_test.csv', 'z/test_rows.jsonl'], 'z/test_rows.jsonl'), (['test.md', 'contest.csv'], None),
    (['a_train_without_test.csv', 'z/test.csv'], 'z/test.csv'), (['._test.csv', '~$test.csv', 'test.csv'], 'test.csv')])
def test_the_test_file_is_found_beside_the_sample(own_root, files, found):
    (own_root/'sample_submission.csv').write_text('id')
    for f in files:
        (own_root/f).parent.mkdir(exist_ok=True)
        (own_root/f).write_text('id')
    assert host_test(own_root/'sample_submission.csv') == (found and own_root/found)

def test_a_vote_that_hangs_ends_at_the_deadline(samples, own_root):
    sample, out = find_sample('sample_arena'), own_root/'submission.csv'
    prior_submission(sample, out, {})
    hangs = own_root/'python'
    hangs.write_text('#!/bin/sh\nsleep 60 & sleep 60\n')
    hangs.chmod(0o755)
    start = time.time()
    lacks, why = guarded_vote(str(hangs), own_root, dict(os.environ), {}, sample, out, start+1.5)
    assert lacks is None and why == 'the deadline came' and time.time()-start < 10
    assert check_submission(out, sample, 'preference')

def run_cells(folder, sample="SAMPLE = ''", package='nowhere', second=None): # the submission notebook; its report
    settings, first, install, third = submission_cells(targets['cpu'])
    given = settings.replace("PACKAGE = ''", f'PACKAGE = {str(package)!r}').replace("SAMPLE = ''", sample)
    (folder/'cells.py').write_text('\n\n'.join([given, first, second or install, third]))
    p = subprocess.run([sys.executable, '-I', '-S', 'cells.py'], cwd=folder, capture_output=True, text=True)
    assert not p.returncode, p.stderr
    return read_json(folder/'missing.json')

def test_a_test_file_that_is_not_there_is_named(runs, own_root, no_wheels):
    "else the vote would fail at a path that is None, and the report say that nothing was installed"
    package, host = bundle(runs[:1], 'cpu', own_root/'package'), own_root/'host'
    host.mkdir()
    shutil.copy(find_sample('sample_arena'), host)
    installed = f'work, python = Path("work"), {sys.executable!r}'
    report = run_cells(host, package=package, second=installed)
    assert report['submission'] == 'the class prior' and report['ended_early'] == 'there is no test file'
    assert len(report['faults']) == 1 and 'no test file beside sample_submission.csv' in report['faults'][0]

def test_the_notebook_needs_nothing_but_python_and_leaves_the_prior(samples, own_root):
    "without a package: each cell notes what is wrong, and the sample becomes the submission"
    sample = find_sample('sample_arena')
    report = run_cells(own_root, f'SAMPLE = {str(sample)!r}')
    assert "OUT = 'submission.jsonl'" in submission_cells(targets['cpu'], 'submission.jsonl')[0]
    assert check_submission(own_root/'submission.csv', sample, 'preference')
    assert report['submission'] == 'the class prior' and any('bundle.json' in fault for fault in report['faults'])

def test_a_file_that_the_notebook_does_not_find_is_named(own_root):
    faults = run_cells(own_root)['faults']
    assert any('no file called' in fault and 'submi' in fault and 'first cell' in fault for fault in faults)

@pytest.mark.parametrize('name', ['sampleSubmission.csv', 'submission_sample.csv'])
def test_the_sample_is_found_by_the_names_that_the_kit_takes(samples, own_root, name):
    "other files of such names are no samples, and a second sample is named"
    host = own_root/'host'
    (host/'z').mkdir(parents=True)
    sample = find_sample('sample_arena').rename(host/name)
    shutil.copy(sample, sample.with_suffix('.csv.zip'))
    def several(report): return [fault for fault in report['faults'] if 'could be meant' in fault]
    (host/'.ipynb_checkpoints').mkdir()
    for hidden in (f'.ipynb_checkpoints/{name}', f'._{name}', f'~${name}'): (host/hidden).write_bytes(b'\0\5\x16\7')
    assert not several(run_cells(host)) and check_submission(host/'submission.csv', sample, 'preference')
    shutil.copy(sample, host/'z')
    assert f'not z/{name}' in several(run_cells(host))[0]

# ---- wheels
def wheel(folder, name, version, requires=()):
    folder.mkdir(exist_ok=True)
    info = f'{name}-{version}.dist-info'
    meta = [f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}', *(f'Requires-Dist: {r}' for r in requires)]
    with zipfile.ZipFile(folder/f'{name}-{version}-py3-none-any.whl', 'w') as z:
        z.writestr(f'{info}/METADATA', '\n'.join(meta)+'\n')
        z.writestr(f'{info}/WHEEL', 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        z.writestr(f'{info}/RECORD', f'{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n')

def test_markers_of_the_target_count():
    lines = ['c; python_version >= "3.12"', 'a-b; python_version >= "3.12"', 'd; python_version < "3.12"',
             'e; extra == "x"']
    found = [dict(metadata=dict(name='A.b', version='1', requires_dist=lines))]
    assert missing_on_target(found, targets['l4x4']) == ['c']

def test_what_only_the_target_needs_is_followed_to_the_end(own_root):
    for k in range(7): wheel(own_root/'wheels', f'w{k}', '1.0', [f'w{k+1}; python_version >= "3.12"']*(k < 6))
    found = resolve(['w0'], targets['l4x4'], own_root/'wheels')
    assert sorted(o['name'] for o in found) == [f'w{k}' for k in range(7)]

def test_an_extra_that_only_the_target_needs_is_followed(own_root):
    wheel(own_root/'wheels', 'a', '1.0', ['b[more]; python_version >= "3.12"'])
    wheel(own_root/'wheels', 'b', '1.0', ['c; extra == "more"\nProvides-Extra: more'])
    wheel(own_root/'wheels', 'c', '1.0')
    assert sorted(o['name'] for o in resolve(['a'], targets['l4x4'], own_root/'wheels')) == ['a', 'b', 'c']

def test_a_bound_of_the_target_alone_holds(own_root):
    wheel(own_root/'wheels', 'a', '1.0', ['b', 'c<2; python_version >= "3.12"'])
    wheel(own_root/'wheels', 'b', '1.0', ['c'])
    for version in ('1.0', '2.0'): wheel(own_root/'wheels', 'c', version)
    found = {o['name']: o['version'] for o in resolve(['a'], targets['l4x4'], own_root/'wheels')}
    assert found == dict(a='1.0', b='1.0', c='1.0')

def test_vllm_is_packed_where_a_vote_would_ask_it():
    letters, writer = (dict(run_id='r', stage='train', params=dict(route=r, dtype='bf16')) for r in ('answer', 'text'))
    def asked(rec, target, **how): return package_engine([rec], how, targets[target])
    assert asked(letters, 'h100') == asked(letters, 'h100', engine='packs') == ('packs', False)
    assert asked(letters, 'l4x4', engine='vllm') == asked(writer, 'h100', engine='auto') == ('auto', True)
    assert asked(writer, 'h100') == ('packs', True)
    for target in ('t4x2', 'cpu'): assert asked(writer, target, engine='vllm') == ('packs', False)
    assert [line for line in needed_packages([letters], True) if line.startswith('vllm==')]
    assert not [line for line in needed_packages([letters]) if 'vllm' in line]

def test_wheels_that_are_not_there_are_named(runs, own_root):
    wheel(own_root/'wheels', 'torch', '2.13.0')
    with pytest.raises(Refusal, match='transformers'): bundle(runs[:1], 'cpu', own_root/'package', own_root/'wheels')
    with pytest.raises(Refusal, match='no such folder'): bundle(runs[:1], 'cpu', own_root/'package', own_root/'gone')
    assert not list(own_root.glob('*package*'))

def test_an_exchanged_wheel_is_not_installed_and_pip_ends_at_the_deadline(own_root):
    import ensurepip
    wheel(own_root/'wheels', 'votes', '1.0')
    bundled = next((Path(ensurepip.__file__).parent/'_bundled').glob('pip-*.whl'))
    shutil.copy(bundled, own_root/'wheels')
    (own_root/'requirements.txt').write_text(f'votes==1.0 --hash=sha256:{"0"*64}\n')
    with pytest.raises(RuntimeError, match='DO NOT MATCH'): install(own_root, own_root/'env')
    with pytest.raises(subprocess.TimeoutExpired): install(own_root, own_root/'env', seconds=0)

# ---- the adapter target
def adapter_with(runs, **fields): # a run whose adapter's configuration has been changed
    file = models_path(runs[0], 'adapter/adapter_config.json')
    write_json(file, read_json(file) | fields)
    return find_run(runs[0])

@pytest.mark.parametrize('fields, what', [
    (dict(r=64), 'rank'), (dict(bias='all'), 'bias'), (dict(use_dora=True), 'dora'),
    (dict(rank_pattern={'q_proj': 64}), 'rank'), (dict(modules_to_save=['score']), 'whole modules'),
    (dict(modules_to_save=['lm_head']), 'modules_to_save')])
def test_what_a_host_does_not_take_is_refused(runs, fields, what):
    with pytest.raises(Refusal, match=what): adapter_config(adapter_with(runs, **fields), 32)

def test_target_modules_become_a_list(runs):
    listed = adapter_config(find_run(runs[0]), 32)['target_modules']
    pattern = adapter_config(adapter_with(runs, target_modules=r'.*\.(q_proj|v_proj)'), 32)['target_modules']
    assert listed == pattern == sorted(listed)

def test_the_zip_has_two_files_and_the_base_is_named(runs, own_root):
    assert main(['bundle', runs[0], '--target', 'adapter', '--out', str(own_root/'zip')]) == 0
    with zipfile.ZipFile(own_root/'zip/submission.zip') as z:
        assert sorted(z.namelist()) == ['adapter_config.json', 'adapter_model.safetensors']
        assert json.loads(z.read('adapter_config.json'))['base_model_name_or_path']
    facts = read_json(own_root/'zip/bundle.json')
    assert facts['base']['hash'] == find_run(runs[0])['base'] and 'submission.zip' in facts['files']
    assert main(['bundle', runs[4], '--target', 'adapter', '--out', str(own_root/'score')]) == 2

@pytest.mark.parametrize('option', [['--there', 'smollm2=/kaggle/input/smollm2'], ['--wheels', 'wheels']])
def test_what_an_adapter_does_not_take_is_refused(runs, own_root, capsys, option):
    assert main(['bundle', runs[0], '--target', 'adapter', '--out', str(own_root/'zip'), *option]) == 2
    assert 'Leave out --there and --wheels' in capsys.readouterr().err and not (own_root/'zip').exists()

def test_an_adapter_package_is_whole_or_absent(runs, own_root, monkeypatch):
    with monkeypatch.context() as m, pytest.raises(ZeroDivisionError):
        m.setattr('competition_kit.bundle.file_list', lambda *a: 1/0)
        bundle(runs[:1], 'adapter', own_root/'zip')
    assert not (own_root/'zip').exists()
    assert bundle(runs[:1], 'adapter', own_root/'zip') == own_root/'zip' and not list(own_root.glob('.zip*'))

def test_the_command_refuses(root, capsys):
    assert main(['bundle', 'x', '--target', 't4']) == 2
    assert main(['bundle', 'x', '--there', 'qwen']) == 2
    assert 'BASE=FOLDER' in capsys.readouterr().err
    assert main('bundle x --there qwen=/a qwen=/b'.split()) == 2 and 'each base once' in capsys.readouterr().err

# ---- the whole package, without a network
@pytest.fixture(scope='module')
def package(tmp_path_factory):
    from bundle import can_go_offline, has_network, vote_of_small_runs
    if not can_go_offline(): pytest.skip('no network namespace can be made here (unshare -rn)')
    assert not has_network()
    home = tmp_path_factory.mktemp('package')
    with root_at(home/'project') as root:
        return bundle([vote_of_small_runs(600)], 'cpu', home/'package'), root/'data/sample_arena/sample_submission.csv'

@pytest.mark.offline
@pytest.mark.parametrize('fault', ['none', 'a model is missing', 'the engine is killed', 'the budget is too short'])
def test_a_valid_submission_lies_there(package, tmp_path, fault):
    from bundle import kill_the_vote, run_notebook, without_a_model
    folder, sample = package
    if fault == 'a model is missing': folder = without_a_model(folder, tmp_path)
    during = kill_the_vote if fault == 'the engine is killed' else None
    report = run_notebook(folder, sample, tmp_path/'run', .2 if fault == 'the budget is too short' else 30, during)
    assert (report['submission'] == 'the class prior') == (fault == 'the budget is too short')
    assert len(report['left_out']) == (fault == 'a model is missing')
    if fault == 'none': assert report['lacks']['finished'] and not report['ended_early'] and not report['faults']
    else: assert report['ended_early'] or report['faults']
    assert report['seconds'] < 300
