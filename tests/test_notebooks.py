"What keeps notebooks runnable headless, and the package equal to them"
import ast, configparser, importlib, json, re, subprocess, symtable, sys, tomllib
from pathlib import Path
import pytest

root = Path(__file__).resolve().parents[1]
notebooks = sorted((root/'nbs').rglob('*.ipynb'))
stages = {'02_split': 'split', '04_train': 'train', '05_generate': 'generate', '05a_pairs': 'pairs',
          '05b_synthetic': 'synthetic', '06_pseudo': 'pseudo', '07_distill': 'distill', '08_merge': 'merge',
          '09_gptq': 'gptq', '10_vote': 'vote', '11_recipe': 'recipe'}

def cells(nb): return json.loads(nb.read_text(encoding='utf-8'))['cells']
def text(c): return ''.join(c['source'])
def tags(c): return c['metadata'].get('tags', [])

@pytest.mark.parametrize('nb', notebooks, ids=lambda p: p.stem)
def test_guards(nb):
    code = [c for c in cells(nb) if c['cell_type'] == 'code']
    params = [c for c in code if 'parameters' in tags(c)]
    assert len(params) == (nb.stem in stages), 'one cell tagged parameters in a stage notebook, none elsewhere'
    assert not any('#| export' in text(c) for c in params), 'the parameters cell must not be exported'
    for c in code:
        assert 'injected-parameters' not in tags(c), 'a papermill output was saved over the notebook'
        if 'nbdev_export(' in text(c): assert 'skip-execution' in tags(c), 'papermill would run nbdev_export()'
        for o in c.get('outputs', []): assert o.get('output_type') != 'error', 'an error was saved'
    body = nb.read_text(encoding='utf-8')
    for part in ('/root/', '/home/', '/tmp/', '/work/', 'site-packages'): assert part not in body, 'a machine\'s path'
    assert not any('<<<<<<<' in text(c) for c in cells(nb)), 'a merge conflict'

def test_one_notebook_a_module():
    made = [text(c).split()[2] for nb in notebooks for c in cells(nb) if text(c).startswith('#| default_exp')]
    assert len(made) == len(set(made))

def exported(nb): # sources of its exported cells
    return [text(c) for c in cells(nb) if c['cell_type'] == 'code' and text(c).startswith('#| export')]

def kit_imports(nb): # the `from competition_kit.… import …` of its exported cells
    nodes = [node for c in exported(nb) for node in ast.walk(ast.parse(c)) if isinstance(node, ast.ImportFrom)]
    return [n for n in nodes if (n.module or '').startswith('competition_kit.')]

def imported(nb): return {n.module.split('.')[1] for n in kit_imports(nb)} # modules of the kit

def test_no_module_imports_a_private_name_of_another():
    names = [(nb.stem, a.name) for nb in notebooks for n in kit_imports(nb) for a in n.names]
    assert len(names) > 100
    assert not [n for n in names if n[1].startswith('_')]

def test_exported_cells_are_short():
    lines = {(nb.stem, c.splitlines()[1][:60]): len(c.splitlines())-1 for nb in notebooks for c in exported(nb)}
    assert max(lines.values()) <= 60, sorted(lines, key=lines.get)[-5:]

def test_imports_only_downward():
    "the library imports lower library notebooks; a stage imports the library and lower stages"
    books = [nb for nb in notebooks if nb.stem not in ('index', '01_tour')]
    place = {text(cells(nb)[0]).split()[2]: (nb.parent.name != 'lib', nb.stem) for nb in books}
    for nb in books:
        own = nb.parent.name != 'lib', nb.stem
        for module in imported(nb): assert place[module] < own, f'{nb.stem} imports {module}'

def test_stages_and_library_are_apart():
    assert {nb.stem for nb in (root/'nbs').glob('[0-9]*.ipynb')}-{'01_tour'} == set(stages)

@pytest.mark.parametrize('stem', stages)
def test_every_parameter_reaches_the_arguments(stem):
    "a parameter that no cell after it reads would be accepted and ignored"
    code = [c for c in cells(root/f'nbs/{stem}.ipynb') if c['cell_type'] == 'code']
    k = next(i for i, c in enumerate(code) if 'parameters' in tags(c))
    assert any(f'from_notebook({stages[stem].capitalize()}Args, globals())' in text(c) for c in code[k+1:])

@pytest.mark.parametrize('stem', stages)
def test_headless_needs_no_example(stem):
    "`ck run` leaves the examples out: what remains must not use a name of theirs"
    from competition_kit.run import example_cells
    nb = json.loads((root/f'nbs/{stem}.ipynb').read_text(encoding='utf-8'))
    skipped = example_cells(nb)
    assert skipped
    rest = '\n'.join(text(c) for i, c in enumerate(nb['cells']) if c['cell_type'] == 'code' and i not in skipped)
    ruff = [sys.executable, '-m', 'ruff', 'check', '--isolated', '--select', 'F821', '-']
    p = subprocess.run(ruff, input=rest, capture_output=True, text=True)
    assert p.returncode == 0, p.stdout

@pytest.mark.parametrize('stem', stages)
def test_no_example_changes_a_parameter(stem):
    "with Run All the examples run between the parameters and the driver"
    from competition_kit.run import example_cells
    nb = json.loads((root/f'nbs/{stem}.ipynb').read_text(encoding='utf-8'))
    examples = [text(nb['cells'][i]) for i in sorted(example_cells(nb))]
    code = '\n'.join(s for s in examples if 'IN_TEST' not in s)
    for module in re.findall(r'from (\S+) import \*', code): # spell out what a star brings
        code = code.replace(f'from {module} import *', f"import {', '.join(importlib.import_module(module).__all__)}")
    symbols = symtable.symtable(code, stem, 'exec').get_symbols()
    bound = {s.get_name() for s in symbols if s.is_assigned() or s.is_imported()}
    params = documented(next(text(c) for c in nb['cells'] if 'parameters' in tags(c)).splitlines())
    assert not bound & set(params)

@pytest.mark.parametrize('stem', stages)
def test_parameters_stand_on_the_first_screen(stem):
    above = cells(root/f'nbs/{stem}.ipynb')
    above = above[:next(i for i, c in enumerate(above) if 'parameters' in tags(c))]
    assert sum(len(text(c).splitlines()) for c in above) <= 30

def documented(lines): # name → (type, default, comment) of lines such as `fold: int = 0  # Fold that is held out`
    found = [re.match(r'\s*(\w+)\s*:\s*(\w+)\s*=\s*(.*?)\s*#\s*(.*)$', l) for l in lines]
    return {m[1]: (m[2], ast.literal_eval(m[3]), m[4]) for m in found if m}

@pytest.mark.parametrize('stem', stages)
def test_the_parameters_cell_mirrors_the_arguments(stem):
    "names, types, defaults and comments"
    cell = next(text(c) for c in cells(root/f'nbs/{stem}.ipynb') if 'parameters' in tags(c))
    fields = arguments(f'{stages[stem].capitalize()}Args')
    assert fields
    assert documented(cell.splitlines()) == fields

def arguments(kind): # the documented fields of a stage's dataclass, those of its parent first
    code = [text(c) for nb in stages for c in cells(root/f'nbs/{nb}.ipynb') if c['cell_type'] == 'code']
    source = next(s for s in code if f'class {kind}' in s)
    parent, body = re.search(rf'class {kind}(?:\((\w+)\))?:(.*)', source, re.S).groups()
    return (arguments(parent) if parent else {}) | documented(body.split('\n    def ')[0].splitlines())

def test_settings_for_both_nbdevs():
    ini = configparser.ConfigParser()
    ini.read(root/'settings.ini', encoding='utf-8')
    ini, toml = ini['DEFAULT'], tomllib.loads((root/'pyproject.toml').read_text(encoding='utf-8'))['tool']['nbdev']
    for k, v in toml.items(): assert str(v).lower() == ini[k].lower(), k
    assert 'tags' in ini['allowed_cell_metadata_keys']

def test_every_torch_bound_excludes_the_next_build():
    ini = configparser.ConfigParser()
    ini.read(root/'settings.ini', encoding='utf-8')
    bounds = [l.strip() for l in ini['DEFAULT']['requirements'].splitlines() if l.strip().startswith('torch')]
    assert bounds == ['torch>=2.11,<2.14']

def test_the_stored_run_beats_its_baselines():
    shown = [''.join(o.get('text', [])) for c in cells(root/'nbs/04_train.ipynb') for o in c.get('outputs', [])]
    table = next(t for t in shown if 'held-out rows' in t and 'this run' in t).splitlines()
    assert table[2].startswith('this run'), 'best first: a baseline is better than the stored run'

def test_the_tour_takes_the_vote_of_make_run(runs):
    "other votes may be newer: of one member, of two seeds, or of folds of an older table"
    from competition_kit.record import records, run_stage
    from competition_kit.tables import load_rows, table_hashes, table_path, write_rows
    from competition_kit.vote import VoteArgs, vote
    cell, = [text(c) for c in cells(root/'nbs/01_tour.ipynb') if 'def newest_vote' in text(c)]
    function = next(n for n in ast.parse(cell).body if getattr(n, 'name', '') == 'newest_vote')
    names = dict(records=records, table_hashes=table_hashes)
    exec(ast.unparse(function), names)
    assert names['newest_vote']() is None
    made = [run_stage(vote, VoteArgs(runs=' '.join(runs[k] for k in ks))).id for ks in ([0, 1], [4], [0, 2])]
    assert names['newest_vote']()['run_id'] == made[0]
    write_rows(load_rows().assign(fold=0), table_path('sample_arena'))
    assert names['newest_vote']() is None
