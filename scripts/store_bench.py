"""What the store of features costs: python scripts/store_bench.py [--photos_from FOLDER]

Four parts, each in a process of its own, to nbs/results/data/store.json (see `--out`):

1. `synthetic`: rows of an encoder that costs nothing, so that what is left is the store: a tenth of
   `--rows` and all of them; rows per second, size on disk, peak memory, and the ratio of the times.
2. `grid`: grids of 50 x 768 in both precisions: size on disk, and reading five captions per photo.
3. `readers`: a folder of JPEGs is opened and made ready by threads and by processes (a DataLoader),
   alone and beside a ViT-B/32 with random weights that embeds them.
4. `photos`: all photos of a folder, embedded by that ViT-B/32: photos per second, peak memory. Left
   out where no folder is given.

Peak memory is what a process holds for itself. Pages of mapped files are counted apart, as the
operating system takes them back when it needs them."""
import os
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.update(TQDM_DISABLE='1', HF_HUB_OFFLINE='1')
import multiprocessing, platform, statistics, subprocess, tempfile, threading, time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from fastcore.script import Param, call_parse

sources = ['nbs/appendix/features.ipynb', 'nbs/appendix/store.ipynb', 'scripts/store_bench.py']

def commit():
    "The last commit that changed what is measured, with a mark if its files differ from it"
    def git(*args):
        call = ['git', *args, '--', *sources]
        top = Path(__file__).parent.parent
        return subprocess.run(call, cwd=top, capture_output=True, text=True).stdout.strip()
    last = git('log', '-1', '--format=%h') or 'unknown'
    return last+('-dirty' if git('status', '--porcelain') else '')

def machine():
    "What the figures were measured on"
    import torch
    try: cpu = [o for o in Path('/proc/cpuinfo').read_text().splitlines() if 'model name' in o][0]
    except (OSError, IndexError): cpu = ': '+(platform.processor() or platform.machine())
    return dict(processor=cpu.split(': ')[1], cores=os.cpu_count(), threads=torch.get_num_threads(),
                system=platform.system(), python=platform.python_version(), torch=torch.__version__)

@contextmanager
def measured(row):
    "Seconds, CPU seconds and peak memory of a block, into `row`"
    import psutil
    process,peak,done = psutil.Process(),[0, 0],threading.Event()
    def look():
        now = process.memory_info()
        mapped = getattr(now, 'shared', 0)
        peak[:] = max(peak[0], now.rss-mapped),max(peak[1], now.rss)
    def watch():
        while not done.wait(.05): look()
    look()
    before,thread = peak[0],threading.Thread(target=watch)
    thread.start()
    wall,cpu = time.perf_counter(),time.process_time()
    yield
    row.update(seconds=round(time.perf_counter()-wall, 2),
               cpu_seconds=round(time.process_time()-cpu, 2))
    look()
    done.set()
    thread.join()
    row.update(before_mib=round(before/2**20), peak_mib=round(peak[0]/2**20),
               peak_with_mapped_mib=round(peak[1]/2**20))

def disk(folder):
    "Bytes of the shards of a store"
    return sum(o.stat().st_size for o in folder.glob('*.safetensors'))


# ---- 1 and 2: rows that cost nothing

class Synthetic:
    "An encoder whose vectors are random, and whose photos are grey"
    name,hash,logit_scale = 'synthetic','synthetic',1.
    def __init__(self, seed, dim=512, patches=50, width=768):
        import torch
        self.dim,self.shape,self.device = dim,(patches, width),torch.device('cpu')
        self.some = torch.randn(4096, dim, generator=torch.Generator().manual_seed(seed))
    def ready(self, image): return image.width
    def encode_image(self, images): return self.some[:len(images)]/self.dim**.5
    def encode_grid(self, images):
        import torch
        wide = self.some.flatten()[:self.shape[0]*self.shape[1]].view(self.shape)
        return wide.expand(len(images), *self.shape)/self.shape[1]**.5

def grey(n):
    "A data set of `n` grey photos"
    from PIL import Image
    from clipcap_ssl.data.base import Captioned
    image = Image.new('RGB', (16,16), 'grey')
    return Captioned([f'{i:09d}.jpg' for i in range(n)], [()]*n, lambda i: image)

def synthetic(n, seed, folder, **how):
    "Make a store of `n` rows, and read it in batches"
    import torch
    from clipcap_ssl.data.store import embed_store, merge_store, read_store
    made,read,ds,out = {},{},grey(n),Path(folder)/f'{n}-{"-".join(map(str, how.values()))}'
    embed_store(Synthetic(seed), grey(64), out/'warm')        # imports
    with measured(made):
        embed_store(Synthetic(seed), ds, out, batch_size=256, workers=1, **how)
        merge_store(out, ds)
    made.update(rows=n, rows_per_second=round(n/made['seconds']), megabytes=round(disk(out)/1e6, 1))
    batches,gen = 200,torch.Generator().manual_seed(seed)
    with measured(read):
        x = read_store(out).x
        pairs = x.repeat_interleave(5)
        for _ in range(batches): pairs[torch.randint(len(pairs), (64,), generator=gen)]
    read.update(pairs=len(pairs), rows=64*batches,
                rows_per_second=round(64*batches/read['seconds']))
    return dict(make=made, read=read)


# ---- 3: threads or processes

def save_photos(folder, n, seed):
    "JPEGs of smoothed noise, 500 x 375"
    import numpy as np
    from PIL import Image
    rng = np.random.default_rng(seed)
    for i in range(n):
        small = Image.fromarray(rng.integers(0, 256, (25,33,3), np.uint8))
        small.resize((500,375), Image.BICUBIC).save(folder/f'{i:05d}.jpg', quality=90)

def big_encoder(folder):
    "A ViT-B/32 with random weights"
    from clipcap_ssl.core import set_seed
    from clipcap_ssl.models.encoder import load_encoder
    from full_size import save_encoder
    if not (folder/'clip').is_dir():
        set_seed(0)
        save_encoder(folder/'clip', False)
    return load_encoder(f'open_clip:{folder}/clip')

class Opened:
    "A data set for a DataLoader: photos, made ready and hashed"
    def __init__(self, ds, ready): self.ds,self.ready = ds,ready
    def __len__(self): return len(self.ds)
    def __getitem__(self, i):
        from clipcap_ssl.data.photos import content_hash
        image = self.ds.image(i)
        return self.ready(image),content_hash(image)

def by_threads(encoder, ds, workers):
    "Batches as the store opens them"
    from concurrent.futures import ThreadPoolExecutor
    from clipcap_ssl.data.features import _ahead
    with ThreadPoolExecutor(workers) as pool:
        for opened,*_ in _ahead(encoder, ds, 32, pool=pool): yield list(opened.values())

def by_processes(encoder, ds, workers):
    "Batches as a DataLoader opens them"
    from torch.utils.data import DataLoader
    how = dict(num_workers=workers, multiprocessing_context='fork') if workers else {}
    for x,_ in DataLoader(Opened(ds, encoder.ready), 32, **how): yield list(x)

def readers(n, seed, folder):
    "Photos per second by threads and by processes"
    from clipcap_ssl.data.store import find_photos
    folder = Path(folder)
    (folder/'jpegs').mkdir()
    save_photos(folder/'jpegs', n, seed)
    encoder,ds,found = big_encoder(folder),find_photos(folder/'jpegs'),{}
    for kind,batches in dict(threads=by_threads, processes=by_processes).items():
        for workers in (1, 2, 4):
            for embeds in (False, True):
                row = found[f'{kind} {workers}{", embedded" if embeds else ""}'] = {}
                seen = 0
                with measured(row):
                    for images in batches(encoder, ds, workers):
                        seen += len(images)
                        if embeds: encoder.encode_image(images)
                assert seen==n
                row['photos_per_second'] = round(n/row['seconds'], 1)
    return found


# ---- 4: real photos

def photos(source, manifest, folder):
    "Embed a folder of photos"
    from clipcap_ssl.data.store import embed_store, find_photos, merge_store, read_store
    row,folder,source = {},Path(folder),Path(source)
    encoder,ds = big_encoder(folder),find_photos(source, manifest)
    out = folder/f'store-{manifest}'
    with measured(row):
        embed_store(encoder, ds, out, batch_size=64, workers=2)
        merge_store(out, ds)
    n = len(read_store(out))
    return dict(row, photos=n, lost=len(ds)-n, photos_per_second=round(n/row['seconds'], 1),
                photos_per_cpu_second=round(n/row['cpu_seconds'], 1),
                megabytes=round(disk(out)/1e6, 1))


# ---- all

def alone(call, *args, **kwargs):
    "Call a function in a new process, which may have processes of its own"
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as pool:
        return pool.submit(call, *args, **kwargs).result()

def synthetic_part(rows, seed, folder):
    "Times and memory of a tenth of the rows, thrice, and of all"
    def once(n): return alone(synthetic, n, seed, tempfile.mkdtemp(dir=folder), rows=10_000)
    few,many = [once(rows//10) for _ in range(3)],once(rows)
    def ratio(k): return round(many['make'][k]/statistics.median(o['make'][k] for o in few), 2)
    return dict(few=few, many=many, times_as_long=ratio('seconds'),
                times_as_many_cpu_seconds=ratio('cpu_seconds'))

def grid_part(seed, folder):
    "Size and reading of grids"
    return {o:alone(synthetic, 4_000, seed, folder, grid=True, dtype=o)
            for o in ('float32','float16')}

@call_parse
def store_bench(
    rows:int=100_000, # synthetic rows
    photos_from:str='', # a folder of photos with captions.jsonl and perhaps unlabelled.jsonl
    seed:int=0, # of vectors, batches and JPEGs
    out:str='nbs/results/data/store.json', # the result; parts that are not run again stay in it
    only:Param('synthetic, grid, readers or photos; default: all', str, nargs='+')=None,
):
    "Measure the store of features"
    from clipcap_ssl.core import read_json, write_json
    found = read_json(out) if only and Path(out).is_file() else {}
    with tempfile.TemporaryDirectory() as d:
        def of_photos():
            names = ('captions.jsonl', 'unlabelled.jsonl')
            there = [o for o in names if (Path(photos_from)/o).is_file()]
            return {o:alone(photos, photos_from, o, d) for o in there}
        steps = dict(
            synthetic=lambda: synthetic_part(rows, seed, d),
            grid=lambda: grid_part(seed, d),
            readers=lambda: alone(readers, 128, seed, d))
        if photos_from: steps['photos'] = of_photos
        for name,step in steps.items():
            if only and name not in only: continue
            about = dict(commit=commit(), seed=seed, machine=machine())
            found[name] = dict(measured=step(), **about)
            write_json(out, found)
            print(name, found[name]['measured'], flush=True)
