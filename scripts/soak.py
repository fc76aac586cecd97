"""Does memory grow? python scripts/soak.py [--minutes 10] [--only policy]

Each route of stage 2, every decoder, and captions of 5,000 drawn photos run again and again for some
minutes, each in a process of its own. Every five seconds we note its memory and its open handles, in
nbs/results/data/soak.json (see `--out`): `seconds`, `mb`, `handles`, the times it went round, and
the slope of the second half in MB per minute. A page of results draws them."""
import os
os.environ.update(OMP_NUM_THREADS='1', TQDM_DISABLE='1', HF_HUB_OFFLINE='1')
import tempfile, threading, time, warnings
from functools import partial
from multiprocessing import get_context
from pathlib import Path
import numpy as np, psutil
from fastcore.script import call_parse
from grid import commit

routes = ('expert', 'policy', 'gumbel')
kinds = (*routes, 'decoding', 'captioning')


def parts():
    "A captioner, its encoder, photos without captions and labelled pairs"
    from clipcap_ssl import load_config
    from clipcap_ssl.pipeline.experiment import _new, _tokenized
    from clipcap_ssl.pipeline.setup import prepare
    cfg = load_config('scenes', n_train=400, n_test=20, n_pairs=60, n_dev_pairs=10)
    found = prepare(cfg)
    model = _new(cfg, found)
    return cfg,found,model,_tokenized(found, model, found.labels_to_train)

def route(name):
    "A function that trains a little by one route of stage 2"
    from clipcap_ssl.rewards.reward import contrastive_reward
    from clipcap_ssl.train.expert import train_expert
    from clipcap_ssl.train.gumbel import train_gumbel
    from clipcap_ssl.train.policy import train_policy
    cfg,found,model,labelled = parts()
    same = dict(labelled=labelled, max_new_tokens=cfg.max_new_tokens, seed=0)
    if name=='expert':
        return partial(train_expert, model, found.x, found.encoder, **same, rounds=1, n_steps=10,
                       n_samples=1, n_null=100, top=2)
    if name=='gumbel':
        return partial(train_gumbel, model, found.x, found.encoder, **same, bank=found.x[:64],
                       scale=cfg.scale, batch_size=16, n_steps=10)
    reward = contrastive_reward(found.encoder, found.x[:64], cfg.scale)
    return partial(train_policy, model, found.x, reward, **same, n_steps=10, batch_size=16)

def decoding():
    "A function that writes captions by every decoder"
    from clipcap_ssl.models.generate import beam, best_of_n, greedy, guided, sample
    cfg,found,model,_ = parts()
    x,same = found.x[:64],dict(max_new_tokens=cfg.max_new_tokens)
    def write():
        for decode in (greedy, partial(sample, seed=0), beam, guided): decode(model, x, **same)
        best_of_n(model, x, found.encoder, n=4, seed=0, **same)
    return write

def captioning(n):
    "A function that captions the next 500 of `n` drawn photos"
    from clipcap_ssl.data.scenes import ToyScenes
    _,found,model,_ = parts()
    model.attach(found.encoder).eval()
    photos,at = ToyScenes(n, seed=99),[0]
    def write():
        for _ in range(500//50):
            images = [photos.image((at[0]+i)%n) for i in range(50)]
            model.write(model.embed(images))
            at[0] += 50
    return write

def watch(seen, done):
    "Memory and handles of this process, every five seconds"
    me,began = psutil.Process(),time.time()
    while not done.wait(5.):
        seen['seconds'].append(round(time.time()-began, 1))
        seen['mb'].append(round(me.memory_info().rss/1e6, 1))
        seen['handles'].append(me.num_fds())

def soak(kind, seconds, photos):
    "One kind of work for some time; what was seen"
    warnings.simplefilter('ignore')
    work = route(kind) if kind in routes else decoding() if kind=='decoding' else captioning(photos)
    work()                                           # what is made once is made now
    seen,done,rounds = dict(seconds=[], mb=[], handles=[]),threading.Event(),0
    watcher = threading.Thread(target=watch, args=(seen, done))
    watcher.start()
    end = time.time()+seconds
    while time.time()<end:
        work()
        rounds += 1
    done.set()
    watcher.join()
    half = len(seen['mb'])//2
    t,mb = np.array(seen['seconds'][half:]),np.array(seen['mb'][half:])
    slope = float(np.polyfit(t/60, mb, 1)[0]) if len(t)>2 else 0.
    return dict(seen, rounds=rounds, mb_per_minute=round(slope, 3),
                handles_more=seen['handles'][-1]-seen['handles'][0] if seen['handles'] else 0)


@call_parse
def main(
    minutes:float=10., # of each kind
    only:str=None, # one kind: expert, policy, gumbel, decoding or captioning
    photos:int=5000, # drawn photos to caption
    out:str='nbs/results/data/soak.json', # the result
):
    "Watch memory and handles of long work"
    from clipcap_ssl.core import write_json
    found = dict(commit=commit(), minutes=minutes, photos=photos, kinds={})
    with tempfile.TemporaryDirectory() as home:
        os.environ['CLIPCAP_HOME'] = home
        for kind in kinds:
            if only not in (None, kind): continue
            with get_context('spawn').Pool(1) as pool:
                o = pool.apply(soak, (kind, 60*minutes, photos))
            found['kinds'][kind] = o
            print(kind, f"{o['rounds']} rounds, {o['mb_per_minute']} MB per minute, "
                  f"{o['handles_more']} handles more", flush=True)
            write_json(Path(out), found)
