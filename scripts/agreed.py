"""Decoding by consensus, for `expert_longer` and for full supervision: of several samples the one that the others agree with most, by CIDEr.
On the tuning seed the captioner of choices.py is read and full supervision is trained; on test seeds the captioners are those that web_main saved."""
import json
from pathlib import Path
import torch
from fastcore.script import call_parse
from fastcore.test import test_eq
from clipcap_ssl import Captioner, load_encoder
from clipcap_ssl.core import read_json, write_text
from clipcap_ssl.data.base import references
from clipcap_ssl.data.features import encode_dataset
from clipcap_ssl.models.generate import greedy
from clipcap_ssl.pipeline import experiment
from clipcap_ssl.pipeline.config import load_config, run_config
from clipcap_ssl.pipeline.setup import prepare, scene_parts
from clipcap_ssl.report.evaluate import evaluate
from closer import by_consensus
from grid import commit
from judges import judged
from trials import Dev, columns, new


def tuning(captioner, seed, n):
    "Both captioners on dev scenes, with either decoding"
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
    return dict(seed=seed, samples=n, commit=commit(), torch=torch.__version__, rows=found)


def on_test(runs, seed, n):
    "Both captioners on the test scenes of a seed of web_main, with either decoding; people beside them"
    where = dict(expert_longer=(f'longer-seed{seed}','stage2_expert'), full=(f'effort-seed{seed}','full'))
    encoder,said = load_encoder('web'),{}
    for name,(run,row) in where.items():
        folder = Path(runs)/run
        cfg = run_config(folder)
        test = scene_parts(cfg)[2]
        kept = folder/'captioners'/row
        model = Captioner.from_pretrained(kept if kept.is_dir() else folder/'captioner').attach(encoder)
        x = encode_dataset(encoder, test).x
        said[name] = dict(zip(test.ids, greedy(model, x, max_new_tokens=cfg.max_new_tokens).text))
        test_eq(said[name], read_json(folder/'rows'/f'{row}.json')['captions'])        # the captioner of that row, and no other
        said[f'{name}_agreed'] = dict(zip(test.ids, by_consensus(model, x, n, cfg.max_new_tokens)))
    rows,each = judged(said, references(test), dict(zip(test.ids, test.scenes)))
    print(seed, {r:round(o['cider'], 3) for r,o in rows.items()}, flush=True)
    return dict(meta=dict(seed=seed, samples=n, device='cpu', commit=commit(), torch=torch.__version__), rows=rows, each=each)


@call_parse
def main(
    out:str='nbs/results/data/web', # where it is written: agreed.json of the tuning seed, web_judges/agreed-seedN.json of others
    captioner:str='runs/choices/longer', # expert_longer of the tuning seed
    runs:str='', # instead of the tuning seed: the folder of web_main's runs, for the test seeds
    seed:int=23, # the tuning seed
    n:int=16, # samples of a consensus
):
    "Consensus of samples against greedy decoding. Example: OMP_NUM_THREADS=1 python scripts/agreed.py"
    torch.set_num_threads(1)
    if not runs:
        write_text(Path(out)/'agreed.json', json.dumps(tuning(captioner, seed, n), indent=1, allow_nan=False)+'\n')
        return
    for folder in sorted(Path(runs).glob('longer-seed*')):
        number = int(folder.name.rpartition('seed')[2])
        file = Path(out)/'web_judges'/f'agreed-seed{number}.json'
        if not file.is_file() and (folder/'scores.json').is_file(): write_text(file, json.dumps(on_test(runs, number, n), allow_nan=False)+'\n')
