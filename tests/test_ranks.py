"Ranks end with whoever started them"
import os, signal, subprocess, sys, time
import pytest

def _alive(pid):  # a zombie is not
    try: return open(f'/proc/{pid}/stat').read().rsplit(')', 1)[1].split()[0] != 'Z'
    except OSError: return False

@pytest.mark.skipif(sys.platform != 'linux', reason='only Linux tells a process that its parent has died')
def test_ranks_die_with_their_parent(tmp_path):
    (tmp_path/'job.py').write_text('import os, sys, time\nfrom competition_kit.ranks import *\n'
        'def work(folder, p):\n    (folder/f"pid-{rank()}").write_text(str(os.getpid()))\n    time.sleep(300)\nas_rank(sys.argv[1], work)')
    code = f"from pathlib import Path; from competition_kit.ranks import launch; launch(Path({str(tmp_path)!r}), {{}}, 2, {str(tmp_path/'job.py')!r})"
    driver = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    def pids(): return [int(f.read_text() or 0) for f in tmp_path.glob('pid-*')]
    until = time.time()+90
    while (len(pids()) < 2 or not all(pids())) and driver.poll() is None and time.time() < until: time.sleep(.05)
    ranks = pids()
    assert len(ranks) == 2 and all(map(_alive, ranks))
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    while any(map(_alive, ranks)) and time.time() < until: time.sleep(.05)
    try: assert not any(map(_alive, ranks))
    finally:
        for p in ranks:
            if _alive(p): os.kill(p, signal.SIGKILL)
