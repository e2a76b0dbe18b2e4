"Training: killed and continued, refused, soft targets, both routes"
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
import torch
from competition_kit.base import base_path
from competition_kit.core import Refusal, models_path, seal
from competition_kit.split import load_rows, swap_probs, tasks
from competition_kit.train import Steps, fold_rows, last_checkpoint, targets, train_fold

@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    "A random Llama of two layers with the embedded base's tokenizer"
    from transformers import LlamaConfig, LlamaForCausalLM
    folder = tmp_path_factory.mktemp('tiny')
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=49152,
                                 tie_word_embeddings=True, pad_token_id=2, eos_token_id=2, bos_token_id=1)).save_pretrained(folder)
    for f in Path(base_path()).iterdir():
        if f.name.startswith(('tokenizer', 'chat_template')): shutil.copy(f, folder)
    return str(folder)

small = dict(mix='sample_arena:60', lora_r=4, batch=4, epochs=2., save_every=3, lora_dropout=.1, dtype='fp32')
weights = lambda run: (run.folder/'adapter/adapter_model.safetensors').read_bytes()

def test_killed_anywhere_ends_with_the_same_weights(tiny, tmp_path, monkeypatch):
    code = f"from competition_kit.train import train_fold; train_fold(base={tiny!r}, **{small!r})"
    load_rows('sample_arena')
    start = lambda: subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ))
    def checkpoints(): return list(models_path().glob('train-*/checkpoints/checkpoint-*'))
    for at in (1, 2):    # kill when the first checkpoint is there, and again a little later
        p, until = start(), time.time()+90
        while len(checkpoints()) < at and p.poll() is None and time.time() < until: time.sleep(.01)
        time.sleep(.05*at)
        p.send_signal(signal.SIGKILL)
        p.wait()
    assert checkpoints(), 'the training ended before it could be killed'
    newest = last_checkpoint(next(models_path().glob('train-*/checkpoints')))
    (newest/'optimizer.safetensors').write_bytes(b'cut')     # and the newest one is damaged on top
    again = train_fold(base=tiny, **small)
    assert again.record['status'] == 'done'
    monkeypatch.setenv('CK_ROOT', str(tmp_path/'undisturbed'))
    whole = train_fold(base=tiny, **small)
    assert weights(again) == weights(whole) and again.id == whole.id
    assert json.loads((again.folder/'loss.json').read_text()) == json.loads((whole.folder/'loss.json').read_text())

def test_the_same_run_is_not_made_twice(tiny):
    a = train_fold(base=tiny, **small)
    t = time.time()
    b = train_fold(base=tiny, **small)
    assert a.id == b.id and b.done and time.time()-t < 5
    assert train_fold(base=tiny, **dict(small, seed=1)).id != a.id
    assert train_fold(base=tiny, fold=1, **small).id.startswith('train-f1-')

@pytest.mark.parametrize('route', ['answer', 'score'])
def test_routes_learn_and_predict(tiny, route):
    r = train_fold(base=tiny, **dict(small, route=route, views=1)).record
    assert r['held_out'] and np.isfinite(r['metrics']['log_loss']) and len(r['metrics']['baselines']) == 3

def test_choice_rows(tiny):
    r = train_fold(base=tiny, **dict(small, mix='sample_logic')).record
    assert r['task'] == 'choice'

@pytest.mark.parametrize('wrong, says', [(dict(fold=9), 'fold'), (dict(mix='sample_arena + nosuch:3'), 'nosuch'), (dict(base='./nothing/here'), 'no base'),
                                         (dict(route='regress'), 'route'), (dict(truncation='centre'), 'truncation'), (dict(dtype='fp8'), 'fp8'), (dict(lora_modules='q_prj'), 'q_prj'), (dict(max_len=20), 'max_len')])
def test_refused(tiny, wrong, says):
    with pytest.raises(Refusal, match=says): train_fold(**(dict(small, base=tiny) | wrong))
    assert not list(models_path().glob('train-*/adapter'))

def test_soft_targets_and_swaps():
    rows = load_rows('sample_arena').head(2).reset_index(drop=True)
    rows.at[0, 'target'] = [.2, .5, .3]
    task = tasks['preference']
    y = targets(rows, task)
    assert np.allclose(y[0], [.2, .5, .3]) and y[1].max() == 1
    enc = pd.DataFrame(dict(row=[0, 0, 1, 1], view=[0, 1, 0, 1], ids=[np.array([1, 2], np.int32)]*4, n=[2]*4))
    s = Steps(enc, rows, task, [[np.arange(4)]])
    assert np.allclose(s.target[1], [.5, .2, .3]) and np.allclose(s.target[3], swap_probs(y[1:], np.array([3]), task))

def test_held_out_rows_are_never_trained_on():
    rows = load_rows('sample_arena')
    for f in range(5):
        train, held = fold_rows(rows, f)
        assert not set(train.group) & set(held.group) and len(train)+len(held) == len(rows)

def test_last_checkpoint_looks_inside(tmp_path, capsys):
    for k in (2, 4, 10):
        d = tmp_path/f'checkpoint-{k}'
        d.mkdir()
        (d/'weights.safetensors').write_bytes(b'w'*k)
        if k != 10: seal(d)
    (tmp_path/'checkpoint-4/weights.safetensors').write_bytes(b'x'*4)
    assert last_checkpoint(tmp_path).name == 'checkpoint-2'
    assert 'checkpoint-10 is damaged' in capsys.readouterr().out
