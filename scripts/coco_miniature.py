"""Every row of the recipe coco_2pct on a drawn miniature of COCO's layout, with random ViT-B/32 and
GPT-2 at full size: python scripts/coco_miniature.py [--out nbs/results/data/coco_miniature.json]

Scenes of our painter become JPEG files of 640x480 in train2014/ and val2014/, with annotations/ and
dataset_coco.json in the exact fields. `clipcap_train coco_2pct` then runs one row after the other,
each in a process of its own, a few steps of the recipe's own batch sizes. We write seconds per step
(the median, between steps of the optimiser), CPU seconds and peak memory of every row."""
import argparse, json, os, platform, resource, statistics, subprocess, sys, tempfile, time
from importlib import metadata
from pathlib import Path
import torch
from PIL import Image
from clipcap_ssl.core import write_json
from clipcap_ssl.data.base import subset
from clipcap_ssl.data.captions import write_coco
from clipcap_ssl.data.scenes import ToyScenes
from clipcap_ssl.documents import read_document

rows = ['stage1', 'guided', 'best_of_n', 'stage2_expert', 'stage2_policy', 'stage2_gumbel',
        'abstract', 'full', 'full_stage2']
n_photos = dict(train=128, restval=64, val=8, test=16)
few = dict(n_dev=8, n_pairs=72, n_dev_pairs=8, expert_rounds=1, expert_null=32, best_of=4)

def status(key):
    "A line of this process's memory account, GiB; None where there is no such account"
    try: lines = Path('/proc/self/status').read_text().splitlines()
    except OSError: return None
    return round(int(next(o for o in lines if o.startswith(key)).split()[1])/2**20, 2)

def forget_peak():
    "Begin to measure anew"
    try: Path('/proc/self/clear_refs').write_text('5')
    except OSError: pass

def draw(folder):
    "The miniature"
    ds,parts,at = ToyScenes(sum(n_photos.values()), seed=900),{},0
    for split,n in n_photos.items():
        parts[split] = subset(ds, range(at, at+n))
        at += n
    return write_coco(folder, parts, lambda o: o.resize((640,480), Image.Resampling.BICUBIC))

def train(work, row, steps, small=False):
    "clipcap_train for one row or several"
    from clipcap_ssl.pipeline import cli
    names = ('steps','full_steps','expert_steps','policy_steps','gumbel_steps','abstract_steps')
    over = few | dict.fromkeys(names, steps) | dict(rows=row, data=f'karpathy:{work/"coco"}',
        encoder=f'open_clip:{work/"clip"}', judge=f'open_clip:{work/"clip"}', lm=str(work/'gpt2'))
    if small: over |= dict(policy_batch=4, batch=8, max_new_tokens=8)
    given = [f'{k}={v}' for k,v in over.items()]
    cli.clipcap_train('coco_2pct', set=given, out=str(work/'run'), device='cpu')

def one_row(work, row, steps, small):
    "Run one row in this process, and write what it cost"
    from clipcap_ssl.pipeline import cli, experiment
    times,cpu,was = [],[],torch.optim.AdamW.step
    def timed(self, *args, **kwargs):
        if not times: forget_peak()
        found = was(self, *args, **kwargs)
        times.append(time.perf_counter())
        cpu.append(time.process_time())
        return found
    torch.optim.AdamW.step = timed
    order = experiment._row_order
    def keep_starts(cfg, rows): return order(cfg, rows)[0],{'stage1','stage2_expert','full'}
    experiment._row_order = keep_starts                      # later rows start from what is saved
    experiment.score_run = lambda *args, **kwargs: {}        # rows are judged together, at the end
    cli._report = lambda *args: None
    train(work, row, steps, small)
    def median(o):
        between = [b-a for a,b in zip(o, o[1:])]
        return round(statistics.median(between), 2) if between else None
    done = read_document(work/'run'/'rows'/f'{row}.json', dict)
    write_json(work/f'{row}.json', dict(steps=len(times), seconds_per_step=median(times),
        cpu_seconds_per_step=median(cpu), cpu_seconds=done['cpu_seconds'],
        peak_gib=status('VmHWM')))

def machine():
    "What the numbers were measured on"
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.exists() else []
    named = (o.partition(': ')[2] for o in lines if o.startswith('model name'))
    name = next(named, platform.machine())
    bf16 = any('avx512_bf16' in o for o in lines if o.startswith('flags'))
    return dict(processor=name, avx512_bf16=bf16, threads=torch.get_num_threads(),
        cores=os.cpu_count(), python=platform.python_version(), torch=torch.__version__,
        transformers=metadata.version('transformers'))

def commit():
    "The commit of this checkout, with + if files differ from it"
    def git(*args):
        found = subprocess.run(['git', '-C', Path(__file__).parent, *args], capture_output=True,
                               text=True)
        return found.stdout.strip() if found.returncode==0 else ''
    changed = '+' if git('status', '--porcelain', '-uno') else ''
    return git('rev-parse', '--short=12', 'HEAD')+changed

def main():
    as_written = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    p.add_argument('--out', default='nbs/results/data/coco_miniature.json', type=Path)
    p.add_argument('--steps', type=int, default=4, help='steps per row')
    p.add_argument('--rows', default=','.join(rows), help='rows, by commas')
    p.add_argument('--small', action='store_true', help='narrow models, to try the script itself')
    p.add_argument('--work', type=Path, help='where everything lies; default: a temporary folder')
    p.add_argument('--row', help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.row: return one_row(a.work, a.row, a.steps, a.small)
    with tempfile.TemporaryDirectory() as d:
        work = a.work or Path(d)
        work.mkdir(parents=True, exist_ok=True)
        os.environ['CLIPCAP_HOME'] = str(work/'cache')
        if not (work/'coco').is_dir():
            sys.path.insert(0, str(Path(__file__).parent))
            from full_size import save_encoder, save_lm
            draw(work/'coco')
            save_encoder(work/'clip', a.small)
            save_lm(work/'gpt2', a.small)
        found = {}
        for row in a.rows.split(','):
            again = [sys.executable, __file__, '--work', str(work), '--row', row,
                     '--steps', str(a.steps), *['--small']*a.small]
            began = time.perf_counter()
            subprocess.run(again, check=True, stdout=subprocess.DEVNULL)
            found[row] = read_document(work/f'{row}.json', dict) | dict(
                seconds=round(time.perf_counter()-began, 1))
            print(row, found[row], file=sys.stderr, flush=True)
            write_json(a.out, dict(commit=commit(), machine=machine(), recipe='coco_2pct',
                photos=n_photos, settings=few, small=a.small,
                encoder='ViT-B-32, random weights', lm='GPT-2 small, random weights', rows=found))
        # all rows judged together, by the command itself
        train(work, ','.join([*a.rows.split(','), 'human']), a.steps, a.small)

if __name__ == '__main__': main()
