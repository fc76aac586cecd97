"""Kill the making of a store of features, at any moment: python scripts/kill_features.py [--n 20]

Two parts, each counted in nbs/results/data/kill_features.json (see `--out`):

1. `random`: SIGKILL at a random moment, from the start of the work to its end. The `fresh` ones are
   the command `clipcap_features` as a shell starts it, imports included.
2. `operations`: a process that ends at one operation on files (mkdir, write, fsync, rename, ...):
   at every one of them, and in the middle of a write.

Each is started again until it ends. What has to come out is the store of the unbroken run: the same
files, byte by byte, and no other."""
import os
os.environ.update(OMP_NUM_THREADS='1', TQDM_DISABLE='1', HF_HUB_OFFLINE='1')
import random, shutil, signal, subprocess, sys, tempfile, time, warnings
from functools import partial
from pathlib import Path
from fastcore.script import Param, call_parse
from kills import count, end, ended, forked, happening
from store_bench import commit

def save_photos(folder, n, seed):
    "Scenes as PNG files, and one that is broken"
    from clipcap_ssl.data.scenes import ToyScenes
    folder.mkdir()
    ds = ToyScenes(n, seed=seed)
    for i in range(n): ds.image(i).save(folder/f'{i:04d}.png')
    (folder/'broken.png').write_bytes(b'\x89PNG\r\n')

def make(encoder, photos, out, rows):
    "The store, by the functions behind the command"
    from clipcap_ssl.data.store import embed_store, find_photos, merge_store
    ds = find_photos(photos)
    embed_store(encoder, ds, out, rows=rows, batch_size=8)
    merge_store(out, ds)

def command(script, photos, out, rows):
    "The command, started anew"
    call = [sys.executable, script, photos, '--encoder', 'toy', '--device', 'cpu', '--batch', 8]
    call = map(str, [*call, '--out', out, '--rows', rows])
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    return subprocess.Popen([*call], **quiet).pid

def content(folder):
    "Every file of a folder, as bytes"
    files = (p for p in folder.rglob('*') if p.is_file())
    return {str(p.relative_to(folder)):p.read_bytes() for p in files}

def verdict(found, out, wanted):
    "Count a store that was finished"
    made = content(out)
    found['equal'] += all(made.get(k)==v for k,v in wanted.items())
    found['leftovers'] += len(made.keys()-wanted.keys())

def killed(start, seconds):
    "Start, wait and kill; was it in time?"
    pid = start()
    time.sleep(seconds)
    try: os.kill(pid, signal.SIGKILL)
    except ProcessLookupError: pass
    return ended(pid)==-signal.SIGKILL

def finish(start):
    "Start until it ends well"
    for _ in range(3):
        if ended(start())==0: return
    raise SystemExit('three starts did not bring the work to its end')

def random_kills(starts, place, wanted, *, n, fresh, rng):
    "1. SIGKILL at random; a store that was finished before the kill is begun anew"
    found = dict(kills=0, too_late=0, fresh=fresh, equal=0, leftovers=0, seconds_of_a_run=[])
    for kind,trials in (('forked', n-fresh), ('command', fresh)):
        began = time.time()
        finish(partial(starts[kind], place/f'time-{kind}'))
        took = time.time()-began
        found['seconds_of_a_run'].append(round(took, 1))
        for i in range(trials):
            out = place/f'{kind}-{i}'
            start = partial(starts[kind], out)
            while not killed(start, rng.uniform(0, took)):
                found['too_late'] += 1
                shutil.rmtree(out)
            found['kills'] += 1
            finish(start)
            verdict(found, out, wanted)
    return found

def every_operation(make_at, place, wanted):
    "2. An end at each operation on files"
    total = count(make_at, place/'count')
    found = dict(operations=total, ended=0, equal=0, leftovers=0)
    for k in range(1, total+1):
        out = place/str(k)
        found['ended'] += ended(forked(happening, k, end, make_at, out))==9
        finish(partial(forked, make_at, out))
        verdict(found, out, wanted)
    return found

@call_parse
def kill_features(
    n:int=20, # stores that are killed at random
    fresh:int=5, # of them made by the command, started anew
    photos:int=80, # photos of a store, in shards of 20
    seed:int=0, # of the photos and the moments
    out:str='nbs/results/data/kill_features.json', # the result; other parts stay in it
    only:Param('random or operations; default: both', str, nargs='+')=None,
):
    "Kill the making of stores, and write what came of it"
    from clipcap_ssl.core import read_json, write_json
    from clipcap_ssl.models.encoder import load_encoder
    warnings.simplefilter('ignore')
    rng,encoder = random.Random(seed),load_encoder('toy')
    found = read_json(out) if only and Path(out).is_file() else {}
    with tempfile.TemporaryDirectory() as d:
        d = Path(d).resolve()
        save_photos(d/'photos', photos, seed)
        def make_at(place, rows=20): make(encoder, d/'photos', place, rows)
        script = d/'clipcap_features'
        script.write_text('from clipcap_ssl.data.store import clipcap_features\n'
                          'clipcap_features()\n')
        starts = dict(forked=lambda place: forked(make_at, place),
                      command=lambda place: command(script, d/'photos', place, 20))
        finish(partial(starts['forked'], d/'whole'))
        wanted = content(d/'whole')
        how = dict(n=n, fresh=fresh, rng=rng)
        parts = dict(random=lambda here: random_kills(starts, here, wanted, **how),
                     operations=lambda here: every_operation(make_at, here, wanted))
        for name,part in parts.items():
            if only and name not in only: continue
            (d/name).mkdir()
            found[name] = dict(part(d/name), commit=commit(), seed=seed)
            write_json(out, found)
            print(name, found[name], flush=True)
