"Raw files to rows: every refusal, every odd but normal input, groups, folds, mixes, corrections, the stage"

import gzip, json, os, subprocess, sys, time, zipfile
from pathlib import Path

import numpy as np, pandas as pd, pyarrow as pa, pyarrow.parquet as pq, pytest
from hypothesis import given, settings, strategies as st

from competition_kit.core import Refusal, data_path, models_path, read_table, sha256
from competition_kit import rows as R, split as S
from competition_kit.folds import check_fold, make_folds
from competition_kit.groups import group_rows, group_text
from competition_kit.rows import correct, n_options, read_meta, read_raw, swap_label, swap_probs, tasks
from competition_kit.split import leak_report, leak_text
from competition_kit import tables
from competition_kit.tables import load_rows, parse_mix, publish, raw_files, split, table_hashes, write_rows


# -- files in each layout ------------------------------------------------------------------------------------------
hot = 'id model_a model_b prompt response_a response_b winner_model_a winner_model_b winner_tie'.split()
WORDS = '''apple river stone cloud seven green dance light winter copper bottle window garden silver planet rocket
simple yellow market basket'''.split()


def words(i, n=30):
    return ' '.join(np.random.default_rng(i).choice(WORDS, n))


def lmsys(n=40):
    return [
        dict(
            id=f'{i:03}',
            model_a='m',
            model_b='n',
            prompt=json.dumps([words(i)]),
            response_a=json.dumps([f'a{i}']),
            response_b=json.dumps([f'b{i}']),
            **{c: int(i % 3 == k) for k, c in enumerate(hot[6:])},
        )
        for i in range(n)
    ]


def wsdm(n=40):
    return [
        dict(
            id=f'w{i}',
            prompt=words(i),
            response_a=f'a{i}',
            response_b=f'b{i}',
            winner='model_a' if i % 2 else 'model_b',
            model_a=None,
            model_b='n',
            language='English',
        )
        for i in range(n)
    ]


def tianchi(n=20):
    return [
        dict(
            problem=words(i),
            id=f'p{i:02}',
            questions=[
                dict(question=f'q{k}', options=[f'o{j}' for j in range(2 + (i + k) % 6)], answer='AB'[(i + k) % 2])
                for k in range(1 + i % 3)
            ],
        )
        for i in range(n)
    ]


def csv_text(rows):
    return pd.DataFrame(rows).to_csv(index=False)


def jsonl_text(rows):
    return ''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in rows)


def put(path, rows):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == '.parquet':
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text(csv_text(rows) if path.suffix == '.csv' else jsonl_text(rows), encoding='utf-8')
    return path


def without(rows, *cols):
    return [{k: v for k, v in r.items() if k not in cols} for r in rows]


def changed(rows, i, **kw):
    return [dict(r, **kw) if j == i else r for j, r in enumerate(rows)]


def tree(root):
    return sorted((str(p.relative_to(root)), p.read_bytes()) for p in Path(root).rglob('*') if p.is_file())


# -- layouts -------------------------------------------------------------------------------------------------------
def test_lmsys(root):
    put(data_path('l/train.csv'), lmsys())
    put(data_path('l/test.csv'), [dict(r, id='t' + r['id']) for r in without(lmsys(7), 'model_a', 'model_b', *hot[6:])])
    rows, test = split('l', folds=4)
    assert rows.attrs['meta']['task'] == 'preference'
    assert rows.attrs['meta']['read']['train']['layout'] == 'lmsys'
    assert list(rows.id) == [f'{i:03}' for i in range(40)]
    assert list(rows.label) == [i % 3 for i in range(40)]
    assert rows.prompt[3] == [words(3)]
    assert rows.response_b[3] == ['b3']
    assert set(rows.fold) == {0, 1, 2, 3}
    assert set(test.label) == set(test.fold) == {-1}
    assert test.attrs['meta']['part'] == 'test'
    assert test.attrs['meta']['task'] == 'preference'
    assert test.group[0] == rows.group[0]  # grouped together
    assert not data_path('l.parquet').exists()  # split writes nothing


@pytest.mark.parametrize('suffix', ['parquet', 'jsonl', 'csv'])
def test_wsdm(root, suffix):
    put(data_path(f'w/train.{suffix}'), [dict(r, model_a='m') for r in wsdm()])
    put(
        data_path(f'w/test.{suffix}'),
        [dict(r, id='t' + r['id']) for r in without(wsdm(4), 'winner', 'model_a', 'model_b')],
    )
    rows, test = split('w')
    assert rows.attrs['meta']['task'] == test.attrs['meta']['task'] == 'preference2'
    assert rows.attrs['meta']['read']['train']['ignored'] == []
    assert set(rows.language) == {'English'}
    assert list(rows.label[:2]) == [1, 0]
    assert rows.prompt[0] == [words(0)]
    assert rows.target.isna().all()


def test_wsdm_soft_labels_and_ties(tmp_path):
    soft = [dict(r, p_model_a=None, p_model_b=None, p_tie=None) for r in wsdm(6)]
    soft[2] |= dict(winner='tie', p_model_a=0.2, p_tie=0.5, p_model_b=0.3)
    rows, info = read_raw(put(tmp_path / 'a.parquet', soft))
    assert info['task'] == 'preference'
    assert rows.label[2] == 2
    assert np.allclose(rows.target[2], [0.2, 0.3, 0.5])
    assert rows.target[0] is None
    rows, info = read_raw(
        put(
            tmp_path / 'b.jsonl',
            without(changed(soft, 2, winner='model_a', p_model_a=0.4, p_tie=0, p_model_b=0.6), 'x'),
        )
    )
    assert info['task'] == 'preference2'
    assert np.allclose(rows.target[2], [0.4, 0.6])
    with pytest.raises(Refusal, match='summing to 1.*w2'):
        read_raw(put(tmp_path / 'c.jsonl', changed(soft, 2, p_model_a=0.9)))
    with pytest.raises(Refusal, match='summing to 1.*w2'):
        read_raw(put(tmp_path / 'd.jsonl', changed(soft, 2, p_model_a=None)))
    with pytest.raises(Refusal, match='not a number'):
        read_raw(put(tmp_path / 'e.jsonl', changed(soft, 2, p_model_a='x')))


def test_tianchi(root):
    put(data_path('t/round1_train_data.jsonl'), tianchi())
    put(
        data_path('t/round1_test_data.jsonl'),
        [dict(r, id='x' + r['id'], questions=without(r['questions'], 'answer')) for r in tianchi(5)],
    )
    rows, test = split('t')
    assert rows.attrs['meta']['task'] == 'choice'
    assert list(rows.id[:4]) == ['p00-0', 'p01-0', 'p01-1', 'p02-0']
    assert (n_options(rows, 'choice') == rows.options.map(len)).all()
    assert (rows.label < n_options(rows, 'choice')).all()
    assert rows.groupby(rows.id.str.rsplit('-', n=1).str[0]).fold.nunique().max() == 1
    assert list(test.label) == [-1] * len(test)
    assert test.id[0] == 'xp00-0'


def test_rationales(root):
    told = tianchi()
    told[1]['questions'][0] |= dict(rationale='Because.', label='A')
    told[1]['questions'][1] |= dict(rationale='')
    test = [dict(r, id='x' + r['id']) for r in told[:5]]
    put(data_path('t/train.jsonl'), told)
    put(data_path('t/test.jsonl'), test)
    rows, test = split('t')
    assert rows.id[rows.rationale.notna()].tolist() == ['p01-0']
    assert rows.rationale[1] == 'Because.'
    assert rows.attrs['meta']['read']['train']['ignored'] == ['label']
    assert 'rationale' not in test  # it argues for a label
    write_rows(rows, data_path('again/train.parquet'))
    again, _ = split('again')
    assert again.rationale.equals(rows.rationale)
    put(data_path('plain/train.jsonl'), tianchi())
    assert 'rationale' not in split('plain')[0]


def test_own_table_and_own_task(root, monkeypatch):
    put(data_path('w/train.csv'), [dict(r, model_a='m') for r in wsdm()])
    rows, _ = split('w')
    rows['weight'] = 0.5
    write_rows(rows, data_path('again/train.parquet'))
    again, _ = split('again', seed=3)
    assert read_meta(data_path('again/train.parquet'))['task'] == again.attrs['meta']['task'] == 'preference2'
    assert (again.weight == 0.5).all()
    assert list(again.prompt) == list(rows.prompt)
    assert list(again.group) == list(rows.group)
    with pytest.raises(Refusal, match='outside the options of preference2.*w1'):
        write_rows(rows.assign(label=np.where(rows.id == 'w1', 2, rows.label)), data_path('bad.parquet'))
        read_raw(data_path('bad.parquet'))
    mine = S.Task('grade', ('poor', 'fair', 'good'), 'ABC', 'accuracy')
    monkeypatch.setitem(tasks, 'grade', mine)
    write_rows(rows, data_path('mine/train.parquet'), task='grade')
    own, _ = split('mine')
    assert own.attrs['meta']['task'] == 'grade'
    assert (n_options(own, mine) == 3).all()
    assert list(swap_label([0, 1, 2], own[:3], 'grade')) == [2, 1, 0]


def test_own_table_refused(root):
    put(data_path('w/train.csv'), [dict(r, model_a='m') for r in wsdm()])
    rows, _ = split('w')
    for kw, match in [
        (dict(target=[[0.5, 0.5]] * 39 + [[0.5, 0.4]]), 'soft label.*w39'),
        (dict(target=[[0.5, float('nan')]] * 40), 'soft label.*w0'),
        (dict(target=[[1.0]] * 40), 'soft label'),
        (dict(weight=[1.0] * 39 + [-1.0]), 'weight.*w39'),
        (dict(weight=[1.0] * 39 + [None]), 'weight.*w39'),
        (dict(label=[-2] * 40), 'label outside'),
        (dict(id='x'), 'twice'),
    ]:
        write_rows(rows.assign(**kw), data_path('bad/train.parquet'), task='preference2')
        refused(root, 'bad/train.parquet', None, match)
    write_rows(rows.assign(label=-1, target=[[0.25, 0.75]] * 40), data_path('soft/train.parquet'), task='preference2')
    assert split('soft')[0].target.tolist() == [[0.25, 0.75]] * 40  # a soft label is enough
    write_rows(rows, data_path('alien/train.parquet'), task='grade')
    refused(root, 'alien/train.parquet', None, 'no task called grade; there are preference, preference2, choice')


@pytest.mark.parametrize(
    'change, match',
    [
        (dict(label=6), 'label outside the options of choice.*p13-0'),
        (dict(label=0.5), 'label outside the options of choice.*p13-0'),
        (dict(target=[0.3, 0.3, 0.4]), 'soft label.*p13-0'),
        (dict(target=1.0), 'soft label.*p13-0'),
        (dict(options=[f'o{k}' for k in range(9)]), 'more options than choice has, which are 7.*p13-0'),
        (dict(options='["x", "y"]', label=0), 'options that are no list.*p13-0'),
        (dict(options=None, label=0), 'options that are no list.*p13-0'),
    ],
)
@pytest.mark.parametrize('n', [1, 14])
def test_each_row_of_an_own_choice_table_is_checked(root, n, change, match):
    own = dict(group='', source='', fold=-1, label=1, target=None, weight=1.0, problem='p', question='q')
    table = [dict(own, id=f'p{k}-0', options=['x', 'y']) for k in range(14 - n, 14)]
    assert read_raw(put(root / 'good.jsonl', table))[0].label.tolist() == [1] * len(table)
    with pytest.raises(Refusal, match=match):
        read_raw(put(root / 'bad.jsonl', changed(table, n - 1, **change)))


@pytest.mark.parametrize('rows', [tianchi(), lmsys(), wsdm()])
def test_columns_that_only_the_own_layout_reads_are_named(root, rows):
    more = dict(fold=1, label=0, target=None, weight=2.0)
    assert read_raw(put(root / 'train.jsonl', [r | more for r in rows]))[1]['ignored'] == sorted(more)


def test_layout_by_path_and_relative_paths(root):
    put(root / 'raw/my_train.csv', lmsys())
    put(root / 'raw/other.csv', lmsys(3))
    rows, test = split('raw/my_train.csv')
    assert rows.attrs['meta']['name'] == 'my_train'
    assert test is None
    assert set(raw_files('x', train='raw/my_train.csv', corrections=str(root / 'raw/other.csv'))) == {
        'train',
        'corrections',
    }
    with pytest.raises(Refusal, match='no training file'):
        raw_files('nothing')
    put(root / 'data/two/train.csv', lmsys())
    put(root / 'data/two/train.parquet', wsdm())
    with pytest.raises(Refusal, match='several files'):
        raw_files('two')
    for bad in ('../x', 'a b', '', 'a;touch P', 'x' * 65, 'a\0b'):
        with pytest.raises(Refusal, match='not a name'):
            raw_files(bad)


# -- odd, and normal -----------------------------------------------------------------------------------------------
ODD = [
    'null',
    'NA',
    'None',
    'nan',
    'N/A',
    '',
    ' ',
    'a\u2028b\u2029c\x85d',
    'x\0y',
    '=1+1',
    '"quoted", and\nlines\r\n',
    '\ufeff',
    '🙂',
    '<|im_end|>',
    '\ufffe',
    '007',
    '1e5',
    'True',
    '[1, 2]',
    '[]',
    'word ' * 200_000,
]


@pytest.mark.parametrize('suffix', ['csv', 'jsonl', 'parquet'])
def test_odd_text_survives(root, suffix):
    for kind in ('lmsys', 'wsdm'):
        cell = (lambda s: json.dumps([s, s])) if kind == 'lmsys' else (lambda s: s)
        base = lmsys(30) if kind == 'lmsys' else [dict(r, model_a='m') for r in wsdm(30)]
        raw = [
            dict(r, response_a=cell(ODD[i % len(ODD)]), response_b=cell(ODD[-i % len(ODD)])) for i, r in enumerate(base)
        ]
        put(data_path(f'{kind}/train.{suffix}'), raw)
        rows, _ = split(kind)
        write_rows(rows, data_path(f'{kind}.parquet'))
        back = load_rows(kind)
        turns = 2 if kind == 'lmsys' else 1
        assert list(back.response_a) == [[ODD[i % len(ODD)]] * turns for i in range(30)]
        assert list(back.id) == [r['id'] for r in base]
        assert list(back.response_b) == [[ODD[-i % len(ODD)]] * turns for i in range(30)]
        assert back.drop(columns=['main', 'phase']).equals(rows) or list(back.prompt) == list(rows.prompt)


def test_odd_json(tmp_path):
    f = tmp_path / 'train.csv'
    f.write_bytes(
        b'\xef\xbb\xbf'
        + csv_text(
            changed(
                lmsys(3), 1, prompt='[null, "\\ud83d", true, 7, {"a": "\\udc00"}]', response_a='null', response_b=''
            )
        ).encode()
    )
    rows, info = read_raw(f)
    assert rows.prompt[1] == ['', '\ufffd', 'true', '7', '{"a": "\ufffd"}']
    assert rows.response_a[1] == ['null']
    assert rows.response_b[1] == ['']
    assert (info['nulls'], info['surrogates'], info['not_text'], info['not_json'], info['turns_differ']) == (
        1,
        2,
        3,
        1,
        1,
    )
    odd = changed(
        tianchi(3), 1, problem=None, questions=[dict(question=True, options=[False, 3, None, 1.5], answer='D')], id=12
    )
    f = put(tmp_path / 't.jsonl', odd)
    rows, info = read_raw(f)
    assert rows.iloc[1][['id', 'problem', 'question', 'options', 'label']].tolist() == [
        '12-0',
        '',
        'true',
        ['false', '3', '', '1.5'],
        3,
    ]
    assert group_text(rows)[1] == 'true'
    assert info['nulls'] == 2
    f.write_bytes(
        b'\n\r\n' + f.read_bytes().replace(b'\n', b'\r\n').rstrip()
    )  # blank lines, CRLF, no newline at the end
    assert read_raw(f)[0].id.tolist() == rows.id.tolist()


def test_ids_stay_text(tmp_path):
    ids = ['007', '12e5', str(2**53 + 1), ' x ', 'null', '1.0', 'ünï']
    rows, _ = read_raw(put(tmp_path / 'a.csv', [dict(r, id=i) for r, i in zip(lmsys(7), ids)]))
    assert list(rows.id) == ids
    rows, _ = read_raw(put(tmp_path / 'a.parquet', [dict(r, id=2**53 + i) for i, r in enumerate(wsdm(3))]))
    assert list(rows.id) == [str(2**53 + i) for i in range(3)]


def test_one_hot_spellings(tmp_path):
    rows, _ = read_raw(put(tmp_path / 'a.csv', [dict(r, **{c: float(r[c]) for c in hot[6:]}) for r in lmsys(6)]))
    assert list(rows.label) == [0, 1, 2] * 2
    rows, _ = read_raw(put(tmp_path / 'a.parquet', [dict(r, **{c: bool(r[c]) for c in hot[6:]}) for r in lmsys(6)]))
    assert list(rows.label) == [0, 1, 2] * 2


def test_a_value_before_arrow(tmp_path):
    rows, _ = read_raw(
        put(tmp_path / 'a.parquet', [dict(r, response_a=None if i else 'x') for i, r in enumerate(wsdm(3))])
    )
    assert list(rows.response_a) == [['x'], [''], ['']]


# -- refusals ------------------------------------------------------------------------------------------------------
def refused(root, name, rows, match, ids=(), **kw):
    f = put(data_path(name), rows) if rows is not None else data_path(name)
    before = tree(root)
    with pytest.raises(Refusal, match=match) as e:
        split(f.parent.name, **kw)
    assert f.name in str(e.value), e.value
    for i in ids:
        assert str(i) in str(e.value), e.value
    assert tree(root) == before


def test_refused_columns(root):
    refused(
        root,
        'a/train.csv',
        without(lmsys(), 'response_b'),
        r'missing columns: found .*lmsys, which lacks response_b.*wsdm needs',
    )
    refused(root, 'b/train.csv', without(lmsys(), 'winner_tie'), r'lmsys, which lacks winner_tie')
    refused(root, 'c/train.jsonl', without(tianchi(), 'questions'), r'tianchi, which lacks questions')
    refused(root, 'd/train.parquet', without(wsdm(), 'id'), r'which lacks id')
    refused(root, 'e/train.csv', without(lmsys(), *hot[6:]), 'no label', ['000', '001'])
    write_path = data_path('f/train.csv')
    put(write_path, lmsys())
    write_path.write_text(write_path.read_text().replace('model_b,', 'model_a,', 1))
    refused(root, 'f/train.csv', None, 'column name occurs twice')


def test_refused_ids(root):
    refused(root, 'a/train.csv', changed(lmsys(), 5, id='003'), 'an id occurs twice', ['003'])
    refused(root, 'b/train.jsonl', changed(tianchi(), 5, id='p03'), 'a problem id occurs twice', ['p03'])
    refused(root, 'c/train.csv', changed(lmsys(), 5, id=''), 'without an id', ['5'])
    put(data_path('d/train.csv'), lmsys())
    refused(root, 'd/test.csv', without(lmsys(3), *hot[6:]), 'training file has, too', ['000', '002'])


def test_refused_labels(root):
    refused(root, 'a/train.csv', changed(lmsys(), 5, winner_tie=0), 'no label', ['005'])
    refused(root, 'b/train.csv', changed(lmsys(), 5, winner_model_a=1), 'two labels', ['005'])
    refused(root, 'c/train.csv', changed(lmsys(), 5, winner_model_a=2), 'neither 0 nor 1', ['005'])
    refused(root, 'd/train.csv', changed(lmsys(), 5, winner_model_a=''), 'neither 0 nor 1', ['005'])
    refused(
        root, 'e/train.parquet', changed(wsdm(), 5, winner='model_c'), "outside the options: {'model_c': 1}", ['w5']
    )
    refused(root, 'f/train.parquet', changed(wsdm(), 5, winner=None), 'no label', ['w5'])
    refused(
        root,
        'g/train.jsonl',
        changed(tianchi(), 5, questions=[dict(question='q', options=['x', 'y'], answer='C')]),
        'does not have',
        ['p05-0', "'C'"],
    )
    refused(
        root,
        'h/train.jsonl',
        changed(tianchi(), 5, questions=[dict(question='q', options=['x', 'y'])]),
        'no label',
        ['p05-0'],
    )
    refused(
        root,
        'i/train.jsonl',
        changed(tianchi(), 5, questions=[dict(question='q', options=list('abcdefgh'), answer='A')]),
        'needs 1 to 7 options',
        ['p05-0'],
    )
    refused(root, 'j/train.jsonl', changed(tianchi(), 5, questions=[]), 'questions is not', ['p05'])
    refused(root, 'k/train.jsonl', changed(tianchi(), 5, questions=[dict(question='q')]), 'questions is not', ['p05'])
    refused(
        root,
        'm/train.jsonl',
        changed(tianchi(), 5, questions=[dict(question='q', options=['x', 'y'], answer='AB')]),
        'does not have',
        ['p05-0', "'AB'"],
    )
    refused(
        root,
        'l/train.jsonl',
        [dict(r, questions=without(r['questions'], 'answer')) for r in tianchi()],
        'no label',
        ['p00-0'],
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[st.sampled_from(['0', '1'])] * 3), min_size=1, max_size=6))
def test_one_hot_is_exactly_one(bits):
    cols = dict(zip(hot[6:], map(list, zip(*bits))))
    ids = [f'r{i}' for i in range(len(bits))]
    bad = [i for i, b in zip(ids, bits) if b.count('1') != 1]
    if not bad:
        assert list(R._winner(cols, ids, 'f')) == [b.index('1') for b in bits]
    else:
        with pytest.raises(Refusal) as e:
            R._winner(cols, ids, 'f')
        assert any(i in str(e.value) for i in bad)


def test_refused_files(root):
    for name, content, match in [
        ('a/train.csv', b'', 'empty'),
        ('b/train.jsonl', b'  \n', 'empty'),
        ('c/train.parquet', b'', 'empty'),
        ('d/train.csv', csv_text(lmsys()).split('\n')[0].encode() + b'\n', 'no rows'),
        ('e/train.csv', csv_text(lmsys()).encode('utf-16'), 'byte 0xff at offset 0'),
        ('f/train.csv', csv_text(lmsys()).encode().replace(b'a7', b'caf\xe9'), 'byte 0xe9 at offset'),
        ('g/train.jsonl', jsonl_text(tianchi()).encode()[:-30], r'line 20 is not valid JSON'),
        ('h/train.jsonl', b'[1]\n', 'line 1 is not a JSON object'),
        ('i/train.parquet', b'PAR1 but not really PAR1', 'not a whole parquet'),
        ('j/train.jsonl', b'{"a":' * 100_000, 'line 1 is not valid JSON'),
        ('k/train.csv', csv_text(lmsys()).encode()[:-40], 'cut'),
    ]:
        f = data_path(name)
        f.parent.mkdir(parents=True)
        f.write_bytes(content)
        refused(root, name, None, match)
    with pytest.raises(Refusal, match='no such file.*|.*no such file'):
        split('x', train='nowhere/train.csv')
    (root / 't.txt').write_text('x')
    with pytest.raises(Refusal, match='unknown kind'):
        split('x', train='t.txt')


@pytest.mark.parametrize(
    'name,rows',
    [
        ('train.csv', lmsys(12)),
        ('test.csv', without(lmsys(12), *hot[6:])),
        ('plain.csv', without(wsdm(12), 'winner', 'language', 'model_a', 'model_b')),
        ('train.jsonl', tianchi(12)),
        ('train.parquet', wsdm(12)),
    ],
)
def test_cut_anywhere(tmp_path, name, rows):
    "A cut file is refused, or is whole but for its final newline; a cut between two rows looks like a shorter file"
    f = put(tmp_path / name, rows)
    whole, want = f.read_bytes(), read_raw(f)[0].to_json()
    between = (
        {i + 1 for i, b in enumerate(whole) if b == 10} | {i for i, b in enumerate(whole) if b == 10}
        if f.suffix != '.parquet'
        else set()
    )
    for cut in range(0, len(whole), 7 if len(whole) < 8000 else 29):
        f.write_bytes(whole[:cut])
        if cut in between and cut < len(whole) - 1:
            continue
        try:
            got = read_raw(f)[0].to_json()
        except Refusal as e:
            assert name in str(e)
        else:
            assert got == want, cut


def test_flipped_bits_in_parquet(root):
    put(data_path('w/train.csv'), [dict(r, model_a='m') for r in wsdm()])
    rows, _ = split('w')
    write_rows(rows, data_path('w.parquet'))
    whole, want = data_path('w.parquet').read_bytes(), load_rows('w').to_json()
    for at in range(4, len(whole) - 1, 97):
        raw = bytearray(whole)
        raw[at] ^= 4
        data_path('w.parquet').write_bytes(raw)
        try:
            got = load_rows('w')
        except Refusal:
            continue
        except Exception as e:
            pytest.fail(f'{at}: {e!r}') if at < len(
                whole
            ) - 3000 else None  # damage in the footer's own text may raise elsewhere
        else:
            if at < len(whole) - 3000:
                assert got.to_json() == want


# -- files as hosts hand them out ----------------------------------------------------------------------------------
def zipped(path, **members):  # name → bytes or text
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
        for k, v in members.items():
            z.writestr(k, v)
    return path


@pytest.mark.parametrize('kind', ['csv', 'jsonl', 'json', 'parquet'])
def test_packed_files_read_as_the_plain_one(tmp_path, kind):
    rows = [dict(r, model_a='m') for r in wsdm(5)]
    f = tmp_path / f'train.{kind}'
    if kind == 'json':
        f.write_text(json.dumps(rows))
    else:
        put(f, rows)
    want = read_raw(f)[0].to_json()
    packed = zipped(tmp_path / f'{f.name}.zip', **{f.name: f.read_bytes(), '__MACOSX/._x': 'x'})
    (tmp_path / f'{f.name}.gz').write_bytes(gzip.compress(f.read_bytes()))
    for p in (packed, tmp_path / f'{f.name}.gz'):
        assert read_raw(p)[0].to_json() == want, p
    own, _ = read_raw(put(tmp_path / 'w.csv', rows))
    write_rows(own, tmp_path / 'own.parquet', task='preference')  # its task stands in the file's metadata
    assert (
        read_raw(zipped(tmp_path / 'own.zip', **{'own.parquet': (tmp_path / 'own.parquet').read_bytes()}))[1]['task']
        == 'preference'
    )


def test_archives_refused(tmp_path):
    text, f = csv_text(lmsys(3)), tmp_path / 'train.zip'
    for members, match in [
        ({'a.csv': text, 'b.csv': text}, r"2 files in it instead of one: \['a.csv', 'b.csv'\]"),
        ({}, '0 files'),
        ({'../../a.csv': text}, 'is a path'),
        ({'x\\a.csv': text}, 'is a path|files in'),
        ({'x/a.csv': text}, 'is a path'),
        ({'a.exe': text}, 'unknown kind: .exe'),
        ({'a.zip': text}, 'unknown kind'),
        ({'a.csv': bytes(2**27)}, 'no table does that'),
    ]:
        with pytest.raises(Refusal, match=match) as e:
            read_raw(zipped(f, **members))
        assert 'train.zip' in str(e.value)
    whole = zipped(f, **{'a.csv': text}).read_bytes()
    for cut in range(0, len(whole) - 1, 37):
        f.write_bytes(whole[:cut])
        with pytest.raises(Refusal, match='train.zip'):
            read_raw(f)
    locked = bytearray(whole)
    for mark, at in ((b'PK\x01\x02', 8), (b'PK\x03\x04', 6)):
        locked[locked.index(mark) + at] |= 1
    f.write_bytes(locked)
    with pytest.raises(Refusal, match='encrypted'):
        read_raw(f)
    for data, match in ((bytes(2**27), 'no table does that'), (text.encode(), None)):
        packed = gzip.compress(data)
        (tmp_path / 'a.csv.gz').write_bytes(packed if match else packed[:-9])
        with pytest.raises(Refusal, match=match or 'unpacked'):
            read_raw(tmp_path / 'a.csv.gz')
    with open(tmp_path / 'big.csv', 'wb') as h:
        h.truncate(4 * 2**30)  # takes no room on the disk
    start = time.process_time()
    with pytest.raises(Refusal, match='4.0 GiB'):
        read_raw(tmp_path / 'big.csv')
    assert time.process_time() - start < 1


def test_one_line_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(R, '_longest', 1000)
    f = tmp_path / 'a.csv'
    f.write_text('id,prompt\n1,' + 'x' * 2000 + '\n')
    with pytest.raises(Refusal, match='a line of more than'):
        R.read_csv(f)
    f.write_text('id,prompt\n1,"' + 'x\n' * 2000 + '"\n')
    with pytest.raises(Refusal, match='line'):
        R.read_csv(f)
    (tmp_path / 'a.json').write_text(json.dumps([dict(id='1', prompt='x' * 2000)]))
    with pytest.raises(Refusal, match='JSON Lines'):
        R.read_columns(tmp_path / 'a.json')


@pytest.mark.parametrize('orient', ['records', 'columns', 'list'])
def test_json_as_pandas_writes_it(tmp_path, orient):
    df = pd.DataFrame([dict(r, model_a='m') for r in wsdm(4)])
    f = tmp_path / 'a.json'
    f.write_text(json.dumps(df.to_dict(orient)) if orient == 'list' else df.to_json(orient=orient))
    assert list(read_raw(f)[0].id) == list(df.id)
    assert list(read_raw(f)[0].response_b) == [[v] for v in df.response_b]


def test_json_that_holds_no_rows(tmp_path):
    f = tmp_path / 'a.json'
    for text, match in [
        ('3', 'it holds 3'),
        ('[]', 'no rows'),
        ('[{"id": 1}, 7]', 'a list with 7 in it'),
        ('{"id": 3}', r"an object with the keys \['id'\]"),
        ('{"id": [1, 2], "t": [1]}', 'and no rows'),
        ('[{"id": 1, "id": 2}]', 'a key occurs twice'),
        ('[{"id": 1', 'not valid JSON'),
        ('[' * 10**6, 'not valid JSON'),
    ]:
        f.write_text(text)
        with pytest.raises(Refusal, match=match):
            R.read_columns(f)
    f.write_text(jsonl_text(tianchi(3)))  # JSON Lines under another name
    assert len(read_raw(f)[0]) == 6
    f.rename(tmp_path / 'a.jsonl').write_text(json.dumps(tianchi(3), indent=1))
    with pytest.raises(Refusal, match='name it .json'):
        read_raw(tmp_path / 'a.jsonl')


def test_what_a_file_is_instead(tmp_path):
    f, text = tmp_path / 'train.csv', csv_text([dict(r, model_a='m', prompt='café') for r in wsdm(3)])
    for sep in ';\t|':
        f.write_text(text.replace(',', sep))
        with pytest.raises(Refusal, match='separated by') as e:
            read_raw(f)
        assert repr(sep) in str(e.value)
    f.write_text('"id";"prompt"\n"1";"a, b, c, d"\n')
    with pytest.raises(Refusal, match="separated by ';'"):
        read_raw(f)
    for data, match in [
        (b'<!DOCTYPE html><p>log in', 'web page'),
        (b'version https://git-lfs.github.com/spec/v1\n', 'Git LFS'),
        (b'PK\x03\x04xx', 'zip file'),
        (b'PAR1xx', 'Parquet'),
        (bytes(99), 'zero bytes'),
        (text.encode('utf-16-le'), 'UTF-16'),
        (text.encode('cp1252'), "byte 0xe9 .*café"),
        (b'[{"id": 1}]', 'is JSON'),
        (b'\xef\xbb\xbf', 'empty'),
    ]:
        f.write_bytes(data)
        with pytest.raises(Refusal, match=match) as e:
            read_raw(f)
        assert 'train.csv' in str(e.value)
    for data in (text.encode('utf-8-sig'), text.replace('\n', '\r\n').encode(), text.replace('\n', '\r').encode()):
        f.write_bytes(data)
        assert list(read_raw(f)[0].id) == ['w0', 'w1', 'w2']
        assert read_raw(f)[0].prompt[2] == ['café']


def test_multiple_choice_in_columns_is_told_its_form(tmp_path):
    f = put(tmp_path / 'a.csv', [dict(id=0, prompt='q', A='x', B='y', C='z', D='u', E='v', answer='D')])
    with pytest.raises(Refusal, match='Multiple choice is read from JSON Lines such as') as e:
        read_raw(f)
    line = str(e.value).split('such as ')[1].rstrip('.')
    assert read_raw(put(tmp_path / 'b.jsonl', [json.loads(line)]))[0].label.tolist() == [
        1
    ]  # the form that it shows is read


def test_the_test_file_beside_a_training_file(root):
    put(root / 'raw/train.csv', lmsys())
    put(root / 'raw/test.csv', without(lmsys(3), *hot[6:]))
    put(root / 'raw/latest.csv', lmsys(2))
    put(root / 'raw/sample_submission_test.csv', lmsys(2))
    assert raw_files('x', train='raw/train.csv')['test'] == root / 'raw/test.csv'
    assert raw_files('raw/train.csv')['test'] == root / 'raw/test.csv'
    put(root / 'raw/round2_train.csv', lmsys())
    put(root / 'raw/round2_test.csv', lmsys(3))
    assert raw_files('x', train='raw/round2_train.csv')['test'] == root / 'raw/round2_test.csv'
    zipped(data_path('z/train.csv.zip'), **{'train.csv': csv_text(lmsys())})
    put(data_path('z/train.csv'), lmsys())
    assert raw_files('z')['train'].name == 'train.csv'  # unpacked beside it


def test_a_data_folder_that_cannot_be_written_is_refused(root):
    "a file in its place: root may write into a folder that is read-only"
    (root / 'run').mkdir()
    (root / 'run/rows.parquet').write_bytes(b'')
    (root / 'data').touch()
    for work in (lambda: raw_files('sample_arena'), lambda: publish(root / 'run', 'x')):
        with pytest.raises(Refusal, match='data: cannot write there .File exists.*CK_ROOT'): work()


def test_a_training_file_with_test_in_its_name(root):
    train = put(data_path('c/contest_train.jsonl'), tianchi())
    assert raw_files('c') == dict(train=train)
    for name in ('train.csv', 'sample_submission.csv'):  # macOS, an open LibreOffice and an open Excel write these
        for other in (f'._{name}', f'.~lock.{name}#', f'~${name}'): (train.parent/other).write_bytes(b'\0\5\x16\7')
    assert raw_files('c') == dict(train=train) and tables.sample_files(train.parent) == []
    test = put(data_path('c/contest_test.jsonl'), tianchi())
    assert raw_files('c') == raw_files('c', train='data/c/contest_train.jsonl') == dict(train=train, test=test)



@pytest.mark.parametrize('value', [7, 1e5, None, True])
def test_names_that_papermill_made_values(root, value):
    for f in (raw_files, split, S.table_name, load_rows, parse_mix):
        with pytest.raises(Refusal, match=f'is {value!r}, which is not text. Give it to papermill as text with -r'):
            f(value)


# -- lists as programs write them ----------------------------------------------------------------------------------
@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.none(),
            st.text(max_size=12),
            st.sampled_from(["it's", '"', '\'"', '\\', '\\n', '\n', ', ', ']', "['a', 'b']", '\U0001f600', '\x00']),
        )
    ),
    st.booleans(),
)
def test_lists_written_by_python(turns, numpy):
    said = R.Counter()
    if numpy:
        cell = '[' + ' '.join(map(repr, turns)) + ']'
    else:
        cell = repr(turns)
    assert R._turns(cell, said, True) == ([R.to_text(t, R.Counter()) for t in turns] or [''])


def test_lists_in_a_csv_are_counted(tmp_path):
    base = [dict(r, prompt=json.dumps(['x', 'y'])) for r in lmsys(6)]
    odd = changed(changed(base, 1, prompt="['x', nan, 'y']"), 2, prompt='no list')
    rows, info = read_raw(put(tmp_path / 'a.csv', odd))
    assert rows.prompt[1] == ['x', '', 'y']
    assert rows.prompt[2] == ['no list']
    assert (info['python_lists'], info['not_json'], info['nulls']) == (1, 1, 1)
    rows, info = read_raw(put(tmp_path / 'b.csv', changed([dict(r, model_a='m') for r in wsdm(6)], 3, prompt='["x"]')))
    assert rows.prompt[3] == ['["x"]']
    assert info['lists_kept_as_text'] == 1
    start = time.process_time()
    assert R._as_list("['a', " * 50_000) is None
    assert R._as_list('["' + '\\' * 10**6) is None
    assert R._as_list("['" + "a" * 10**6) is None
    assert time.process_time() - start < 5


# -- ids and labels in two ways ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    'train,test,sample,shown',
    [
        ('12', ['7.0', '8.0'], '78', ('7.0', '1')),
        (['1.0', '2.0'], '78', '78', ('7', '1.0')),
        (['a', 'b'], ['7.0', '8.0'], '78', ('7.0', '7')),
        (['a', 'b'], ['007', '008'], '78', ('007', '7')),
        (['a', 'b'], '78', ['7.0', '8'], ('7', '7.0')),
    ],
)
def test_ids_written_in_two_ways(root, train, test, sample, shown):
    put(data_path('x/train.csv'), [dict(r, id=i, model_a='m') for r, i in zip(wsdm(), train)])
    put(data_path('x/SampleSubmission.csv'), [dict(id=i, winner='model_a') for i in sample])
    refused(
        root,
        'x/test.csv',
        [dict(r, id=i) for r, i in zip(without(wsdm(), 'winner', 'model_a'), test)],
        'ids are written',
        [repr(o) for o in shown],
    )


def test_ids_as_floats_everywhere_are_one_way(root):
    put(data_path('x/train.csv'), [dict(r, id=f'{i}.0', model_a='m') for i, r in enumerate(wsdm())])
    put(
        data_path('x/test.csv'),
        [dict(r, id=f'{i + 50}.0') for i, r in enumerate(without(wsdm(4), 'winner', 'model_a'))],
    )
    put(data_path('x/sample_submission.csv'), [dict(id=f'{i + 50}.0', winner='model_a') for i in range(4)])
    rows, test = split('x')
    assert test.id[0] == '50.0'
    assert rows.attrs['meta']['read']['train']['ids_as_floats'] == 40
    with pytest.raises(Refusal, match='ids are floats, such as 1.0'):
        read_raw(put(root / 'a.parquet', [dict(r, id=float(i + 1)) for i, r in enumerate(wsdm(3))]))


def test_labels_that_are_none_are_listed(root):
    refused(
        root,
        'a/train.csv',
        [dict(r, model_a='m', winner=dict(model_a='A', model_b='tie')[r['winner']]) for r in wsdm()],
        r"outside the options: {'A': 20}; known are model_a, model_b, tie",
    )
    refused(root, 'b/train.csv', changed(lmsys(), 5, winner_tie='maybe'), r"neither 0 nor 1: {'maybe': 1}", ['005'])
    refused(
        root,
        'c/train.jsonl',
        changed(tianchi(), 5, questions=[dict(question='q', options=['x', 'y'], answer=1)]),
        r"{'1': 1}; known are A, B, C",
    )
    refused(
        root,
        'd/train.csv',
        [dict(without([r], 'winner')[0], model_a='m', preferred='x') for r in wsdm()],
        r"no label; columns that were not read: \['preferred'\]",
    )
    refused(
        root,
        'e/train.parquet',
        changed(wsdm(), 5, winner=None),
        r"no label, where other rows say {'model_b': 20, 'model_a': 19}",
    )


def test_test_file_cut_between_rows_is_found(root):
    put(data_path('l/train.csv'), lmsys())
    test = [dict(r, id='t' + r['id']) for r in without(lmsys(6), *hot[6:])]
    put(data_path('l/sample_submission.csv'), [dict(id=r['id'], winner_model_a=0.3) for r in test])
    refused(root, 'l/test.csv', test[:4], 'other ids than sample_submission.csv', ['t004', 't005'])
    put(data_path('l/test.csv'), test)
    split('l')
    refused(root, 'l/test.csv', changed(test, 2, id='other'), 'other ids', ['other', 't002'])


def test_tasks_must_agree(root):
    put(data_path('l/train.csv'), lmsys())
    refused(root, 'l/test.jsonl', tianchi(), 'the training file is preference, the test file choice')


@pytest.mark.parametrize('role', ['train', 'test', 'corrections'])
@pytest.mark.parametrize('name', ['nosuch.csv', 'data'])
def test_a_raw_file_that_is_not_there_is_refused(root, role, name):
    "`ck run 02_split -p train nosuch.csv` ended in a traceback"
    with pytest.raises(Refusal, match=f'{name}: no such file. Give {role}='):
        raw_files('sample_arena', **{role: name})


def test_check_fold():
    rows = pd.DataFrame(dict(fold=[-1, 0, 1, 0]))
    check_fold(rows, 1)
    for bad in (2, -1):
        with pytest.raises(Refusal, match=rf'fold {bad} does not exist: the table has \[0, 1\]'):
            check_fold(rows, bad)
    with pytest.raises(Refusal, match='the table has no folds. Take one'): check_fold(rows.assign(fold=-1), 0)


# -- swapping ------------------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 7), st.integers(-1, 6)), min_size=1, max_size=20), st.sampled_from(list(tasks))
)
def test_swap_twice_is_identity(rows, name):
    task = tasks[name]
    n = np.array([k for k, _ in rows]) if name == 'choice' else np.full(len(rows), len(task.options))
    label = np.array([min(y, k - 1) for (_, y), k in zip(rows, n)])
    df = (
        pd.DataFrame(dict(options=[['o'] * k for k in n]))
        if name == 'choice'
        else pd.DataFrame(dict(id=range(len(rows))))
    )
    assert (n_options(df, task) == n).all()
    once = swap_label(label, df, task)
    assert (swap_label(once, df, name) == label).all()
    assert ((once < 0) == (label < 0)).all()
    assert (once < n).all()
    p = np.zeros((len(rows), len(task.options)))
    for r, k in zip(p, n):
        r[:k] = np.random.default_rng(k).dirichlet(np.ones(k))
    q = swap_probs(p, n, task)
    assert (swap_probs(q, n, name) == p).all()
    for i, y in enumerate(label):
        if y >= 0:
            assert q[i, once[i]] == p[i, y]  # the label and its probability move together
    if name == 'preference':
        assert (q[:, 2] == p[:, 2]).all() and (once[label == 2] == 2).all()


# -- corrections ---------------------------------------------------------------------------------------------------
def fixes(path, *rows):
    return put(path, [dict(zip(('id', 'field', 'old', 'new', 'why'), r)) for r in rows])


@pytest.mark.parametrize('suffix', ['csv', 'jsonl'])
def test_corrections(root, suffix):
    put(data_path('t/train.jsonl'), tianchi())
    put(data_path('l/train.csv'), lmsys())
    options = json.dumps(['x', 'y', 'z']) if suffix == 'csv' else ['x', 'y', 'z']
    old = tianchi()[1]['questions'][0]['options']
    f = fixes(
        root / f'fix.{suffix}',
        ('p01-0', 'answer', 'B', 'A', 'checked'),
        ('p01-0', 'question', 'q0', 'null', 'w'),
        ('p01-0', 'options', json.dumps(old) if suffix == 'csv' else old, options, 'w'),
        ('p01-0', 'label', 'A', 'C', 'again'),
    )
    rows, _ = split('t', corrections=f'fix.{suffix}')
    row = rows.set_index('id').loc['p01-0']
    assert (row.label, row.question, row.options) == (2, 'null', ['x', 'y', 'z'])
    meta = rows.attrs['meta']
    assert meta['corrections'] == 4
    assert meta['files']['corrections'] == dict(file=f.name, sha256=sha256(f))
    fixes(
        root / f'fix2.{suffix}',
        ('001', 'winner', 'model_b', 'tie', 'w'),
        ('001', 'response_a', 'a1', 'better', 'w'),
        ('001', 'prompt', words(1), '["x", "y"]', 'w'),
    )
    rows, _ = split('l', corrections=f'fix2.{suffix}')
    assert rows.loc[1, ['label', 'response_a', 'prompt']].tolist() == [2, ['better'], ['x', 'y']]


def test_corrections_refused(root):
    put(data_path('t/train.jsonl'), tianchi())
    for row, match in [
        (('p01-0', 'answer', 'A', 'B', ''), 'old value is not.*p01-0'),
        (('p99-0', 'answer', 'A', 'B', ''), 'unknown id.*p99-0'),
        (('p01-0', 'answer', 'B', 'G', ''), 'outside the options.*p01-0'),
        (('p01-0', 'fold', '0', '1', ''), 'cannot be corrected.*p01-0'),
        (('p01-0', 'question', 'q0 ', 'q', ''), 'old value is not.*p01-0'),
        (('p01-0', 'options', '["a"]', '["b"]', ''), 'old value is not'),
    ]:
        fixes(root / 'fix.csv', ('p00-0', 'answer', 'A', 'B', ''), row)
        before = tree(root)
        with pytest.raises(Refusal, match=match) as e:
            split('t', corrections='fix.csv')
        assert 'fix.csv' in str(e.value)
        assert tree(root) == before
    put(root / 'fix.csv', [dict(id='p01-0', old='A', new='B')])
    with pytest.raises(Refusal, match='missing columns: field, why'):
        split('t', corrections='fix.csv')


def test_a_corrected_label_drops_its_soft_label_and_rationale():
    rows = pd.DataFrame(dict(id=['a', 'b'], label=[0, 1], target=[[0.9, 0.1], [0.2, 0.8]], prompt=[['x'], ['y']]))
    rows['rationale'] = ['A.', 'B.']
    out = correct(rows, [dict(id='a', field='winner', old='model_a', new='model_b', why='')], 'preference2')
    assert out.label.tolist() == [1, 1]
    assert out.target.tolist() == [None, [0.2, 0.8]]
    assert out.rationale.dropna().tolist() == ['B.']
    assert rows.target[0] == [0.9, 0.1]


@pytest.mark.parametrize('order', [1, -1])
def test_a_label_and_its_rationale_are_corrected_together(root, order):
    told = tianchi()
    told[1]['questions'][0]['rationale'] = 'It is B.'
    put(data_path('t/train.jsonl'), told)
    lines = [('p01-0', 'answer', 'B', 'A', ''), ('p01-0', 'rationale', 'It is B.', 'It is A.', '')]
    fixes(root / 'fix.csv', *lines[::order], ('p00-0', 'rationale', '', 'So A.', ''))
    rows = split('t', corrections='fix.csv')[0].set_index('id')
    assert rows.label['p01-0'] == 0
    assert rows.rationale.dropna().to_dict() == {'p00-0': 'So A.', 'p01-0': 'It is A.'}
    fixes(root / 'fix.csv', ('p01-0', 'rationale', 'It is B.', '', ''))
    assert split('t', corrections='fix.csv')[0].rationale.isna().all()


def test_order_and_process_do_not_matter(tmp_path):
    code = '''
import json
import numpy as np
from competition_kit.groups import group_rows
from competition_kit.folds import make_folds
rng = np.random.default_rng(0)
texts = [' '.join(rng.choice(list('abcdefghijkl'), 25)) for _ in range(400)]
texts += [t+' z' for t in texts[:50]]
label, order = np.arange(450) % 3, rng.permutation(450)
group = group_rows(texts)
assert (group_rows([texts[i] for i in order]) == group[order]).all()
fold = make_folds(group, label, seed=7)
assert (make_folds(group[order], label[order], seed=7) == fold[order]).all()
assert (make_folds(group, label, seed=8) != fold).any()
print(json.dumps([group.tolist(), fold.tolist()]))'''
    outs = {
        subprocess.run(
            [sys.executable, '-c', code],
            env=dict(os.environ, PYTHONHASHSEED=s),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for s in ('1', '2')
    }
    assert len(outs) == 1


# -- folds ---------------------------------------------------------------------------------------------------------
@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(-1, 6)), min_size=8, max_size=300),
    st.integers(2, 6),
    st.integers(0, 3),
)
def test_folds_never_cut_a_group(rows, k, seed):
    group, label = map(np.array, zip(*rows))
    if len(set(group)) < k:
        with pytest.raises(Refusal):
            make_folds(group, label, k, seed)
        return
    fold = make_folds(group, label, k, seed)
    assert set(fold) == set(range(k))
    assert pd.Series(fold).groupby(group).nunique().max() == 1


def spread(fold, label):
    return (
        (pd.crosstab(fold, label, normalize='index') - pd.Series(label).value_counts(normalize=True))
        .abs()
        .to_numpy()
        .max()
    )


@pytest.mark.parametrize('kind', ['mostly single', 'no single', 'label follows group', 'heavy tail'])
def test_folds_at_100k(kind):
    rng, n = np.random.default_rng(0), 100_000
    size = (
        np.minimum(rng.zipf(1.6, n), 8000)
        if kind == 'heavy tail'
        else rng.geometric(0.35, n) + (kind != 'mostly single')
    )
    group = np.repeat(np.arange(n), size)[:n]
    label = rng.choice(5, n, p=[0.34, 0.42, 0.15, 0.085, 0.005])
    if kind == 'label follows group':
        label = (rng.random((n, 1)) > rng.dirichlet([1] * 3, n)[group].cumsum(1)).sum(1).clip(0, 2)
    fold = make_folds(group, label)
    assert spread(fold, label) <= 0.005
    assert np.ptp(np.bincount(fold)) <= n / 1000
    assert pd.Series(fold).groupby(group).nunique().max() == 1


# -- leaks ---------------------------------------------------------------------------------------------------------
def test_leaks_are_found(root):
    put(data_path('l/train.csv'), lmsys())
    put(data_path('l/test.csv'), [dict(r, id='t' + r['id']) for r in without(lmsys(42)[37:], *hot[6:])])
    rows, test = split('l')
    report = leak_report(rows, test)
    json.dumps(report)
    assert report['groups_cut'] == report['exact_between_folds'] == report['near_between_folds'] == 0
    assert report['exact_in_test'] == 3
    assert report['in_test_ids'] == ['037', '038', '039']
    assert report['repeated_rows'] == 0
    bad = rows.copy()
    bad.at[1, 'prompt'] = [words(0).upper()]  # the same prompt in another fold, whatever `group` says
    bad['fold'] = [0, 1] * 20
    report = leak_report(bad, test)
    assert report['exact_between_folds'] == 2
    assert report['near_between_folds'] == 2
    bad.loc[1, 'group'] = bad.group[0]
    assert leak_report(bad)['groups_cut'] == 1
    bad.at[1, 'response_a'], bad.at[1, 'response_b'], bad.at[1, 'prompt'] = ['b0'], ['a0'], rows.prompt[0]
    assert leak_report(bad)['repeated_rows'] == 2  # the swapped copy of a pair


# -- mixes ---------------------------------------------------------------------------------------------------------
def table(name, n=20, start=0, task='preference', **kw):
    rows = pd.DataFrame(
        dict(
            id=[f'{name}{i}' for i in range(n)],
            group=group_rows([words(start + i) for i in range(n)]),
            source=name,
            fold=np.arange(n) % 2,
            label=0,
            target=[None] * n,
            weight=1.0,
            prompt=[[words(start + i)] for i in range(n)],
            response_a=[['a']] * n,
            response_b=[['b']] * n,
            model_a='',
            model_b='',
        )
    ).assign(**kw)
    write_rows(rows, data_path(f'{name}.parquet'), task=task)
    return rows


def test_mix_draws_the_same_rows(root):
    table('train')
    table('gpt4', 200, 1000)
    t = table('pseudo', 100, 5000)
    rows = load_rows('train + gpt4:50 + pseudo@0.8')
    assert rows.groupby('source').size().to_dict() == dict(train=20, gpt4=50, pseudo=80)
    assert rows.attrs['meta']['mix']['rows'] == dict(train=20, gpt4=50, pseudo=80)
    assert rows.attrs['meta']['task'] == 'preference'
    assert set(rows.fold[~rows.main]) == {-1}
    assert rows.fold[rows.main].tolist() == [0, 1] * 10
    drawn = set(rows.id[rows.source == 'pseudo'])
    write_rows(t.sample(frac=1, random_state=0), data_path('pseudo.parquet'), task='preference')
    assert set(load_rows('train + pseudo@.8').query('source == "pseudo"').id) == drawn  # whatever the order of the file
    assert set(load_rows('train + pseudo@.5').query('source == "pseudo"').id) < drawn  # a smaller share is a part of it
    assert set(load_rows('train + pseudo@.8', seed=1).query('source == "pseudo"').id) != drawn
    assert len(load_rows('pseudo:7')) == 7
    assert set(table_hashes('train + pseudo@.8')) == {'train', 'pseudo'}
    assert table_hashes('train')['train'] == table_hashes('train+gpt4')['train']


def test_mix_keeps_copies_out_of_validation(root):
    table('train')
    extra = table('extra', 6, 1000, fold=0)
    extra['prompt'] = [
        [words(0).upper()],
        [words(1) + ' and more'],
        [words(500)],
        [words(501)],
        [words(2)],
        [words(502)],
    ]
    write_rows(extra, data_path('extra.parquet'), task='preference')
    rows = load_rows('train + extra')
    assert rows[~rows.main].fold.tolist() == [0, 1, -1, -1, 0, -1]
    assert rows.attrs['meta']['mix']['held_with_fold'] == 3
    assert rows.attrs['meta']['mix']['left_out'] == 0
    for fold in (0, 1):
        train, valid = rows[rows.fold != fold], rows[(rows.fold == fold) & rows.main]
        both = pd.concat([train, valid])
        g = group_rows(group_text(both))
        assert not set(g[: len(train)]) & set(g[len(train) :])
        assert len(valid) == 10
    report = leak_report(rows)
    assert report['exact_between_folds'] == 0
    assert report['groups_cut'] == 0
    assert report['near_between_tables'] == 6
    write_rows(load_rows('train').head(3), data_path('train_test.parquet'), task='preference')
    assert load_rows('train + extra').attrs['meta']['mix']['in_test'] == 3


def test_split_apart_leaves_out_copies_of_other_tables(root):
    table('contest', 6, 1000)
    rows = lmsys()
    rows[0]['prompt'] = json.dumps([words(1003)])  # a copy
    rows[1]['prompt'] = json.dumps([words(1004) + ' also'])  # a near-copy
    put(data_path('l/train.csv'), rows)
    run = run_driver(data='l', apart='contest')
    left = {r['id'] for r in rows} - set(load_rows('l').id)
    assert left == {rows[0]['id'], rows[1]['id']}
    leaks = json.loads((run.folder / 'leaks.json').read_text())
    assert leaks['left_out'] == {'contest': 2}
    assert '2 in contest' in leak_text(leaks)
    assert split('l', apart='contest contest')[0].attrs['meta']['left_out'] == {'contest': 2}
    table('contest', 6, 2000)
    assert run_driver(data='l', apart='contest').id != run.id  # another contest, another split
    assert len(load_rows('l')) == len(rows)


def test_mix_leaves_out_a_bridge(root):
    a, b = words(1, 40), words(2, 40)
    t = table('train', 4)
    t['prompt'] = [[a], [' '.join(a.split()[:34])], [b], [words(3)]]
    t['fold'] = [0, 1, 0, 1]
    write_rows(t, data_path('train.parquet'), task='preference')
    x = table('x', 1, 900)
    x['prompt'] = [[a]]
    write_rows(x, data_path('x.parquet'), task='preference')
    rows = load_rows('train + x')  # resembles rows of two folds
    assert rows.attrs['meta']['mix']['left_out'] == 1
    assert rows.main.all()
    assert rows.fold.tolist() == [0, 1, 0, 1]


def test_mix_refusals(root):
    table('train')
    table('extra', 5, 100)
    table('other', 5, 200, task='preference2')
    for mix, match in [
        ('train + extar',
         'unknown table: extar; there are extra, other, sample_arena, sample_extra, sample_logic, train. Name one of '
         'these, or make the table: ck run 02_split -p data extar'),
        ('train + other', 'different tasks'),
        ('train + extra:6', 'asks for 6 rows of extra, which has 5'),
        ('train + train', 'twice'),
        ('train + ', 'cannot be read'),
        ('train @ 2', 'no rows, or more'),
        ('train:3@.5', 'cannot be read'),
        ('../x + train', 'cannot be read'),
    ]:
        with pytest.raises(Refusal, match=match):
            load_rows(mix)
    with pytest.raises(Refusal, match='no table called nothing; there are'):
        load_rows('nothing')
    table('same', 3, 300, id=['train0', 's1', 's2'])
    with pytest.raises(Refusal, match='the same id has different content.*train0'):
        load_rows('train + same')
    write_rows(load_rows('train').head(2), data_path('equal.parquet'), task='preference')
    rows = load_rows('train + equal')
    assert len(rows) == 20
    assert rows.main.all()
    assert rows.attrs['meta']['mix']['same_row'] == 2
    table('unknown', 3, 400, label=-1)
    with pytest.raises(Refusal, match='neither label nor soft label.*unknown0'):
        load_rows('train + unknown')
    table('soft', 3, 400, label=-1, target=[[0.2, 0.3, 0.5]] * 3)
    assert load_rows('train + soft').target.notna().sum() == 3


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.from_regex(r'[A-Za-z0-9_-]{1,10}', fullmatch=True),
            st.one_of(st.none(), st.integers(1, 999), st.floats(0.01, 1.0)),
        ),
        min_size=1,
        max_size=5,
        unique_by=lambda o: o[0],
    )
)
def test_mix_strings(parts):
    text = ' + '.join(n + ('' if v is None else f':{v}' if isinstance(v, int) else f'@{v:.3f}') for n, v in parts)
    got = parse_mix(text)
    assert [p.name for p in got] == [n for n, _ in parts]
    assert [p.n or (p.share and round(p.share, 3)) for p in got] == [
        v if v is None or isinstance(v, int) else round(v, 3) for _, v in parts
    ]


# -- tables and the stage ------------------------------------------------------------------------------------------
def test_schema_is_explicit(root):
    put(data_path('t/train.jsonl'), tianchi())
    put(data_path('l/train.csv'), lmsys())
    for name, own in (('t', 'problem question options'), ('l', 'prompt response_a response_b model_a model_b')):
        rows, _ = split(name)
        write_rows(rows, data_path(f'{name}.parquet'))
        s = pq.read_schema(data_path(f'{name}.parquet'))
        assert s.names == 'id group source fold label target weight'.split() + own.split()
        assert s.field('target').type == pa.list_(pa.float32())
        assert s.field('fold').type == pa.int64()
        assert s.field('id').type == pa.string()
        back = load_rows(name)
        assert isinstance((back.options if name == 't' else back.prompt)[0], list)
        assert back.target[0] is None
        assert back.main.all()
        meta = back.attrs['meta']
        assert meta['folds'] == 5
        assert meta['seed'] == 0
        assert meta['files']['train']['sha256'] == sha256(raw_files(name)['train'])


def test_further_columns_are_kept(root):
    table('train', language='en', teacher=[[0.5, 0.3, 0.2]] * 20)
    table('extra', 5, 1000)
    rows = load_rows('train')
    assert rows.language.tolist() == ['en'] * 20
    assert rows.teacher[0] == [0.5, 0.3, 0.2]
    mixed = load_rows('train + extra')
    assert mixed.language.tolist() == ['en'] * 20 + [None] * 5
    write_rows(mixed, data_path('mixed.parquet'))
    names = pq.read_schema(data_path('mixed.parquet')).names
    assert names[-2:] == ['language', 'teacher']
    assert not {'main', 'phase'} & set(names)
    assert load_rows('mixed').teacher.tolist() == [[0.5, 0.3, 0.2]] * 20 + [None] * 5


def test_publish_takes_what_the_run_has(root):
    table('made')
    folder = models_path('some-run')
    folder.mkdir(parents=True)
    data_path('made.parquet').rename(folder / 'rows.parquet')
    publish(folder, 'mine')
    assert sorted(p.name for p in data_path().glob('*.parquet')) == ['mine.parquet']
    (folder / 'soft.parquet').write_bytes((folder / 'rows.parquet').read_bytes())
    publish(folder, 'mine', ('rows', 'soft'))
    assert len(load_rows('mine_soft')) == 20


def test_a_mix_is_grouped_once(root, monkeypatch):
    grouped = []

    def counting(texts):
        grouped.append(len(texts))
        return group_rows(texts)

    table('train')
    table('extra', 5, 1000)
    monkeypatch.setattr(tables, 'group_rows', counting)
    rows = load_rows('train + extra')
    whole = rows.copy()
    rows.loc[0, 'label'] = 2
    rows.prompt[0].append('changed by the caller')
    rows.attrs['meta']['mix']['rows']['train'] = 0
    again = load_rows('train + extra')
    assert grouped == [25]
    assert again.label.tolist() == whole.label.tolist()
    assert again.prompt[0] == [words(0)]
    assert again.attrs['meta']['mix']['rows'] == dict(train=20, extra=5)
    load_rows('train + extra', seed=1)
    table('extra', 5, 1000, weight=0.5)
    assert load_rows('train + extra').weight[20] == 0.5
    assert grouped == [25, 25, 25]


def test_a_table_is_read_once(root, monkeypatch):
    "callers get copies; a changed, a damaged and a large file is read again"
    read = []

    def counting(path):
        read.append(path)
        return read_table(path)

    monkeypatch.setattr(tables, 'read_table', counting)
    table('train')
    rows = load_rows('train')
    rows.loc[0, 'label'] = 2
    rows.prompt[0].append('changed by the caller')
    again = load_rows('train')
    assert (len(read), again.label[0], again.prompt[0]) == (1, 0, [words(0)])
    table('train', weight=0.5)
    assert load_rows('train').weight[0] == 0.5
    assert len(read) == 2
    monkeypatch.setattr(tables, '_largest', 10)
    load_rows('train')
    assert len(read) == 3
    file = data_path('train.parquet')
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(Refusal, match='not a whole parquet file'):
        load_rows('train')


def test_a_table_that_names_no_task_is_refused(root):
    table('train')
    pd.read_parquet(data_path('train.parquet')).to_parquet(data_path('mine.parquet'))
    for mix in 'mine', 'train + mine':
        with pytest.raises(Refusal, match='mine.parquet: no table of the kit.*write_rows'):
            load_rows(mix)


def test_files_are_hashed_once(root, monkeypatch):
    hashed = []

    def counting(path):
        hashed.append(Path(path).name)
        return sha256(path)

    put(data_path('l/train.csv'), lmsys())
    monkeypatch.setattr(S, 'sha256', counting)
    monkeypatch.setattr(tables, 'sha256', counting)
    run = run_driver(data='l')
    assert hashed.count('train.csv') == 1
    assert load_rows('l').attrs['meta']['files']['train']['sha256'] == sha256(data_path('l/train.csv'))
    assert run.done


def test_failed_write_leaves_the_old_table(root, monkeypatch):
    t = table('train')
    before = tree(root)
    with pytest.raises(Exception):
        write_rows(t.assign(label='x'), data_path('train.parquet'))
    assert tree(root) == before


PARAMS = dict(data='sample_arena', train='', test='', corrections='', folds=5, seed=0, apart='')


def notebook():
    return json.loads((Path(__file__).parents[1] / 'nbs/02_split.ipynb').read_text(encoding='utf-8'))


def run_driver(**kw):
    "The notebook's driver cell, with other parameters"
    from competition_kit.record import from_notebook, run_stage

    [cell] = [''.join(c['source']) for c in notebook()['cells'] if 'run_stage(make_split' in ''.join(c['source'])]
    ns = dict(vars(S), from_notebook=from_notebook, run_stage=run_stage, globals=lambda: ns) | PARAMS | kw
    exec(cell, ns)
    return ns['run']


def test_a_wrong_number_of_folds_leaves_no_failed_run(root):
    for folds, what in ((1, 'Take 2 or more'), (2.0, 'Write a whole number')):
        with pytest.raises(Refusal, match=what): run_driver(folds=folds)
    assert not models_path().exists()


def test_stage(root, monkeypatch):
    put(data_path('l/train.csv'), lmsys())
    put(data_path('l/test.csv'), [dict(r, id='t' + r['id']) for r in without(lmsys(4), *hot[6:])])
    (root / 'elsewhere').mkdir()
    monkeypatch.chdir(root / 'elsewhere')
    run = run_driver(data='l')
    rows, first = load_rows('l'), data_path('l.parquet').read_bytes()
    assert rows.attrs['meta']['run'] == run.id
    assert load_rows('l_test').attrs['meta']['part'] == 'test'
    record = json.loads(models_path(run.id, 'record.json').read_text())
    assert record['status'] == 'done'
    assert record['metrics']['rows'] == 40
    assert record['metrics']['near_between_folds'] == 0
    assert (models_path(run.id) / 'leaks.json').exists()
    other = run_driver(data='l', seed=1)
    assert other.id != run.id
    assert load_rows('l').attrs['meta']['run'] == other.id
    assert (load_rows('l').fold != rows.fold).any()
    again = run_driver(data='l')  # made before: published again, not made again
    assert again.id == run.id
    assert data_path('l.parquet').read_bytes() == first
    put(data_path('l/train.csv'), lmsys(41))
    assert run_driver(data='l').id not in (run.id, other.id)  # other content, another run
    assert not list((root / 'elsewhere').iterdir())


def test_a_table_called_train_is_not_the_training_file(root):
    from competition_kit.record import run_stage

    put(data_path('train/train.csv'), wsdm())
    publish(run_stage(S.make_split, S.SplitArgs('train')).folder, 'train')
    ids = set()
    for n in (60, 50):
        put(data_path('more/train.csv'), wsdm(n))
        run = run_stage(S.make_split, S.SplitArgs('more', apart='train'))
        assert len(read_table(run.folder / 'rows.parquet')) == n - 40
        ids.add(run.id)
    assert len(ids) == 2
    with pytest.raises(Refusal, match='a table cannot be called base'):
        raw_files('base')


def test_a_refused_stage_publishes_nothing(root):
    put(data_path('l/train.csv'), lmsys())
    run_driver(data='l')
    old = data_path('l.parquet').read_bytes()
    put(data_path('l/train.csv'), changed(lmsys(), 5, winner_tie=0))
    with pytest.raises(Refusal, match='005'):
        run_driver(data='l')
    assert data_path('l.parquet').read_bytes() == old


@pytest.mark.parametrize('name', S.samples)
def test_samples_are_made_on_first_use(root, name):
    pytest.importorskip('competition_kit.sample')
    rows, test = load_rows(name), load_rows(f'{name}_test')
    assert set(rows.fold) == set(range(5))
    assert (rows.label >= 0).all()
    assert set(test.label) == {-1}
    report = leak_report(rows, test)
    assert report['groups_cut'] == report['near_between_folds'] == 0
    assert report['largest_share'] < 0.1
    assert report['share_spread'] < 0.05  # a row is 1 to 3 % of a fold
    assert not [p for p in data_path().iterdir() if p.name.startswith('.')]


# -- real files ----------------------------------------------------------------------------------------------------
DEV = Path(os.environ.get('CK_DEV_DATA', Path(__file__).parents[1] / '../shared/data'))


@pytest.mark.skipif(not DEV.is_dir(), reason='no development data (CK_DEV_DATA)')
@pytest.mark.parametrize(
    'file', sorted(p.name for p in DEV.glob('*.*') if p.suffix in ('.csv', '.parquet', '.jsonl')) or ['none']
)
def test_real_files(root, file):
    rows, _ = split('real', train=str(DEV / file))
    report = leak_report(rows)
    assert report['groups_cut'] == report['near_between_folds'] == 0
    assert report['largest_share'] < 0.05
    assert report['share_spread'] < 0.03
    write_rows(rows, data_path('real.parquet'))
    back = load_rows('real')
    assert list(back.id) == list(rows.id)
    assert list(back.label) == list(rows.label)
    assert len(back) > 400
