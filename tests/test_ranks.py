"Ranks end with the process that started them, report failures, gather tensors, and save and read checkpoints"
import os, signal, subprocess, sys, time
import pytest
import torch
from competition_kit.core import Refusal, damage, read_json
from competition_kit.fit import last_checkpoint
from competition_kit.ranks import gather_to_rank0, launch

def is_alive(pid):  # a zombie is not
    try: stat = open(f'/proc/{pid}/stat').read()
    except OSError: return False
    return stat.rsplit(')', 1)[1].split()[0] != 'Z'

def wait_for(condition, seconds=90):
    until = time.time()+seconds
    while not condition() and time.time() < until: time.sleep(.05)
    return condition()

def on_two(folder, work, **config):
    start = 'import sys, torch\nimport competition_kit.ranks as r\n'
    (folder/'job.py').write_text(f'{start}{work}\nr.as_rank(sys.argv[1], work)')
    launch(folder, config, 2, str(folder/'job.py'))

sleep = '''
import os, sys, time
import competition_kit.ranks as r
def work(folder, config):
    (folder/f'pid-{r.rank()}').write_text(str(os.getpid()))
    time.sleep(300)
r.as_rank(sys.argv[1], work)
'''

@pytest.mark.skipif(sys.platform != 'linux', reason='only Linux tells a process that its parent has died')
def test_ranks_die_with_their_parent(tmp_path):
    (tmp_path/'job.py').write_text(sleep)
    code = 'import sys, pathlib, competition_kit.ranks as r; r.launch(pathlib.Path(sys.argv[1]), {}, 2, sys.argv[2])'
    driver = subprocess.Popen([sys.executable, '-c', code, str(tmp_path), str(tmp_path/'job.py')],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    def pids(): return [int(f.read_text()) for f in tmp_path.glob('pid-*') if f.read_text()]
    wait_for(lambda: len(pids()) == 2 or driver.poll() is not None)
    started = pids()
    assert len(started) == 2
    assert all(map(is_alive, started))
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    try: assert wait_for(lambda: not any(map(is_alive, started)))
    finally:
        for p in filter(is_alive, started): os.kill(p, signal.SIGKILL)

def test_ranks_wait_for_a_rank_that_writes_for_long(tmp_path, monkeypatch):
    "NCCL's default is ten minutes, in which a model of 70B may not be written"
    from types import SimpleNamespace
    from competition_kit import ranks
    given, nothing = {}, lambda: None
    group = SimpleNamespace(init_process_group=lambda kind, **kw: given.update(kw), barrier=nothing,
                            destroy_process_group=nothing)
    monkeypatch.setattr(ranks, 'dist', group)
    monkeypatch.setattr(ranks, 'die_with_parent', nothing)
    for k, v in dict(RANK='1', WORLD_SIZE='2', LOCAL_RANK='1').items(): monkeypatch.setenv(k, v)
    (tmp_path/'config.json').write_text('{}')
    ranks.as_rank(tmp_path/'config.json', lambda folder, config: None)
    assert given['rank'] == 1 and given['timeout'].total_seconds() >= 3600

def test_a_failure_has_type_and_place(tmp_path):
    "also an `assert`, which has no text"
    line = 'assert not config["on"]'
    with pytest.raises(RuntimeError) as e:
        on_two(tmp_path, f'def work(folder, config):\n    if r.rank(): {line}', on=True)
    first, place, file = str(e.value).splitlines()
    assert first == 'rank 1: AssertionError'
    assert 'job.py, line 4: ' in place
    assert line in place
    assert line in read_json(file.removeprefix('the whole traceback: '))['traceback']

def test_a_refusal_stays_one(tmp_path):
    (tmp_path/'job.py').write_text("""
import sys
import competition_kit.ranks as r
from competition_kit.core import Refusal
def work(folder, config): raise Refusal('no such fold')
r.as_rank(sys.argv[1], work)""")
    with pytest.raises(Refusal, match='rank 0: no such fold'): launch(tmp_path, {}, 1, str(tmp_path/'job.py'))

@pytest.mark.parametrize('seen,n', [(1, 2), (3, 8)])
def test_a_rank_for_each_gpu(tmp_path, monkeypatch, seen, n):
    class Started(Exception): pass
    def popen(*args, **kw): raise Started
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: seen)
    monkeypatch.setattr(subprocess, 'Popen', popen)
    with pytest.raises(Refusal, match=fr'{n} ranks.* {seen} (is|are) visible.*gpus={seen}'):
        launch(tmp_path, {}, n, 'job.py')
    with pytest.raises(Started): launch(tmp_path, {}, seen, 'job.py')

gather = '''
import weakref
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
def gather(folder):
    mesh, seen, full_tensor = init_device_mesh('cpu', (2,)), [], r.full_tensor
    whole = {f't{i}': torch.arange(5*(i+1), dtype=torch.bfloat16 if i else None).reshape(5, -1)+i for i in range(4)}
    parts = {k: distribute_tensor(v, mesh, [Shard(0)]) for k, v in whole.items()} | dict(plain=torch.ones(3, 4).T)
    parts['t3'].requires_grad_()
    def watched(t):
        assert not r.rank() or not any(ref() is not None for ref in seen), 'two at a time'
        out = full_tensor(t)
        seen.append(weakref.ref(out))
        return out
    r.full_tensor = watched
    got = r.gather_to_rank0(parts)
    r.full_tensor = full_tensor
    assert len(seen) == 5
    assert list(got) == ([] if r.rank() else list(parts))
    for k, v in got.items():
        assert k == 'plain' or torch.equal(v, whole[k]) and v.dtype == whole[k].dtype, k
        assert v.is_contiguous() and v.device.type == 'cpu' and not v.requires_grad and not hasattr(v, 'full_tensor'), k
'''

def test_gathered_without_ranks():
    x = dict(a=torch.ones(2, requires_grad=True), b=torch.zeros(3))
    got = gather_to_rank0(x)
    assert list(got) == ['a', 'b']
    assert torch.equal(got['a'], x['a'])
    assert not got['a'].requires_grad

resume = '''
from pathlib import Path
from torch.distributed.fsdp import fully_shard
from transformers import TrainerState
from competition_kit.fit import last_checkpoint, load_optimizer, load_weights, save_checkpoint

def new(seed, sharded):
    torch.manual_seed(seed)
    model = torch.nn.Linear(2, 3, bias=False)
    if sharded: fully_shard(model)
    opt = torch.optim.AdamW(model.parameters(), lr=.1)
    return model, opt, torch.optim.lr_scheduler.LambdaLR(opt, lambda k: 1/(k+1))

def three_steps(model, opt, schedule):
    for k in range(3):
        x = torch.tensor([[1., 2.+r.rank()]])  # each rank has rows of its own
        model(x).square().sum().backward()
        assert r.sum_gradients(model, torch.tensor([1., r.rank()])).tolist() == [2, 1]
        opt.step()
        schedule.step()
        opt.zero_grad()
    return r.full_tensor(model.weight.detach()).clone()

def resume(folder):
    for sharded in (False, True):
        at = folder/f'sharded-{sharded}'
        killed, again = new(0, sharded), new(1, sharded)
        assert r.is_sharded(killed[0]) == sharded
        three_steps(*killed)
        save_checkpoint(*killed, TrainerState(global_step=3), at)
        torch.distributed.barrier()
        load_weights(again[0], last_checkpoint(at))
        load_optimizer(*again[1:], last_checkpoint(at))
        assert torch.equal(three_steps(*again), three_steps(*killed))
        if sharded: assert again[0].weight.to_local().numel() < 6, 'each rank holds its part again'
'''

dropout = '''
from competition_kit.fit import fit

class Drawing(torch.nn.Module):
    device, drawn = torch.device('cpu'), []
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(()))
    def forward(self, input_ids):
        self.drawn.append(torch.rand(3).tolist())
        return self.w*input_ids.sum()

class TwoSteps(torch.utils.data.Dataset):
    def __len__(self): return 2
    def __getitem__(self, k): return [dict(input_ids=torch.ones(1, 2))]

def dropout(folder):
    fit(Drawing(), TwoSteps(), folder/'dropout', loss=lambda logits: logits)
    drawn = [None, None]
    torch.distributed.all_gather_object(drawn, Drawing.drawn)
    assert len({str(x) for own in drawn for x in own}) == 4, 'each rank and step draws its own dropout'
'''

both = '''
def work(folder, config):
    gather(folder)
    resume(folder)
    dropout(folder)
    (folder/f'done-{r.rank()}').touch()
'''

def test_two_ranks_gather_continue_from_one_checkpoint_and_draw_apart(tmp_path):
    on_two(tmp_path, gather+resume+dropout+both)
    assert len(list(tmp_path.glob('done-*'))) == 2
    for folder in (tmp_path/'sharded-False', tmp_path/'sharded-True'):
        assert damage(last_checkpoint(folder)) == []
        assert [f.name for f in folder.iterdir()] == ['checkpoint-3'], 'one rank writes'
