"Near-duplicates: every family of copies is found, puzzles of one template stay apart, and what text counts"
import random

import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st

from competition_kit import groups as S
from competition_kit.groups import copied, group_rows, group_text
from competition_kit.split import leak_report, leak_table, leak_text
from planted import doubled, full_width, one_word, sentence, vocab

WORDS = '''apple river stone cloud seven green dance light winter copper bottle window garden silver planet rocket
simple yellow market basket'''.split()

# -- planted families ----------------------------------------------------------------------------------------------
def zero_width(s): return s.replace(' ', '\u200b ', 2)[:-1]+'\u2060'+s[-1]
def accents(s): return s.replace('a', '\u00e1').replace('e', 'e\u0308')
families = {  # name → lengths in words, and how a copy is made
    '!': ((3, 4, 5, 6, 7, 8, 9), lambda s: s+'!'),
    'zero width': ((3, 6, 30), zero_width),
    'capitals': ((4, 30), str.upper),
    'accents': ((5, 30), accents),
    'full width': ((5, 30), full_width),
    'emoji': ((5, 30), lambda s: s+' \U0001f642'),
    'one word': ((8, 9, 12, 20, 30, 60, 200), one_word),
    'a doubled word': ((8, 30), doubled),
    'a sentence in front': ((8, 30), lambda s: sentence(7)+'. '+s)}

@pytest.mark.parametrize('name', families)
def test_family_is_found(name):
    for n in families[name][0]:
        base = [sentence(n) for _ in range(300)]
        g = group_rows(base + [families[name][1](t) for t in base] + [sentence(n) for _ in range(300)])
        assert (g[:300] == g[300:600]).mean() >= .99, n
        assert len(set(g)) >= 600, n

@pytest.mark.parametrize('n', [200, 5000])
@pytest.mark.parametrize('copies', [15, 60, 110])
def test_a_prompt_in_many_copies_is_one_group(n, copies):
    base = sentence(40)
    g = group_rows([f'{base} {sentence(2)}' for _ in range(copies)] + [sentence(30) for _ in range(n-copies)])
    assert len(set(g[:copies])) == 1
    assert len(set(g)) == n-copies+1

@pytest.mark.parametrize('a, b', [
    ('2+2', '2-2'), ('1.5', '15'), ('How many legs: 2 cats', 'How many legs: 3 cats'),
    ('what is the value of 12 + 5 today', 'what is the value of 12 - 5 today'),
    ('Tell me how many legs 2 cats have', 'Tell me how many legs 2 cats have and 3 dogs'),
    ('write a long loop for me in C++', 'write a long loop for me in C#')])
def test_other_problems_stay_apart(a, b): assert len(set(group_rows([a, b]))) == 2

@pytest.mark.parametrize('name, kw', [
    ('knights_knaves', dict(n_people=2)), ('syllogism', {}), ('leg_counting', {}), ('spell_backward', {}),
    ('propositional_logic', {}), ('acre', {}), ('aiw', {})])
def test_puzzles_of_a_generator_stay_apart(name, kw):
    import reasoning_gym
    texts = list(dict.fromkeys(o['question'] for o in reasoning_gym.create_dataset(name, size=1000, seed=1, **kw)))
    assert len(set(group_rows(texts))) >= .999*len(texts)

def test_copied():
    base = [sentence(20) for _ in range(50)]
    assert copied([one_word(t) for t in base], base[:25]).tolist() == [True]*25+[False]*25

# -- the second look -----------------------------------------------------------------------------------------------
def test_the_report_does_not_trust_the_groups(monkeypatch):
    base = [sentence(20) for _ in range(60)]
    ids = [str(k) for k in range(120)]
    rows = pd.DataFrame(dict(id=ids, group=ids, fold=[0]*60+[1]*60, label=0,
                             prompt=[[t] for t in base + [one_word(t) for t in base]],
                             response_a=[['a']]*120, response_b=[['b']]*120))
    def finds_nothing(texts): return np.arange(len(texts))
    monkeypatch.setattr('competition_kit.split.group_rows', finds_nothing)
    report = leak_report(rows)
    assert report['near_between_folds'] >= 118
    assert report['second_look_missed'] >= 118
    assert report['second_look_recall'] >= .95
    assert 'come out too good' in leak_text(report)
    assert set(leak_table(report)['key']) == set(report)

# -- the text that counts ------------------------------------------------------------------------------------------
def choice(problem, n, tag=''):
    questions = [f'{tag} question {k}?' for k in range(n)]
    return pd.DataFrame(dict(problem=[problem]*n, question=questions, options=[['yes', 'no']]*n))

def test_boilerplate_is_no_leak():
    many, few = choice('Answer the following.', 300), choice('Answer the following.', 3, 'test')
    assert len(set(group_text(many))) == 300
    assert len(set(group_text(many, few)[300:])) == 3  # decided over both tables
    assert len(set(group_text(choice(sentence(60), 40)))) == 1  # a passage and its questions
    same = pd.DataFrame(dict(problem='', question='Which is right?', options=[[f'a{k}', 'b'] for k in range(50)]))
    assert len(set(group_text(same))) == 50

# -- odd texts -----------------------------------------------------------------------------------------------------
def test_planted_copies_are_found():
    rng = np.random.default_rng(0)
    vocab = [f'{a}{b}' for a in WORDS for b in WORDS]
    texts = [' '.join(rng.choice(vocab, 60)) for _ in range(2000)]
    def edit(t):
        t = t.split()
        t[rng.integers(60)] = 'changed'
        return ' '.join(t).title() + ' !'
    g = group_rows(texts + [edit(t) for t in texts[:300]])
    assert (g[:300] == g[2000:]).mean() >= .99
    assert len(set(g)) <= 2003
    assert pd.Series(g).value_counts().max() <= 2  # and nothing else merged

def test_templates_are_not_merged():
    rng = np.random.default_rng(0)
    frame = ' '.join(rng.choice(WORDS, 80))
    texts = [f"{frame} {' '.join(rng.choice(WORDS, 3))} number {i} {frame}" for i in range(300)]
    assert len(set(group_rows(texts))) == 300
    long = [t + ' ' + ' '.join(f'w{rng.integers(10**6)}' for _ in range(40)) for t in texts]
    g = group_rows(long + [long[5].replace('number', 'nr')])
    assert g[5] == g[-1]
    assert len(set(g)) == 300
    popular = [' '.join(f'v{rng.integers(10**6)}' for _ in range(40)) for _ in range(3)]
    g = group_rows(texts + [popular[0]]*100 + popular)  # many equal copies are not a template
    assert len(set(g[300:401])) == 1
    assert len(set(g)) == 303

def test_chinese_and_short_texts():
    zh = ("从前有一个国王他有三个女儿大女儿喜欢唱歌二女儿喜欢跳舞小女儿喜欢读书"
          "有一天国王说谁能告诉我海有多深我就把王位传给谁")
    other = ("某公司有甲乙丙丁四个部门每个部门有若干员工"
             "已知甲部门的人数比乙部门多而丙部门的人数比丁部门少请问哪个部门人数最多")
    g = group_rows([zh, zh.replace('三个', '四个'), other, 'a', 'A ', 'b', '', ' '])
    assert g[0] == g[1] != g[2]
    assert g[3] == g[4] != g[5]
    assert g[6] == g[7]
    assert len(set(g)) == 5

@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(st.characters(), max_size=80), max_size=12).filter(len))
def test_any_text_is_grouped(texts):
    g = group_rows(texts)
    assert len(g) == len(texts)
    for a, x in zip(g, texts):
        for b, y in zip(g, texts):
            if S.normalize(x) == S.normalize(y): assert a == b

def test_giant_rows_and_lone_surrogates():
    g = group_rows(['word '*200_000, 'word '*200_001, 'w\ud800', 'w\udc00', ' '.join(f'x{i}' for i in range(200_000))])
    assert len(g) == 5
    assert g[0] != g[4]

# -- one word of a puzzle changed by hand --------------------------------------------------------------------------
def syllogisms(n):
    import reasoning_gym
    return list(dict.fromkeys(o['question'] for o in reasoning_gym.create_dataset('syllogism', size=n, seed=3)))

def test_a_strange_word_in_the_slot_of_a_puzzle_is_a_copy():
    texts, rng = syllogisms(1000), random.Random(1)
    def changed(t):
        w = t.split(' ')
        w[rng.choice([k for k, v in enumerate(w) if v.isalpha()])] = ''.join(rng.choices('bcdfghklmnp', k=7))
        return ' '.join(w)
    g = group_rows(texts + [changed(t) for t in texts[:200]])
    assert (g[:200] == g[len(texts):]).mean() >= .99
    assert len(set(g[:len(texts)])) == len(texts)

def test_a_text_that_is_only_the_form_joins_nothing():
    form = 'Spell this word backward (example: sun -> nus):'
    texts = [f'{form} {w}' for w in list(dict.fromkeys(vocab))[:500]]
    assert len(set(group_rows([*texts, form]))) == 501

def test_copies_of_puzzles_that_hold_the_same_words_are_found():
    statements = ['at least three statements are true', 'at most two statements are false',
                  'exactly one statement is true', 'either the first or the last is true',
                  'the number of true statements is prime', 'every even statement is false']
    rng = random.Random(2)
    texts = list(dict.fromkeys('. '.join(rng.sample(statements, 6)) for _ in range(400)))
    copies = [t.replace('prime', sentence(1)) for t in texts[:200]]
    g = group_rows(texts + copies)
    assert (g[:200] == g[len(texts):]).mean() >= .99
    assert len(set(g[:len(texts)])) == len(texts)

def test_short_prompts_with_other_animals_stay_apart():
    from competition_kit.sample import arena_rows
    texts = list(dict.fromkeys('\n'.join(r['prompt']) for r in arena_rows(1200, 0)))
    assert len(set(group_rows(texts))) == len(texts)

def test_a_strange_word_in_a_short_puzzle_is_a_copy():
    import reasoning_gym
    texts = list(dict.fromkeys(o['question'] for o in reasoning_gym.create_dataset('aiw', size=1000, seed=1)))
    rng, copies = random.Random(3), []
    for t in texts[:100]:
        w = t.split(' ')
        at = rng.choice([k for k, v in enumerate(w) if v.isalpha() and len(v) > 1])
        w[at] = ''.join(rng.choices('bcdfghklmnp', k=7))
        copies.append(' '.join(w))
    g = group_rows(texts+copies)
    assert (g[:100] == g[len(texts):]).mean() >= .99
    assert len(set(g[:len(texts)])) >= .995*len(texts)   # a copy changed where two puzzles differ joins both
