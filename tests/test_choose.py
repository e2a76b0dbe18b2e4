"Choosing voters, sequential votes and cascades: properties on simulated voters"

import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from competition_kit.cascade import best_share, cascade_curve, least_certain, rescore
from competition_kit.choose import (
    effective_voters,
    enough_votes,
    error_correlation,
    greedy_order,
    simulated_voters,
    vote_curve,
    weight_gain,
    worth_sentence,
)
from competition_kit.combine import combine
from competition_kit.core import Refusal
from competition_kit.predictions import cascade_scores
from competition_kit.probs import accuracy, log_loss
from competition_kit.sequential import calibrated_limits, combine_asked, exact_limits, margin, sequential_vote


# ---- how many voters they are worth
@pytest.mark.parametrize('n', [2, 5, 9])
@pytest.mark.parametrize('rho', [0, 0.3, 1])
def test_effective_voters_is_kish(n, rho):
    r = np.full((n, n), float(rho))
    np.fill_diagonal(r, 1)
    assert effective_voters(r) == pytest.approx(n / (1 + (n - 1) * rho))


def test_a_copy_and_a_voter_without_weight_add_nothing():
    p, y = simulated_voters([1, 1], 500)
    alone = effective_voters(error_correlation(p, y))
    copied = effective_voters(error_correlation(p[[0, 0, 1, 1]], y))
    assert copied == pytest.approx(alone, rel=1e-6)
    third, _ = simulated_voters([1], 500, seed=5)
    rho = error_correlation(np.concatenate([p, third]), y)
    assert effective_voters(rho, [1, 1, 0]) == pytest.approx(alone)


def test_a_constant_voter_counts_as_no_second_one():
    p = np.full((2, 10, 2), 0.5)
    assert effective_voters(error_correlation(p, np.arange(10) % 2)) == pytest.approx(1)


def test_the_sentence_names_both_numbers():
    r = np.full((9, 9), 0.308)
    np.fill_diagonal(r, 1)
    assert worth_sentence(r).startswith('9 voters count as 2.6')
    assert '0.31' in worth_sentence(r)


# ---- greedy choice
def test_a_copy_is_chosen_late_and_a_guesser_last():
    p, y = simulated_voters([1.2, 1.1, 0], 3000, shared=0.2)
    order = greedy_order(np.stack([p[0], p[0], p[1], p[2]]), y)
    assert order[:2] == [0, 2]
    assert order[-1] == 3


def test_the_curve_is_scored_on_folds_that_did_not_choose():
    p, y = simulated_voters([0] * 6, 300)  # nobody knows anything: a selection on the scored rows would look good
    fold = np.arange(300) % 5
    honest = vote_curve(p, y, fold)
    greedy = [log_loss(combine(p[greedy_order(p, y)[:n]]), y) for n in (1, 2)]
    assert honest.score[1] > greedy[0]
    assert enough_votes(honest) >= 3  # more voters without knowledge are less sure, and lose less
    with pytest.raises(Refusal, match='one fold'):
        vote_curve(p, y, np.zeros(300))
    with pytest.raises(Refusal, match='no metric'):
        vote_curve(p, y, fold, metric='auc')


def test_one_vote_that_is_behind_by_the_same_in_every_fold_is_not_enough():
    right = np.array([[1, 1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]] * 2).reshape(2, 2, 8)
    sure = np.where(right, 0.9, 0.4).transpose(1, 0, 2).reshape(2, 16)  # of the label 0; together always right
    curve = vote_curve(np.stack([sure, 1 - sure], 2), np.zeros(16, int), np.arange(16) // 8, metric='accuracy')
    assert curve.score.tolist() == [0.625, 1] and curve.error.tolist() == [0, 0]
    assert enough_votes(curve) == 2


def test_weights_of_equal_voters_gain_nothing_new():
    p, y = simulated_voters([1, 1, 1], 2000)
    fold = np.arange(2000) % 5
    even, uneven = weight_gain(p, y, fold), weight_gain(*simulated_voters([1.5, 0.2, 0.2], 2000), fold)
    assert even['gain'] < even['spread']
    assert uneven['gain'] > 3 * uneven['spread']


# ---- sequential votes
def table(p):
    return lambda voter, rows: p[voter, rows]


@settings(max_examples=60)
@given(st.integers(1, 9), st.integers(2, 6), st.sampled_from(['majority', 'mean']), st.integers(0, 10**6))
def test_exact_limits_change_no_answer(n, options, rule, seed):
    rng = np.random.default_rng(seed)
    p, _ = simulated_voters(rng.random(n) * 2, 200, rng.random(), options, seed)
    w = rng.choice([1, 1, 2, 5], n).astype(float)
    vote, asked = sequential_vote(table(p), 200, w, exact_limits(w), rule)
    np.testing.assert_array_equal(vote.argmax(1), combine(p, w, rule).argmax(1))
    assert asked.min() >= 1
    whole = asked == n
    np.testing.assert_allclose(vote[whole], combine(p, w, rule)[whole], atol=1e-5)


def test_a_tie_that_a_later_voter_decides_is_not_closed():
    p = np.array([[[0.9, 0.1]], [[0.2, 0.8]]], np.float32)  # one against one: the mean decides
    vote, asked = sequential_vote(table(p), 1, [1, 1], exact_limits([1, 1]), 'majority')
    assert asked[0] == 2
    assert vote.argmax() == combine(p, rule='majority').argmax() == 0


def test_nobody_is_asked_about_a_closed_row():
    p, _ = simulated_voters([2] * 5, 300)
    asked_for = []

    def ask(voter, rows):
        asked_for.append(len(rows))
        return p[voter, rows]

    _, asked = sequential_vote(ask, 300, [1] * 5, exact_limits([1] * 5), 'majority')
    assert asked_for == sorted(asked_for, reverse=True)
    assert sum(asked_for) == asked.sum() < 5 * 300


@pytest.mark.parametrize('rule', ['mean', 'logits'])
def test_calibrated_limits_keep_their_promise_on_other_rows(rule):
    w = np.full(9, 1 / 9)
    known, _ = simulated_voters([1.5] * 9, 20_000, 0.8, seed=1)
    new, _ = simulated_voters([1.5] * 9, 20_000, 0.8, seed=2)
    vote, asked = sequential_vote(table(new), 20_000, w, calibrated_limits(known, w, rule, 0.001), rule)
    same = vote.argmax(1) == combine(new, w, rule).argmax(1)
    assert same.mean() >= 0.999
    assert asked.mean() < 6


def test_few_rows_calibrate_nothing():
    p, _ = simulated_voters([1.5] * 5, 300)
    np.testing.assert_allclose(calibrated_limits(p, [1] * 5, 'mean', 0.001), exact_limits([1] * 5))


def test_combine_asked_counts_only_those_asked():
    p, _ = simulated_voters([1, 1, 1], 4)
    has = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 0]], bool)
    vote = combine_asked(p, has, [2, 1, 1])
    np.testing.assert_allclose(vote[0], np.average(p[:, 0], 0, [2, 1, 1]), atol=1e-6)
    np.testing.assert_allclose(vote[1], p[0, 1], atol=1e-6)
    np.testing.assert_allclose(vote[2], (p[1, 2] + p[2, 2]) / 2, atol=1e-6)
    assert (vote[3] == 0).all()


# ---- cascades
def test_the_smallest_margins_are_rescored_and_no_other_row():
    (small, large), y = simulated_voters([1, 2], 1000)
    rows = least_certain(small, 0.2)
    assert len(rows) == 200
    assert margin(small)[rows].max() <= np.delete(margin(small), rows).min()
    vote = rescore(small, large[rows], rows, 3)
    np.testing.assert_allclose(vote[rows], (small[rows] + 3 * large[rows]) / 4, atol=1e-6)
    np.testing.assert_array_equal(np.delete(vote, rows, 0), np.delete(small, rows, 0))


def test_the_share_fits_the_budget():
    (small, large), y = simulated_voters([1, 2], 1000)
    curve = cascade_curve(small, large, y, (10, 100), 2)
    for budget in (10, 45, 200):
        share = best_share(curve, budget)
        assert curve.minutes[share] <= budget
    assert best_share(curve, 200) == 1
    assert best_share(cascade_curve(large, small, y, (10, 100), 2), 200) == 0
    with pytest.raises(Refusal, match='needs 10 minutes'):
        best_share(curve, 9)


@pytest.mark.parametrize('rule', ['mean', 'logits', 'majority'])
def test_the_curve_of_several_voters_is_that_of_their_vote(rule):
    p, label = simulated_voters([1, 1.3, 1.3, 1.3, 1.3], 2000, shared=0.3, options=4)
    names, w, has = list('abcde'), np.array([2, 1, 1, 1, 1]) / 6, np.ones((5, 2000), bool)
    score = dict(oof=dict(zip(names, p)), rows=pd.DataFrame(dict(label=label)))
    curve = cascade_scores(names, w, score, rule, (0, 0.3, 1))
    for share in curve.index:
        has[1:] = np.isin(np.arange(2000), least_certain(p[0], share))
        assert curve.accuracy[share] == pytest.approx(accuracy(combine_asked(p, has, w, rule), label))


# ---- ranks
def test_ranks_keep_a_voters_answers_and_count_order_only():
    p, _ = simulated_voters([1, 1], 500)
    np.testing.assert_array_equal(combine(p[:1], rule='ranks').argmax(1), p[0].argmax(1))
    sharper = p[1] ** 0.5 / 2  # the same order among all of its numbers
    np.testing.assert_allclose(combine([p[0], sharper], rule='ranks'), combine(p, rule='ranks'), atol=1e-4)
    short = np.array([[[0.6, 0.4, 0]], [[0.2, 0.8, 0]]])
    assert combine(short, rule='ranks')[0, 2] == 0
    np.testing.assert_allclose(combine(p, [3, 1], 'ranks').sum(1), 1, atol=1e-5)
