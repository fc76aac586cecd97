"Does the verdict of clipcap_check foretell what stage 2 does? Encoders from good to random on drawn scenes, grey scenes and photos. `--help` says how."
import json, re, shutil
from pathlib import Path
import numpy as np, torch
from fastcore.script import call_parse
from safetensors.torch import load_file, save_file
from clipcap_ssl.core import asset_path, read_json, write_json, write_lines
from clipcap_ssl.data.scenes import ToyScenes
from clipcap_ssl.metrics.intervals import Interval, paired_difference
from clipcap_ssl.models.encoder import load_encoder
from clipcap_ssl.pipeline.check import Sight, _boundary, encoder_sight, labelled_photos, stage2_verdict
from clipcap_ssl.pipeline.config import load_config
from clipcap_ssl.pipeline.experiment import run
from clipcap_ssl.pipeline.init import init_recipe
from clipcap_ssl.pipeline.setup import plan_parts

small = dict(n_train=0, n_test=200, n_pairs=150, n_dev_pairs=30, steps=200, expert_rounds=2, expert_steps=100, expert_samples=3, expert_null=500, rows='stage1,stage2_expert', keep='stage2_expert')

# ---- data and encoders

def draw_folder(folder, grey, n_train=600, n_test=200):
    "Drawn scenes as a folder of PNG files, one caption of each training scene, five of each test scene; `grey` takes the colours away"
    if (folder/'captions.jsonl').is_file(): return folder
    (folder/'images').mkdir(parents=True, exist_ok=True)
    rows = []
    for split,n,seed,m in (('train', n_train, 31, 1), ('test', n_test, 32, 5)):
        ds = ToyScenes(n, seed, n_captions=m)
        for i,name in enumerate(ds.ids):
            image = ds.image(i)
            (image.convert('L').convert('RGB') if grey else image).save(folder/'images'/f'{name}.png')
            rows.append(dict(file=f'images/{name}.png', split=split, captions=list(ds.captions[i])))
    write_lines(folder/'captions.jsonl', rows)
    return folder

def weaken(folder, out, noise):
    "A copy of an encoder's folder: to each matrix noise is added, `noise` standard deviations of its own entries long"
    if (out/'open_clip_model.safetensors').is_file(): return out
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns('*.safetensors', 'LICENSE', 'README.md', 'trained_on.json'))
    g = torch.Generator().manual_seed(0)
    state = load_file(folder/'open_clip_model.safetensors')
    for k,v in state.items():
        if v.ndim>1 and v.is_floating_point(): state[k] = (v.float()+noise*v.float().std()*torch.randn(v.shape, generator=g)).to(v.dtype)
    save_file(state, out/'open_clip_model.safetensors')
    return out

def other_folder(folder, seed, n_train=600, n_test=200):
    "Scenes in the colours and on the backgrounds of scripts/imitation_users.py, as `draw_folder` has them"
    from imitation_users import draw_other
    if (folder/'captions.jsonl').is_file(): return folder
    (folder/'images').mkdir(parents=True, exist_ok=True)
    rows = []
    for split,n,m in (('train', n_train, 1), ('test', n_test, 5)):
        ds = ToyScenes(n, seed+(split=='test'), n_captions=m)
        for i,name in enumerate(ds.ids):
            draw_other(ds.scenes[i], f'{seed} {split} {i}').save(folder/'images'/f'{name}.png')
            rows.append(dict(file=f'images/{name}.png', split=split, captions=list(ds.captions[i])))
    write_lines(folder/'captions.jsonl', rows)
    return folder

def child_photos(work, photos):
    "Photos of children with one caption each, and 600 without, and the recipe that `clipcap_init` writes for them with `pocket`"
    from imitation_users import photo_user
    if not (work/'children').is_dir():
        photo_user(work, photos, n_train=150, n_test=100, plain=600, seed=71, name='children', theme=re.compile(r'\b(child|children|girl|girls|boy|boys|kid|kids)\b'))
    recipe = work/'children.toml'
    if not recipe.is_file(): init_recipe(work/'children', recipe)
    return recipe

def fresh_setups(work, encoders, photos=None):
    "Set-ups that nothing was chosen on: the boundary of the verdict was frozen before they were made"
    data,judge = other_folder(work/'other', 61),asset_path('toy-judge')
    found = {f'other-{k}': dict(data=str(data), encoder=f'open_clip:{encoders[k]}') for k in ('fair','weak','random')}
    found['other-second'] = dict(data=str(data), encoder=f'open_clip:{judge}', judge='toy')
    setups = {k: load_config('scenes', **small, **o) for k,o in found.items()}
    if not photos: return setups
    recipe,pocket = child_photos(work/'photos', photos),asset_path('pocket/encoder')
    seen = dict(pocket=pocket) | {k: weaken(pocket, work/f'pocket-{k}', s) for k,s in dict(weak=.35, random=3.).items()}
    mine = small | dict(n_pairs=0, n_dev_pairs=15)
    return setups | {f'photos-{k}': load_config(recipe, **mine, encoder=f'open_clip:{o}') for k,o in seen.items()}

# ---- one set-up

def outcome(cfg, out):
    "What stage 2 did: CIDEr of both rows and their paired difference"
    if not (out/'scores.json').is_file(): run(cfg, out)
    rows,each = read_json(out/'scores.json')['rows'],read_json(out/'each.json')
    a,b = (np.array(each[r]['cider'], dtype=float) for r in ('stage2_expert','stage1'))
    d = paired_difference(a, b)
    return dict(stage1=round(rows['stage1']['cider'], 4), stage2=round(rows['stage2_expert']['cider'], 4), difference=[round(float(o), 4) for o in d])

def foretold(cfg, file):
    "What the check says, and what it measured"
    plan = plan_parts(cfg)
    if not file.is_file(): write_json(file, encoder_sight(load_encoder(cfg.encoder), labelled_photos(plan)).as_dict())
    sight = read_json(file)
    said = stage2_verdict(Sight(**{k: Interval(*o) if isinstance(o, list) else o for k,o in sight.items()}), len({i for i,_ in plan.labels_to_train}), len(plan.plain))
    return dict(sight=sight, verdict=said[0])

@call_parse
def main(
    work:Path=Path('check_verdicts'), # Folder for data, encoders and runs; what is there is used again
    photos:Path=None, # Folder of photos with captions.jsonl, for the fresh set-ups on photos
    only:str='', # Only set-ups whose name begins so
    runs_only:bool=False, # Train, and say nothing of verdicts
    done:bool=False, # Train nothing: only set-ups whose run is there
    out:Path=None, # Where the account goes; default: nbs/results/data/check_verdicts.json, or check_fresh.json
    fresh:bool=False, # The set-ups that the boundary was not chosen on
):
    "Train stage 1 and stage 2 in every set-up, and compare what clipcap_check says before with what stage 2 then does"
    toy = asset_path('toy')
    encoders = {'good': toy} | {k: weaken(toy, work/f'toy-{k}', s) for k,s in dict(fair=.2, weak=.35, poor=.5, random=3.).items()}
    setups = {}
    for domain,grey in (('scenes', False), ('grey', True)):
        data = draw_folder(work/domain, grey)
        for k,folder in encoders.items():
            if grey and k!='good': continue      # it is blind to these already
            setups[f'{domain}-{k}'] = load_config('scenes', **small, data=str(data), encoder=f'open_clip:{folder}')
    if fresh: setups = fresh_setups(work, encoders, photos)
    found = {}
    for name,cfg in setups.items():
        if not name.startswith(only) or done and not (work/'runs'/name/'scores.json').is_file(): continue
        o = outcome(cfg, work/'runs'/name)
        if not runs_only: o = foretold(cfg, work/'sights'/f'{name}.json')|dict(outcome=o)
        found[name] = o
        print(name, json.dumps(o), flush=True)
    out = out or Path('nbs/results/data', 'check_fresh.json' if fresh else 'check_verdicts.json')
    if not runs_only: write_json(out, dict(settings=small, boundary=_boundary, setups=found))
