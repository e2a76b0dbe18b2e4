"On a GPU: kernels agree with plain attention, a run continues where it ended, several GPUs are one training"
import shutil
from pathlib import Path
import numpy as np
import pytest
import torch
from competition_kit.attention import Layout, pack_layout, packed_attention, register_attention
from competition_kit.model import Classifier, add_lora, collate, option_mask, pack_loss
from competition_kit.pack import Tree, as_tree, prefix_tree
from competition_kit.speed import checkpoint_activations, compile_layers, fuse

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.fixture(autouse=True)
def sample(own_root):
    "A checkout that has run the main job has the sample already"
    for f in (Path(__file__).resolve().parents[1]/'data').glob('sample_arena*.parquet'):
        (own_root/'data').mkdir(exist_ok=True)
        shutil.copy(f, own_root/'data')

def gap(a, b): return ((a-b).float().norm()/b.float().norm()).item()

# ---- attention
@pytest.mark.parametrize('window', [None, 100], ids=['whole', 'window'])
@pytest.mark.parametrize('cap', [None, 3.], ids=['plain', 'capped'])
@pytest.mark.parametrize('heads, kv, size', [(8, 4, 256), (14, 2, 64)])
def test_attention(cap, window, heads, kv, size):
    torch.manual_seed(0)
    for bounds in ([0, 100, 130, 131, 400, 700], [0, 1024], [0, 5, 3000], [0, 48, 96], [0, 7]):
        kw = dict(device='cuda', dtype=torch.bfloat16, requires_grad=True)
        q, k, v = (torch.randn(1, h, bounds[-1], size, **kw) for h in (heads, kv, kv))
        layout = Layout(torch.tensor(bounds, dtype=torch.int32, device='cuda'), int(max(np.diff(bounds))))
        plain = [x.float() for x in (q, k, v)]
        got = packed_attention(None, q, k, v, None, layout=layout, softcap=cap, sliding_window=window)[0]
        want = packed_attention(None, *plain, None, bounds=bounds, softcap=cap, sliding_window=window)[0]
        dy = torch.randn_like(want)
        got_grad = torch.autograd.grad(got, (q, k, v), dy.bfloat16())
        want_grad = torch.autograd.grad(want, (q, k, v), dy)
        assert gap(got, want) < .01
        for a, b in zip(got_grad, want_grad): assert gap(a, b) < .015

def _views(lengths, template=40, seed=0):
    "Rows in two views: the template and a question, then two answers in either order"
    rng, out = np.random.default_rng(seed), []
    def tokens(n): return rng.integers(1, 512, n).astype(np.int32)
    head = tokens(template)
    for question, *answers in lengths:
        begin, (a, b) = np.append(head, tokens(question)), map(tokens, answers)
        out += [np.concatenate([begin, a, b]), np.concatenate([begin, b, a])]
    return out
ROWS = (300, 150, 90), (20, 7, 1), (17, 500, 400), (900, 3, 2)

@pytest.mark.parametrize('window', [None, 100], ids=['whole', 'window'])
@pytest.mark.parametrize('cap', [None, 3.], ids=['plain', 'capped'])
@pytest.mark.parametrize('heads, kv, size', [(8, 4, 256), (14, 2, 64)])
def test_attention_of_a_prefix_tree(cap, window, heads, kv, size):
    "The varlen kernel over copies of keys, and FlexAttention's mask, against one call a segment in fp32"
    torch.manual_seed(0)
    def put(x): return torch.from_numpy(x).cuda()
    both = _views(ROWS)
    for ids in (both, both[:2], [*both[:2], both[0], both[0][:200]], [i[40:] for i in both]):
        tree = prefix_tree(ids)
        assert len(tree.parent) > len(ids)
        kw = dict(device='cuda', dtype=torch.bfloat16, requires_grad=True)
        q, k, v = (torch.randn(1, h, tree.ends[-1], size, **kw) for h in (heads, kv, kv))
        plain, asked = [x.float() for x in (q, k, v)], dict(softcap=cap, sliding_window=window)
        got = packed_attention(None, q, k, v, None, layout=pack_layout(tree, put), **asked)[0]
        want = packed_attention(None, *plain, None, bounds=tree, **asked)[0]
        dy = torch.randn_like(want)
        got_grad = torch.autograd.grad(got, (q, k, v), dy.bfloat16())
        want_grad = torch.autograd.grad(want, (q, k, v), dy)
        assert gap(got, want) < .01
        for a, b in zip(got_grad, want_grad): assert gap(a, b) < .015

# ---- layers
def _model(kind, layers=12, **kw):
    from transformers import AutoConfig, AutoModelForCausalLM
    register_attention()
    more = dict(head_dim=64, query_pre_attn_scalar=64, sliding_window=64) if kind == 'gemma2' else {}
    cfg = AutoConfig.for_model(model_type=kind, hidden_size=256, intermediate_size=688, num_hidden_layers=layers,
                               num_attention_heads=4, num_key_value_heads=2, vocab_size=512, pad_token_id=0,
                               max_position_embeddings=4096, attn_implementation='packed', **more)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(cfg, dtype=torch.bfloat16).cuda().requires_grad_(False)

def _step(classifier, pack):
    classifier.zero_grad()
    k = len(as_tree(pack['bounds']).leaf)
    target, weight = torch.eye(3, device='cuda')[[0]*k], torch.ones(k, device='cuda')
    out = classifier(**pack)
    pack_loss(out, target, weight, option_mask([3]*k, 3).cuda(), k).backward()
    return out.detach(), torch.cat([p.grad.flatten() for p in classifier.parameters() if p.requires_grad])

def _trained(kind):
    "A model with a LoRA whose B is not zero"
    classifier = add_lora(Classifier(_model(kind), [5, 6, 7]), r=8)
    for n, p in classifier.named_parameters():
        if 'lora_B' in n: p.data.normal_(0, .02, generator=torch.Generator('cuda').manual_seed(1))
    return classifier.to('cuda').train()

@pytest.mark.parametrize('kind', ['qwen2', 'llama', 'gemma2'])
def test_compiled_layers_give_the_same_and_are_compiled_once(kind):
    import torch._dynamo.utils as counted
    torch._dynamo.reset()
    counted.counters.clear()
    rng = np.random.default_rng(0)
    lengths = (300, 40, 7), (500, 100), (33,), (48, 48), (128, 128)
    packs = [collate([rng.integers(1, 512, n).astype(np.int32) for n in ns], 'cuda') for ns in lengths]
    plain, quick = _trained(kind), compile_layers(checkpoint_activations(fuse(_trained(kind)), 4))
    for pack in packs:
        for a, b in zip(_step(quick, pack), _step(plain, pack)): assert gap(a, b) < .05
    graphs = counted.counters['stats']['unique_graphs']
    assert graphs <= (24 if kind == 'gemma2' else 8), f'{graphs} graphs for 12 layers'

@pytest.mark.parametrize('quick', [False, True], ids=['plain', 'compiled'])
@pytest.mark.parametrize('kind', ['qwen2', 'gemma2'])
def test_keys_that_all_sequences_see(kind, quick):
    "The shared prefix stands once in the pack: the same logits, the same gradients"
    rng, head = np.random.default_rng(0), np.random.default_rng(1).integers(1, 512, 70).astype(np.int32)
    classifier = fuse(_trained(kind))
    if quick: compile_layers(classifier)
    for ns in ((300, 40, 7, 200), (900, 33)):
        rows = [np.append(head, rng.integers(1, 512, n).astype(np.int32)) for n in ns]
        once, alone = collate(rows, 'cuda'), [_step(classifier, collate([r], 'cuda')) for r in rows]
        assert once['bounds'][0] == 70
        out, grad = _step(classifier, once)
        assert gap(out, torch.cat([o for o, _ in alone])) < .05
        assert gap(grad, sum(g for _, g in alone)/len(rows)) < .05

@pytest.mark.parametrize('quick', [False, True], ids=['plain', 'compiled'])
@pytest.mark.parametrize('kind', ['qwen2', 'gemma2'])
def test_two_views_share_their_beginning(kind, quick):
    "A prefix tree: the same logits and gradients as each sequence alone, and no more graphs than for other packs"
    import torch._dynamo.utils as counted
    torch._dynamo.reset()
    counted.counters.clear()
    classifier = fuse(_trained(kind))
    if quick: compile_layers(classifier)
    for seed in range(3):
        ids = _views(ROWS[seed:seed+3], seed=seed)
        pack, alone = collate(ids, 'cuda'), [_step(classifier, collate([i], 'cuda')) for i in ids]
        assert isinstance(pack['bounds'], Tree)
        out, grad = _step(classifier, pack)
        assert gap(out, torch.cat([o for o, _ in alone])) < .05
        assert gap(grad, sum(g for _, g in alone)/len(ids)) < .05
    assert counted.counters['stats']['unique_graphs'] <= (24 if kind == 'gemma2' else 8)

def test_the_compiler_keeps_less(kind='qwen2'):
    "what is cheap to compute again is not kept for the backward pass"
    def kept(ban):
        torch._dynamo.reset()
        classifier = compile_layers(fuse(add_lora(Classifier(_model(kind, 4), [5, 6, 7]), r=8).to('cuda').train()))
        torch._functorch.config.ban_recompute_materialized_backward = ban
        pack = collate([np.full(2048, k, np.int32) for k in range(4)], 'cuda')
        _step(classifier, pack)
        before = torch.cuda.memory_allocated()
        out = classifier(**pack)  # its graph holds what is kept
        return torch.cuda.memory_allocated()-before-out.nbytes
    more, less = kept(True), kept(False)
    assert less < .75*more, (less, more)

# ---- runs
small = dict(mix='sample_arena:60', lora_r=8, batch=8, epochs=2., save_every=3, max_len=256, compiled='no', lr=1e-3)

def test_a_run_goes_on_where_it_ended(monkeypatch, tmp_path, own_root):
    "going on adds nothing to what two undisturbed runs differ by: the GPU adds up in no fixed order"
    from competition_kit import fit as f, train
    from competition_kit.probs import read_probs
    def run(name):
        if (own_root/'data').exists(): shutil.copytree(own_root/'data', tmp_path/name/'data', dirs_exist_ok=True)
        monkeypatch.setenv('CK_ROOT', str(tmp_path/name))
        return np.stack(read_probs(train.train_fold(**small).folder/'probs.parquet').p)
    a, b = run('a'), run('b')
    save = f.save_checkpoint
    def dies(model, opt, sched, state, folder):
        save(model, opt, sched, state, folder)
        if state.global_step == 6: raise KeyboardInterrupt
    monkeypatch.setattr(f, 'save_checkpoint', dies)
    with pytest.raises(KeyboardInterrupt): run('cut')
    monkeypatch.setattr(f, 'save_checkpoint', save)
    c = run('cut')
    undisturbed, continued = np.abs(a-b).max(), np.abs(a-c).max()
    assert continued <= 2*undisturbed+.01, f'{undisturbed:.4f} between undisturbed runs, {continued:.4f} after going on'

full = dict(method='full', dtype='bf16', lr=1e-4)

@pytest.mark.parametrize('kw', [dict(), dict(dtype='nf4'), full, dict(route='score2')], ids=str)
def test_it_learns(kw):
    if kw.get('dtype') == 'nf4': pytest.importorskip('bitsandbytes')
    from competition_kit.train import train_fold
    m = train_fold(**dict(small, mix='sample_arena', batch=4, epochs=2.) | kw).record['metrics']
    print(kw, m['log_loss'], m['baselines']['class prior']['log_loss'])
    assert m['log_loss'] < m['baselines']['class prior']['log_loss']-.05

def test_voters_are_compiled_once(monkeypatch, tmp_path):
    "two adapters on one base say the same in compiled layers, and the second takes the first one's graphs"
    import torch._dynamo.utils as counted
    from competition_kit.tables import load_rows
    from competition_kit.train import train_fold
    from competition_kit.trained import predict_runs
    runs = [train_fold(**dict(small, fold=k)).id for k in (0, 1)]
    rows = load_rows('sample_arena_test')
    def predictions(name): return [np.stack(t.p) for t in predict_runs(runs, rows, tmp_path/name).values()]
    plain = predictions('plain')
    torch._dynamo.reset()
    counted.counters.clear()
    monkeypatch.setattr('competition_kit.speed.worth_compiling', lambda *a: True)
    for p, q in zip(predictions('quick'), plain): assert np.abs(p-q).max() < .05
    assert 0 < counted.counters['stats']['unique_graphs'] <= 3

# ---- several GPUs
several = pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')

@several
@pytest.mark.parametrize('kw', [dict(), dict(sharded=True), dict(full, sharded=True), dict(compiled='yes'),
                                dict(compiled='yes', sharded=True)], ids=str)
def test_two_gpus_are_one_training(kw):
    from competition_kit.probs import read_probs
    from competition_kit.train import train_fold
    alone = {k: v for k, v in kw.items() if k != 'sharded'}
    one = train_fold(**dict(small, epochs=1.) | alone)
    two = train_fold(**dict(small, epochs=1., gpus=2) | kw)
    p, q = (np.stack(read_probs(r.folder/'probs.parquet').p) for r in (one, two))
    assert np.abs(p-q).max() < .05

# ---- bases against their own forward, through the GPU's kernels
@pytest.mark.parametrize('dtype', ['bf16', 'fp16'])
@pytest.mark.parametrize('kind', ['qwen2', 'llama', 'gemma2'])
def test_a_base_is_checked_through_the_gpus_kernels(kind, dtype, tmp_path, tok, smollm2, monkeypatch):
    """Variable-length attention, and FlexAttention for Gemma 2: a right base passes. A kernel that lets rows see each
    other, or forgets a scale, is refused"""
    from competition_kit import model
    from competition_kit.core import Refusal, models_path
    from competition_kit.prompt import Prompt
    from transformers import AutoConfig
    from test_model import save
    more = dict(head_dim=64, query_pre_attn_scalar=64, sliding_window=32) if kind == 'gemma2' else {}
    cfg = AutoConfig.for_model(kind, vocab_size=49152, hidden_size=256, intermediate_size=688, num_hidden_layers=6,
                               num_attention_heads=4, num_key_value_heads=2, initializer_range=.08,
                               max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2, **more)
    base, prompt, layout_of = str(save(tmp_path/kind, cfg, smollm2)), Prompt(tok, 'preference', 256), model.pack_layout
    for route in ('answer', 'score'): assert model.load_classifier(base, prompt, route, dtype).varlen
    shutil.rmtree(models_path('.parity'))
    def leaks(bounds, put): return layout_of([0, bounds[-1]] if not bounds[0] else bounds, put)
    for name, fault in (('pack_layout', leaks), ('_logit_scale', lambda config: 1.1)):
        with monkeypatch.context() as m:
            m.setattr(model, name, fault)
            with pytest.raises(Refusal, match='computes what the packed forward does not'):
                model.load_classifier(base, prompt, 'answer', dtype)
