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
