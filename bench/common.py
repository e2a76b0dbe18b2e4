"What the bench scripts share: clocks, processes, the name of the machine, and one JSON line a result."
import ctypes, json, multiprocessing, os, signal, statistics, sys, time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from competition_kit.core import device_name, now, versions

def wait_for_gpu():
    "Wait until the GPU has done all that was started; without torch or a GPU there is nothing to wait for"
    torch = sys.modules.get('torch')
    if torch and torch.cuda.is_available(): torch.cuda.synchronize()

def gpus() -> list: # As for `CUDA_VISIBLE_DEVICES`; one name on a machine without a GPU
    "The GPUs that this process may use"
    import torch
    visible = os.environ.get('CUDA_VISIBLE_DEVICES')
    return visible.split(',') if visible else list(map(str, range(max(1, torch.cuda.device_count()))))

def workers(
    jobs:int,  # Processes on each GPU
    begin,  # Function of a process, called once with its GPU's name
): # A pool of fresh processes
    "Processes that share the GPUs, and end with the process that has begun them"
    names, spawn = gpus(), multiprocessing.get_context('spawn')
    return ProcessPoolExecutor(jobs*len(names), spawn, _take_gpu, (begin, names, spawn.Value('i', 0)))

def _take_gpu(begin, names, counter):
    with counter.get_lock():
        counter.value += 1
        k = counter.value
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, for a script that was killed
    os.environ.update(CUDA_VISIBLE_DEVICES=names[k % len(names)], TOKENIZERS_PARALLELISM='false')
    begin()

def results(
    pool,  # From `workers`
    f,  # Function of a job
    jobs,  # Tuples of its arguments
    until=float('inf'),  # Time of `time.time`, after which no further job is begun
): # Results, as the jobs end
    "Run jobs in a pool; what one call leaves undone, the next call of the script can do"
    jobs, running = iter(jobs), set()
    while True:
        while len(running) < pool._max_workers and time.time() < until and (job := next(jobs, None)):
            running.add(pool.submit(f, *job))
        if not running: return
        done, running = wait(running, return_when=FIRST_COMPLETED)
        for r in done: yield r.result()

def timed(
    f,  # Function
    *args,  # Its arguments
    **kw  # Its arguments by name
): # (result, seconds)
    "One call and its time, the GPU's work included"
    wait_for_gpu()
    start = time.perf_counter()
    result = f(*args, **kw)
    wait_for_gpu()
    return result, time.perf_counter()-start

def times(
    f,  # Function without arguments
    repeat:int=5,  # Calls that are timed
    warm:int=1  # Calls before them that are not
) -> list: # Seconds of each timed call
    "Call a function several times"
    for _ in range(warm): f()
    return [timed(f)[1] for _ in range(repeat)]

def median_seconds(f, repeat:int=5, warm:int=1) -> float:
    "Median of `times`"
    return statistics.median(times(f, repeat, warm))

def alternate(
    functions,  # Name → function without arguments
    repeat:int=5,  # Rounds that are timed
    warm:int=1  # Rounds before them that are not
) -> dict: # Name → seconds of each timed call
    "Time peers in turns, so that a busy moment of the machine hits all of them"
    took = {name: [] for name in functions}
    for k in range(warm+repeat):
        for name, f in functions.items():
            _, seconds = timed(f)
            if k >= warm: took[name].append(seconds)
    return took

def machine(
    *packages  # Names of packages whose versions matter
) -> dict: # `machine`, `date`, and package → version
    "What a result must name beside its numbers"
    installed = versions()
    return dict(machine=device_name(), date=now()[:10], **{p: installed[p] for p in packages if p in installed})

def report(
    *packages,  # Names of packages whose versions matter
    **values  # Name → value; floats are rounded to four digits
):
    "Print one result as one JSON line, with the machine and the date"
    short = {k: float(f'{v:.4g}') if isinstance(v, float) else v for k, v in values.items()}
    print(json.dumps(short | machine(*packages), ensure_ascii=False), flush=True)
