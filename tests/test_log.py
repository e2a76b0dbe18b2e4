"Faults and long checks of the log: hostile values, many writers, kills, people's own things in the workbook"
import multiprocessing, os, random, re, resource, shutil, signal, subprocess, sys, time, zipfile
from datetime import datetime, timedelta, timezone
import openpyxl, pytest
from openpyxl.comments import Comment
from openpyxl.formatting.rule import CellIsRule
from openpyxl.styles import PatternFill
from openpyxl.worksheet.datavalidation import DataValidation
from python_calamine import CalamineWorkbook
from competition_kit import log
from competition_kit.core import Refusal, models_path, read_json, write_json
from competition_kit.log import (LOG, clean_cell, find_run, people, planned, records, run_id, show_run, start_run,
                                 sync_log)
from competition_kit.sheets import put_cell, sheet_parts

fork = multiprocessing.get_context('fork')

def put(i, stage='train', status='done', **more):
    "A record on disk, without a sync"
    params = dict(n=i, lr=1e-4, mix=f'train + more:{i%3}')
    id = run_id(stage, params, {}, i%5)
    baselines = dict(prior=dict(log_loss=1.09, accuracy=.34))
    write_json(models_path(id, 'record.json'), dict(run_id=id, stage=stage, fold=i%5, params=params,
        inputs=dict(rows='9f2c'), status=status, minutes=1.5,
        metrics=dict(log_loss=1-i/1000, accuracy=.5, ece=.01, baselines=baselines),
        host='elsewhere', pid=1, started=f'2026-03-{1+i//1440:02}T{i//60%24:02}:{i%60:02}:00Z', **more))
    return id

def run(fold=0, **params):
    with start_run('train', dict(params, fold=fold), {}, fold) as r:
        if not r.done: r.finish(dict(log_loss=.9, accuracy=.5))
    return r.id

def sheet(root, name='runs'):
    rows = CalamineWorkbook.from_path(str(root/LOG)).get_sheet_by_name(name).to_python(skip_empty_area=False)
    return [dict(zip(rows[0], r)) for r in rows[1:]]

def ids(root): return [r['run_id'] for r in sheet(root) if r['run_id']]

def edit(root, f, name='runs'):
    wb = openpyxl.load_workbook(root/LOG)
    ws = wb[name]
    out = f(wb, ws, {c.value: c.column for c in ws[1]})
    wb.save(root/LOG)
    return out

def with_xml(root, col, xml):
    "The cell of the first run in a column, as another program writes it"
    ref = edit(root, lambda wb, ws, at: setattr(c := ws.cell(2, at[col]), 'value', 12345) or c.coordinate)
    with zipfile.ZipFile(root/LOG) as z: parts = {n: z.read(n) for n in z.namelist()}
    n = 'xl/worksheets/sheet1.xml'
    parts[n] = re.sub(rf'<c r="{ref}"[^>]*><v>12345</v></c>', xml.replace('REF', ref), parts[n].decode()).encode()
    with zipfile.ZipFile(root/LOG, 'w') as z:
        for n, b in parts.items(): z.writestr(n, b)
    return ref

# ---- values ----
HOSTILE = ['\ud83d lone', 'nul\x00 bell\x07', '\ufffe\uffff', '=1+1', '+1', '-1', '@cmd', '\tx', '\rx', 'x'*40000,
    '😀'*40000, 'a'+'😀'*20000, float('nan'), float('inf'), -float('inf'),
    datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone(timedelta(hours=8))), [1, 'a'], {'a': [1]},
    '_x0041_', '_x005F_x0041_',
    '_x000D_', '#N/A', '#REF!', 2**53, -2**63, 2**53-1, True, None, '', ' lead ', 'a\r\nb', '&<>"\'', 'null', 'NA',
    '１２', '\u2028', b'bytes', {1, 2}, 1e308, 5e-324, datetime(1800, 1, 1), '{=SUM(A1)}', "'quoted", 'http://x.y',
    '🇨🇳', [float('nan')], '_x005F_'*5000]

def test_hostile_values_survive_two_rounds(root):
    cleaned, f = [clean_cell(v) for v in HOSTILE], root/LOG
    wb = openpyxl.Workbook()
    for i, v in enumerate(cleaned, 1): put_cell(wb.active.cell(i, 1), v)
    wb.active.cell(len(cleaned)+1, 1).value = 'end'
    for _ in range(3):  # the first save and two rounds of load and save
        wb.save(f)
        with zipfile.ZipFile(f) as z: assert z.read('xl/worksheets/sheet1.xml').count(b'<f>') == 0
        got = [r[0] for r in CalamineWorkbook.from_path(str(f)).get_sheet_by_index(0).to_python(skip_empty_area=False)]
        assert [(a, b) for a, b in zip(got, cleaned) if not log._same(a, b)] == []
        assert max(len(v.encode('utf-16-le'))//2 for v in got if isinstance(v, str)) <= 32767
        wb = log._load_book(f)
    assert got[HOSTILE.index('_x0041_')] == '_x0041_'
    assert got[HOSTILE.index('=1+1')] == '=1+1'
    assert got[HOSTILE.index(2**53)] == str(2**53)
    assert got[HOSTILE.index(2**53-1)] == 2**53-1

def test_a_record_of_hostile_text(root):
    params = {f'p{i}': v for i, v in enumerate(HOSTILE) if isinstance(v, (str, bool, list)) and str(v) != '[nan]'}
    with start_run('train', params, {'in =1': '=cmd()', '\ud83d': '\x00'}) as r:
        r.finish(dict(log_loss=.5), note_='=1+1', mix='=HYPERLINK("x")')
    assert ids(root) == [r.id]
    assert sheet(root)[0]['mix'] == '=HYPERLINK("x")'
    assert sync_log() == f'{LOG} is up to date'
    run()
    assert sync_log() == f'{LOG} is up to date'
    assert len(ids(root)) == 2
    wb = openpyxl.load_workbook(root/LOG)
    assert not [c for ws in wb for row in ws.iter_rows() for c in row if c.data_type == 'f']
    assert show_run(r.id).startswith(r.id)

# ---- many at once, kills ----
WRITER = '''
import sys
from competition_kit.log import start_run
for i in range(5):
    with start_run('train', dict(who=int(sys.argv[1]), i=i), {}, i) as r: r.finish(dict(log_loss=.5))
'''
def test_eight_writers(root):
    env = os.environ | dict(CK_ROOT=str(root))
    ps = [subprocess.Popen([sys.executable, '-c', WRITER, str(i)], env=env) for i in range(8)]
    assert [p.wait() for p in ps] == [0]*8
    assert 'not updated' not in sync_log(wait=True)
    assert len(ids(root)) == len(set(ids(root))) == 40
    assert {r['status'] for r in sheet(root)} == {'done'}
    assert not list(root.glob('.*.tmp'))

def _churn(seed):
    i = seed*1000
    while True:
        i += 1
        put(i)
        sync_log()

def _until(condition, seconds=30):
    end = time.monotonic()+seconds
    while not condition() and time.monotonic() < end: pass

def test_kill_in_mid_save(root):
    for i in range(60): put(i)
    sync_log()
    rnd, mid, copy = random.Random(3), 0, root/f'{LOG}.bak'
    for k in range(1, 11):
        p = fork.Process(target=_churn, args=(k,))
        p.start()
        time.sleep(rnd.uniform(.05, .4))
        if k%2: _until(lambda: list(root.glob('.*.tmp')))  # every other kill waits for a save under way
        os.kill(p.pid, signal.SIGKILL)
        p.join()
        mid += bool(list(root.glob('.*.tmp')))
        assert log._fault(root/LOG) is None
        assert not copy.exists() or log._fault(copy) is None
        assert len(records()) == len(list(models_path().glob('*/record.json')))
    assert mid >= 1, 'no kill fell into a save'
    assert 'not updated' not in sync_log(wait=True)
    assert sorted(ids(root)) == sorted(r['run_id'] for r in records())
    assert not list(root.glob('.*.tmp'))

def _full(ok):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))  # what a full disk does to a file beyond 5,000 bytes
    with start_run('train', dict(late=1), {}) as r: r.finish(dict(log_loss=.1))
    ok.value = r.done

def test_disk_full(root):
    run()
    before, ok = (root/LOG).read_bytes(), fork.Value('b', 0)
    p = fork.Process(target=_full, args=(ok,))
    p.start()
    p.join()
    assert p.exitcode == 0
    assert ok.value
    assert (root/LOG).read_bytes() == before
    assert not list(root.glob('.*.tmp'))
    sync_log()
    assert len(ids(root)) == 2

def test_a_sync_that_fails_never_fails_a_run(root, monkeypatch, capsys):
    run()
    before = (root/LOG).read_bytes()
    monkeypatch.setattr(openpyxl.Workbook, 'save', lambda *a: 1/0)
    with start_run('train', dict(x=1), {}) as r: r.finish({})
    assert r.done
    assert find_run(r.id)['status'] == 'done'
    assert (root/LOG).read_bytes() == before
    assert 'not updated: ZeroDivisionError' in capsys.readouterr().out

def test_another_process_is_syncing(root, monkeypatch):
    from filelock import FileLock
    put(1)
    with FileLock(f'{root/LOG}.lock'): assert 'another process' in sync_log()
    assert not (root/LOG).exists()
    real = log._sync
    def late(path):  # a record that lands while another process holds the lock, and so is left to it
        out = real(path)
        if len(records()) == 1:
            put(2)
            assert 'another process' in sync_log()
        return out
    monkeypatch.setattr(log, '_sync', late)
    sync_log()
    assert len(ids(root)) == 2

def test_saved_by_someone_meanwhile(root, monkeypatch):
    run()
    put(7)
    real = openpyxl.Workbook.save
    def save(self, f):
        real(self, f)
        if '.tmp' in str(f): os.utime(root/LOG, (1, 1))
    monkeypatch.setattr(openpyxl.Workbook, 'save', save)
    assert 'meanwhile' in sync_log()
    assert len(ids(root)) == 1

# ---- the workbook in other hands ----
@pytest.mark.parametrize('name', [f'~${LOG}', f'.~lock.{LOG}#'])
def test_held_open(root, name, capsys):
    run()
    (root/name).touch()
    before = (root/LOG).read_bytes()
    log._printed.clear()
    run(1)
    run(2)
    assert (root/LOG).read_bytes() == before
    assert capsys.readouterr().out.count('it is open in') == 1
    os.utime(root/name, (time.time()-25*3600,)*2)  # open since yesterday, or left behind by a crash
    assert f'delete {name}' in sync_log()
    assert (root/LOG).read_bytes() == before
    (root/name).unlink()
    assert '2 rows added' in sync_log()
    assert len(ids(root)) == 3

def test_deleted(root):
    id = run()
    run(1)
    yellow = PatternFill('solid', fgColor='FFFF00')
    edit(root, lambda wb, ws, at: (ws.cell(2, at['note'], 'mine'), setattr(ws.cell(2, 1), 'fill', yellow)))
    run(2)
    run(3)
    (root/LOG).unlink()
    assert 'missing' in sync_log()
    assert len(ids(root)) == 4
    assert people(id)['note'] == 'mine'
    assert openpyxl.load_workbook(root/LOG)['runs']['A2'].fill.fgColor.rgb == '00FFFF00'
    edit(root, lambda wb, ws, at: ws.cell(2, at['note'], 'newer'))
    sync_log()  # harvests, but leaves the older .bak
    (root/LOG).unlink()
    sync_log()
    assert sheet(root)[0]['note'] == 'newer'
    assert people(id)['note'] == 'newer'
    (root/LOG).unlink()
    (root/f'{LOG}.bak').unlink()
    sync_log()
    assert len(ids(root)) == 4
    assert sheet(root)[0]['note'] == 'newer'
    before = read_json(models_path('people.json'))['runs'][id]['note']['before']
    assert [b['value'] for b in before] == ['mine']

def garbage(p): p.write_bytes(b'garbage'*99)
def truncated(p): p.write_bytes(p.read_bytes()[:5000])
def emptied(p): p.write_bytes(b'')
def flipped(p):
    raw = bytearray(p.read_bytes())
    with zipfile.ZipFile(p) as z: at = z.getinfo('xl/worksheets/sheet1.xml').header_offset+200
    raw[at] ^= 255
    p.write_bytes(raw)

@pytest.mark.parametrize('harm', [garbage, truncated, emptied, flipped])
@pytest.mark.parametrize('bak', [True, False])
def test_corrupted(root, harm, bak):
    id = run()
    run(1)
    edit(root, lambda wb, ws, at: (ws.cell(2, at['keep'], 'x'), ws.cell(1, ws.max_column+1, 'own'),
                                   ws.cell(2, ws.max_column, 'thing')))
    run(2)
    run(3)
    harm(root/LOG)
    if not bak: (root/f'{LOG}.bak').unlink()
    assert people(id)['keep'] is True  # from people.json
    run(4)
    assert len(ids(root)) == 5
    assert people(id)['keep'] is True
    assert sheet(root)[0]['own'] == 'thing'
    assert len(list(root.glob(f'{LOG}.corrupt-*'))) == 1

def test_peoples_own_things_stay(root):
    first = [run(i) for i in range(4)]
    def dress(wb, ws, at):
        ws.insert_cols(4)
        ws.cell(1, 4, 'who')
        at = {c.value: c.column for c in ws[1]}
        for r, v in zip(range(2, 6), ('Mei', 'Bo', 'Al', 'Cy')): ws.cell(r, 4, v)
        ws.cell(2, at['log_loss']).fill = PatternFill('solid', fgColor='FF8800')
        ws.cell(3, at['note'], 'look').comment = Comment('why?', 'Bo')
        ws.cell(4, at['vote_weight']).value = '=0.5*2'
        ws.cell(2, at['vote_weight'], 2)
        ws.cell(2, at['keep'], '是')
        ws.cell(30, at['log_loss']).value = '=AVERAGE(H2:H20)'
        for r in range(6, 60): ws.cell(r, 4).fill = PatternFill('solid', fgColor='EEEEEE')
        dv = DataValidation('list', formula1='"x,no"')
        dv.add('T2:T100')
        ws.add_data_validation(dv)
        ws.conditional_formatting.add('H2:H99', CellIsRule('lessThan', ['0.5'], fill=PatternFill(bgColor='00FF00')))
        ws.column_dimensions['B'].width = 33
        ws.column_dimensions['C'].hidden = ws.row_dimensions[3].hidden = True
        ws.freeze_panes = 'C2'
        ws.merge_cells('A40:C41')
        ws['A40'] = 'our conclusions'
        own = wb.create_sheet('budget', 0)
        own['A1'], own['A2'], own['B7'].fill = 5, '=A1*runs!H2', PatternFill('solid', fgColor='123456')
        wb.create_sheet('secret').sheet_state = 'hidden'
        wb['secret']['A1'] = 'plans'
        wb.move_sheet('guide', -3)
        return at
    at = edit(root, dress)
    new = [run(4), run(5)]
    wb = openpyxl.load_workbook(root/LOG)
    ws = wb['runs']
    assert wb.sheetnames.index('budget') == 0
    assert wb['budget']['A2'].value == '=A1*runs!H2'
    assert wb['budget']['B7'].fill.fgColor.rgb == '00123456'
    assert wb['secret'].sheet_state == 'hidden'
    assert wb['secret']['A1'].value == 'plans'
    assert [c.value for c in ws['A'][1:7]] == first+new
    assert [c.value for c in ws['D'][:7]] == ['who', 'Mei', 'Bo', 'Al', 'Cy', None, None]
    assert ws.cell(2, at['log_loss']).fill.fgColor.rgb == '00FF8800'
    assert ws.cell(3, at['note']).comment.text == 'why?'
    assert ws.cell(4, at['vote_weight']).value == '=0.5*2'
    assert ws.cell(30, at['log_loss']).value == '=AVERAGE(H2:H20)'
    assert ws['D50'].fill.fgColor.rgb == '00EEEEEE'
    assert ws['A40'].value == 'our conclusions'
    assert 'A40:C41' in map(str, ws.merged_cells.ranges)
    assert ws.data_validations.dataValidation[0].formula1 == '"x,no"'
    assert any('H2:H99' in str(r.sqref) for r in ws.conditional_formatting)
    assert ws.column_dimensions['B'].width == 33
    assert ws.column_dimensions['C'].hidden
    assert ws.row_dimensions[3].hidden
    assert ws.freeze_panes == 'C2'
    assert (people(first[0])['keep'], people(first[0])['vote_weight'], people(first[1])['note']) == (True, 2., 'look')
    assert sync_log() == f'{LOG} is up to date'

def test_columns_and_rows_in_another_order(root):
    made = [run(i) for i in range(4)]
    def shuffle(wb, ws, at):
        rows = [[c.value for c in r] for r in ws.iter_rows()]
        ws.delete_rows(1, 99)
        ws['B1'] = 'Our log'
        order = list(range(len(rows[0])))[::-1]
        order.remove(at['ece']-1)  # a column that nobody needs
        for i, r in enumerate([rows[0], *rows[:0:-1]]):
            for j, k in enumerate(order): ws.cell(i+3, j+2).value = r[k]
        ws.cell(3, len(order)+2).value = 'run_id'  # a second header of that name
    edit(root, shuffle)
    last = run(9)
    ws = openpyxl.load_workbook(root/LOG)['runs']
    at = {c.value: c.column for c in reversed(ws[3]) if c.value}
    assert [ws.cell(r, at['run_id']).value for r in range(4, 9)] == made[::-1]+[last]
    assert ws['B1'].value == 'Our log'
    assert 'ece' not in at
    assert [ws.cell(r, at['log_loss']).value for r in range(4, 9)] == [.9]*5
    edit(root, lambda wb, ws, at: ws.cell(4, 2, 'first'))  # the note column is now the second
    assert people(made[-1])['note'] == 'first'
    assert sync_log() == f'{LOG} is up to date'

def test_a_formula_keeps_its_last_value(root):
    id = run()
    with_xml(root, 'vote_weight', '<c r="REF"><f>1+2</f><v>3</v></c>')
    assert people(id)['vote_weight'] == 3
    run(1)  # saved without its value, as openpyxl does
    assert people(id)['vote_weight'] == 3
    edit(root, lambda wb, ws, at: ws.cell(2, at['vote_weight']).__setattr__('value', '=1+3'))
    with pytest.raises(Refusal, match='without a value'): people(id)
    edit(root, lambda wb, ws, at: ws.cell(2, at['vote_weight']).__setattr__('value', None))
    assert people(id)['vote_weight'] is None

@pytest.mark.parametrize('col', ['keep', 'vote_weight'])
@pytest.mark.parametrize('xml', [
    *(f'<c r="REF" t="e"><v>{e}</v></c>' for e in ('#DIV/0!', '#REF!', '#SPILL!', '#CALC!', '#ERROR!', '#BUSY!')),
    '<c r="REF" t="e"><f>1/0</f><v>#N/A</v></c>', '<c r="REF"><f>1+2</f><v></v></c>', '<c r="REF"><f>1+2</f></c>'])
def test_cells_that_look_empty_are_refused(root, col, xml):
    id = run()
    edit(root, lambda wb, ws, at: ws.cell(2, at['note'], 'mine'))
    ref = with_xml(root, col, xml)
    with pytest.raises(Refusal, match=f'sheet runs, cell {ref}, run {id}: {col} is'): people()
    assert 'rows added' in (put(1) and sync_log())  # a run that finishes is not refused
    with pytest.raises(Refusal, match=f'cell {ref}'): people(id)
    assert read_json(models_path('people.json'))['runs'][id]['note']['value'] == 'mine'

def test_a_formula_that_says_nothing_is_empty(root):
    id = run()
    with_xml(root, 'keep', '<c r="REF" t="str"><f>IF(1,"","x")</f><v></v></c>')
    assert people(id)['keep'] is None
    run(1)
    assert people(id)['keep'] is None

def test_an_unknown_error_in_a_note(root):
    id = run()
    run(1)
    edit(root, lambda wb, ws, at: (ws.cell(3, at['keep'], 'no'), wb.create_sheet('mine')))
    with_xml(root, 'note', '<c r="REF" t="e"><f>1/0</f><v>#SPILL!</v></c>')
    run(2)
    assert [p['keep'] for p in people().values()].count(False) == 1
    assert people(id)['note'] == '#SPILL!'
    assert 'mine' in openpyxl.load_workbook(root/LOG).sheetnames
    assert not list(root.glob('*corrupt*'))

def test_merged_cells_are_refused(root):
    made = [run(i) for i in range(3)]
    def merge(wb, ws, at):
        ws.cell(2, at['keep'], 'x')
        ws.merge_cells(start_row=2, end_row=3, start_column=at['keep'], end_column=at['keep'])
    edit(root, merge)
    for id in made[:2]:
        with pytest.raises(Refusal, match='merged cell'): people(id)
    assert people(made[2])['keep'] is None
    assert 'rows added' in (put(1) and sync_log())

@pytest.mark.parametrize('far', ['XFD1048576', 'A1048576'])
def test_a_letter_far_away_is_named(root, far):
    run()
    edit(root, lambda wb, ws, at: (ws.cell(2, at['keep'], 'x'), ws.__setitem__(far, 'typed by mistake')))
    before, start = (root/LOG).read_bytes(), time.process_time()
    put(1)
    assert f'cell {far}' in sync_log()
    assert (root/LOG).read_bytes() == before
    assert time.process_time()-start < 5
    with pytest.raises(Refusal, match=far): people()
    edit(root, lambda wb, ws, at: ws.__setitem__(far, None))
    assert 'rows added' in sync_log()

def test_a_workbook_that_unpacks_to_gigabytes_is_put_off(root):
    id = run()
    with zipfile.ZipFile(root/LOG) as z: parts = {n: z.read(n) for n in z.namelist()}
    with zipfile.ZipFile(root/LOG, 'w', zipfile.ZIP_DEFLATED) as z:
        for n, b in parts.items(): z.writestr(n, b+b' '*(130*2**20)*(n == 'xl/worksheets/sheet1.xml'))
    before, start = (root/LOG).read_bytes(), time.process_time()
    put(1)
    assert 'unpacks to' in sync_log()
    assert 'unpacks to' in sync_log(wait=True)
    assert time.process_time()-start < 5
    with pytest.raises(Refusal, match='unpacks to'): people(id)
    assert (root/LOG).read_bytes() == before
    assert not list(root.glob('*corrupt*'))

def test_a_large_sheet_of_ones_own_waits_for_ck_log_sync(root):
    run()
    with zipfile.ZipFile(root/LOG, 'a') as z: z.writestr('xl/worksheets/ours.xml', os.urandom(log._QUICK))
    put(1)
    assert 'ck log sync' in sync_log()
    assert 'rows added' in sync_log(wait=True)

def test_names_written_a_little_differently(root):
    id = run()
    def rename(wb, ws, at):
        names = dict(keep='Keep', vote_weight='Vote\xa0weight', run_id='Run ID', log_loss='LOG_LOSS')
        for old, new in names.items(): ws.cell(1, at[old], new)
        ws.cell(2, at['keep'], 'x')
        ws.cell(2, at['vote_weight'], 2)
        ws.title, wb['votes'].title = 'runs - Table 1', 'Votes'
    edit(root, rename)
    assert (people(id)['keep'], people(id)['vote_weight']) == (True, 2.)
    run(1)
    assert len(sheet(root, 'runs - Table 1')) == 2
    assert 'runs' not in openpyxl.load_workbook(root/LOG).sheetnames
    assert sync_log() == f'{LOG} is up to date'

def test_renamed_sheets_are_found_by_their_mark(root):
    id = run()
    with start_run('vote', {}, {}) as r: r.finish(dict(log_loss=.8))
    def rename(wb, ws, at):
        ws.cell(2, at['keep'], 'x')
        wb['votes']['B9'] = 'mine'
        names = dict(runs="Mei's tries", votes='runs', mixes='blends', guide='help')
        for old, new in names.items(): wb[old].title = f'{new}_'
        for ws in wb: ws.title = ws.title[:-1]
    edit(root, rename)
    assert people(id)['keep'] is True
    run(1)
    wb = openpyxl.load_workbook(root/LOG)
    assert wb.sheetnames == ["Mei's tries", 'runs', 'blends', 'help']
    assert wb['runs']['B9'].value == 'mine'
    assert [r['status'] for r in sheet(root, "Mei's tries")] == ['done']*2
    assert len(sheet(root, 'runs')) == 8
    edit(root, lambda wb, ws, at: ws.cell(2, at['keep'], 'perhaps'), "Mei's tries")
    with pytest.raises(Refusal, match="sheet Mei's tries, cell V2"): people(id)
    assert sync_log() == f'{LOG} is up to date'

def test_a_copied_sheet_with_the_same_mark(root):
    id = run()
    def copied(wb, ws, at):
        new = wb.copy_worksheet(ws)
        new.title = 'runs (2)'
        new.cell(2, at['keep'], 'x')
        log._mark(new, 'runs')
    edit(root, copied)
    assert people(id)['keep'] is None
    edit(root, lambda wb, ws, at: setattr(ws, 'title', 'tries'))
    with pytest.raises(Refusal, match=r"'tries', 'runs \(2\)'.* the title runs"): people(id)
    before = (root/LOG).read_bytes()
    put(1)
    assert "'tries', 'runs (2)'" in sync_log()
    assert (root/LOG).read_bytes() == before
    edit(root, lambda wb, ws, at: setattr(ws, 'title', 'runs'), 'runs (2)')
    assert people(id)['keep'] is True
    assert 'added' in sync_log()

@pytest.mark.parametrize('col, near', [('keep', 'keep'), ('keep', 'Keep'), ('keep', 'keep '),
    ('vote_weight', 'Vote weight'), ('public_lb', 'public_lb')])
@pytest.mark.parametrize('left', [True, False])
def test_two_columns_of_one_name(root, col, near, left):
    id, other = run(), run(1)
    def second(wb, ws, at):
        j = ws.max_column+1
        if left:
            ws.insert_cols(2)
            j = 2
        ws.cell(1, j, near)
        ws.cell(2, j, 1)
        return f'{openpyxl.utils.get_column_letter(j)}2'
    cell = edit(root, second)
    with pytest.raises(Refusal, match=f'sheet runs, .*two columns {col}.*') as e: people(id)
    assert cell in str(e.value)
    with pytest.raises(Refusal, match='two columns'): people()
    assert people(other)[col] is None
    run(2)  # a run is not harmed, and what is not sure is not kept
    assert col not in log._people_file().get('runs', {}).get(id, {})
    edit(root, lambda wb, ws, at: [ws.cell(2, c.column, 1) for c in ws[1] if log._folded(c.value) == log._folded(col)])
    assert people(id)[col] == 1  # both say the same

@pytest.mark.parametrize('col', ['keep', 'vote_weight'])
def test_a_copied_row_that_says_something_else(root, col):
    "the first of two rows would have steered the vote, whatever people wrote into the other"
    id, other = run(), run(1)
    def copy_row(wb, ws, at, n=6):
        for j in range(1, ws.max_column+1): ws.cell(n, j, ws.cell(2, j).value)
    edit(root, copy_row)
    assert people(id)[col] is None
    edit(root, lambda wb, ws, at: ws.cell(6, at[col], 1))
    with pytest.raises(Refusal, match=f"{col} is '' here and 1.0 in row 6.*Delete"): people()
    assert people(other)[col] is None
    edit(root, lambda wb, ws, at: ws.cell(2, at[col], 1))
    assert people(id)[col] == 1  # both say the same
    edit(root, lambda wb, ws, at: setattr(ws.cell(6, at[col]), 'value', None))
    assert people(id)[col] == 1 and 'up to date' in sync_log()

def test_a_plan_in_a_copied_row_still_has_its_run_id(root):
    "nobody would have started it, or said so"
    id = run()
    def copy_row(wb, ws, at):
        for j in range(1, ws.max_column+1): ws.cell(4, j, ws.cell(2, j).value)
        ws.cell(4, at['status'], 'Planned ')
    edit(root, copy_row)
    with pytest.raises(Refusal, match='cell A4: a planned run has the id .* in row 2. Empty'): planned()
    assert people(id)['keep'] is None and 'not updated' not in sync_log()
    edit(root, lambda wb, ws, at: setattr(ws.cell(4, 1), 'value', None))
    assert [p['row'] for p in planned()] == [4]

def test_two_columns_of_run_ids(root):
    id = run()
    run(1)
    edit(root, lambda wb, ws, at: (ws.cell(1, 40, 'run_id'), ws.cell(1, 41, 'Run ID'), ws.cell(2, 41, 'their own'),
                                    wb['mixes'].cell(1, 40, 'mix')))
    assert people(id)['keep'] is None
    assert 'added' in (put(1) and sync_log())
    edit(root, lambda wb, ws, at: ws.cell(3, 40, 'train-f9-0123456789'))
    with pytest.raises(Refusal, match='cell A3: there are two columns run_id.*AN3'): people(id)
    before = (root/LOG).read_bytes()
    put(2)
    assert 'two columns run_id' in sync_log()
    assert (root/LOG).read_bytes() == before

@pytest.mark.parametrize('col, value', [('params', 'lr=0.5'), ('fold', 3), ('Status', 'planned')])
def test_a_plan_with_two_columns_of_one_name(root, col, value):
    sync_log()
    edit(root, lambda wb, ws, at: (ws.cell(1, 40, col), ws.cell(3, 40, value)))
    plan(root, 3, stage='train', **({} if col == 'Status' else dict(status='planned')))
    with pytest.raises(Refusal, match=f'two columns {col.lower()}.*AN3'): planned()
    run()
    assert len(ids(root)) == 1

def test_macros_stay(root):
    run()
    with zipfile.ZipFile(root/LOG) as z: parts = {n: z.read(n) for n in z.namelist()}
    n, kind = '[Content_Types].xml', b'application/vnd.ms-office.vbaProject'
    macro = b'<Override PartName="/xl/vbaProject.bin" ContentType="'+kind+b'"/></Types>'
    new = b'ms-excel.sheet.macroEnabled.main'
    old = b'openxmlformats-officedocument.spreadsheetml.sheet.main'
    parts[n] = parts[n].replace(old, new).replace(b'</Types>', macro)
    with zipfile.ZipFile(root/LOG, 'w') as z:
        for n, b in {**parts, 'xl/vbaProject.bin': b'macro'}.items(): z.writestr(n, b)
    run(1)
    run(2)
    with zipfile.ZipFile(root/LOG) as z: assert z.read('xl/vbaProject.bin') == b'macro'
    assert len(ids(root)) == 3

def test_a_huge_merged_cell_is_named(root):
    run()
    edit(root, lambda wb, ws, at: wb.create_sheet('ours').__setitem__('A1', 'title'))
    with zipfile.ZipFile(root/LOG) as z: parts = {n: z.read(n) for n in z.namelist()}
    huge = b'</sheetData><mergeCells count="1"><mergeCell ref="A1:XFD1048576"/></mergeCells>'
    with zipfile.ZipFile(root/LOG, 'w') as z:
        parts['xl/worksheets/sheet5.xml'] = parts['xl/worksheets/sheet5.xml'].replace(b'</sheetData>', huge)
        for n, b in parts.items(): z.writestr(n, b)
    put(1)
    assert 'sheet ours, cell A1' in sync_log()

def older(wb, ws, at):
    "As a version of the kit left it that had no column `base`"
    ws.delete_cols(at['base'])
    guide = wb['guide']
    guide.delete_rows(next(r[0].row for r in guide.iter_rows() if (r[0].value, r[1].value) == ('runs', 'base')))

def test_a_new_column_is_added_once(root):
    run(base='smollm2')
    edit(root, older)
    edit(root, lambda wb, ws, at: (ws.cell(1, ws.max_column+1, 'who'), ws.cell(2, ws.max_column, 'Mei')))
    before = sheet(root)[0]
    run(1, base='qwen')
    rows = sheet(root)
    assert [list(r)[-2:] for r in rows] == [['who', 'base']]*2
    assert [r['base'] for r in rows] == ['smollm2', 'qwen']
    assert {k: rows[0][k] for k in before} == before
    assert sync_log() == f'{LOG} is up to date'
    edit(root, lambda wb, ws, at: ws.delete_cols(at['base']))
    run(2, base='qwen')
    assert 'base' not in sheet(root)[0]  # deleted by people

def test_refused_plans_say_why(root):
    run()
    def plan(wb, ws, at):
        for c, v in dict(stage='train', status='planned', base='nobase', note='try it').items(): ws.cell(5, at[c], v)
    edit(root, plan)
    row, = planned()
    assert row['params'] == dict(base='nobase')
    before = (root/LOG).read_bytes()
    (root/f'~${LOG}').touch()
    assert 'open in Excel' in log.refuse_plan(5, 'no base nobase')
    assert (root/LOG).read_bytes() == before
    (root/f'~${LOG}').unlink()
    assert 'no planned row' in log.refuse_plan(2, 'x')
    log.refuse_plan(5, 'no base nobase')
    last = sheet(root)[-1]
    assert (last['status'], last['note'], planned()) == ('refused: no base nobase', 'try it', [])
    run(1)
    assert [r['status'] for r in sheet(root)] == ['done', 'done', '', 'refused: no base nobase']

def test_rows_that_come_and_go(root):
    ids_ = [run(i) for i in range(3)]
    edit(root, lambda wb, ws, at: [ws.cell(r, at['note'], f'n{r}') for r in (2, 3, 4)])
    sync_log()
    edit(root, lambda wb, ws, at: ws.delete_rows(2))
    shutil.rmtree(models_path(ids_[1]))
    assert '1 row added' in sync_log()  # the deleted row is back, with its note; the row of the deleted run stays
    want = {i: (f'n{r}', 'done') for i, r in zip(ids_, (2, 3, 4))}
    assert {r['run_id']: (r['note'], r['status']) for r in sheet(root)} == want
    edit(root, lambda wb, ws, at: ws.cell(3, at['log_loss'], 77))
    assert '1 cell changed' in sync_log()
    assert {r['log_loss'] for r in sheet(root)} == {.9}

def test_sheets_that_are_gone_or_someone_elses(root):
    run()
    edit(root, lambda wb, ws, at: (wb.remove(wb['votes']), setattr(wb['guide'], 'title', 'help'),
                                   ws.delete_cols(1), ws.cell(2, 1, 'theirs')))
    said = sync_log()
    assert 'the sheet runs had no column run_id, and is now runs (old)' in said and 'votes had' not in said
    assert len(ids(root)) == 1
    assert openpyxl.load_workbook(root/LOG)['runs (old)']['A2'].value == 'theirs'
    assert sync_log() == f'{LOG} is up to date'
    edit(root, lambda wb, ws, at: setattr(ws, 'title', 'tmp') or setattr(ws, 'title', 'Runs'))
    run(1)
    assert len(ids(root)) == 2

@pytest.mark.parametrize('col', ['keep', 'vote_weight'])
def test_a_column_that_steers_the_vote_and_has_another_header_is_named(root, capsys, col):
    id = run()
    edit(root, lambda wb, ws, at: ws.cell(2, at[col], 1))
    sync_log()
    edit(root, lambda wb, ws, at: (ws.cell(2, at[col], 0), ws.cell(1, at[col], f'my {col}')))
    capsys.readouterr()
    assert people(id)[col] == 1
    assert f'sheet runs: there is no column {col}, so its last values count' in capsys.readouterr().out
    edit(root, lambda wb, ws, at: ws.cell(1, at[f'my {col}'], col))
    assert people(id)[col] == 0 and not capsys.readouterr().out

def test_plans_without_their_columns_are_refused(root):
    "else `ck log plan` would say that nothing is planned"
    run()
    edit(root, lambda wb, ws, at: (ws.cell(1, at['status'], 'state'), ws.delete_cols(at['stage'])))
    with pytest.raises(Refusal, match='sheet runs: there is no column status and no column stage'): planned()

def test_strict_cells(root):
    run()
    bad = ('keep', 'maybe'), ('vote_weight', 'a lot'), ('vote_weight', -1), ('vote_weight', True)
    good = ('vote_weight', '0.25'), ('keep', 1), ('keep', True), ('keep', '✓')
    for col, v in bad+good:
        at = edit(root, lambda wb, ws, at: (ws.cell(2, at[col], v), at)[1])
        if (col, v) in good: people()
        else:
            cell = f"{openpyxl.utils.get_column_letter(at[col])}2"
            with pytest.raises(Refusal, match=f'sheet runs, cell {cell}'): people()
        edit(root, lambda wb, ws, at: ws.cell(2, at[col]).__setattr__('value', None))

# ---- formulas of people ----
def computed(root, values):
    "Formulas with their values, as Excel saves them: (sheet, cell) → (formula, type, value)"
    edit(root, lambda wb, ws, at: [wb[s].__setitem__(ref, 12345+i) for i, (s, ref) in enumerate(values)])
    with zipfile.ZipFile(root/LOG) as z:
        parts, where = {n: z.read(n) for n in z.namelist()}, sheet_parts(z)
    for i, ((s, ref), (f, kind, v)) in enumerate(values.items()):
        f = f if f.startswith('<f') else f'<f>{f}</f>'
        new = f'<c r="{ref}" t="{kind}">{f}<v>{v}</v></c>'
        text, n = re.subn(rf'<c r="{ref}"[^>]*><v>{12345+i}</v></c>', lambda m: new, parts[where[s]].decode())
        assert n == 1
        parts[where[s]] = text.encode()
    with zipfile.ZipFile(root/LOG, 'w') as z:
        for n, b in parts.items(): z.writestr(n, b)

def formulas(root):
    "Sheet and cell of each formula → the value that a program reads which does not compute"
    told, seen = openpyxl.load_workbook(root/LOG), openpyxl.load_workbook(root/LOG, data_only=True)
    return {(ws.title, c.coordinate): seen[ws.title][c.coordinate].value
            for ws in told for row in ws.iter_rows() for c in row if c.data_type == 'f'}

def own(wb, ws, at):
    for j in range(9): ws.cell(1, 40+j, f'own{j}')
    wb.create_sheet('ours')['A1'] = 7

def test_cached_values_of_formulas_stay(root):
    run()
    edit(root, own)
    shared = '<f t="shared" ref="AS2" si="0">H2+1</f>'
    computed(root, {('runs', 'AN2'): ('H2*2', 'n', '1.8000000000000003'),
                    ('runs', 'AO2'): ('A2&amp;"&lt;"', 'str', 'a &lt;b&gt; _x000D_'),
                    ('runs', 'AP2'): ('H2&lt;1', 'b', '1'), ('runs', 'AQ2'): ('1/0', 'e', '#DIV/0!'),
                    ('runs', 'AR2'): ('IF(1,"","x")', 'str', ''), ('runs', 'AS2'): (shared, 'n', '1.9'),
                    ('ours', 'B1'): ('A1*runs!H2', 'n', '6.3'), ('ours', 'B2'): ('B1+1', 'n', '7.3'),
                    ('ours', 'B3'): ('1+1', 'e', '#SPILL!')})
    want = formulas(root)
    assert (want['runs', 'AN2'], want['runs', 'AP2']) == (1.8000000000000003, True)
    assert (want['runs', 'AQ2'], want['ours', 'B2']) == ('#DIV/0!', 7.3)
    run(1)
    put(7)
    assert 'rows added' in sync_log()
    assert {k: v for k, v in formulas(root).items() if k in want} == want
    with zipfile.ZipFile(root/LOG) as z:
        assert b'fullCalcOnLoad="1"' in z.read('xl/workbook.xml')
        assert b'<v>1.8000000000000003</v>' in z.read('xl/worksheets/sheet1.xml')
        assert b't="str"><f>A2&amp;"&lt;"</f><v>a &lt;b&gt; _x000D_</v>' in z.read('xl/worksheets/sheet1.xml')
        assert b't="e"><f>1+1</f><v>#SPILL!</v>' in z.read('xl/worksheets/sheet5.xml')
    assert sync_log() == f'{LOG} is up to date'

def test_values_that_a_sync_makes_wrong_are_left_out(root):
    for i in range(3): run(i)
    edit(root, own)
    fresh = {('runs', 'AN2'): 'H2*2', ('runs', 'AO2'): 'SUM(H2:H2,H4)', ('runs', 'AP2'): 'AN2+1',
             ('runs', 'AQ2'): '$H$4', ('ours', 'B1'): 'runs!H2'}
    array = '<f t="array" ref="AT3:AT4">H2:H3</f>'
    stale = {('runs', 'AN3'): 'H3*2', ('runs', 'AO3'): 'SUM(H:H)', ('runs', 'AP3'): 'AN3+1',
             ('runs', 'AQ3'): 'COUNTA(A2:A99)', ('runs', 'AR3'): 'OFFSET(A1,1,1)', ('runs', 'AS3'): 'loss*1',
             ('runs', 'AT3'): array, ('ours', 'B2'): 'runs!AT4', ('ours', 'B3'): 'B2+1', ('ours', 'B4'): "'runs'!AP3"}
    edit(root, lambda wb, ws, at: (ws.cell(3, at['log_loss'], 77), ws.__setitem__('AT4', 77)))  # the loss is put right
    computed(root, {k: (f, 'n', '77') for k, f in {**fresh, **stale}.items()})
    run(3)
    got = formulas(root)
    assert {k: got[k] for k in fresh} == dict.fromkeys(fresh, 77)
    assert {k: got[k] for k in stale} == dict.fromkeys(stale)
    assert openpyxl.load_workbook(root/LOG)['runs']['AT4'].value is None

def test_a_column_of_one_formula_is_filled_down(root):
    for i in range(3): run(i)
    def write(wb, ws, at):
        for r in (2, 3, 4):
            ws.cell(r, 40, f'=ROUND(H{r}*$H$2,3)').number_format = '0.0%'
            ws.cell(r, 41, f'=H{r}' if r < 4 else '=H4*2')  # two formulas
            ws.cell(r, 42, f'=H{r}' if r < 4 else 5)
            ws.cell(r, 43, '=ROW()')
            ws.cell(r, at['note'], f'=A{r}&"!"')
            ws.cell(r, at['log_loss'], f'=I{r}')  # ours: put right
        ws.cell(2, 45, '=H2')  # the last run has none
        ws.cell(4, 46, '=1/3')  # a number
        ws.cell(3, 47, '=H3')
        ws.cell(4, 47, '=H4')  # a gap above
        ws.cell(4, 48, '=$H$2')
        for j in range(40, 49): ws.cell(1, j, f'own{j}')
        ws.cell(9, 1, 'total')
        ws.cell(9, 40, '=SUM(AN2:AN8)')
        for c, v in dict(status='planned', stage='train', fold=5).items(): ws.cell(7, at[c], v)
    edit(root, write)
    run(3)
    run(5)
    ws = openpyxl.load_workbook(root/LOG)['runs']
    at = {c.value: c.column for c in ws[1]}
    for r in (5, 7):
        assert ws.cell(r, at['run_id']).value.startswith(f'train-f{dict([(5, 3), (7, 5)])[r]}')
        assert ws.cell(r, 40).value == f'=ROUND(H{r}*$H$2,3)'
        assert ws.cell(r, at['note']).value == f'=A{r}&"!"'
        filled = [ws.cell(r, j).value for j in (41, 42, 43, 45, 46, 47, 48)]
        assert filled == [None, None, '=ROW()', None, None, f'=H{r}', '=$H$2']
        assert ws.cell(r, 40).number_format == '0.0%'
        assert ws.cell(r, at['log_loss']).value == .9
    assert ws['AN9'].value == '=SUM(AN2:AN8)'
    assert sync_log() == f'{LOG} is up to date'

def test_a_row_that_comes_back_gets_the_formula_of_its_column(root):
    for i in range(3): run(i)
    edit(root, lambda wb, ws, at: ws.cell(1, 40, 'own'))
    computed(root, {('runs', f'AN{r}'): (f'H{r}+1', 'n', '1.9') for r in (2, 3, 4)})
    sync_log()
    run(3)
    edit(root, lambda wb, ws, at: ws.delete_rows(5))
    edit(root, lambda wb, ws, at: ws.delete_rows(4))
    run(4)
    assert sorted(ids(root)) == sorted(r['run_id'] for r in records())
    ws = openpyxl.load_workbook(root/LOG)['runs']
    assert [ws.cell(r, 40).value for r in range(2, 7)] == [f'=H{r}+1' for r in range(2, 7)]

def test_a_weight_that_is_out_of_date_is_refused(root):
    id = run()
    computed(root, {('runs', 'W2'): ('1/COUNTA(A2:A99)', 'n', '1')})
    assert people(id)['vote_weight'] == 1
    run(1)
    with pytest.raises(Refusal, match='cell W2, .*without a value'): people(id)

# ---- plans ----
def plan(root, row, **cells):
    return edit(root, lambda wb, ws, at: [ws.cell(row, at[k], v) for k, v in cells.items()] and at)

def test_planned_rows(root, monkeypatch):
    assert planned() == []
    sync_log()
    plan(root, 4, status='Planned', stage='train', fold=2, params='lr=1e-3, name="a, b"', note='try', mix='train')
    plan(root, 5, status='planned', stage='train', fold=2, params='{"lr": 0.5}', keep='x')
    assert planned() == [dict(row=4, stage='train', fold=2, params=dict(lr=.001, name='a, b', mix='train', fold=2)),
                         dict(row=5, stage='train', fold=2, params=dict(lr=.5, fold=2))]
    other = run(2, lr=.3)
    assert ids(root) == [other]
    assert len(planned()) == 2
    a = run(2, lr=1e-3, name='a, b', mix='train', more=True)
    assert [(r['run_id'], r['note']) for r in sheet(root) if r['note']] == [(a, 'try')]
    assert people(a)['note'] == 'try'
    assert [p['row'] for p in planned()] == [5]
    done = run(2, lr=.4)
    plan(root, 9, status='planned', stage='train', fold=2, params='lr=0.4')  # that run is there already
    monkeypatch.setenv('CK_PLANNED_ROW', '9')
    run(2, lr=.4)
    sync_log()
    assert [p['row'] for p in planned()] == [5]
    assert sheet(root)[7]['status'] == f'as {done}'
    assert len(ids(root)) == 3
    monkeypatch.delenv('CK_PLANNED_ROW')
    b = run(2, lr=.5)
    assert planned() == []
    assert people(b)['keep'] is True
    assert (sheet(root)[3]['run_id'], sheet(root)[3]['status']) == (b, 'done')
    assert sync_log() == f'{LOG} is up to date'
    assert len(ids(root)) == 4

def test_a_row_of_totals_is_no_run(root):
    id = run()
    plan(root, 12, run_id='total', keep='n=1', vote_weight='all', note='sum')
    run(1)
    run(2)
    assert set(people()) <= {id}
    assert sheet(root)[10]['note'] == 'sum'
    assert [r['run_id'] for r in sheet(root)][:3] == ids(root)[:3]

@pytest.mark.parametrize('cells,col', [(dict(stage=''), 'stage'), (dict(stage='Train it'), 'stage'),
    (dict(params='lr'), 'params'), (dict(params=5), 'params'), (dict(params='{"a"'), 'params'),
    (dict(fold='two'), 'fold'), (dict(fold=1.5), 'fold'), (dict(fold=1, params='fold=2'), 'fold')])
def test_plans_that_cannot_be_read(root, cells, col):
    sync_log()
    at = plan(root, 3, **dict(dict(status='planned', stage='train'), **cells))
    cell = f'{openpyxl.utils.get_column_letter(at[col])}3'
    with pytest.raises(Refusal, match=f'cell {cell}'): planned()
    run()  # and no run is harmed
    assert len(ids(root)) == 1
    assert sheet(root)[1]['status'] == 'planned'

# ---- the whole of it ----
def test_mixes_and_votes(root):
    for i in range(6): put(i)
    with start_run('vote', dict(rule='mean'), {}) as r:
        r.finish(dict(log_loss=.8), members=['a', 'b'], weights={'a': 1., 'b': .5}, submission=root/'s.csv')
    m = {r['mix']: r for r in sheet(root, 'mixes')}['train + more:1']
    best, = [r['run_id'] for r in records() if r['params'].get('n') == 4]
    assert (m['runs'], m['folds'], m['best']) == (2, '1, 4', best)
    assert m['log_loss'] == pytest.approx(.9975)
    assert m['log_loss spread'] == pytest.approx(.0015)
    v, = sheet(root, 'votes')
    assert v['run_id'] == r.id
    assert v['weights'] == 'a=1.0, b=0.5'
    assert v['members'] == 'a, b'
    assert r.id not in ids(root)

def test_many_records(root):
    for i in range(400): put(i)
    start = time.process_time()
    sync_log()
    assert time.process_time()-start < 10  # 1,000 take one second
    assert len(ids(root)) == 400
    assert sync_log() == f'{LOG} is up to date'

def test_an_empty_root_gets_the_template(root):
    assert 'not updated' not in sync_log()
    assert sync_log() == f'{LOG} is up to date'
    wb = openpyxl.load_workbook(root/LOG)
    assert wb.sheetnames == ['runs', 'votes', 'mixes', 'guide']
    assert wb['runs'].freeze_panes == 'B2'
    assert wb['runs'].auto_filter.ref
    assert [c.value for c in wb['runs'][1]] == [c.name for c in log._SHEETS['runs']]
    assert wb['runs'].max_row == 1

@pytest.mark.skipif(not shutil.which('soffice'), reason='LibreOffice is not installed')
def test_libreoffice_reads_and_saves_it(root):
    id = run(mix='=1+1')
    edit(root, lambda wb, ws, at: ws.cell(2, at['note'], 'seen'))
    out = root/'lo'
    office = ['soffice', '--headless', f'-env:UserInstallation=file://{root}/profile']
    subprocess.run([*office, '--convert-to', 'xlsx', '--outdir', out, root/LOG],
        check=True, capture_output=True, timeout=120)
    shutil.copy(out/LOG, root/LOG)
    assert sheet(root)[0]['mix'] == '=1+1'
    run(1)
    assert len(ids(root)) == 2
    assert people(id)['note'] == 'seen'
    assert sync_log() == f'{LOG} is up to date'

def test_a_flipped_bit_in_what_people_wrote_is_refused(root):
    id = run()
    edit(root, lambda wb, ws, at: ws.cell(2, at['vote_weight'], 3))
    sync_log()
    f = models_path('people.json')
    text = f.read_bytes()
    f.write_bytes(text.replace(b'"value": 3', b'"value": 7').replace(b'"value":3', b'"value":7'))
    assert f.read_bytes() != text
    (root/LOG).unlink()
    with pytest.raises(Refusal, match='people.json.*not as the kit kept it'): people(id)
    assert 'not as the kit kept it' in sync_log()
    f.write_bytes(text)
    assert people(id)['vote_weight'] == 3

def test_plans_of_a_broken_workbook_are_refused(root):
    "`ck log plan` ended in a traceback"
    (root/LOG).write_text('broken')
    with pytest.raises(Refusal, match='could not be read .*`ck log sync` makes it again'): planned()
    sync_log(wait=True)
    assert planned() == []
