"Engines: vLLM in a process of its own, and the gate that it must pass. The first half needs no vLLM"
import json, os, shutil, signal, subprocess, sys, threading, time
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import pytest
from competition_kit import engine as E
from competition_kit.core import Refusal, read_json, root_at
from competition_kit.probs import read_probs

def begun(limit=600.):
    "An engine's process that has not been asked to load a model"
    e = object.__new__(E.Engine)
    e.n_adapters, e.limit, e.gpus = 0, limit, 1
    e._begin()
    return e

start = dict(llm=dict(model='nowhere', tensor_parallel_size=1), adapters=[])

def is_alive(pid):
    try: return Path(f'/proc/{pid}/stat').read_text().rsplit(') ', 1)[1][0] != 'Z'
    except OSError: return False

def gone(pid, seconds=10):
    until = time.time()+seconds
    while is_alive(pid) and time.time() < until: time.sleep(.05)
    return not is_alive(pid)

@pytest.mark.parametrize('limit, share', [(0, .845), (32, .201), (200, .845), (.01, 0)])
def test_an_engine_takes_no_more_of_a_gpu_than_its_limit(limit, share):
    assert E.gpu_share(135e9, 150e9, limit) == share

@pytest.mark.parametrize('limit, gpus, share', [(0, 1, .813), (32, 1, .201), (32, 2, .201), (0, 2, .5)])
def test_what_vllm_is_started_with(monkeypatch, limit, gpus, share):
    "a stand-in for vLLM and its GPUs; of several the fullest decides"
    import torch
    class LLM:
        def __init__(self, **how): self.how = how
    stand_in = {'vllm': SimpleNamespace(LLM=LLM, __version__='1.2'), 'vllm.lora': SimpleNamespace(),
                'vllm.lora.request': SimpleNamespace(LoRARequest=lambda *a: a)}
    for name, module in stand_in.items(): monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda k: ((130e9, 150e9), (80.6e9, 150e9))[k])
    server = E._Server()
    version = server.start(dict(model='m', tensor_parallel_size=gpus), ['a', 'b'], limit)
    assert version == '1.2' and server.llm.how.get('gpu_memory_utilization') == share
    assert server.loras == [None, ('lora1', 1, 'a'), ('lora2', 2, 'b')]

# ---- the process
def test_a_dead_engine_is_noticed_at_once():
    e = begun()
    threading.Timer(.3, e.process.kill).start()
    began = time.time()
    with pytest.raises(E.EngineDied, match=r'died \(exit code -9\)'): e._ask('start', **start)
    assert time.time()-began < 5

def test_an_engine_that_hangs_is_ended():
    e = begun(limit=.5)
    e.process.send_signal(signal.SIGSTOP)
    with pytest.raises(E.EngineDied, match='no answer in 0.5 seconds'): e._ask('start', **start)
    assert gone(e.process.pid)

def test_an_answer_that_was_interrupted_is_no_answer_to_the_next_request(monkeypatch):
    e, wait = begun(), E.wait
    def interrupted(*args):
        wait(*args)
        raise KeyboardInterrupt
    monkeypatch.setattr(E, 'wait', interrupted)
    with pytest.raises(KeyboardInterrupt): e._ask('letters', ids=[], slots=[], letters=[], fresh=False)
    monkeypatch.undo()
    with pytest.raises(E.EngineDied, match='died'): e._ask('start', **start)
    assert gone(e.process.pid)

def test_rows_are_asked_by_prefix_answered_in_their_order_and_each_has_all_letters(monkeypatch):
    engine, asked = object.__new__(E.Engine), []
    engine.n_adapters = 1
    def ask(request, ids, slots, **how):
        asked.append([(slot, *i.tolist()) for slot, i in zip(slots, ids)])
        return [[i[-1], 0.] for i in ids]
    monkeypatch.setattr(engine, '_ask', ask)
    ids = [np.array(i) for i in ([1, 9], [2, 7], [1, 8], [1, 6])]
    assert engine.letters(ids, [4, 5], [0, 0, 0, 1])[:, 0].tolist() == [9, 7, 8, 6]
    assert asked == [[(0, 1, 8), (0, 1, 9), (0, 2, 7), (1, 1, 6)]]
    monkeypatch.setattr(engine, '_ask', lambda *a, **how: [[0., np.nan]])
    with pytest.raises(Refusal, match='no probability for 1 letters'): engine.letters(ids[:1], [4, 5])

def test_no_rows_have_no_letters():
    with begun() as e: assert e.letters([], [5, 6, 7]).shape == (0, 3)

def test_an_engine_ends_with_its_driver():
    code = ('import time; from test_engine import begun; e = begun(); print(e.process.pid, flush=True); time.sleep(60)')
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)]))
    driver = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True, env=env)
    pid = int(driver.stdout.readline())
    assert is_alive(pid)
    driver.kill()
    driver.wait()
    driver.stdout.close()
    assert gone(pid)

def test_an_error_comes_with_the_log_and_leaves_no_process():
    e = begun()
    with pytest.raises(E.EngineDied, match='no_such_request(.|\n)*its log ends with\n(.|\n)*AttributeError'):
        e._ask('no_such_request')
    with pytest.raises(ProcessLookupError): os.killpg(e.process.pid, 0)

def test_the_error_of_a_worker_is_told():
    e = begun()
    e.log.write(b'(Worker_TP1) ValueError: 90 of 139 GiB are free\n'*2+b'  File "executor.py"\n'*20)
    e.log.flush()
    with pytest.raises(E.EngineDied, match=r'Errors before these lines:\n\(Worker_TP1\) ValueError: 90 of 139[^\n]*$'):
        e._ask('no_such_request')

# ---- what is refused before vLLM starts
def adapter(folder, **config):
    import torch
    from safetensors.torch import save_file
    folder.mkdir()
    r = config.get('r', 4)
    tensors = {'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight': torch.ones(r, 8),
               'base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight': torch.ones(8, r)}
    save_file(tensors, folder/'adapter_model.safetensors')
    c = dict(peft_type='LORA', task_type='CAUSAL_LM', r=r, lora_alpha=8, target_modules=['q_proj']) | config
    (folder/'adapter_config.json').write_text(json.dumps(c))
    return folder

def test_slots_count_the_base_and_the_largest_rank(tmp_path):
    small, large = adapter(tmp_path/'a'), adapter(tmp_path/'b', rank_pattern={'k_proj': 33})
    assert E.lora_slots([small, large]) == dict(enable_lora=True, max_loras=3, max_cpu_loras=3, max_lora_rank=64)
    assert E.lora_slots([]) == {}
    assert E.llm_options('smollm2', [small]*120, 'bf16', 64, 1, {})['max_loras'] == 121

@pytest.mark.parametrize('config, why', [(dict(r=513), 'rank 513'), (dict(modules_to_save=['score']), 'score head'),
                                         (dict(use_dora=True), 'use_dora')])
def test_adapters_that_vllm_does_not_compute(tmp_path, config, why):
    with pytest.raises(Refusal, match=why): E.lora_slots([adapter(tmp_path/'a', **config)])

def test_loras_in_fp32_are_refused_on_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(E, 'base_path', str)
    lora = adapter(tmp_path/'a')
    assert E.llm_options('tiny', [lora], 'fp32', 64, 1, {})['dtype'] == 'float32'
    monkeypatch.setattr(E, '_has_gpu', lambda: True)
    with pytest.raises(Refusal, match='16 bits only on a GPU'): E.llm_options('tiny', [lora], 'fp32', 64, 1, {})
    assert E.llm_options('tiny', [lora], 'bf16', 64, 1, {})['dtype'] == 'bfloat16'
    assert E.llm_options('tiny', [], 'fp32', 64, 1, {})['dtype'] == 'float32'

def test_vllm_that_is_not_installed(monkeypatch, runs, tmp_path):
    from competition_kit.tables import load_rows
    monkeypatch.setattr(E, 'vllm_version', lambda: '')
    rows = load_rows('sample_arena_test')
    with pytest.raises(Refusal, match='vLLM is not installed'): E.ask_engine(runs[:1], rows, tmp_path, engine='vllm')
    got = E.ask_engine(runs[:1], rows, tmp_path/'a', views=1, engine='auto', progress=False)
    assert len(got[runs[0]]) == len(rows) and not (tmp_path/'a/engine.json').exists()

def test_a_score_head_is_refused_by_name(monkeypatch, runs):
    from competition_kit.tables import load_rows
    monkeypatch.setattr(E, 'vllm_version', lambda: '0')
    with pytest.raises(Refusal, match=f'{runs[-1]}.*score head.*engine=auto'):
        E.EngineAsker(runs[-1:], load_rows('sample_arena_test'), engine='vllm')

# ---- with vLLM
needs_vllm = pytest.mark.skipif(not E.vllm_version(), reason='vLLM is not installed')

@pytest.fixture(scope='module')
def served(tmp_path_factory, tiny):
    "A root with two folds over a random base whose heads vLLM has kernels for"
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from competition_kit.core import data_path
    from competition_kit.sample import write_arena
    from competition_kit.train import train_fold
    tok, base = AutoTokenizer.from_pretrained(tiny), tmp_path_factory.mktemp('wide')
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), hidden_size=128, intermediate_size=128, num_hidden_layers=2,
                                 num_attention_heads=2, num_key_value_heads=1)).save_pretrained(base)
    tok.save_pretrained(base)
    with root_at(tmp_path_factory.mktemp('served')) as root:
        data_path('sample_arena').mkdir(parents=True)
        write_arena(data_path('sample_arena'), 40, 12, 0)
        dtype = 'bf16' if torch.cuda.is_available() else 'fp32'
        kw = dict(base=str(base), max_len=160, lr=1e-2, lora_r=2, dtype=dtype)
        return root, [train_fold(fold=f, **kw).id for f in (0, 1)]

@pytest.fixture
def two(served, own_root):
    "Rows, and the ids of the two runs"
    from competition_kit.tables import load_rows
    root, ids = served
    shutil.copytree(root, own_root, dirs_exist_ok=True)
    return load_rows('sample_arena_test'), ids

def p(table): return np.stack(table.p)

@needs_vllm
def test_vllm_predicts_what_packs_predict(two, own_root, monkeypatch):
    rows, ids = two
    folder, packs = own_root/'vllm', E.predict_runs(ids, rows, own_root/'packs', progress=False)
    got = E.ask_engine(ids, rows, folder, engine='vllm')
    facts = read_json(folder/'engine.json')[' '.join(ids)]
    assert facts['engine'] == f'vllm {E.vllm_version()}'
    for r in ids:
        assert abs(p(got[r])-p(packs[r])).max() < .02
        assert facts['parity'][r]['median'] <= .02 < facts['parity'][r]['base']
        assert 0 < facts['parity'][r]['mass'] < 1
        assert got[r].attrs['meta']['engine'] == facts['engine']
    monkeypatch.setattr(E, 'Engine', None)  # a second call, and another vote, start no engine
    again = E.ask_engine(ids, rows, folder, engine='vllm')
    from competition_kit.core import models_path
    shutil.copytree(folder, models_path('vote-x'))
    other = E.ask_engine(ids, rows, own_root/'third', engine='vllm')
    for r in ids: assert (p(again[r]) == p(got[r])).all() and (p(other[r]) == p(got[r])).all()

@needs_vllm
def test_too_few_slots_do_not_pass(two, own_root, monkeypatch):
    "vLLM serves wrong adapters without a word when the adapters and the base outnumber its slots"
    rows, ids = two
    right = E.lora_slots
    monkeypatch.setattr(E, 'lora_slots', lambda adapters: right(adapters) | dict(max_loras=1))
    with pytest.raises(Refusal, match='does not answer as the kit does'):
        E.ask_engine(ids, rows, own_root/'v', engine='vllm')

@needs_vllm
def test_an_adapter_of_other_layers_does_not_pass(two, own_root, monkeypatch):
    "vLLM loads it, and answers as the base"
    from safetensors.torch import load_file, save_file
    rows, ids = two
    def renamed(rec):
        good, bad = weights(rec), own_root/f"{rec['run_id']}-renamed"
        shutil.copytree(good, bad, dirs_exist_ok=True)
        tensors = load_file(good/'adapter_model.safetensors')
        save_file({k.replace('layers.', 'layers.9'): t for k, t in tensors.items()}, bad/'adapter_model.safetensors')
        return bad
    weights = E.weights_path
    monkeypatch.setattr(E, 'weights_path', renamed)
    with pytest.raises(Refusal, match='does not answer as the kit does|vLLM failed'):
        E.ask_engine(ids, rows, own_root/'v', engine='vllm')

@needs_vllm
def test_text_letters_and_an_engine_that_dies(two, own_root, capsys):
    rows, ids = two
    folder = own_root/'v'
    folder.mkdir()
    (folder/'engine.json').write_text(json.dumps({' '.join(ids): dict(engine='vllm, as chosen before the restart')}))
    packs = E.RunAsker(ids, rows)
    packs.load(ids[1])
    with E.EngineAsker(ids, rows, engine='auto', folder=folder) as asker:
        asker.load(ids[1])
        engine, some = asker.server, np.array([7, 0, 3])
        prompts = asker._ids(ids[0], some)
        texts = engine.text(prompts*2, seeds=[1, 2, 3, 1, 2, 4], max_new=6, adapter=1, ignore_eos=True)
        tokens = [o['tokens'] for o in texts]
        assert tokens[:2] == tokens[3:5] and tokens[2] != tokens[5], 'a request is sampled by its own seed'
        alone = engine.text(prompts[1:2], seeds=[2], max_new=6, adapter=1, ignore_eos=True)
        assert alone[0]['tokens'] == tokens[1] and alone[0]['finish'] == 'length'
        with pytest.raises(Refusal, match='adapter 3 of an engine that has 2'): engine.letters(prompts, [1], adapter=3)
        for view in 0, 1: assert abs(asker.ask(some, view)-packs.ask(some, view)).max() < .02
        engine.process.kill()
        began = time.time()
        got = asker.ask(some, 1)
        assert abs(got-packs.ask(some, 1)).max() < 1e-3 and time.time()-began < 30
        assert 'the vLLM engine died' in capsys.readouterr().out
        assert read_json(folder/'engine.json')[' '.join(ids)]['engine'] == 'packs'

# ---- a vote
def voted(**kw):
    from competition_kit.record import run_stage
    from competition_kit.vote import VoteArgs, vote
    return run_stage(vote, VoteArgs(**kw))

def test_a_vote_names_its_engine(runs, monkeypatch):
    from competition_kit.vote import VoteArgs
    monkeypatch.setattr(E, 'vllm_version', lambda: '')
    with pytest.raises(Refusal, match='vLLM is not installed'): VoteArgs(engine='vllm')
    assert 'engine' not in VoteArgs(engine='auto', runs=runs[0]).inputs()
    monkeypatch.setattr(E, 'vllm_version', lambda: '1.2.3')
    assert VoteArgs(engine='auto', runs=runs[0]).inputs()['engine'] == 'auto: vllm 1.2.3'

@needs_vllm
def test_votes_by_vllm(two):
    "all at once and under a budget: the submission is that of packs, and the record holds the gate"
    rows, ids = two
    named = ' '.join(ids)
    whole, plain = voted(runs=named, engine='vllm'), voted(runs=named)
    timed = voted(runs=named, engine='vllm', budget=30.)
    assert len({whole.id, plain.id, timed.id}) == 3 and plain.record['engine'] == {}
    want = p(read_probs(plain.folder/'votes.parquet'))
    for run in whole, timed:
        facts = run.record['engine'][named]
        assert facts['engine'] == f'vllm {E.vllm_version()}' and set(facts['parity']) == set(ids)
        assert abs(p(read_probs(run.folder/'votes.parquet'))-want).max() < .02
