"""How true is what expert iteration learns from, and how much of it does the captioner learn? Precision of the captions that are kept in each
round, by the scene graph, and of what the captioner then says of dev scenes. Second world, tuning seed."""
import json, tempfile
from pathlib import Path
import torch
from fastcore.script import call_parse
from clipcap_ssl.core import read_json, write_text
from clipcap_ssl.metrics.oracle import oracle_scores, precision_by_attribute
from clipcap_ssl.models.generate import greedy
from clipcap_ssl.pipeline import experiment
from clipcap_ssl.pipeline.config import load_config
from clipcap_ssl.pipeline.setup import scene_parts
from clipcap_ssl.train.loop import Checkpoint
from grid import commit
from trials import begin


def told(said, graphs):
    "How true captions are, and by what they say"
    scores = oracle_scores(said, graphs)
    by = {a:[round(p, 4), n] for a,(p,n) in precision_by_attribute(said, graphs).items()}
    return {k:round(float(v), 4) for k,v in scores.items()}|dict(by_attribute=by)


@call_parse
def main(
    out:str='nbs/results/data/web/kept.json', # where it is written
    seed:int=23, # the tuning seed
):
    "Expert iteration as in web_main, looked into. Example: OMP_NUM_THREADS=1 python scripts/kept_captions.py"
    torch.set_num_threads(1)
    cfg = load_config('web_scenes', n_test=20, seed=seed)
    parts,dev,model,_ = begin(cfg)
    train,more,_ = scene_parts(cfg)
    graphs = {i:s for ds in (train, more) if ds for i,s in zip(ds.ids, ds.scenes)}
    ids = [i for i in parts.plain.ids if i in parts.features]
    graphs = {i:graphs[i] for i in ids}
    with tempfile.TemporaryDirectory() as d:
        experiment._expert(cfg, parts, model, checkpoint=Checkpoint(Path(d), every=10**9))
        kept = [read_json(f)['texts'] for f in sorted(Path(d).glob('kept-*.json'))]
    n = len(kept[0])//len(ids)
    rounds = [[told(dict(zip(ids, texts[k::n])), graphs) for k in range(n)] for texts in kept]
    said = dict(zip(dev.scenes.ids, greedy(model, dev.x, max_new_tokens=cfg.max_new_tokens).text))
    of_dev = told(said, dict(zip(dev.scenes.ids, dev.scenes.scenes)))
    found = dict(seed=seed, commit=commit(), torch=torch.__version__, kept=rounds, captioner=of_dev)
    write_text(Path(out), json.dumps(found, indent=1, allow_nan=False)+'\n')
