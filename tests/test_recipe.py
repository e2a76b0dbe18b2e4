"Recipes: strict reading, the graph, running, kills, repetitions. Stages of a second stand in for trainings."
import contextlib, os, re, resource, shutil, subprocess, sys, threading, time
from pathlib import Path
import nbformat, pytest
from competition_kit.ck import main
from competition_kit.core import Refusal, models_path, root_at, sha256, write_json
from competition_kit.graph import Job, expand, find_recipe, known_recipes, read_recipe
from competition_kit.jobs import State, job_file, job_states, plan_of, recipe_folder, run_job
from competition_kit.record import find_run, is_locked, start_run
from competition_kit.recipe import Opened, open_recipe, plan, plan_table, repeated, report, run_recipe

CK = [sys.executable, '-m', 'competition_kit.ck', 'recipe']
WORK = '''import time
from competition_kit.core import project_root
from competition_kit.record import start_run
with start_run('work', dict(seed=seed, text=text), {}, notebook='90_work') as run:
    if not run.done:
        with open(project_root()/'starts.txt', 'a') as f: f.write(f'{seed}\\n')
        while time.sleep(.05) or (project_root()/f'hold{seed}').exists(): pass
        if (project_root()/f'fail{seed}').exists(): raise ValueError('no luck')
        run.finish(dict(accuracy=seed/10, baselines=dict(prior=dict(accuracy=.1))))'''
THREE = '''recipe: three
about: Two jobs and one after them
values: {seeds: [1, 2], text: none}
jobs:
  first:
    stage: work
    foreach: {seed: $seeds}
    args: {seed: $seed, text: $text}
  last: {stage: work, args: {seed: 3, text: 'of {first}'}}
scales:
  one: {values: {seeds: [1]}}
'''

@pytest.fixture
def three(root):
    "A project with the stage `work` and the recipe `three`"
    write_stage(root, WORK)
    write_recipe(root, THREE)
    return root

def write_stage(root, work, prose='# Work'):
    params = 'seed: int = 0  # A number\ntext: str = ""  # Anything\nrate: float = 0.5  # A share'
    code = [nbformat.v4.new_code_cell(c) for c in (params, work)]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(prose), *code])
    book.cells[1].metadata.tags = ['parameters']
    (root/'nbs').mkdir(exist_ok=True, parents=True)
    nbformat.write(book, root/'nbs/90_work.ipynb')

def write_recipe(root, text, name='three'):
    (root/'recipes').mkdir(exist_ok=True, parents=True)
    (root/f'recipes/{name}.yaml').write_text(text)

def starts(root): return sorted((root/'starts.txt').read_text().split()) if (root/'starts.txt').exists() else []
def words(): return [s.word for s in open_recipe('three').states.values()]

def wait_for(condition, seconds=120):
    end = time.time()+seconds
    while not condition():
        assert time.time() < end
        time.sleep(.05)

# ---- reading
@pytest.mark.parametrize('old,new,line,what', [
    ('seed: $seed, text', 'sed: $seed, text', 8, "no argument 'sed'. Did you mean seed"),
    ('seed: $seed, text', 'seed: 1.5, text', 8, 'seed: 1.5 is not int'),
    ('seed: $seed, text', 'seed: yes, text', 8, 'seed: True is not int'),
    ('seed: $seed, text', 'seed: $sead, text', 8, r'\$sead is no value'),
    ('seed: 3', "seed: '{first}'", 9, 'seed is no text'),
    ('{first}', '{frist}', 9, 'refers to no job. Did you mean {first}'),
    ('{first}', '{last}', 9, 'wait for each other'),
    ('{first}', '{first[seed]}', 9, 'seed is not a variable of both'),
    ('stage: work\n', 'stage: works\n', 6, "no notebook 'works'"),
    ('stage: work\n', 'stage: ../work\n', 6, 'not a name of a stage'),
    ('    stage: work\n', '    stage: work\n    stage: work\n', 7, "the key 'stage' stands here and in line 6"),
    ('    stage: work\n', '    stag: work\n', 6, "unknown key 'stag'. Did you mean stage"),
    ('  first:', '  First:', 5, "'First' is not a name for a job"),
    ('$seeds}', '[1, 1]}', 7, 'different texts or numbers'),
    ('$seeds}', '[]}', 7, 'different texts or numbers'),
    ('{seed: $seeds}', '{text: $seeds}', 7, 'no value'),
    ('seed: $seed, text', 'seed: 7, text', 5, 'first/1 and first/2 have the same arguments'),
    ('seeds: [1]', 'sedes: [1]', 11, "no value 'sedes'"),
    ('one: {values', 'one: {valeus', 11, "unknown key 'valeus'"),
    ('{stage: work, args: {seed: 3', '{stage: work, size: {rows: many}, args: {seed: 3', 9, "rows: 'many'"),
    ('about: Two', 'about: &x Two', 2, 'anchors'),
    ('about: Two', 'about: !!python/object:os.x Two', 2, 'tags'),
    ('[1, 2]', '[1, 2', 3, 'not YAML'),
    ('[1, 2]', '[1, .nan]', 3, 'nan is no number'),
    ('[1, 2]', '2024-01-01', 3, 'Write it in quotes')])
def test_a_fault_is_refused_with_its_line(three, old, new, line, what):
    assert old in THREE
    write_recipe(three, THREE.replace(old, new))
    if what is None:
        expand(read_recipe('three', 'one'))
        return
    with pytest.raises(Refusal, match=what) as e: expand(read_recipe('three'))
    assert f'three.yaml:{line}:' in str(e.value)
    assert not models_path('.recipes').exists()

def test_two_jobs_may_not_write_one_table(three):
    text = THREE.replace('  last:', '  a: {stage: split}\n  b: {stage: split, args: {seed: 1}}\n  last:')
    write_recipe(three, text)
    with pytest.raises(Refusal, match='a and b write the same table'): expand(read_recipe('three'))

def test_scales_and_values(three):
    write_recipe(three, THREE+'  short: {jobs: {last: null}}\n')
    def names(*a, **kw): return list(expand(read_recipe('three', *a, **kw)))
    assert names() == ['first/1', 'first/2', 'last']
    assert names('one') == ['first/1', 'last']
    assert names('short') == ['first/1', 'first/2']
    assert names(seeds='[5, 6, 7]') == ['first/5', 'first/6', 'first/7', 'last']
    for scale, values, what in (('two', {}, 'no scale'), ('', dict(sed='1'), "no value 'sed'"),
                                ('', dict(seeds='1'), 'Give a list')):
        with pytest.raises(Refusal, match=what): names(scale, **values)
    assert expand(read_recipe('three', text='007'))['first/1'].args['text'] == '007'

@pytest.mark.parametrize('given, rate', [('2e-4', 2e-4), ('1E-3', 1e-3), ('1', 1.), ('5.0e-5', 5e-5)])
def test_a_set_number_may_be_written_as_usual(three, given, rate):
    text = THREE.replace('text: none}', 'text: none, rate: 1.0e-4}').replace('seed: 3,', 'seed: 3, rate: $rate,')
    write_recipe(three, text)
    assert expand(read_recipe('three', rate=given))['last'].args['rate'] == rate
    with pytest.raises(Refusal, match='--set rate=high.*Give a float'): read_recipe('three', rate='high')

@pytest.mark.parametrize('words, what', [('run three --cores -1', '--cores is -1. Give 0 or more'),
    ('plan three --set text=a --set text=b', '--set text is given twice'),
    ('resume', 'ck: a recipe was not started yet'), ('resume three --scale one', 'three at the scale one was not'),
    ('from-log two.yaml', "'two.yaml' is not a name for a recipe")])
def test_wrong_words_are_refused(three, capsys, words, what):
    from competition_kit.log import plan_runs
    plan_runs([dict(stage='work', params=dict(seed=7))])
    assert main(f'recipe {words}'.split()) == 2 and what in capsys.readouterr().err
    assert not starts(three) and not list((three/'recipes').glob('two*'))

def test_no_instance_is_lost_because_of_its_name(three):
    text = THREE.replace('foreach: {seed: $seeds}', "foreach: {a: [x, x/y], b: [y/z, z]}").replace(
        'seed: $seed, text: $text', 'text: $a $b')
    write_recipe(three, text)
    with pytest.raises(Refusal, match='yaml:5: two instances have the name first/x/y/z'):
        expand(read_recipe('three'))

def test_keys_follow_what_a_job_depends_on(three):
    old, new = (expand(read_recipe('three', **v)) for v in ({}, dict(seeds='[1, 5]')))
    assert old['first/1'].key == new['first/1'].key
    assert old['last'].key != new['last'].key

@pytest.mark.parametrize('file', sorted(p.name for p in (Path(__file__).parents[1]/'recipes').glob('*.yaml')))
def test_every_recipe_of_the_kit_can_be_read(root, file):
    name = file.removesuffix('.yaml')
    scales = read_recipe(name, '')
    assert expand(scales)
    assert name in known_recipes() and find_recipe(name).name == file

def test_a_plan_needs_no_network_and_no_torch(three):
    code = '''import socket, sys
def never(*a): raise OSError('the network was asked')
socket.socket.connect = never
from competition_kit.ck import main
assert main(['recipe', 'plan', 'three']) == 0
print(*sorted({'torch', 'transformers', 'pandas', 'snakemake'} & set(sys.modules)), 'loaded')'''
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    assert '3 jobs: 3 to run' in out
    assert out.splitlines()[-1] == 'loaded'

# ---- running
def test_kill_the_engine_and_resume(three):
    "The running job goes on without its engine; it is waited for, not started again"
    (three/'hold1').touch()
    p = subprocess.Popen([*CK, 'run', 'three', '--cores', '2'], stdout=subprocess.DEVNULL)
    wait_for(lambda: starts(three) == ['1', '2'])
    wait_for(lambda: 'done' in words())
    p.kill()
    p.wait()
    assert words() == ['running', 'done', 'to run']
    resumed = subprocess.Popen([*CK, 'resume'], stdout=subprocess.PIPE, text=True)
    wait_for(lambda: is_locked(recipe_folder(read_recipe('three'))/'engine.lock'))
    with pytest.raises(Refusal, match='another ck recipe'): run_recipe('three')
    (three/'hold1').unlink()
    out = resumed.communicate(timeout=60)[0]
    assert resumed.returncode == 0
    assert starts(three) == ['1', '2', '3']
    assert 'accuracy 0.3000 (0.1000)' in out
    assert words() == ['done']*3
    made = [s.made['run'] for s in open_recipe('three').states.values()]
    assert find_run(made[2])['params']['text'] == f'of {made[0]} {made[1]}'
    nothing_to_do(three)

def nothing_to_do(three):
    def used(): return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    before, log = used(), recipe_folder(read_recipe('three'))/'snakemake.log'
    size = log.stat().st_size
    out = subprocess.run([*CK, 'run', 'three'], capture_output=True, text=True, check=True).stdout
    assert 'all 3 jobs are done' in out
    assert used()-before < 2
    assert log.stat().st_size == size

def test_resume_repeats_the_last_start(three, monkeypatch):
    started = []
    def work(opened, left, profile, cores): started.append((profile, cores, opened.recipe['values']['text']))
    monkeypatch.setattr('competition_kit.recipe._work', work)
    monkeypatch.chdir(three)
    Path('mine.yaml').write_text('jobs: 9\nexecutor: cluster-generic\n')
    main('recipe run three --profile mine.yaml --cores 3 --set text=other'.split())
    main('recipe resume recipes/three.yaml'.split())
    main('recipe resume three --profile local --cores 1'.split())
    assert started == [(str(three/'mine.yaml'), 3, 'other')]*2+[('local', 1, 'other')]

@pytest.mark.parametrize('profile, has', [('executor: local', '3 jobs to run, 2 at once;'),
                                          ('executor: other', '3 jobs to run;')])
def test_the_number_of_jobs_at_once_is_that_of_this_machine(three, monkeypatch, capsys, profile, has):
    monkeypatch.setattr('competition_kit.recipe.follow', lambda *a: ([], []))
    monkeypatch.setattr('competition_kit.recipe.snakemake', lambda *a, **kw: contextlib.nullcontext())
    (three/'mine.yaml').write_text(profile)
    run_recipe('three', profile=three/'mine.yaml', cores=2)
    assert has in capsys.readouterr().out

def test_a_cluster_needs_the_plugin_of_snakemake(three, monkeypatch):
    from importlib import util
    real, name = util.find_spec, 'snakemake_executor_plugin_cluster_generic'
    monkeypatch.setattr(util, 'find_spec', lambda n, *a: None if n == name else real(n, *a))
    for profile in ('slurm', 'ray', 'kubernetes'):
        with pytest.raises(Refusal, match=f'{name} is not installed'): run_recipe('three', profile=profile)
    assert not starts(three)

def test_slurm_is_asked_for_no_memory_but_that_of_the_profile(three, monkeypatch):
    "Snakemake would ask for 1,000 MB, and Slurm would kill a training at them"
    pytest.importorskip('snakemake_executor_plugin_cluster_generic')
    write_recipe(three, THREE.replace('text: $text}', 'text: $text}\n    gpus: 2'))
    (three/'bin').mkdir()
    for name, line in dict(sbatch=f'echo "$*" >>{three}/options; exit 1', squeue='').items():
        (three/'bin'/name).write_text(f'#!/bin/sh\n{line}\n')
        (three/'bin'/name).chmod(0o755)
    monkeypatch.setenv('PATH', f"{three/'bin'}:{os.environ['PATH']}")
    assert run_recipe('three', profile='slurm') == 1
    first, *_ = (three/'options').read_text().splitlines()
    assert '--gpus=2' in first and '--cpus-per-task=2' in first and '--mem' not in first

NASTY = '$(touch pwned); `touch pwned` "\' & > pwned \\n %s'
def test_a_failing_job_stops_only_those_after_it(three, capsys):
    "and no value reaches a shell"
    (three/'fail1').touch()
    assert run_recipe('three', values=dict(text=NASTY)) == 1
    states = open_recipe('three', values=dict(text=NASTY)).states
    assert [s.word for s in states.values()] == ['failed', 'done', 'to run']
    assert find_run(states['first/2'].made['run'])['params']['text'] == NASTY
    assert not list(three.rglob('pwned'))
    out = capsys.readouterr().out
    assert 'no luck' in out and '1 jobs failed, 1 wait' in out
    (three/'fail1').unlink()
    assert run_recipe('three', values=dict(text=NASTY)) == 0
    assert starts(three) == ['1', '1', '2', '3']

def test_a_run_that_was_started_by_hand_is_waited_for(three):
    (three/'hold1').touch()
    command = [sys.executable, '-m', 'competition_kit.ck', 'run', 'work', '-p', 'seed', '1', '-p', 'text', 'none']
    by_hand = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    wait_for(lambda: starts(three) == ['1'])
    folder, job = planned()
    p = subprocess.Popen([sys.executable, '-m', 'competition_kit.jobs', folder/'plan.json', job.key])
    log = folder/f'first-{job.key}.log'
    wait_for(lambda: log.exists() and 'we wait for it' in log.read_text())
    (three/'hold1').unlink()
    assert by_hand.wait(60) == 0 and p.wait(60) == 0
    assert starts(three) == ['1']

def planned():
    "The folder of the recipe with its plan, and the first job"
    folder, jobs = recipe_folder(recipe := read_recipe('three')), expand(recipe)
    write_json(folder/'plan.json', plan_of(recipe, jobs))
    return folder, jobs['first/1']

# ---- what still stands
@pytest.fixture(scope='session')
def done_once(tmp_path_factory):
    "A root in which the recipe is done, without Snakemake: its jobs one after the other"
    with root_at(tmp_path_factory.mktemp('done')) as root:
        write_stage(root, WORK)
        write_recipe(root, THREE)
        folder = planned()[0]
        for job in expand(read_recipe('three')).values(): assert run_job(folder/'plan.json', job.key) == 0
    return root

@pytest.fixture
def done(done_once, root):
    shutil.copytree(done_once, root, dirs_exist_ok=True)
    return root

def test_prose_repeats_nothing_and_code_asks(done, monkeypatch):
    write_stage(done, WORK, '# Other prose')
    assert words() == ['done']*3
    write_stage(done, WORK+'\nprint(run)')
    assert words() == ['changed code']*3
    assert run_recipe('three', as_is=True) == 0
    assert words() == ['done']*3 and starts(done) == ['1', '2', '3']
    write_stage(done, WORK+'\nprint(run.id)')
    monkeypatch.setattr('competition_kit.recipe.repeated', lambda opened: (list(opened.jobs), 2.))
    with pytest.raises(Refusal, match='2.0 GPU-hours would be repeated.*--yes'): run_recipe('three')
    assert starts(done) == ['1', '2', '3']

def test_the_hours_after_changed_code_count(root):
    "a split of another result repeats the trainings after it"
    jobs = {n: Job(n, n, 'work', {}, {}, needs, gpus) for n, needs, gpus in
            [('split', (), 0), ('train', ('split',), 8), ('vote', ('train',), 1), ('other', (), 8)]}
    recs = {n: dict(minutes=m) for n, m in dict(split=1, train=600, other=60).items()}
    words = dict(split='changed code', train='to run', vote='to run', other='done')
    opened = Opened({}, jobs, root, {n: State(word, '', {}, recs.get(n)) for n, word in words.items()})
    assert repeated(opened) == (['split'], 80)

def test_a_changed_default_asks_and_a_new_argument_does_not(done):
    book = (done/'nbs/90_work.ipynb').read_text()
    (done/'nbs/90_work.ipynb').write_text(book.replace('# A share', '# A share\\nmore: int = 1'))
    assert words() == ['done']*3
    (done/'nbs/90_work.ipynb').write_text(book.replace('rate: float = 0.5', 'rate: float = 0.6'))
    assert words() == ['changed code']*3
    assert 'default of rate in 90_work' in plan_table(open_recipe('three'))

def test_what_comes_from_outside_counts_by_content(done):
    write_recipe(done, THREE.replace('text: none', 'text: notes.txt').replace('of {first}', 'alone'))
    (done/'notes.txt').write_text('a')
    os.utime(done/'notes.txt', (1, 1))
    folder = planned()[0]
    for job in expand(read_recipe('three')).values(): assert run_job(folder/'plan.json', job.key) == 0
    os.utime(done/'notes.txt')
    assert words() == ['done']*3
    (done/'notes.txt').write_text('b')
    assert words() == ['to run', 'to run', 'done']
    assert 'changed: notes.txt' in plan_table(open_recipe('three'))

@pytest.mark.parametrize('file, old, new, why', [('notes.txt', 'a', 'b', 'changed: notes.txt'),
    ('nbs/90_work.ipynb', 'rate: float = 0.5', 'rate: float = 0.6', 'default of rate')])
def test_what_changes_during_a_job_is_newer_than_its_result(three, file, old, new, why):
    write_recipe(three, THREE.replace('text: none', 'text: notes.txt'))
    (three/'notes.txt').write_text('a')
    (three/'hold1').touch()
    folder, job = planned()
    p = subprocess.Popen([sys.executable, '-m', 'competition_kit.jobs', folder/'plan.json', job.key])
    wait_for(lambda: starts(three) == ['1'])
    (three/file).write_text((three/file).read_text().replace(old, new))
    (three/'hold1').unlink()
    assert p.wait(60) == 0
    assert words()[0] != 'done' and why in plan_table(open_recipe('three'))

def test_a_file_may_have_any_name(root):
    from competition_kit.jobs import outside
    args = "{corrections: 'data/my list (2).csv', data: '%s'}" % ('a b '*99)
    job = jobs_of(f'recipe: v\njobs: {{split: {{stage: split, args: {args}}}}}', root)['split']
    assert not outside(job)
    (root/'data').mkdir(exist_ok=True)
    (root/'data/my list (2).csv').write_text('id')
    assert list(outside(job)) == ['data/my list (2).csv']

def test_a_base_in_a_folder_counts_by_content(root):
    from competition_kit.jobs import outside
    job = jobs_of('recipe: v\njobs: {train: {stage: train, args: {mix: sample_arena, base: mine}}}', root)['train']
    before = outside(job)
    (root/'mine').mkdir()
    (root/'mine/config.json').write_text('{}')
    (root/'mine/model.safetensors').write_text('first')
    first = outside(job)
    (root/'mine/model.safetensors').write_text('second')
    assert len({str(x) for x in (before, first, outside(job))}) == 3

def test_a_job_refuses_the_table_of_another_recipe(three):
    "two recipes write one table under one name, at the same time"
    write_recipe(three, '''recipe: three
jobs:
  table: {stage: pseudo, args: {name: x, data: y}}
  last: {stage: work, args: {seed: 3, text: '{table}:9'}}''')
    folder, jobs = recipe_folder(recipe := read_recipe('three')), expand(read_recipe('three'))
    write_json(folder/'plan.json', plan_of(recipe, jobs))
    with start_run('pseudo', dict(name='x', data='y'), {}) as run:
        (run.folder/'rows.parquet').write_text('ours')
        run.finish({}, ['rows.parquet'])
    write_json(job_file(folder, jobs['table']), dict(run=run.id, yields='x'))
    (three/'data').mkdir()
    (three/'data/x.parquet').write_text('theirs')
    with pytest.raises(Refusal, match='three, table: the table x is not the one that the run wrote. Resume'):
        run_job(folder/'plan.json', jobs['last'].key)
    assert not starts(three)
    (three/'data/x.parquet').write_text('ours')
    assert run_job(folder/'plan.json', jobs['last'].key) == 0
    assert find_run('work')['params']['text'] == 'x:9'

def test_two_who_look_do_not_take_each_other_for_a_job(done):
    "`ck recipe plan` beside `ck recipe run`: a lock that one only looks at must not be held for the other"
    opened, looking = open_recipe('three'), threading.Event()
    def look():
        while not looking.is_set(): job_states(opened.jobs, opened.folder)
    other = threading.Thread(target=look)
    other.start()
    try: seen = {w for _ in range(100) for w in words()}
    finally: looking.set()
    other.join()
    assert seen == {'done'}

def test_both_tables_of_a_split_count(root):
    "by hand, somebody has split the same training file with another test file"
    from competition_kit.jobs import _table_fault
    (root/'data').mkdir()
    outputs = {}
    for end, file in (('', 'rows.parquet'), ('_test', 'test.parquet')):
        (root/f'data/mine{end}.parquet').write_text(file)
        outputs[file] = sha256(root/f'data/mine{end}.parquet')
    assert _table_fault('mine', dict(outputs=outputs)) == ''
    (root/'data/mine_test.parquet').write_text('other')
    assert _table_fault('mine', dict(outputs=outputs)) == 'the table mine_test is not the one that the run wrote'
    (root/'data/mine_test.parquet').unlink()
    assert _table_fault('mine', dict(outputs=outputs)) == 'the table mine_test is gone'
    assert _table_fault('mine', dict(outputs={'rows.parquet': outputs['rows.parquet']})) == ''

def test_a_lost_run_is_made_again(done):
    made = open_recipe('three').states['first/2'].made
    models_path(made['run']).rename(models_path('elsewhere'))
    assert words() == ['done', 'to run', 'to run']

# ---- cost, report, workbook
SIZED = """recipe: sized
jobs:
  split: {stage: split, args: {data: lmsys}, size: {rows: 500000, lengths: lmsys}}
  train: {stage: train, foreach: {fold: [0, 1]}, args: {mix: '{split}', fold: $fold, base: qwen2.5-7b}, gpus: 1}
  odd: {stage: train, args: {mix: '{split}', base: nobody/knows, fold: 2}, gpus: 1}
"""
def test_a_plan_predicts_what_it_can(root, capsys):
    write_recipe(root, SIZED, 'sized')
    assert plan('sized', gpu='H200', gpus=2) == 0
    out = capsys.readouterr().out
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    assert '~' in lines['train/0'] and '~' not in lines['odd']
    assert 'predicted on 2 x H200' in out and 'not in the cost model: odd' in out
    plan('sized', gpu='H200', gpus=1)
    hours = [float(text.split('H200: ')[1].split(' h')[0]) for text in (out, capsys.readouterr().out)]
    assert hours[1] == pytest.approx(2*hours[0], rel=.1)

def test_a_wrong_gpu_is_no_cheap_plan(root, capsys):
    write_recipe(root, SIZED, 'sized')
    assert main('recipe plan sized --gpu H2000'.split()) == 2
    assert "no GPU named 'H2000'. Take one of" in capsys.readouterr().err

@pytest.mark.parametrize('job, why', [
    ('{stage: vote, size: {rows: 9}, gpus: 1}', 'its runs are not jobs of the recipe'),
    ("{stage: vote, size: {rows: 9}, args: {runs: 'train-f0-1'}, gpus: 1}", 'its runs are not jobs of the recipe'),
    ("{stage: gptq, args: {start: 'train-f0-1'}, gpus: 1}", "no run 'train-f0-1'"),
    ("{stage: merge, args: {members: 'train-f0-1 train-f1-2'}, gpus: 1}", "no run 'train-f0-1'"),
    ('{stage: pairs, gpus: 1}', 'no writers in the recipe'),
    ("{stage: train, size: {rows: 9}, args: {mix: '{cut}', route: text}, gpus: 1}", 'no size of cut in the recipe')])
def test_a_plan_says_why_it_cannot_predict_a_job(root, capsys, job, why):
    write_recipe(root, f'recipe: odd\njobs: {{cut: {{stage: split}}, odd: {job}}}', 'odd')
    assert plan('odd', gpu='H200', gpus=1) == 0
    out = capsys.readouterr().out
    assert why in out and 'not in the cost model: odd' in out

def test_the_base_of_a_named_run_is_that_of_its_record(root):
    from competition_kit.estimate import base_of_job
    from competition_kit.record import start_run
    for stage, more in (('train', {}), ('gptq', dict(model=dict(base='qwen2.5-14b')))):
        with start_run(stage, dict(base='qwen2.5-7b', start=''), {}) as run: run.finish({}, **more)
        job = jobs_of(f'recipe: v\njobs: {{v: {{stage: gptq, args: {{start: {run.id}}}}}}}', root)['v']
        assert base_of_job(job, {}) == (more.get('model') or run.record['params'])['base']

def test_a_plan_has_the_gpus_of_each_job(root, capsys):
    write_recipe(root, SIZED.replace('gpus: 1', 'gpus: $gpus').replace('jobs:', 'values: {gpus: 16}\njobs:'), 'sized')
    assert main('recipe plan sized'.split()) == 0
    assert 'predicted on 16 x' in capsys.readouterr().out
    assert main('recipe plan sized --gpus 8'.split()) == 2
    assert 'train/0 takes 16 GPUs, and the plan has 8. Give --gpus 16' in capsys.readouterr().err
    assert main('recipe plan sized --gpus 8 --set gpus=2'.split()) == 0
    assert 'predicted on 8 x' in capsys.readouterr().out

@pytest.mark.parametrize('name', ['logic_reflect', 'arena_pseudo'])  # a mixture of experts; three writers of pairs
def test_a_plan_at_the_published_size_lacks_nothing(root, capsys, name):
    assert plan(name, 'seed', 'H200', 8) == 0
    out = capsys.readouterr().out
    assert 'predicted on 8 x H200' in out and 'not in the cost model' not in out

def test_the_report_needs_no_network(done, capsys):
    assert report() == 0
    page = Path(capsys.readouterr().out.strip()).read_text()
    assert '3 of 3 jobs done' in page and '0.3000' in page and '(0.1000)' in page
    assert not re.search('(src|href)="(?!data:)|url\\(|@import', page)

def test_planned_rows_are_a_recipe_and_back(three, capsys):
    from competition_kit.log import plan_runs, planned
    plan_runs([dict(stage='work', params=dict(seed=s, text='a, "b" = c')) for s in (7, 8)])
    assert main(['recipe', 'from-log', 'typed']) == 0
    jobs = expand(read_recipe('typed'))
    assert [(j.args['seed'], j.args['text']) for j in jobs.values()] == [(7, 'a, "b" = c'), (8, 'a, "b" = c')]
    assert main(['recipe', 'from-log', 'typed']) == 2
    assert main(['recipe', 'to-log', 'three']) == 0
    assert [p['params'] for p in planned()[2:]] == [dict(seed=1, text='none'), dict(seed=2, text='none')]
    assert '2 planned rows added' in capsys.readouterr().out
    assert main(['recipe', 'to-log', 'typed']) == 0
    assert len(planned()) == 4

@pytest.mark.parametrize('plan, what', [(dict(stage='work', params=dict(sed=1)), "unknown parameter 'sed'"),
    (dict(stage='work', params=dict(seed='x')), "'x' is not int"),
    (dict(stage='wrok', params={}), "no notebook 'wrok'")])
def test_a_wrong_planned_row_is_named(three, plan, what):
    from competition_kit.log import plan_runs
    from competition_kit.planning import write_recipe
    plan_runs([dict(stage='work', params=dict(seed=7)), plan])
    with pytest.raises(Refusal, match=f'sheet runs, row 3: .*{what}'): write_recipe('typed')
    assert not (three/'recipes/typed.yaml').exists()

def test_marks_in_the_workbook_ask_for_the_vote_again(root, monkeypatch):
    from competition_kit import jobs
    vote = jobs_of("recipe: v\njobs: {vote: {stage: vote, args: {data: sample_logic}}}", root)['vote']
    before = jobs.outside(vote)
    monkeypatch.setattr(jobs, 'people', lambda: {'train-f0-0000000000': dict(keep=True, vote_weight=None)})
    assert jobs.outside(vote) != before

def jobs_of(text, root):
    write_recipe(root, text, 'v')
    return expand(read_recipe('v'))
