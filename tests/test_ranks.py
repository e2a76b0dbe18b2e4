"Ranks end with whoever started them, say what has failed, and gather where it is written"
import os, signal, subprocess, sys, time
import pytest, torch
from competition_kit.core import Refusal, read_json
from competition_kit.ranks import gathered, launch

def _alive(pid):  # a zombie is not
    try: return open(f'/proc/{pid}/stat').read().rsplit(')', 1)[1].split()[0] != 'Z'
    except OSError: return False

@pytest.mark.skipif(sys.platform != 'linux', reason='only Linux tells a process that its parent has died')
def test_ranks_die_with_their_parent(tmp_path):
    (tmp_path/'job.py').write_text('import os, sys, time\nfrom competition_kit.ranks import *\n'
        'def work(folder, p):\n    (folder/f"pid-{rank()}").write_text(str(os.getpid()))\n    time.sleep(300)\nas_rank(sys.argv[1], work)')
    code = f"from pathlib import Path; from competition_kit.ranks import launch; launch(Path({str(tmp_path)!r}), {{}}, 2, {str(tmp_path/'job.py')!r})"
    driver = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    def pids(): return [int(f.read_text() or 0) for f in tmp_path.glob('pid-*')]
    until = time.time()+90
    while (len(pids()) < 2 or not all(pids())) and driver.poll() is None and time.time() < until: time.sleep(.05)
    ranks = pids()
    assert len(ranks) == 2 and all(map(_alive, ranks))
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    while any(map(_alive, ranks)) and time.time() < until: time.sleep(.05)
    try: assert not any(map(_alive, ranks))
    finally:
        for p in ranks:
            if _alive(p): os.kill(p, signal.SIGKILL)

def on_two(folder, work, **config):
    (folder/'job.py').write_text(f'import sys, torch\nimport competition_kit.ranks as r\n{work}\nr.as_rank(sys.argv[1], work)')
    launch(folder, config, 2, str(folder/'job.py'))

@pytest.mark.parametrize('line,says', [('assert not p["on"]', 'AssertionError'), ('{}[p["x"]]', "KeyError: 'foo'")])
def test_a_failure_has_type_and_place(tmp_path, line, says):
    with pytest.raises(RuntimeError) as e: on_two(tmp_path, f'def work(folder, p):\n    if r.rank(): {line}', on=True, x='foo')
    first, place, file = str(e.value).splitlines()
    assert first.startswith(f'rank 1: {says}') and 'job.py, line 4: ' in place and line in place
    assert line in read_json(file.removeprefix('the whole traceback: '))['traceback']

def test_a_rank_for_each_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    started = []
    monkeypatch.setattr(subprocess, 'Popen', lambda cmd, **kw: started.append(cmd) or (_ for _ in ()).throw(OSError('started')))
    for seen, n in [(1, 2), (3, 8)]:
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: seen)
        with pytest.raises(Refusal, match=fr'{n} ranks.* {seen} (is|are) visible.*gpus={seen}'): launch(tmp_path, {}, n, 'job.py')
        assert not started
        with pytest.raises(OSError, match='started'): launch(tmp_path, {}, seen, 'job.py')
        assert started.pop()

def test_gathered_on_the_first_rank_alone(tmp_path):
    on_two(tmp_path, '''
import weakref
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
def work(folder, p):
    mesh, seen, real = init_device_mesh('cpu', (2,)), [], r.whole
    full = {f't{i}': torch.arange(5*(i+1), dtype=torch.bfloat16 if i else None).reshape(5, -1)+i for i in range(4)}
    mine = {k: distribute_tensor(v, mesh, [Shard(0)]) for k, v in full.items()} | dict(plain=torch.ones(3, 4).T)
    mine['t3'].requires_grad_()
    def whole(t):
        assert not r.rank() or not any(o() is not None for o in seen), 'two at a time'
        out = real(t)
        seen.append(weakref.ref(out))
        return out
    r.whole = whole
    got = r.gathered(mine)
    assert len(seen) == 5
    if r.rank(): assert got == {}
    else:
        assert list(got) == list(mine) and all(torch.equal(got[k], v) and got[k].dtype == v.dtype for k, v in full.items())
        assert all(v.is_contiguous() and v.device.type == 'cpu' and not v.requires_grad and not hasattr(v, 'full_tensor') for v in got.values())
    (folder/f'done-{r.rank()}').touch()
''')
    assert len(list(tmp_path.glob('done-*'))) == 2

def test_gathered_without_ranks():
    x = dict(a=torch.ones(2, requires_grad=True), b=torch.zeros(3))
    got = gathered(x)
    assert list(got) == ['a', 'b'] and torch.equal(got['a'], x['a']) and not got['a'].requires_grad
