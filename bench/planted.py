"""Are planted replies to real problems parsed right, and do wrong labels reach the correction file?

usage: python bench/planted.py FILE... [--rows N]
`FILE` is in Tianchi's layout. For every row and every option, replies in 14 forms go through `judge_replies`. Then ten
attempts at each row name another option than the label: every row must become a correction, which `correct` applies.
One JSON line a file; `wrong` must be 0."""
import argparse
from pathlib import Path
import pandas as pd
from common import report
from competition_kit.base import load_tokenizer
from competition_kit.core import sandbox
from competition_kit.generate import doubtful_labels, judge_replies
from competition_kit.rows import correct
from competition_kit.tables import split
from competition_kit.text import TextPrompt, row_languages

FORMS = ['<thinking>{t}</thinking><output>{a}</output>', '<output>{w}</output>', '<output>\n（{w}）\n</output>',
         '<output>{a}. {o}</output>', '<output>{o}</output>', '<output>选项{a}</output>', '<answer>{a}</answer>',
         '\\boxed{{{a}}}', 'So it follows.\nThe answer is ({a}).', '综上所述，答案是：{w}。', '因此应选{a}。', '{a}',
         '{a}. {o}', '<think>{t}</think>\n\n**{a}**']
THOUGHT = 'Anna is older than Ben, so Ben is younger.'

def planted(rows): # every option of every row in every form; not `D` as the text of B, which is the letter of D
    out = [dict(id=i, meant=k, form=f, finish='stop', text=form.format(t=THOUGHT, a=c, w=chr(ord(c)+0xfee0), o=o))
           for i, options in zip(rows.id, rows.options) for k, (c, o) in enumerate(zip('ABCDEFG', options))
           for f, form in enumerate(FORMS) if form != FORMS[4] or o not in {*'ABCDEFG'[:len(options)]}-{c}]
    return pd.DataFrame(out)

def against(rows, n=10): # attempts that name the option after the label
    other = [(k+1) % len(o) for k, o in zip(rows.label, rows.options)]
    texts = [f"<thinking>{THOUGHT}</thinking><output>{'ABCDEFG'[k]}</output>" for k in other]
    some = pd.DataFrame(dict(id=rows.id, text=texts, finish='stop'))
    return pd.concat([some]*n, ignore_index=True), other

def measure(file, a):
    rows = split(Path(file).absolute())[0]
    if a.rows: rows = rows.sample(min(a.rows, len(rows)), random_state=0).reset_index(drop=True)
    enc = TextPrompt(load_tokenizer(), 2048).encode(rows)
    asked = planted(rows)
    judged = judge_replies(asked, rows)
    attempts, other = against(rows)
    fixes = doubtful_labels(judge_replies(attempts, rows), rows)
    fixed = correct(rows, fixes.to_dict('records'), 'choice')
    wrong = judged[(judged.option >= 0) & (judged.option != judged.meant)]
    report(file=Path(file).name, rows=len(rows), chinese=row_languages(rows).count('zh'),
           prompt_tokens=int(enc.n.max()), prompts_cut=int((enc.cut > 0).sum()),
           replies=len(judged), right=int((judged.option == judged.meant).sum()),
           unparsed=judged.how[judged.option < 0].value_counts().to_dict(), wrong=len(wrong),
           examples=wrong.text.head(3).tolist(), corrections=len(fixes), applied=int((fixed.label == other).sum()))

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('files', nargs='+')
    p.add_argument('--rows', type=int, default=0, help='draw so many rows; 0: all')
    a = p.parse_args()
    sandbox()
    for file in a.files: measure(file, a)
