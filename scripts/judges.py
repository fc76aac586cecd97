"""Captioners of the second world, judged on pairs of colour and shape that nothing was trained on. Nothing is trained here: the
captioners are those that a grid of web_main has saved."""
import json
from pathlib import Path
import torch
from fastcore.script import call_parse
from fastcore.test import test_eq
from clipcap_ssl import Captioner, load_encoder
from clipcap_ssl.core import progress, read_json, write_text
from clipcap_ssl.data.base import references
from clipcap_ssl.data.features import encode_dataset
from clipcap_ssl.data.scenes import ToyScenes
from clipcap_ssl.models.generate import greedy
from clipcap_ssl.pipeline.config import load_config, run_config
from clipcap_ssl.pipeline.setup import scene_parts
from clipcap_ssl.report.evaluate import evaluate, human_row
from grid import commit

kept = ('cider','oracle_p_at_1_100','precision','recall')


def scored(captions, refs, graphs):
    "Scores of a row, and those of single scenes"
    found = evaluate(captions, refs, scenes=graphs)
    def number(v): return None if v!=v else round(float(v), 4)
    return ({k:float(found[k]) for k in kept if k in found},
            {k:[number(v) for v in found.each[k]] for k in kept if k in found.each})


def judged(rows, every, graphs):
    "Scores of all rows, people among them: the first caption of each scene is theirs, the others are references for all"
    human,refs = human_row(every)
    found = {r:scored(said, refs, graphs) for r,said in (rows|dict(human=human)).items()}
    return {r:o[0] for r,o in found.items()},{r:o[1] for r,o in found.items()}


def held_out(seed, cfg):
    "Scenes of pairs that nothing has seen, with six captions like those of a run's test: one is people's, five are references"
    return ToyScenes(500, 60_000+seed, n_captions=6, unseen=True, one_group=cfg.one_group)


def people_anew(file, cfg):
    "People's scores once more, in a file whose other rows stay as they are"
    found = read_json(file)
    unseen = held_out(found['meta']['seed'], cfg)
    rows,each = judged({}, references(unseen), dict(zip(unseen.ids, unseen.scenes)))
    write_text(file, json.dumps(found|dict(rows=found['rows']|rows, each=found['each']|each), allow_nan=False)+'\n')


@call_parse
def main(
    runs:str='runs/grids/web_main', # Folder of the grid's runs
    out:str='nbs/results/data/web/web_judges', # Folder of the results: unseen-seedN.json
    people:bool=False, # only score people anew in the results that are there
):
    "Judge the saved captioners of web_main on held-out pairs. Example: python scripts/judges.py"
    torch.set_num_threads(1)
    if people:
        for file in sorted(Path(out).glob('unseen-seed*.json')): people_anew(file, load_config('web_scenes'))
        return
    encoder,version,runs = load_encoder('web'),commit(),Path(runs)
    folders = {int(f.name.rpartition('seed')[2]):f for f in sorted(runs.glob('labels-seed*')) if (f/'scores.json').is_file()}
    for seed,folder in progress(folders.items(), desc='seeds'):
        cfg = run_config(folder)
        made = dict(stage1=(folder, 'stage1'), stage2_expert=(folder, 'stage2_expert'), full=(folder, 'full'),
                    expert_longer=(runs/f'longer-seed{seed}', 'stage2_expert'), stage2_policy=(runs/f'policy-seed{seed}', 'stage2_policy'))
        def captioner(run, row): return run/'captioners'/row if (run/'captioners'/row).is_dir() else run/'captioner'
        where = {r:captioner(*o) for r,o in made.items() if (o[0]/'scores.json').is_file()}
        models = {r:Captioner.from_pretrained(f).attach(encoder) for r,f in where.items()}
        test = scene_parts(cfg)[2]
        x = encode_dataset(encoder, test).x
        def write(model, x, ids): return dict(zip(ids, greedy(model, x, max_new_tokens=cfg.max_new_tokens).text))
        written = {r:write(m, x, test.ids) for r,m in models.items()}
        for r,said in written.items():
            run,row = made[r]
            test_eq(said, read_json(run/'rows'/f'{row}.json')['captions'])      # the captioner of that row, and no other
        unseen = held_out(seed, cfg)
        y = encode_dataset(encoder, unseen).x
        said = {r:write(m, y, unseen.ids) for r,m in models.items()}
        rows,each = judged(said, references(unseen), dict(zip(unseen.ids, unseen.scenes)))
        meta = dict(seed=seed, device='cpu', commit=version, captioners=read_json(folder/'scores.json')['meta']['version'], torch=torch.__version__)
        write_text(Path(out)/f'unseen-seed{seed}.json', json.dumps(dict(meta=meta, rows=rows, each=each), allow_nan=False)+'\n')
