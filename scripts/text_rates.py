"""Rates of stage 1 after the start from text, on dev photos: the start is trained once, and stage 1 goes on from it with each pair of
rates. A stage 1 that goes too fast undoes the start. Nothing is scored on test."""
import json, tomllib
from pathlib import Path
import torch
from dataclasses import replace
from fastcore.script import call_parse
from clipcap_ssl.core import write_text
from clipcap_ssl.pipeline import experiment
from clipcap_ssl.pipeline.config import load_config
from clipcap_ssl.pipeline.setup import prepare
from clipcap_ssl.train.policy import copy_captioner
from grid import commit
from trials import Dev, new

rates = ((1e-3,5e-4), (5e-4,2e-4), (2e-4,1e-4), (1e-3,1e-4))


@call_parse
def main(
    grid:str='scripts/grids/photos_claim.toml', # whose settings are taken, those of its variant `text` included
    out:str='nbs/results/data/photos_text_rates.json', # what is written
    seed:int=0, # the tuning seed
):
    "Try rates of stage 1 after the start from text. Example: OMP_NUM_THREADS=1 python scripts/text_rates.py"
    torch.set_num_threads(1)
    conf = tomllib.loads(Path(grid).read_text(encoding='utf-8'))
    settings = conf['settings']|{k:v for k,v in conf['variants']['text'].items() if k!='rows'}
    cfg = load_config(conf['recipe'], **settings, seed=seed)
    parts = prepare(cfg)
    dev,start = Dev(cfg, parts),new(cfg, parts)
    about = dict(seed=seed, commit=commit(), torch=torch.__version__, n_texts=len(parts.texts))
    found = about|dict(start=dev.score(start), trials=[])
    print('start', found['start'], flush=True)
    for lr,lr_lm in rates:
        model = copy_captioner(start)
        log = experiment._stage1(replace(cfg, lr=lr, lr_lm=lr_lm), parts, model)
        found['trials'].append(dict(lr=lr, lr_lm=lr_lm, steps=len(log), dev=dev.score(model)))
        print(found['trials'][-1], flush=True)
        write_text(Path(out), json.dumps(found, indent=1, allow_nan=False)+'\n')
