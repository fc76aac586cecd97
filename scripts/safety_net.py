"""How often does the safety net bring stage 1's captioner back, and was it right? Drawn scenes, a random encoder, rewards
that are made to be hacked, and healthy set-ups. Each run is written into one JSON file as soon as it is done, and is not
done again."""
import json, platform, time
from pathlib import Path
from unittest.mock import patch
import numpy as np, torch
from fastcore.script import call_parse
from clipcap_ssl.core import asset_path, read_json, write_json
from clipcap_ssl.metrics.intervals import paired_difference
from clipcap_ssl.pipeline import experiment
from clipcap_ssl.pipeline.config import load_config, saved_row
from clipcap_ssl.report.live import Live
from check_verdicts import weaken
from grid import commit

small = dict(n_train=400, n_test=120, n_dev=40, n_pairs=150, n_dev_pairs=20, steps=120, live=10, expert_rounds=1, expert_steps=80,
             expert_samples=2, expert_null=100, policy_from='stage1', policy_steps=60, policy_batch=16, policy_samples=4)
free = dict(policy_kl=0., label_weight=0., length_weight=0., policy_lr=3e-3, policy_lr_lm=1e-3)  # nothing holds the captions back

def pays_for_a_word(texts, x):
    "How often a caption says 'red'"
    return torch.tensor([float(t.split().count('red')) for t in texts]).view(len(x), -1)

def pays_for_length(texts, x):
    "The words of a caption"
    return torch.tensor([float(len(t.split())) for t in texts]).view(len(x), -1)

def setups(work):
    "name -> (row, settings, reward of our own)"
    blind = dict(encoder=f'open_clip:{weaken(asset_path("toy"), work/"random", 3.)}')
    expert,policy = 'stage2_expert','stage2_policy'
    return {
        'healthy, expert': (expert, {}, None),
        'healthy, policy': (policy, {}, None),
        'random encoder, expert': (expert, blind, None),
        'pays for a word, free': (policy, free, pays_for_a_word),
        'pays for length, free': (policy, free, pays_for_length),
        'cosine, free': (policy, free|dict(reward='cosine'), None)}

def difference(out, row, metric):
    "Stage 2 minus stage 1 on the test photos, with its interval of 95 %; None where no caption of a side claims anything"
    each = read_json(out/'each.json')
    a,b = (np.array(each[r][metric], dtype=float) for r in (row,'stage1'))
    both = np.isfinite(a)&np.isfinite(b)
    if not both.any(): return None
    d = paired_difference(a[both], b[both])
    return [round(float(o), 4) for o in d]

def one(out, row, settings, reward, seed):
    "One run: what the net did and said, and what the test photos say"
    cfg = load_config('scenes', **small|settings, seed=seed, rows=['stage1',row], keep=row)
    said,seconds = [],time.process_time()
    class Often(Live):
        "Looks every ten steps, without the pause between looks that long runs need"
        def __init__(self, *args, **kwargs): super().__init__(*args, **kwargs|dict(pause=0.))
    with patch.object(experiment, 'Live', Often): scores = experiment.run(cfg, out, say=said.append, reward=reward)
    kept = next(o for o in said if o.startswith('kept: '))
    warned = [o for o in said if o.startswith(f'{row}, step')]
    looks = read_json(out/'live'/f'{row}.json')['looks']
    shown = ('cider','precision','recall','clip_score','repetition','mean_length','reward')
    return dict(row=row, seed=seed, rule='margin', came_back=saved_row(out/'captioner')=='stage1', reason=kept.partition('; ')[2], warned=warned,
        test={r:{k:round(float(s[k]), 4) for k in shown if k in s} for r,s in scores.items()},
        difference={k:difference(out, row, k) for k in ('cider','precision','recall')},
        looks=[dict(step=o['step'], reward=o['reward'], cider=o['cider'], length=round(o['length'], 2), repetition=round(o['repetition'], 3), caption=o['captions'][0]) for o in looks][::4],
        cpu_seconds=round(time.process_time()-seconds, 1))

@call_parse
def main(
    work:Path=Path('safety_net'), # Folder for encoders and runs
    seeds:int=3, # Runs of each set-up
    only:str='', # Only set-ups whose name has this in it
    first:int=41, # The first seed; the sizes were chosen on seed 30, and the rule was changed after seeds 31 to 33
    join:str='', # Train nothing: put the runs of these files (with commas between them) into the account
    out:Path=Path('nbs/results/data/safety_net.json'), # Where the account goes; what is in it is not done again
):
    "Train stage 1 and stage 2 in every set-up, and note which captioner is kept, why, and what the test photos say. Seeds may run side by side with files of their own"
    torch.set_num_threads(1)
    found = read_json(out) if out.is_file() else dict(meta=dict(commit=commit(), torch=torch.__version__, device=platform.processor() or 'cpu', settings=small, free=free), runs={})
    for o in filter(None, join.split(',')): found['runs'] |= read_json(o)['runs']
    if join:
        write_json(out, found)
        return
    for seed in range(first, first+seeds):
        for name,(row,settings,reward) in setups(work).items():
            key = f'{name}, seed {seed}'
            if key in found['runs'] or only not in name: continue
            folder = work/'runs'/key.replace(' ', '_').replace(',', '')
            found['runs'][key] = dict(setup=name)|one(folder, row, settings, reward, seed)
            write_json(out, found)
            print(key, json.dumps({k:v for k,v in found['runs'][key].items() if k!='looks'}), flush=True)
