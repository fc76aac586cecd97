"""The models of the web writer's world, and what is measured of them: train, ship, measure. What is done is not done again, and a training
that was killed goes on from its last hundred steps."""
import json, math, random, shutil, subprocess, tomllib
from pathlib import Path
import torch
from fastcore.script import call_parse
from clipcap_ssl.core import asset_path, read_json, write_json, write_text
from clipcap_ssl.data.base import split_labelled
from clipcap_ssl.data.scenes import ToyScenes
from clipcap_ssl.models.encoder import load_encoder
from clipcap_ssl.models.lm import tokenize_captions, token_logprobs
from clipcap_ssl.models.loading import load_lm
from clipcap_ssl.pipeline.config import load_config, recipe_path
from clipcap_ssl.train.pretrain import build_world, encoder_texts, foil_table, lm_sentences


assets = asset_path('..')/'assets'


def commit():
    "The last commit of the notebooks that the package is made of, with a mark if they differ from it"
    book = ['--','nbs','clipcap_ssl/recipes',':!nbs/results']
    def git(*args): return subprocess.run(['git', *args, *book], capture_output=True, text=True).stdout.strip()
    return git('log', '-1', '--format=%h')+('-dirty' if git('status', '--porcelain') else '')


def train(recipe, out, device):
    "Train what is not there yet; each folder's recipe.json says with which code"
    names = [*recipe['encoder'], recipe['lm']['name']]
    for name in names:
        if (out/name/'recipe.json').is_file(): continue
        info = build_world(recipe, out, name, device=torch.device(device))[name]
        write_json(out/name/'recipe.json', info|dict(commit=commit()))
        print(name, f"{info['seconds']} s", info.get('foils', ''), flush=True)
    return names


def sections_of(recipe):
    "Model -> section of a recipe of models"
    found = tomllib.loads(recipe_path(recipe).read_text(encoding='utf-8'))
    return found['encoder'] | {found['lm'].get('name', 'toy-lm'): found['lm']}


def same_text(texts, references):
    "Share of references that stand word for word among the texts"
    return round(sum(r in texts for r in references)/len(references), 5)


def overlap(cfg, sections):
    "How much of the test references stands in other texts, and how many test graphs were seen"
    train,test = (ToyScenes(n, 10_000+k+2*cfg.seed, n_captions=5, one_group=cfg.one_group)
                  for k,n in enumerate((cfg.n_train, 2000)))
    refs = [c for o in test.captions for c in o]
    labels = {train.captions[i][j] for i,j in split_labelled(train, n_pairs=cfg.n_pairs, seed=cfg.seed)}
    read = {name: set(encoder_texts(s) if 'pairs' in s else lm_sentences(s)) for name,s in sections.items()}
    share = {name: same_text(texts, refs) for name,texts in read.items()}
    seen = set(train.scenes)
    return dict(references=len(refs), models=share, labels=same_text(labels, refs),
                any=same_text(set().union(labels, *read.values()), refs),
                graphs_seen=round(sum(s in seen for s in test.scenes)/len(test.scenes), 4))


@torch.no_grad()
def perplexity(name, texts):
    "Of a language model, per token, the end token included"
    lm,tok = load_lm(name)
    tokens,mask = tokenize_captions(tok, texts)
    begin = torch.full_like(tokens[:,:1], lm.config.eos_token_id)
    logits = lm(torch.cat([begin, tokens[:,:-1]], 1)).logits
    return round(math.exp(-(token_logprobs(logits, tokens)*mask).sum()/mask.sum()), 3)


def measure(file, seed):
    "What the page appendix/web_writer reads; each part is written when it is done"
    done = read_json(file) if file.is_file() else dict(commit=commit(), seed=seed, device='cpu', torch=torch.__version__)
    def keep(part, make):
        if part in done: return
        done[part] = make()
        write_text(file, json.dumps(done, indent=1)+'\n')
        print(part, done[part], flush=True)
    # 1) what is written where
    worlds = {'scenes': 'toy_world', 'web_scenes': 'web_world'}
    for recipe,models in worlds.items():
        sections = sections_of(models)
        keep(f'overlap_{recipe}', lambda: overlap(load_config(recipe, seed=seed), sections))
    # 2) how strange captions are
    captions = [c for o in ToyScenes(1000, 10_001+2*seed, one_group=.08).captions for c in o[:1]]
    def strange(lm):
        own = lm_sentences(sections_of(f'{lm}_world')[f'{lm}-lm']|dict(data_seed=9), 1000)
        return dict(captions=perplexity(lm, captions), own=perplexity(lm, own))
    for lm in ('toy','web'):
        if (assets/f'{lm}-lm').is_dir(): keep(f'perplexity_{lm}', lambda: strange(lm))
    # 3) what the encoders see
    for name in ('web','web-judge'):
        if not (assets/name).is_dir(): continue
        for unseen in (False,True):
            keep(f'foils_{name}_{"held_out" if unseen else "seen"}',
                 lambda: foil_table(load_encoder(name), unseen=unseen, n=600, seed=9000+unseen))


@call_parse
def main(
    out:str='runs/web_world', # where the models are trained
    seed:int=22, # of the scenes that overlap is measured on: a tuning seed
    device:str='cpu', # where to train
    ship:bool=False, # copy the models into the package
    only_measure:bool=False, # train nothing
    measured:str='nbs/results/data/web/apart.json', # what was measured
):
    "Train the models of the web writer's world. Example: OMP_NUM_THREADS=1 python scripts/web_world.py --ship"
    torch.set_num_threads(1)
    recipe = tomllib.loads(recipe_path('web_world').read_text(encoding='utf-8'))
    names = [] if only_measure else train(recipe, Path(out), device)
    if ship:
        for name in names: shutil.copytree(Path(out)/name, assets/name, dirs_exist_ok=True)
    measure(Path(measured), seed)
