"Response pairs: prompts without copies, two models a prompt, faults counted, kills, and the way to a training"
import json, os, signal, subprocess, sys, time
import pandas as pd
import pytest
from competition_kit.core import Refusal, data_path, jsonl_text, models_path, read_table
from competition_kit.pairs import PairsArgs, join_answers, pair_rows, pairs, parse_writer, read_pool
from competition_kit.record import run_stage
from competition_kit.replies import read_replies
from competition_kit.rows import text_columns
from competition_kit.tables import load_rows, publish, write_rows

THINGS = 'river forest market teacher winter bridge garden harbour letter window kitchen mountain'.split()
TEXTS = [f'Write {k+3} sentences about a {a} near a {b}, and say who might live there.'
         for k, (a, b) in enumerate(zip(THINGS, THINGS[1:]+THINGS[:1]))]

def write_pool(*texts, name='prompts'):
    data_path().mkdir(exist_ok=True, parents=True)
    lines = [dict(id=f'p{k}', prompt=t, language='English' if k % 2 else 'Korean') for k, t in enumerate(texts)]
    data_path(f'{name}.jsonl').write_text(jsonl_text(lines), encoding='utf-8')

def other_base(folder, base, seed):
    "Another random base with the same tokenizer"
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return str(folder)

@pytest.fixture(scope='module')
def bases(tmp_path_factory, tiny):
    return [str(tiny), *(other_base(tmp_path_factory.mktemp('other'), tiny, k) for k in (1, 2))]

def args_of(bases, **more):
    given = dict(models=' '.join(bases), rounds='4 English:.25 > 6 English:.5', max_new_tokens=6, shard=2,
                 temperature=.12, min_chars=10, drop='', against='none')
    return PairsArgs(**(given | more))

def test_from_a_pool_to_a_training(runs, bases, tiny, baselines_once):
    "two runs answer beside a base; `06_pseudo` labels the pairs, and `04_train` mixes them"
    from competition_kit.pseudo import PseudoArgs, pseudo
    from competition_kit.train import train_fold
    known = load_rows('sample_arena').prompt[0][0]
    write_pool(*TEXTS, known.upper()+' !', TEXTS[3]+'!')
    args = args_of([bases[1], f'{runs[0]}@.2,.8', runs[2]], against='sample_arena')
    run = run_stage(pairs, args)
    m = run.record['metrics']
    assert m['pool: near sample_arena'] == 1 and m['pool: near another prompt'] == 1 and m['pool: kept'] == 12
    assert m['pairs'] == m['rows'] == 10
    table = read_table(run.folder/'pairs.parquet')
    assert table.groupby(['round', 'language']).size().to_dict() == {
        (1, 'English'): 1, (1, 'Korean'): 3, (2, 'English'): 3, (2, 'Korean'): 3} and table.id.is_unique
    assert (table.a != table.b).all() and len({*table.a}) == 3
    answers = read_table(run.folder/'answers.parquet')
    assert len(answers) == 20 and set(answers.adapter) == {'', runs[0], runs[2]}
    assert set(answers.temperature[answers.adapter == runs[0]]) == {.2}
    publish(run.folder, args.name)
    rows = load_rows('prompts_pairs')
    assert (rows.label == -1).all() and rows.lineage.str.startswith('data/prompts.jsonl, prompt p').all()
    assert rows.attrs['meta']['task'] == 'preference' and rows.attrs['meta']['run'] == run.id
    labelled = run_stage(pseudo, PseudoArgs(data='prompts_pairs', teachers=runs[0], margin=0., near='refuse'))
    assert labelled.record['rows'] == 10
    publish(labelled.folder, 'prompts_pairs_pseudo')
    trained = train_fold(mix='prompts_pairs_pseudo > sample_arena', base=tiny, max_len=160, lora_r=2, dtype='fp32')
    assert trained.done

KILLED = '''
import sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from test_pairs import *
run_stage(pairs, args_of(sys.argv[2:], max_new_tokens=50, shard=1))
'''

def test_a_killed_stage_repeats_nothing(bases, own_root, monkeypatch):
    from competition_kit import pairs as P
    write_pool(*TEXTS)
    command = [sys.executable, '-c', KILLED, os.path.dirname(__file__), *bases]
    p = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=dict(os.environ, CK_ROOT=str(own_root)))
    end = time.monotonic()+120
    def shards(): return list(models_path().glob('pairs-*/replies/*/*.parquet'))
    while len({f.parent for f in shards()}) < 2 and p.poll() is None and time.monotonic() < end: time.sleep(.01)
    p.send_signal(signal.SIGKILL)
    p.wait()
    kept, loaded = {f: f.stat().st_mtime_ns for f in shards()}, []
    assert kept
    real = P.engine_of
    monkeypatch.setattr(P, 'engine_of', lambda args, k: [loaded.append(k), real(args, k)][1])
    run = run_stage(pairs, args_of(bases, max_new_tokens=50, shard=1))
    assert run.done and all(f.stat().st_mtime_ns == t for f, t in kept.items()), 'a complete shard was written again'
    assert len(shards()) == 20 and loaded == [1, 2], 'the first model was complete: it is not loaded again'

def test_a_model_that_says_nothing_is_refused(bases, tmp_path):
    "its final norm is zero, so every logit is, and the first token is one that is no text"
    from transformers import AutoModelForCausalLM
    mute = other_base(tmp_path/'mute', bases[0], 3)
    model = AutoModelForCausalLM.from_pretrained(mute)
    model.model.norm.weight.data.zero_()
    model.save_pretrained(mute)
    write_pool(*TEXTS)
    with pytest.raises(Refusal, match='mute answers with nothing: 2 empty texts'):
        run_stage(pairs, args_of([bases[0], f'{mute}@0']))
    folder, = models_path().glob('pairs-*')
    assert sum(len(read_replies(f)) for f in (folder/'replies').iterdir()) == 12, 'what the other one wrote stays'

def test_pairs_with_faults_are_left_out_and_counted():
    prompts = pd.DataFrame(dict(id=list('abcd'), prompt=TEXTS[:4], turns=1, language='English', round=1, a=0, b=1))
    loop, no = 'so it goes and '*20, 'I cannot help with that.'
    texts = {0: ['A river.', 'Same.', loop, 'Fine.'], 1: ['A town.', 'Same. ', 'A bridge.', no]}
    answers = {k: pd.DataFrame(dict(id=list('abcd'), text=t, finish='stop')) for k, t in texts.items()}
    answers[1].loc[0, 'finish'] = 'length'
    joined = join_answers(prompts, answers)
    assert joined.fault.tolist() == ['cut', 'same', 'repeats', 'refuses']
    writers = [parse_writer(n, .7, .9) for n in ('smollm2', 'a/b')]
    kept = [len(pair_rows(joined, writers, 'preference', d)) for d in ('', 'cut same', 'empty cut repeats same')]
    assert kept == [4, 2, 1]

def test_a_run_of_all_weights_is_named_as_the_root_sees_it(runs, monkeypatch):
    from competition_kit import pairs as P
    (folder := models_path(runs[0], 'model')).mkdir()
    (folder/'config.json').write_text('{}')
    monkeypatch.setattr(P, 'is_full', lambda rec: True)
    monkeypatch.setattr(P, 'base_of', lambda rec: str(folder))
    assert parse_writer(runs[0], .7, .9)[:3] == (runs[0], f'models/{runs[0]}/model', '')

def test_a_thought_is_no_part_of_an_answer():
    prompts = pd.DataFrame(dict(id=list('ab'), prompt=TEXTS[:2], turns=1, language='English', round=1, a=0, b=1))
    texts = {0: ['<think>Hm.</think>\n\nA river.', '<think>Hm.'], 1: ['A river.', '<think>Hm.</think>\n']}
    joined = join_answers(prompts, {k: pd.DataFrame(dict(id=list('ab'), text=t, finish=['stop', 'length'][1-k]))
                                    for k, t in texts.items()})
    assert joined.text_a[0] == joined.text_b[0] == 'A river.'
    assert joined.fault.tolist() == ['cut same', 'cut empty']

def test_pools(tmp_path, samples):
    import csv
    rows = load_rows('sample_arena')
    assert len(read_pool('sample_arena')) == len(rows)
    with open(tmp_path/'p.csv', 'w', newline='') as f:
        csv.writer(f).writerows([['prompt'], ['谁是艾达？'], [json.dumps(['One?', 'Two?'])], ['[sic] a "b"']])
    pool = read_pool(tmp_path/'p.csv')
    assert pool.language.tolist() == ['cjk', 'latin', 'latin'] and pool.turns.tolist() == [1, 2, 1]
    assert pool.prompt.tolist() == ['谁是艾达？', 'One?\nTwo?', '[sic] a "b"'] and pool.id.is_unique

def test_gaps_of_a_pool_are_filled(tmp_path):
    def pool(*lines):
        (tmp_path/'p.jsonl').write_text(''.join(json.dumps(o)+'\n' for o in lines), encoding='utf-8')
        return read_pool(tmp_path/'p.jsonl')
    found = pool(dict(id=None, prompt='Who?\ud800', language=None),
                 dict(id='7', prompt='["a", {}, "b"]', language='en'))
    assert found.prompt.tolist() == ['Who?\ufffd', '["a", {}, "b"]'] and found.language.tolist() == ['latin', 'en']
    assert found.id[1] == '7' and found.id[0] not in ('', 'None')
    with pytest.raises(Refusal, match=r'neither a text nor a list of texts.*Rows \(2\): 1, 2'):
        pool(dict(prompt='Who?'), dict(prompt=[dict(role='user', content='Who?')]), dict(prompt=5))
    table = pd.DataFrame(dict(id=['a', 'b'], group='', source='', fold=-1, label=-1, target=None, weight=1.))
    table = table.assign(language=['French', None], **{c: [['Qui ?'], ['谁？']] for c in text_columns['pair']})
    write_rows(table, data_path('gaps.parquet'), task='preference')
    assert read_pool('gaps').language.tolist() == ['French', 'cjk']

def test_too_few_prompts_are_refused_before_a_model_is_loaded(bases):
    write_pool(*TEXTS)
    with pytest.raises(Refusal, match='lacks prompts.*6 of 9'): run_stage(pairs, args_of(bases, rounds='9 English:1'))
    (tmp := data_path('odd.jsonl')).write_text('{"text": "x"}\n')
    with pytest.raises(Refusal, match='no column prompt'): read_pool(tmp)

def test_two_prompts_with_one_id_are_refused(tmp_path):
    def pool(*lines): (tmp_path/'p.jsonl').write_text(jsonl_text(lines), encoding='utf-8')
    pool(dict(id=7, prompt=TEXTS[0]), dict(id=7, prompt=TEXTS[1]), dict(id=8, prompt=TEXTS[2]))
    with pytest.raises(Refusal, match=r'one id.*Rows \(1\): 7'): read_pool(tmp_path/'p.jsonl')
    pool(dict(prompt=TEXTS[0]), dict(prompt=TEXTS[0]))
    assert len(read_pool(tmp_path/'p.jsonl')) == 2, 'a copy without an id is left out later'

def test_tables_that_are_missing_or_would_be_replaced_are_refused(bases, samples):
    write_pool(*TEXTS)
    for missing in ('nosuch', 'nosuch_test', 'sample_arena nosuch_test'):
        with pytest.raises(Refusal, match='no table called nosuch'): args_of(bases, against=missing).inputs()
    assert list(args_of(bases, against='sample_arena').others) == ['sample_arena', 'sample_arena_test']
    with pytest.raises(Refusal, match='would be replaced'): args_of(bases, against='sample_arena', name='sample_arena')
    with pytest.raises(Refusal, match='pairs would replace it'): args_of(bases, name='sample_logic')
