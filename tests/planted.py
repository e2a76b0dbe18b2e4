"Texts of invented words and near copies of them, for the tests of the groups and for `bench/split.py`"
import random

rng = random.Random(0)
vocab = [''.join(rng.choices('bcdfghklmnprstvwz', k=2)+rng.choices('aeiou', k=2)) for _ in range(5000)]
def sentence(n): return ' '.join(rng.choices(vocab, k=n))

def one_word(s): # changed
    w = s.split()
    w[rng.randrange(len(w))] = 'zzqq'
    return ' '.join(w)

def doubled(s): # a word
    w = s.split()
    k = rng.randrange(len(w))
    return ' '.join([*w[:k], w[k], *w[k:]])

def full_width(s): return ''.join(chr(ord(c)+0xfee0) if '!' <= c <= '~' else c for c in s)
