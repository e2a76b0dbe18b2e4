"Recipes: strict reading, the graph, running, kills, repetitions. Stages of a second stand in for trainings."
import json, os, resource, signal, subprocess, sys, time
from pathlib import Path
import nbformat, pytest
from competition_kit.core import Refusal, models_path, read_json, write_json
from competition_kit.graph import expand, find_recipe, known_recipes, read_recipe
from competition_kit.jobs import _is_held, plan_of, recipe_folder, run_job
from competition_kit.record import find_run
from competition_kit.recipe import open_recipe, plan_table, repeated, run_recipe

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
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(prose), nbformat.v4.new_code_cell(
        'seed: int = 0  # A number\ntext: str = ""  # Anything\nrate: float = 0.5  # A share'), nbformat.v4.new_code_cell(work)])
    book.cells[1].metadata.tags = ['parameters']
    (root/'nbs').mkdir(exist_ok=True, parents=True)
    nbformat.write(book, root/'nbs/90_work.ipynb')

def write_recipe(root, text, name='three'):
    (root/'recipes').mkdir(exist_ok=True, parents=True)
    (root/f'recipes/{name}.yaml').write_text(text)

def starts(root): return sorted((root/'starts.txt').read_text().split()) if (root/'starts.txt').exists() else []
def words(): return [s.word for s in open_recipe('three').states.values()]

def wait_for(condition, seconds=30):
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
    names = lambda *a, **kw: list(expand(read_recipe('three', *a, **kw)))
    assert names() == ['first/1', 'first/2', 'last']
    assert names('one') == ['first/1', 'last']
    assert names('short') == ['first/1', 'first/2']
    assert names(seeds='[5, 6, 7]') == ['first/5', 'first/6', 'first/7', 'last']
    for scale, values, what in (('two', {}, 'no scale'), ('', dict(sed='1'), "no value 'sed'"),
                                ('', dict(seeds='1'), 'Give a list')):
        with pytest.raises(Refusal, match=what): names(scale, **values)
    assert expand(read_recipe('three', text='007'))['first/1'].args['text'] == '007'

def test_keys_follow_what_a_job_depends_on(three):
    old, new = (expand(read_recipe('three', **v)) for v in ({}, dict(seeds='[1, 5]')))
    assert old['first/1'].key == new['first/1'].key
    assert old['last'].key != new['last'].key
    book = (three/'nbs/90_work.ipynb').read_text()
    (three/'nbs/90_work.ipynb').write_text(book.replace('rate: float = 0.5', 'rate: float = 0.6'))
    assert expand(read_recipe('three'))['first/1'].key != old['first/1'].key

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
    resumed = subprocess.Popen([*CK, 'resume', 'three'], stdout=subprocess.PIPE, text=True)
    wait_for(lambda: _is_held(recipe_folder(read_recipe('three'))/'engine.lock'))
    with pytest.raises(Refusal, match='another ck recipe'): run_recipe('three')
    (three/'hold1').unlink()
    out = resumed.communicate(timeout=60)[0]
    assert resumed.returncode == 0
    assert starts(three) == ['1', '2', '3']
    assert 'accuracy 0.3000 (0.1000)' in out
    assert words() == ['done']*3
    ids = ' '.join(find_run(r['run'])['run_id'] for s in ('1', '2') if (r := open_recipe('three').states[f'first/{s}'].made))
    assert find_run(open_recipe('three').states['last'].made['run'])['params']['text'] == f'of {ids}'
    nothing_to_do(three)

def nothing_to_do(three):
    used = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    before, log = used(), recipe_folder(read_recipe('three'))/'snakemake.log'
    size = log.stat().st_size
    out = subprocess.run([*CK, 'run', 'three'], capture_output=True, text=True, check=True).stdout
    assert 'all 3 jobs are done' in out
    assert used()-before < 2
    assert log.stat().st_size == size

def test_a_failing_job_stops_only_those_after_it(three, capsys):
    (three/'fail1').touch()
    assert run_recipe('three') == 1
    assert words() == ['failed', 'done', 'to run']
    out = capsys.readouterr().out
    assert 'no luck' in out and '1 jobs failed, 1 wait' in out
    (three/'fail1').unlink()
    assert run_recipe('three') == 0
    assert starts(three) == ['1', '1', '2', '3']

def test_a_run_that_was_started_by_hand_is_waited_for(three):
    (three/'hold1').touch()
    by_hand = subprocess.Popen([sys.executable, '-m', 'competition_kit.ck', 'run', 'work', '-p', 'seed', '1', '-p', 'text', 'none'],
                               stdout=subprocess.DEVNULL)
    wait_for(lambda: starts(three) == ['1'])
    p = subprocess.Popen([*CK, 'run', 'three', '--scale', 'one'], stdout=subprocess.DEVNULL)
    log = recipe_folder(read_recipe('three', 'one'))
    wait_for(lambda: any('we wait for it' in f.read_text() for f in log.glob('first-*.log')))
    (three/'hold1').unlink()
    assert by_hand.wait(30) == 0 and p.wait(60) == 0
    assert starts(three) == ['1', '3']

def test_no_value_reaches_a_shell(three):
    nasty = '$(touch pwned); `touch pwned` "\' & > pwned \\n %s'
    assert run_recipe('three', 'one', text=nasty) == 0
    assert not list(three.rglob('pwned'))
    made = open_recipe('three', 'one', text=nasty).states['first/1'].made
    assert find_run(made['run'])['params']['text'] == nasty

# ---- what still stands
@pytest.fixture
def done(three):
    "The recipe without Snakemake: its jobs one after the other"
    folder = recipe_folder(recipe := read_recipe('three'))
    jobs = expand(recipe)
    write_json(folder/'plan.json', plan_of(recipe, jobs))
    for job in jobs.values(): assert run_job(folder/'plan.json', job.key) == 0
    return three

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
    assert run_recipe('three', yes=True) == 0
    assert starts(done) == sorted('123123') and words() == ['done']*3

def test_what_comes_from_outside_counts_by_content(done):
    write_recipe(done, THREE.replace('text: none', 'text: notes.txt'))
    (done/'notes.txt').write_text('a')
    os.utime(done/'notes.txt', (1, 1))
    assert run_recipe('three') == 0
    os.utime(done/'notes.txt')
    assert words() == ['done']*3
    (done/'notes.txt').write_text('b')
    assert words() == ['to run']*3
    assert 'changed: notes.txt' in plan_table(open_recipe('three'))

def test_a_lost_run_is_made_again(done):
    made = open_recipe('three').states['first/2'].made
    models_path(made['run']).rename(models_path('elsewhere'))
    assert words() == ['done', 'to run', 'to run']
