"""Decoding by consensus, for `expert_longer` and for full supervision: of several samples the one that the others agree with most, by CIDEr.
Second world, tuning seed, dev scenes. The captioner of choices.py is read, full supervision is trained here."""
import json
from pathlib import Path
import torch
from fastcore.script import call_parse
from clipcap_ssl import Captioner
from clipcap_ssl.core import write_text
from clipcap_ssl.models.generate import greedy
from clipcap_ssl.pipeline import experiment
from clipcap_ssl.pipeline.config import load_config
from clipcap_ssl.pipeline.setup import prepare
from clipcap_ssl.report.evaluate import evaluate
from closer import by_consensus
from grid import commit
from trials import Dev, columns, new


@call_parse
def main(
    out:str='nbs/results/data/web/agreed.json', # where it is written
    captioner:str='runs/choices/longer', # expert_longer of the same seed
    seed:int=23, # the tuning seed
    n:int=16, # samples of a consensus
):
    "Consensus of samples against greedy decoding. Example: OMP_NUM_THREADS=1 python scripts/agreed.py"
    torch.set_num_threads(1)
    cfg = load_config('web_scenes', n_test=20, seed=seed)
    parts = prepare(cfg)
    dev,full = Dev(cfg, parts),new(cfg, parts)
    experiment.row_training['full'](cfg, parts, full)
    rows = dict(expert_longer=Captioner.from_pretrained(captioner).attach(parts.encoder), full=full)
    graphs,found = dict(zip(dev.ids, dev.scenes.scenes)),{}
    for name,model in rows.items():
        said = dict(greedy=greedy(model, dev.x, max_new_tokens=cfg.max_new_tokens).text,
                    consensus=by_consensus(model, dev.x, n, cfg.max_new_tokens))
        found[name] = {}
        for how,texts in said.items():
            scores = evaluate(dict(zip(dev.ids, texts)), dev.references, scenes=graphs)
            found[name][how] = {k:round(scores[k], 4) for k in columns}
        print(name, found[name], flush=True)
    about = dict(seed=seed, samples=n, commit=commit(), torch=torch.__version__)
    write_text(Path(out), json.dumps(about|dict(rows=found), indent=1, allow_nan=False)+'\n')
