"""Compiled layers give the same numbers, with one graph for each kind of layer.

Dynamo runs in a process of its own, with a backend that compiles no C++"""
import os, subprocess, sys
import pytest

CODE = """
import sys
import numpy as np, torch, torch.nn.functional as F
import torch.nn.attention.flex_attention as flex
import competition_kit.attention as A
import competition_kit.model as M
from competition_kit.speed import checkpoint_activations, compile_layers, fuse
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM

# what a GPU does in one call, without a window
def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, scale=None, window_size=(-1, 0), enable_gqa=True):
    i, j = torch.arange(q.shape[0])[:, None], torch.arange(k.shape[0])
    a, b = torch.bucketize(i, cu_q[1:].contiguous(), right=True), torch.bucketize(j, cu_k[1:].contiguous(), right=True)
    sees = (a == b) & (j-cu_k[b] <= i-cu_q[a]+(cu_k.diff()-cu_q.diff())[a])
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, sees, scale=scale, enable_gqa=True)[0].transpose(0, 1)

A.varlen_attn, flex._validate_device = varlen_attn, lambda *a: None
flexible = torch.compile(flex.flex_attention, backend='aot_eager')
def flexible_attention(): return flexible
A.compiled_flex = flexible_attention
plain = torch.nn.Module.compile
def compile_for_cpu(self, **kw): return plain(self, backend='aot_eager_decomp_partition', **kw)
torch.nn.Module.compile = compile_for_cpu
A.register_attention()
kind, layers = sys.argv[1], 6
more = dict(head_dim=16, query_pre_attn_scalar=16, sliding_window=64) if kind == 'gemma2' else {}
cfg = AutoConfig.for_model(model_type=kind, hidden_size=48, intermediate_size=96, num_hidden_layers=layers,
                           num_attention_heads=4, num_key_value_heads=2, vocab_size=64, pad_token_id=0,
                           attn_implementation='packed', **more)
def bare_model(): return M.Classifier(AutoModelForCausalLM.from_config(cfg).requires_grad_(False), [5, 6, 7])
"""

TRAINS = """
torch.manual_seed(0)
classifier = M.add_lora(bare_model(), r=4).train()
for n, p in classifier.named_parameters():
    if 'lora_B' in n: p.data.normal_(0, .05)
def sequence(k, n): # the first two packs begin alike
    first = 1+n%50 if k > 1 else 1
    rest = np.random.default_rng([k, n]).integers(2, 64, n)
    return np.append(np.full(9, first), rest).astype(np.int32)
lengths = [(150, 40, 7), (100, 101), (300,), *((90+7*k, 30) for k in range(3))]
packs = [M.collate([sequence(k, n) for n in ns]) for k, ns in enumerate(lengths)]
def views(n): return [np.append(sequence(0, n), sequence(9, k)) for k in (12, 30)]
packs += [M.collate([*views(60), *views(90)]), M.collate(views(70))]
assert not isinstance(packs[-2]['bounds'], list)  # two rows in two views: a tree
def step(b):
    classifier.zero_grad()
    out = classifier(**b)
    out.sum().backward()
    return torch.cat([out.detach().flatten(), *(p.grad.flatten() for p in classifier.parameters() if p.requires_grad)])
M.Classifier.varlen = False
want = [step(b) for b in packs]
M.Classifier.varlen = True
compile_layers(checkpoint_activations(fuse(classifier), 2))
assert [p['bounds'][0] for p in packs[:4]] == [9, 9, 0, 0]  # the first two begin alike
for k, (b, w) in enumerate(zip(packs, want)):
    gap = ((step(b)-w).norm()/w.norm()).item()
    assert gap < 1e-4, gap  # the sigmoid for Gemma's tanh rounds off 4e-5
    if k == 3: early = counters['stats']['unique_graphs']
print('graphs', early, counters['stats']['unique_graphs'])
"""

VOTES = """
from competition_kit.trained import load_adapter
for k in range(3):
    torch.manual_seed(0)
    classifier = M.add_lora(bare_model().eval(), r=4, seed=k)
    for p in classifier.parameters():
        if p.requires_grad: p.data.normal_(0, .05)
    classifier.model.save_pretrained(f'voter{k}')
def sequence(k, n): return np.random.default_rng(k).integers(1, 64, n).astype(np.int32)
packs = [M.collate([sequence(k, n) for n in ns]) for k, ns in enumerate([(150, 40, 7), (100, 100)])]
torch.manual_seed(0)
classifier, said, graphs = bare_model().eval(), [], []
for quick in (False, True):
    M.Classifier.varlen = quick
    for k in range(3):
        load_adapter(classifier, f'voter{k}')
        if quick: compile_layers(fuse(classifier))
        with torch.no_grad(): said.append(torch.cat([classifier(**b) for b in packs]))
        graphs.append(counters['stats']['unique_graphs'])
for k in range(3): assert torch.allclose(said[k], said[k+3], atol=1e-4, rtol=1e-3)
assert not torch.allclose(said[0], said[1], atol=1e-2)
print('graphs', graphs[3], graphs[5])
"""

def graphs(code, kind, folder):
    env = {k: v for k, v in os.environ.items() if k != 'TORCHDYNAMO_DISABLE'}
    env['PYTHONPATH'] = os.pathsep.join(sys.path)
    p = subprocess.run([sys.executable, '-c', code, kind], capture_output=True, text=True, env=env, cwd=folder)
    assert p.returncode == 0, p.stderr[-3000:]
    return tuple(map(int, p.stdout.split('graphs')[1].split()))

slow = pytest.mark.skipif('CK_SLOW' not in os.environ, reason='takes a minute: CK_SLOW=1')

@pytest.mark.parametrize('kind, most', [('qwen2', 6), pytest.param('gemma2', 24, marks=slow)])
def test_compiled(kind, most, tmp_path):
    early, all = graphs(CODE+TRAINS, kind, tmp_path)
    assert early == all <= most, f'{early} graphs for the first packs, {all} in the end'

def test_voters_share_what_is_compiled(tmp_path):
    first, last = graphs(CODE+VOTES, 'qwen2', tmp_path)
    assert 0 < first == last, f'{first} graphs for one voter, {last} for three'
