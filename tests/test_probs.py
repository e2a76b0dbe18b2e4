"Probability tables: what is refused, joins one to one, scores as scikit-learn has them, baselines"

import numpy as np, pandas as pd, pyarrow as pa, pyarrow.parquet as pq, pytest, sklearn.metrics as M
from hypothesis import given, settings, strategies as st
from competition_kit.core import Refusal, read_table, write_table
from competition_kit.probs import (
    accuracy,
    align,
    baselines,
    ece,
    log_loss,
    plot_confusion,
    plot_reliability,
    read_probs,
    reliability,
    scores,
    write_probs,
)
from competition_kit.sample import arena_rows
from competition_kit.rows import tasks


def table(ids, task='preference', n=None):
    rows = pd.DataFrame(dict(id=pd.Series(list(ids), dtype=str)))
    return (
        rows.assign(problem='', question='?', options=[[str(i) for i in range(k)] for k in n])
        if task == 'choice'
        else rows
    )


def random_p(n, k, seed=0):
    return np.random.default_rng(seed).dirichlet([0.7] * k, n)


@pytest.fixture
def good(own_root):
    rows, p, f = table('abcde'), random_p(5, 3), own_root / 'probs.parquet'
    write_probs(f, rows, p, 'preference', views=2, seen=[True, False] * 2 + [True], run='train-f0-x')
    return rows, p, f


# ---- the table
def test_round_trip(good):
    rows, p, f = good
    got = read_probs(f)
    np.testing.assert_allclose(align(got, rows), p, atol=1e-6)
    assert list(got.id) == list('abcde')
    assert list(got.seen) == [True, False, True, False, True]
    assert set(got.views) == {2}
    m = got.attrs['meta']
    assert m['task'] == 'preference'
    assert m['options'] == ['model_a', 'model_b', 'tie']
    assert m['run'] == 'train-f0-x'
    s = pq.read_schema(f)
    assert s.field('p').type.value_type == pa.float32()
    assert s.field('views').type == pa.int32()
    assert s.field('seen').type == pa.bool_()
    assert s.field('id').type in (pa.string(), pa.large_string())


@settings(max_examples=40)
@given(st.lists(st.integers(1, 7), min_size=0, max_size=12), st.integers(0, 9))
def test_ragged_round_trip(tmp_path_factory, n, seed):
    f, rng = tmp_path_factory.mktemp('p') / 'p.parquet', np.random.default_rng(seed)
    rows = table(map(str, range(len(n))), 'choice', n)
    p = np.zeros((len(n), 7))
    for i, k in enumerate(n):
        p[i, :k] = rng.dirichlet([1] * k)
    write_probs(f, rows, p, 'choice')
    got = read_probs(f)
    assert [len(o) for o in got.p] == n
    np.testing.assert_allclose(align(got, rows), p, atol=1e-6)
    if n:
        np.testing.assert_allclose([o.sum() for o in got.p], 1, atol=1e-6)


def bad_values():
    eye = np.array([[0.5, 0.3, 0.2]] * 3)

    def at(v, dtype=float):
        p = eye.astype(dtype)
        p[1, 0] = v
        return p

    return dict(
        nan=at(np.nan),
        inf=at(np.inf),
        minus_inf=at(-np.inf),
        negative=at(-0.1) + [[0, 0, 0], [0, 0.6, 0], [0, 0, 0]],
        sum_over=at(0.502),
        sum_under=at(0.498),
        zeros=np.where([[0], [1], [0]], 0, eye),
        float16_overflow=at(60000, np.float16) * np.float16([[1], [2], [1]]),
        logits=at(12.0),
    )


@pytest.mark.parametrize('kind', bad_values())
def test_not_probabilities(good, kind):
    _, _, f = good
    before = f.read_bytes()
    with pytest.raises(Refusal, match=r'probs.parquet.*Rows \(1\): y'), np.errstate(all='ignore'):
        write_probs(f, table('xyz'), bad_values()[kind], 'preference')
    assert f.read_bytes() == before


@settings(max_examples=150)
@given(st.lists(st.floats(width=32), min_size=3, max_size=3))
def test_any_three_numbers(tmp_path_factory, v):
    f = tmp_path_factory.mktemp('p') / 'p.parquet'
    p = np.array([v])
    ok = np.isfinite(p).all() and (p >= -1e-6).all() and abs(p.sum() - 1) <= 1e-3
    if not ok:
        with pytest.raises(Refusal):
            write_probs(f, table('a'), p, 'preference')
        assert not f.exists()
    else:
        write_probs(f, table('a'), p, 'preference')
        got = align(read_probs(f), table('a'))
        assert (got >= 0).all()
        assert abs(got.sum() - 1) < 1e-6


def test_nearly_a_probability_is_made_one(own_root):
    f = own_root / 'p.parquet'
    p = np.array([[0.5, 0.3, 0.2009], [0.5, 0.3, 0.1991], [1 + 5e-7, -5e-7, 0]])
    write_probs(f, table('abc'), p, 'preference')
    got = align(read_probs(f), table('abc'))
    assert (got >= 0).all()
    np.testing.assert_allclose(got.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(got, p, atol=1e-3)
    write_probs(f, table('abc'), random_p(3, 3).astype(np.float16), 'preference')  # float16 is coarse, not wrong


@pytest.mark.parametrize('shape', [(2, 3), (4, 3), (1, 3), (3, 2), (3, 1), (3, 4), (0, 3), (3,)])
def test_wrong_shapes(own_root, shape):
    "A column or a row too few is not a probability for these rows"
    f, k = own_root / 'p.parquet', shape[-1]
    with pytest.raises(Exception):
        write_probs(f, table('abc'), np.full(shape, 1 / k), 'preference')
    assert not f.exists()


def test_probability_on_an_option_the_row_lacks(own_root):
    p = np.zeros((2, 7))
    p[0, :2] = 0.5
    p[1, [0, 3]] = 0.5
    with pytest.raises(Refusal, match=r'Rows \(1\): b'):
        write_probs(own_root / 'p.parquet', table('ab', 'choice', [2, 3]), p, 'choice')
    p[1] = 0
    p[1, :3] = 1 / 3
    write_probs(own_root / 'p.parquet', table('ab', 'choice', [2, 3]), p[:, :5], 'choice')  # no row has more than five
    assert align(read_probs(own_root / 'p.parquet'), table('ab')).shape == (2, 7)


@pytest.mark.parametrize('ids', [['x', 'y', 'x'], ['', 'y', '']])
def test_duplicate_ids(own_root, ids):
    with pytest.raises(Refusal, match='twice'):
        write_probs(own_root / 'p.parquet', table(ids), random_p(3, 3), 'preference')
        read_probs(own_root / 'p.parquet')


def rewritten(f, change):
    "Another program changes the table and keeps the metadata"
    t = pq.read_table(f)
    pq.write_table(change(t).replace_schema_metadata(t.schema.metadata), f)


TAMPER = dict(
    shuffled=lambda t: t.take([1, 0, 2, 3, 4]),
    dropped=lambda t: t.slice(1),
    renamed=lambda t: t.set_column(0, 'id', pa.array(list('abcdf'))),
    doubled=lambda t: pa.concat_tables([t, t]),
    ids_moved=lambda t: t.set_column(0, 'id', t['id'].take([1, 0, 2, 3, 4])),
    values_moved=lambda t: t.set_column(1, 'p', t['p'].take([1, 0, 2, 3, 4])),
    columns_swapped=lambda t: t.set_column(
        1, 'p', pa.array([[o[1], o[0], o[2]] for o in t['p'].to_pylist()], pa.list_(pa.float32()))
    ),
    unseen=lambda t: t.set_column(3, 'seen', pa.array([False] * 5)),
)


@pytest.mark.parametrize('kind', TAMPER)
def test_tampered(good, kind):
    rows, _, f = good
    assert read_table(f).columns.tolist() == ['id', 'p', 'views', 'seen']
    rewritten(f, TAMPER[kind])
    with pytest.raises(Refusal, match='probs.parquet'):
        read_probs(f)


def test_not_a_probability_table(own_root):
    f = own_root / 'p.parquet'
    for df in (
        pd.DataFrame(dict(id=['a'])),
        pd.DataFrame(dict(id=['a'], p=[[1.0]])),
        pd.DataFrame(dict(id=['a'], p=[[1.0]], views=1, seen=False)),
    ):
        write_table(df, f)
        with pytest.raises(Refusal, match='p.parquet'):
            read_probs(f)
        df.to_parquet(f)
        with pytest.raises(Refusal, match='p.parquet'):
            read_probs(f)


@pytest.mark.parametrize(
    'options', [['model_b', 'model_a', 'tie'], ['tie', 'model_a', 'model_b'], ['model_a', 'model_b']]
)
def test_options_in_another_order(good, options):
    "A teacher's file with its columns in another order is put right by name, or refused"
    rows, p, f = good
    t = read_table(f)
    m = t.attrs['meta']
    write_table(
        t, f, **{k: v for k, v in (m | dict(options=options)).items() if k in ('task', 'ids', 'run', 'options')}
    )
    try:
        got = align(read_probs(f), rows)
    except Refusal:
        return
    assert len(options) == 3
    np.testing.assert_allclose(got[:, [tasks['preference'].options.index(o) for o in options]], p, atol=1e-6)


# ---- joins
@settings(max_examples=60)
@given(st.permutations(range(8)), st.integers(0, 8))
def test_align_any_order_any_part(tmp_path_factory, order, k):
    f, p = tmp_path_factory.mktemp('p') / 'p.parquet', random_p(8, 3)
    ids = ['007', '7', '7.0', 'null', 'NaN', '12e5', '1200000.0', 'é']
    write_probs(f, table(ids), p, 'preference')
    want = table(ids).iloc[list(order)[:k]]
    np.testing.assert_allclose(align(read_probs(f), want), p[list(order)[:k]].reshape(-1, 3), atol=1e-6)


def test_align_names_what_is_missing(good):
    rows, _, f = good
    with pytest.raises(Refusal, match=r'train-f0-x.*Rows \(2\): y, z'):
        align(read_probs(f), table('aybz'))
    with pytest.raises(Refusal):
        align(read_probs(f), pd.DataFrame(dict(id=[1, 2])))
    with pytest.raises(Refusal, match=r'Rows \(5\)'):
        align(read_probs(f).iloc[:0], rows)


def test_align_is_one_to_one(good):
    rows, _, f = good
    probs = read_probs(f)
    with pytest.raises(Refusal):
        align(probs, table('aab'))
    twice = pd.concat([probs, probs.iloc[:1]])
    twice.attrs = probs.attrs
    with pytest.raises(Refusal):
        align(twice, rows)


def test_align_width(good):
    rows, p, f = good
    assert align(read_probs(f), rows, 7).shape == (5, 7)
    assert not align(read_probs(f), rows, 7)[:, 3:].any()
    with pytest.raises(Exception):
        align(read_probs(f), rows, 2)


# ---- scores
@settings(max_examples=80)
@given(
    st.integers(2, 7),
    st.integers(1, 60),
    st.integers(0, 10**6),
    st.sampled_from([0.05, 1, 30]),
    st.sampled_from([np.float32, np.float64]),
)
def test_scores_are_scikit_learns(k, n, seed, peak, dtype):
    rng = np.random.default_rng(seed)
    p, label = rng.dirichlet([peak] * k, n).clip(1e-6).astype(dtype), rng.integers(0, k, n)
    p /= p.sum(1, keepdims=True)
    p64 = p.astype(float) / p.astype(float).sum(1, keepdims=True)
    assert log_loss(p, label) == pytest.approx(M.log_loss(label, p64, labels=range(k)), rel=1e-5, abs=1e-6)
    assert accuracy(p, label) == pytest.approx(M.accuracy_score(label, p.argmax(1)))
    s = scores(p, pd.Series(label, index=range(5, 5 + n)))
    assert s['log_loss'] == round(log_loss(p, label), 5)
    assert 0 <= s['ece'] <= 1
    assert all(type(v) is float for v in s.values())


@settings(max_examples=25)
@given(st.integers(2, 5), st.integers(1, 80), st.integers(0, 10**6), st.integers(1, 20))
def test_ece_bounds(k, n, seed, bins):
    rng = np.random.default_rng(seed)
    p, label = rng.dirichlet([0.3] * k, n), rng.integers(0, k, n)
    gap = abs(p.max(1).mean() - accuracy(p, label))
    assert gap - 1e-9 <= ece(p, label, bins) <= 1
    assert ece(p, label, 1) == pytest.approx(gap)
    assert reliability(p, label, bins)['rows'].sum() == n


def test_ece_of_the_calibrated_and_the_boastful():
    rng = np.random.default_rng(0)
    p = rng.dirichlet([1] * 3, 20_000)
    label = (rng.random((20_000, 1)) > p.cumsum(1)).sum(1).clip(0, 2)
    assert ece(p, label) < 0.015
    assert ece(np.eye(3)[rng.integers(0, 3, 3000)], rng.integers(0, 3, 3000)) == pytest.approx(2 / 3, abs=0.05)


def test_certain_and_wrong_is_finite():
    p = np.array([[1.0, 0, 0], [1, 0, 0]])
    assert log_loss(p, [1, 0]) == pytest.approx(-np.log(1e-15) / 2)
    assert log_loss(p, [0, 0]) == 0
    assert accuracy(p, [1, 0]) == 0.5
    assert log_loss(np.full((2, 3), 1 / 3), [0, 2]) == pytest.approx(np.log(3))


@pytest.mark.parametrize('label', [[0, -1, 1], [0, 3, 1], [-1] * 3])
def test_rows_without_a_label_have_no_score(label):
    "-1 means unknown; as an index it means the last option"
    with pytest.raises((Refusal, IndexError)):
        scores(random_p(3, 3), label)


# ---- baselines
def pairs(n, seed=0):
    rows = pd.DataFrame(arena_rows(n, seed))
    return rows.assign(id=[str(i) for i in range(len(rows))], label=rows.winner.map(dict(model_a=0, model_b=1, tie=2)))


def longer_wins(rows):
    return np.array([0 if sum(map(len, a)) > sum(map(len, b)) else 1 for a, b in zip(rows.response_a, rows.response_b)])


def test_baselines_of_pairs():
    rows = pairs(240)
    got = baselines(rows[:160], rows[160:], 'preference')
    assert list(got) == ['class prior', 'longer response', 'tf-idf + logistic regression']
    share = (np.bincount(rows.label[:160], minlength=3) + 1) / 163
    assert got['class prior']['log_loss'] == pytest.approx(-np.log(share[rows.label[160:]]).mean(), abs=1e-4)
    assert all(np.isfinite(v) for s in got.values() for v in s.values())
    two = rows[rows.label < 2].reset_index(drop=True)
    assert set(baselines(two[:100], two[100:], 'preference2')) == set(got)


def test_baselines_find_what_is_there():
    rows = pairs(240)
    rows['label'] = longer_wins(rows)
    for task in ('preference', 'preference2'):
        got = baselines(rows[:160], rows[160:], task)
        assert got['longer response']['accuracy'] > 0.95 > got['class prior']['accuracy']
        assert got['longer response']['log_loss'] < 0.5 * got['class prior']['log_loss']
    rng = np.random.default_rng(0)
    rows['label'] = rng.integers(0, 2, len(rows))
    for c, k in (('response_a', 0), ('response_b', 1)):
        rows[c] = [[t[0] + (' sesame' if y == k else ' poppy')] for t, y in zip(rows[c], rows.label)]
    assert baselines(rows[:160], rows[160:], 'preference2')['tf-idf + logistic regression']['accuracy'] > 0.95


def test_baselines_of_choices():
    rng = np.random.default_rng(0)
    n = rng.integers(2, 6, 300)
    rows = table(map(str, range(300)), 'choice', n).assign(label=[int(rng.integers(k)) for k in n])
    rows['options'] = [
        [('certainly so' if i == y else 'not so') + f' {rng.integers(99)}' for i in range(k)]
        for k, y in zip(n, rows.label)
    ]
    got = baselines(rows[:200], rows[200:], 'choice')
    assert list(got) == ['class prior', 'longest option', 'tf-idf + logistic regression']
    assert got['longest option']['accuracy'] > 0.9
    assert got['tf-idf + logistic regression']['accuracy'] > 0.95
    assert got['class prior']['log_loss'] < np.log(5) + 0.1  # options that a row lacks get nothing
    rows['options'] = [['1'] * k for k in n]  # alike in all: the prior again
    got = baselines(rows[:200], rows[200:], 'choice')
    assert got['tf-idf + logistic regression']['log_loss'] == pytest.approx(-np.log(1 / n[200:]).mean(), abs=0.01)


def test_baselines_of_few_and_empty_rows():
    rows = pairs(24)
    rows.loc[3, 'response_a'] = rows.loc[3, 'response_b'] = rows.loc[3, 'prompt'] = None
    for c in ('response_a', 'response_b', 'prompt'):
        rows[c] = [o if o is not None else [''] for o in rows[c]]
    rows.at[4, 'prompt'] = ['a', 'b']
    rows.at[4, 'response_a'] = ['null', '']
    rows.at[4, 'response_b'] = ['\u2028', '骑士 😀']
    got = baselines(rows[:12], rows[12:], 'preference')
    assert all(np.isfinite(v) for s in got.values() for v in s.values())
    a = baselines(
        rows[:12].sample(frac=1, random_state=0), rows[12:], 'preference'
    )  # the order of the rows means nothing
    assert a['class prior'] == got['class prior']
    assert a['longer response'] == got['longer response']


def test_baselines_that_cannot_be_fitted_are_left_out():
    "They are fitted when hours of training are over: nothing in the rows may stop them"
    rows = pairs(60)
    train, held = rows[:40], rows[40:]

    def texts(d, t):
        return d.assign(**{c: [[t]] * len(d) for c in ('prompt', 'response_a', 'response_b')})

    word = 'tf-idf + logistic regression'
    for task, t, h, gone in [
        ('preference', train.assign(label=2), held, {word: 'same label'}),
        ('preference', train.assign(label=-1), held, {'longer response': 'no training row', word: 'no training row'}),
        ('preference', texts(train, '…'), texts(held, '…'), {word: 'has a word'}),
        ('preference', train.assign(label=0), held, {}),
        ('preference2', train[train.label == 0], held[held.label < 2], {}),
    ]:
        why = {}
        got = baselines(t, h, task, why)
        assert set(why) == set(gone)
        assert all(s in why[k] for k, s in gone.items())
        assert not set(got) & set(gone)
        assert 'class prior' in got
        assert all(np.isfinite(v) for s in got.values() for v in s.values())
    choice = table(map(str, range(20)), 'choice', [1] * 20).assign(label=0)  # one option a row: it is always right
    assert word not in baselines(choice[:10], choice[10:], 'choice')
    assert baselines(train[:0], held, 'preference')['class prior']['log_loss'] == pytest.approx(np.log(3), abs=1e-4)


def test_pictures():
    import matplotlib

    matplotlib.use('Agg')
    rng = np.random.default_rng(0)
    p, y = random_p(40, 3), rng.integers(0, 3, 40)
    assert plot_reliability(p, y).get_title().endswith(f'{ece(p, y):.3f}')
    assert len(plot_confusion(p, y, 'preference').texts) == 9
    plot_confusion(np.eye(7)[[0, 6]], [0, 3], 'choice')
