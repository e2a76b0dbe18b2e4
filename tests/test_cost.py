"The cost of a training: exact counts, memory and time, the fewest checkpointed layers, notes on extrapolations"
import json, re, subprocess, sys
from dataclasses import replace
import numpy as np
import pytest
import torch
from transformers import AutoConfig
from competition_kit.core import Refusal
from competition_kit.cost import (Job, base_bytes, base_config, contest_lengths, cost, cost_table, find_gpu,
                                  known_bases, known_gpus, layer_bytes, layers_to_checkpoint, lora_params,
                                  mean_context, memory, pack_seconds, shape, token_flops)

@pytest.fixture(scope='module')
def shapes(): return {b: shape(b) for b in known_bases}

# ---- shapes
COUNTS = [('qwen2.5-7b', 7.62, 2.52), ('qwen2.5-14b', 14.77, 4.30), ('qwen2.5-32b', 32.76, 8.39),
          ('qwen2.5-72b', 72.71, 13.16), ('llama-3.1-8b', 8.03, 2.62), ('llama-3.1-70b', 70.55, 12.94),
          ('gemma-2-9b', 9.24, 3.38), ('mistral-7b', 7.25, 2.62)]

@pytest.mark.parametrize('base, total, rank', COUNTS)
def test_counts(shapes, base, total, rank):
    assert round(shapes[base]['params']/1e9, 2) == total
    assert round(lora_params(shapes[base], 1)/1e6, 2) == rank

def test_linear_layers(shapes):
    "performance figures are stated against these"
    for base, n in {'qwen2.5-7b': 6.53, 'llama-3.1-70b': 68.45, 'gemma-2-9b': 8.32}.items():
        assert round(shapes[base]['linear']/1e9, 2) == n

def test_counts_are_the_loaded_models():
    from competition_kit.base import base_path
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(base_path('smollm2'))
    base = shape('smollm2')
    assert base['params'] == sum(p.numel() for p in model.parameters()) == 134_515_008
    assert shape(model)['params'] == base['params']
    lora = get_peft_model(model, LoraConfig(r=8, target_modules=['q_proj', 'down_proj']))
    assert lora_params(base, 8, 'q_proj, down_proj') == sum(p.numel() for p in lora.parameters() if p.requires_grad)

@pytest.mark.parametrize('given, known', [
    ('Qwen/Qwen2.5-7B-Instruct', 'qwen2.5-7b'), ('meta-llama/Meta-Llama-3.1-70B-Instruct', 'llama-3.1-70b'),
    ('google/gemma-2-9b-it', 'gemma-2-9b'), ('mistralai/Mistral-7B-Instruct-v0.3', 'mistral-7b'),
    ('google/gemma-3-12b-it', 'gemma-3-12b')])
def test_hub_ids_offline(given, known):
    assert base_config(given).hidden_size == known_bases[known]['hidden_size']

@pytest.mark.parametrize('given, known, dtype', [
    ('Qwen/Qwen2.5-32B-Instruct-GPTQ-Int4', 'qwen2.5-32b', 'gptq4'),
    ('Qwen/Qwen2.5-7B-Instruct-GPTQ-Int8', 'qwen2.5-7b', 'gptq8'),
    ('hugging-quants/Meta-Llama-3.1-8B-Instruct-GPTQ-INT4', 'llama-3.1-8b', 'gptq4'),
    ('qwen2.5-7b-gptq-int4', 'qwen2.5-7b', 'gptq4'), ('google/gemma-2-9b-it', 'gemma-2-9b', 'bf16')])
def test_names_tell_the_dtype_offline(monkeypatch, shapes, given, known, dtype):
    monkeypatch.setattr(AutoConfig, 'from_pretrained', lambda *a, **kw: pytest.fail('asked the Hub'))
    c = cost(given, 'H200', pack_tokens=2048)
    assert c['base'] == given
    assert c['dtype'] == dtype
    assert c['params'] == shapes[known]['params']
    assert c['base_gb'] == round(base_bytes(shapes[known], dtype)/1e9, 2)

@pytest.mark.parametrize('name', ['./qwen2.5-7b-other', './qwen2.5-7b-gptq-int3', './qwen2.5-9b-gptq-int4', 'qwen2.5-7',
                                  'nonsense', {}, {'model_type': 'no-such'}], ids=str)
def test_not_by_a_similar_name(name):
    with pytest.raises(Refusal, match='llama-3.1-70b|no configuration'): base_config(name)

def test_a_folder_wins(tmp_path):
    AutoConfig.for_model(**dict(known_bases['qwen2.5-7b'], num_hidden_layers=3)).save_pretrained(tmp_path)
    assert shape(str(tmp_path))['layers'] == 3
    c = json.loads((tmp_path/'config.json').read_text())
    c['quantization_config'] = dict(quant_method='gptq', bits=4, group_size=128)
    (tmp_path/'config.json').write_text(json.dumps(c))
    assert cost(str(tmp_path), 'T4')['dtype'] == 'gptq4'
    assert base_config(str(tmp_path)).quantization_config['bits'] == 4

def test_multimodal_gemma3():
    text = {k: v for k, v in known_bases['gemma-3-12b'].items() if k != 'model_type'}
    base = shape(dict(model_type='gemma3', text_config=dict(text, num_hidden_layers=2)))
    alone = shape(dict(text, model_type='gemma3_text', num_hidden_layers=2))
    assert (base['layers'], base['norms'], base['qk_norm']) == (2, 4, True)
    assert set(base['linears']) == {'q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'}
    assert base['params'] == alone['params'], 'the vision tower is not loaded'

SMALL = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0)

def test_mixture_of_experts_is_refused():
    with pytest.raises(Refusal, match='not linear'):
        shape(dict(SMALL, model_type='mixtral', num_key_value_heads=2, vocab_size=100))

def test_joined_projections_are_refused():
    with pytest.raises(Refusal, match='k_proj'): shape(dict(SMALL, model_type='phi3', vocab_size=512))

# ---- lengths and FLOPs
@pytest.mark.parametrize('max_len, mean, context', [(1024, 700, 398), (2048, 815, 537), (4096, 844, 611)])
def test_lengths(max_len, mean, context):
    n = contest_lengths('lmsys', max_len=max_len)
    assert len(n) == 57477
    assert abs(n.mean()/mean-1) < .02
    assert abs(mean_context(n)/context-1) < .02

def test_other_lengths():
    assert abs(contest_lengths('wsdm').mean()/1139-1) < .02
    assert 255 < contest_lengths('logic').mean() < 285
    assert (contest_lengths(seed=1) != contest_lengths()).any()
    assert mean_context([10]) == 5

@pytest.mark.parametrize('base', known_bases)
def test_flops(shapes, base):
    s = shapes[base]
    job = Job(s, r=0)
    flops = token_flops(job, 537)
    assert flops == 2*(2*s['linear']+4*s['layers']*s['q']*537)
    assert token_flops(job, 537, s['layers']) == pytest.approx(1.5*flops)
    assert token_flops(replace(job, method='full'), 537) == pytest.approx(1.5*flops)
    assert .004 < token_flops(replace(job, r=64), 537)/flops-1 < .06  # the larger the base, the less

# ---- memory
@pytest.mark.parametrize('method, dtype', [('lora', 'bf16'), ('lora', 'nf4'), ('lora', 'gptq8'), ('full', 'bf16')])
def test_memory_grows_as_it_must(shapes, method, dtype):
    job = Job(shapes['llama-3.1-8b'], method, dtype)
    each = [memory(job, 8192, n) for n in range(job.base['layers']+1)]
    none = each[0]
    assert all(a['peak'] > b['peak'] for a, b in zip(each, each[1:]))
    assert all(m['needs'] > m['peak'] for m in each)
    assert none['peak'] == pytest.approx(sum(none[k] for k in ('base', 'learning', 'activations', 'working')))
    assert memory(job, 16384)['activations'] == pytest.approx(2*none['activations'])
    assert memory(job, 16384)['base'] == none['base']
    assert memory(replace(job, shards=4), 8192)['base'] == pytest.approx(none['base']/4)

def test_bytes_of_a_base(shapes):
    s = shapes['llama-3.1-70b']
    assert base_bytes(s) == 2*s['params']
    assert base_bytes(s, 'fp32') == 4*s['params']
    assert base_bytes(s, 'bf16', 'score') == 2*(s['params']-s['head'])
    assert shapes['gemma-2-9b']['head'] == 0
    assert base_bytes(s, 'nf4') < base_bytes(s, 'gptq4') < base_bytes(s, 'gptq8') < base_bytes(s)

def test_bytes_of_training(shapes):
    job = Job(shapes['llama-3.1-70b'])
    full = replace(job, method='full')
    assert memory(full, 1, 80)['learning'] == 8*job.base['params']
    assert memory(replace(full, dtype='fp32'), 1, 80)['learning'] == 12*job.base['params']
    assert layer_bytes(replace(job, r=0)) < layer_bytes(job) < layer_bytes(replace(job, dropout=.1))
    assert layer_bytes(job) < layer_bytes(replace(job, compiled=False))

@pytest.mark.parametrize('heads', [1, 2, 4])
def test_a_plain_layer_keeps_what_autograd_saves(heads):
    "keys and values have their own heads, and are not repeated"
    from competition_kit.attention import register_attention
    from competition_kit.model import Classifier, add_lora
    from transformers import AutoModelForCausalLM
    register_attention()
    lengths, kept, kind = [48, 16], [], dict(SMALL, model_type='llama', vocab_size=100, num_key_value_heads=heads)
    def bytes_of(layers):
        config = AutoConfig.for_model(**dict(kind, num_hidden_layers=layers))
        model = AutoModelForCausalLM.from_config(config, attn_implementation='packed').requires_grad_(False)
        model = add_lora(Classifier(model, [1, 2]), 2).train()
        own, saved = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}
        def save(t):
            kept.append(t)  # a freed place would be used again
            if t.untyped_storage().data_ptr() not in own: saved[t.untyped_storage().data_ptr()] = t.untyped_storage()
            return t
        ids, at = torch.ones(1, 64, dtype=int), torch.cat([torch.arange(n) for n in lengths])[None]
        with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t): model(ids, at, np.r_[0, np.cumsum(lengths)])
        return sum(s.nbytes() for s in saved.values())
    job, measured = Job(shape(kind), r=2, dtype='fp32', compiled=False), (bytes_of(3)-bytes_of(1))/2/64
    assert measured == pytest.approx(layer_bytes(job)+4*job.base['q'], rel=.02)  # the results by row, and the pack's
    if heads == 4: assert measured == pytest.approx(layer_bytes(replace(job, varlen=False)), rel=.02)

# ---- activation checkpointing
@pytest.mark.parametrize('base', ['qwen2.5-14b', 'gemma-2-9b'])
def test_fewest_layers(shapes, base):
    job, found = Job(shapes[base]), set()
    for free in (30e9, 40e9, 50e9, 60e9, 80e9, 120e9, 400e9):
        try: n = layers_to_checkpoint(job, 8192, free)
        except Refusal: continue
        found.add(n)
        assert memory(job, 8192, n)['needs'] <= free
        assert n == 0 or memory(job, 8192, n-1)['needs'] > free
    assert 0 in found
    assert len(found) > 3

def test_a_smaller_pack_helps(shapes):
    job = Job(shapes['qwen2.5-14b'])
    with pytest.raises(Refusal, match='all 48 layers .* 40.0 GB') as e: layers_to_checkpoint(job, 65536, 40e9)
    n = int(re.search(r'at most ([\d,]+\d)', str(e.value))[1].replace(',', ''))
    assert layers_to_checkpoint(job, n, 40e9) <= 48
    with pytest.raises(Refusal): layers_to_checkpoint(job, n+256, 40e9)

@pytest.mark.parametrize('kw, tokens, free, advice', [
    (dict(method='full'), 2048, 80e9, 'lora on nf4'),
    (dict(dtype='nf4'), 512, 10e9, 'Take a GPTQ base on 8 such GPUs with sharded=True[.]'),
    (dict(dtype='nf4'), 512, 1e9, 'smaller base')])
def test_other_remedies(shapes, kw, tokens, free, advice):
    with pytest.raises(Refusal, match=advice): layers_to_checkpoint(Job(shapes['qwen2.5-72b'], **kw), tokens, free)

def test_no_more_gpus_for_fewer_tokens(shapes):
    job = Job(shapes['qwen2.5-72b'], dtype='gptq4', shards=8)
    with pytest.raises(Refusal, match='at most 9,984') as e: layers_to_checkpoint(job, 16384, 23e9, 8)
    assert 'such GPUs' not in str(e.value)

NO_NF4 = 'a base in nf4 cannot be spread over several GPUs'

@pytest.mark.parametrize('gpu, gpus, tokens', [('A10', 8, 16384), ('A10', 8, 1024), ('T4', 1, 16384), ('T4', 8, 2048),
                                               ('A100-40', 2, 2048)])
def test_nf4_is_never_sharded(gpu, gpus, tokens):
    kw = dict(base='qwen2.5-72b', gpu=gpu, format='nf4', pack_tokens=tokens, max_len=min(tokens, 2048))
    for sharded in (None, False):
        with pytest.raises(Refusal, match='a GPTQ base') as e: cost(gpus=gpus, sharded=sharded, **kw)
        assert ' over ' not in str(e.value)
        assert 'nf4' not in str(e.value).split('Take ')[1]
    with pytest.raises(Refusal, match=NO_NF4): cost(gpus=max(gpus, 2), sharded=True, **kw)
    advice = str(e.value).split('a GPTQ base')[1]  # following it is not refused
    n, fewer = [re.search(pattern, advice) for pattern in (r'on (\d+) such', r'pack_tokens of ([\d,]+)')]
    tokens = int(fewer[1].replace(',', '')) if fewer else tokens
    followed = dict(base='Qwen/Qwen2.5-72B-Instruct-GPTQ-Int4', format='auto', gpus=int(n[1]) if n else gpus,
                    pack_tokens=tokens, max_len=min(tokens, 2048), sharded=True)
    c = cost(**kw | followed)
    assert c['sharded']
    assert c['dtype'] == 'gptq4'

def test_nf4_is_refused_over_shards(shapes):
    job = Job(shapes['qwen2.5-7b'], dtype='nf4', shards=2)
    with pytest.raises(Refusal, match=NO_NF4): layers_to_checkpoint(job, 512, 1e12)

def test_nf4_is_advised_only_where_one_gpu_holds_it():
    with pytest.raises(Refusal, match='over 8 GPUs.* a GPTQ base') as e:
        cost('qwen2.5-72b', 'T4', 8, format='fp16', pack_tokens=4096)
    assert 'nf4' not in str(e.value)

@pytest.mark.parametrize('sharded', [None, False])
def test_nf4_on_several_gpus_without_sharding(sharded):
    assert not cost('qwen2.5-72b', 'A100-80', 8, format='nf4', pack_tokens=8192, sharded=sharded)['sharded']

def test_nf4_on_one_gpu():
    assert not cost('qwen2.5-7b', 'H200', format='nf4', sharded=True)['sharded']  # as in a training
    with pytest.raises(Refusal, match='the format nf4 with sharded=False'):
        cost('qwen2.5-72b', 'A100-80', 2, sharded=True)

@pytest.mark.parametrize('kw', [dict(base='qwen2.5-72b'), dict(base='qwen2.5-14b', method='full'),
                                dict(base='llama-3.1-70b', format='bf16', route='score')], ids=str)
def test_sharded_as_told(kw):
    kw = dict(kw, gpu='A100-80', gpus=8, pack_tokens=4096)
    assert cost(**kw)['sharded']
    assert cost(**kw) == cost(**kw, sharded=True)
    with pytest.raises(Refusal, match=r'(Take|or) sharded=True[.]') as e: cost(**kw, sharded=False)
    assert ' over 8 GPUs' not in str(e.value)
    with pytest.raises(Refusal, match=r'or \d+ such GPUs with sharded=True'): cost(**dict(kw, gpus=1))

# ---- sharding
def test_sharded_where_it_need_not_be():
    kw = dict(base='qwen2.5-7b', gpu='A100-80', gpus=8, pack_tokens=4096)
    spread, copies = (cost(**kw, sharded=sharded) for sharded in (True, False))
    assert spread['sharded']
    assert not copies['sharded']
    assert spread['base_gb'] == pytest.approx(copies['base_gb']/8, abs=.01)
    assert copies == cost(**kw)
    assert 'sharded=True' in cost_table(spread)
    assert 'own rows' in cost_table(copies)

def test_sharded_only_where_one_gpu_does_not_hold_it():
    full = dict(base='qwen2.5-7b', gpu='H200', gpus=2, method='full', pack_tokens=4096)
    assert [cost(**full, sharded=sharded)['sharded'] for sharded in (None, True, False)] == [True, True, False]
    assert not cost('qwen2.5-7b', 'H200', sharded=True)['sharded']
    assert not cost('qwen2.5-7b', 'A100-80', 8)['sharded']
    assert cost('qwen2.5-72b', 'A100-80', 8)['sharded']

# ---- time
def test_quantised_costs_a_constant_a_pack(shapes):
    plain, gpu = Job(shapes['llama-3.1-8b']), find_gpu('H200')
    nf4 = replace(plain, dtype='nf4')
    short, long = ([pack_seconds(job, gpu, 537, n) for job in (plain, nf4)] for n in (512, 8192))
    assert short[1]-short[0] == pytest.approx(long[1]-long[0])
    assert 1.2 < short[1]/short[0] < 1.5
    assert long[1]/long[0] < 1.1

def test_eight_gpus():
    one, eight = cost('qwen2.5-7b', 'H200'), cost('qwen2.5-7b', 'H200', 8)
    assert eight['tokens_s'] == pytest.approx(8*.97*one['tokens_s'], rel=1e-3)
    assert eight['tokens'] == one['tokens']

def test_time_is_linear_in_tokens():
    n = np.full(100, 700)
    one, two = cost('qwen2.5-7b', 'H200', lengths=n), cost('qwen2.5-7b', 'H200', lengths=n, rows=100, epochs=2)
    assert one['tokens'] == 100*700*2
    assert two['hours'] == pytest.approx(2*one['hours'])
    long = cost('qwen2.5-7b', 'H200', lengths=np.array([9000]), max_len=9000, pack_tokens=100)
    assert long['pack_tokens'] == 9000

def test_a_template_is_computed_once_a_pack():
    kw = dict(base='qwen2.5-7b', gpu='H100')
    each, once = (cost(**kw, lora_r=64, pack_tokens=8192, template=t) for t in (0, 160))
    assert once['tokens_s']/each['tokens_s'] == pytest.approx(19662/16521, rel=.03)
    assert (once['tokens'], once['peak_gb']) == (each['tokens'], each['peak_gb'])
    alone = [cost(**kw, lengths=[2000], pack_tokens=2000, template=t)['tokens_s'] for t in (0, 160)]
    assert alone[0] == alone[1]

def test_packs_of_a_step_on_several_gpus():
    "a step of 8 rows in 2 views is one pack of a GPU, and 8 packs of 8 GPUs: as many steps, and as many packs a GPU"
    kw = dict(base='qwen2.5-7b', gpu='H200', lengths=np.full(400, 200), pack_tokens=100_000, batch=8, compiled=False)
    for gpus, views in ((1, 1), (1, 2), (8, 2), (4, 1)):
        assert cost(**kw, gpus=gpus, views=views)['launch_hours'] == pytest.approx(50*28*.0193/3600)

# ---- GPUs, dtypes and routes
@pytest.mark.parametrize('gpu', known_gpus)
def test_every_gpu(gpu):
    c = cost('qwen2.5-7b', gpu, 4, format='nf4', pack_tokens=2048)
    assert c['gpu'] == gpu
    assert 0 < c['peak_gb'] < c['memory_gb']
    assert c['gpu_hours'] == pytest.approx(4*c['hours'])
    assert any(gpu in note for note in c['extrapolated']) == (gpu not in ('H100', 'H200'))
    assert cost_table(c).count('extrapolated') == len(c['extrapolated'])

@pytest.mark.parametrize('kw, dtype', [(dict(gpu='T4'), 'fp16'), (dict(gpu='V100', format='bf16'), 'fp16'),
                                       (dict(gpu='L4'), 'bf16'),
                                       (dict(gpu='T4', method='full', pack_tokens=2048), 'fp32')])
def test_dtypes_of_old_gpus(kw, dtype):
    assert cost('smollm2', **kw)['dtype'] == dtype

@pytest.mark.parametrize('gpu, dtype', [('T4', 'fp16'), ('H200', 'nf4')])
def test_full_fine_tuning_needs_bf16_or_fp32(gpu, dtype):
    with pytest.raises(Refusal, match='full fine-tuning .* fp32'): cost('smollm2', gpu, method='full', format=dtype)

def test_the_measured_setting_is_not_called_extrapolated():
    assert cost('qwen2.5-7b', 'H200', lora_r=64)['extrapolated'] == []
    c = cost('llama-3.1-70b', 'T4', 8, format='gptq8', lora_dropout=.05, pack_tokens=1024, max_len=1024)
    notes = ' '.join(c['extrapolated'])
    for word in ('T4', 'activations', 'gptq8', '8 GPUs'): assert word in notes

@pytest.mark.parametrize('kw', [
    dict(method='dora'), dict(route='both'), dict(format='int3'), dict(gpu='A100'), dict(base='nonsense'),
    dict(lengths='chat'), dict(lengths=[]), dict(lengths=[0]), dict(rows=0), dict(gpus=0), dict(pack_tokens=0),
    dict(lora_modules='q'), dict(lora_r=0), dict(lora_r=-1), dict(template=-1), dict(lengths=[100, 200], template=100),
    dict(lora_dropout=1.), dict(lora_dropout=-.1), dict(lora_dropout=float('nan')), dict(epochs=float('nan')),
    dict(epochs=float('inf')), dict(base='qwen2.5-7b-gptq-int4', format='bf16')], ids=str)
def test_refused(kw):
    with pytest.raises(Refusal): cost(**dict(base='qwen2.5-7b', gpu='H200') | kw)

def test_routes():
    answer, score = (cost('qwen2.5-7b', 'H200', route=route) for route in ('answer', 'score'))
    assert answer['params']-score['params'] == 3584*152064
    assert score['trainable']-answer['trainable'] == 3*3584
    assert score['base_gb'] < answer['base_gb']
    full = cost('qwen2.5-7b', 'H200', method='full', route='score', pack_tokens=4096)
    assert full['trainable'] == full['params']+3*3584 == 7_615_616_512-3584*(152064-3)

    two = cost('qwen2.5-7b', 'H200', route='score2')
    assert two['trainable']-answer['trainable'] == 3584*1792+1792+1792*3+3
    assert two['params'] == score['params']

def test_the_route_text():
    kw = dict(base='qwen2.5-7b', gpu='H200', lengths=[500]*40)
    text, answer = cost(**kw, route='text'), cost(**kw, views=1)
    assert text.pop('extrapolated') == ['route text: without logits of rationales, and without held-out replies '
                                        '(ck cost --generate)']
    assert not answer.pop('extrapolated')
    assert text == dict(answer, route='text')
    assert 'text route' in cost_table(cost(**kw, route='text'))
    named = [cost('qwen2.5-7b', 'H200', lengths='logic', route=r)['mean_len'] for r in ('text', 'answer')]
    assert named[0] == named[1]+400

@pytest.mark.parametrize('gpu, format', [('T4', 'nf4'), ('V100', 'auto'), ('H200', 'fp32')])
def test_layers_without_a_varlen_kernel_are_not_compiled(gpu, format):
    kw = dict(base='qwen2.5-7b', gpu=gpu, format=format, pack_tokens=512, max_len=512)
    assert cost(**kw) == cost(**kw, compiled=False)

def test_no_torch_for_a_gpu():
    code = """import competition_kit.cost as c, sys
assert c.find_gpu('H200')['rate'] > 1e14 and len(c.contest_lengths())
assert 'torch' not in sys.modules and 'transformers' not in sys.modules"""
    subprocess.run([sys.executable, '-c', code], check=True)

def test_processes_share_a_cpu():
    one, four = (cost(pack_tokens=1024, max_len=512, gpus=n) for n in (1, 4))
    assert four['tokens_s'] < 1.3*one['tokens_s']
    assert four['memory_gb'] < .3*one['memory_gb']

def test_a_beginning_that_both_views_share():
    "It is computed once: with 400 of 1,000 tokens two views take some 0.8 of the time, and one view as long as ever"
    def hours(**kw): return cost('qwen2.5-7b', 'H100', lengths=[1000]*50, rows=50, **kw)['hours']
    assert .75 < hours(shared=400)/hours() < .85
    assert hours(shared=400, views=1) == hours(views=1)

def test_generation_is_predicted(tiny, capsys):
    "a random base of two layers, in the process's own time: the cost of texts is near to that of a run"
    import time
    from competition_kit.base import load_tokenizer
    from competition_kit.replies import Request, TransformersEngine
    from competition_kit.reply_cost import generation_seconds, measured_speed
    from competition_kit.text import TextPrompt
    engine = TransformersEngine(tiny, TextPrompt(load_tokenizer(tiny)), 'fp32', 16*(60+20))
    speed = measured_speed(engine, clock=time.process_time)
    asked = [Request(np.arange(60)+k, 20, .8, .95, k) for k in range(48)]
    start = time.process_time()
    made = engine.replies(asked)
    seconds = time.process_time()-start
    new = float(np.mean([t.n_tokens for t in made]))
    assert .4 < generation_seconds(speed, 48, 60, new, 20, 16)/seconds < 2.5

def test_cost_of_texts_at_the_command_line(capsys):
    from competition_kit.ck import main
    asked = '--base qwen2.5-7b --gpu H200 --generate 500 --attempts 20 --engine'
    def hours(engine): # and the lines by name
        assert not main(['cost', *asked.split(), engine])
        lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
        return float(lines['time'].split()[0])/(60 if 'minutes' in lines['time'] else 1), lines
    slow, lines = hours('transformers')
    fast, _ = hours('vllm')
    assert slow > 5*fast and lines['tokens'] == '3,000,000 read and 4,000,000 written'
    for wrong in ('--generate 5 --epochs 2', '--attempts 2'):
        assert main(['cost', *wrong.split()]) == 2 and 'not for' in capsys.readouterr().err
