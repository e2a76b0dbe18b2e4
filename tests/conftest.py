"Every test has a project root of its own; the bases stay where the checkout has them. No network, two threads"
import os, sys
os.environ.update(OMP_WAIT_POLICY='PASSIVE', HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false')
if not os.path.exists('/dev/nvidia0'): os.environ['TORCHDYNAMO_DISABLE'] = '1'  # compiling for a CPU takes long and brings nothing
import pytest
from hypothesis import settings
from competition_kit.core import bases_path, root_at

os.environ['CK_BASES'] = str(bases_path())  # before any test moves the root: smollm2 is made once, for all of them
settings.register_profile('kit', deadline=None, derandomize=True, database=None)
settings.load_profile('kit')

@pytest.fixture(autouse=True)
def own_root(tmp_path):
    "Nothing a test does reaches the data, the models or the workbook of the checkout"
    if torch := sys.modules.get('torch'): torch.set_num_threads(2)
    with root_at(tmp_path) as r: yield r

@pytest.fixture(scope='session')
def smollm2():
    "The folder of the embedded base"
    from competition_kit.base import base_path
    return base_path()

@pytest.fixture(scope='session')
def tok(smollm2):
    "Its tokenizer"
    from competition_kit.base import load_tokenizer
    return load_tokenizer(smollm2)

@pytest.fixture(scope='session')
def tiny(tmp_path_factory):
    "A random base of two layers with the embedded base's tokenizer"
    from competition_kit.base import tiny_base
    return tiny_base(tmp_path_factory.mktemp('tiny'))

@pytest.fixture(scope='session')
def trained(tmp_path_factory, tiny):
    "A root with five finished runs and their ids: two seeds with two folds each, and one with a score head"
    from competition_kit.core import data_path
    from competition_kit.sample import write_arena
    from competition_kit.train import train_fold
    with root_at(tmp_path_factory.mktemp('trained')) as root:
        data_path('sample_arena').mkdir(parents=True)
        write_arena(data_path('sample_arena'), 40, 12, 0)
        kw = dict(base=tiny, max_len=160, lr=1e-2, lora_r=2, dtype='fp32')
        ids = [train_fold(fold=f, seed=s, **kw).id for s in (0, 1) for f in (0, 1)]
        ids.append(train_fold(route='score', **kw).id)
    return root, ids

@pytest.fixture
def runs(trained, own_root):
    "The ids of these runs, copied into the test's own root"
    import shutil
    root, ids = trained
    shutil.copytree(root, own_root, dirs_exist_ok=True)
    return ids

@pytest.fixture(scope='session')
def fitted_baselines(): return {}

@pytest.fixture
def baselines_once(monkeypatch, fitted_baselines):
    "Baselines of the same rows are fitted once for all tests"
    from competition_kit import train as T
    from competition_kit.core import hash_obj
    real = T.baselines
    def once(rows, held, task, left_out=None):
        key = hash_obj([rows.to_json(orient='records'), held.to_json(orient='records'), task])
        if key not in fitted_baselines: fitted_baselines[key] = real(rows, held, task, left_out)
        return fitted_baselines[key]
    monkeypatch.setattr(T, 'baselines', once)
