"The profiles `slurm`, `ray` and `kubernetes` on clusters that this machine plays. Stages of a second stand in for work"
import subprocess, time
import pytest
from clusters import KubernetesHere, RayHere, SlurmHere
from competition_kit.core import models_path, root_at
from competition_kit.recipe import open_recipe, run_recipe
from competition_kit.workflow import find_profile
from test_recipe import CK, THREE, WORK, starts, wait_for, words, write_recipe, write_stage

pytestmark = pytest.mark.cluster

@pytest.fixture(scope='module', params=[SlurmHere, RayHere, KubernetesHere], ids=['slurm', 'ray', 'kubernetes'])
def cluster(request):
    here = request.param()
    if lacking := here.lacking(): pytest.skip(f'not installed: {lacking}')
    with here, pytest.MonkeyPatch.context() as patch:
        for k, v in here.env.items(): patch.setenv(k, v)
        yield here

@pytest.fixture
def engine(cluster, root):
    "Starts `ck recipe run` on a recipe of two jobs with a GPU each and one after them"
    gpu = "(project_root()/f'gpu{seed}').write_text(os.environ.get('CUDA_VISIBLE_DEVICES', ''))"
    write_stage(root, f'import os\n{WORK}\n{gpu}')
    write_recipe(root, THREE.replace('stage: work\n', 'stage: work\n    gpus: 1\n'))
    profile = root/f'{cluster.kind}.yaml'
    profile.write_text(find_profile(cluster.kind).read_text().replace('status-checks: 5', 'status-checks: 1'))
    started = []
    def start(*recipe):
        command = [*CK, 'run', *(recipe or ['three']), '--profile', str(profile)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return started[-1]
    yield start
    for p in started: p.kill()
    cluster.stop()

def ended(process, seconds=240): # (exit code, output)
    out = process.communicate(timeout=seconds)[0]
    return process.returncode, out

def hold(root, *seeds):
    for k in seeds: (root/f'hold{k}').touch()

def release(root, *seeds):
    for k in seeds: (root/f'hold{k}').unlink()

def test_jobs_run_on_the_cluster_with_a_gpu_each(engine, cluster, root):
    before = len(cluster.jobs())
    hold(root, 1, 2)
    run = engine()
    wait_for(lambda: starts(root) == ['1', '2'], 120)
    release(root, 1, 2)
    code, out = ended(run)
    assert code == 0, out
    assert words() == ['done']*3
    assert len(cluster.jobs())-before == 3
    one, two, none = ((root/f'gpu{k}').read_text() for k in (1, 2, 3))
    assert one and two and one != two and not none

def test_a_killed_engine_doubles_no_job(engine, cluster, root):
    hold(root, 1, 2)
    first, before = engine(), len(cluster.jobs())
    wait_for(lambda: starts(root) == ['1', '2'], 120)
    first.kill()
    first.wait()
    again = engine()
    time.sleep(12)
    assert starts(root) == ['1', '2'] and len(cluster.jobs())-before == 2
    release(root, 1, 2)
    code, out = ended(again)
    assert code == 0, out
    assert starts(root) == ['1', '2', '3'] and len(cluster.jobs())-before == 3

def test_a_cancelled_job_fails_alone_and_runs_again(engine, cluster, root):
    hold(root, 1)
    run = engine()
    wait_for(lambda: starts(root) == ['1', '2'] and words()[1] == 'done', 120)
    cluster.cancel('first-'+open_recipe('three').jobs['first/1'].key)
    code, out = ended(run)
    assert code == 1, out
    release(root, 1)
    assert words()[1:] == ['done', 'to run']
    code, out = ended(engine())
    assert code == 0, out
    assert starts(root) == ['1', '1', '2', '3']

def test_a_failing_job_stops_only_those_after_it(engine, root):
    (root/'fail1').touch()
    code, out = ended(engine())
    assert code == 1 and 'no luck' in out
    assert words() == ['failed', 'done', 'to run']
    (root/'fail1').unlink()
    assert ended(engine())[0] == 0
    assert starts(root) == ['1', '1', '2', '3']

def test_a_cluster_that_goes_away_for_ten_seconds(engine, cluster, root):
    "before the first job is submitted, and again while one runs"
    hold(root, 1)
    before = len(cluster.jobs())
    with cluster.away(): run = engine()
    wait_for(lambda: starts(root) == ['1', '2'], 120)
    with cluster.away(): release(root, 1)
    code, out = ended(run)
    assert code == 0, out
    assert starts(root) == ['1', '2', '3'] and len(cluster.jobs())-before == 3

def test_an_interrupted_engine_stops_its_jobs(engine, cluster, root):
    hold(root, 1, 2)
    run = engine()
    wait_for(lambda: starts(root) == ['1', '2'], 120)
    run.send_signal(2)
    assert ended(run)[0] != 0
    wait_for(lambda: not cluster.live(), 120)
    wait_for(lambda: 'running' not in words(), 30)

# ---- real stages
REAL = '''recipe: real
about: Two folds on a random base, and their vote
values: {folds: [0, 1]}
jobs:
  split: {stage: split, args: {data: sample_arena, folds: 2}}
  train:
    stage: train
    foreach: {fold: $folds}
    args: {mix: '{split}', fold: $fold, base: BASE, max_len: 160, lora_r: 2, epochs: 0.2, dtype: fp32}
  vote: {stage: vote, args: {data: '{split}', runs: '{train}', views: 1}}
'''

@pytest.fixture(scope='module')
def by_hand(tmp_path_factory, tiny):
    "The submission of the recipe `real` on this machine"
    with root_at(tmp_path_factory.mktemp('local')) as root:
        write_recipe(root, REAL.replace('BASE', str(tiny)), 'real')
        assert run_recipe('real') == 0
        return submission()

def submission(): # of the vote of the recipe `real`
    return models_path(open_recipe('real').states['vote'].made['run'], 'submission.csv').read_bytes()

def test_a_killed_engine_comes_to_the_same_submission(engine, root, tiny, by_hand):
    write_recipe(root, REAL.replace('BASE', str(tiny)), 'real')
    first = engine('real')
    wait_for(lambda: [s.word for s in open_recipe('real').states.values()].count('running') == 2, 240)
    first.kill()
    first.wait()
    code, out = ended(engine('real'), 400)
    assert code == 0, out
    assert submission() == by_hand
    assert len(list(models_path().glob('train-*/record.json'))) == 2
