"""The offline package for `cpu`: built, then run by papermill in a network namespace of its own, whole and with
planted faults. `python bench/bundle.py` prints a JSON line for each. It needs pip's index and `unshare -rn`."""
import contextlib, json, os, shutil, signal, subprocess, sys, tempfile, threading, time
from pathlib import Path
from common import report, timed
from competition_kit.bundle import bundle, package_sizes, targets
from competition_kit.core import data_path, read_json, root_at
from competition_kit.record import run_stage
from competition_kit.sample import write_arena
from competition_kit.submission import check_submission

offline = ['unshare', '-rn', 'sh', '-c', 'ip link set lo up && exec "$@"', 'sh']  # Jupyter talks to its kernel over lo

def can_go_offline() -> bool:
    "Does this machine allow a network namespace?"
    return bool(shutil.which('unshare')) and not subprocess.run([*offline, 'true'], capture_output=True).returncode

def has_network() -> bool:
    "Can a process in the namespace reach anything? It must not"
    ask = 'import socket; socket.create_connection(("1.1.1.1", 53), 3)'
    return not subprocess.run([*offline, sys.executable, '-c', ask], capture_output=True).returncode

def vote_of_small_runs(n_test=60): # Id of a finished vote of three runs over a random base
    "Three small runs on the sample and their vote, in the project root of now"
    from competition_kit.base import tiny_base
    from competition_kit.core import project_root
    from competition_kit.train import train_fold
    from competition_kit.vote import VoteArgs, vote
    data_path('sample_arena').mkdir(parents=True)
    write_arena(data_path('sample_arena'), 60, n_test, 0)
    tiny = dict(base=tiny_base(project_root()/'tiny'), max_len=192, lora_r=4, dtype='fp32', epochs=.5)
    for seed, fold in ((0, 0), (0, 1), (1, 0)): train_fold(seed=seed, fold=fold, **tiny)
    return run_stage(vote, VoteArgs()).id

def run_notebook(
    package,        # From `bundle`
    sample,         # The host's sample submission; the test file lies beside it
    folder,         # Where the submission and the environment go
    minutes:float,  # Until the deadline
    during=None     # Function of the folder, called in a thread while the notebook runs
) -> dict: # What the notebook reports, and `seconds`
    "Run the submission notebook without a network, and check the submission that it leaves"
    folder.mkdir()
    settings = dict(PACKAGE=package, SAMPLE=sample, OUT=folder/'submission.csv', MINUTES=minutes, WORK=folder/'work')
    words = [w for k, v in settings.items() for w in ('-p', k, str(v))]
    papermill = [sys.executable, '-m', 'papermill', str(package/'submit.ipynb'), str(folder/'run.ipynb')]
    command = [*offline, *papermill, *words]
    if during: threading.Thread(target=during, args=(folder,), daemon=True).start()
    start = time.time()
    p = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if p.returncode: raise RuntimeError(p.stderr[-2000:])
    check_submission(folder/'submission.csv', sample, 'preference')
    return dict(read_json(folder/'missing.json'), seconds=round(time.time()-start, 1))

def kill_the_vote(folder, seconds=300):
    "Kill the process of the vote as soon as its first model has predicted"
    end = time.time()+seconds
    while time.time() < end:
        for file in folder.glob('work/root/models/vote-*/missing.json'):
            with contextlib.suppress(ValueError, OSError):
                found = json.loads(file.read_text())
                if found['no_model'] < found['rows']: return _kill_in(folder/'work/root')
        time.sleep(.02)

def _kill_in(root): # the processes that work in a folder of this bench
    for p in Path('/proc').glob('[0-9]*'):
        with contextlib.suppress(OSError):
            if Path(os.readlink(p/'cwd')) == root.resolve(): os.kill(int(p.name), signal.SIGKILL)

def without_a_model(package, folder): # the copy
    "Link the package into another folder, where the adapter of one run is missing"
    broken = folder/'broken'
    shutil.copytree(package, broken, copy_function=os.link)
    run = read_json(broken/'bundle.json')['runs'][-1]['run']
    (broken/f'models/{run}/adapter/adapter_model.safetensors').unlink()
    return broken

def main():
    if not can_go_offline(): sys.exit('no network namespace can be made here')
    with tempfile.TemporaryDirectory() as tmp, root_at(Path(tmp)/'project') as root:
        vote, tmp = vote_of_small_runs(600), Path(tmp)
        package, took = timed(bundle, [vote], 'cpu', tmp/'package')
        gb = package_sizes(package, targets['cpu']).GB.to_dict()
        report('torch', what='built', seconds=took, GB=gb, network=has_network())
        sample = root/'data/sample_arena/sample_submission.csv'
        report(what='run', **run_notebook(package, sample, tmp/'whole', 30))
        report(what='a model is missing', **run_notebook(without_a_model(package, tmp), sample, tmp/'missing', 30))
        report(what='the engine is killed', **run_notebook(package, sample, tmp/'killed', 30, kill_the_vote))
        report(what='a budget of 0.2 minutes', **run_notebook(package, sample, tmp/'short', .2))

if __name__ == '__main__': main()
