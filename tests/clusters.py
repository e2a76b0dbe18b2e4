"""One machine as a cluster, for `test_clusters.py`: Debian's Slurm as two nodes with fake GPUs, Ray on 127.0.0.1, and a
`kubectl` that runs the pods it is given as processes"""
import contextlib, json, os, psutil, secrets, shutil, socket, subprocess, sys, tempfile, time, urllib.request
from pathlib import Path
from competition_kit.core import die_with_parent

SLURM_PROGRAMS = 'munged slurmctld slurmd sbatch squeue scancel sinfo'.split()

def ray_program(): return os.environ.get('CK_RAY') or shutil.which('ray')  # `ray` of an environment with ray[default]

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def until(true, seconds, what): # waits for a condition
    end = time.monotonic()+seconds
    while not true():
        if time.monotonic() > end: raise TimeoutError(what)
        time.sleep(.2)

class Processes: # of a cluster, in the foreground, in a folder of its own; they end with the test
    def __enter__(self):
        self.folder, self.running = Path(tempfile.mkdtemp(prefix=f'ck-{self.kind}-')), {}
        self.begin()
        return self

    def start(self, name, *words):
        with open(self.folder/f'{name}.out', 'ab') as log:
            how = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=die_with_parent)
            self.running[name] = subprocess.Popen([str(w) for w in words], env=os.environ | self.env, **how)

    def ask(self, *words): # the output of a command
        return subprocess.run(words, env=os.environ | self.env, capture_output=True, text=True).stdout.strip()

    def end(self, name):
        process = self.running.pop(name)
        process.terminate()
        process.wait()

    @contextlib.contextmanager
    def away(self): # it answers nothing within the block, and for some seconds after it
        self.go_away()
        try:
            yield
            time.sleep(self.seconds_away)
        finally: self.come_back()

    def stop(self): # all jobs
        self.cancel()
        with contextlib.suppress(TimeoutError): until(lambda: not self.live(), 30, 'jobs remain')

    def __exit__(self, *error):
        self.stop()
        for process in self.running.values(): process.terminate()
        for process in self.running.values():
            with contextlib.suppress(subprocess.TimeoutExpired): process.wait(20)
            process.kill()
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

SLURM_CONF = '''ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=1,batch_sched_delay=0
MinJobAge=300
KillWait=5
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs=4 RealMemory=8000 Gres=gpu:4
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs=4 RealMemory=8000 Gres=gpu:4
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
'''

class SlurmHere(Processes):
    "Slurm without systemd, cgroups and accounting; one host plays two nodes"
    kind, seconds_away = 'slurm', 10
    def lacking(self): return [p for p in SLURM_PROGRAMS if not shutil.which(p)]

    def begin(self):
        f, host = self.folder, socket.gethostname().split('.')[0]
        f.chmod(0o755)
        for name in 'state spool.n1 spool.n2'.split(): (f/name).mkdir()
        ports = dict(port=free_port(), port1=free_port(), port2=free_port())
        (f/'slurm.conf').write_text(SLURM_CONF.format(host=host, folder=f, **ports))
        (f/'gres.conf').write_text(''.join(self.gpus(node) for node in ('n1', 'n2')))
        (f/'munge.key').write_bytes(secrets.token_bytes(128))
        (f/'munge.key').chmod(0o600)
        self.env = dict(SLURM_CONF=str(f/'slurm.conf'))
        files = [f'--{k}={f}/munge{end}' for k, end in (('key-file', '.key'), ('socket', '.sock'), ('pid-file', '.pid'),
                                                        ('log-file', '.log'), ('seed-file', '.seed'))]
        self.start('munged', 'munged', '--foreground', '--force', *files)
        until((f/'munge.sock').exists, 10, 'munged does not start')
        self.come_back()
        for node in ('n1', 'n2'): self.start(node, 'slurmd', '-D', '-N', node)
        until(lambda: self.ask('sinfo', '-h', '-N', '-o', '%T').split() == ['idle']*2, 30, 'the nodes do not come up')

    def gpus(self, node): # lines of gres.conf; a fake GPU is a second /dev/null
        for k in range(4): os.mknod(self.folder/f'{node}-gpu{k}', 0o666 | 0o020000, os.makedev(1, 3))
        return f'NodeName={node} Name=gpu File={self.folder}/{node}-gpu[0-3]\n'

    def go_away(self): self.end('slurmctld')
    def come_back(self): self.start('slurmctld', 'slurmctld', '-D')

    def jobs(self): # (name, state) of each job that it has had
        return [line.split('|') for line in self.ask('squeue', '-h', '-t', 'all', '-o', '%j|%T').split()]

    def live(self): # ids and names
        return [line.split('|') for line in self.ask('squeue', '-h', '-o', '%i|%j').split()]

    def cancel(self, name=''): # the live jobs whose name contains this
        if ids := [id for id, job in self.live() if name in job]: self.ask('scancel', *ids)

class RayHere(Processes):
    "Ray with a token, bound to 127.0.0.1, with eight faked GPUs"
    kind, seconds_away = 'ray', 25  # a request waits for 20
    def lacking(self): return [] if ray_program() else ['ray']

    def begin(self):
        f, self.port = self.folder, free_port()
        (f/'token').write_text(secrets.token_hex(32))
        (f/'token').chmod(0o600)
        self.env = dict(RAY_AUTH_MODE='token', RAY_AUTH_TOKEN_PATH=str(f/'token'), RAY_worker_niceness='0',
                        RAY_API_SERVER_ADDRESS=f'http://127.0.0.1:{self.port}',
                        RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER='0',       # else its ports are open to the network
                        RAY_JOB_START_TIMEOUT_SECONDS='604800')      # else a job that waits 15 minutes has failed
        self.start('ray', ray_program(), 'start', '--head', '--block', '--node-ip-address=127.0.0.1',
                   f'--port={free_port()}', '--dashboard-host=127.0.0.1', f'--dashboard-port={self.port}',
                   '--num-cpus=8', '--num-gpus=8', '--object-store-memory=100000000', f'--temp-dir={f}/ray',
                   '--disable-usage-stats')
        until(lambda: self.answer() is not None, 90, 'Ray does not start')

    def answer(self, path='', method='GET'): # of its job server; None while it is away
        url, token = f'http://127.0.0.1:{self.port}/api/jobs/{path}', (self.folder/'token').read_text()
        request = urllib.request.Request(url, headers=dict(Authorization=f'Bearer {token}'), method=method)
        try:
            with urllib.request.urlopen(request, timeout=5) as answer: return json.loads(answer.read())
        except OSError: return None

    def server(self): # the process that answers
        found = psutil.Process(self.running['ray'].pid).children(recursive=True)
        return next(p for p in found if 'dashboard/dashboard.py' in ' '.join(p.cmdline()))

    def go_away(self): self.server().suspend()
    def come_back(self): self.server().resume()

    def jobs(self): # (name, state) of each job that it has had
        return [[j['submission_id'], j['status']] for j in self.answer()]

    def live(self): # ids and names
        return [(id, id) for id, state in self.jobs() if state in ('PENDING', 'RUNNING')]

    def cancel(self, name=''): # the live jobs whose name contains this
        for id, job in self.live():
            if name in job: self.answer(f'{id}/stop', 'POST')

KUBECTL = '''#!PYTHON
import fcntl, json, os, re, signal, subprocess, sys, time
from pathlib import Path
folder, (what, *words) = Path(__file__).parent, sys.argv[1:]
names = [w for w in words if not w.startswith('-')]
if (folder/'away').exists(): sys.exit('The connection to the server 127.0.0.1:6443 was refused')

def note(id, **facts): # of a job; a file each, so that nothing is read half written
    for key, value in facts.items():
        (folder/f'{id}.{key}.tmp').write_text(json.dumps(value))
        (folder/f'{id}.{key}.tmp').rename(folder/f'{id}.{key}')
def noted(id, key): return json.loads((folder/f'{id}.{key}').read_text()) if (folder/f'{id}.{key}').exists() else None
def shown(id): return dict(noted(id, 'job'), status=dict(conditions=noted(id, 'ended') or []))
def known(): return [f.stem for f in sorted(folder.glob('*.job')) if noted(f.stem, 'gone') is None]

def take(n): # so many of four GPUs, until this process ends
    while True:
        held = []
        for k in range(4):
            file = open(folder/f'gpu-{k}', 'w')
            try: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError: continue
            held.append((k, file))
            if len(held) == n: return held
        del held
        time.sleep(.2)

def pod(id): # runs its command and notes how it ended
    spec = noted(id, 'job')['spec']['template']['spec']['containers'][0]
    gpus = int(spec['resources']['limits'].get('nvidia.com/gpu', 0))
    held = take(gpus) if gpus else []
    env = {e['name']: e['value'] for e in spec['env']} | dict(CUDA_VISIBLE_DEVICES=','.join(str(k) for k, _ in held))
    code = subprocess.run(spec['command'], cwd=spec['workingDir'], env=os.environ | env).returncode
    note(id, ended=[dict(type='Failed' if code else 'Complete', status='True')])

if what == 'create':
    job = json.load(sys.stdin)
    id, spec = job['metadata']['name'], job['spec']['template']['spec']
    assert re.fullmatch('[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?', id) and spec['restartPolicy'] == 'Never'
    assert {m['name'] for m in spec['containers'][0]['volumeMounts']} == {v['name'] for v in spec['volumes']}
    note(id, job=job)
    quiet = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    note(id, pid=subprocess.Popen([sys.executable, __file__, 'pod', id], start_new_session=True, **quiet).pid)
elif what == 'pod': pod(*names)
elif names[0] == 'jobs' and what == 'get': print(json.dumps(dict(items=[shown(id) for id in known()])))
elif what == 'get':
    if names[1] in known(): print(json.dumps(shown(names[1])))
elif what == 'delete':
    for id in names[1:]:
        note(id, gone=True)
        if not noted(id, 'ended'):
            try: os.killpg(noted(id, 'pid'), signal.SIGKILL)
            except ProcessLookupError: pass
'''

class KubernetesHere(Processes):
    "No Kubernetes: a `kubectl` whose pods are processes with one of four GPUs that do not exist"
    kind, seconds_away = 'kubernetes', 10
    def lacking(self): return []

    def begin(self):
        (self.folder/'kubectl').write_text(KUBECTL.replace('PYTHON', sys.executable))
        (self.folder/'kubectl').chmod(0o755)
        self.env = dict(PATH=f"{self.folder}:{os.environ['PATH']}")

    def go_away(self): (self.folder/'away').touch()
    def come_back(self): (self.folder/'away').unlink()

    def jobs(self): # (name, state) of each job that it has had
        found = [json.loads(f.read_text())['metadata'] for f in sorted(self.folder.glob('*.job'))]
        return [(m['annotations']['ck'], (self.folder/f"{m['name']}.ended").exists()) for m in found]

    def live(self): # ids and names
        items = json.loads(self.ask('kubectl', 'get', 'jobs') or '{}').get('items', [])
        alive = [j['metadata'] for j in items if not j['status']['conditions']]
        return [(m['name'], m['annotations']['ck']) for m in alive]

    def cancel(self, name=''): # the live jobs whose name contains this
        if ids := [id for id, job in self.live() if name in job]: self.ask('kubectl', 'delete', 'jobs', *ids)
