"""Votes: python bench/vote.py speed [rows] [voters] | sequential | budget

speed: time of combining; 0.2 s is the aim for a million rows and nine voters.
sequential: voters asked a row, of nine simulated ones; at most 6 is the aim, with 99.9 % of the answers the same.
budget: predicted against used minutes of votes under a budget on simulated machines.
Real models: vote_quality.py (scores of every way to vote) and vote_gpu.py (nine voters beside one, forecasts)."""

import sys, time
import numpy as np
from common import report
from competition_kit.choose import effective_voters, error_correlation, simulated_voters
from competition_kit.clock import Clock
from competition_kit.combine import combine
from competition_kit.sequential import calibrated_limits, exact_limits, sequential_vote
from competition_kit.staged import gaps, no_answers, passes, staged_vote


def timed(f, times=5):
    def once():
        t = time.perf_counter()
        f()
        return time.perf_counter() - t

    return min(once() for _ in range(times))


def speed(n=1_000_000, k=9):
    p = np.random.default_rng(0).random((k, n, 3), np.float32)
    p /= p.sum(-1, keepdims=True)
    for rule in ('mean', 'logits', 'majority', 'ranks'):
        seconds = timed(lambda: combine(p, rule=rule), 1 if rule == 'ranks' else 5)
        print(f'{rule:9} {k} voters, {n} rows: {seconds:.3f} s')
    some = p[:, : n // 100]
    import pandas as pd

    slow = timed(lambda: pd.DataFrame(some.argmax(-1).T).mode(axis=1), 1) * 100
    print(f'pandas mode(axis=1), scaled from {n // 100} rows: {slow:.1f} s')


def sequential(calibration=20_000, n=50_000, voters=9):
    "Limits from some rows, votes on others; three seeds"
    w = np.full(voters, 1 / voters)
    for skill, shared in (1.5, 0.8), (1.5, 0.5), (0.5, 0.8), (0.5, 0.5):
        for rule, change in ('majority', 0), ('mean', 0), ('mean', 0.001), ('logits', 0.001):
            asked, same, worth = [], [], []
            for seed in range(3):
                known, _ = simulated_voters([skill] * voters, calibration, shared, seed=100 + seed)
                p, label = simulated_voters([skill] * voters, n, shared, seed=seed)
                limits = calibrated_limits(known, w, rule, change) if change else exact_limits(w)
                vote, count = sequential_vote(lambda v, rows: p[v, rows], n, w, limits, rule)
                full = combine(p, w, rule).argmax(1)
                asked.append(count.mean())
                same.append((vote.argmax(1) == full).mean())
                worth.append(effective_voters(error_correlation(p, label)))
            report(
                what='sequential',
                skill=skill,
                shared=shared,
                n_eff=float(np.mean(worth)),
                rule=rule,
                change=change,
                voters_a_row=float(np.mean(asked)),
                same=round(float(np.mean(same)), 5),
                worst=round(float(np.min(same)), 5),
            )


def budget(n=5000, tokens=300):
    "A GPU of 40,000 tokens a second that loads a model in 30 seconds; three voters with two views need 4.1 minutes"
    p, _ = simulated_voters([1.5] * 6, n, 0.6)
    slower = dict(steady=lambda t, end: 40_000, half=lambda t, end: 40_000 if t < end / 2 else 20_000)
    for name, rate in slower.items():
        for minutes in 2, 3, 5:
            t, a, saves = [0.0], no_answers([0, 1, 2], n, 3), []
            clock = Clock(minutes, now=lambda: t[0])

            def load(run):
                t[0] += 30

            def ask(run, rows, views):
                t[0] += tokens * len(rows) * len(views) / rate(t[0], 60 * minutes)
                return sum(p[run + 3 * view, rows] for view in views)

            todo = passes(a, [1, 1, 1], np.full((n, 3), 1 / 3))
            why = staged_vote(a, todo, load, ask, np.full(n, tokens), clock, lambda: saves.append(t[0]))
            report(
                what='budget',
                machine_is=name,
                budget=minutes,
                minutes=t[0] / 60,
                first_complete=[s for s in saves if s >= 30][0] / 60,
                no_model=gaps(a, 'abc', 2)['no_model'],
                answers=float((a.views / 2).sum(0).mean()),
                stopped=why,
            )


if __name__ == '__main__':
    what, *sizes = sys.argv[1:] or ['speed']
    dict(speed=speed, sequential=sequential, budget=budget)[what](*map(int, sizes))
