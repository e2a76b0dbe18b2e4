"Synthetic rows: answers checked by code or by agreement, near-copies left out, faults counted"
import pandas as pd
import pytest
from competition_kit.core import Refusal, models_path, read_json, read_table
from competition_kit.record import run_stage
from competition_kit.replies import Text, read_replies
from competition_kit.sample import logic_problems
from competition_kit.synthetic import SyntheticArgs, checked, shown_row, synthetic, zebra_names
from competition_kit.tables import load_rows, publish

def test_zebra_puzzles_are_solved_from_their_text():
    made = [p for people in (3, 4) for p in logic_problems(24, 5, people) if p['id'].startswith('zebra')]
    for p in made:
        q, = p['questions']
        assert checked(p)
        assert not checked(p | dict(questions=[q | dict(answer='BA'['AB'.find(q['answer'])])]))
        lines = p['problem'].rstrip().splitlines()
        fewer = '\n'.join(lines[:-1])
        house = int(q['question'].split()[-1][0])
        assert zebra_names(p['problem'], house) <= zebra_names(fewer, house)
    assert any(len(zebra_names('\n'.join(p['problem'].rstrip().splitlines()[:-3]), 1)) > 1 for p in made)

def test_by_code(samples):
    args = SyntheticArgs(problems=16, people=3)
    run = run_stage(synthetic, args)
    assert run.record['metrics']['rows'] == run.record['metrics']['rows: kept'] == run.record['rows']
    publish(run.folder, args.name)
    rows = load_rows('sample_logic_synthetic')
    assert set(rows.source) == {'code knights_knaves', 'code zebra_puzzles'}
    assert (rows.label >= 0).all() and (rows.fold == -1).all() and rows.group.str.len().eq(16).all()
    mix = load_rows('sample_logic + sample_logic_synthetic')
    assert mix.main.sum() == len(load_rows('sample_logic')) and (mix.fold[~mix.main] == -1).all()
    with pytest.raises(Refusal, match='no row is left.*near sample_logic'):
        run_stage(synthetic, SyntheticArgs(problems=80, seed=0, name='again'))

class Writer:
    "Texts of a person for the stage's own work: drafts in order, then answers by the name in the problem"
    name, version = 'planted', '1'
    def __init__(self, tok, drafts, answers): self.tok, self.drafts, self.answers = tok, drafts, answers
    def replies(self, requests):
        out = []
        for r in requests:
            text = self.tok.decode(r.ids)
            key = next((k for k in self.answers if f'{k} is ' in text), None)
            made = self.answers[key].pop() if key else self.drafts.pop()
            out.append(Text(made, 'stop', len(made)))
        return out

def as_draft(problem, options=('knight', 'knave')):
    return shown_row(pd.Series(dict(problem=problem, question='What is the first person?', options=list(options))))

def test_by_a_model(samples):
    known = load_rows('sample_logic').iloc[0]
    drafts = [as_draft('Zed is older than Yan, who always lies.'),
              as_draft('Quin is a person of the island. Quin lies.'),
              as_draft('Uma is here and Ole is not.', ['yes', 'Yes']), 'A riddle.', shown_row(known),
              as_draft('Zed is older than Yan, who never lies now.')]
    right, other = '<output>A</output>', '<output>B</output>'
    args = SyntheticArgs(by='model', problems=6, attempts=5, agree=.8, max_new_tokens=9)
    vars(args)['writer'] = Writer(args.prompt.prompt.tok, drafts, dict(
        Zed=[right]*4+['So it goes.']+[other]*5, Quin=[right]*3+[other]*2))
    run = run_stage(synthetic, args)
    m = run.record['metrics']
    assert m['draft: equal options'] == m['draft: no layout'] == m['rows: attempts disagree'] == 1
    assert m['rows'] + m['rows: attempts disagree'] + sum(n for k, n in m.items() if k.startswith('rows: near')) == 4
    publish(run.folder, args.name)
    rows = load_rows(args.name)
    assert set(rows.source) == {'model smollm2'} and rows.problem.str.startswith('Zed').all()
    assert (rows.label >= 0).all()
    assert 'near sample_logic' in read_json(run.folder/'reasons.json').values()
    assert len(read_replies(run.folder/'drafts')) == 6

def test_rows_name_the_run_that_wrote_them(runs, samples):
    args = SyntheticArgs(by='model', run=runs[0][:-1], problems=1, attempts=1, examples=1, max_new_tokens=9)
    vars(args)['writer'] = Writer(args.prompt.prompt.tok, [as_draft('Zed is older than Yan, who always lies.')],
                                  dict(Zed=['<output>A</output>']))
    assert set(read_table(run_stage(synthetic, args).folder/'rows.parquet').source) == {f'model {runs[0]}'}

def test_a_model_that_cannot_write_is_refused(samples, tiny):
    args = dict(by='model', problems=3, base=tiny, examples=1, max_new_tokens=4)
    with pytest.raises(Refusal, match="no problem is left: {'cut off': 3}"): run_stage(synthetic, SyntheticArgs(**args))
    folder, = models_path().glob('synthetic-*')
    assert len(read_replies(folder/'drafts')) == 3, 'its texts stay, to be read'
    with pytest.raises(Refusal, match='Take fewer examples'):
        run_stage(synthetic, SyntheticArgs(**args | dict(max_len=260, examples=9)))

def test_other_tables_are_refused(samples):
    with pytest.raises(Refusal, match='another task than choice: sample_arena'):
        run_stage(synthetic, SyntheticArgs(against='sample_arena'))

def test_tables_that_are_missing_or_would_be_replaced_are_refused(samples):
    for missing in ('nosuch', 'nosuch_test'):
        with pytest.raises(Refusal, match='no table called nosuch'): SyntheticArgs(against=missing).inputs()
    assert list(SyntheticArgs(against='sample_logic_test').tables) == ['sample_logic', 'sample_logic_test']
    with pytest.raises(Refusal, match='would be replaced'): SyntheticArgs(against='extra', name='extra')
    with pytest.raises(Refusal, match='synthetic would replace it'): SyntheticArgs(name='sample_logic_test')
