"Fitting: soft targets, steps, checkpoints"
import numpy as np
import pandas as pd
import torch
from competition_kit.core import seal
from competition_kit.fit import KahanAdamW, Steps, last_checkpoint, targets
from competition_kit.rows import swap_probs, tasks
from competition_kit.tables import load_rows

def test_soft_targets_and_swaps():
    rows = load_rows('sample_arena').head(2).reset_index(drop=True)
    rows.at[0, 'target'] = [.2, .5, .3]
    task = tasks['preference']
    y = targets(rows, task)
    assert np.allclose(y[0], [.2, .5, .3]) and y[1].max() == 1
    enc = pd.DataFrame(dict(row=[0, 0, 1, 1], view=[0, 1, 0, 1], ids=[np.array([1, 2], np.int32)]*4, n=[2]*4))
    s = Steps(enc, rows, task, [[[np.arange(4)]]])
    assert np.allclose(s.target[1], [.5, .2, .3]) and np.allclose(s.target[3], swap_probs(y[1:], np.array([3]), task))

def test_a_rank_without_rows_repeats_a_pack_with_no_weight():
    rows = load_rows('sample_arena').head(2).reset_index(drop=True)
    enc = pd.DataFrame(dict(row=[0, 1], view=[0, 0], ids=[np.array([1, 2], np.int32)]*2, n=[2]*2))
    plan = [[[np.array([0]), np.array([1])], []]]  # one step, all of it on the first rank
    for even, want in ((False, [0.]), (True, [0., 0.])):
        one, two = (Steps(enc, rows, tasks['preference'], plan, k, even)[0] for k in (0, 1))
        assert [float(p['weight'].sum()) for p in one] == [1., 1.] and [float(p['weight'].sum()) for p in two] == want
        assert all(p['total'] == 2. for p in one+two)

def test_sixteen_bits_move():
    w = torch.nn.Parameter(torch.ones(100, dtype=torch.bfloat16))
    opt = KahanAdamW([w], lr=1e-4, weight_decay=0.)
    for _ in range(200):
        w.grad = torch.ones_like(w)
        opt.step()
    assert ((w.detach().float()-.98).abs() < .003).all()

def test_last_checkpoint_looks_inside(tmp_path, capsys):
    for k in (2, 4, 10):
        d = tmp_path/f'checkpoint-{k}'
        d.mkdir()
        (d/'weights.safetensors').write_bytes(b'w'*k)
        if k != 10: seal(d)
    (tmp_path/'checkpoint-4/weights.safetensors').write_bytes(b'x'*4)
    assert last_checkpoint(tmp_path).name == 'checkpoint-2'
    assert 'checkpoint-10 is damaged' in capsys.readouterr().out

def test_one_gpu_of_several_is_used(monkeypatch, tmp_path):
    "transformers' Trainer would copy the model to all that it sees"
    from competition_kit.fit import _arguments
    for name, what in dict(is_available=True, device_count=2, set_device=None).items(): monkeypatch.setattr(torch.cuda, name, lambda *a, what=what: what)
    args = _arguments(tmp_path, 3, True, 1e-3, 'linear', .1, 0., 1., 20, 0)
    assert args.device.type == 'cuda' and args.n_gpu == 1
