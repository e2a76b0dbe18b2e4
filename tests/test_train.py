"One fold: killed and continued, refused, both routes, stages, several processes"

import json, os, shutil, signal, subprocess, sys, time
from dataclasses import asdict, dataclass
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
import torch
from competition_kit import train as T
from competition_kit.base import load_tokenizer
from competition_kit.core import Refusal, data_path, models_path, write_json
from competition_kit.fit import last_checkpoint
from competition_kit.log import find_run, run_stage
from competition_kit.prompt import Prompt
from competition_kit.folds import fold_rows
from competition_kit.tables import load_rows, write_rows
from competition_kit.train import TrainArgs, held_out, plot_run, train_fold

pytestmark = pytest.mark.usefixtures('baselines_once', 'samples')
small = dict(mix='sample_arena:60', lora_r=4, batch=4, epochs=2.0, save_every=3, lora_dropout=0.1, dtype='fp32')


def weights(run):
    return (run.folder / 'adapter/adapter_model.safetensors').read_bytes()


def test_killed_anywhere_ends_with_the_same_weights(tiny, tmp_path, monkeypatch):
    small = dict(globals()['small'], mix='sample_arena:30')
    code = f"from competition_kit.train import train_fold; train_fold(base={tiny!r}, **{small!r})"
    load_rows('sample_arena')

    def start():
        return subprocess.Popen(
            [sys.executable, '-c', code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ)
        )

    def checkpoints():
        return list(models_path().glob('train-*/checkpoints/checkpoint-*'))

    p, until = start(), time.time() + 90
    while not checkpoints() and p.poll() is None and time.time() < until:
        time.sleep(0.01)
    time.sleep(0.05)
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert checkpoints(), 'the training ended before it could be killed'
    newest = last_checkpoint(next(models_path().glob('train-*/checkpoints')))
    (newest / 'optimizer.safetensors').write_bytes(b'cut')  # and the newest one is damaged on top
    again = train_fold(base=tiny, **small)
    assert again.record['status'] == 'done'
    monkeypatch.setenv('CK_ROOT', str(tmp_path / 'undisturbed'))
    whole = train_fold(base=tiny, **small)
    assert weights(again) == weights(whole)
    assert again.id == whole.id
    assert json.loads((again.folder / 'loss.json').read_text()) == json.loads((whole.folder / 'loss.json').read_text())


def test_a_base_in_the_folder_of_runs_is_no_run(tiny):
    "the embedded base lies in models/bases"
    shutil.copytree(tiny, models_path('bases/tiny'))
    run = train_fold(base=str(models_path('bases/tiny')), **dict(small, epochs=1.0))
    assert run.record['status'] == 'done'
    assert 'start' not in run.record['inputs']


def test_the_same_run_is_not_made_twice(tiny, monkeypatch, capsys):
    kw = dict(small, base=tiny, mix='sample_arena:12', epochs=0.5)
    ids = [train_fold(**kw, **other).id for other in (dict(), dict(seed=1, fold=1))]
    monkeypatch.setattr(T, 'train', lambda run, args: pytest.fail('it was trained again'))
    params = find_run(ids[0])['params']
    again = train_fold(**params)
    assert again.id == ids[0] != ids[1]
    assert again.done
    assert 'done already' in capsys.readouterr().out
    assert TrainArgs(**dict(params, seed=1, fold=1)).inputs() == find_run(ids[1])['inputs']


@dataclass(frozen=True)
class SoftArgs(TrainArgs):
    "A stage that trains in another way: a field, a loss and a tensor of its own"

    scale: float = 1.0

    def more(self, enc):
        return dict(teacher=torch.full((len(enc), 3), self.scale))

    @staticmethod
    def loss(logits, target, weight, missing, total, teacher):
        return ((logits.float() - teacher) ** 2).mean(1).mul(weight).sum() / total


def test_a_stage_with_a_loss_of_its_own_reuses_the_work(tiny):
    kw = dict(small, base=tiny, mix='sample_arena:24', epochs=1.0, lora_dropout=0.0)
    soft, other = (run_stage(T.train, SoftArgs(**kw, scale=s)) for s in (1.0, 30.0))
    assert soft.id.startswith('soft-f0-')
    assert soft.record['params']['scale'] == 1.0
    first, second = (json.loads((r.folder / 'loss.json').read_text())[0][1] for r in (soft, other))
    assert second > first + 100
    assert weights(soft) != weights(other)


def test_ranks_rebuild_the_arguments(tiny):
    args = TrainArgs(**small, base=tiny)
    again = T._from_config(json.loads(json.dumps(T._config(args))))
    assert asdict(again) == asdict(args)
    soft = T._from_config(json.loads(json.dumps(T._config(SoftArgs(**small, base=tiny)))))
    assert isinstance(soft, SoftArgs)
    with pytest.raises(Refusal, match='cannot import NewArgs'):
        T._from_config(dict(T._config(args), module='__main__', kind='NewArgs'))


@pytest.mark.parametrize(
    'kw',
    [
        dict(),
        dict(route='score'),
        dict(route='score2'),
        dict(method='full', lr=1e-4),
        dict(method='full', route='score2', dtype='bf16', lr=1e-4),
    ],
    ids=str,
)
def test_routes_and_methods_learn_and_predict(tiny, kw):
    run = train_fold(base=tiny, **(dict(small, views=1, epochs=0.25) | kw))
    r = run.record
    from competition_kit.model import load_classifier, predict
    from competition_kit.prompt import Prompt
    from competition_kit.base import load_tokenizer
    from competition_kit.probs import align, read_probs

    _, held = fold_rows(load_rows('sample_arena:60'), 0)
    full, p = kw.get('method') == 'full', r['params']
    prompt = Prompt(load_tokenizer(tiny), 'preference', 512)
    classifier = load_classifier(
        str(run.folder / 'model') if full else tiny,
        prompt,
        p['route'],
        p['dtype'],
        None if full else run.folder / 'adapter',
    )
    again = predict(classifier, prompt, held, 1, progress=False)
    assert np.abs(again - align(read_probs(run.folder / 'probs.parquet'), held)).max() < (
        1e-5 if p['dtype'] == 'fp32' else 0.02
    ), 'what was saved is what was trained'
    assert r['held_out']
    assert np.isfinite(r['metrics']['log_loss'])
    assert len(r['metrics']['baselines']) == 3


def test_choice_rows(tiny):
    r = train_fold(base=tiny, **dict(small, mix='sample_logic:40', epochs=1.0)).record
    assert r['task'] == 'choice'


@pytest.mark.parametrize(
    'wrong, says',
    [
        (dict(fold=9), 'fold'),
        (dict(mix='sample_arena + nosuch:3'), 'nosuch'),
        (dict(base='./nothing/here'), 'no base'),
        (dict(route='regress'), 'route'),
        (dict(truncation='centre'), 'truncation'),
        (dict(dtype='fp8'), 'fp8'),
        (dict(lora_modules='q_prj'), 'q_prj'),
        (dict(max_len=20), 'max_len'),
        (dict(method='qlora'), 'method'),
        (dict(gpus=3), 'shared by 3'),
        (dict(start='train-f0-0000000000'), 'train-f0-0000000000'),
        (dict(mix='sample_arena >'), 'mix'),
        *(
            (d, next(iter(d)))
            for d in (
                dict(views=3),
                dict(epochs=-1.0),
                dict(epochs=0.001),
                dict(batch=0),
                dict(pack_tokens=0),
                dict(lora_r=0),
                dict(gpus=0),
                dict(warmup=5.0),
                dict(lora_dropout=1.0),
                dict(save_every=0),
                dict(compiled='maybe'),
                dict(lora_alpha=0),
                dict(lr=-1e-3),
                dict(clip=-1.0),
                dict(weight_decay=-1.0),
                dict(schedule='step'),
            )
        ),
        (dict(sharded=True), 'sharded'),
        (dict(method='full', dtype='nf4'), 'cannot be trained'),
        (dict(method='full', dtype='fp16'), 'fp16'),
    ],
)
def test_refused(tiny, wrong, says):
    with pytest.raises(Refusal, match=says):
        train_fold(**(dict(small, base=tiny) | wrong))
    assert not list(models_path().glob('train-*/adapter'))


def test_held_out_rows_are_never_trained_on():
    rows = load_rows('sample_arena')
    for f in range(5):
        train, held = fold_rows(rows, f)
        assert not set(train.group) & set(held.group)
        assert len(train) + len(held) == len(rows)


def test_folds_that_cut_a_group_are_named(tiny, capsys):
    rows = load_rows('sample_arena:12').drop(columns=['main', 'phase'])
    kw = dict(small, base=tiny, mix='own', epochs=0.5)
    for group, n in ((rows.group, 0), (rows.group.where(rows.fold > 1, 'same'), (rows.fold == 0).sum())):
        write_rows(rows.assign(group=group), data_path('own.parquet'), task='preference')
        train_fold(**kw)
        assert (f'{n} of {n} held-out rows share a group' in capsys.readouterr().out) == (n > 0)


def test_rows_are_tokenised_once(tiny, monkeypatch):
    "the held-out rows too come from the tokens of the whole table; another fold finds them there"
    calls, real = [], Prompt.encode
    monkeypatch.setattr(
        Prompt, 'encode', lambda self, rows, views=2: calls.append(len(rows)) or real(self, rows, views)
    )
    kw = dict(small, mix='sample_arena:24', epochs=1.0)
    train_fold(base=tiny, **kw)
    assert [n for n in calls if n > 8] == [24]  # a builder tries itself out on three rows, and eight choose the letters
    train_fold(base=tiny, fold=1, **kw)
    assert [n for n in calls if n > 8] == [24]


def test_losses_are_drawn_at_their_steps(tiny):
    run = train_fold(base=tiny, **dict(small, mix='sample_arena:24', epochs=1.0))
    loss = json.loads((run.folder / 'loss.json').read_text())
    assert [k for k, _ in loss] == list(range(1, run.record['metrics']['steps'] + 1))
    assert all(np.isfinite(v) for _, v in loss)
    write_json(run.folder / 'loss.json', [[10, 1.0], [20, 0.9], [30, 0.7]])  # as a GPU leaves it
    lines = plot_run(run).axes[0].lines
    assert [l.get_xdata().tolist() for l in lines[:2]] == [[10, 20, 30]] * 2
    assert lines[1].get_ydata().tolist() == [
        1.0,
        0.9,
        0.7,
    ]


def test_what_finishes_a_run_may_fail_and_no_step_is_trained_again(tiny, monkeypatch):
    from competition_kit.record import Run

    def killed(*args, **kw):
        raise KeyboardInterrupt

    kw = dict(small, mix='sample_arena:24', epochs=1.0)
    with monkeypatch.context() as m:
        m.setattr(Run, 'finish', killed)
        with pytest.raises(KeyboardInterrupt):
            train_fold(base=tiny, **kw)
    with monkeypatch.context() as m:
        m.setattr(T.TrainArgs, 'loss', None)  # no step can be trained
        run = train_fold(base=tiny, **kw)
    assert run.done
    assert not (run.folder / 'checkpoints').exists()
    assert 'tokens_s' not in run.record  # steps of another process are no speed of this one
    assert train_fold(base=tiny, **dict(kw, seed=1)).record['tokens_s'] > 0


# ---- stages
def test_a_later_stage_begins_where_the_earlier_ended(tiny):
    small = dict(globals()['small'], mix='sample_arena:12', epochs=1.0, save_every=99)
    first = train_fold(base=tiny, **dict(small, route='score'))
    same, other = (
        train_fold(base=tiny, **dict(small, route='score', start=first.id, lr=0.0, **kw))
        for kw in (dict(), dict(keep_head=False))
    )

    def score(r):
        return {k: v for k, v in _tensors(r).items() if 'score' in k}

    assert first.id != same.id
    assert all(torch.equal(v, _tensors(same)[k]) for k, v in _tensors(first).items())
    assert all(not torch.equal(v, score(other)[k]) for k, v in score(first).items())
    assert all(torch.equal(v, _tensors(other)[k]) for k, v in _tensors(first).items() if 'lora' in k)
    with pytest.raises(Refusal, match='do not fit'):
        train_fold(base=tiny, **dict(small, route='score', start=first.id, lora_r=8))
    with pytest.raises(Refusal, match='method'):
        train_fold(base=tiny, **dict(small, start=first.id, method='full'))
    full = train_fold(base=tiny, **dict(small, method='full', lr=1e-3))
    more = train_fold(base=tiny, **dict(small, method='full', lr=0.0, start=full.id))
    assert more.record['metrics']['log_loss'] == full.record['metrics']['log_loss']

    again = train_fold(
        base=tiny,
        **dict(
            small,
            method='full',
            route='score',
            lr=0.0,
            start=train_fold(base=tiny, **dict(small, method='full', route='score', lr=1e-3)).id,
            keep_head=False,
        ),
    )
    assert again.record['metrics']['log_loss'] != full.record['metrics']['log_loss']
    over = train_fold(base=str(full.folder / 'model'), **small)  # all weights and their tokenizer are a base
    assert over.record['base'] != first.record['base']


def test_a_stage_of_another_task_spells_its_letters_as_the_earlier(tiny, monkeypatch):
    def other(classifier, prompt, rows):
        classifier.letters = list(prompt.others)
        return {}

    small = dict(globals()['small'], base=tiny, epochs=0.5)
    usual = train_fold(**dict(small, mix='sample_arena:12'))
    monkeypatch.setattr(T, 'choose_letters', other)
    first = train_fold(**dict(small, mix='sample_logic:12'))
    for parent, mix, task, name in (
        (first, 'sample_arena:12', 'preference', 'others'),
        (usual, 'sample_logic:12', 'choice', 'letters'),
    ):
        run = train_fold(**dict(small, mix=mix, start=parent.id))
        assert run.record['letters'] == getattr(Prompt(load_tokenizer(tiny), task, 512), name)


def test_a_stage_never_holds_out_what_an_earlier_one_learned(tiny):
    "as its start, as its base, and two stages back"
    small = dict(globals()['small'], mix='sample_arena:40', epochs=1.0, lr=0.0)
    lora, full = (
        train_fold(base=tiny, **dict(small, fold=1)),
        train_fold(base=tiny, **dict(small, fold=1, method='full')),
    )
    second = train_fold(base=tiny, **dict(small, fold=1, start=lora.id, seed=1))
    for kw in (
        dict(base=tiny, start=lora.id),
        dict(base=tiny, start=second.id),
        dict(base=str(full.folder / 'model')),
        dict(base=tiny, method='full', start=full.id),
    ):
        with pytest.raises(Refusal, match='out-of-fold'):
            train_fold(**dict(small, fold=0) | kw)
    other = dict(small, base=_another(tiny))
    with pytest.raises(Refusal, match='another base'):
        train_fold(**dict(other, fold=1, start=lora.id))


def test_a_stage_over_a_table_that_changed_is_refused(tiny):
    small = dict(globals()['small'], mix='own', epochs=1.0, lr=0.0, base=tiny)
    rows = load_rows('sample_arena:40').drop(columns=['main', 'phase'])
    write_rows(rows, data_path('own.parquet'), task='preference')
    first = train_fold(**small)
    write_rows(rows.assign(fold=rows.fold.to_numpy()[::-1]), data_path('own.parquet'), task='preference')
    with pytest.raises(Refusal, match='has changed since'):
        train_fold(**dict(small, start=first.id))
    write_rows(rows.assign(label=(rows.label + 1) % 3), data_path('own.parquet'), task='preference')
    with pytest.raises(Refusal, match='has changed since'):
        held_out(first)  # its probabilities would stand beside other labels


def test_rows_with_soft_labels_alone(tiny):
    "are learned from beside others, and never held out"
    rows = load_rows('sample_arena:40').drop(columns=['main', 'phase'])
    write_rows(
        rows.assign(
            id='s' + rows.id,
            group='s' + rows.group,
            label=-1,
            target=[[0.5, 0.3, 0.2]] * len(rows),
            prompt=[[f'{p[0]} {k}' * 3] for k, p in enumerate(rows.prompt)],
        ),
        data_path('soft.parquet'),
        task='preference',
    )
    small = dict(globals()['small'], epochs=1.0, base=tiny)
    assert train_fold(**dict(small, mix='sample_arena:24 + soft')).record['status'] == 'done'
    with pytest.raises(Refusal, match='no label'):
        train_fold(**dict(small, mix='soft'))
    assert len(list(models_path().glob('train-*'))) == 1


@pytest.mark.parametrize('weight', [-1.0, np.nan, np.inf])
def test_weights_that_are_none_are_refused(tiny, weight):
    rows = load_rows('sample_arena:40').drop(columns=['main', 'phase'])
    odd = rows.index[rows.fold == 1][0]
    write_rows(rows.assign(weight=rows.weight.where(rows.index != odd, weight)), data_path('part.parquet'))
    with pytest.raises(Refusal, match=f'weight.*{rows.id[odd]}'):
        train_fold(base=tiny, **dict(small, mix='part'))


def test_rows_without_any_weight_are_refused(tiny):
    rows = load_rows('sample_arena:40').drop(columns=['main', 'phase'])
    write_rows(rows.assign(weight=1.0 * (rows.fold == 0)), data_path('part.parquet'))
    with pytest.raises(Refusal, match='all .* rows to train on have the weight 0'):
        train_fold(base=tiny, **dict(small, mix='part'))


def test_rows_that_teach_nothing_are_refused(tiny):
    rows = load_rows('sample_arena:40').drop(columns=['main', 'phase'])
    write_rows(rows.assign(label=rows.label.where(rows.fold != 1, -1)), data_path('part.parquet'), task='preference')
    with pytest.raises(Refusal, match='neither label nor soft label'):
        train_fold(base=tiny, **dict(small, mix='part'))


def test_one_base_has_one_name(tiny, monkeypatch):
    "a run is the same from wherever its base is seen, also when it is gone on from later"
    small = dict(globals()['small'], mix='sample_arena:24', epochs=1.0, method='full')
    base = shutil.copytree(tiny, models_path('bases/tiny'))
    run = train_fold(base=str(base), **small)
    nbs = models_path().parent / 'nbs'
    nbs.mkdir()
    monkeypatch.chdir(nbs)
    assert run.record['params']['base'] == 'models/bases/tiny'
    assert {
        train_fold(base=b, **small).id for b in ('models/bases/tiny', '../models/bases/tiny', 'models/bases/tiny/')
    } == {run.id}
    shutil.rmtree(base)
    later = train_fold(base=f'../models/{run.id}/model', **dict(small, method='lora'))
    assert later.record['params']['base'] == f'models/{run.id}/model'
    with pytest.raises(Refusal, match='out-of-fold'):
        train_fold(base=f'models/{run.id}/model', **dict(small, fold=1))
    elsewhere = models_path().parent / 'disk'
    shutil.move(run.folder, elsewhere)
    run.folder.symlink_to(elsewhere)
    with pytest.raises(Refusal, match='out-of-fold'):
        train_fold(base=f'models/{run.id}/model', **dict(small, fold=1))


def test_one_mix_has_one_name(tiny):
    def spelled(mix, modules):
        args = TrainArgs(base=tiny, mix=mix, lora_modules=modules)
        return args.mix, args.lora_modules

    one = 'extra@0.5 > sample_arena:40 + told', 'q_proj,v_proj'
    assert spelled(*one) == one
    assert spelled(' extra @ 0.5>sample_arena: 40  +told ', 'q_proj, v_proj ') == one


def test_a_copied_model_keeps_its_history(tiny, tmp_path):
    "what it has learned from travels in its folder, also over two stages; without the tables nobody can tell"
    from competition_kit.trained import ancestors, parent_run, read_lineage, rows_seen

    small = dict(globals()['small'], mix='own', epochs=1.0, lr=0.0, method='full')
    write_rows(
        load_rows('sample_arena:40').drop(columns=['main', 'phase']), data_path('own.parquet'), task='preference'
    )
    first = train_fold(base=tiny, **small)
    copy = shutil.copytree(first.folder / 'model', tmp_path / 'copy')
    second = train_fold(base=str(copy), **dict(small, seed=1))
    last = shutil.copytree(second.folder / 'model', tmp_path / 'last')
    seen = set(rows_seen(second.id).id)
    shutil.rmtree(first.folder)
    shutil.rmtree(second.folder)
    assert [r['run_id'] for r in read_lineage(str(last))] == [second.id, first.id]
    assert parent_run(dict(base=str(last))) == second.id
    with pytest.raises(Refusal, match=f'{second.id} was trained on .* out-of-fold'):
        train_fold(base=str(last), **dict(small, fold=1))
    third = train_fold(base=str(last), **dict(small, method='lora'))
    assert len(ancestors(third.id)) == 3
    assert set(rows_seen(third.id).id) == seen
    weights = copy / 'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:-1] + b'!')
    with pytest.raises(Refusal, match='not as it was trained.*model.safetensors'):
        train_fold(base=str(copy), **dict(small, seed=2))
    write_rows(
        load_rows('sample_arena:40').drop(columns=['main', 'phase']), data_path('other.parquet'), task='preference'
    )
    data_path('own.parquet').unlink()
    with pytest.raises(Refusal, match='nobody can tell which rows.*no table called own'):
        train_fold(base=str(last), **dict(small, mix='other'))


def test_folds_in_stages_are_one_voter(tiny):
    from competition_kit.trained import rows_seen
    from competition_kit.vote import voters

    small = dict(globals()['small'], mix='sample_arena:40', epochs=1.0, lr=0.0, base=tiny)
    first = [train_fold(**dict(small, fold=k)) for k in (0, 1)]
    second = [train_fold(**dict(small, fold=k, start=r.id)) for k, r in enumerate(first)]
    full = [train_fold(**dict(small, fold=k, method='full')) for k in (0, 1)]
    over = [train_fold(**dict(small, fold=k, base=f'models/{r.id}/model')) for k, r in enumerate(full)]
    for runs in (first, second, over):
        assert voters('sample_arena', ' '.join(r.id for r in runs)).voter.nunique() == 1
    assert voters('sample_arena', f'{first[0].id} {second[1].id}').voter.nunique() == 2
    assert set(rows_seen(second[0].id).id) == set(rows_seen(over[0].id).id)
    assert len(rows_seen(second[0].id)) == 2 * len(rows_seen(first[0].id))
    shutil.rmtree(first[0].folder)
    assert voters('sample_arena', ' '.join(r.id for r in second)).voter.nunique() == 2


def _another(base):
    "the same shapes, other weights"
    from transformers import AutoModelForCausalLM

    out = Path(base).parent / 'another'
    shutil.copytree(base, out, dirs_exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(base)
    for p in model.parameters():
        p.data += 0.01
    model.save_pretrained(out)
    return str(out)


@pytest.mark.parametrize('save_every', [1, 99])
def test_a_run_that_went_wrong_says_so(tiny, save_every):
    "and leaves no checkpoint from which it would go wrong again"
    for _ in range(2):
        with pytest.raises(Refusal, match='NaN at step'):
            train_fold(
                base=tiny, **dict(small, mix='sample_arena:24', lr=1e30, clip=0.0, warmup=0.0, save_every=save_every)
            )
    for f in models_path().glob('train-*/checkpoints/*/weights.safetensors'):
        from safetensors.torch import load_file

        assert all(v.isfinite().all() for v in load_file(f).values())


def test_rows_of_no_weight(tiny):
    rows = load_rows('sample_arena:40').drop(columns=['main', 'phase'])
    write_rows(rows.assign(weight=np.arange(len(rows)) % 2 * 1.0), data_path('half.parquet'), task='preference')
    m = train_fold(base=tiny, **dict(small, mix='half', batch=1, views=1, epochs=1.0)).record['metrics']
    assert np.isfinite(m['log_loss'])


def _tensors(run):
    from safetensors.torch import load_file

    return load_file(run.folder / 'adapter/adapter_model.safetensors')


def test_two_phases(tiny):
    "rows of the first mix come first; the second mix's first table is the one that is held out"
    load_rows('sample_arena')
    table = pd.read_parquet(data_path('sample_arena.parquet'))
    rows = load_rows('sample_arena')
    half = (
        rows.head(20)
        .drop(columns=['main', 'phase'])
        .assign(
            id=[f'x{k}' for k in range(20)],
            group=[f'g{k}' for k in range(20)],
            prompt=[[f'quite another question {k}'] for k in range(20)],
        )
    )
    write_rows(half, data_path('extra.parquet'), task='preference')
    got = load_rows('extra > sample_arena:40')
    assert set(got.phase[got.source.index[got.id.str.startswith('x')]]) == {0}
    assert set(got.phase[got.main]) == {1}
    assert got.main.sum() == 40
    assert len(table) > 40
    r = train_fold(base=tiny, **dict(small, mix='extra > sample_arena:40', epochs=0.5)).record
    assert r['held_out'] == (load_rows('sample_arena:40').fold == 0).sum()
    assert set(r['inputs']) >= {
        'extra',
        'sample_arena',
    }


# ---- processes
def test_two_processes_share_a_model(tiny):
    "all weights learn, each process holds half of every layer, and the run is the same as alone"
    kw = dict(small, mix='sample_arena:20', method='full', lr=1e-3, clip=0.0, lora_dropout=0.0, epochs=1.0)
    one, two = train_fold(base=tiny, **kw), train_fold(base=tiny, **dict(kw, gpus=2, sharded=True))
    from competition_kit.probs import read_probs

    a, b = (read_probs(r.folder / 'probs.parquet') for r in (one, two))
    assert list(a.id) == list(b.id)
    assert np.abs(np.stack(a.p) - np.stack(b.p)).max() < 1e-5
    assert (two.folder / 'model/model.safetensors').stat().st_size == (
        one.folder / 'model/model.safetensors'
    ).stat().st_size


def test_two_processes_share_a_packed_base(tiny, tmp_path, monkeypatch):
    "a LoRA over a GPTQ base and a new head, each process with half of the packed numbers; nf4 is refused by each"
    from gptq_writer import checkpoint

    checkpoint(tiny, tmp_path / 'q', group=32)
    kw = dict(small, base=str(tmp_path / 'q'), mix='sample_arena:20', route='score', lora_dropout=0.0, epochs=1.0)
    one, two = train_fold(**kw), train_fold(**dict(kw, gpus=2, sharded=True))
    from competition_kit.probs import read_probs

    a, b = (np.stack(read_probs(r.folder / 'probs.parquet').p) for r in (one, two))
    assert np.abs(a - b).max() < 1e-5
    monkeypatch.setattr(T, 'ranks', lambda: 2)  # as each of them sees it
    with pytest.raises(Refusal, match='nf4 cannot be spread'):
        T.new_model(TrainArgs(**dict(kw, base=tiny, dtype='nf4', gpus=2, sharded=True)))


slow_writer = '''
import sys, time
from competition_kit import train as T
from competition_kit.ranks import as_rank, rank
real = T.save_model
def save_model(*args):
    if not rank(): time.sleep(8)
    real(*args)
T.save_model = save_model
as_rank(sys.argv[1], T._one_rank)
'''


def test_ranks_wait_for_the_weights_that_they_load_again(tiny, tmp_path):
    rows = load_rows('sample_logic')[:20].drop(columns=['main', 'phase'])
    rows['rationale'] = [f'<output>{"ABCDEFG"[k]}</output>' for k in rows.label]
    write_rows(rows, data_path('told.parquet'))
    args = TrainArgs(mix='told', base=tiny, route='text', lora_r=2, dtype='fp32', max_new_tokens=20, epochs=0.2, gpus=2)
    (tmp_path / 'run').mkdir()
    (tmp_path / 'slow.py').write_text(slow_writer)
    T.launch(tmp_path / 'run', T._config(args), 2, str(tmp_path / 'slow.py'))
    parts = [np.load(tmp_path / f'run/part-00{k}.npy') for k in (0, 1)]
    assert sum(map(len, parts)) == len(args.scored)


def test_ranks_find_the_tokens_there(tiny, monkeypatch):
    def started(*args):
        raise RuntimeError(f"{len(list(models_path('.tokens').iterdir()))} tables are tokenised")

    monkeypatch.setattr(T, 'launch', started)
    with pytest.raises(RuntimeError, match='1 tables'):
        train_fold(base=tiny, **small, gpus=2)


def test_the_letters_that_the_base_prefers_are_trained_and_predicted(tiny, own_root, monkeypatch):
    from competition_kit.trained import predict_runs

    asked = []

    def other(classifier, prompt, rows):
        asked.append(list(rows.id))
        classifier.letters = list(prompt.others)
        return dict(letters=0.1, others=0.5)

    prompt = Prompt(load_tokenizer(tiny), 'preference', 256)
    assert prompt.others
    assert prompt.others != prompt.letters
    monkeypatch.setattr(T, 'choose_letters', other)
    kw = dict(mix='sample_arena:60', base=tiny, max_len=256, lora_r=2)
    run = train_fold(**kw)
    assert run.record['letters'] == prompt.others
    assert run.record['letter_mass'] == dict(letters=0.1, others=0.5)
    rows, p = held_out(run)
    got = predict_runs([run.id], rows, own_root / 'predicted', progress=False)[run.id]
    assert np.allclose(np.stack(got.p), p, atol=1e-4)
    assert train_fold(**kw, epochs=0.5, start=run.id).record['letters'] == prompt.others
    train_fold(**kw, fold=1)
    assert asked[0] == asked[1]  # folds with other letters could not be merged
