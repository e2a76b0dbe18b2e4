"Writes under kills and full disks, seals, tables under bit flips and cuts, content hashes, roots"
import json, os, random, resource, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, pandas as pd, pytest, pyarrow as pa, pyarrow.parquet as pq
from hypothesis import given, strategies as st
from competition_kit.core import (Refusal, atomic, bases_path, content_hash, damage, data_path, hash_obj, models_path,
                                  project_root, read_json, read_table, root_at, seal, seed_all, sha256, to_json,
                                  versions, write_json, write_table)

HOME = Path(__file__).resolve().parents[1]

def forked(f):
    "Run `f` in a child process; its pid"
    if pid := os.fork(): return pid
    try: f()
    except BaseException: os._exit(1)
    os._exit(0)

def ended(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

# ---- refusals
@pytest.mark.parametrize('kw,want', [
    (dict(what='an id occurs twice'), 'an id occurs twice.'),
    (dict(what='bad', where=Path('data/a.csv')), 'data/a.csv: bad.'),
    (dict(what='bad', where='a.csv', ids=np.array(['x', 'y']), fix='Mend it'), 'a.csv: bad. Rows (2): x, y. Mend it.'),
    (dict(what='bad', ids=pd.Series([3, 1])), 'bad. Rows (2): 3, 1.'),
    (dict(what='bad', ids=range(10)), 'bad. Rows (10): 0, 1, 2, 3, 4, 5, 6, 7, 8, 9.'),
    (dict(what='bad', ids=(str(i) for i in range(11))), 'bad. Rows (11): 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ….')])
def test_refusal_texts(kw, want):
    assert str(Refusal(**kw)) == want
    assert isinstance(Refusal(**kw), ValueError)

# ---- where things are
def where(cwd, **env):
    "project_root as a new process in `cwd` sees it"
    env = {k: v for k, v in os.environ.items() if k not in ('CK_ROOT', 'CK_BASES')} | env
    code = 'from competition_kit.core import *; print(project_root()); print(data_path("a", "b")); print(bases_path())'
    p = subprocess.run([sys.executable, '-c', code], cwd=cwd, env=env, capture_output=True, text=True, check=True)
    return p.stdout.split('\n')[:3]

def test_root_from_anywhere(tmp_path):
    other = tmp_path/'other'
    (other/'nbs/deep').mkdir(parents=True)
    (other/'settings.ini').write_text('')
    (tmp_path/'half').mkdir()
    (tmp_path/'half/settings.ini').write_text('')
    def want(r): return [str(r), str(r/'data/a/b'), str(r/'models/bases')]
    assert where(HOME) == where(HOME/'nbs') == where(tmp_path) == where('/') == want(HOME)
    assert where(other) == where(other/'nbs/deep') == want(other)
    assert where(tmp_path/'half') == want(HOME)
    assert where(HOME, CK_ROOT=str(other)) == want(other)
    assert where(tmp_path, CK_ROOT='other')[0] == str(other)
    assert where(HOME, CK_ROOT=str(other), CK_BASES='/b')[2] == '/b'
    assert where(HOME, CK_ROOT='', CK_BASES='') == want(HOME)

def test_root_at_is_put_back(own_root, tmp_path):
    before, bases = dict(os.environ), bases_path()
    with root_at(tmp_path/'a') as a:
        assert project_root() == a
        assert data_path().parent == a == models_path().parent
        assert bases_path() == bases
        with pytest.raises(RuntimeError), root_at(tmp_path/'a/b/c') as b:
            assert project_root() == b
            assert bases_path() == bases
            raise RuntimeError
        assert project_root() == a
    assert dict(os.environ) == before

def test_the_tests_stay_out_of_the_checkout(own_root):
    assert HOME not in (project_root(), *project_root().parents)
    assert data_path().parent == own_root

def test_sandbox(tmp_path):
    code = """from competition_kit.core import *
old = bases_path()
r = sandbox()
data_path("x").mkdir(parents=True)
assert project_root() == r and bases_path() == old
print(r)"""
    env = dict(os.environ, TMPDIR=str(tmp_path))
    p = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, check=True)
    r = Path(p.stdout.strip())
    assert r.parent == tmp_path.resolve()
    assert not r.exists()

# ---- writes
def test_kill_9_leaves_old_or_new(tmp_path):
    f, rng = tmp_path/'state.txt', random.Random(0)
    f.write_text('0 '*50_000)
    seen = 0
    def writer(ready):
        os.write(ready, b'x')
        for i in range(seen+1, seen+100_000):
            body = f'{i} '*50_000
            with atomic(f) as tmp, open(tmp, 'w') as o:
                for k in range(0, len(body), 9973):
                    o.write(body[k:k+9973])
                    o.flush()
    for k in range(15):
        r, w = os.pipe()
        pid = forked(lambda: writer(w))
        os.read(r, 1)
        os.close(r)
        os.close(w)
        time.sleep(rng.uniform(.001, .04))
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) == -signal.SIGKILL
        got = f.read_text().split()
        assert len(got) == 50_000
        assert len(set(got)) == 1
        assert int(got[0]) >= seen
        seen = int(got[0])
        left = [p for p in tmp_path.iterdir() if p != f]  # a killed process cannot clean up its temporary file
        assert len(left) <= k+1
        assert all(p.name.startswith('.') and p.suffix == '.tmp' for p in left)
        assert list(tmp_path.glob('*.txt')) == [f]
    assert seen > 0
    with atomic(f) as tmp: tmp.write_text('after')
    assert f.read_text() == 'after'
    assert len(list(tmp_path.iterdir())) <= len(left)+1

@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt, SystemExit])
def test_error_keeps_the_old_file(tmp_path, error):
    f = tmp_path/'a/b.txt'
    with pytest.raises(error), atomic(f) as tmp:
        tmp.write_text('half')
        raise error
    assert not list(f.parent.iterdir())
    f.write_text('old')
    with pytest.raises(error), atomic(f) as tmp:
        tmp.write_text('half')
        raise error
    assert f.read_text() == 'old'
    assert [p.name for p in f.parent.iterdir()] == ['b.txt']

def test_full_disk_keeps_the_old_file(tmp_path):
    f, g = tmp_path/'t.parquet', tmp_path/'r.json'
    df = pd.DataFrame(dict(id=list('abc')))
    write_table(df, f)
    write_json(g, {'a': 1})
    before = f.read_bytes(), g.read_bytes()
    big = pd.DataFrame(dict(x=np.random.default_rng(0).random(50_000)))
    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        for w in (lambda: write_table(big, f), lambda: write_json(g, ['x'*10_000])):
            try: w()
            except OSError: pass
            else: os._exit(2)
    assert ended(forked(full)) == 0
    assert (f.read_bytes(), g.read_bytes()) == before
    assert len(list(tmp_path.iterdir())) == 2

def test_unwritable_folder(tmp_path):
    (tmp_path/'file').write_text('x')
    with pytest.raises(OSError), atomic(tmp_path/'file/a.txt'): raise AssertionError('the block must not run')
    if os.geteuid() == 0: return  # root writes anywhere
    (tmp_path/'shut').mkdir()
    (tmp_path/'shut').chmod(0o500)
    try:
        with pytest.raises(OSError), atomic(tmp_path/'shut/a.txt'): raise AssertionError('the block must not run')
    finally: (tmp_path/'shut').chmod(0o700)

def test_mode_follows_the_umask(tmp_path):
    with atomic(tmp_path/'a') as tmp: tmp.write_text('')
    (tmp_path/'b').write_text('')
    assert (tmp_path/'a').stat().st_mode == (tmp_path/'b').stat().st_mode

@pytest.mark.parametrize('name', ['ünï 文 😀.json', 'a b\nc.json', '.hidden.json', '-rf.json', 'x'*200+'.json'])
def test_odd_names(tmp_path, name):
    write_json(tmp_path/name, [1])
    assert read_json(tmp_path/name) == [1]
    assert [p.name for p in tmp_path.iterdir()] == [name]

# ---- JSON and hashes
text = st.text(st.characters(exclude_categories=['Cs']))
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text
def nested(c): return st.lists(c, max_size=4) | st.dictionaries(text, c, max_size=4)
json_values = st.recursive(scalars, nested, max_leaves=10)

@given(json_values)
def test_json_round_trip(obj):
    text = to_json(obj)
    assert json.loads(text) == obj
    assert to_json(json.loads(text)) == text
    assert len(hash_obj(obj)) == 10

def test_json_of_numpy_and_paths():
    obj = dict(a=np.float32(.5), b=np.arange(2), c=np.bool_(True), p=Path('x/y'), t=(1, 2))
    assert to_json(obj) == '{"a": 0.5, "b": [0, 1], "c": true, "p": "x/y", "t": [1, 2]}'
    for bad in (float('nan'), np.float64('inf'), np.array([np.nan]), {1, 2}, object(), b'x'):
        with pytest.raises((ValueError, TypeError)): to_json(dict(a=bad))

def test_broken_json_is_named(tmp_path):
    f = tmp_path/'r.json'
    for b in (b'', b'{', b'\xff', b'{"a": 1}}', b'\x00'):
        f.write_bytes(b)
        with pytest.raises(Refusal, match='r.json'): read_json(f)
    write_json(f, {'a': '\ud800'})  # a lone surrogate neither stops a record nor spoils the file
    assert list(read_json(f)) == ['a']

def test_hashes_are_the_same_in_every_process():
    obj = dict(b=[1, 2.5, 'é\u2028'], a=None)
    code = f'from competition_kit.core import hash_obj; print(hash_obj({obj!r}, 64))'
    hashes = set()
    for salt in '12':
        env = dict(os.environ, PYTHONHASHSEED=salt)
        p = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, check=True)
        hashes.add(p.stdout.strip())
    assert hashes == {hash_obj(dict(reversed(obj.items())), 64)}

# ---- seals
@pytest.fixture
def folder(tmp_path):
    d = tmp_path/'run'
    (d/'sub').mkdir(parents=True)
    (d/'w.safetensors').write_bytes(bytes(range(256))*40)
    (d/'sub/é 文.json').write_text('{}')
    (d/'empty').write_bytes(b'')
    seal(d)
    return d

def test_sealed_is_whole(folder):
    assert damage(folder) == []
    assert set(read_json(folder/'manifest.json')) == {'w.safetensors', 'sub/é 文.json', 'empty'}
    seal(folder)
    assert damage(folder) == []
    folder.rename(folder.with_name('moved'))
    assert damage(folder.with_name('moved')) == []

def test_damage_is_named(folder):
    w, raw = folder/'w.safetensors', (folder/'w.safetensors').read_bytes()
    flipped = bytes([raw[0]^1])+raw[1:], raw[:-1]+bytes([raw[-1]^128])
    cases = [*(('other content', b) for b in flipped), *(('bytes, not', b) for b in (raw[:-1], raw+b'x', b''))]
    for what, b in cases:
        w.write_bytes(b)
        [line] = damage(folder)
        assert 'w.safetensors' in line
        assert what in line
    w.unlink()
    [line] = damage(folder)
    assert line == 'w.safetensors is missing'
    w.mkdir()
    assert len(damage(folder)) == 1
    w.rmdir()
    w.write_bytes(raw)
    assert damage(folder) == []
    (folder/'manifest.json').unlink()
    assert 'never finished' in damage(folder)[0]
    assert damage(folder/'nowhere')

def test_added_file_is_damage(folder):
    "A planted `adapter_model.bin` or index file changes what a loader reads"
    (folder/'adapter_model.bin').write_bytes(b'evil')
    [line] = damage(folder)
    assert 'adapter_model.bin' in line

def test_broken_seal_is_damage(folder):
    "Whatever happens to the manifest itself, the folder is damaged: no crash, and no clean bill"
    f = folder/'manifest.json'
    raw = f.read_bytes()
    broken = [b'[]', b'null', b'{"w.safetensors": 3}', b'{"w.safetensors": {}}']
    broken += [raw[:k] for k in range(0, len(raw)-2, 29)]
    for i in range(0, len(raw), 3):
        b = bytearray(raw)
        b[i] ^= 1 << random.Random(i).randrange(8)
        if b[i:i+1].isspace() and raw[i:i+1].isspace() or bytes(b[i:i+1]).lower() == raw[i:i+1].lower(): continue
        broken.append(bytes(b))
    for b in broken:
        f.write_bytes(b)
        assert damage(folder), b

# ---- tables
TEXTS = ['007', '12e5', 'null', 'NA', '', 'None', 'a\u2028b', '😀', 'שלום', 'nul\x00', str(2**53+1), 'x'*3000]
def table(k=12):
    p = [list(np.random.default_rng(i).random(i % 4)) for i in range(k)]
    return pd.DataFrame(dict(id=TEXTS[:k], p=p, n=range(k), none=[None, 'x']*(k//2),
                             turns=[TEXTS[i % 3:i % 5] for i in range(k)]))

def same(a, b):
    if list(a.columns) != list(b.columns) or len(a) != len(b): return False
    return all(list(map(plain, a[c])) == list(map(plain, b[c])) for c in a)

def plain(o): return [plain(i) for i in o] if isinstance(o, (list, np.ndarray)) else None if o is None or o != o else o

def test_round_trip(tmp_path):
    f = tmp_path/'fold=3/a.parquet'  # looks like a partition
    write_table(table(), f, run='train-f0', deep=dict(a=[1, None]))
    got = read_table(f)
    assert same(got, table())
    assert got.attrs['meta'] == dict(run='train-f0', deep=dict(a=[1, None]), content=content_hash(f))

@pytest.mark.parametrize('df', [pd.DataFrame(dict(id=pd.Series([], dtype=str), p=pd.Series([], dtype=object))),
                                pd.DataFrame(dict(id=['a'], p=[[]])), pd.DataFrame(dict(id=['a'], p=[None]))])
def test_small_tables(tmp_path, df):
    write_table(df, tmp_path/'a.parquet')
    assert same(read_table(tmp_path/'a.parquet'), df)
    s = pa.schema([('id', pa.string()), ('p', pa.list_(pa.float32()))])
    write_table(df, tmp_path/'b.parquet', schema=s)
    assert pq.read_schema(tmp_path/'b.parquet').remove_metadata() == s
    assert same(read_table(tmp_path/'b.parquet'), df)

def test_frames_made_of_pieces(tmp_path):
    "pandas keeps a concatenated column in pieces; what is in it is the same"
    d = table()
    pieces = pd.concat([d]*3, ignore_index=True)
    whole = pd.DataFrame({c: pieces[c].tolist() for c in pieces})
    write_table(pieces, tmp_path/'a.parquet')
    write_table(whole, tmp_path/'b.parquet')
    assert same(read_table(tmp_path/'a.parquet'), whole)
    assert content_hash(tmp_path/'a.parquet') == content_hash(tmp_path/'b.parquet')

def test_more_rows_than_a_row_group(tmp_path):
    write_table(pd.DataFrame(dict(n=np.arange(2**20+1))), tmp_path/'a.parquet')
    assert len(read_table(tmp_path/'a.parquet')) == 2**20+1

def flips(tmp_path, df, want, places):
    f, g = tmp_path/'a.parquet', tmp_path/'b.parquet'
    raw, found, refused = f.read_bytes(), [], 0
    for i, bit in places(len(raw)):
        b = bytearray(raw)
        b[i] ^= 1 << bit
        g.write_bytes(b)
        try: got = read_table(g)
        except Refusal as e:
            refused += 1
            assert 'b.parquet' in str(e)
        except Exception as e: found.append((i, bit, repr(e)[:200]))
        else:
            if not want(got): found.append((i, bit, 'other data'))
    assert refused, found[:5]
    assert not found, found[:5]

def test_flips_in_the_data(tmp_path):
    df = table()
    write_table(df, tmp_path/'a.parquet', run='x')
    rng = random.Random(0)
    flips(tmp_path, df, lambda got: same(got, df), lambda n: [(rng.randrange(n), rng.randrange(8)) for _ in range(500)])

def test_flips_in_the_footer(tmp_path):
    df = table()
    write_table(df, tmp_path/'a.parquet', run='x')
    rng = random.Random(1)
    size = int.from_bytes((tmp_path/'a.parquet').read_bytes()[-8:-4], 'little')
    flips(tmp_path, df, lambda got: same(got, df), lambda n: [(i, rng.randrange(8)) for i in range(n-size-8, n, 4)])

def test_flips_in_the_description(tmp_path):
    "run, task and options are in the metadata, and in its copy `ARROW:schema`, which pyarrow reads: never other ones"
    df, options = table(4), ['model_a', 'model_b', 'tie']
    write_table(df, tmp_path/'a.parquet', run='train-f0', task='preference', options=options)
    raw, meta = (tmp_path/'a.parquet').read_bytes(), read_table(tmp_path/'a.parquet').attrs['meta']
    first = raw.index(b'ARROW:schema')
    flips(tmp_path, df, lambda got: got.attrs['meta'] in ({}, meta), lambda n: [(i, i % 5) for i in range(first, n, 2)])

def test_edited_description(tmp_path):
    f = tmp_path/'a.parquet'
    write_table(table(4), f, options=['model_a', 'model_b'])
    t = pq.read_table(f)
    kit = t.schema.metadata[b'competition_kit']
    swapped = kit.replace(b'"model_a", "model_b"', b'"model_b", "model_a"')
    pq.write_table(t.replace_schema_metadata({b'competition_kit': swapped}), f)
    with pytest.raises(Refusal, match='a.parquet'): read_table(f)

def test_cuts(tmp_path):
    f = tmp_path/'a.parquet'
    write_table(table(), f)
    raw = f.read_bytes()
    for k in [*range(0, len(raw), 37), len(raw)-1]:
        f.write_bytes(raw[:k])
        with pytest.raises(Refusal, match='a.parquet'): read_table(f)
    for b in (raw[8:], raw+b'\0', raw[:100]+raw[101:], raw[:200]+b'x'+raw[200:], b'id,p\na,1\n'):
        f.write_bytes(b)
        with pytest.raises(Refusal, match='a.parquet'): read_table(f)
    with pytest.raises(Refusal, match='no such file'): read_table(tmp_path/'none.parquet')

def test_surrogates_write_nothing(tmp_path):
    f = tmp_path/'a.parquet'
    write_table(table(), f)
    before = f.read_bytes()
    ids = pd.Series(['a', '\ud83d'], dtype=object)
    for df in (pd.DataFrame(dict(id=ids)), pd.DataFrame(dict(id=['a'], t=[['\udc00']]))):
        with pytest.raises(Exception): write_table(df, f)
    assert f.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ['a.parquet']

# ---- content hashes
def test_content_hash_survives_rewrites(tmp_path):
    df = pd.concat([table()]*20, ignore_index=True)
    f, g = tmp_path/'a.parquet', tmp_path/'b.parquet'
    write_table(df, f)
    want = content_hash(f)
    bare = pq.read_table(f).replace_schema_metadata(None)
    for kw in (dict(), dict(compression='snappy'), dict(compression='none', use_dictionary=False), dict(version='1.0'),
               dict(row_group_size=100), dict(row_group_size=7), dict(data_page_version='2.0')):
        pq.write_table(bare, g, **kw)
        assert content_hash(g) == want, kw
        pq.write_table(pq.read_table(f), g, **kw)  # with the kit's metadata kept
        assert content_hash(g) == want, kw
        assert same(read_table(g), df), kw
    pq.write_table(pa.concat_tables([bare.slice(0, 50), bare.slice(50)]), g)
    assert content_hash(g) == want
    pq.write_table(bare.select(bare.column_names[::-1]), g)
    assert content_hash(g) == want
    pq.write_table(bare.set_column(0, 'id', bare['id'].cast(pa.large_string())), g)
    assert content_hash(g) == want
    pq.write_table(bare.set_column(0, 'id', bare['id'].dictionary_encode()), g)
    assert content_hash(g) == want
    write_table(df, g, run='other')
    assert content_hash(g) == want

def test_content_hash_sees_everything(tmp_path):
    base = pd.DataFrame(dict(id=['a', 'b', 'c'], x=[1., 2., 3.], t=[['a', 'b'], [], ['c']]))
    others = [base.iloc[::-1], base.iloc[:2], base.rename(columns=dict(x='y')), base.drop(columns='x')]
    others += [base.assign(y=1), base.assign(id=base.x, x=base.id)]
    others += [base.assign(x=x) for x in ([1., 2., 3.0000001], [1., 2., None], ['1.0', '2.0', '3.0'])]
    others += [base.assign(t=t) for t in ([['a'], ['b'], ['c']], [['a, b'], [], ['c']], [None, [], ['c']])]
    others += [base.assign(id=ids) for ids in (['a', 'b', 'c '], ['a', 'b', None], ['a", "b', 'c', ''])]
    for i, d in enumerate([base, *others]): write_table(d.reset_index(drop=True), tmp_path/f'{i}.parquet')
    assert len({content_hash(tmp_path/f'{i}.parquet') for i in range(len(others)+1)}) == len(others)+1

def test_content_hash_keeps_names_and_values_apart(tmp_path):
    hashes = []
    for i, columns in enumerate((dict(a=[1]), dict(a1=pd.Series([], dtype='int64')), dict(a=[11]), dict(a1=[1]))):
        write_table(pd.DataFrame(columns), tmp_path/f'{i}.parquet')
        hashes.append(content_hash(tmp_path/f'{i}.parquet'))
    assert len(set(hashes)) == 4

def test_changed_data_under_the_old_metadata(tmp_path):
    "pyarrow carries the metadata along when somebody edits a column"
    f = tmp_path/'a.parquet'
    write_table(table(), f)
    t = pq.read_table(f)
    pq.write_table(t.set_column(2, 'n', pa.array(range(1, 13))), f)
    with pytest.raises(Refusal, match='a.parquet'): read_table(f)

def test_content_hash_refuses_by_name(tmp_path):
    f = tmp_path/'a.parquet'
    write_table(table(), f)
    f.write_bytes(f.read_bytes()[:-20])
    with pytest.raises(Refusal, match='a.parquet'): content_hash(f)
    with pytest.raises(Refusal, match='none.parquet'): content_hash(tmp_path/'none.parquet')

# ---- facts
def test_facts():
    assert versions()['torch'].startswith('2.')
    assert 'vllm_not_there' not in versions()
    seed_all(2**40+3)
    a = np.random.rand(), random.random()
    seed_all(2**40+3)
    assert a == (np.random.rand(), random.random())
    assert sha256(__file__) == __import__('hashlib').sha256(Path(__file__).read_bytes()).hexdigest()
