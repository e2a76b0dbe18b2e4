"Votes, weights and submissions: properties, damaged files of every layout, and damaged adapters"

import json, shutil
from collections import Counter
import numpy as np, openpyxl, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from competition_kit.core import Refusal, data_path, models_path, read_json, write_json
from competition_kit.log import LOG, find_run, read_record, run_stage, write_record
from competition_kit.probs import align, log_loss, read_probs, scores, write_probs
from competition_kit.sample import make_sample
from competition_kit.rows import tasks
from competition_kit.tables import load_rows, write_rows
from competition_kit.combine import agreement, combine, entropy, fit_weights, majority
from competition_kit.submission import check_submission, find_sample, make_submission, practice_score
from competition_kit.trained import kept_probs, predict_runs, trusted_prompt
from competition_kit.vote import (
    VoteArgs,
    left_out,
    oof_probs,
    oof_vote,
    run_weights,
    score_tables,
    score_vote,
    training_table,
    vote,
    voter_weights,
    voters,
)

RULES = 'mean', 'logits', 'majority'


# ---- combining
@st.composite
def ballots(draw, most=7):  # [voters, rows, options] with rows of different numbers of options
    k, n, width = draw(st.integers(1, most)), draw(st.integers(1, 9)), draw(st.integers(2, 7))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    own = rng.integers(1, width + 1, n)
    p = rng.dirichlet([draw(st.sampled_from([0.05, 1, 20]))] * width, (k, n)) * (
        np.arange(width) < own[:, None]
    ) + 1e-12 * (np.arange(width) < own[:, None])
    return (p / p.sum(-1, keepdims=True)).astype(np.float32), own


@settings(max_examples=150)
@given(ballots(), st.sampled_from(RULES), st.integers(0, 10**6))
def test_sums_scale_order_and_missing_options(ballot, rule, seed):
    p, own = ballot
    rng = np.random.default_rng(seed)
    w = rng.integers(1, 9, len(p)).astype(float)
    got = combine(p, w, rule)
    assert got.shape == p.shape[1:]
    assert got.dtype == np.float32
    assert np.isfinite(got).all()
    assert (got >= 0).all()
    np.testing.assert_allclose(got.sum(1), 1, atol=1e-5)
    assert (got[np.arange(p.shape[2]) >= own[:, None]] == 0).all()
    np.testing.assert_allclose(combine(p, w * 37.5, rule), got, atol=2e-5)
    order = rng.permutation(len(p))
    np.testing.assert_allclose(combine(p[order], w[order], rule), got, atol=2e-5)
    np.testing.assert_allclose(combine(iter(p), None, rule), combine(p, np.ones(len(p)), rule), atol=2e-5)
    rows = rng.permutation(p.shape[1])
    np.testing.assert_allclose(combine(p[:, rows], w, rule), got[rows], atol=2e-5)
    np.testing.assert_allclose(
        combine(np.concatenate([p, p[:1]]), [*w, 0], rule), got, atol=2e-5
    )  # a weight of 0 is no voter


@settings(max_examples=150)
@given(ballots(), st.integers(0, 10**6))
def test_majority_is_a_counter(ballot, seed):
    p, own = ballot
    w = np.random.default_rng(seed).integers(1, 4, len(p))
    share, tied = majority(p, w)
    one_best = ((p == p.max(2, keepdims=True)).sum(2) == 1).all(0)  # a voter with two best options splits its vote
    for r in np.flatnonzero(one_best):
        c = Counter(np.repeat(p[:, r].argmax(1), w).tolist())
        first = [k for k, v in c.items() if v == max(c.values())]
        assert tied[r] == (len(first) > 1)
        if not tied[r]:
            np.testing.assert_allclose(share[r], [c[k] / w.sum() for k in range(p.shape[2])], atol=1e-5)
        mean = np.average(p[:, r], 0, w)
        assert mean[share[r].argmax()] >= max(mean[first]) - 1e-6
        assert share[r].argmax() in first


@settings(max_examples=60)
@given(ballots(), st.integers(0, 10**6))
def test_mean_and_logits_are_what_they_say(ballot, seed):
    p, own = ballot
    w = np.random.default_rng(seed).random(len(p)) + 0.01
    np.testing.assert_allclose(combine(p, w), np.average(p, 0, w), atol=1e-5)
    e = np.exp(np.average(np.log(np.maximum(p.astype(float), 1e-15)), 0, w)) * (p.sum(0) > 0)
    np.testing.assert_allclose(combine(p, w, 'logits'), e / e.sum(1, keepdims=True), atol=1e-4)


def test_ties():
    p = np.array([[[0.6, 0.4, 0]], [[0.3, 0.7, 0]]])
    share, tied = majority(p)
    assert tied.all()
    assert share.argmax() == 1  # 0.55 against 0.45 in the mean
    assert majority(p[::-1])[0].argmax() == 1  # whoever comes first
    assert not majority(p, [2, 1])[1].any()
    assert majority(p, [2, 1])[0].argmax() == 0
    even = np.array([[[0.6, 0.4]], [[0.4, 0.6]]])
    assert majority(even)[1].all()
    assert majority(even)[0].argmax() == 0  # alike to the last bit: the first option
    np.testing.assert_allclose(majority([[[0.5, 0.5, 0]], [[0.1, 0.2, 0.7]]])[0], [[0.25, 0.25, 0.5]])
    three = np.array([[[0.9, 0.1, 0]], [[0.1, 0.9, 0]], [[0, 0.1, 0.9]]])
    assert majority(three, [0.1, 0.1, 0.1])[1].all()
    assert majority(three, [1 / 3, 1 / 3, 0.34])[0].argmax() == 2


@pytest.mark.parametrize('weights', [[1], [1, 1, 1], [1, -1], [0, 0], [1, float('nan')], [1, float('inf')], []])
def test_bad_weights(weights):
    for rule in RULES:
        with pytest.raises(Refusal, match='weights'):
            combine(np.full((2, 3, 2), 0.5), weights, rule)


def test_no_voters_and_other_shapes():
    with pytest.raises(Refusal, match='needs a voter'):
        combine([])
    with pytest.raises(Refusal, match='among voters'):
        combine([np.ones((3, 2)), np.ones((3, 3))])
    with pytest.raises(Refusal, match='no rule'):
        combine(np.ones((1, 1, 1)), rule='max')
    assert combine(np.zeros((2, 0, 3))).shape == (0, 3)


def test_more_rows_than_a_block():
    p = np.random.default_rng(0).dirichlet([1] * 3, (3, 70_001)).astype(np.float32)
    for rule in RULES:
        np.testing.assert_allclose(
            combine(p, rule=rule)[65_530:65_540], combine(p[:, 65_530:65_540], rule=rule), atol=1e-6
        )


def test_agreement_and_entropy():
    p = np.array([[[0.9, 0.1], [0.4, 0.6]], [[0.8, 0.2], [0.6, 0.4]], [[0.7, 0.3], [0.1, 0.9]]])
    np.testing.assert_allclose(agreement(p, combine(p)), [1, 2 / 3], atol=1e-6)
    np.testing.assert_allclose(entropy([[1, 0], [0.5, 0.5]]), [0, np.log(2)], atol=1e-6)


# ---- weights
def noisy(skills, n=4000, k=3, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, k, n)
    own = [np.where(rng.random(n) < s, y, rng.integers(0, k, n)) for s in skills]
    return np.stack([0.1 / k + 0.9 * (0.5 * rng.dirichlet([1] * k, n) + 0.5 * np.eye(k)[o]) for o in own]).astype(
        np.float32
    ), y


@pytest.mark.parametrize('rule', ['mean', 'logits'])
def test_fit_finds_the_weights_that_made_the_labels(rule):
    rng, true = np.random.default_rng(1), np.array([0.6, 0.3, 0.1])
    p = rng.dirichlet([0.5] * 3, (3, 60_000)).astype(np.float32).clip(1e-3)
    p /= p.sum(-1, keepdims=True)
    q = combine(p, true, rule).astype(float)
    y = (rng.random((60_000, 1)) > q.cumsum(1)[:, :-1]).sum(1)
    np.testing.assert_allclose(fit_weights(p, y, rule), true, atol=0.03)


@settings(max_examples=40)
@given(ballots(), st.sampled_from(RULES), st.integers(0, 10**6))
def test_fit_is_never_worse_than_equal_on_its_own_rows(ballot, rule, seed):
    p, own = ballot
    y = np.random.default_rng(seed).integers(0, own)
    w = fit_weights(p, y, rule)
    assert w.shape == (len(p),)
    assert (w >= 0).all()
    assert abs(w.sum() - 1) < 1e-9
    soft = 'mean' if rule == 'majority' else rule
    assert log_loss(combine(p, w, soft), y) <= log_loss(combine(p, None, soft), y) + 1e-3


def test_a_voter_that_guesses_gets_little():
    p, y = noisy([0.6, 0.0, 0.5])
    w = fit_weights(p, y)
    assert w[1] < 0.02
    assert w[0] > w[2] > 0.2


def test_fitted_weights_of_a_fold_come_from_the_others():
    p, y = noisy([0.6, 0.5], 400)
    fold = np.arange(400) % 2
    rows, oof = pd.DataFrame(dict(label=y, fold=fold)), dict(a=p[0], b=p[1])
    got = oof_vote(oof, rows, 'fit')
    for k in (0, 1):
        np.testing.assert_allclose(
            got[fold == k], combine(p[:, fold == k], fit_weights(p[:, fold != k], y[fold != k])), atol=1e-6
        )
    flipped = rows.assign(
        label=np.where(fold == 0, (y + 1) % 3, y)
    )  # a fold's own labels change nothing in its own vote
    np.testing.assert_allclose(oof_vote(oof, flipped, 'fit')[fold == 0], got[fold == 0], atol=1e-6)


# ---- submissions: ids that look like numbers stay text, in all three layouts
IDS = ['007', '12e5', '7', 'a b', '1,5', '-0', 'null', 'NA', '真']


def arena(folder, ties=True):
    rows = pd.DataFrame(dict(id=IDS))
    rng = np.random.default_rng(0)
    p = rng.dirichlet([1] * (3 if ties else 2), len(IDS))
    cols = ['winner_model_a', 'winner_model_b', 'winner_tie'] if ties else ['winner']
    text = pd.DataFrame({'id': IDS, **({c: 0.333333 for c in cols} if ties else dict(winner='model_a'))}).to_csv(
        index=False
    )
    (folder / 'sample_submission.csv').write_text(text)
    return rows, p, 'preference' if ties else 'preference2', folder / 'sample_submission.csv', folder / 'submission.csv'


def logic(folder):
    n = [2, 7, 3, 5]
    rows = pd.DataFrame(dict(id=['007-0', '007-1', '12e5-0', '真-0'], options=[['x'] * k for k in n]))
    p = np.random.default_rng(0).random((4, 7)) * (np.arange(7) < np.array(n)[:, None])
    lines = [
        dict(id='007', questions=[dict(answer='A'), dict(answer='A')]),
        dict(id='12e5', questions=[dict(answer='A')]),
        dict(id='真', questions=[dict(answer='A')]),
    ]
    (folder / 'sample_submission.jsonl').write_text(''.join(json.dumps(o, ensure_ascii=False) + '\n' for o in lines))
    return rows, p / p.sum(1, keepdims=True), 'choice', folder / 'sample_submission.jsonl', folder / 'submission.jsonl'


LAYOUTS = dict(lmsys=arena, wsdm=lambda f: arena(f, False), tianchi=logic)


@pytest.fixture(params=LAYOUTS)
def layout(request, tmp_path):
    return LAYOUTS[request.param](tmp_path)


def test_written_checked_and_read_back(layout):
    rows, p, task, sample, path = layout
    order = np.random.default_rng(1).permutation(len(rows))
    said = make_submission(p[order], rows.iloc[order].reset_index(drop=True), task, sample, path)
    assert said.startswith(path.name + ': ')
    assert check_submission(path, sample, task, rows) == said
    first = path.read_bytes()
    make_submission(p, rows, task, sample, path)
    assert path.read_bytes() == first  # the order of the rows here does not show
    assert not list(path.parent.glob('.*.tmp'))
    if task == 'choice':
        best = ['ABCDEFG'[k] for k in p.argmax(1)]
        assert [q['answer'] for l in path.read_text().splitlines() for q in json.loads(l)['questions']] == best
    else:
        got = pd.read_csv(path, dtype=str, keep_default_na=False)
        assert list(got.id) == IDS
        if task == 'preference':
            np.testing.assert_allclose(got.iloc[:, 1:].astype(float), p, atol=1e-7)
        else:
            assert list(got.winner) == [tasks[task].options[k] for k in p.argmax(1)]


def test_the_sample_decides_the_order_and_the_columns(tmp_path):
    rows, p, task, sample, path = arena(tmp_path)
    want = pd.read_csv(sample, dtype=str, keep_default_na=False).iloc[::-1][
        ['winner_tie', 'id', 'winner_model_b', 'winner_model_a']
    ]
    want.to_csv(sample, index=False)
    make_submission(p, rows, task, sample, path)
    got = pd.read_csv(path, dtype=str, keep_default_na=False)
    assert list(got) == list(want)
    assert list(got.id) == IDS[::-1]
    np.testing.assert_allclose(got.winner_tie.astype(float), p[::-1, 2], atol=1e-7)


def test_rows_and_sample_must_be_the_same(layout):
    rows, p, task, sample, path = layout
    with pytest.raises(Refusal, match='are missing'):
        make_submission(p[1:], rows[1:], task, sample, path)
    with pytest.raises(Refusal, match='does not have.*zz'):
        make_submission(np.concatenate([p, p[:1]]), pd.concat([rows, rows[:1].assign(id='zz')]), task, sample, path)
    with pytest.raises(Refusal, match='twice'):
        make_submission(np.concatenate([p, p[:1]]), pd.concat([rows, rows[:1]]), task, sample, path)
    assert not path.exists()


def test_a_failed_submission_leaves_the_old_one(tmp_path):
    rows, p, task, sample, path = arena(tmp_path)
    make_submission(p, rows, task, sample, path)
    old, p = path.read_bytes(), p.copy()
    p[3] = np.nan
    with pytest.raises(Refusal, match='a b'):
        make_submission(p, rows, task, sample, path)
    assert path.read_bytes() == old
    assert not list(tmp_path.glob('.*.tmp'))


@pytest.mark.parametrize('bad', [np.nan, np.inf, 0])
def test_rows_without_a_probability_get_no_answer(layout, bad):
    rows, p, task, sample, path = layout
    p = p.copy()
    p[3] = bad
    with pytest.raises(Refusal, match=r'NaN, or all 0. Rows \(1\)'):
        make_submission(p, rows, task, sample, path)
    with pytest.raises(Refusal, match='of shape'):
        make_submission(np.concatenate([p, p]), rows, task, sample, path)
    assert not path.exists()


def edit(path, change):  # change gets the lines as text
    lines = change(path.read_bytes().decode().split('\n')[:-1])
    path.write_bytes(('\n'.join(lines) + '\n').encode())


def cell(line, col, text):
    return lambda o: [
        *o[:line],
        ','.join(text if i == col else c for i, c in enumerate(o[line].split(','))),
        *o[line + 1 :],
    ]


BOTH = [
    ('are missing', lambda o: o[:-1]),
    ('twice', lambda o: o + o[-1:]),
    ('stand elsewhere', lambda o: [*o[:-2], o[-1], o[-2]]),
]
CSV = [
    *BOTH,
    ('does not have', lambda o: o + [o[-1].replace('真', 'new')]),
    ('its columns', lambda o: ['x' + o[0], *o[1:]]),
    ('its columns', lambda o: [l + ',0' for l in [o[0]]] + [l + ',0' for l in o[1:]]),
    ('are missing', cell(1, 0, '7.0')),
    ('are missing', cell(1, 0, '００７')),
    ('are missing', cell(1, 0, '007\u00a0')),
    ('are missing', cell(2, 0, '1200000.0')),
    ('are missing', cell(1, 0, '"007 "')),
    ('fields instead', lambda o: o[:3] + [o[3] + ',1'] + o[4:]),
    ('its columns', lambda o: [','.join(reversed(l.split(','))) for l in o[:1]] + o[1:]),
    ('cut or b', lambda o: o[:-1] + ['"' + o[-1]]),
]
LMSYS = [
    *CSV,
    ('an empty cell', cell(2, 1, '')),
    ('an empty cell', cell(2, 3, ' ')),
    *(
        ('not a number', cell(2, 1, v))
        for v in ('nan', 'NaN', 'inf', 'null', '1_0', '0x1', '50%', 'one', '0.5.1', '０.4', '.4\u00a0', '\u2003.4')
    ),
    ('outside', cell(2, 2, '-0.2')),
    ('outside', cell(2, 2, '1.2')),
    ('sum to one', cell(2, 3, '0.9')),
    ('sum to one', cell(2, 1, '0')),
]
WSDM = [
    *CSV,
    *(
        ('a label that is none', cell(2, 1, v))
        for v in ('', 'A', 'model_c', 'Model_a', 'tie', '0', ' model_a', 'model_a\u00a0', 'ｍodel_a')
    ),
]


def q(line, value, key='answer'):
    def change(o):
        d = json.loads(o[line])
        d['questions'][0][key] = value
        return [*o[:line], json.dumps(d, ensure_ascii=False), *o[line + 1 :]]

    return change


def top(line, f):
    def change(o):
        d = json.loads(o[line])
        f(d)
        return [*o[:line], json.dumps(d, ensure_ascii=False), *o[line + 1 :]]

    return change


TIANCHI = [
    *BOTH,
    *(('no letter', q(0, v)) for v in ('', 'a', 'AB', 'C', 'G', 'H', None, 0, True, ['A'], ' A', 'Ａ', 'A\u00a0')),
    ('more than their answers', q(0, 1, 'note')),
    ('more than their answers', top(0, lambda d: d['questions'].pop())),
    ('more than their answers', top(1, lambda d: d['questions'].append(dict(answer='A')))),
    ('more than their answers', top(1, lambda d: d.update(score=1))),
    ('more than their answers', top(1, lambda d: d.pop('questions'))),
    ('more than their answers', top(1, lambda d: d.update(questions='A'))),
    ('does not have', lambda o: o + [json.dumps(dict(id='new', questions=[]))]),
    ('without an id', top(1, lambda d: d.pop('id'))),
    ('is not a JSON object', lambda o: [*o, '[]']),
    ('not valid JSON', lambda o: o[:-1] + [o[-1][:-3]]),
    ('are missing', top(0, lambda d: d.update(id=7))),
    ('are missing', top(1, lambda d: d.update(id=12e5))),
]


@pytest.mark.parametrize(
    'kind,why,change', [(k, *c) for k, cases in dict(lmsys=LMSYS, wsdm=WSDM, tianchi=TIANCHI).items() for c in cases]
)
def test_damage(tmp_path, kind, why, change):
    rows, p, task, sample, path = LAYOUTS[kind](tmp_path)
    make_submission(p, rows, task, sample, path)
    edit(path, change)
    with pytest.raises(Refusal, match=why) as e:
        check_submission(path, sample, task, rows)
    assert path.name in str(e.value)


def test_bytes(layout):
    rows, p, task, sample, path = layout
    make_submission(p, rows, task, sample, path)
    good = path.read_bytes()
    path.write_bytes(good.replace(b'\n', b'\r\n'))
    check_submission(path, sample, task, rows)
    path.write_bytes(b'\xef\xbb\xbf' + good)
    with pytest.raises(Refusal, match='byte order mark'):
        check_submission(path, sample, task, rows)
    path.write_bytes(good.decode().encode('utf-16'))
    with pytest.raises(Refusal, match='not UTF-8'):
        check_submission(path, sample, task, rows)
    path.write_bytes(b'')
    with pytest.raises(Refusal, match='empty'):
        check_submission(path, sample, task, rows)
    path.unlink()
    with pytest.raises(Refusal, match='no such file'):
        check_submission(path, sample, task, rows)
    path.write_bytes(good)
    sample.write_bytes(b'\xef\xbb\xbf' + sample.read_bytes().replace(b'\n', b'\r\n'))
    check_submission(path, sample, task, rows)


def test_samples_that_are_none(tmp_path):
    f = tmp_path / 's.csv'
    for text in ('id,prompt\n1,a\n', 'row,winner\n1,model_a\n', 'id\n1\n', 'id,winner_model_a\n1,1\n'):
        f.write_text(text)
        with pytest.raises(Refusal, match='not a sample'):
            check_submission(f, f)
    for name in ('s.txt', 's.parquet'):
        (tmp_path / name).write_text('id,winner\n')
        with pytest.raises(Refusal, match='not a sample'):
            check_submission(f, tmp_path / name)
    (tmp_path / 's.jsonl').write_text('{"id": 1, "questions": [{"a": 1}]}\n')
    with pytest.raises(Refusal, match='not a sample'):
        check_submission(f, tmp_path / 's.jsonl')


def test_letters_of_the_row_are_found_beside_the_sample(own_root):
    rows, sample = load_rows('sample_logic_test'), find_sample('sample_logic')
    bad = own_root / 'bad.jsonl'
    bad.write_text(sample.read_text().replace('"A"', '"G"'))
    with pytest.raises(Refusal, match='no letter of the row'):
        check_submission(bad, sample)
    far = own_root / 'far'
    far.mkdir()
    shutil.copy(sample, far)
    assert 'ABCDEFG' in check_submission(bad, far / sample.name)
    assert len(rows) > 40
    assert 'its row' in check_submission(sample, sample)
    home = data_path('sample_logic').rename(own_root / 'host')
    data_path('sample_logic').symlink_to(home)
    with pytest.raises(Refusal, match='no letter of the row'):
        check_submission(bad, sample)


def test_ck_check_takes_the_labels_of_the_test_table(own_root):
    "the vote has written a tie; the sample, which says model_a in each row, lies beside the table or elsewhere"
    data_path('ties').mkdir(parents=True)
    rows = load_rows('sample_arena_test')
    sample, out = data_path('ties/sample_submission.csv'), own_root / 'submission.csv'
    sample.write_text('\n'.join(['id,winner', *(f'{i},model_a' for i in rows.id)]) + '\n')
    write_rows(rows, data_path('ties_test.parquet'))
    said = make_submission(np.eye(3)[np.arange(len(rows)) % 3], rows, 'preference', sample, out)
    assert check_submission(out, sample) == said and ' tie' in said
    shutil.copy(sample, own_root / 'sample.csv')
    with pytest.raises(Refusal, match='none of model_a, model_b'):
        check_submission(out, own_root / 'sample.csv')


def test_columns_of_another_task(tmp_path):
    rows, p, task, sample, path = arena(tmp_path)
    with pytest.raises(Refusal, match='not the options of preference2'):
        make_submission(p[:, :2], rows, 'preference2', sample, path)


def test_several_samples_or_none(own_root):
    make_sample('sample_arena')
    f = find_sample('sample_arena')
    shutil.copy(f, f.with_name('sample_submission (1).csv'))
    with pytest.raises(Refusal, match='2 files could be'):
        find_sample('sample_arena')
    assert find_sample('sample_arena', str(f.relative_to(own_root))) == f == find_sample('elsewhere', str(f))
    with pytest.raises(Refusal, match='no such file'):
        find_sample('sample_arena', 'no.csv')


def test_practice_scores(own_root):
    rows = load_rows('sample_arena_test')
    sample = find_sample('sample_arena')
    solution = sample.with_name('solution.csv')
    true = pd.read_csv(solution, dtype=str).set_index('id').loc[rows.id].astype(float).to_numpy()
    make_submission(true * 0.8 + 0.2 / 3, rows, 'preference', sample, own_root / 's.csv')
    got = practice_score(own_root / 's.csv', solution)
    assert got['practice_accuracy'] == 1
    assert abs(got['practice_log_loss'] + np.log(0.8 + 0.2 / 3)) < 1e-4
    sample = find_sample('sample_logic')
    assert practice_score(sample.with_name('solution.jsonl'), sample.with_name('solution.jsonl')) == dict(
        practice_accuracy=1.0
    )
    (own_root / 'w.csv').write_text('id,winner\n1,model_a\n2,model_b\n')
    (own_root / 't.csv').write_text('id,winner\n2,model_b\n1,model_b\n')
    assert practice_score(own_root / 'w.csv', own_root / 't.csv') == dict(practice_accuracy=0.5)
    apart = practice_score(own_root / 'w.csv', own_root / 't.csv', seen=[1])
    assert apart == dict(practice_accuracy=0.5, practice_accuracy_seen=0.0, practice_accuracy_unseen=1.0)


# ---- real runs, of a base of two layers
def mark(root, cells):  # write people's cells into the workbook: {run id: {column: value}}
    wb = openpyxl.load_workbook(root / LOG)
    ws = wb['runs']
    at = {c.value: c.column for c in ws[1]}
    for row in range(2, ws.max_row + 1):
        for c, v in cells.get(ws.cell(row, at['run_id']).value, {}).items():
            ws.cell(row, at[c]).value = v
    wb.save(root / LOG)


def held(data='sample_arena', **kw):
    return run_stage(vote, VoteArgs(data, **kw))


def test_nobody_to_vote(own_root):
    with pytest.raises(Refusal, match='ck run 04_train -p mix sample_arena'):
        voters()


def test_who_votes(runs, own_root):
    every = voters()
    assert list(every.run) == [*runs]
    assert every.voter.nunique() == 3
    mark(
        own_root,
        {
            runs[0]: dict(keep='x', vote_weight=3),
            runs[1]: dict(keep='yes'),
            runs[2]: dict(keep='no'),
            runs[4]: dict(keep=1),
        },
    )
    kept = voters()
    assert set(kept.run) == {runs[0], runs[1], runs[4]}
    np.testing.assert_allclose(voter_weights(kept), [2 / 3, 1 / 3])  # a voter counts as the mean of its runs
    np.testing.assert_allclose(run_weights(kept, voter_weights(kept)), [1 / 3, 1 / 3, 1 / 3])
    assert list(voters(runs=f'{runs[2]} {runs[2]}').run) == [runs[2]]  # named is named
    mark(own_root, {r: dict(keep='') for r in runs[:2] + runs[4:]})
    assert set(voters().run) == set(runs) - {runs[2]}
    mark(own_root, {r: dict(keep='no') for r in runs})
    with pytest.raises(Refusal, match='may vote'):
        voters()
    with pytest.raises(Refusal, match='on sample_logic'):
        voters('sample_logic')
    with pytest.raises(Refusal, match='no table called other; there are'):
        voters('other')
    with pytest.raises(Refusal, match='runs begin'):
        voters(runs='train-f0')


def test_who_does_not_vote_and_why(runs, own_root):
    assert left_out(voters()) == {}
    mark(own_root, {runs[0]: dict(keep='yes'), runs[1]: dict(keep='no')})
    f, g = (models_path(r, 'record.json') for r in runs[2:4])
    write_record(f, {**read_record(f), 'status': 'failed'})
    g.write_bytes(g.read_bytes()[:-9])
    with pytest.warns(UserWarning, match='skipped'):
        assert left_out(voters()) == {
            'keep is no': [runs[1]],
            'its status is failed': [runs[2]],
            'its record is damaged': [runs[3]],
            'keep is empty, and others say yes': [runs[4]],
        }
        assert left_out(voters(runs=runs[1]), runs=runs[1])['not named'] == [runs[0], runs[4]]
    with pytest.warns(UserWarning, match='skipped'):
        assert runs[1] in left_out(voters(), 'other')['trained on another table']


def test_unfinished_and_foreign_runs_do_not_vote(runs, own_root):
    f = models_path(runs[0], 'record.json')
    write_record(f, {**read_record(f), 'status': 'failed'})
    assert runs[0] not in list(voters().run)
    with pytest.raises(Refusal, match='not finished'):
        voters(runs=runs[0])


def test_rows_that_nobody_can_vouch_for_do_not_score(runs, own_root, capsys):
    rows = load_rows('sample_arena')
    write_probs(own_root / 'adopted.parquet', rows, np.eye(3)[rows.label] * 0.97 + 0.01, 'preference', run='x')
    s = score_vote(voters(runs='adopted.parquet'))
    assert s['metrics'] is None
    assert f'{len(rows)} rows of 1: adopted.parquet do not say' in capsys.readouterr().out
    alone = score_vote(voters(runs=runs[0]))['metrics']
    assert score_vote(voters(runs=f'{runs[0]} adopted.parquet'), weights='1 1')['metrics'] == alone
    none = score_vote(
        voters(runs=f'{runs[0]} adopted.parquet'), weights='0 1'
    )  # nor does a voter of weight 0 lend the vote its score
    assert none['metrics'] is none['vote'] is None
    assert 'have weight 0' in none['sentence']


def test_runs_are_scored_on_their_own_table_and_it_names_the_vote(runs):
    "with a test file nobody need say `data`; the labels of another table, under the same ids, once made the score"
    def mix(run, text):
        f = models_path(run, 'record.json')
        write_record(f, (rec := read_record(f)) | dict(params=rec['params'] | dict(mix=text)))

    rows = load_rows('sample_arena')
    for name in 'mine', 'more': write_rows(rows, data_path(f'{name}.parquet'))
    write_rows(rows.assign(label=(rows.label + 1) % 3), data_path('sample_arena.parquet'))
    args = VoteArgs(runs=' '.join(runs[:2]), test='data/sample_arena/test.csv')
    for other, tables in ('mine', {'mine'}), ('mine:30', {'mine'}), ('more > mine', {'mine', 'more'}):
        for run, text in zip(runs, ('mine', other)): mix(run, text)
        assert list(training_table(ballot := voters(runs=args.runs), args.data).label) == list(rows.label), other
        assert set(score_tables(ballot, args.data)) == tables == {'mine', 'more', 'sample_arena'} & set(args.inputs())
    mix(runs[1], 'more')
    with pytest.raises(Refusal, match='mine, more, and none of sample_arena. Say with data='):
        training_table(voters(runs=args.runs), args.data)
    assert list(training_table(voters(runs=args.runs), 'more').label) == list(rows.label)


def test_weights_of_one_fold_are_scored_on_rows_that_they_were_not_fitted_on():
    rng, n = np.random.default_rng(0), 300
    p = {f'v{i}': rng.dirichlet(np.ones(3) * 3, n) for i in range(25)}
    rows = pd.DataFrame(dict(fold=0, label=rng.integers(0, 3, n), group=[f'g{i // 2}' for i in range(n)]))
    every = np.stack(list(p.values()))
    in_sample = log_loss(combine(every, fit_weights(every, rows.label)), rows.label)
    nested = log_loss(oof_vote(p, rows, 'fit'), rows.label)
    assert in_sample < nested - 0.01
    assert nested > np.log(3) - 0.02
    assert oof_vote(p, rows.drop(columns='group'), 'fit').shape == (n, 3)  # without groups each row is one of its own
    with pytest.raises(Refusal, match='all rows are of one group'):
        oof_vote(p, rows.assign(group='g'), 'fit')


def test_weights(runs):
    b = voters()
    np.testing.assert_allclose(voter_weights(b, '2 1 1'), [0.5, 0.25, 0.25])
    np.testing.assert_allclose(run_weights(b, voter_weights(b, '2 1 1')), [0.25, 0.25, 0.125, 0.125, 0.25])
    for bad in ('2 1', 'a b c', '', '0 0 0', '1 1 -1', 'nan 1 1'):
        with pytest.raises(Refusal):
            voter_weights(b, bad)
    p, y = noisy([0.6, 0.1, 0.3], 200)
    assert voter_weights(b, 'fit', p, y)[0] > 0.4
    with pytest.raises(Refusal, match='59 out-of-fold rows in common, and 60'):
        voter_weights(b, 'fit', p[:, :59], y[:59])
    with pytest.raises(Refusal, match='cannot be fitted'):
        score_vote(b, weights='fit')  # 12 rows


def test_seen_rows_never_score(runs):
    b, rows = voters(runs=' '.join(runs[:2])), load_rows('sample_arena')
    oof, shared = oof_probs(b, rows)
    assert set(shared.id) == set(rows.id[rows.fold.isin([0, 1])])
    f = models_path(runs[1], 'probs.parquet')
    mine = rows[rows.fold == 1].reset_index(drop=True)
    p = align(read_probs(f), mine)
    write_probs(f, mine, p, 'preference', seen=np.arange(len(mine)) < 4)
    assert set(oof_probs(b, rows)[1].id) == set(shared.id) - set(mine.id[:4])
    for r in runs[:2]:
        t = read_probs(models_path(r, 'probs.parquet'))
        own = rows.set_index('id').loc[list(t.id)].reset_index()
        write_probs(models_path(r, 'probs.parquet'), own, align(t, own), 'preference', seen=True)
    assert oof_probs(b, rows)[0] == {}
    s = score_vote(b)
    assert s['metrics'] is None
    assert 'no score' in s['sentence']
    with pytest.raises(Refusal, match='have 0 out-of-fold rows'):
        score_vote(b, weights='fit')


def test_a_row_twice_in_one_voter(runs):
    b, rows = voters(runs=' '.join(runs[:2])), load_rows('sample_arena')
    shutil.copy(models_path(runs[0], 'probs.parquet'), models_path(runs[1], 'probs.parquet'))
    with pytest.raises(Refusal, match='same out-of-fold row'):
        oof_probs(b, rows)


def test_predictions_on_one_base_are_those_of_each_alone(runs, own_root):
    from competition_kit.model import load_classifier, predict

    rows = load_rows('sample_arena_test')
    got = predict_runs(runs, rows, own_root / 'vote', progress=False)
    assert len({tuple(np.concatenate(t.p)) for t in got.values()}) == len(runs)
    for r in runs:
        rec, prompt = find_run(r), trusted_prompt(find_run(r))
        alone = predict(
            load_classifier(rec['params']['base'], prompt, rec['params']['route'], 'fp32', models_path(r, 'adapter')),
            prompt,
            rows,
            progress=False,
        )
        np.testing.assert_allclose(align(got[r], rows), alone, atol=1e-5)
        assert not got[r].seen.any()


def test_two_score_heads_on_one_base(runs, own_root):
    from competition_kit.train import train_fold

    base = find_run(runs[4])['params']['base']
    other = train_fold(route='score', base=base, fold=1, max_len=160, lr=1e-2, lora_r=4, dtype='fp32').id
    test_predictions_on_one_base_are_those_of_each_alone([runs[4], other], own_root)


def test_rows_that_a_model_was_trained_on_are_marked(runs, own_root):
    rows = load_rows('sample_arena')
    got = predict_runs(runs[:1], rows, own_root / 'vote', views=1, progress=False)[runs[0]]
    assert list(got.seen) == list(rows.fold != 0)
    assert (got.views == 1).all()


def test_an_interrupted_vote_goes_on(runs, own_root, monkeypatch):
    import competition_kit.model as model

    calls, real = [], model.view_probs

    def stops(*a):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*a)

    monkeypatch.setattr(model, 'view_probs', stops)
    with pytest.raises(KeyboardInterrupt):
        held()
    (vote,) = models_path().glob('vote-*')
    assert read_json(vote / 'record.json')['status'] == 'failed'
    assert len(list(vote.glob('train-*.parquet'))) == 2
    run = held()
    assert run.id == vote.name
    assert len(calls) == 3 + 3
    first = read_probs(vote / 'votes.parquet')
    broken = vote / f'{runs[0]}.parquet'
    broken.write_bytes(broken.read_bytes()[:-40])  # and one file is cut, another lost
    (vote / f'{runs[3]}.parquet').unlink()
    write_record(vote / 'record.json', {**run.record, 'status': 'failed'})
    held()
    assert len(calls) == 6 + 2
    np.testing.assert_allclose(np.stack(read_probs(vote / 'votes.parquet').p), np.stack(first.p), atol=1e-5)
    held()
    assert len(calls) == 8


def test_a_vote(runs, own_root):
    run = held()
    r, rows = run.record, load_rows('sample_arena_test')
    assert sorted(r['members']) == sorted(runs)
    assert abs(sum(r['weights']) - 1) < 1e-3
    assert r['weights'] == pytest.approx([1 / 6] * 4 + [1 / 3])
    assert check_submission(own_root / r['submission'], find_sample('sample_arena'), 'preference', rows)
    v = read_probs(run.folder / 'votes.parquet')
    each = [align(read_probs(run.folder / f'{i}.parquet'), rows) for i in runs]
    np.testing.assert_allclose(
        np.stack(v.p), ((each[0] + each[1]) / 2 + (each[2] + each[3]) / 2 + each[4]) / 3, atol=1e-5
    )
    assert set(v.attrs['meta']['voters']) <= set(v)
    assert v.agreement.between(0, 1).all()
    assert (v.views == 2).all()
    assert not v.seen.any()
    oof = read_probs(run.folder / 'oof.parquet')
    table = load_rows('sample_arena').set_index('id').loc[list(oof.id)].reset_index()
    assert set(table.fold) == {0}  # the score head has one fold only
    assert {k: r['metrics'][k] for k in ('log_loss', 'accuracy', 'ece')} == scores(
        align(oof, table), table.label.to_numpy()
    )
    assert set(r['metrics']['baselines']) == {'class prior', 'longer response', 'tf-idf + logistic regression'}
    assert 'practice_log_loss' in r['metrics']
    assert "the vote's log-loss" in r['sentence']
    sheet = pd.read_excel(own_root / LOG, sheet_name='votes')
    assert sheet.submission[0] == r['submission']
    assert sheet['baseline log_loss'][0] > 0
    assert held().record == r


@pytest.mark.parametrize(
    'edit, why',
    [
        (lambda t: t[: t.rstrip('\n').rindex('\n') + 1], 'are missing|does not have'),
        (lambda t: t.replace('winner_tie', 'winner_draw'), 'are not the options'),
        (lambda t: t.replace('id,', 'row,', 1), 'not a sample submission'),
    ],
)
def test_the_sample_is_checked_before_a_model_is_loaded(runs, own_root, monkeypatch, edit, why):
    import competition_kit.model as model

    monkeypatch.setattr(model, 'load_classifier', lambda *a, **k: pytest.fail('a base was loaded'))
    f = find_sample('sample_arena')
    f.write_text(edit(f.read_text()))
    with pytest.raises(Refusal, match=why):
        held(runs=runs[0], views=1)


def test_a_solution_that_does_not_fit_is_refused_before_a_model_is_loaded(runs, own_root, monkeypatch):
    import competition_kit.model as model

    f = find_sample('sample_arena').with_name('solution.csv')
    f.with_suffix('.bak').write_text('a note')  # no solution
    with monkeypatch.context() as m:
        m.setattr(model, 'load_classifier', lambda *a, **k: pytest.fail('a base was loaded'))
        whole = f.read_text()
        f.write_text(whole[: whole.rstrip().rindex('\n') + 1])
        with pytest.raises(Refusal, match='rows that solution.csv does not have'):
            held(runs=runs[0], views=1)
    f.unlink()
    assert 'practice_accuracy' not in held(runs=runs[0], views=1).record['metrics']


def test_a_corrected_sample_does_not_repeat_predictions(runs, own_root, monkeypatch):
    import competition_kit.model as model

    first, f = held(runs=runs[0], views=1), find_sample('sample_arena')
    head, *lines = f.read_text().splitlines(keepends=True)
    f.write_text(head + ''.join(lines[::-1]))
    with monkeypatch.context() as m:
        m.setattr(model, 'load_classifier', lambda *a, **k: pytest.fail('a base was loaded'))
        second = held(runs=runs[0], views=1)
    name = f'{runs[0]}.parquet'
    assert second.id != first.id
    assert (second.folder / name).read_bytes() == (first.folder / name).read_bytes()
    table = data_path('sample_arena_test.parquet')  # other texts under the same ids: predicted again
    rows = load_rows('sample_arena_test')
    write_rows(rows.assign(prompt=rows.prompt.map(lambda t: ['Other words', *t[1:]])), table)
    third = held(runs=runs[0], views=1)
    assert (third.folder / name).read_bytes() != (first.folder / name).read_bytes()


def test_a_kept_table_of_another_run_is_predicted_again(runs, own_root):
    rows, vote = load_rows('sample_arena_test'), own_root / 'vote'
    mine, other = (vote / f'{r}.parquet' for r in runs[:2])
    predict_runs(runs[:2], rows, vote, views=1, progress=False)
    assert kept_probs(mine, rows, 1) is not None
    shutil.copy(other, mine)
    assert kept_probs(mine, rows, 1) is None


def test_rows_with_other_texts_are_predicted_again(runs, own_root):
    rows = load_rows('sample_arena_test')
    longer = rows.assign(response_a=rows.response_a.map(lambda turns: [t + ' and more' for t in turns]))
    first, second = (predict_runs(runs[:1], r, own_root / 'vote', progress=False)[runs[0]] for r in (rows, longer))
    assert (align(first, rows) != align(second, rows)).any(1).all()


def test_what_a_vote_is_made_of_is_its_name(runs, own_root):
    first = held(views=1)
    mark(own_root, {runs[0]: dict(vote_weight=5)})
    second = held(views=1)
    third = held(views=1, rule='majority')
    assert len({first.id, second.id, third.id}) == 3
    assert second.record['weights'][0] == second.record['weights'][1] > 0.2
    assert 'ties' in third.record['metrics']
    assert 'ties' not in first.record['metrics']
    with pytest.raises(Refusal, match='rule='):
        held(rule='best')
    with pytest.raises(Refusal, match='views'):
        held(views=3)


def test_a_file_made_elsewhere_votes_too(runs, own_root):
    table, test = load_rows('sample_arena'), load_rows('sample_arena_test')
    both = pd.concat([table[table.fold == 0], test], ignore_index=True)
    p = np.random.default_rng(0).dirichlet([1] * 3, len(both))
    write_probs(own_root / 'other/probs.parquet', both, p, 'preference', seen=False, run='elsewhere')
    run = held(runs=f'{runs[0]} {runs[2]} other/probs.parquet', views=1)
    v = read_probs(run.folder / 'votes.parquet')
    mine = [align(read_probs(run.folder / f'{r}.parquet'), test) for r in (runs[0], runs[2])]
    np.testing.assert_allclose(np.stack(v.p), (mine[0] + mine[1] + p[-len(test) :]) / 3, atol=1e-5)
    assert run.record['members'][-1] == 'other/probs.parquet'
    assert run.record['metrics']['rows'] == (table.fold == 0).sum()
    write_probs(own_root / 'other/short.parquet', both[:-1], p[:-1], 'preference')
    with pytest.raises(Refusal, match='without a probability'):
        held(runs=f'{runs[0]} other/short.parquet')
    write_probs(own_root / 'other/two.parquet', both, p[:, :2] / p[:, :2].sum(1, keepdims=True), 'preference2')
    with pytest.raises(Refusal, match='different tasks'):
        held(runs=f'{runs[0]} other/two.parquet')
    write_probs(own_root / 'other/test.parquet', test, p[-len(test) :], 'preference')
    got = held(runs=f'{runs[0]} other/test.parquet', views=1).record
    assert 'It is of 1 of the 2 voters' in got['sentence']
    only = held(runs='other/test.parquet').record
    assert 'no score' in only['sentence']
    assert 'log_loss' not in only['metrics']
    with pytest.raises(Refusal, match='no such file'):
        held(runs='other/none.parquet')


@pytest.mark.parametrize('weights', ['log', 'fit'])
def test_a_file_is_not_scored_on_other_rows_of_the_same_ids(runs, own_root, weights):
    table, test = load_rows('sample_arena'), load_rows('sample_arena_test')
    raw = pd.DataFrame({c: test[c] for c in ('id', 'prompt', 'response_a', 'response_b')})
    for where, texts in ('other', raw), ('same', table[raw.columns]):
        (own_root / where).mkdir()
        texts = texts.assign(id=list(table.id[: len(texts)]))
        texts.to_json(own_root / where / 'test.jsonl', orient='records', lines=True)
        p = np.random.default_rng(0).dirichlet([1] * 3, len(texts))
        write_probs(own_root / where / 'p.parquet', texts, p, 'preference', seen=False)
    with pytest.raises(Refusal, match='has these ids for other rows.*name with data='):
        held(runs='other/p.parquet', test='other/test.jsonl', weights=weights)
    assert held(runs='same/p.parquet', test='same/test.jsonl', weights=weights).record['metrics']['rows'] == len(table)


@pytest.mark.parametrize('budget', [0, 5])
def test_files_are_not_scored_on_a_table_of_another_task(runs, own_root, budget):
    test = load_rows('sample_arena_test')[['id', 'prompt', 'response_a', 'response_b']]
    (own_root / 'two').mkdir()
    test.to_json(own_root / 'two/test.jsonl', orient='records', lines=True)
    p = np.random.default_rng(0).dirichlet([1] * 2, len(test))
    write_probs(own_root / 'two/p.parquet', test, p, 'preference2', seen=False)
    run = held(runs='two/p.parquet', test='two/test.jsonl', budget=budget)
    assert "task is on this machine: the vote has no score" in run.record['sentence']
    np.testing.assert_allclose(np.stack(read_probs(run.folder / 'votes.parquet').p), p, atol=1e-6)


def test_voters_come_as_they_are_named(runs, own_root):
    "the first one begins a cascade, and weights follow this order"
    test = load_rows('sample_arena_test')
    for name in 'pq':
        write_probs(own_root / f'{name}.parquet', test, np.full((len(test), 3), 1 / 3), 'preference', seen=False)
    named = ['q.parquet', runs[2], 'p.parquet', runs[0]]
    ballot = voters(runs=' '.join([*named, *named[::-1], runs[1]]))
    assert list(ballot.run) == [*named, runs[1]]
    assert [v[:2] for v in ballot.voter] == ['1:', '2:', '3:', '4:', '4:']
    assert run_weights(ballot, voter_weights(ballot, '1 2 3 4')).round(3).tolist() == [0.1, 0.2, 0.3, 0.2, 0.2]


def test_a_model_folder_that_moved_is_found_again(runs, own_root, tmp_path_factory):
    first = tmp_path_factory.mktemp('first') / runs[0]
    shutil.move(models_path(runs[0]), first)
    assert list(voters(runs=str(first)).run) == [runs[0]]
    second = shutil.move(first, tmp_path_factory.mktemp('second') / runs[0])
    assert list(voters(runs=str(second)).run) == [runs[0]]
    assert models_path(runs[0]).resolve() == second


def test_adopted_probabilities_vote_beside_a_run(runs, own_root):
    from competition_kit.adopt import adopt_files

    rows, test = load_rows('sample_arena'), load_rows('sample_arena_test')
    for k, (name, table) in enumerate(dict(sample_arena=rows, sample_arena_test=test).items()):
        p = np.random.default_rng(k).dirichlet([1] * 3, len(table))
        frame = pd.DataFrame(p, columns=tasks['preference'].options).assign(id=list(table.id))
        frame.to_csv(own_root / f'{k}.csv', index=False)
        adopt_files([str(own_root / f'{k}.csv')], name, 'athene', seen='no')
    run = held(runs=f'{runs[0]} athene', views=1)
    ids = [p.name for p in models_path().glob('adopt-*')]
    assert list(voters(runs=' '.join(ids)).run) == ['athene']
    assert run.record['members'] == [runs[0], 'athene'] and f'{runs[0]}.parquet' in run.record['outputs']
    mine = align(read_probs(run.folder / f'{runs[0]}.parquet'), test)
    np.testing.assert_allclose(np.stack(read_probs(run.folder / 'votes.parquet').p), (mine + p) / 2, atol=1e-5)


def test_logic_goes_the_same_way(runs, own_root):
    from competition_kit.train import train_fold

    base = find_run(runs[0])['params']['base']
    for fold in (0, 1):
        train_fold(mix='sample_logic', fold=fold, base=base, max_len=256, epochs=0.1, lora_r=2, dtype='fp32')
    run = held('sample_logic', views=1, weights='fit', rule='logits')
    r = run.record
    assert r['submission'].endswith('submission.jsonl')
    assert 'practice_accuracy' in r['metrics']
    assert "the vote's accuracy" in r['sentence']
    assert 'longest option' in r['metrics']['baselines']
    assert 'its row' in check_submission(own_root / r['submission'], find_sample('sample_logic'))
    with pytest.raises(Refusal, match='may vote'):
        voters('sample_logic_test')


# ---- what is not what it was
def flip(f):
    raw = bytearray(f.read_bytes())
    raw[-1] ^= 1
    f.write_bytes(raw)


@pytest.mark.parametrize(
    'why,break_it',
    [
        ('other content', lambda d, r: flip(d / 'adapter/adapter_model.safetensors')),
        ('is missing', lambda d, r: (d / 'adapter/adapter_config.json').unlink()),
        ('never finished', lambda d, r: (d / 'adapter/manifest.json').unlink()),
        ('not the file that the run wrote', lambda d, r: flip(d / 'probs.parquet')),
        ('base .* is not the one', lambda d, r: r.update(base='0')),
        ('tokenizer is not the one', lambda d, r: r.update(tokenizer='0')),
        ('prompts are not built', lambda d, r: r.update(prompt='0')),
        ('prompts are not built', lambda d, r: r['params'].update(truncation='left')),
        ('prompts are not built', lambda d, r: r['params'].update(max_len=161)),
        ('there is no base', lambda d, r: r['params'].update(base='./gone')),
    ],
)
def test_a_run_that_is_not_what_it_was_is_refused_before_anything_is_loaded(runs, own_root, why, break_it, monkeypatch):
    d = models_path(runs[1])
    rec = read_record(d / 'record.json')
    break_it(d, rec)
    write_record(d / 'record.json', rec)
    import competition_kit.model as model

    monkeypatch.setattr(model, 'load_classifier', lambda *a, **k: pytest.fail('a base was loaded'))
    with pytest.raises(Refusal, match=why):
        predict_runs(runs, load_rows('sample_arena_test'), own_root / 'vote', progress=False)
    assert not (own_root / 'vote').exists()


def test_a_damaged_run_is_left_out_by_name_unless_it_was_asked_for(runs, own_root):
    damaged = runs[1]
    flip(models_path(damaged, 'adapter/adapter_model.safetensors'))
    assert damaged not in list(voters().run)
    why = next(why for why, ids in left_out(voters()).items() if damaged in ids)
    assert 'the adapter is not whole' in why
    run = held(views=1)
    assert run.record['left_out'] == {why: [damaged]}
    assert damaged not in run.record['members']
    with pytest.raises(Refusal, match='the adapter is not whole'):
        held(runs=f'{runs[0]} {damaged}', views=1)


def test_no_sound_run_is_left(runs, own_root):
    for r in runs:
        flip(models_path(r, 'adapter/adapter_model.safetensors'))
    with pytest.raises(Refusal, match='5 damaged: .*is not whole'):
        voters()


def test_an_unsealed_record_changes_no_number(runs, own_root):
    from competition_kit.train import train_fold

    f, rec = models_path(runs[0], 'record.json'), find_run(runs[0])
    write_json(f, rec)
    assert runs[0] not in list(voters().run)
    assert any('not sealed' in why for why in left_out(voters()))
    with pytest.raises(Refusal, match=f'{runs[0]}.*not sealed'):
        held(runs=runs[0], views=1)
    with pytest.raises(Refusal, match='not sealed'):
        train_fold(**dict(rec['params'], start=runs[0]))
    write_json(f, dict(rec, seal=None))  # written by hand on purpose
    assert runs[0] in list(voters().run)
    assert trusted_prompt(find_run(runs[0])).hash == rec['prompt']


def test_baselines_come_from_the_records(runs, own_root, monkeypatch):
    import competition_kit.vote_score as V

    fitted, real = [], V.baselines

    def counted(*args):
        fitted.append(args)
        return real(*args)

    monkeypatch.setattr(V, 'baselines', counted)
    ballot = voters(runs=' '.join(runs[:4]))
    known = score_vote(ballot)['metrics']
    assert fitted == []
    monkeypatch.setattr(V, '_known_baselines', lambda ballot, rows: {})
    assert score_vote(ballot)['metrics'] == known
    assert len(fitted) == 2


def test_baselines_of_a_changed_table_are_fitted_again(runs, own_root):
    from competition_kit.vote_score import _known_baselines

    ballot, rows = voters(runs=runs[0]), load_rows('sample_arena')
    held_rows = rows[rows.fold == 0]
    assert set(_known_baselines(ballot, held_rows)) == {0}
    assert _known_baselines(ballot, held_rows[1:]) == {}  # a row less
    write_rows(
        rows.drop(columns=['main', 'phase']).assign(weight=2.0), data_path('sample_arena.parquet'), task='preference'
    )
    assert _known_baselines(ballot, held_rows) == {}


def test_a_changed_table_is_named_beside_its_score(runs, own_root):
    ballot, rows = voters(), load_rows('sample_arena')
    assert 'has changed' not in score_vote(ballot)['sentence']
    changed = rows.drop(columns=['main', 'phase']).assign(label=rows.label.to_numpy()[::-1])
    write_rows(changed, data_path('sample_arena.parquet'), task='preference')
    assert f"has changed since {', '.join(runs)} held out its rows" in score_vote(ballot)['sentence']


def test_another_base_under_the_same_name(runs, own_root, tmp_path):
    rec = find_run(runs[0])
    folder = tmp_path / 'moved'
    shutil.copytree(rec['params']['base'], folder)
    rec['params']['base'] = str(folder)
    trusted_prompt(rec)
    flip(folder / 'model.safetensors')
    with pytest.raises(Refusal, match='is not the one'):
        trusted_prompt(rec)


def test_rows_of_another_task(runs, own_root):
    with pytest.raises(Refusal, match='of another task than choice'):
        predict_runs(runs, load_rows('sample_logic_test'), own_root / 'vote', progress=False)
