"Our reader of GPTQ checkpoints against numpy, transformers and GPTQModel; nf4; adapters over both"

import itertools, json, os, subprocess, sys
from pathlib import Path
import numpy as np, pytest, torch, torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers import AutoModelForSequenceClassification
from transformers import Gemma2Config, Gemma3TextConfig, LlamaConfig, Qwen2Config
from competition_kit.core import Refusal
from competition_kit.quant import GPTQLinear, dense_weight, load_mapped, load_nf4, text_config
from gptq_writer import checkpoint, quantise, read

KINDS = [
    dict(bits=b, group=g, act=a, sym=s, v1=v)
    for b, g, a, s, v in itertools.product((4, 8), (32, 64, -1), (False, True), (True, False), (True, False))
]


def name(k):
    return '-'.join(f'{a}{b}' for a, b in k.items())


def weight(out, inp, seed=0):
    return (np.random.default_rng(seed).normal(size=(out, inp)) / 8).astype(np.float32)


def tensors(t):
    return {k: torch.from_numpy(v) for k, v in t.items()}


def run(code, **env):
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get('PYTHONPATH', '')])
    subprocess.run([sys.executable, '-c', code], env=dict(os.environ, PYTHONPATH=path, **env), check=True)


# ---- one layer
@pytest.mark.parametrize('kind', KINDS, ids=name)
def test_round_trip(kind):
    t, meant = quantise(weight(40, 128), **kind)
    assert np.array_equal(read(t, kind['bits'], kind['v1']), meant)
    m = GPTQLinear(**tensors(t), bits=kind['bits'], v1=kind['v1'])
    assert (m.in_features, m.out_features) == (128, 40)
    assert (m.g_idx is None) == (not kind['act'] or kind['group'] == -1), 'an order that is trivial is dropped'
    assert np.array_equal(m.dense().numpy(), meant), 'exact in fp32'
    for d in (torch.bfloat16, torch.float16):
        assert torch.equal(m.dense(d), torch.from_numpy(meant).to(d)), 'rounded once'


@pytest.mark.parametrize('kind', [k for k in KINDS if k['group'] == 32], ids=name)
def test_gradient(kind):
    t, meant = quantise(weight(24, 64), **kind)
    m = GPTQLinear(**tensors(t), bias=torch.randn(24), bits=kind['bits'], v1=kind['v1'])
    x = torch.randn(2, 5, 64, requires_grad=True)
    y, want = m(x), F.linear(x, torch.from_numpy(meant), m.bias)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(*(torch.autograd.grad(o.sin().sum(), x)[0] for o in (y, want)))
    assert torch.autograd.gradcheck(
        lambda x: m(x), torch.randn(2, 64, dtype=torch.float64, requires_grad=True), atol=1e-4, fast_mode=True
    )


def test_zero_of_zero_in_the_first_dialect():
    "GPTQModel subtracts from whole integers, so a borrow out of a zero of 0 has to be carried back"
    t, _ = quantise(weight(16, 64), 4, 32, sym=False, v1=False)
    t['qzeros'][0, 0] = 0x76543210
    v2 = GPTQLinear(**tensors(t), v1=False).dense()
    with np.errstate(over='ignore'):
        t['qzeros'] = t['qzeros'] - np.int32(0x11111111)
    assert torch.equal(GPTQLinear(**tensors(t)).dense(), v2)


def test_nothing_dense_is_kept():
    m, kept = GPTQLinear(**tensors(quantise(weight(256, 512))[0])), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        y = m(torch.randn(1, 512, requires_grad=True))
    assert sum(kept) < 256 * 512
    assert y.requires_grad
    assert not any(p.requires_grad for p in m.parameters())
    assert m.weight is None
    assert sum(p.nbytes for p in m.parameters()) < 0.6 * 256 * 512


def test_under_checkpointing_and_autocast():
    from torch.utils.checkpoint import checkpoint as ac

    m, x = GPTQLinear(**tensors(quantise(weight(32, 64))[0])), torch.randn(3, 64, requires_grad=True)
    one, two = (torch.autograd.grad(f(x).square().sum(), x)[0] for f in (m, lambda x: ac(m, x, use_reentrant=False)))
    assert torch.equal(one, two)
    assert m(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    'kind',
    [
        dict(bits=4, group=32),
        dict(bits=8, group=-1),
        dict(bits=4, group=64, act=True),
        dict(bits=8, group=32, act=True, sym=False, v1=False),
    ],
    ids=name,
)
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_triton_on_a_gpu(kind):
    t, meant = quantise(weight(1160, 1152), **kind)
    m = GPTQLinear(**tensors(t), bits=kind['bits'], v1=kind.get('v1', True)).cuda()
    for d in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(m.dense(d).cpu(), torch.from_numpy(meant).to(d))


def test_triton_interpreted():
    "The GPU kernel, run step by step on the CPU"
    pytest.importorskip('triton')
    if torch.cuda.is_available():
        pytest.skip('tested on the GPU itself')
    code = '''
import torch
from gptq_writer import quantise
from competition_kit.quant import GPTQLinear, dequantise_triton
import numpy as np
kinds = (4, 32, False, 40), (8, 32, False, 24), (4, 32, True, 40), (8, -1, False, 16), (4, 64, False, 136)
for bits, group, act, out in kinds:
    t, meant = quantise(np.random.default_rng(0).normal(size=(out, 128)), bits, group, act)
    m = GPTQLinear(**{k: torch.from_numpy(v) for k, v in t.items()}, bits=bits)
    for R, C in ((1, 64), (4, 32)):
        w = dequantise_triton(m.qweight, m.qzeros, m.scales, m.g_idx, bits, torch.float32, R=R, C=C)
        assert np.array_equal(w.numpy().T, meant), (bits, group, act, R)
'''
    run(code, TRITON_INTERPRET='1')


def test_compiled_keeps_it_packed():
    "torch.compile merges the two unpackings unless told not to"
    code = '''
import numpy as np, torch, torch._functorch.config as config
from gptq_writer import quantise
from competition_kit.quant import GPTQLinear
packed, _ = quantise(np.random.default_rng(0).normal(size=(64, 64)))
m = GPTQLinear(**{k: torch.from_numpy(v) for k, v in packed.items()})
def two_layers(x): return m(m(x).sin())
def kept(cse):
    with config.patch(cse=cse):
        torch._dynamo.reset()
        compiled = torch.compile(two_layers, backend='aot_eager_decomp_partition')
        y = compiled(torch.randn(3, 64, requires_grad=True))
    return max(t.nbytes for t in y.grad_fn.saved_tensors if t is not None)
assert kept(True) == 64*64*4 and kept(False) == 64*64/2
'''
    run(code, TORCHDYNAMO_DISABLE='0')


# ---- whole models
SHAPE = dict(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    initializer_range=0.25,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
MODELS = dict(
    llama=lambda: LlamaConfig(
        **SHAPE,
        tie_word_embeddings=False,
        rope_parameters=dict(
            rope_type='llama3',
            rope_theta=1e4,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    llama_tied=lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True),
    qwen2=lambda: Qwen2Config(**SHAPE, tie_word_embeddings=False),
    gemma2=lambda: Gemma2Config(**SHAPE, sliding_window=8),
    gemma3=lambda: Gemma3TextConfig(**SHAPE, sliding_window=8),
)
IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    made = {}

    def make(kind):
        if kind not in made:
            torch.manual_seed(0)
            made[kind] = tmp_path_factory.mktemp(kind)
            AutoModelForCausalLM.from_config(MODELS[kind](), dtype=torch.float32).save_pretrained(made[kind])
        return made[kind]

    return make


def logits(m):
    with torch.no_grad():
        return m(input_ids=IDS.to(m.device)).logits


def meant_model(src, meant, cls=AutoModelForCausalLM, **kw):
    "The base with the weights that the checkpoint stands for"
    m = cls.from_pretrained(src, dtype=torch.float32, **kw)
    for k, w in meant.items():
        m.get_parameter(k).data.copy_(torch.from_numpy(w))
    return m.eval()


@pytest.mark.parametrize('model', MODELS)
@pytest.mark.parametrize(
    'kind', [dict(bits=4, group=32), dict(bits=8, group=-1, act=True, sym=False, v1=False)], ids=name
)
def test_model(tiny, tmp_path, model, kind):
    meant = checkpoint(tiny(model), tmp_path / 'q', **kind, shards=3)
    got = load_mapped(str(tmp_path / 'q'), AutoModelForCausalLM, torch.float32, 'cpu', attn_implementation='sdpa')
    want = meant_model(tiny(model), meant)
    assert sum(isinstance(m, GPTQLinear) for m in got.modules()) == len(meant) == 14
    torch.testing.assert_close(logits(got), logits(want), rtol=1e-4, atol=1e-4)
    for (n, b), (_, c) in zip(got.named_buffers(), want.named_buffers()):
        assert torch.equal(b, c), n
        assert b.dtype == c.dtype, n
    assert got.config._attn_implementation == 'sdpa'
    assert not got.training
    assert (got.lm_head.weight is got.model.embed_tokens.weight) == got.config.tie_word_embeddings
    half = load_mapped(str(tmp_path / 'q'), AutoModelForCausalLM, torch.bfloat16, 'cpu')
    want = AutoModelForCausalLM.from_pretrained(tiny(model), dtype=torch.bfloat16)
    for (n, b), (_, c) in zip(half.named_buffers(), want.named_buffers()):
        assert torch.equal(b, c), n
        assert b.dtype == c.dtype, n
    assert {p.dtype for n, p in half.named_parameters() if 'scales' in n} == {torch.float16}


def test_old_checkpoints(tiny, tmp_path):
    "auto-gptq writes biases of zeros, and old files hold rotary frequencies and any file name"
    meant = checkpoint(tiny('llama'), tmp_path / 'q', bias=True)
    f = tmp_path / 'q/model.safetensors'
    save_file(
        load_file(f) | {'model.layers.0.self_attn.rotary_emb.inv_freq': torch.ones(8)},
        tmp_path / 'q/gptq_model-4bit-64g.safetensors',
    )
    f.unlink()
    torch.testing.assert_close(
        logits(load_mapped(str(tmp_path / 'q'), AutoModelForCausalLM, torch.float32, 'cpu')),
        logits(meant_model(tiny('llama'), meant)),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize('model', ['llama', 'llama_tied', 'qwen2'])
def test_score_route(tiny, tmp_path, model):
    meant = checkpoint(tiny(model), tmp_path / 'q')
    m = load_mapped(str(tmp_path / 'q'), AutoModelForSequenceClassification, torch.float32, 'cpu', num_labels=4)
    assert m.score.weight.shape == (4, 64)
    assert 0 < m.score.weight.std() < 1
    assert m.config.num_labels == 4
    want = meant_model(tiny(model), meant, AutoModelForSequenceClassification, num_labels=4)
    want.score.weight.data.copy_(m.score.weight)
    torch.testing.assert_close(logits(m), logits(want), rtol=1e-4, atol=1e-4)
    torch.manual_seed(0)
    a = load_mapped(str(tmp_path / 'q'), AutoModelForSequenceClassification, num_labels=4).score.weight
    torch.manual_seed(0)
    b = load_mapped(str(tmp_path / 'q'), AutoModelForSequenceClassification, num_labels=4).score.weight
    assert torch.equal(a, b)
    f = tmp_path / 'q/model.safetensors'
    rest = {k: v for k, v in load_file(f).items() if k != 'lm_head.weight'}
    save_file(rest | {'score.weight': torch.full((4, 64), 0.5)}, f)
    kept = load_mapped(str(tmp_path / 'q'), AutoModelForSequenceClassification, num_labels=4).score.weight
    assert (kept == 0.5).all(), 'a head that is there is kept'


def mixed(tiny, tmp_path, rules=None):
    "4 bits, `down_proj` in 8, and the first `o_proj` plain"

    def own(k):
        return 8 if 'down_proj' in k else 0 if 'layers.0.self_attn.o_proj' in k else 4

    meant = {4: checkpoint(tiny('llama'), tmp_path / '4', 4, 32), 8: checkpoint(tiny('llama'), tmp_path / '8', 8, 64)}
    plain = load_file(Path(tiny('llama')) / 'model.safetensors')
    files = {4: load_file(tmp_path / '4/model.safetensors'), 8: load_file(tmp_path / '8/model.safetensors'), 0: plain}
    save_file(
        {k: v for bits, t in files.items() for k, v in t.items() if own(k) == bits}, tmp_path / '4/model.safetensors'
    )
    c = json.loads((tmp_path / '4/config.json').read_text())
    if rules:
        c['quantization_config']['dynamic'] = rules
    (tmp_path / '4/config.json').write_text(json.dumps(c))
    return {k: w for bits in (4, 8) for k, w in meant[bits].items() if own(k) == bits}


@pytest.mark.parametrize(
    'rules',
    [
        {'-:.*layers.0.*o_proj': {}, '.*down_proj': dict(bits=8, group_size=64)},
        {'+:.*down_proj': dict(bits=8, group_size=64), '.*proj': dict(bits=4)},
    ],
    ids=str,
)
def test_mixed_bits(tiny, tmp_path, rules):
    "GPTQModel's `dynamic` gives layers bits and groups of their own, or leaves them plain; the first that fits counts"
    want = meant_model(tiny('llama'), mixed(tiny, tmp_path, rules))
    got = load_mapped(str(tmp_path / '4'), AutoModelForCausalLM, torch.float32, 'cpu')
    torch.testing.assert_close(logits(got), logits(want), rtol=1e-4, atol=1e-4)
    assert {m.bits for m in got.modules() if isinstance(m, GPTQLinear)} == {4, 8}


def test_mixed_bits_without_a_rule(tiny, tmp_path):
    mixed(tiny, tmp_path)
    with pytest.raises(Refusal, match='group size 32'):
        load_mapped(str(tmp_path / '4'), AutoModelForCausalLM)


EXPERTS = dict(
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    n_group=1,
    topk_group=1,
    n_shared_experts=1,
    shared_expert_intermediate_size=32,
    first_k_dense_replace=1,
)
LATENT = dict(
    kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16, num_key_value_heads=4
)


def experts(folder, kind, **kw):
    torch.manual_seed(0)
    m = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE | EXPERTS | kw), dtype=torch.float32)
    for n, t in m.named_buffers():
        if 'bias' in n:
            t.normal_()  # DeepSeek's correction of the router, which stays in fp32
    m.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    'kind, kw',
    [
        ('mixtral', {}),
        ('qwen3_moe', {}),
        ('qwen2_moe', {}),
        ('olmoe', {}),
        ('granitemoe', {}),
        ('gpt_oss', {}),
        ('deepseek_v3', LATENT),
        ('phimoe', {}),
    ],
    ids=str,
)
def test_experts_that_files_hold_one_by_one(kind, kw, tmp_path):
    "the same numbers in the same formats as transformers' own loading"
    base = experts(tmp_path / 'b', kind, **kw)
    for dtype in (torch.float32, torch.bfloat16):
        got = load_mapped(base, AutoModelForCausalLM, dtype, 'cpu').state_dict()
        want = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).state_dict()
        assert got.keys() == want.keys()
        for k in want:
            assert got[k].dtype == want[k].dtype, k
            assert torch.equal(got[k], want[k]), k


@pytest.mark.parametrize(
    'drop, says',
    [
        ('experts.3.', 'another shape.*mlp.experts'),
        ('experts.1.w1', 'missing: .*experts.gate_up_proj'),
        ('experts', 'missing: .*experts.down_proj'),
    ],
)
def test_experts_are_missing(drop, says, tmp_path):
    base = experts(tmp_path / 'b', 'mixtral')
    f = tmp_path / 'b/model.safetensors'
    save_file({k: v for k, v in load_file(f).items() if drop not in k}, f)
    with pytest.raises(Refusal, match=says):
        load_mapped(base, AutoModelForCausalLM, torch.float32, 'cpu')


def test_quantised_experts_are_refused(tmp_path):
    experts(tmp_path / 'b', 'qwen3_moe')
    checkpoint(tmp_path / 'b', tmp_path / 'q', group=32)
    with pytest.raises(Refusal, match='experts are quantised one by one'):
        load_mapped(str(tmp_path / 'q'), AutoModelForCausalLM, device='cpu')


def test_a_plain_base_stays_in_its_file(tiny):
    m = load_mapped(str(tiny('llama')), AutoModelForCausalLM, torch.float32, 'cpu')
    where = open('/proc/self/maps').read().splitlines()
    spans = [[int(x, 16) for x in line.split()[0].split('-')] for line in where if str(tiny('llama')) in line]
    assert all(any(a <= p.data_ptr() < b for a, b in spans) for p in m.parameters())


CLIP = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)


@pytest.mark.parametrize('inner', [True, False])
@pytest.mark.parametrize('outer', [True, False])
@pytest.mark.parametrize(
    'kind, text, sight', [('mistral3', 'mistral', 'pixtral'), ('gemma3', 'gemma3_text', 'siglip_vision_model')]
)
def test_the_outer_configuration_says_what_is_tied(kind, text, sight, outer, inner, tmp_path):
    c = AutoConfig.for_model(
        kind,
        text_config=dict(SHAPE, model_type=text, tie_word_embeddings=inner),
        vision_config=dict(CLIP, model_type=sight),
        tie_word_embeddings=outer,
    )
    torch.manual_seed(0)
    m = AutoModelForImageTextToText.from_config(c, dtype=torch.float32, attn_implementation='eager').eval()
    m.save_pretrained(tmp_path)
    want, (config, renamed) = logits(m), text_config(str(tmp_path))
    plain = AutoModelForCausalLM.from_pretrained(
        tmp_path, config=config, key_mapping=renamed, dtype=torch.float32, attn_implementation='eager'
    )
    mapped = load_mapped(str(tmp_path), AutoModelForCausalLM, torch.float32, 'cpu', attn_implementation='eager')
    for got in (plain, mapped):
        torch.testing.assert_close(logits(got), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    'rules, says',
    [
        ({'.*down_proj': dict(bits=8)}, 'group size 32'),
        ({'.*down_proj': dict(group_size=64)}, '4 bits'),
        ({'.*down_proj': dict(bits=8, group_size=64), '-:.*1.mlp.up_proj': {}}, r'layers.1.mlp.up_proj is quantised'),
        ({'.*mlp': dict(bits=8, group_size=64), '.*up_proj|.*gate_proj': dict(bits=4, group_size=32)}, '8 bits'),
    ],
    ids=str,
)
def test_rules_and_file_disagree(tiny, tmp_path, rules, says):
    mixed(tiny, tmp_path, rules)
    with pytest.raises(Refusal, match=says):
        load_mapped(str(tmp_path / '4'), AutoModelForCausalLM, device='cpu')


@pytest.mark.parametrize(
    'change, says',
    [
        (dict(drop='model.layers.1.mlp.up_proj.scales'), 'missing: model.layers.1.mlp.up_proj.scales'),
        (dict(drop='model.layers.1.mlp.up_proj.qweight'), 'missing: model.layers.1.mlp.up_proj.weight'),
        (dict(drop='lm_head.weight'), 'missing: lm_head.weight'),
        (dict(add={'model.layers.7.mlp.up_proj.qweight': torch.zeros(8, 8)}), 'no place in the model: model.layers.7'),
        (dict(add={'score.weight': torch.zeros(3, 64)}), None),
        (dict(add={'lm_head.qweight': torch.zeros(8, 256)}, drop='lm_head.weight'), 'lm_head.weight'),
        (dict(add={'model.embed_tokens.weight': torch.zeros(250, 64)}), 'another shape'),
        (
            dict(add={'model.layers.0.mlp.up_proj.qweight': torch.zeros(9, 128, dtype=torch.int32)}),
            'shapes of model.layers.0.mlp.up_proj',
        ),
        (
            dict(add={'model.layers.0.mlp.up_proj.qzeros': torch.zeros(1, 15, dtype=torch.int32)}),
            'shapes of model.layers.0.mlp.up_proj',
        ),
        *(  # a GPU would read beside the scales, a CPU take the last group for −1
            (dict(add={'model.layers.0.mlp.up_proj.g_idx': g.int()}), 'g_idx of model.layers.0.mlp.up_proj')
            for g in (torch.full((64,), 2), torch.arange(64) // 32 - 1, torch.zeros(1))
        ),
        (dict(config=dict(group_size=48)), '48 does not divide the 64'),
        (dict(config=dict(bits=2)), '2 bits'),
        (dict(config=dict(quant_method='awq')), 'quantised by awq'),
        (dict(config=dict(checkpoint_format='gptq_p')), 'gptq_p'),
    ],
)
def test_refusals(tiny, tmp_path, change, says):
    checkpoint(tiny('llama'), tmp_path / 'q')
    f, c = tmp_path / 'q/model.safetensors', json.loads((tmp_path / 'q/config.json').read_text())
    save_file({k: v for k, v in (load_file(f) | change.get('add', {})).items() if k != change.get('drop')}, f)
    c['quantization_config'] |= change.get('config', {})
    (tmp_path / 'q/config.json').write_text(json.dumps(c))
    if says is None:
        load_mapped(str(tmp_path / 'q'), AutoModelForCausalLM, device='cpu')
        return
    with pytest.raises(Refusal, match=says):
        load_mapped(str(tmp_path / 'q'), AutoModelForCausalLM, device='cpu')


def test_a_shard_is_missing(tiny, tmp_path):
    checkpoint(tiny('llama'), tmp_path / 'q', shards=2)
    (tmp_path / 'q/model-00002-of-00002.safetensors').unlink()
    with pytest.raises(Refusal, match='files are missing'):
        load_mapped(str(tmp_path / 'q'), AutoModelForCausalLM)


# ---- adapters
def adapted(m, r=4, targets=('q_proj', 'v_proj', 'up_proj', 'down_proj')):
    torch.manual_seed(1)
    m = get_peft_model(
        m,
        LoraConfig(
            r=r,
            target_modules=targets if isinstance(targets, str) else list(targets),
            task_type='CAUSAL_LM',
            init_lora_weights=False,
        ),
    )
    return m


def grads(m):
    m.train().zero_grad()
    m(input_ids=IDS, labels=IDS).loss.backward()
    return {n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None}


@pytest.mark.parametrize('targets', [('q_proj', 'v_proj', 'up_proj', 'down_proj'), 'all-linear'])
@pytest.mark.parametrize('bits', [4, 8])
def test_lora_learns_as_over_the_dense_base(tiny, tmp_path, bits, targets):
    meant = checkpoint(tiny('llama'), tmp_path / 'q', bits)
    got = adapted(load_mapped(str(tmp_path / 'q'), AutoModelForCausalLM, torch.float32, 'cpu'), targets=targets)
    want = adapted(meant_model(tiny('llama'), meant), targets=targets)
    g, w = grads(got), grads(want)
    assert g.keys() == w.keys()
    assert len(g) == (28 if targets == 'all-linear' else 16)
    for k in g:
        torch.testing.assert_close(g[k], w[k], rtol=1e-3, atol=1e-5)
    logits(got.eval())
    for k, v in grads(got).items():
        assert torch.equal(v, g[k]), 'an evaluation in between changes nothing'
    got.save_pretrained(tmp_path / 'a')
    plain = PeftModel.from_pretrained(meant_model(tiny('llama'), meant), tmp_path / 'a').eval()
    torch.testing.assert_close(logits(got.eval()), logits(plain), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match='gptq'):
        got.merge_and_unload()
    assert (tmp_path / 'a/adapter_model.safetensors').stat().st_size < 2e5


# ---- GPTQModel itself
@pytest.mark.parametrize('kind', [k for k in KINDS if k['group'] != 32 and not (k['v1'] and not k['sym'])], ids=name)
def test_gptqmodel_reads_the_same(kind):
    pytest.importorskip('gptqmodel')
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    t, _ = quantise(weight(64, 128), **kind)
    m = TorchLinear(
        bits=kind['bits'],
        group_size=kind['group'],
        sym=kind['sym'],
        desc_act=kind['act'],
        in_features=128,
        out_features=64,
        bias=False,
        pack_dtype=torch.int32,
    )
    m.load_state_dict(tensors(t), strict=False)
    if kind['v1']:
        m = convert_gptq_v1_to_v2_format_module(m, kind['bits'], torch.int32) or m
    m.post_init()
    ours = GPTQLinear(**tensors(t), bits=kind['bits'], v1=kind['v1'])
    torch.testing.assert_close(m.dequantize_weight().float().T, ours.dense(), rtol=2e-3, atol=1e-4)


# ---- nf4
def test_nf4_without_bitsandbytes(monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda n: None)
    with pytest.raises(Refusal, match='gpu'):
        load_nf4('smollm2', AutoModelForCausalLM)


def test_nf4(tiny, tmp_path):
    bnb = pytest.importorskip('bitsandbytes')
    m = load_nf4(str(tiny('llama')), AutoModelForCausalLM, torch.float32)
    packed = [o for o in m.modules() if isinstance(o, bnb.nn.Linear4bit)]
    states = [o.weight.quant_state for o in packed]
    assert len(packed) == 14
    assert all(s.nested and s.quant_type == 'nf4' for s in states)
    assert not any(getattr(o, 'support_avx512bf16_for_cpu', False) for o in packed) or m.device.type == 'cuda'
    x = torch.randn(3, 64, device=m.device)
    o = m.model.layers[0].self_attn.q_proj
    torch.testing.assert_close(o(x), F.linear(x, dense_weight(o, torch.float32)), rtol=1e-3, atol=1e-3)
    s = load_nf4(str(tiny('llama')), AutoModelForSequenceClassification, torch.float32, num_labels=3)
    assert type(s.score) is torch.nn.Linear
    assert s.score.weight.is_floating_point()
    if m.device.type == 'cpu':
        m = adapted(m)
        g = grads(m)
        logits(m.eval())
        for k, v in grads(m).items():
            assert torch.equal(v, g[k]), 'an evaluation in between changes nothing'
    checkpoint(tiny('llama'), tmp_path / 'q')
    with pytest.raises(Refusal, match='already'):
        load_nf4(str(tmp_path / 'q'), AutoModelForCausalLM)


def test_dense_weight():
    lin = torch.nn.Linear(8, 4)
    assert dense_weight(lin, torch.float32) is not None
    assert torch.equal(dense_weight(lin, torch.float32), lin.weight)
    lin.weight = torch.nn.Parameter(torch.zeros(4, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(Refusal, match='cannot be dequantised'):
        dense_weight(lin, torch.float32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('shape', [(64, 64), (192, 640), (5120, 1024)])
def test_nf4_on_a_gpu(shape):
    bnb = pytest.importorskip('bitsandbytes')
    from bitsandbytes.functional import dequantize_4bit

    w = (torch.randn(*shape) * 0.02).bfloat16()
    w = bnb.nn.Params4bit(w, requires_grad=False, quant_type='nf4', compress_statistics=True).cuda()
    m = bnb.nn.Linear4bit(
        shape[1], shape[0], bias=False, compute_dtype=torch.bfloat16, quant_type='nf4', compress_statistics=True
    )
    m.weight = w
    for dtype in (torch.bfloat16, torch.float16):
        torch.testing.assert_close(
            dense_weight(m, dtype), dequantize_4bit(w.data, w.quant_state).to(dtype), rtol=1e-2, atol=1e-6
        )
