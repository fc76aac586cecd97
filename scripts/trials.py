"""Trials of stage 1, full supervision and the routes of stage 2 on dev scenes or dev photos, one thread each. Every trial
is written into one JSON file as soon as it is done, and is not done again. Nothing is scored on test."""
import copy, json, platform, time, tomllib
from pathlib import Path
import torch
from fastcore.script import call_parse
from filelock import FileLock
from clipcap_ssl.core import read_json, write_text
from clipcap_ssl.data.base import references
from clipcap_ssl.data.features import encode_dataset
from clipcap_ssl.data.scenes import ToyScenes
from clipcap_ssl.models.generate import greedy
from clipcap_ssl.pipeline import experiment
from clipcap_ssl.pipeline.config import load_config
from clipcap_ssl.pipeline.setup import prepare
from clipcap_ssl.report.evaluate import evaluate
from clipcap_ssl.train.policy import copy_captioner
from grid import commit

columns = ('cider','precision','recall','oracle_p_at_1_100','mean_length')
photo_columns = ('cider','bleu4','named_precision','named_recall','p_at_1_100','repetition','mean_length')
from_nothing = ('stage1','full') # rows that do not start from stage 1
before_routes = ('n_unlabelled','n_texts','text_steps','text_noise') # a trial that changes these has a stage 1 of its own


class Dev:
    "300 scenes that nothing else uses, or the dev photos, and a hook for `fit` that scores them every 100 steps"
    def __init__(self, cfg, parts, every=100):
        self.every = every
        self.decoding = cfg.decoding_arguments()
        if cfg.data=='scenes':
            self.scenes = scenes = ToyScenes(300, 77_021, one_group=cfg.one_group)
            self.ids,self.x,self.references = scenes.ids,encode_dataset(parts.encoder, scenes).x,references(scenes)
            self.judged,self.columns = dict(scenes=dict(zip(scenes.ids, scenes.scenes))),columns
        else:
            self.ids,self.x,self.references = parts.dev.ids,parts.dev.x,parts.dev.references
            self.judged,self.columns = dict(x=parts.dev.x_judge, judge=parts.judge, prompt=cfg.prompt),photo_columns

    def score(self, model):
        "Scores of greedy captions"
        said = dict(zip(self.ids, greedy(model, self.x, **self.decoding).text))
        found = evaluate(said, self.references, **self.judged)
        return {k:round(found[k], 4) for k in self.columns}

    def hook(self):
        "Looks of one trial, and the seconds that they took"
        looks,spent = [],[0.]
        def look(step, model, row):
            if (step+1)%self.every: return
            began = time.process_time()
            looks.append(dict(step=step+1)|self.score(model))
            spent[0] += time.process_time()-began
        return look,looks,spent


def noise_of(log):
    "The looks at the gradient's noise, and the signal to noise over all of them"
    looks = [{k:o[k] for k in o if k=='step' or k.startswith('norm_') or k.endswith('2')} for o in log if 'noise2' in o]
    noise = sum(o['noise2'] for o in looks)
    signal = max(sum(o['signal2'] for o in looks), 0.)
    return dict(signal_to_noise=round((signal/noise)**.5, 4) if noise else None, looks=looks)


def new(cfg, parts):
    "A captioner that has seen no image, perhaps with the start from text"
    model = experiment._new(cfg, parts)
    if cfg.n_texts: experiment._text_only(cfg, parts, model)
    return model


def begin(cfg):
    "What routes start from: the parts, what to score on, stage 1, and the CPU seconds that it took"
    parts = prepare(cfg)
    dev,stage1,began = Dev(cfg, parts),new(cfg, parts),time.process_time()
    experiment._stage1(cfg, parts, stage1)
    return parts,dev,stage1,round(time.process_time()-began, 1)


def trial(cfg, row, parts, dev, stage1):
    "Train one row, from stage 1 unless it starts from nothing; what is written down of it"
    model = new(cfg, parts) if row in from_nothing else copy_captioner(stage1)
    began = time.process_time()
    look,looks,spent = dev.hook()
    log = experiment.row_training[row](cfg, parts, model, hooks=[look])
    seconds = time.process_time()-began-spent[0]
    found = dict(dev=dev.score(model), looks=looks, cpu_seconds=round(seconds, 1))
    if row not in ('stage2_policy','anchors_only'): return found
    tail = log[-25:]
    means = {k:round(sum(o[k] for o in tail)/len(tail), 4) for k in ('reward','kl','tokens') if k in tail[0]}
    return found|dict(captions_sampled=cfg.policy_steps*cfg.policy_batch*cfg.policy_samples, end_of_log=means, noise=noise_of(log))


@call_parse
def main(
    grid:str='scripts/grids/policy.toml', # recipe, seeds, settings for all, a table of settings per variant
    out:str='nbs/results/data/trials-policy.json', # where trials are written
    part:str='0/1', # which of the trials: '1/2' is the second of every two
):
    "Run the trials of a grid that are not done yet. Example: OMP_NUM_THREADS=1 python scripts/trials.py"
    torch.set_num_threads(1)
    conf = tomllib.loads(Path(grid).read_text(encoding='utf-8'))
    out,version = Path(out),commit()
    lock = FileLock(f'{out}.lock')
    first,n_parts = map(int, part.split('/'))
    def done(): return read_json(out) if out.is_file() else []
    def keep(name, seed, settings, found):
        new = dict(trial=name, seed=seed, commit=version, settings=settings)|found|dict(
            processor=platform.processor() or platform.machine(), torch=torch.__version__)
        with lock: write_text(out, json.dumps([*done(), new], indent=1, ensure_ascii=False, allow_nan=False)+'\n')
        print(name, found['dev'], found['cpu_seconds'], flush=True)
    for seed in conf['seeds']:
        # 1) stage 1, from which every route starts
        cfg = load_config(conf['recipe'], **conf['settings'], seed=seed)
        parts,dev,stage1,seconds = begin(cfg)
        names = {o['trial'] for o in done() if o['seed']==seed}
        if 'stage1' not in names and first==0:
            keep('stage1', seed, {}, dict(dev=dev.score(stage1), cpu_seconds=seconds, captions_sampled=0))
        # 2) the trials
        for name,own in list(conf['variants'].items())[first::n_parts]:
            if name in names: continue
            own = copy.deepcopy(own)
            row = own.pop('row', 'stage2_policy')
            settings = conf['settings']|own
            cfg = load_config(conf['recipe'], **settings, seed=seed)
            start = begin(cfg)[:3] if own.keys()&set(before_routes) else (parts,dev,stage1)
            keep(name, seed, dict(row=row)|settings, trial(cfg, row, *start))
