"Fitting: soft targets, steps, losses with terms, checkpoints"
import numpy as np
import pandas as pd
import pytest
import torch
from competition_kit.core import Refusal, seal
from competition_kit.fit import KahanAdamW, Steps, last_checkpoint, line_probs, targets
from competition_kit.pack import plan_steps
from competition_kit.rows import swap_probs, tasks
from competition_kit.tables import load_rows

task = tasks['preference']

@pytest.fixture
def rows(samples):
    out = load_rows('sample_arena').head(2).reset_index(drop=True)
    out.at[0, 'target'] = [.2, .5, .3]
    return out

def encoded(rows, views):
    "Rows of two tokens each"
    k = len(rows)*views
    return pd.DataFrame(dict(row=np.arange(len(rows)).repeat(views), view=np.tile(np.arange(views), len(rows)),
                             ids=[np.array([1, 2], np.int32)]*k, n=2))

def test_soft_targets_and_swaps(rows):
    y = Steps(encoded(rows, 2), rows, task, [[[np.arange(4)]]]).tensors['target']
    assert np.allclose(y[:2], [[.2, .5, .3], [.5, .2, .3]])
    assert y[2].tolist() == np.eye(3)[rows.label[1]].tolist()
    assert np.allclose(y[3], swap_probs(y[2:3], np.array([3]), task))

@pytest.mark.parametrize('soft', [[2., 1., 0.], [1.5, -.5, 0.], [np.nan, .5, .5], [0., 0., 0.], [.4, .2, .2, .2]])
def test_soft_labels_that_are_no_distribution_are_refused(rows, soft):
    rows.at[1, 'target'] = soft
    with pytest.raises(Refusal, match=f'no distribution.*{rows.id[1]}'): targets(rows, task)

def test_labels_of_options_that_a_row_does_not_have_are_refused():
    rows = pd.DataFrame(dict(id=['x', 'y', 'z'], label=[1, 2, 0], target=[None, None, [.5, .25, .25]],
                             options=[['a', 'b'], ['a', 'b', 'c'], ['a', 'b', 'c']]))
    assert targets(rows, tasks['choice'])[:, :3].tolist() == [[0, 1, 0], [0, 0, 1], [.5, .25, .25]]
    for wrong in (dict(label=[2, 2, 0]), dict(options=[['a', 'b']]*3)):
        with pytest.raises(Refusal, match='no distribution'): targets(rows.assign(**wrong), tasks['choice'])

def test_teachers_are_swapped_as_targets_are(rows):
    p = np.random.default_rng(0).dirichlet(np.ones(3), (2, 4)).astype(np.float32)  # [rows, teachers, options]
    got = line_probs(p, encoded(rows, 2), rows, task)
    assert got.shape == (4, 4, 3)
    for teacher in range(4):
        assert torch.equal(got[:, teacher], line_probs(p[:, teacher], encoded(rows, 2), rows, task))

def test_tensors_of_other_rows_are_refused(rows):
    enc = encoded(rows, 2)
    with pytest.raises(Refusal, match='teacher has 3 lines, the tokens have 4'):
        Steps(enc, rows, task, [[[np.arange(4)]]], more=dict(teacher=torch.zeros(3, 3)))

@pytest.mark.parametrize('even,weights', [(False, [0.]), (True, [0., 0.])])
def test_a_rank_without_rows_repeats_a_pack_with_no_weight(rows, even, weights):
    one_sided = [[[np.array([0]), np.array([1])], []]]  # one step, all of it on the first rank
    one, two = (Steps(encoded(rows, 1), rows, task, one_sided, k, even)[0] for k in (0, 1))
    assert [float(p['weight'].sum()) for p in one] == [1., 1.]
    assert [float(p['weight'].sum()) for p in two] == weights
    assert all(p['total'] == 2. for p in one+two)

def test_ranks_have_the_sequences_of_one(rows):
    rows = pd.concat([rows]*5, ignore_index=True)
    enc = encoded(rows, 2)
    alone = Steps(enc, rows, task, plan_steps(enc, 4, 1, 512, seed=0))
    two = [Steps(enc, rows, task, plan_steps(enc, 4, 1, 512, seed=0, ranks=2), k) for k in (0, 1)]
    for k in range(len(alone)):
        assert two[0][k][0]['total'] == two[1][k][0]['total'] == alone[k][0]['total']
        assert sum(len(p['target']) for part in two for p in part[k]) == sum(len(p['target']) for p in alone[k])

def test_sixteen_bits_move():
    w = torch.nn.Parameter(torch.ones(100, dtype=torch.bfloat16))
    opt = KahanAdamW([w], lr=1e-4, weight_decay=0.)
    for _ in range(200):
        w.grad = torch.ones_like(w)
        opt.step()
    assert ((w.detach().float()-.98).abs() < .003).all()

class Tiny(torch.nn.Module):
    "Logits from a table of tokens"
    device = torch.device('cpu')
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(3, 3)
    def forward(self, input_ids, position_ids, bounds): return self.table(input_ids[0, torch.tensor(bounds[1:])-1])

def fitted(rows, folder, loss, **kw):
    from competition_kit.fit import fit
    enc = encoded(rows, 2)
    return fit(Tiny(), Steps(enc, rows, task, plan_steps(enc, 1, 3, 2, seed=0)), folder, loss=loss, **kw)

def named(logits, target, weight, missing, total):
    from competition_kit.model import pack_loss
    loss = pack_loss(logits, target, weight, missing, total)
    return dict(share=weight.sum()/total, loss=loss, twice=2*loss.detach())

def test_named_terms_of_a_loss(rows, tmp_path):
    from competition_kit.model import pack_loss
    plain = fitted(rows, tmp_path/'plain', pack_loss)
    terms = fitted(rows, tmp_path/'named', named)
    assert [entry[:2] for entry in terms] == plain
    assert len(plain) == 6
    for _, loss, t in terms: assert t == dict(share=1., twice=pytest.approx(2*loss))

def test_the_progress_bar_is_no_error_output(rows, tmp_path, capsys):
    fitted(rows, tmp_path, named)
    printed = capsys.readouterr()
    assert 'train: 100%' in printed.out
    assert 'train:' not in printed.err

def test_named_terms_survive_an_interruption(rows, tmp_path):
    from shutil import rmtree
    whole = fitted(rows, tmp_path, named, save_every=2)
    rmtree(tmp_path/'checkpoint-6')
    assert fitted(rows, tmp_path, named, save_every=2) == whole

def test_terms_without_a_total(rows, tmp_path):
    with pytest.raises(Refusal, match='ce, kl and no total'):
        fitted(rows, tmp_path, lambda logits, **kw: dict(ce=logits.sum(), kl=logits.sum()))

def test_last_checkpoint_looks_inside(tmp_path, capsys):
    for k in (2, 4, 10):
        folder = tmp_path/f'checkpoint-{k}'
        folder.mkdir()
        (folder/'weights.safetensors').write_bytes(b'w'*k)
        if k != 10: seal(folder)
    (tmp_path/'checkpoint-4/weights.safetensors').write_bytes(b'x'*4)
    assert last_checkpoint(tmp_path).name == 'checkpoint-2'
    assert 'checkpoint-10 is damaged' in capsys.readouterr().out

def test_one_gpu_of_several_is_used(monkeypatch, tmp_path):
    "transformers' Trainer would copy the model to all that it sees"
    from competition_kit.fit import _arguments
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'set_device', lambda *args: None)
    args = _arguments(tmp_path, 3, True, 1e-3, 'linear', .1, 0., 1., 20, 0)
    assert args.device.type == 'cuda'
    assert args.n_gpu == 1
