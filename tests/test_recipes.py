"""The recipes of the winning systems: every scale is read and planned without a network, and systems run from raw rows
to a checked submission. Here the jobs run one after the other in this process, over one to three layers of SmolLM2 and
some dozens of rows. CK_SLOW=1 runs them at scale `tiny` through `ck recipe run` too, some ten minutes each."""
import os, socket, subprocess, sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
import pytest
from competition_kit.core import Refusal, data_path, models_path
from competition_kit.estimate import estimate
from competition_kit.graph import expand, known_recipes, read_recipe, read_yaml, table_stages
from competition_kit.jobs import yielded
from competition_kit.record import run_stage
from competition_kit.tables import load_rows, publish, write_rows

FOLDER = Path(__file__).resolve().parents[1]/'recipes'
FILES = sorted(p.stem for p in FOLDER.glob('*.yaml'))
SCALES = [(name, scale) for name in FILES for scale in ('', *read_yaml(FOLDER/f'{name}.yaml').get('scales', ()))]
SMALL = dict(  # values of the scale `tiny` for every change: all six take three minutes of a core
    arena_distill=dict(teachers=['smollm2-2'], student='smollm2-1', rows=':24', student_epochs=.5, len=160),
    arena_answer_distill=dict(folds=[0], teachers=['smollm2-2', 'smollm2-1'], student='smollm2-1', rows=':24',
                              epochs=.5, len=160, warm_len=160),
    logic_vote=dict(base='smollm2-1', kept=['$data@0.8 + round1'], epochs=.2),
    logic_reflect=dict(deepseek='smollm2-1', llama='smollm2-1', student='smollm2-1', rows=':3', retries=1, given=0,
                       new=16, again=0, every=8, calibration=16),
    arena_pseudo=dict(labellers=['smollm2-1'], models=['smollm2-2', 'smollm2-1'], writers='smollm2-3 smollm2-2',
                      rows=':24', len=160, rounds='4', new=8),
    wsdm_first=dict(folds=[0, 1], teacher='smollm2-2', student='smollm2-1', rows=':24', len=160, teacher_len=160))


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*a, **kw): raise AssertionError('a recipe is planned without a network')
    monkeypatch.setattr(socket.socket, 'connect', refuse)


@pytest.mark.parametrize('name, scale', SCALES)
def test_every_scale_is_planned(name, scale, no_network):
    jobs = expand(read_recipe(FOLDER/f'{name}.yaml', scale))
    assert list(jobs.values())[-1].stage == 'vote'
    if scale == 'tiny': assert not any(job.gpus for job in jobs.values())


def test_the_seven_recipes_are_known():
    assert set(FILES) == {*SMALL, 'quickstart'} and set(FILES) <= set(known_recipes())


def test_only_the_teachers_of_wsdm_first_see_the_names_of_the_models():
    jobs = expand(read_recipe(FOLDER/'wsdm_first.yaml', 'seed'))
    assert {j.stage for j in jobs.values() if j.args.get('model_names')} == {'train'}
    assert all(j.args['model_names'] for j in jobs.values() if j.step == 'teacher')


def test_a_plan_counts_texts_and_bits():
    recipes = {n: expand(read_recipe(FOLDER/f'{n}.yaml', 'seed')) for n in ('logic_reflect', 'logic_vote')}
    texts, letters = (estimate(jobs['vote'], jobs, 'H200') for jobs in recipes.values())
    assert letters['memory_gb'] < 32  # a base in four bits: 66 in sixteen
    assert texts['hours']/2 > letters['hours']/9  # of a model
    student = recipes['logic_reflect']['student/by_llama']
    scored = estimate(student, recipes['logic_reflect'], 'H200')['hours']
    fewer = replace(student, args=student.args | dict(score_every=20))
    assert scored > estimate(fewer, recipes['logic_reflect'], 'H200')['hours']


def run_here(name, **values): # Record of each job, by its name
    recipe, records = read_recipe(FOLDER/f'{name}.yaml', 'tiny', **values), {}
    def text(part): return part if isinstance(part, str) else ' '.join(yielded(records[n]) for n in part)
    for job in expand(recipe).values():
        args = job.args | {k: ''.join(map(text, parts)) for k, parts in job.links.items()}
        module = import_module(f'competition_kit.{job.stage}')
        work = getattr(module, 'make_split' if job.stage == 'split' else job.stage)
        stage_args = getattr(module, f'{job.stage.capitalize()}Args')(**args)
        try: run = run_stage(work, stage_args)
        except Refusal:
            if job.stage != 'generate': raise
            records[job.name] = plant(args)
            continue
        records[job.name] = run.record
        if job.stage in table_stages: publish(run.folder, yielded(run.record))
    return records


def plant(args): # rationales where so small a model wrote none that is right, and the record of their writer
    rows = load_rows('sample_logic:8', seed=len(args['name'])).drop(columns=['main', 'phase'])
    texts = [f'<thinking>Thus.</thinking><output>{"ABCDEFG"[k]}</output>' for k in rows.label]
    write_rows(rows.assign(rationale=texts, given=False, pass_rate=0.), data_path(f"{args['name']}.parquet"))
    return dict(stage='generate', status='done', params=args)


@pytest.mark.parametrize('name', SMALL)
@pytest.mark.usefixtures('baselines_once', 'samples')
def test_a_system_runs_to_its_submission(name):
    records = run_here(name, **SMALL[name])
    vote = records['vote']
    assert {r['status'] for r in records.values()} == {'done'}
    assert 0 <= vote['metrics']['practice_accuracy'] <= 1
    assert (models_path().parent/vote['submission']).is_file()


@pytest.mark.skipif('CK_SLOW' not in os.environ, reason='some ten minutes each: CK_SLOW=1')
@pytest.mark.parametrize('name', SMALL)
def test_a_system_runs_at_its_tiny_scale(name):
    command = [sys.executable, '-m', 'competition_kit.ck', 'recipe', 'run', name, '--scale', 'tiny']
    assert subprocess.run(command).returncode == 0
