"Bases whose packed forward is not their own are refused by name, others are right; rows longer than a base can place"
import shutil
from dataclasses import replace
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from transformers import AutoConfig, AutoModelForCausalLM
from competition_kit import attention, model, parity
from competition_kit.base import load_tokenizer
from competition_kit.core import Refusal, models_path
from competition_kit.model import load_classifier, view_probs
from competition_kit.prompt import Prompt
from gptq_writer import checkpoint
from test_model import save, sequences, one, packed, reference

SMALL = dict(vocab_size=49152, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=16,
             max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=.25)
EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
LINEAR = dict(layer_types=['linear_attention', 'full_attention'], linear_num_key_heads=2, linear_num_value_heads=2,
              linear_key_head_dim=16, linear_value_head_dim=16)

@pytest.fixture(scope='module')
def prompt(tok): return Prompt(tok, 'preference', 128)
@pytest.fixture
def base(tmp_path, smollm2):
    return lambda kind, **kw: str(save(tmp_path/kind, AutoConfig.for_model(kind, **SMALL | kw), smollm2))

def agrees(base, prompt, dtype='fp32', eps=1e-5, lengths=(1, 5, 40, 90, 3), **kw):
    ref, classifier, ids = reference(base), load_classifier(base, prompt, 'answer', dtype, **kw), sequences(lengths)
    with torch.no_grad(): want = torch.stack([ref(one(i)).logits[0, -1, prompt.letters] for i in ids])
    return (packed(classifier, ids)-want).abs().max() < eps*max(1, want.abs().max())

@pytest.mark.parametrize('kind, kw', [('granite', dict(logits_scaling=7.)), ('cohere', dict(logit_scale=.3)),
                                      ('hyperclovax', dict(logits_scaling=.5)),
    ('minicpm3', dict(dim_model_base=16, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=16, qk_nope_head_dim=8,
                      v_head_dim=16, num_key_value_heads=4)),
    ('llama4_text', dict(num_local_experts=2, num_experts_per_tok=1, intermediate_size_mlp=96,
                         attention_chunk_size=16)),
    ('phi', {}), ('olmo2', {}), ('gpt_neox', {}), ('qwen3_moe', EXPERTS)], ids=str)
def test_scales_chunks_and_others_are_right(kind, kw, base, prompt):
    assert agrees(base(kind, **kw), prompt)

LLAMA4 = dict(num_local_experts=2, num_experts_per_tok=1, intermediate_size_mlp=96, num_hidden_layers=4)

def test_llama4_scales_queries_by_their_place_in_the_row(base, prompt):
    "its class goes by the place in the pack, which is the same in a pack of one row only"
    b = base('llama4_text', **LLAMA4, attention_chunk_size=16, floor_scale=8)
    classifier, ids, head = load_classifier(b, prompt, dtype='fp32'), sequences((30, 5, 40)), sequences((9,), 3)[0]
    for rows in (ids, [np.append(head, i) for i in ids]):
        want = torch.stack([reference(b)(one(i)).logits[0, -1, classifier.letters] for i in rows])
        assert (packed(classifier, rows)-want).abs().max() < 1e-4

@pytest.mark.parametrize('kind', ['gpt_oss', 'mimo_v2_flash'])
def test_sinks_are_named(kind, base, prompt):
    with pytest.raises(Refusal, match='attention has sinks'):
        load_classifier(base(kind, **EXPERTS), prompt, 'answer', 'bf16')

REFUSED = dict(qwen3_5_text=LINEAR, lfm2=dict(layer_types=['conv', 'full_attention']),
               mamba2=dict(num_heads=8, state_size=8, n_groups=1), stablelm={}, bloom=dict(n_layer=2, n_head=4),
               doge={}, gpt_oss=EXPERTS, qwen2=dict(is_causal=False),
               gptj=dict(n_embd=64, n_layer=2, n_head=4, rotary_dim=8))

@pytest.mark.parametrize('kind', REFUSED)
def test_state_sinks_and_attention_of_its_own_are_refused(kind, base, prompt):
    b = base(kind, **REFUSED[kind])
    for route, dtype in (('answer', 'bf16'), ('score', 'fp32'))[:2 if kind in ('qwen3_5_text', 'stablelm') else 1]:
        with pytest.raises(Refusal, match='elsewhere'): load_classifier(b, prompt, route, dtype)
    assert not list(models_path('.parity').glob('*'))

def test_a_difference_that_rounding_would_hide(base, prompt):
    "of a hundredth of the spread, which bf16 itself may cost: the same weights in fp32 tell"
    with pytest.raises(Refusal, match='rounding allows 0.0002'):
        load_classifier(base('openai-gpt', n_embd=64, n_layer=2, n_head=4), prompt, 'answer', 'bf16')

@pytest.mark.parametrize('dtype', ['bf16', 'fp16'])
@pytest.mark.parametrize('kind', ['granitemoe', 'qwen3_moe', 'opt'])
def test_weights_are_what_they_were(kind, dtype, base, prompt):
    "right bases pass in 16 bits, experts that change their tokens for a rounding too; nothing stays in fp32"
    b = base(kind, **EXPERTS, ffn_dim=96, word_embed_proj_dim=64)
    got = load_classifier(b, prompt, 'answer', dtype).base.state_dict()
    same = dict(bf16=torch.bfloat16, fp16=torch.float16)[dtype]
    want = AutoModelForCausalLM.from_pretrained(b, dtype=same).state_dict()
    for k in want: assert got[k].dtype == want[k].dtype and torch.equal(got[k], want[k]), k

@pytest.mark.parametrize('kind', ['gptq', 'nf4', 'mapped'])
def test_quantised_and_mapped_bases_are_compared(kind, base, prompt, tmp_path, monkeypatch):
    "a right one passes, a planted fault of a fiftieth does not"
    if kind == 'nf4': pytest.importorskip('bitsandbytes')
    b, kw = base('qwen3'), dict(dtype='nf4') if kind == 'nf4' else dict(dtype='bf16', mapped=kind == 'mapped')
    if kind == 'gptq':
        checkpoint(b, tmp_path/'q', group=32)
        for f in Path(b).iterdir():
            if 'token' in f.name: shutil.copy(f, tmp_path/'q')
        b = str(tmp_path/'q')
    for k in (1, 2): load_classifier(b, prompt, 'answer', **kw)
    assert len(list(models_path('.parity').glob('*'))) == 1
    shutil.rmtree(models_path('.parity'))
    exact = attention.exact_attention
    monkeypatch.setattr(attention, 'exact_attention', lambda *a: exact(*a)*1.02)
    with pytest.raises(Refusal, match='computes what the packed forward does not'):
        load_classifier(b, prompt, 'answer', **kw)

def test_a_prefix_tree_is_compared_too(base, prompt, monkeypatch):
    "a segment below another one that reads only the prefix of all"
    def no_middle(ids):
        tree = was(ids)
        return replace(tree, parent=np.where(tree.parent > 0, 0, tree.parent))
    was, b = model.prefix_tree, base('llama')
    monkeypatch.setattr(model, 'prefix_tree', no_middle)
    with pytest.raises(Refusal, match='computes what the packed forward does not'):
        load_classifier(b, prompt, 'answer')

@pytest.mark.parametrize('dtype, kind', [('fp32', 'gemma2'), ('fp16', 'gemma2'), ('bf16', 'gemma2'), ('bf16', 'llama'),
                                         ('bf16', 'granitemoe')])
def test_a_small_fault_shows_in_every_format(dtype, kind, base, prompt, monkeypatch):
    "a right base passes; one with logits a tenth too large, or with a window that its layers forget, does not"
    b = base(kind, **EXPERTS, sliding_window=24)
    load_classifier(b, prompt, 'answer', dtype)
    assert len(list(models_path('.parity').glob('*'))) == 1
    shutil.rmtree(models_path('.parity'))
    with monkeypatch.context() as m:
        m.setattr(model, '_logit_scale', lambda config, was=model._logit_scale: 1.1*was(config))
        with pytest.raises(Refusal, match='computes what the packed forward does not'):
            load_classifier(b, prompt, 'answer', dtype)
    if kind != 'gemma2': return
    exact = attention.exact_attention
    def no_window(q, k, v, scaling, softcap, window, chunk): return exact(q, k, v, scaling, softcap, None, chunk)
    monkeypatch.setattr(attention, 'exact_attention', no_window)
    with pytest.raises(Refusal, match='computes what the packed forward does not'):
        load_classifier(b, prompt, 'answer', dtype)

def test_an_agreement_is_kept_for_these_weights(base, prompt, monkeypatch):
    b, asked = base('llama'), []
    monkeypatch.setattr(parity, 'forward_gap', lambda *a, was=parity.forward_gap: asked.append(1) or was(*a))
    for route, times in (('answer', 1), ('answer', 1), ('score', 2), ('score', 2)):
        torch.manual_seed(0)
        load_classifier(b, prompt, route, 'fp32')
        assert len(asked) == times
    other = AutoModelForCausalLM.from_pretrained(b)
    other.model.layers[1].mlp.up_proj.weight.data *= 2
    other.save_pretrained(b)
    load_classifier(b, prompt, 'answer', 'fp32')
    assert len(asked) == 3
    for k, name in enumerate(('attention', 'model', 'pack', 'parity', 'quant')): # other code of the packed forward
        def other_code(f, name=name, was=parity.sha256): return was(f)[::-1] if f.stem == name else was(f)
        with monkeypatch.context() as m:
            m.setattr(parity, 'sha256', other_code)
            load_classifier(b, prompt, 'answer', 'fp32')
        assert len(asked) == 4+k

LATE = LINEAR | EXPERTS | dict(num_hidden_layers=6, layer_types=['full_attention']*3+['linear_attention']*3)

@pytest.mark.parametrize('kind, kw', [('qwen3_next', LATE), ('granite', dict(num_hidden_layers=6))])
def test_a_mapped_base_is_compared_on_its_first_layers(kind, kw, base, prompt):
    b = base(kind, **kw)
    if kind == 'granite': assert agrees(b, prompt, eps=1e-4, mapped=True)
    else:
        with pytest.raises(Refusal): load_classifier(b, prompt, 'answer', 'fp32', mapped=True)

def test_a_new_head_is_the_same_as_without_a_check(base, prompt):
    b, heads = base('llama'), []
    for _ in range(2): # checked, and known
        torch.manual_seed(5)
        heads.append(load_classifier(b, prompt, 'score', 'fp32').base.score.weight.detach())
    assert torch.equal(*heads)

@pytest.mark.parametrize('kind, kw, limit',
                         [('llama', {}, 512), ('gpt2', dict(max_position_embeddings=100), 100),
                          ('opt', dict(max_position_embeddings=100, ffn_dim=96, word_embed_proj_dim=64), 100),
    ('llama', dict(max_position_embeddings=100, rope_parameters=dict(rope_type='dynamic', factor=9., rope_theta=1e4)),
     100),
    ('qwen2', dict(max_position_embeddings=100,
                   rope_parameters=dict(rope_type='yarn', factor=4., original_max_position_embeddings=100,
                                        rope_theta=1e4)), 400)], ids=str)
def test_rows_longer_than_a_base_can_place(kind, kw, limit, base, tok):
    b, refused = base(kind, **kw), f'can place {limit}'
    with pytest.raises(Refusal, match=refused): load_classifier(b, Prompt(tok, 'preference', limit+1), dtype='fp32')
    classifier = load_classifier(b, Prompt(tok, 'preference', limit), dtype='fp32')
    text = 'the quick brown fox '*300
    rows = pd.DataFrame([dict(id='a', prompt=[text], response_a=[text], response_b=[text])])
    longer = Prompt(tok, 'preference', limit+50).encode(rows)
    with pytest.raises(Refusal, match=refused): view_probs(classifier, longer, [3], progress=False)

def test_a_special_token_without_an_embedding(base, smollm2):
    "no text becomes it, so the base may lack it; a token that a text may hold it may not"
    t = load_tokenizer(smollm2)
    t.add_special_tokens(dict(extra_special_tokens=['<image_soft_token>']))
    load_classifier(base('gemma3_text', sliding_window=16), Prompt(t, 'preference', 128), dtype='fp32')
    t.add_tokens(['flibbertigibbet'])
    with pytest.raises(Refusal, match='1 more that a text can hold'):
        load_classifier(base('qwen3'), Prompt(t, 'preference', 128), dtype='fp32')
