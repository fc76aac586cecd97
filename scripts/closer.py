"""Two more trials of what could bring expert iteration nearer to full supervision in the second world, on the tuning seed and dev scenes:
the choice by features that are averaged over shifted pictures, and decoding by the consensus of several samples."""
import json, time
from pathlib import Path
import torch
from fastcore.script import call_parse
from PIL import ImageChops
from clipcap_ssl.core import read_json, write_text
from clipcap_ssl.data.base import Captioned, references
from clipcap_ssl.data.features import encode_dataset
from clipcap_ssl.models.consensus import most_agreed
from clipcap_ssl.models.generate import sample
from clipcap_ssl.pipeline import experiment
from clipcap_ssl.pipeline.config import load_config
from clipcap_ssl.report.evaluate import evaluate
from clipcap_ssl.rewards.reward import embed_unique
from grid import commit
from trials import begin, columns


def shifted(ds, dx, dy):
    "The same drawings, moved by some pixels; what leaves on one side comes back on the other"
    def image(i): return ImageChops.offset(ds.image(i), dx, dy)
    return Captioned(ds.ids, ds.captions, image, stamp=lambda i: f'{ds.stamp(i)}, shifted {dx} {dy}')


def steadied(encoder, ds, shifts):
    "Features averaged over shifted pictures"
    total = sum(encode_dataset(encoder, shifted(ds, dx, dy)).x for dx,dy in shifts)
    return torch.nn.functional.normalize(total, dim=1)


def by_consensus(model, x, n, max_new_tokens):
    "Of several samples, the one that the others agree with most"
    said = sample(model, x, n, temperature=.7, seed=0, max_new_tokens=max_new_tokens).text
    return most_agreed([said[i:i+n] for i in range(0, len(said), n)])


@call_parse
def main(
    out:str='nbs/results/data/web/closer.json', # where the trials are written
    seed:int=23, # the tuning seed
    n:int=16, # samples of a consensus
):
    "Two trials beside those of web_closing. Example: OMP_NUM_THREADS=1 python scripts/closer.py"
    torch.set_num_threads(1)
    cfg = load_config('web_scenes', n_test=20, seed=seed)
    parts,dev,model,_ = begin(cfg)
    began = time.process_time()
    ids = [i for i in parts.plain.ids if i in parts.features]
    at = {o:i for i,o in enumerate(parts.plain.ids)}
    assert [parts.plain.ids[at[i]] for i in ids]==ids and len(ids)==len(parts.x)
    teacher = steadied(parts.encoder, parts.plain, [(0,0), (2,0), (-2,0), (0,2), (0,-2)])
    teacher = teacher[[at[i] for i in ids]]
    scale = parts.encoder.logit_scale
    def judge(texts): return scale*teacher@embed_unique(parts.encoder, texts).T
    experiment._expert(cfg, parts, model, judge=judge)
    spent = time.process_time()-began
    refs,graphs = references(dev.scenes),dict(zip(dev.scenes.ids, dev.scenes.scenes))
    agreed = by_consensus(model, dev.x, n, cfg.max_new_tokens)
    agreed = evaluate(dict(zip(dev.scenes.ids, agreed)), refs, scenes=graphs)
    said = dict(shifts=dev.score(model), consensus={k:round(agreed[k], 4) for k in columns})
    similar = (teacher*parts.x).sum(1).mean().item()
    found = dict(seed=seed, commit=commit(), torch=torch.__version__, dev=said, samples=n, cpu_seconds=round(spent, 1),
                 cosine_of_steadied_and_plain=round(similar, 4))
    write_text(Path(out), json.dumps(found, indent=1, allow_nan=False)+'\n')
    print(found)
