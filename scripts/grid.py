"""Run a grid of experiments: every variant with every seed. Finished runs are not done again, so a
grid that was interrupted goes on."""
import json, os, subprocess, time, tomllib
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch
from fastcore.script import Param, call_parse


def commit():
    "The last commit of what the package is made of, with a mark if it differs from that"
    top,book = Path(__file__).parent.parent,['--','nbs','clipcap_ssl/recipes','clipcap_ssl/assets',':!nbs/results']
    def git(*args): return subprocess.run(['git', *args, *book], cwd=top, capture_output=True, text=True).stdout.strip()
    return (git('log', '-1', '--format=%h') or 'unknown')+('-dirty' if git('status', '--porcelain') else '')


def dev_of_scenes(cfg, out, keep):
    "The dev scores of every row by the scene graph, and those of single scenes"
    from clipcap_ssl.core import read_json
    from clipcap_ssl.data.base import references
    from clipcap_ssl.pipeline.setup import plan_parts, scene_parts
    from clipcap_ssl.report.evaluate import evaluate, human_row
    drawn = scene_parts(cfg)[0]
    human,refs = human_row(references(plan_parts(cfg).dev))
    graphs = {i:s for i,s in zip(drawn.ids, drawn.scenes) if i in refs}
    captions = {f.stem: read_json(f)['dev'] for f in sorted((out/'rows').glob('*.json'))}
    if 'human' in cfg.rows: captions['human'] = human
    found = {row:evaluate(said, refs, scenes=graphs) for row,said in captions.items()}
    def number(v): return None if v!=v else round(float(v), 3)      # a caption that claims nothing has no precision
    each = {row:{k:[number(v) for v in o.each[k]] for k in keep if k in o.each} for row,o in found.items()}
    return {row:{k:float(o[k]) for k in keep if k in o} for row,o in found.items()},each,captions


def one(recipe, settings, out, result, grid, version):
    "One experiment in a process of its own; its result as one JSON file"
    import torch
    from clipcap_ssl.pipeline.config import load_config
    from clipcap_ssl.core import read_json, write_text
    from clipcap_ssl.pipeline.experiment import run
    torch.set_num_threads(1)
    start = time.time()
    run(load_config(recipe, **settings), out, say=lambda o: None)
    found = read_json(Path(out)/'scores.json')
    found['meta']['commit'] = version
    found['meta']['wall_seconds'] = round(time.time()-start, 1)
    keep = ('cider','p_at_1_100','oracle_p_at_1_100','precision','recall','named_precision','named_recall')   # the pages' intervals
    keep_each,n_captions = grid.get('each', False),grid.get('captions', 0)
    if n_captions:
        files = sorted((Path(out)/'rows').glob('*.json'))
        found['captions'] = {f.stem:list(read_json(f)['captions'].values())[:n_captions] for f in files}
    if keep_each:
        each = read_json(Path(out)/'each.json')
        found['each'] = {r:{k:v for k,v in o.items() if k in keep} for r,o in each.items()}
    cfg = load_config(recipe, **settings)
    if keep_each and cfg.n_dev and cfg.data=='scenes':
        dev,found['dev_each'],found['dev_captions'] = dev_of_scenes(cfg, Path(out), keep)
        found['dev'] = {row:o|dev[row] for row,o in found['dev'].items()}
    write_text(result, json.dumps(found, ensure_ascii=False, allow_nan=False)+'\n')
    return time.time()-start


def jobs(grid, name, out, data, version, only_seeds):
    "(label, arguments of `one`) of what is not done yet"
    for variant,settings in grid['variants'].items():
        for seed in settings.pop('seeds', grid['seeds']):
            if only_seeds and seed not in only_seeds: continue
            result = Path(data)/name/f'{variant}-seed{seed}.json'
            if result.is_file(): continue
            own = grid.get('settings', {}) | settings | {'seed': seed}
            yield result.stem,(grid['recipe'], own, Path(out)/name/result.stem, result, grid, version)


@call_parse
def main(
    grid:str, # A TOML file: recipe, seeds, settings for all, a table of settings per variant
    out:str='runs/grids', # Folder of the runs
    data:str='nbs/results/data', # Folder of the results: GRID/VARIANT-seedN.json
    workers:int=2, # Experiments side by side, one thread each
    only:Param('Only these variants', str, nargs='*')=None,
    seeds:Param('Only these of the seeds', int, nargs='*')=None,
    set:Param('A setting for all, as key=value; may be repeated', str, action='append')=None,
):
    "Run a grid of experiments. Example: python scripts/grid.py scripts/grids/main.toml"
    conf = tomllib.loads(Path(grid).read_text(encoding='utf-8'))
    conf['settings'] = conf.get('settings', {}) | dict(o.split('=', 1) for o in set or [])
    if only: conf['variants'] = {k:v for k,v in conf['variants'].items() if k in only}
    todo = list(jobs(conf, Path(grid).stem, out, data, commit(), seeds))
    print(f'{len(todo)} experiments to do', flush=True)
    failed = 0
    pool = ProcessPoolExecutor(workers, mp_context=get_context('spawn'))
    with pool, patch.dict(os.environ, TQDM_DISABLE='1', OMP_NUM_THREADS='1'):
        running = {pool.submit(one, *args):label for label,args in todo}
        for n,j in enumerate(as_completed(running), 1):
            try: print(f'{n}/{len(todo)} {running[j]}: {j.result():.0f} s', flush=True)
            except Exception as e:
                failed += 1
                print(f'{n}/{len(todo)} {running[j]} failed: {type(e).__name__}: {e}', flush=True)
    raise SystemExit(failed>0)
