"Grouping (recall by family of copies, false merges by table, speed) and folding: python bench/split.py [rows]"
import resource, sys, time
from pathlib import Path
import numpy as np, pandas as pd
from competition_kit.folds import make_folds
from competition_kit.groups import group_rows, second_look

def timed(f, *args, **kw):
    t = time.perf_counter()
    out = f(*args, **kw)
    return out, time.perf_counter()-t

sys.path.append(str(Path(__file__).resolve().parents[1]/'tests'))
from planted import doubled, full_width, one_word, rng, sentence

families = {  # name → (words of a prompt, the copy)
    'exclamation mark': ((3, 4, 6, 8, 9), lambda s: s+'!'),
    'zero-width characters': ((4, 30), lambda s: s.replace(' ', '\u200b ', 2)),
    'accents': ((4, 30), lambda s: s.replace('a', '\u00e1')),
    'capitals': ((4, 30), str.upper),
    'full width': ((4, 30), full_width),
    'emoji': ((4, 30), lambda s: s+' \U0001f642'),
    'one word changed': ((8, 12, 20, 30, 40, 60), one_word),
    'a doubled word': ((8, 30), doubled),
    'a sentence in front': ((8, 30), lambda s: f'{sentence(7)}. {s}')}

def recall(lengths, copy, n=1000): # least share of the copies found, over the lengths
    def found(k):
        base = [sentence(k) for _ in range(n)]
        g = group_rows(base + [copy(t) for t in base] + [sentence(k) for _ in range(n)])
        return (g[:n] == g[n:2*n]).mean()
    return min(map(found, lengths))

def many(copies, n): # groups of one prompt in many copies that end in two words of their own
    base = sentence(40)
    near = [f'{base} {sentence(2)}' for _ in range(copies)]
    return len(set(group_rows(near + [sentence(30) for _ in range(n-copies)])[:copies]))

puzzles = 'syllogism family_relationships calendar_arithmetic zebra_puzzles aiw coin_flip propositional_logic'.split()
puzzles += 'leg_counting spell_backward gsm_symbolic time_intervals acre jugs self_reference'.split()
puzzles += 'needle_haystack chain_sum circuit_logic'.split()
puzzles = {**{name: {} for name in puzzles}, 'knights_knaves': dict(n_people=2)}

def changed(new): # a copy with one alphabetic word changed into the words that `new` gives
    def copy(text, words):
        w = text.split(' ')
        k = rng.choice([k for k, v in enumerate(w) if v.isalpha() and len(v) > 1])
        return ' '.join([*w[:k], *new(w[k], words), *w[k+1:]])
    return copy

planted = { # name → the copy of a puzzle, given the words of the table
    '!': lambda t, words: t+'!',
    'zero-width': lambda t, words: t.replace(' ', '\u200b ', 3),
    'accents': lambda t, words: t.replace('a', '\u00e1').replace('e', '\u00e9'),
    'capitals': lambda t, words: t.upper(),
    'unknown word': changed(lambda w, words: [''.join(rng.choices('bcdfghklmnprstvwz', k=7))]),
    'same strange word': changed(lambda w, words: ['zzqqxx']),
    'word of the table': changed(lambda w, words: [rng.choice(words)]),
    'doubled word': changed(lambda w, words: [w, w]),
    'dropped word': changed(lambda w, words: []),
    'sentence in front': lambda t, words: f'{sentence(7)}. {t}'}

def in_puzzles(name, n=100): # (puzzles, merged, merged with another answer, family → (recall, further merges))
    import reasoning_gym
    made = reasoning_gym.create_dataset(name, size=1000, seed=1, **puzzles[name])
    made = {o['question']: str(o['answer']) for o in made}
    made, answers = list(made), list(made.values())
    g, found = group_rows(made), {}
    groups, pairs = len(set(g)), len(set(zip(g, answers)))
    long = [t for t in made if sum(w.isalpha() and len(w) > 1 for w in t.split(' ')) >= 5]
    base, words = rng.sample(long, min(n, len(long))), sorted({w for t in made for w in t.split() if w.isalpha()})
    for family, copy in planted.items():
        copies = [copy(t, words) for t in base]
        both = group_rows(made+copies)
        of = dict(zip(made, both))
        hit = [of[t] == h or c in of for t, c, h in zip(base, copies, both[len(made):])]
        found[family] = float(np.mean(hit)), groups-len(set(both[:len(made)]))
    return len(made), len(made)-groups, pairs-groups, found

def texts(n, planted, rng): # n texts of 45 words in the mean; the last `planted` are copies with a word or two changed
    ends = 'n r s mo ti lab ker'.split()
    words = np.array([f'{a}{b}{c}' for a in 'bcdfghjklmnprst' for b in 'aeiou' for c in ends])
    zipf = 1/np.arange(1, len(words)+1)**.8
    rows = [rng.choice(words, k, p=zipf/zipf.sum()) for k in rng.poisson(45, n-planted).clip(3)]
    copies = []
    for i in range(planted):
        t = rows[i].copy()
        t[rng.integers(0, len(t), rng.integers(1, 3))] = 'changed'
        copies.append(t)
    return [' '.join(t) for t in rows+copies]

def groups(n, rng):
    group = np.repeat(np.arange(n), rng.geometric(.6, n))[:n]
    return np.array([f'{g*7919%2**32:016x}' for g in group], object), rng.choice(3, n, p=[.35, .34, .31])

if __name__ == '__main__':
    for name, family in families.items(): print(f'recall, {name}: {recall(*family):.2%}')
    crowds = {f'{c} of {n}': many(c, n) for n in (200, 1000, 5000) for c in (15, 30, 60, 110)}
    print('groups of one prompt in many copies:', crowds)
    for name in puzzles:
        n, merged, wrong, found = in_puzzles(name)
        print(f'{name}: {merged} of {n} merged, {wrong} with another answer; ' +
              ', '.join(f'{k} {r:.0%}'+f' (+{more})'*(more > 0) for k, (r, more) in found.items()), flush=True)
    n, rng = int((sys.argv[1:] or [100_000])[0]), np.random.default_rng(0)
    t = texts(n, n//20, rng)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cpu = time.process_time()
    g, took = timed(group_rows, t)
    cpu = time.process_time()-cpu
    found = (g[:n//20] == g[-(n//20):]).mean()
    rss = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-before)/n
    print(f'group_rows   {n} rows: {took:.2f} s ({cpu:.2f} s of CPU), {rss:.2f} KB a row, '
          f'{found:.1%} of the planted copies found, largest group {pd.Series(g).value_counts().iloc[0]}')
    cpu = time.process_time()
    (_, checked, share), took = timed(second_look, t)
    cpu = time.process_time()-cpu
    print(f'second_look  {n} rows: {took:.2f} s ({cpu:.2f} s of CPU), {checked} looked up, '
          f'{share:.1%} of the planted copies found')
    group, label = groups(n, rng)
    fold, took = min((timed(make_folds, group, label) for _ in range(5)), key=lambda o: o[1])
    share = pd.crosstab(fold, label, normalize='index')
    spread = (share-np.bincount(label)/n).abs().to_numpy().max()
    print(f'make_folds   {n} rows: {took:.3f} s, label shares within {spread:.4%}, '
          f'fold sizes {np.bincount(fold).tolist()}, groups cut {(pd.Series(fold).groupby(group).nunique() > 1).sum()}')
    from sklearn.model_selection import StratifiedGroupKFold
    _, slow = timed(lambda: list(StratifiedGroupKFold(5, shuffle=True, random_state=0).split(label, label, group)))
    print(f'scikit-learn {n} rows: {slow:.1f} s, {slow/took:.0f} times as long')
