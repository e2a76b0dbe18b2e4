"The sums that identify bases and adapters follow the content of files, whatever their times say."

import json, os, time

from competition_kit.core import damage_cached, file_sums, models_path, root_at, seal, sha256


def test_a_change_that_keeps_size_and_mtime_is_seen(tmp_path):
    with root_at(tmp_path):
        folder = tmp_path / 'a'
        folder.mkdir()
        f = folder / 'w'
        f.write_bytes(b'one')
        seal(folder)
        time.sleep(1.1)
        assert damage_cached(folder) == []
        assert str(f) in json.loads(models_path('.sums.json').read_text())
        was = f.stat()
        f.write_bytes(b'two')
        os.utime(f, ns=(was.st_atime_ns, was.st_mtime_ns))
        assert damage_cached(folder) == ['w has other content than when it was sealed']


def test_damaged_kept_sums_are_not_believed(tmp_path):
    with root_at(tmp_path):
        f = tmp_path / 'w'
        f.write_bytes(b'one')
        time.sleep(1.1)
        file_sums([f])
        kept = models_path('.sums.json')
        kept.write_text(kept.read_text().replace(sha256(f), '0' * 64))
        assert file_sums([f]) == {f: sha256(f)}
