"The planner: exact counts, memory and time that grow as they must, the fewest recomputed layers, honest about what was not measured."
import json, re, subprocess, sys
import numpy as np, pytest
from transformers import AutoConfig
from competition_kit.core import Refusal
from competition_kit.plan import (_known, base_bytes, base_config, card, cards, checkpoint_layers, layer_bytes, lengths, lora_params, mean_context, memory, pack_seconds,
                                  plan, plan_table, points, shape, token_flops, versus)

@pytest.fixture(scope='module')
def shapes(): return {b: shape(b) for b in _known}

LOW = dict(method='lora', format='bf16')

@pytest.mark.parametrize('base,total,rank', [('qwen2.5-7b', 7.62, 2.52), ('qwen2.5-14b', 14.77, 4.30), ('qwen2.5-32b', 32.76, 8.39), ('qwen2.5-72b', 72.71, 13.16),
                                             ('llama-3.1-8b', 8.03, 2.62), ('llama-3.1-70b', 70.55, 12.94), ('gemma-2-9b', 9.24, 3.38), ('mistral-7b', 7.25, 2.62)])
def test_counts(shapes, base, total, rank):
    assert round(shapes[base]['params']/1e9, 2) == total
    assert round(lora_params(shapes[base], 1)/1e6, 2) == rank

def test_block_linears(shapes): # performance figures are stated against these
    for base, n in {'qwen2.5-7b': 6.53, 'llama-3.1-70b': 68.45, 'gemma-2-9b': 8.32}.items(): assert round(shapes[base]['linear']/1e9, 2) == n

def test_counts_are_the_loaded_models():
    from competition_kit.base import base_path
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(base_path('smollm2'))
    s = shape('smollm2')
    assert s['params'] == sum(p.numel() for p in model.parameters()) == 134_515_008 and shape(model)['params'] == s['params']
    from peft import LoraConfig, get_peft_model
    lora = get_peft_model(model, LoraConfig(r=8, target_modules=['q_proj', 'down_proj']))
    assert lora_params(s, 8, 'q_proj, down_proj') == sum(p.numel() for p in lora.parameters() if p.requires_grad)

@pytest.mark.parametrize('given,known', [('Qwen/Qwen2.5-7B-Instruct', 'qwen2.5-7b'), ('meta-llama/Meta-Llama-3.1-70B-Instruct', 'llama-3.1-70b'), ('google/gemma-2-9b-it', 'gemma-2-9b'),
                                         ('mistralai/Mistral-7B-Instruct-v0.3', 'mistral-7b'), ('google/gemma-3-12b-it', 'gemma-3-12b')])
def test_hub_ids_offline(given, known): assert base_config(given).hidden_size == _known[known]['hidden_size']

@pytest.mark.parametrize('given,known,format', [('Qwen/Qwen2.5-32B-Instruct-GPTQ-Int4', 'qwen2.5-32b', 'gptq4'), ('Qwen/Qwen2.5-7B-Instruct-GPTQ-Int8', 'qwen2.5-7b', 'gptq8'),
                                                ('hugging-quants/Meta-Llama-3.1-8B-Instruct-GPTQ-INT4', 'llama-3.1-8b', 'gptq4'), ('qwen2.5-7b-gptq-int4', 'qwen2.5-7b', 'gptq4'),
                                                ('google/gemma-2-9b-it', 'gemma-2-9b', 'bf16'), ('Qwen/Qwen2.5-14B-Instruct', 'qwen2.5-14b', 'bf16')])
def test_names_tell_the_format_offline(monkeypatch, shapes, given, known, format):
    monkeypatch.setattr(AutoConfig, 'from_pretrained', lambda *a, **kw: pytest.fail('asked the Hub'))
    p = plan(given, 'H200', pack_tokens=2048)
    assert p['format'] == format and p['params'] == shapes[known]['params'] and p['base_gb'] == round(base_bytes(shapes[known], format)/1e9, 2) and p['base'] == given

def test_not_by_a_similar_name():
    for name in ('./qwen2.5-7b-other', './qwen2.5-7b-gptq-int3', './qwen2.5-9b-gptq-int4', 'qwen2.5-7', 'nonsense', {}, {'model_type': 'no-such'}):
        with pytest.raises(Refusal, match='llama-3.1-70b|no configuration'): base_config(name)

def test_a_folder_wins(tmp_path):
    AutoConfig.for_model(**dict(_known['qwen2.5-7b'], num_hidden_layers=3)).save_pretrained(tmp_path)
    assert shape(str(tmp_path))['layers'] == 3
    c = json.loads((tmp_path/'config.json').read_text())
    (tmp_path/'config.json').write_text(json.dumps(dict(c, quantization_config=dict(quant_method='gptq', bits=4, group_size=128))))
    p = plan(str(tmp_path), 'T4')
    assert p['format'] == 'gptq4' and base_config(str(tmp_path)).quantization_config['bits'] == 4

def test_gemma3_with_eyes():
    text = {k: v for k, v in _known['gemma-3-12b'].items() if k != 'model_type'}
    s = shape(dict(model_type='gemma3', text_config=dict(text, num_hidden_layers=2)))
    assert s['layers'] == 2 and s['norms'] == 4 and s['qk_norm'] and set(s['linears']) == {'q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'}
    assert s['params'] == shape(dict(text, model_type='gemma3_text', num_hidden_layers=2))['params'], 'the eyes are not loaded'

def test_mixture_of_experts_is_refused():
    with pytest.raises(Refusal, match='not linear'):
        shape(dict(model_type='mixtral', hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=100))

def test_lengths():
    for m, mean, context in [(1024, 700, 398), (2048, 815, 537), (4096, 844, 611)]:
        n = lengths('lmsys', max_len=m)
        assert len(n) == 57477 and abs(n.mean()/mean-1) < .02 and abs(mean_context(n)/context-1) < .02
    assert abs(lengths('wsdm').mean()/1139-1) < .02 and (lengths('lmsys', seed=1) != lengths('lmsys')).any() and (lengths() == lengths()).all()
    assert mean_context([10]) == 5

def test_measured_points_within_the_aim():
    rows = versus()
    assert len(rows) == len(points) and all(.8 <= r['ms_ratio'] <= 1.25 for r in rows if r['ms']) and all(.9 <= r['gb_ratio'] <= 1.1 for r in rows if r['gb'])

@pytest.mark.parametrize('base', _known)
def test_flops(shapes, base):
    s = shapes[base]
    f = token_flops(s, 537)
    assert f == 2*(2*s['linear']+4*s['layers']*s['q']*537)
    assert token_flops(s, 537, recomputed=s['layers']) == pytest.approx(1.5*f) and token_flops(s, 537, 'full') == pytest.approx(1.5*f)
    assert .01 < token_flops(s, 537, learning=lora_params(s, 64))/f-1 < .06

@pytest.mark.parametrize('method,format', [('lora', 'bf16'), ('lora', 'nf4'), ('lora', 'gptq8'), ('full', 'bf16')])
def test_memory_grows_as_it_must(shapes, method, format):
    s, kw = shapes['llama-3.1-8b'], dict(method=method, format=format)
    m = [memory(s, 8192, n, **kw) for n in range(s['layers']+1)]
    assert all(a['peak'] > b['peak'] for a, b in zip(m, m[1:])) and all(o['needs'] > o['peak'] for o in m)
    assert m[0]['peak'] == pytest.approx(sum(m[0][k] for k in ('base', 'learning', 'activations', 'working')))
    two = memory(s, 16384, 0, **kw)
    assert two['activations'] == pytest.approx(2*m[0]['activations']) and two['base'] == m[0]['base']
    assert memory(s, 8192, 0, shards=4, **kw)['base'] == pytest.approx(m[0]['base']/4)

def test_bytes(shapes):
    s = shapes['llama-3.1-70b']
    assert base_bytes(s) == 2*s['params'] and base_bytes(s, 'fp32') == 4*s['params']
    assert base_bytes(s, 'bf16', 'score') == 2*(s['params']-s['head']) and shapes['gemma-2-9b']['head'] == 0
    assert base_bytes(s, 'nf4') < base_bytes(s, 'gptq4') < base_bytes(s, 'gptq8') < base_bytes(s)
    assert memory(s, 1, 80, 'full')['learning'] == 8*s['params'] and memory(s, 1, 80, 'full', 'fp32')['learning'] == 12*s['params']
    assert layer_bytes(s, 4) == 2*layer_bytes(s) and layer_bytes(s, r=0) < layer_bytes(s) < layer_bytes(s, dropout=.1) and layer_bytes(s) < layer_bytes(s, compiled=False)

@pytest.mark.parametrize('base', ['qwen2.5-14b', 'gemma-2-9b'])
def test_fewest_layers(shapes, base):
    s, seen = shapes[base], set()
    for gb in (30, 40, 50, 60, 80, 120, 400):
        try: n = checkpoint_layers(base, 'lora', 'bf16', 8192, gb*1e9)
        except Refusal: continue
        seen.add(n)
        assert memory(s, 8192, n)['needs'] <= gb*1e9 and (n == 0 or memory(s, 8192, n-1)['needs'] > gb*1e9)
    assert 0 in seen and len(seen) > 3

def test_a_remedy_helps(shapes):
    with pytest.raises(Refusal) as e: checkpoint_layers('qwen2.5-14b', 'lora', 'bf16', 65536, 40e9)
    assert '40.0 GB' in str(e.value) and 'all 48 layers' in str(e.value)
    n = int(str(e.value).split('at most ')[1].split(', or')[0].rstrip('.').replace(',', ''))
    assert checkpoint_layers('qwen2.5-14b', 'lora', 'bf16', n, 40e9) <= 48
    with pytest.raises(Refusal): checkpoint_layers('qwen2.5-14b', 'lora', 'bf16', n+256, 40e9)
    with pytest.raises(Refusal, match='lora on nf4'): checkpoint_layers('qwen2.5-72b', 'full', 'bf16', 2048, 80e9)
    with pytest.raises(Refusal, match='Take a GPTQ base on 8 such GPUs with sharded=True[.]'): checkpoint_layers('qwen2.5-72b', 'lora', 'nf4', 512, 10e9)
    with pytest.raises(Refusal, match='smaller base'): checkpoint_layers('qwen2.5-72b', 'lora', 'nf4', 512, 1e9)

NO_NF4 = 'a base in nf4 cannot be spread over several GPUs'

@pytest.mark.parametrize('gpu,gpus,tokens', [('A10', 8, 16384), ('A10', 8, 1024), ('T4', 1, 16384), ('T4', 8, 2048), ('A100-40', 2, 2048)])
def test_nf4_is_never_sharded(gpu, gpus, tokens):
    kw = dict(base='qwen2.5-72b', gpu=gpu, format='nf4', pack_tokens=tokens, max_len=min(tokens, 2048))
    for sharded in (None, False):
        with pytest.raises(Refusal, match='a GPTQ base') as e: plan(gpus=gpus, sharded=sharded, **kw)
        assert ' over ' not in str(e.value) and 'nf4' not in str(e.value).split('Take ')[1]
    with pytest.raises(Refusal, match=NO_NF4): plan(gpus=max(gpus, 2), sharded=True, **kw)
    said = str(e.value).split('a GPTQ base')[1]  # what it advises is planned without another refusal
    n, fewer = [re.search(o, said) for o in (r'on (\d+) such', r'pack_tokens of ([\d,]+)')]
    tokens = int(fewer[1].replace(',', '')) if fewer else tokens
    p = plan(**dict(kw, base='Qwen/Qwen2.5-72B-Instruct-GPTQ-Int4', format='auto', gpus=int(n[1]) if n else gpus, pack_tokens=tokens, max_len=min(tokens, 2048)), sharded=True)
    assert p['sharded'] and p['format'] == 'gptq4'
    with pytest.raises(Refusal, match=NO_NF4): checkpoint_layers('qwen2.5-7b', 'lora', 'nf4', 512, 1e12, shards=2)

def test_nf4_is_advised_only_where_one_gpu_holds_it():
    with pytest.raises(Refusal, match='over 8 GPUs.* a GPTQ base') as e: plan('qwen2.5-72b', 'T4', 8, format='fp16', pack_tokens=4096)
    assert 'nf4' not in str(e.value)

def test_nf4_on_several_without_sharding():
    for sharded in (None, False): assert not plan('qwen2.5-72b', 'A100-80', 8, format='nf4', pack_tokens=8192, sharded=sharded)['sharded']
    assert not plan('qwen2.5-7b', 'H200', format='nf4', sharded=True)['sharded']  # one GPU: nothing to spread over, as in a training
    with pytest.raises(Refusal, match='the format nf4 with sharded=False'): plan('qwen2.5-72b', 'A100-80', 2, sharded=True)

@pytest.mark.parametrize('kw', [dict(base='qwen2.5-72b'), dict(base='qwen2.5-14b', method='full'), dict(base='llama-3.1-70b', format='bf16', route='score')])
def test_sharded_as_told(kw):
    kw = dict(kw, gpu='A100-80', gpus=8, pack_tokens=4096)
    one, told = plan(**kw), plan(**kw, sharded=True)
    assert one['sharded'] and one == told
    with pytest.raises(Refusal, match=r'(Take|or) sharded=True[.]') as e: plan(**kw, sharded=False)
    assert ' over 8 GPUs' not in str(e.value)
    with pytest.raises(Refusal, match=r'or \d+ such GPUs with sharded=True'): plan(**dict(kw, gpus=1))

def test_sharded_where_it_need_not_be():
    spread, copies = (plan('qwen2.5-7b', 'A100-80', 8, pack_tokens=4096, sharded=o) for o in (True, False))
    assert spread['sharded'] and not copies['sharded'] and spread['base_gb'] == pytest.approx(copies['base_gb']/8, abs=.01) and copies == plan('qwen2.5-7b', 'A100-80', 8, pack_tokens=4096)
    assert 'sharded=True' in plan_table(spread) and 'own rows' in plan_table(copies)
    full = [plan('qwen2.5-7b', 'H200', 2, method='full', pack_tokens=4096, sharded=o)['sharded'] for o in (None, True, False)]
    assert full == [True, True, False] and not plan('qwen2.5-7b', 'H200', sharded=True)['sharded']

def test_no_more_gpus_for_fewer_tokens(shapes):
    with pytest.raises(Refusal) as e: checkpoint_layers('qwen2.5-72b', 'lora', 'gptq4', 16384, 23e9, shards=8, gpus=8)
    assert 'at most 9,984' in str(e.value) and 'such GPUs' not in str(e.value)

def test_a_shape_or_a_config_will_do(shapes):
    assert checkpoint_layers(shapes['qwen2.5-14b'], **LOW, pack_tokens=8192, free_bytes=60e9) == checkpoint_layers(base_config('qwen2.5-14b'), **LOW, pack_tokens=8192, free_bytes=60e9)

def test_quantised_costs_a_constant_a_pack(shapes):
    s, c = shapes['llama-3.1-8b'], card('H200')
    more = [pack_seconds(s, c, 537, n, format='nf4')-pack_seconds(s, c, 537, n) for n in (512, 8192)]
    assert more[0] == pytest.approx(more[1]) and 1.2 < pack_seconds(s, c, 537, 512, format='nf4')/pack_seconds(s, c, 537, 512) < 1.5
    assert pack_seconds(s, c, 537, 8192, format='nf4')/pack_seconds(s, c, 537, 8192) < 1.1

@pytest.mark.parametrize('gpu', cards)
def test_every_card(gpu):
    p = plan('qwen2.5-7b', gpu, 4, format='nf4', pack_tokens=2048)
    assert p['gpu'] == gpu and 0 < p['peak_gb'] < p['memory_gb'] and p['tokens_s'] > 0 and p['gpu_hours'] == pytest.approx(4*p['hours'])
    assert any(gpu in o for o in p['extrapolated']) == (gpu not in ('H100', 'H200')) and plan_table(p).count('extrapolated') == len(p['extrapolated'])

def test_formats_of_old_cards():
    assert plan('smollm2', 'T4')['format'] == plan('smollm2', 'V100', format='bf16')['format'] == 'fp16' and plan('smollm2', 'L4')['format'] == 'bf16'
    assert plan('smollm2', 'T4', method='full', pack_tokens=2048)['format'] == 'fp32'
    with pytest.raises(Refusal, match='fp32'): plan('smollm2', 'T4', method='full', format='fp16')
    with pytest.raises(Refusal, match='full fine-tuning'): plan('smollm2', 'H200', method='full', format='nf4')

def test_shared_only_when_one_does_not_hold_it():
    assert not plan('qwen2.5-7b', 'A100-80', 8)['sharded'] and plan('qwen2.5-72b', 'A100-80', 8)['sharded'] and plan('qwen2.5-7b', 'A100-80', 8, method='full', pack_tokens=4096)['sharded']
    one, eight = plan('qwen2.5-7b', 'H200'), plan('qwen2.5-7b', 'H200', 8)
    assert eight['tokens_s'] == pytest.approx(8*.97*one['tokens_s'], rel=1e-3) and eight['tokens'] == one['tokens']

def test_time_is_linear_in_tokens():
    n = np.full(100, 700)
    one, two = plan('qwen2.5-7b', 'H200', lengths=n), plan('qwen2.5-7b', 'H200', lengths=n, rows=100, epochs=2)
    assert one['tokens'] == 100*700*2 and two['hours'] == pytest.approx(2*one['hours']) and one['mean_len'] == 700
    assert plan('qwen2.5-7b', 'H200', lengths=np.array([9000]), max_len=9000, pack_tokens=100)['pack_tokens'] == 9000

def test_a_template_is_computed_once_a_pack():
    each, once = (plan('qwen2.5-7b', 'H100', lora_r=64, pack_tokens=8192, template=t) for t in (0, 160))
    assert once['tokens_s']/each['tokens_s'] == pytest.approx(19662/16521, rel=.03) and once['tokens'] == each['tokens'] and once['peak_gb'] == each['peak_gb']
    alone = [plan('qwen2.5-7b', 'H100', lengths=[2000], pack_tokens=2000, template=t)['tokens_s'] for t in (0, 160)]
    assert alone[0] == alone[1]

def test_the_measured_setting_is_not_called_extrapolated():
    assert plan('qwen2.5-7b', 'H200', lora_r=64)['extrapolated'] == []
    p = plan('llama-3.1-70b', 'T4', 8, format='gptq8', lora_dropout=.05, pack_tokens=1024, max_len=1024)
    text = ' '.join(p['extrapolated'])
    assert all(o in text for o in ('T4', 'activations', 'gptq8', '8 GPUs')) and p['sharded']

@pytest.mark.parametrize('kw', [dict(method='dora'), dict(route='both'), dict(format='int3'), dict(gpu='A100'), dict(lengths='chat'), dict(lengths=[]), dict(lengths=[0]), dict(rows=0),
                                dict(gpus=0), dict(base='nonsense'), dict(lora_modules='q'), dict(pack_tokens=0), dict(lora_r=0), dict(lora_r=-1), dict(lora_dropout=1.), dict(lora_dropout=-.1),
                                dict(lora_dropout=float('nan')), dict(template=-1), dict(epochs=float('nan')), dict(epochs=float('inf')), dict(base='qwen2.5-7b-gptq-int4', format='bf16'), dict(lengths=[100, 200], template=100)])
def test_refused(kw):
    with pytest.raises(Refusal): plan(**{**dict(base='qwen2.5-7b', gpu='H200'), **kw})

def test_routes():
    a, s = (plan('qwen2.5-7b', 'H200', route=r) for r in ('answer', 'score'))
    assert a['params']-s['params'] == 3584*152064 and s['learns']-a['learns'] == 3*3584 and s['base_gb'] < a['base_gb']
    full = plan('qwen2.5-7b', 'H200', method='full', route='score', pack_tokens=4096)
    assert full['learns'] == full['params']+3*3584 == 7_615_616_512-3584*(152064-3)

def test_this_machine():
    p = plan('smollm2', lengths=[100]*10, pack_tokens=512)
    assert p['tokens_s'] > 0 and p['memory_gb'] > 0

def test_no_torch_for_a_card():
    code = "import competition_kit.plan as p, sys; assert p.card('H200')['rate'] > 1e14 and len(p.lengths()); assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, '-c', code], check=True)

def test_joined_projections_are_refused():
    from transformers import Phi3Config
    with pytest.raises(Refusal, match='k_proj'): shape(Phi3Config(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=512, pad_token_id=0))

def test_processes_share_a_cpu():
    one, four = (plan(pack_tokens=1024, max_len=512, gpus=n) for n in (1, 4))
    assert four['tokens_s'] < 1.3*one['tokens_s'] and four['memory_gb'] < .3*one['memory_gb']
