"Every test has a project root of its own; the bases stay where the checkout has them. No network, one thread"
import gc, os, sys
os.environ.update(OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE', HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false')
if not os.path.exists('/dev/nvidia0'): os.environ['TORCHDYNAMO_DISABLE'] = '1'  # for a CPU it takes long
import shutil
import pytest
from hypothesis import settings
from competition_kit.core import bases_path, root_at

os.environ['CK_BASES'] = str(bases_path())  # before any test moves the root: smollm2 is made once, for all of them
settings.register_profile('kit', deadline=None, derandomize=True, database=None)
settings.load_profile('kit')

def pytest_collection_finish():
    "What is imported now stays: the collector, which every training calls, need not look at it"
    gc.freeze()

@pytest.fixture(autouse=True)
def own_root(tmp_path):
    "Nothing a test does reaches the data, the models or the workbook of the checkout"
    if torch := sys.modules.get('torch'): torch.set_num_threads(1)
    with root_at(tmp_path) as r: yield r

@pytest.fixture
def root(tmp_path):
    "A project root with room beside it"
    with root_at(tmp_path/'project') as r: yield r

@pytest.fixture(scope='session')
def sample_tables(tmp_path_factory):
    "A root in which the tables of both samples are made"
    from competition_kit.tables import load_rows
    with root_at(tmp_path_factory.mktemp('samples')) as root:
        for name in ('sample_arena', 'sample_logic'): load_rows(name)
    return root

@pytest.fixture
def samples(sample_tables, own_root):
    "These tables, copied into the test's own root"
    shutil.copytree(sample_tables, own_root, dirs_exist_ok=True)

@pytest.fixture(scope='session')
def smollm2():
    "The folder of the embedded base"
    from competition_kit.base import base_path
    return base_path()

@pytest.fixture(scope='session')
def full_tok(smollm2):
    "Its tokenizer"
    from competition_kit.base import load_tokenizer
    return load_tokenizer(smollm2)

@pytest.fixture(scope='session')
def tok(full_tok): return full_tok

@pytest.fixture(scope='session')
def small_tok(tiny):
    "The tokenizer of `tiny`: of the same kind, and made, copied and hashed in a tenth of the time"
    from competition_kit.base import load_tokenizer
    return load_tokenizer(tiny)

@pytest.fixture(scope='session')
def tiny(tmp_path_factory, full_tok):
    """A random base of two layers. Its tokenizer has 2,560 tokens instead of 49,152: loading and hashing the large one
    takes half of a short training"""
    from transformers import AutoModelForCausalLM
    from competition_kit.base import tiny_base
    from competition_kit.prompt import instructions
    from competition_kit.sample import arena_rows
    folder = tiny_base(tmp_path_factory.mktemp('tiny'))
    texts = [text for row in arena_rows(300, 1) for c in ('prompt', 'response_a', 'response_b') for text in row[c]]
    words = [*instructions.values(), 'system user assistant', 'Answer: A B C D E F G']
    small = full_tok.train_new_from_iterator(texts+words*50, 4000, show_progress=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(small))
    model.save_pretrained(folder)
    small.save_pretrained(folder)
    return folder

def in_order(ids): # records tell the time to the second, and these runs may take less
    from competition_kit.core import models_path
    from competition_kit.record import read_record, write_record
    for k, id in enumerate(ids):
        file = models_path(id, 'record.json')
        write_record(file, read_record(file) | dict(started=f'2026-01-01T00:00:{k:02}Z'))
    return ids

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
        return root, in_order(ids)

@pytest.fixture
def runs(trained, own_root):
    "The ids of these runs, copied into the test's own root"
    root, ids = trained
    shutil.copytree(root, own_root, dirs_exist_ok=True)
    return ids

@pytest.fixture
def parts_here(monkeypatch):
    "The parts of a vote on several GPUs are answered in this process, which sees one stand-in GPU a part"
    from types import SimpleNamespace
    from competition_kit import parallel
    def start(path, gpu):
        with monkeypatch.context() as m:
            m.setenv('CUDA_VISIBLE_DEVICES', gpu)
            parallel.answer_part(path)
        return SimpleNamespace(poll=lambda: 0, returncode=0, kill=lambda: None, wait=lambda: 0)
    def names(n, each): return [','.join(str(k*each+i) for i in range(each)) for k in range(n)]
    monkeypatch.setattr(parallel, '_gpus', names)
    monkeypatch.setattr(parallel, '_start', start)

@pytest.fixture(scope='session')
def trained_folds(tmp_path_factory, tiny, sample_tables):
    "A root with the finished runs of five folds, and their ids"
    from competition_kit.train import train_fold
    kw = dict(mix='sample_arena:60', base=tiny, lora_r=4, max_len=192, epochs=.5)
    with root_at(tmp_path_factory.mktemp('folds')) as root:
        shutil.copytree(sample_tables, root, dirs_exist_ok=True)
        return root, in_order([train_fold(fold=k, **kw).id for k in range(5)])

@pytest.fixture
def five_runs(trained_folds, own_root):
    "These runs, copied into the test's own root"
    from competition_kit.record import Run, find_run
    root, ids = trained_folds
    shutil.copytree(root, own_root, dirs_exist_ok=True)
    return [Run(find_run(id)) for id in ids]

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
