"""What is each way to vote worth? Voters, rules, weights, swapped views and a cascade on held-out rows.

usage: python bench/vote_quality.py open=FILE said.parquet [said.parquet …] [--out FOLDER]
`said.parquet` are the out-of-fold probabilities that `distill.py` leaves: of `labels` (also asked in one view), the
same with the rows of the second table, the score route, and the teacher. All else is arithmetic over them.
`spread` is the standard deviation over seeds or, of a single vote, over folds. `difference` is the mean difference to
the line `against`, row by row; `least` is the smallest difference that two standard errors over groups can tell."""
import argparse
from pathlib import Path

import distill
import numpy as np
import pandas as pd
from competition_kit.cascade import least_certain, rescore
from competition_kit.choose import effective_voters, error_correlation
from competition_kit.combine import combine, fit_weights
from competition_kit.probs import accuracy, log_loss
from competition_kit.sequential import calibrated_limits, exact_limits, sequential_vote
from competition_kit.tables import split

FAMILIES = 'labels', 'labels, alpaca rows with real labels', 'labels, score route'
SHORT = dict(zip(FAMILIES, ('labels', 'more rows', 'score head')))
TEACHER, ONE_VIEW = 'teacher: qwen', 'labels, asked in one view'

def jobs(folds, seeds): # (line, arguments of 04_train); those that take longest first
    lines = {TEACHER: 1, 'labels, score route': seeds, FAMILIES[1]: seeds, 'labels': seeds}
    return [(line, args) for line, n in lines.items() for stage, args in distill.jobs_of(line, {}, folds)
            if args['seed'] < n]

# ---- arithmetic
class Held:
    "Out-of-fold probabilities: `p[line, seed]` and `one[seed]`, [rows, options], for rows that all of them have"
    def __init__(self, said, groups): # `said`: of distill.py; `groups`: id → group
        tables = {key: t.set_index('id') for key, t in said.groupby(['line', 'seed'])}
        self.families = [line for line in FAMILIES if line in set(said.line)]
        self.seeds = sorted({s for _, s in tables if all((line, s) in tables for line in self.families)})
        if not self.seeds: raise SystemExit('no seed has runs of every family')
        used = {(line, s): t for (line, s), t in tables.items() if line in (*self.families, TEACHER, ONE_VIEW)}
        rows = tables['labels', self.seeds[0]].sort_index()
        rows = rows.loc[sorted(set(rows.index).intersection(*(t.index for t in used.values())))]
        self.label, self.fold, self.group = rows.label.to_numpy(), rows.fold.to_numpy(), groups[rows.index].to_numpy()
        self.p = {key: np.stack(t.p.loc[rows.index]) for key, t in used.items()}
        self.one, self.large = ({seed: p for (line, seed), p in self.p.items() if line == name}
                                for name in (ONE_VIEW, TEACHER))

    def by_fold(self, make): # [rows, options]; `make` gets masks of one fold and of the others
        out = np.zeros_like(self.p['labels', 0])
        for k in np.unique(self.fold): out[self.fold == k] = make(self.fold == k, self.fold != k)
        return out

def losses(p, label): return -np.log(np.maximum(p[np.arange(len(label)), label], 1e-15))  # [rows]

def compared(own, peer, held, metric): # difference of two lists of votes, row by row; what the rows can tell
    def mean(votes): # [rows]
        if metric == 'log_loss': return np.mean([losses(p, held.label) for p in votes], 0)
        return np.mean([p.argmax(1) == held.label for p in votes], 0)
    d = mean(own)-mean(peer)
    by_group = pd.Series(d-d.mean()).groupby(held.group).sum()
    least = 2*np.sqrt((by_group**2).sum())/len(d)
    better = -d.mean() if metric == 'log_loss' else d.mean()
    return dict(metric=metric, difference=d.mean(), least=least,
                told='better' if better > least else 'worse' if better < -least else 'no difference')

class Table:
    "The lines of the result; votes of a name may be several repetitions"
    def __init__(self, held): self.held, self.votes, self.lines = held, {}, []

    def add(self, name, votes, against=None, metric='log_loss', **facts):
        held, self.votes[name] = self.held, votes
        score = log_loss if metric == 'log_loss' else accuracy
        own, folds = [score(p, held.label) for p in votes], np.unique(held.fold)
        over = 'seeds' if len(own) > 1 else 'folds'
        if over == 'folds': spread = [score(votes[0][held.fold == k], held.label[held.fold == k]) for k in folds]
        else: spread = own
        line = dict(line=name, accuracy=np.mean([accuracy(p, held.label) for p in votes]),
                    spread=np.std(spread, ddof=1), over=over)
        if metric == 'log_loss': line = dict(line=name, log_loss=np.mean(own)) | line
        if against: line |= compared(votes, self.votes[against], held, metric) | dict(against=against)
        self.lines.append(line | facts)

def independent(p, label): # how many voters the voters count as
    rho = error_correlation(np.stack(p), label)
    n = len(p)
    return dict(rho=(rho.sum()-n)/(n*(n-1)), n_eff=effective_voters(rho))

def members(held, n, k): # n voters of all families; the k-th choice of their seeds
    seeds = [held.seeds[(k+s) % len(held.seeds)] for s in range(len(held.seeds))]
    return [held.p[line, s] for s in seeds for line in held.families][:n]

def add_voters(t):
    held = t.held
    for line in held.families:
        t.add(f'single: {SHORT[line]}', [held.p[line, s] for s in held.seeds], 'single: labels' if t.votes else None)
    if held.large: t.add('single: 0.5B', list(held.large.values()), 'single: labels')
    best = min((f'single: {SHORT[line]}' for line in held.families),
               key=lambda name: next(l['log_loss'] for l in t.lines if l['line'] == name))
    for line in held.families:
        p = [held.p[line, s] for s in held.seeds]
        t.add(f'{len(p)} seeds: {SHORT[line]}', [combine(p)], f'single: {SHORT[line]}', **independent(p, held.label))
    most = len(held.families)*len(held.seeds)
    for n in [n for n in (3, 5, 7, 9) if n <= most]:
        chosen = [members(held, n, k) for k in range(len(held.seeds) if n < most else 1)]
        worth = pd.DataFrame([independent(p, held.label) for p in chosen]).mean().to_dict()
        t.add(f'{n} of {most} voters', [combine(p) for p in chosen], best, **worth)

def add_rules(t):
    held = t.held
    p = np.stack([held.p[line, s] for line in held.families for s in held.seeds])
    t.add('all voters, mean', [combine(p)])
    t.add('all voters, logits', [combine(p, rule='logits')], 'all voters, mean')
    for rule in 'majority', 'ranks':
        t.add(f'all voters, {rule}', [combine(p, rule=rule)], 'all voters, mean', 'accuracy')
    t.add('all voters, fitted weights (nested)', [held.by_fold(lambda here, other: combine(
        p[:, here], fit_weights(p[:, other], held.label[other])))], 'all voters, mean')

def add_sequential(t): # limits are calibrated on the other folds
    held = t.held
    p = np.stack([held.p[line, s] for line in held.families for s in held.seeds])
    w = np.full(len(p), 1/len(p))
    for rule, change in ('majority', 0), ('mean', .001), ('mean', .01):
        asked = np.zeros(len(held.label))
        def one(here, other):
            limits = calibrated_limits(p[:, other], w, rule, change) if change else exact_limits(w)
            q = p[:, here]
            vote, count = sequential_vote(lambda v, rows: q[v, rows], here.sum(), w, limits, rule)
            asked[here] = count
            return vote
        vote = held.by_fold(one)
        same = (vote.argmax(1) == combine(p, rule=rule).argmax(1)).mean()
        t.add(f'sequential {rule}, change {change:g}', [vote], f'all voters, {rule}', 'accuracy',
              voters_a_row=asked.mean(), same=same)

def add_swaps(t):
    held = t.held
    if not held.one: return
    t.add('one view', list(held.one.values()))
    for share in .1, .3, 1.:
        votes = []
        for s, one in held.one.items():
            rows = least_certain(one, share)
            swapped = 2*held.p['labels', s]-one  # the kept probabilities are the mean of both views
            votes.append(rescore(one, swapped[rows], rows))
        t.add(f'swapped views for {share:.0%} of the rows', votes, 'one view', views_a_row=1+share)

def add_cascade(t): # the large model's weight is chosen on the other folds
    held = t.held
    if not held.large: return
    for share in .1, .25, .5, 1.:
        votes = []
        for s in held.seeds:
            small, large = held.p['labels', s], held.large.get(s, held.large[0])
            def vote(at, weight):
                rows = least_certain(small[at], share)
                return rescore(small[at], large[at][rows], rows, weight)
            def nested(here, other):
                best = min((.5, 1, 2, 4, 16), key=lambda w: log_loss(vote(other, w), held.label[other]))
                return vote(here, best)
            votes.append(held.by_fold(nested))
        t.add(f'cascade: 0.5B for {share:.0%} of the rows', votes, 'single: labels')
    larges = [log_loss(p, held.label) for p in held.large.values()]
    t.lines[-1]['gap_to_large'] = t.lines[-1]['log_loss']-np.mean(larges)

def table(held):
    t = Table(held)
    for add in add_voters, add_rules, add_sequential, add_swaps, add_cascade: add(t)
    return pd.DataFrame(t.lines)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('table')
    p.add_argument('said', nargs='+')
    p.add_argument('--out', default='.')
    a = p.parse_args()
    rows, _ = split(str(Path(a.table.split('=')[-1]).resolve()))
    said = pd.concat(map(pd.read_parquet, a.said)).drop_duplicates(['line', 'seed', 'id'])
    t = table(Held(said, rows.set_index('id').group))
    t.to_json(Path(a.out)/'vote_quality.json', orient='records', indent=1)
    with pd.option_context('display.width', 250):
        print(t.to_string(index=False, na_rep='', float_format=lambda v: f'{v:.4f}'))
