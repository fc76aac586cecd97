"""CIDEr in the second world with what the encoder hardly sees left out: all relations become one word, textures go, in captions
and in references. It reads the captions that web_main's results keep of the first test scenes, and trains nothing."""
import json
from pathlib import Path
from fastcore.script import call_parse
from fastcore.test import test_close
from clipcap_ssl.core import read_json, write_text
from clipcap_ssl.data.base import references
from clipcap_ssl.data.scenes import synonyms
from clipcap_ssl.metrics.cider import CiderD
from clipcap_ssl.pipeline.config import load_config
from clipcap_ssl.pipeline.setup import scene_parts
from clipcap_ssl.report.evaluate import human_row
from grid import commit

links = [*(w for r in ('left','right','above','below') for w in synonyms[r]), 'next to', 'and', 'with']
links = sorted(links, key=len, reverse=True)        # 'to the left of' before 'left of'
textures = {w for t in ('plain','striped','dotted') for w in synonyms[t]}
rows = dict(stage1=('labels','stage1'), stage2_policy=('policy','stage2_policy'), stage2_expert=('labels','stage2_expert'),
            expert_longer=('longer','stage2_expert'), full=('labels','full'))


def without_unseen(text):
    "The caption with one word for all relations, and without textures"
    text = f' {text} '
    for link in links: text = text.replace(f' {link} ', ' beside ')
    return ' '.join(w for w in text.split() if w not in textures)


@call_parse
def main(
    results:str='nbs/results/data/web/web_main', # Folder of the grid's results
    out:str='nbs/results/data/web/web_judges', # Folder of what is written: blind-seedN.json
):
    "Judge the captions of web_main without relations and textures. Example: python scripts/blind.py"
    for file in sorted(Path(results).glob('labels-seed*.json')):
        meta = read_json(file)['meta']
        seed,cfg = meta['seed'],load_config('web_scenes', seed=meta['seed'])
        human,refs = human_row(references(scene_parts(cfg)[2]))
        whole,blind = CiderD(refs, cfg.tokenize),CiderD({i:[without_unseen(o) for o in r] for i,r in refs.items()}, cfg.tokenize)
        said = {}
        for row,(variant,name) in rows.items():
            kept = read_json(file.with_name(f'{variant}-seed{seed}.json'))
            said[row] = kept['captions'][name]
            ids = list(refs)[:len(said[row])]
            test_close(whole(said[row], ids), kept['each'][name]['cider'][:len(ids)], eps=1e-3)    # captions of these scenes, and no others
        said['human'] = [human[i] for i in ids]
        each = {r:[round(float(v), 4) for v in blind([without_unseen(o) for o in texts], ids)] for r,texts in said.items()}
        about = dict(seed=seed, device='cpu', commit=commit(), torch=meta['torch'])
        found = dict(meta=about, rows={r:dict(cider=sum(vs)/len(vs)) for r,vs in each.items()}, each={r:dict(cider=vs) for r,vs in each.items()})
        write_text(Path(out)/f'blind-seed{seed}.json', json.dumps(found, allow_nan=False)+'\n')
        print(seed, {r:round(o['cider'], 3) for r,o in found['rows'].items()}, flush=True)
