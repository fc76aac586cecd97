"""Captioners of the second world, judged in three more ways: on pairs of colour and shape that nothing was trained on,
with what the encoder hardly sees left out, and full supervision decoded with more effort. Nothing is trained here: the
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
from clipcap_ssl.data.scenes import ToyScenes, synonyms
from clipcap_ssl.models.generate import beam, best_of_n, greedy, guided
from clipcap_ssl.pipeline.config import run_config
from clipcap_ssl.pipeline.setup import scene_parts
from clipcap_ssl.report.evaluate import evaluate, human_row
from grid import commit

kept = ('cider','oracle_p_at_1_100','precision','recall')
links = [*(w for r in ('left','right','above','below') for w in synonyms[r]), 'next to', 'and', 'with']
links = sorted(links, key=len, reverse=True)        # 'to the left of' before 'left of'
textures = {w for t in ('plain','striped','dotted') for w in synonyms[t]}


def without_unseen(text):
    "The caption with one word for all relations, and without textures"
    text = f' {text} '
    for link in links: text = text.replace(f' {link} ', ' beside ')
    return ' '.join(w for w in text.split() if w not in textures)


def scored(captions, refs, graphs=None):
    "Scores of a row, and those of single scenes"
    found = evaluate(captions, refs, scenes=graphs)
    def number(v): return None if v!=v else round(float(v), 4)
    return ({k:float(found[k]) for k in kept if k in found},
            {k:[number(v) for v in found.each[k]] for k in kept if k in found.each})


def judged(rows, refs, graphs=None):
    "Scores of all rows, people among them"
    human,others = human_row(refs)
    found = {r:scored(said, refs, graphs) for r,said in rows.items()}
    found['human'] = scored(human, others, graphs)
    return {r:o[0] for r,o in found.items()},{r:o[1] for r,o in found.items()}


@call_parse
def main(
    runs:str='runs/grids/web_main', # Folder of the grid's runs
    out:str='nbs/results/data/web/web_judges', # Folder of the results: unseen-, blind- and full-seedN.json
):
    "Judge the saved captioners of web_main in three more ways. Example: python scripts/judges.py"
    torch.set_num_threads(1)
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
        refs,graphs = references(test),dict(zip(test.ids, test.scenes))
        x = encode_dataset(encoder, test).x
        def write(model, x, ids): return dict(zip(ids, greedy(model, x, max_new_tokens=cfg.max_new_tokens).text))
        written = {r:write(m, x, test.ids) for r,m in models.items()}
        for r,said in written.items():
            run,row = made[r]
            test_eq(said, read_json(run/'rows'/f'{row}.json')['captions'])      # the captioner of that row, and no other

        # 1) pairs of colour and shape that nothing has seen
        unseen = ToyScenes(500, 60_000+seed, unseen=True, one_group=cfg.one_group)
        y = encode_dataset(encoder, unseen).x
        on_unseen = judged({r:write(m, y, unseen.ids) for r,m in models.items()}, references(unseen),
                           dict(zip(unseen.ids, unseen.scenes)))
        # 2) what the encoder hardly sees, left out of captions and references
        cut = {r:{i:without_unseen(o) for i,o in said.items()} for r,said in written.items()}
        blind = judged(cut, {i:[without_unseen(o) for o in texts] for i,texts in refs.items()})
        # 3) full supervision with more effort
        full,most = models['full'],cfg.max_new_tokens
        more = {'full_beam@5': beam(full, x, 5, max_new_tokens=most).text,
                'full_best_of_n@8': best_of_n(full, x, encoder, n=8, seed=seed, max_new_tokens=most).text}
        for s in (1.1, 1.5, 4.): more[f'full_guided@{s:g}'] = guided(full, x, strength=s, max_new_tokens=most).text
        with_effort = judged({r:dict(zip(test.ids, said)) for r,said in more.items()}, refs, graphs)
        # 4) written down
        for name,(rows,each) in dict(unseen=on_unseen, blind=blind, full=with_effort).items():
            meta = dict(seed=seed, device='cpu', commit=version, captioners=read_json(folder/'scores.json')['meta']['version'], torch=torch.__version__)
            found = dict(meta=meta, rows=rows, each=each)
            write_text(Path(out)/f'{name}-seed{seed}.json', json.dumps(found, allow_nan=False)+'\n')
