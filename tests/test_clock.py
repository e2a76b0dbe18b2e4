"Budgets on simulated machines: slower half-way, stalled, dead; what is on disk then, and what is said about it"

from types import SimpleNamespace
import numpy as np, pandas as pd, pytest
import competition_kit.predictions as P
from competition_kit.choose import simulated_voters
from competition_kit.clock import Clock, cut_pieces, fits, piece_size, seconds_per_unit, timed_piece, work_within
from competition_kit.combine import combine
from competition_kit.core import Refusal
from competition_kit.sequential import exact_limits
from competition_kit.staged import (
    gap_sentence,
    gaps,
    minutes_needed,
    no_answers,
    passes,
    read_answers,
    rows_in_doubt,
    staged_vote,
    vote_so_far,
    write_answers,
)
from competition_kit.trained import base_key
from competition_kit.vote import ask_alone

N = 600


class Machine:
    "Three voters with two views on a simulated GPU; `rate(seconds)` tokens a second"

    def __init__(self, minutes, rate, skills=(1.5, 1.5, 1.5)):
        self.t, self.rate, self.saves = 0.0, rate, []
        self.p, self.label = simulated_voters([*skills, *skills], N, shared=0.6)
        self.plain, self.swapped = self.p[: len(skills)], self.p[len(skills) :]
        self.clock = Clock(minutes, now=lambda: self.t)
        self.a = no_answers(range(len(skills)), N, 3)
        self.prior = np.full((N, 3), 1 / 3)
        self.weights = np.ones(len(skills))

    def load(self, run):
        self.t += 10

    def ask(self, run, rows, views):
        self.t += 100 * len(rows) * len(views) / self.rate(self.t)
        return sum((self.swapped if view else self.plain)[run, rows] for view in views)

    def save(self):
        self.saves.append((self.t, vote_so_far(self.a, self.weights, self.prior)))

    def vote(self, **how):
        todo = passes(self.a, self.weights, self.prior, **how)
        why = staged_vote(self.a, todo, self.load, self.ask, np.full(N, 100), self.clock, self.save)
        return why, gaps(self.a, list('abc'), 2)


def test_without_a_budget_the_vote_is_the_mean_of_all():
    m = Machine(0, lambda t: 1000)
    why, missing = m.vote()
    assert why == '' and gap_sentence(missing, why) == ''
    np.testing.assert_allclose(m.saves[-1][1], m.p.mean(0), atol=1e-5)


@pytest.mark.parametrize('minutes', [2, 4, 6])
def test_a_machine_that_becomes_twice_slower_ends_in_time(minutes):
    m = Machine(minutes, lambda t: 1000 if t < 30 * minutes else 500)
    why, missing = m.vote()
    assert why == 'the time is up'
    assert m.saves[-1][0] <= 60 * minutes
    assert missing['no_model'] == 0  # the first pass was complete before
    assert m.saves[-1][0] > 60 * minutes * 0.7  # and the time was used


def test_a_stall_leaves_the_submission_of_before():
    m = Machine(4, lambda t: 1 if 120 < t < 121 else 1000)
    why, missing = m.vote()
    assert why == 'the time is up'
    in_time = [vote for t, vote in m.saves if t <= 240]
    np.testing.assert_allclose(in_time[-1].sum(1), 1, atol=1e-5)
    assert (np.abs(in_time[-1] - 1 / 3).max(1) > 1e-3).mean() > 0.99  # predictions, not the prior


@pytest.mark.parametrize('dies_at', [15, 100, 200])
def test_an_engine_that_dies_says_what_is_missing(dies_at):
    def rate(t):
        if t > dies_at:
            raise RuntimeError('CUDA error: device lost')
        return 1000

    m = Machine(6, rate)
    why, missing = m.vote()
    assert why == 'RuntimeError: CUDA error: device lost'
    said = gap_sentence(missing, why)
    assert 'device lost' in said
    answered = (m.a.views > 0).any(0)
    assert missing['no_model'] == (~answered).sum()
    assert ('rows have the prior' in said) == (not answered.all())
    np.testing.assert_allclose(m.saves[-1][1][~answered], 1 / 3, atol=1e-6)


def test_without_a_budget_an_error_is_an_error():
    m = Machine(0, lambda t: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        m.vote()


def test_a_save_comes_first_and_once_a_minute():
    m = Machine(30, lambda t: 300)
    m.vote()
    times = [t for t, _ in m.saves]
    assert times[0] == 0
    assert max(np.diff(times)) < 60 + 0.02 * 30 * 60 + 10


def test_no_few_rows_are_left_over_for_a_piece_of_their_own():
    sizes, asked = np.random.default_rng(0).integers(80, 640, N), []
    m = Machine(600, lambda t: 1e5)

    def ask(run, rows, views):
        asked.append((run, sizes[rows].sum()))
        return m.ask(run, rows, views)

    todo = passes(m.a, m.weights, m.prior, views=1)
    staged_vote(m.a, todo, m.load, ask, sizes, m.clock, m.save)
    later = [tokens for run, tokens in asked if run]
    assert len(later) == 16 and min(later) > 0.8 * sizes.sum() / 8


def test_swapped_views_come_for_the_smallest_margins_first():
    m = Machine(2.3, lambda t: 1000)
    m.vote()
    twice = m.a.views[0] == 2
    assert 0 < twice.sum() < N
    lead = np.sort(m.plain[0], 1)[:, -1] - np.sort(m.plain[0], 1)[:, -2]
    assert lead[twice].max() <= lead[~twice].min() + 1e-6


def test_limits_and_shares_spare_rows():
    m = Machine(0, lambda t: 1000)
    m.vote(rule='majority', views=1, limits=exact_limits(m.weights))
    full = combine(m.plain, m.weights, 'majority').argmax(1)
    asked = (m.a.views > 0).sum(0)
    assert 2 <= asked.mean() < 3
    np.testing.assert_array_equal(vote_so_far(m.a, m.weights, m.prior, 'majority').argmax(1), full)
    m = Machine(0, lambda t: 1000)
    m.a.total[2], m.a.views[2] = 2 * m.plain[2], 2  # a file, which has answered for all rows
    m.vote(share=0.25)
    assert ((m.a.views > 0).sum(1) == [N, N // 4, N // 4]).all()


@pytest.mark.parametrize('minutes', [4, 8, 30])
def test_the_share_is_chosen_when_the_second_model_is_measured(minutes):
    "a second model five times slower: the predicted minutes hold, and the largest share that fits is asked for"
    m, found = Machine(minutes, lambda t: 1000, (1.0, 2.0)), {}

    def ask(run, rows, views):
        m.t += 100 * len(rows) * len(views) / (200 if run else 1000)
        return sum((m.swapped if view else m.plain)[run, rows] for view in views)

    def load(run):
        m.t += 10
        m.clock.pieces.clear()

    def choose():
        shares = np.arange(0, 1.01, 0.05)
        needed = [minutes_needed(m.a, np.full(N, 100), 2, m.clock, rows_in_doubt(m.a, 0, s)) for s in shares]
        fits = np.flatnonzero(np.array(needed) <= m.clock.budget())
        found.update(share=shares[fits[-1]], minutes=needed[fits[-1]])
        return found['share']

    todo = passes(m.a, m.weights, m.prior, share=choose, order=[0, 1])
    why = staged_vote(m.a, todo, load, ask, np.full(N, 100), m.clock, m.save)
    asked = (m.a.views > 0).mean(1)
    assert why == '' and asked[0] == 1 and asked[1] == pytest.approx(found['share'], abs=1 / N)
    assert 0.05 < found['share'] < 1 or minutes == 30
    assert m.t / 60 == pytest.approx(found['minutes'], rel=0.02)


def test_a_restarted_cascade_asks_for_the_same_rows():
    m = Machine(0, lambda t: 1000, (1.0, 2.0))
    steps = passes(m.a, m.weights, m.prior, views=1, share=0.25, order=[0, 1])
    for run, views, rows in steps:
        first = rows[: len(rows) // 2] if run else rows  # killed half-way through the second model
        m.a.total[run, first] += m.plain[run, first]
        m.a.views[run, first] += 1
    again = [rows for run, _, rows in passes(m.a, m.weights, m.prior, views=1, share=0.25, order=[0, 1]) if run]
    assert len(np.concatenate(again)) == N // 4 - N // 8
    np.testing.assert_array_equal(np.concatenate([first, again[0]]), rows_in_doubt(m.a, 0, 0.25))
    chosen = passes(m.a, m.weights, m.prior, views=1, share=lambda: 0.25, order=[0, 1])
    measured = [rows for run, _, rows in chosen if run][0]  # rows that are still to be asked show the pace
    np.testing.assert_array_equal(measured, again[0][: N // 20])


def test_an_interrupted_vote_goes_on(tmp_path):
    m = Machine(3, lambda t: 1000)
    m.vote()
    write_answers(tmp_path / 'answers.npz', m.a, 'key')
    again = Machine(0, lambda t: 1000)
    assert read_answers(tmp_path / 'answers.npz', again.a, 'key')
    before = int(again.a.views.sum())
    asked = []
    real = again.ask
    again.ask = lambda run, rows, views: asked.append(len(rows) * len(views)) or real(run, rows, views)
    again.vote()
    assert sum(asked) == 6 * N - before
    np.testing.assert_allclose(again.saves[-1][1], m.p.mean(0), atol=1e-5)


class Killed(BaseException):
    pass


@pytest.mark.parametrize('how', ['all', 'limits', 'share', 'chosen'])
@pytest.mark.parametrize('seed', range(12))
def test_a_vote_killed_anywhere_ends_as_one_that_was_not(how, seed):
    "voters of several runs, of which some are files; killed after any number of pieces, again and again"
    rng, n = np.random.default_rng(seed), 40
    voter = np.repeat([0, 1, 2], rng.integers(1, 3, 3))
    p = simulated_voters([1.3] * 2 * len(voter), n, seed=seed)[0].reshape(2, len(voter), n, 3)
    files, w, prior, share = rng.random(len(voter)) < 0.3, np.array([3.0, 2, 2]), np.full((n, 3), 1 / 3), 0.3
    order = dict(
        all={}, limits=dict(limits=exact_limits(w)), share=dict(share=share), chosen=dict(share=lambda: share)
    )[how]

    def fresh():
        a = no_answers(voter, n, 3)
        a.total[files], a.views[files] = p[:, files].sum(0), 2
        return a

    def go(a, pieces):
        def ask(run, rows, views):
            nonlocal pieces
            pieces -= 1
            if pieces < 0:
                raise Killed
            return p[np.ix_(views, [run], rows)].sum((0, 1))

        todo = passes(a, w, prior, order=range(3), **order)
        return staged_vote(a, todo, lambda run: None, ask, np.full(n, 100), Clock(0), lambda: None, first=900)

    whole, parts = fresh(), fresh()
    assert go(whole, 10**6) == ''
    for attempt in range(99):
        try:
            go(parts, attempt % 3)
            break
        except Killed:
            pass
    np.testing.assert_array_equal(parts.views, whole.views)
    np.testing.assert_allclose(parts.total, whole.total, atol=1e-6)
    if how in ('share', 'chosen'):
        assert ((whole.views[voter > 0] > 0).sum(1) == round(share * n)).all()


@pytest.mark.parametrize('damage', [lambda b: b[:-30], lambda b: b'', lambda b: b[:200] + b'\x00' * 50 + b[250:]])
def test_damaged_answers_are_asked_again(tmp_path, damage):
    m = Machine(0, lambda t: 1000)
    m.vote()
    file = tmp_path / 'answers.npz'
    write_answers(file, m.a, 'key')
    file.write_bytes(damage(file.read_bytes()))
    fresh = Machine(0, lambda t: 1000)
    assert not read_answers(file, fresh.a, 'key')
    assert fresh.a.views.sum() == 0


def test_a_flipped_bit_changes_no_answer(tmp_path):
    "also one among the flags of the file, which says that it is encrypted, or packed in an unknown way"
    a, file, rng = no_answers([0, 1], 9, 3), tmp_path / 'answers.npz', np.random.default_rng(0)
    a.total[:], a.views[:] = rng.random(a.total.shape), 1
    write_answers(file, a, 'key')
    whole = file.read_bytes()
    for at in range(len(whole)):
        damaged, fresh = bytearray(whole), no_answers([0, 1], 9, 3)
        damaged[at] ^= 1 << rng.integers(8)
        file.write_bytes(damaged)
        read = read_answers(file, fresh, 'key')
        np.testing.assert_array_equal(fresh.total, a.total if read else 0)


# ---- the forecast of a whole vote
class Models:
    "A `RunAsker` on a simulated GPU: a base loads in 30 seconds for each size, and its first piece takes 15 more"

    def __init__(self, bases, sizes, clock, p, shared, stall, families):
        params = [dict(base=b, route='answer', dtype='fp32') for b in bases]
        self.recs = {f'run {k}': dict(run_id=f'run {k}', params=q) for k, q in enumerate(params)}
        self.sizes, self.t, self.p, self.task, self.shared = sizes, clock, p, 'preference', shared
        self.base, self.cold, self.seconds = None, False, dict(base=0.0, adapter=0.0)
        self.families = families  # of 100 tokens, a family shares 60
        self.stalls = [0, 0, 0, stall]  # seconds that the first pieces take longer

    def load(self, run):
        self.run, key = int(run.split()[1]), base_key(self.recs[run])
        if key != self.base:
            self.base, self.cold = key, True
            self.seconds['base'] = 30 * self.sizes[key[0]] + 0.5
            self.t[0] += self.seconds['base']
        else:
            self.seconds['adapter'] = 0.5  # unknown until the second run
            self.t[0] += 0.5

    def ask_views(self, at, views):
        shared = self.shared if len(views) > 1 else 1
        tokens = 40 * len(at) + 60 * len(set(self.families[at]))
        self.t[0] += len(views) * shared * tokens / 1000 * self.sizes[self.base[0]] + 15 * self.cold
        self.t[0] += self.stalls.pop(0) if self.stalls else 0
        self.cold = False
        return len(views) * self.p[self.run, at]

    def together(self):
        return self.shared

    def close(self):
        pass


@pytest.mark.parametrize(
    'bases, how',
    [
        ('AAAAAAAAA', dict(views=1)),
        ('AAAAAAAAA', dict(views=1, stall=60)),
        ('AAAAAAAAA', dict(views=2)),
        ('AAABBBAAA', dict(views=1)),
        ('AAAAAAAAA', dict(views=1, rule='majority', limits=exact_limits(np.ones(9)))),
        ('AB', dict(rescore=0.25)),
        ('AB', dict(rescore=0, budget=30)),
        ('AB', dict(rescore=0, budget=120)),
        ('AB', dict(rescore=0, budget=30, family=4)),
        ('AB', dict(rescore=0.25, family=4)),
        ('AAAAAAAAA', dict(views=1, rule='majority', limits=exact_limits(np.ones(9)), family=4)),
    ],
)
def test_the_predicted_minutes_are_the_measured_ones(bases, how, monkeypatch):
    "slow starts, a larger base, a piece that is held up, rows that stop early and rows that begin alike are in it"
    sizes, t, n = dict(A=1.0, B=5.0), [0.0], len(bases)
    usual = dict(views=2, rule='mean', rescore=1.0, budget=600, limits=None, stall=0, family=1)
    args = SimpleNamespace(**(usual | how))
    p, label = simulated_voters([1.5] * n, 2 * N, shared=0.6)
    held, test, families = p[:, :N], p[:, N:], np.arange(N) // args.family
    clock = Clock(args.budget, now=lambda: t[0])
    asker = object.__new__(P.BallotAsker)
    asker.models = Models(bases, sizes, t, test, 0.8 if args.views == 2 else 1, args.stall, families)
    asker.clock, asker.texts, asker.tables = clock, None, {}
    asker.names = asker.voters = list(asker.models.recs)
    asker.answers, asker.sizes = no_answers(range(n), N, 3), np.full(N, 100)
    asker.families, asker.shared = families, np.full(N, 60)
    sized = {base_key(r): np.full(2, sizes[r['params']['base']]) for r in asker.models.recs.values()}
    monkeypatch.setattr(P, '_base_sizes', lambda recs: sized)
    score = dict(oof=dict(zip(asker.names, held)), rows=pd.DataFrame(dict(label=label[:N])))
    w, prior = np.ones(n), np.full((N, 3), 1 / 3)
    why, plan = ask_alone(args, asker, w, prior, args.limits, score, lambda: None, 4096)
    assert why == '' and (asker.answers.views[0] == args.views).all()
    assert plan['predicted_minutes'] == pytest.approx(t[0] / 60, rel=0.03)


@pytest.mark.parametrize('seconds, starts', [(70, False), (130, False), (170, True)])
def test_a_large_model_is_not_loaded_when_its_load_does_not_fit(seconds, starts):
    "it takes 150 seconds and the first model took 10; an adapter over a loaded base needs no such time"
    m = Machine((80 + seconds) / 54, lambda t: 1000, (1.0, 2.0))
    loads = [10, 150]

    def load(run):
        m.t += loads[run]

    todo = passes(m.a, m.weights, m.prior, views=1)
    sizes = np.full(N, 100)
    why = staged_vote(m.a, todo, load, m.ask, sizes, m.clock, m.save, load_seconds=lambda run: loads[run])
    assert why == 'the time is up' and m.t <= m.clock.minutes * 60
    assert (m.a.views[0] == 1).all() and (m.t > 150) == starts


# ---- the clock alone
def test_the_pace_is_the_slower_of_all_and_last():
    t = [0.0]
    clock = Clock(10, now=lambda: t[0])
    assert seconds_per_unit(clock) == 0 and fits(clock, 1e9)
    for seconds in (1, 1, 1, 1, 5, 5, 5):
        timed_piece(clock, 10, lambda: t.__setitem__(0, t[0] + seconds))
    assert seconds_per_unit(clock) == pytest.approx(0.5)
    assert not fits(clock, 2000)
    assert fits(clock, 1000, load=10)


def test_pieces_are_all_rows_once_and_grow_with_the_pace():
    units = np.random.default_rng(0).integers(1, 900, 500)
    cut = list(cut_pieces(units, lambda: 4096))
    np.testing.assert_array_equal(np.concatenate(cut), np.arange(500))
    assert max(units[c].sum() for c in cut) <= 4096
    assert [len(c) for c in cut_pieces([5000, 1, 1], lambda: 100)] == [1, 2]
    t = [0.0]
    clock = Clock(10, now=lambda: t[0])
    assert piece_size(clock, 100) == 100
    timed_piece(clock, 100, lambda: t.__setitem__(0, 0.1))
    assert piece_size(clock, 100) == pytest.approx(6000)


def test_a_refusal_is_raised_under_a_budget_too():
    def refuses():
        raise Refusal('no such base')

    with pytest.raises(Refusal, match='no such base'):
        work_within(Clock(5), [(1, refuses)])
