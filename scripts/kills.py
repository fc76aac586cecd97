"""Kill a tiny run again and again, and see what is left of it: python scripts/kills.py [--n 100]

Five parts, each counted in nbs/results/data/kills.json (see `--out`):

1. `random`: SIGKILL at a random moment of a run, from its start to its end: imports (in the `fresh`
   ones, which are commands started anew), embedding, training, saving and scoring. It is started
   again until it ends.
2. `run`: a process that ends at one operation on files (mkdir, write, fsync, rename, ...) of a run.
3. `save`: the same at every single operation of the save of a captioner over an older one.
4. `inside`: SIGKILL at a random moment while a row trains: stage 1, expert iteration, policy
   gradient or Gumbel. It goes on from its last checkpoint, and the logs have to be equal as well.
5. `full`: a full disk, from every single operation of that save on; and on a real file system, a
   tmpfs of few KiB, where mounting one is allowed.

What has to come out: captions, scores and weights of the unbroken run, and no file beside its own.
A trial takes some seconds, as all but the fresh ones are forked from a process that has imported
everything."""
import os
os.environ.update(OMP_NUM_THREADS='1', TQDM_DISABLE='1', HF_HUB_OFFLINE='1')
import errno, random, shutil, signal, subprocess, sys, tempfile, time, warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch
from fastcore.script import Param, call_parse
from grid import commit

recipe = dict(n_train=80, n_test=24, n_pairs=24, n_dev_pairs=4, steps=4, expert_rounds=1,
    expert_steps=3, expert_samples=1, expert_null=20, policy_steps=1, max_new_tokens=8,
    rows='stage1,stage2_expert', seed=3)
operations = ('mkdir', 'open', 'write', 'fsync', 'chmod', 'rename', 'replace', 'unlink', 'rmdir')
need_room = ('mkdir', 'write', 'fsync', 'rename', 'replace') # what a full disk can refuse


# ---- a run, and what it is worth

def train(place):
    "The tiny run, with its features and temporary files in a place of its own"
    from clipcap_ssl import load_config, run
    settings(place)
    run(load_config('scenes', **recipe), place/'run', say=lambda o: None)

# the run of `inside`: its rows train for longer, and nothing is scored, as Java would take longer
longer = dict(recipe, steps=30, expert_rounds=2, expert_steps=12, policy_steps=8, gumbel_steps=8,
    checkpoint_every=3, rows='stage1,stage2_expert,stage2_policy,stage2_gumbel')

def train_only(place):
    "The longer run, without the scores of its end"
    from clipcap_ssl import load_config, run
    from clipcap_ssl.pipeline import experiment
    def unscored(cfg, out, parts, *, rows, **_):
        captions = {r:experiment._read_row(out, r)['captions'] for r in rows}
        experiment._write_captions(out, parts, captions)
        return {}
    settings(place)
    with patch.object(experiment, 'score_run', unscored):
        run(load_config('scenes', **longer), place/'run', say=lambda o: None)

def settings(place):
    "Everything that is written goes to `place`"
    for name in ('home','tmp'): (place/name).mkdir(parents=True, exist_ok=True)
    os.environ.update(CLIPCAP_HOME=str(place/'home'), TMPDIR=str(place/'tmp'))
    tempfile.tempdir = str(place/'tmp')

def names(folder): return sorted(str(p.relative_to(folder)) for p in folder.rglob('*'))

def tensors(folder):
    "Weights of a captioner, as bytes"
    from safetensors.torch import load_file
    found = load_file(folder/'model.safetensors')
    return {k:v.numpy().tobytes() for k,v in found.items()}

def trained(place):
    "Captions, logs and weights of a run"
    out = place/'run'
    weights = {str(f.parent.relative_to(out)):tensors(f.parent)
               for f in out.rglob('model.safetensors')}
    return weights,*[(out/name).read_text() for name in ('captions.jsonl','log.jsonl')]

def worth(place):
    "Scores, captions, logs and weights of a run"
    from clipcap_ssl.core import read_json
    rows = read_json(place/'run'/'scores.json')['rows']
    scores = {row:{k:v for k,v in o.items() if k!='cpu_seconds'} for row,o in rows.items()}
    return scores,trained(place)

def forked(call, *args):
    "A process that calls a function and ends"
    sys.stdout.flush()
    pid = os.fork()
    if pid: return pid
    status = 1
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_WRONLY)
        for fd in (1, 2): os.dup2(null, fd)
        warnings.simplefilter('ignore')
        call(*args)
        status = 0
    except OSError as e: status = 3 if 'Make room' in str(e) and '\n' not in str(e) else 1
    finally: os._exit(status)

def ended(pid):
    "Exit status of a process; minus the signal that ended it"
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try: os.killpg(pid, signal.SIGKILL)      # what it had started: the judge in Java
    except ProcessLookupError: pass
    return status

def finish(place, call=train):
    "Start the run until it has ended; how often"
    for n in range(1, 6):
        if ended(forked(call, place))==0: return n
    raise SystemExit(f'{place}: five starts did not bring the run to its end')

def verdict(place, wanted, files):
    "Is a run that was finished equal to the unbroken one, and what lies beside its files?"
    beside = sorted(set(names(place))-files)
    return worth(place)==wanted,beside


# ---- ends and full disks at an operation

@contextmanager
def at_operation(n, happens, seen=None, *, among=operations):
    "Let something happen at the n-th operation on files, and at those that follow"
    count = [n]
    def counted(call, half=None):
        def run(*args, **kwargs):
            count[0] -= 1
            if seen is not None: seen.append(call.__name__)
            if count[0]<=0:
                if half: half(*args)
                happens(count[0])
            return call(*args, **kwargs)
        return run
    def half(path, data):
        "The first half of a write"
        with path.open('wb') as f: f.write(data[:len(data)//2])
    was = {o:getattr(os, o) for o in among if o!='write'}
    write = Path.write_bytes
    for o,call in was.items(): setattr(os, o, counted(call))
    Path.write_bytes = counted(write, half)
    try: yield
    finally:
        for o,call in was.items(): setattr(os, o, call)
        Path.write_bytes = write

def end(_): os._exit(9)

def no_room(_): raise OSError(errno.ENOSPC, 'No space left on device')

def happening(n, happens, call, *args, among=operations):
    "Call a function, with something that happens at its n-th operation"
    with at_operation(n, happens, among=among): call(*args)

def count(call, *args, among=operations):
    "How many operations a function has"
    seen = []
    with at_operation(10**9, None, seen, among=among): call(*args)
    return len(seen)


# ---- the five parts

def random_kills(place, wanted, files, *, n, fresh, rng, keep):
    "1. SIGKILL at random"
    def forked_run(here): return forked(train, here)
    def fresh_run(here):
        settings(here)
        sets = [o for k,v in recipe.items() for o in ('--set', f'{k}={v}')]
        code = 'from clipcap_ssl.pipeline.cli import clipcap_train\nclipcap_train()\n'
        (here/'clipcap_train').write_text(code)
        call = [sys.executable, here/'clipcap_train', 'scenes', *sets, '--device', 'cpu']
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return subprocess.Popen([*call, '--out', here/'run'], start_new_session=True, **quiet).pid
    took,found = {},dict(kills=0, equal=0, leftovers=0, too_late=0, fresh=fresh)
    for start in (forked_run, fresh_run):
        here,began = place/f'time-{start.__name__}',time.time()
        here.mkdir()
        assert ended(start(here))==0
        took[start] = time.time()-began
    found['seconds_of_a_run'] = [round(o, 1) for o in took.values()]
    i = 0
    while found['kills']<n:
        start = fresh_run if found['kills']<fresh else forked_run
        here = place/f'random{i}'
        here.mkdir()
        pid = start(here)
        time.sleep(rng.uniform(0, took[start]))
        os.kill(pid, signal.SIGKILL)
        killed = ended(pid)==-signal.SIGKILL
        finish(here)
        (here/'clipcap_train').unlink(missing_ok=True)
        equal,beside = verdict(here, wanted, files)
        found['too_late' if not killed else 'kills'] += 1
        if killed: found['equal'] += equal
        found['leftovers'] += len(beside)
        if beside or not equal: print(here, equal, beside)
        else: shutil.rmtree(here)
        keep(found)
        i += 1
    return found

def lines(file): return len(file.read_bytes().splitlines()) if file.is_file() else 0

def inside_kills(place, *, n, rng, keep):
    "4. SIGKILL while a row trains"
    whole = place/'whole'
    assert ended(forked(train_only, whole))==0
    wanted,files = trained(whole),set(names(whole))
    steps = {row:lines(whole/'run'/'rows'/f'{row}.log.jsonl') for row in longer['rows'].split(',')}
    found = dict(kills=0, equal=0, leftovers=0, too_late=0, resumed_inside=0, rows={})
    while found['kills']<n:
        # 1) a random step of a random row, and a random moment of it
        row = rng.choice(list(steps))
        at,here = rng.randrange(1, steps[row]),place/f"inside{found['kills']+found['too_late']}"
        here.mkdir()
        pid = forked(train_only, here)
        log,done = (here/'run'/'rows'/f'{row}{end}' for end in ('.log.jsonl','.json'))
        while lines(log)<at and not done.is_file(): time.sleep(.002)
        time.sleep(rng.uniform(0, .1))
        os.kill(pid, signal.SIGKILL)
        killed = ended(pid)==-signal.SIGKILL and not done.is_file()
        has_state = (here/'run'/'states'/row/'state.json').is_file()
        # 2) go on, and compare
        finish(here, train_only)
        equal,beside = trained(here)==wanted,sorted(set(names(here))-files)
        found['kills' if killed else 'too_late'] += 1
        found['leftovers'] += len(beside)
        if killed:
            found['equal'] += equal
            found['resumed_inside'] += has_state
            found['rows'][row] = found['rows'].get(row, 0)+1
        if beside or not equal: print(here, row, at, equal, beside)
        else: shutil.rmtree(here)
        keep(found)
    return found

def run_ends(place, wanted, files, *, points):
    "2. A run that ends at an operation"
    whole = place/'counted'
    total = count(train, whole)
    found = dict(operations=total, points=0, ended=0, equal=0, leftovers=0)
    for k in sorted({1+round(i*(total-1)/max(points-1, 1)) for i in range(points)}):
        here = place/f'op{k}'
        found['ended'] += ended(forked(happening, k, end, train, here))==9
        finish(here)
        equal,beside = verdict(here, wanted, files)
        found['points'] += 1
        found['equal'] += equal
        found['leftovers'] += len(beside)
        if beside or not equal: print(here, equal, beside)
        else: shutil.rmtree(here)
    return found

def saver(place, whole):
    "A captioner with an older one in a folder, and the function that saves it there"
    from clipcap_ssl import Captioner
    model = Captioner.from_pretrained(whole/'run'/'captioner')
    folder = place/'saved'
    def save(stage):
        shift = 0. if stage=='old' else 1.
        with_shift(model, shift)
        model.set_card(stage=stage).save_pretrained(folder, beside={'beside.json': [stage]})
    return model,folder,save

def with_shift(model, value):
    "Weights that tell which save they are of"
    import torch
    with torch.no_grad(): model.null_prefix.fill_(value)

def state(folder):
    "Which save a folder loads as: of its card and of its weights"
    from clipcap_ssl import Captioner
    from clipcap_ssl.core import read_json
    model = Captioner.from_pretrained(folder)
    weights = 'new' if float(model.null_prefix.detach().flatten()[0])==1 else 'old'
    beside = read_json(folder/'beside.json')[0]
    return {model.facts['stage'], weights, beside}

def save_ends(place, whole):
    "3. A save that ends at each operation"
    model,folder,save = saver(place, whole)
    save('old')
    own,total = names(folder),count(save, 'new')
    found = dict(operations=total, ended=0, old=0, new=0, mixed=0, leftovers=0)
    for k in range(1, total+1):
        save('old')
        found['ended'] += ended(forked(happening, k, end, save, 'new'))==9
        loads = state(folder)
        found[loads.pop() if len(loads)==1 else 'mixed'] += 1
        save('old')
        found['leftovers'] += len(set(names(folder))-set(own))
    return found

def full_disk(place, whole):
    "5. A disk that is full from each operation on, and a real one that is"
    model,folder,save = saver(place, whole)
    save('old')
    own,total = names(folder),count(save, 'new', among=need_room)
    found = dict(operations=total, one_line=0, old=0, new=0, mixed=0, leftovers=0)
    for k in range(1, total+1):
        save('old')
        refused = partial(happening, among=need_room)
        found['one_line'] += ended(forked(refused, k, no_room, save, 'new'))==3
        loads = state(folder)
        found[loads.pop() if len(loads)==1 else 'mixed'] += 1
        found['leftovers'] += len(set(names(folder))-set(own))
    save('old')
    size = sum(f.stat().st_size for f in folder.iterdir())//1024
    disk = place/'disk'
    disk.mkdir()
    tmpfs = dict(mounted=0, full=0, one_line=0, mixed=0, leftovers=0)
    for more in range(0, size+40, max(size//12, 4)):
        mount = ['mount', '-t', 'tmpfs', '-o', f'size={size+40+more}k', 'tmpfs', str(disk)]
        if subprocess.run(mount, capture_output=True).returncode: break
        try:
            there = disk/'saved'
            shutil.copytree(folder, there)
            def save_there():
                with_shift(model, 1.)
                model.set_card(stage='new').save_pretrained(there)
            status = ended(forked(save_there))
            tmpfs['mounted'] += 1
            tmpfs['full'] += status!=0
            tmpfs['one_line'] += status==3
            loads = {o for o in state(there)}
            tmpfs['mixed'] += status!=0 and loads!={'old'}
            tmpfs['leftovers'] += len(set(names(there))-set(own))
        finally: subprocess.run(['umount', str(disk)], check=True)
    return dict(found, tmpfs=tmpfs)


@call_parse
def kills(
    n:int=100, # random kills
    fresh:int=20, # of them in commands that are started anew
    points:int=40, # operations of a run at which it ends
    seed:int=0, # of the moments
    out:str='nbs/results/data/kills.json', # the result; parts that are not run again stay in it
    inside:int=20, # kills while a row trains
    only:Param('save, full, run, inside or random; default: all', str, nargs='+')=None,
):
    "Kill runs and saves, and write what came of it"
    from clipcap_ssl.core import read_json, write_json
    from clipcap_ssl.pipeline import cli, experiment
    warnings.simplefilter('ignore')
    began,rng = time.time(),random.Random(seed)
    with tempfile.TemporaryDirectory() as d:
        d = Path(d).resolve()
        whole,wanted,files = d/'whole',None,None
        if only!=['inside']:
            assert ended(forked(train, whole))==0
            wanted,files = worth(whole),set(names(whole))
        found = read_json(out) if only and Path(out).is_file() else {}
        def keep(name, part):
            found[name] = dict(part, commit=commit(), seed=seed)
            write_json(out, found)
        steps = dict(
            save=lambda place: save_ends(place, whole),
            full=lambda place: full_disk(place, whole),
            run=lambda place: run_ends(place, wanted, files, points=points),
            inside=lambda place: inside_kills(place, n=inside, rng=rng,
                                             keep=partial(keep, 'inside')),
            random=lambda place: random_kills(place, wanted, files, n=n, fresh=fresh, rng=rng,
                                             keep=partial(keep, 'random')))
        for name,step in steps.items():
            if only and name not in only: continue
            (d/name).mkdir()
            keep(name, step(d/name))
            print(name, found[name], f'{time.time()-began:.0f} s', flush=True)
