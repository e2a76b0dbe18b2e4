"Text answers: prompts in two languages, planted replies, faults of rationales, votes"
import time
import numpy as np
import pandas as pd
import pytest
from competition_kit.base import load_tokenizer
from competition_kit.combine import majority
from competition_kit.core import Refusal
from competition_kit.text import (TextPrompt, join_votes, parse_replies, parse_reply, rationale_fault, repeats,
                                  row_languages, text_probs, text_votes)

NAMES = ['Anna', 'Ben', 'Cleo', 'Dora']
PARSED = [ # reply, position, options
    ('<output>B</output>', 1, NAMES), ('<OUTPUT> b </OUTPUT>', 1, NAMES), ('<output>B', 1, NAMES),
    ('<output>\n(C)\n</output>', 2, NAMES), ('<output>Ｂ</output>', 1, NAMES), ('＜output＞Ｂ＜/output＞', 1, NAMES),
    ('<output>（Ａ）</output>', 0, NAMES), ('<output>A。</output>', 0, NAMES), ('<output>Ⓓ</output>', 3, NAMES),
    ('<output>**C**</output>', 2, NAMES), ('<output>C. Cleo</output>', 2, NAMES), ('<output>cleo</output>', 2, NAMES),
    ('<output>The answer is D.</output>', 3, NAMES), ('<output>选项C</output>', 2, NAMES),
    ('<output>A knave</output>', 1, ['Knight', 'Knave']), ('<output>1</output>', 1, ['0', '1', '2']),
    ('<output>张三是骗子</output>', 1, ['骑士', '骗子']), 
    ('<output>not true</output>', 1, ['true', 'not true']),
    ('<answer>D</answer>', 3, NAMES), (r'So \boxed{\text{B}}.', 1, NAMES),
    ('<think>The answer is A?</think>\n\nThe answer is **C**.', 2, NAMES), ('答案是B', 1, NAMES), 
    ('因此应选 C。', 2, NAMES), ('正确答案为（D）。', 3, NAMES), 
    ('Perhaps the answer is A.\nNo. The answer is B.', 1, NAMES),
    ('Hence the correct option is (D).', 3, NAMES), ('B is correct.', 1, NAMES), ('The answer is Ben.', 1, NAMES),
    ('The answer is A because she lies.', 0, NAMES), ('B', 1, NAMES), ('c', 2, NAMES), ('（Ｂ）', 1, NAMES),
    ('B. Ben', 1, NAMES), ('Some thoughts.\nDora', 3, NAMES), ('综上，故选：B。', 1, NAMES),
    ('因此应选择选项 B', 1, NAMES), ('综上所述，选项B是正确的。', 1, NAMES), ('因此选项 B 正确', 1, NAMES),
    ('B选项符合题意', 1, NAMES), ('【答案】B', 1, NAMES), ('正确的选择是 B', 1, NAMES), ('答案: \\(B\\)', 1, NAMES),
    ('A选项错误，B选项正确。', 1, NAMES), ('所以答案不是A，而应选B。', 1, NAMES),
    ('如果选A，就会矛盾，所以答案是C。', 2, NAMES),
    ('If the answer is A, Ben lies, so the answer is C.', 2, NAMES),
    ('逐项检查：选A不对，因为她最大；选B对。', 1, NAMES),
    ('**Final Answer:** B', 1, NAMES), ('**答案**：**B**', 1, NAMES), ('**Answer: Ben**', 1, NAMES),
    ('The answer is indeed B.', 1, NAMES), ('"B" is the correct answer.', 1, NAMES),
    ('H', 0, ['H', 'J', 'K']), ('So it follows.\n（J）', 1, ['H', 'J', 'K']), ('The answer is K.', 2, ['H', 'J', 'K']),
    ('<output>H</output>', 0, ['H', 'J', 'K']), ('<output>B</output>', 1, ['H', 'J', 'K']),
    ('O、R', 1, ['J、S', 'O、R', 'O、R、S']), (f'B. {["Cry"]*8}', 1, [str(['Sing']*8), str(['Cry']*8)]),
    ('<output>B, not A</output>', 1, NAMES), ('<output>B. Ben is older than A</output>', 1, NAMES),
    ('<output>Anna是骑士，选C</output>', 2, NAMES), ('<output>A. B</output>', 0, ['B', 'C', 'D']),
    ('The answer is C++.', 0, ['C++', 'Java', 'Python']), ('<output>So C#</output>', 1, ['Java', 'C#', 'C']),
    ('答案是药物B。', 0, ['药物B', '药物A']), ('<output>所以是药物B</output>', 0, ['药物B', '药物A']),
    ('A. B是正确的', 0, ['B是正确的', 'A是正确的']), ('The answer is A, C.', 1, ['B, C', 'A, C']),
    ('A is right of B.\nC', 2, NAMES), ('A is correct that B lies.\nC', 2, NAMES),
    ('So the right option is B, and B is the right choice.', 1, NAMES), ('C is right because she lies.', 2, NAMES),
    ('The answer is A. Wait, check.</think>\n\nB', 1, NAMES),
    ('<output>A</output> No.</think><output>B</output>', 1, NAMES),
    ('<think>Is it <output>A</output>? No.</think>\n\nThe answer is B.', 1, NAMES),
    ('<thinking>So it follows. <output>B</output></thinking>', 1, NAMES),
    ('<output>b</output>', 2, ['a', '1', 'b']), ('b', 2, ['a', '1', 'b']), ('<output>B</output>', 1, ['a', '1', 'b']),
    ('<output>[b]</output>', 0, ['[b]', '[l, b]']), ('<output>[]</output>', 1, ['[1]', '[]']),
    ('B. []', 1, ['[1]', '[]'])]

@pytest.mark.parametrize('text, option, options', PARSED)
def test_parsed(text, option, options): assert parse_reply(text, options).option == option

UNPARSED = [('', 'no answer'), ('<output></output>', 'no answer'), ('<output>A or B</output>', 'two answers'),
            ('<output>A</output><output>B</output>', 'two answers'), ('B. Anna', 'two answers'),
            ('The answer is A or B', 'two answers'),
            ('答案是A或B', 'two answers'), ('The answer is A or the answer is B.', 'two answers'),
            ('<output>E</output>', 'outside the options'), ('<output>Z</output>', 'outside the options'),
            ('The answer is G.', 'outside the options'),
            ('Ｅ', 'outside the options'), ("I'm sorry, I can’t help with that.", 'refusal'),
            ('抱歉，我无法回答。', 'refusal'),
            ('<output>I cannot answer this.</output>', 'refusal'), ('A '*50, 'repetition'),
            ('The answer is A. '*20, 'repetition'), ('答案是A。'*20, 'repetition'),
            ('<thinking>The answer is B.', 'cut off'),
            ('A knight always tells the truth.', 'no answer'), ('The answer is a knight.', 'no answer'),
            ('The answer is not B.', 'no answer'), ('Option A is wrong.', 'no answer'), ('选项A错误', 'no answer'),
            ('不选A', 'no answer'), ('答案不是A', 'no answer'), ('A. Anna\nB. Ben\nC. Cleo\nD. Dora', 'two answers'),
            ('<output>not Ben</output>', 'no answer'), ('Anna is the youngest of them.', 'no answer'),
            ('抱歉，作为人工智能，我不能回答。', 'refusal'), ('所以李四是骑士。'*9, 'repetition'),
            ('So Ben is a knight. Then Anna lies. '*9, 'repetition'), ('<output>Ｅ</output>', 'outside the options'),
            ('<output>A</output>\nThe answer is B. <output>Ｂ</output>', 'two answers'),
            ('<output>A, B</output>', 'two answers'), ('<output>A。B</output>', 'two answers'),
            (r'\boxed{A, C}', 'two answers'), ('<output>(A)(B)</output>', 'two answers'),
            ('<output>A, B and C</output>', 'two answers'), ('<output>选项A、选项B</output>', 'two answers'),
            ('<output>A. Anna\nB. Ben</output>', 'two answers'), ('<output>A. Anna or Ben</output>', 'two answers'),
            ('<output>A, E</output>', 'two answers'), ('<output>A+B</output>', 'two answers'),
            *((f'<output>{t}</output>', 'no answer')
              for t in ('Not A', '不是A', '不选A和B', '除了A', 'A is wrong', 'A不对', 'It cannot be A')),
            ('A is right of B.\nSo it must be Cleo', 'no answer'), ('So DNA is the answer.', 'no answer'),
            ('所以DNA正确。', 'no answer'), ('Maybe the answer is A.</think>', 'no answer')]

@pytest.mark.parametrize('text, how', UNPARSED)
def test_unparsed(text, how): assert parse_reply(text, NAMES) == (-1, how)

def test_letters_are_those_of_the_row():
    assert parse_reply('Option H', ['H', 'J', 'K']) == parse_reply('I', ['H', 'J', 'K']) == (-1, 'outside the options')
    assert parse_reply('H', ['H', 'h', 'K']) == (-1, 'two answers')
    assert parse_reply('Vitamin C is the answer.', ['Vitamin A', 'Vitamin C', 'Iron']) == (-1, 'no answer')
    assert parse_reply('答案是药物A，因为B无效。', ['药物B', '药物A']) == (-1, 'no answer')
    assert parse_reply('<output>不是A</output>', ['是', '不是']) == (-1, 'no answer')
    assert parse_reply('B', ['H', 'B', 'A']).option == 1 and parse_reply('A', ['H', 'B', 'A']).option == 0
    assert parse_reply('<output>C</output>', NAMES[:2]) == (-1, 'outside the options')

REASON = '<thinking>Ben is older than Cleo, and Anna is older than Ben.</thinking>'
FAULTS = [(REASON+'<output>C</output>', '', 'stop'),
          ('<thinking>选A不对，因为Anna最大。如果答案是B，那么矛盾。给定的选项有四个。</thinking><output>C</output>',
           '', 'stop'),
          ('<thinking>The given option set has four names, and Ben is older than Cleo.</thinking><output>C</output>',
           '', 'stop'), (REASON+'<output>C</output>', 'cut off', 'length'),
          (REASON+'<output>C', 'cut off', 'stop'), (REASON+'<output>B</output>', 'wrong', 'stop'),
          (REASON+'<reflection>So the answer is B.</reflection><output>C</output>', 'contradicts its answer', 'stop'),
          (REASON+'<reflection>Is the answer B?\nNo, the answer is C.</reflection><output>C</output>', '', 'stop'),
          (REASON+'The given answer is C.<output>C</output>', 'leaks the instruction', 'stop'),
          ('Ben is older than Cleo, and Anna is older than Ben. The correct answer is C.', '', 'stop'),
          ('Ben is older than Cleo, and Anna is older than Ben.\nThe answer is A.\nThe correct answer is C.',
           'contradicts its answer', 'stop'),
          ('A. Anna\nB. Ben\nC. Cleo\n\nSo the answer is C. Cleo.', 'no reasoning', 'stop'),
          ('Ben is older than Cleo, Anna older than Ben.\nIs the answer A?\nNo, so the answer is C.', '', 'stop'),
          ('The correct answer is C. Ben is older than Cleo, and Anna is older.', 'leaks the instruction', 'stop'),
          ('Ben is older than Cleo and Anna is older than he. Since the correct answer is C, Cleo fits.',
           'leaks the instruction', 'stop'),
          ('<thinking>题目给出的答案是C，所以Cleo最小，其他人都比她大。</thinking><output>C</output>',
           'leaks the instruction', 'stop'),
          ('A. Anna\nThe others are younger than she is, so it follows. The answer is C.', 'contradicts its answer',
           'stop'),
          ('A. Anna\nB. Ben\nThe others are older than she is, so it follows. The answer is C.', '', 'stop'),
          (REASON*9+'<output>C</output>', 'repeats itself', 'length'), ('<output>C</output>', 'no reasoning', 'stop'),
          ('A. Ann.\n\nThe answer is: C. Cleo.', 'no reasoning', 'stop'),
          ('Is it A? The answer is A.\nNo, Anna is older than Ben, so the answer is C.\n</think>\nC', '', 'stop'),
          ('Anna is older than Ben, and he is older than Cleo. So the answer is B.</think><output>C</output>',
           'contradicts its answer', 'stop'),
          ('Anna is older than Ben, and he is older than Cleo.</thinking><output>C</output>', 'cut off', 'stop'),
          (REASON, 'no answer', 'stop'), (REASON+'<output>F</output>', 'outside the options', 'stop')]

@pytest.mark.parametrize('text, fault, finish', FAULTS)
def test_faults(text, fault, finish): assert rationale_fault(text, NAMES, 2, finish) == fault

@pytest.mark.parametrize('text', [
    'A'+' '*1500, 'answer'+'*'*1500, 'The answer is'+' '*1500+'x', '<output>A'+'\n'*1500, '<output>'+'A '*6000,
    '答案'+'* '*750, 'answer **'+'_'*1500+'('*1500])
def test_a_long_run_of_marks_is_read_at_once(text):
    began = time.process_time()
    parse_reply(text, NAMES)
    assert time.process_time()-began < .5

def test_lists_are_no_loops():
    people = 'Abigail Ben Cleo Dora Emil Fay Gus Hanna Ida Jon'.split()
    assert not repeats('\n'.join(f'{k}. If {p} is a knight, then {q} is a knave.'
                                 for k, (p, q) in enumerate(zip(people, people[1:]))))
    assert not any(map(repeats, ('|---|---|---|---|', '-'*12, '='*12, 'A '+'.'*40+' 3', '| a | b |\n|:---|---:|\n'*2)))
    assert repeats('所以Ben是骑士。'*4)
    assert repeats('Fine. '+'If Ben lies, Anna lies. '*4) and not repeats('If Ben lies, Anna lies. '*2)

@pytest.fixture(scope='module')
def rows():
    zh = dict(id='z', problem='骑士永远说真话，骗子永远说假话。李四说：“我是骑士”。',
              question='李四是骑士还是骗子？', options=['骑士', '骗子'])
    en = dict(id='e', problem='Anna is older than Ben.', question='Who is younger?', options=NAMES)
    return pd.DataFrame([zh, en, dict(en, id='f')])

def test_prompts(rows):
    prompt = TextPrompt(load_tokenizer())
    enc, given = prompt.encode(rows), prompt.encode(rows, ['B', 'B', ''])
    assert list(enc.id) == ['z', 'e', 'f'] and list(enc.language) == ['zh', 'en', 'en']
    assert list(enc.options) == [2, 4, 4]
    assert enc.prompt[1] == enc.prompt[2] == given.prompt[2]
    assert (given.prompt != enc.prompt).tolist() == [True, True, False]
    text = prompt.prompt.tok.decode(enc.ids[0])
    assert '逐步推理' in text and 'B. 骗子' in text and text.endswith('<|im_start|>assistant\n')

def test_long_rows_keep_their_end(rows):
    prompt = TextPrompt(load_tokenizer(), max_len=512)
    enc = prompt.encode(rows[:2].assign(problem='word '*2000))
    assert (enc.n <= 512).all() and (enc.cut > 0).all()
    assert all(prompt.prompt.tok.decode(ids).endswith('assistant\n') for ids in enc.ids)

def test_real_rows_are_read_in_their_language(samples):
    from competition_kit.tables import load_rows
    rows = load_rows('sample_logic')
    chinese = ['岛上' in p for p in rows.problem]
    assert [lang == 'zh' for lang in row_languages(rows)] == chinese and 0 < sum(chinese) < len(rows)

def test_votes(rows):
    texts = pd.DataFrame(dict(id=list('zzzeee'), text=['<output>B</output>']*2+['?']+['C', 'D', '<output>C</output>']))
    parsed = parse_replies(texts, rows).assign(id=texts.id)
    votes, unparsed = text_votes(parsed, rows)
    assert votes[:, :4].tolist() == [[0, 2, 0, 0], [0, 0, 2, 1], [0]*4] and unparsed.tolist() == [1, 0, 0]
    p, tie = text_probs(votes, [2, 4, 4])
    assert np.allclose(p[2, :4], .25) and p[2, 4:].sum() == 0 and tie.tolist() == [False, False, True]
    with pytest.raises(Refusal, match='does not have'): parse_replies(texts, rows[:1])
    with pytest.raises(Refusal, match='does not have'): text_votes(pd.DataFrame(dict(id=['z'], option=[3])), rows)

def test_ties_go_as_in_the_majority_of_the_kit():
    letters = np.array([[.1, .6, .3, 0, 0, 0, 0]], np.float32)
    hard = np.eye(7, dtype=np.float32)[[1, 2]][:, None]
    p, tie = text_probs([[0, 1, 1, 0, 0, 0, 0]], [3], letters)
    assert tie.all() and np.allclose(p, [[0, 2/3, 1/3, 0, 0, 0, 0]], atol=1e-6)
    assert majority(hard)[1].all()

def test_rows_without_a_parsed_text_keep_the_letters(rows):
    letters = np.array([[[.4, .6, 0, 0, 0, 0, 0]], [[.2, .8, 0, 0, 0, 0, 0]]], np.float32)
    p = join_votes([[0]*7], [2], letters, [1, 3], text_weight=5)
    assert np.allclose(p, [[.25, .75, 0, 0, 0, 0, 0]], atol=1e-6)
    assert join_votes([[4, 0, 0, 0, 0, 0, 0]], [2], letters, text_weight=5).argmax() == 0

# ---- rationales by code, for the gains table of bench/
ORDER = dict(id='o', label=2, question='Which of the following is true?',
             problem='The following paragraph describes a set of three objects arranged in a fixed order.\n\n'
             'On a branch, there are three birds: an owl, a crow, and a raven. The owl is to the right of the crow. '
             'The raven is the second from the left.',
             options=[f'The {b} is the rightmost.' for b in ('crow', 'raven', 'owl')])
THEORY = dict(id='t', label=1, question='Is the following statement true or false? The cat does not see the dog.',
              options=['True', 'False'], problem='Closed-world assumption: whatever cannot be derived is false.\n\nThe '
              'cat is young. The cat likes the dog. If someone likes the dog and they are young then they see the dog.')

def test_rationales_by_code(samples):
    "they pass the checks of the kit; a label that the code contradicts ends the script"
    import sys
    from pathlib import Path
    from competition_kit.tables import load_rows
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]/'bench'))
    from code_rationales import code_rationale
    rows = pd.concat([load_rows('sample_logic'), pd.DataFrame([ORDER, THEORY])], ignore_index=True)
    texts = [code_rationale(r) for r in rows.itertuples()]
    faults = [rationale_fault(t, o, k) for t, o, k in zip(texts, rows.options, rows.label) if t]
    assert set(faults) == {''} and len(faults) > .9*len(rows)
    assert 'crow 1.' in texts[-2] and 'so cat sees dog.' in texts[-1]
    closed = dict(THEORY, label=0, problem=THEORY['problem'].replace(' The cat likes the dog.', ''))
    text = code_rationale(next(pd.DataFrame([closed]).itertuples()))
    assert 'cat likes dog: not said, no rule.' in text and text.endswith('<output>A</output>')
    for row in (ORDER, THEORY):
        with pytest.raises(SystemExit, match='the label is 0'):
            code_rationale(next(pd.DataFrame([dict(row, label=0)]).itertuples()))
