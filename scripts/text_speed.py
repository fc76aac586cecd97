"""What texts cost: the text network, rewards, CIDEr-D, its tokenizer and imports, beside an earlier
version of the package in the same process, round by round. Prints and writes JSON with medians of
CPU seconds (Java's included) and of wall seconds, one thread of torch.

The encoder is an OpenCLIP ViT-B/32 with random weights. Captions are drawn scenes', or those of
a file with one JSON object per line that has `captions`."""
import argparse, importlib, importlib.util, json, os, platform, random, subprocess, sys, tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from unittest.mock import patch
import numpy as np, psutil, torch
from grid import commit
from clipcap_ssl.core import write_json
from clipcap_ssl.data.scenes import ToyScenes
from clipcap_ssl.metrics import words
from clipcap_ssl.metrics.cider import CiderD
from clipcap_ssl.models.encoder import load_encoder
from clipcap_ssl.rewards import reward
from full_size import save_encoder
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer


def earlier(folder):
    "Import the package of another checkout under another name"
    place = Path(folder)/'clipcap_ssl'
    spec = importlib.util.spec_from_file_location('earlier_ssl', place/'__init__.py',
                                                  submodule_search_locations=[str(place)])
    sys.modules['earlier_ssl'] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules['earlier_ssl'])
    def module(name): return importlib.import_module(f'earlier_ssl.{name}')
    return module

def cpu():
    "CPU seconds of this process and of all it started"
    t = os.times()
    total = time.process_time()+t.children_user+t.children_system
    for o in psutil.Process().children(recursive=True):
        try: total += sum(o.cpu_times()[:2])
        except psutil.Error: pass
    return total

def rounds(ways, inputs):
    "Median seconds of each way, taking turns; every input is new to all of them"
    took = {name:[] for name in ways}
    for given in inputs:
        for name,f in ways.items():
            start,wall = cpu(),time.perf_counter()
            f(given)
            took[name].append((cpu()-start, time.perf_counter()-wall))
    def middle(rows, k): return round(median(o[k] for o in rows), 4)
    return {name:dict(cpu_seconds=middle(rows, 0), seconds=middle(rows, 1), rounds=len(rows))
            for name,rows in took.items()}

def captions_of(path, n):
    "id -> five captions: of a file, or of drawn scenes"
    if path is None:
        ds = ToyScenes(n, seed=51)
        return {i:list(c) for i,c in zip(ds.ids, ds.captions)}
    rows = [json.loads(line) for line in Path(path).read_text(encoding='utf-8').splitlines()]
    return {r['id']:r['captions'] for r in rows if len(r['captions'])>1}

def usual_tokens(texts):
    "pycocoevalcap's own tokenizer, started for the call"
    path = f"{words.java_home()/'bin'}{os.pathsep}{os.environ['PATH']}"
    as_coco = {k:[{'caption':o}] for k,o in enumerate(texts)}
    with patch.dict(os.environ, PATH=path): return PTBTokenizer().tokenize(as_coco)

def text_network(old, new, half, texts, n):
    "Embedding 160 captions; how far the vectors are apart"
    batches = [texts[160*k:160*k+160] for k in range(n)]
    report = rounds({'earlier': old.encode_text, 'now': new.encode_text,
                     'now, bfloat16': half.encode_text}, batches)
    a,b,c = (o.encode_text(batches[0]) for o in (old, new, half))
    report['largest difference to earlier'] = (a-b).abs().max().item()
    report['least cosine in bfloat16'] = (b*c).sum(-1).min().item()
    return report

def text_reward(old_module, old, new, texts, n):
    "Cosine and contrast together, of 32 images with 5 samples, a third of them repeated"
    rng,bank = random.Random(0),torch.nn.functional.normalize(torch.randn(64, new.dim), dim=-1)
    batches = [rng.choices(texts[110*k:110*k+110], k=160) for k in range(n)]
    ways = {}
    for name,(module,encoder) in dict(earlier=(old_module, old), now=(reward, new)).items():
        both = module.weighted((1., module.clip_reward(encoder)),
                               (1., module.contrastive_reward(encoder, bank=bank)))
        ways[name] = lambda o, f=both: f(o, bank[:32])
    report = rounds(ways, batches)
    a,b = (f(batches[0]) for f in ways.values())
    return report | {'largest difference to earlier': (a-b).abs().max().item()}

def cider_reward(old_class, references, n, n_images=32):
    "CIDEr-D of 160 new captions against fixed references"
    rng,ids = random.Random(0),list(references)[:2000]
    known = {i:references[i][1:] for i in ids}
    ways = {'earlier': old_class(known), 'now': CiderD(known), 'now, unicode words':
            CiderD(known, tokenize='unicode')}
    def usual(given):
        texts,at = given
        refs = {k:words.ptb_tokenize(known[i]) for k,i in enumerate(at)}
        return Cider().compute_score(refs, usual_tokens(texts))
    batches = []
    for _ in range(n):
        at = rng.choices(ids, k=n_images)*5
        shuffled = [references[i][0].split() for i in at]
        for ws in shuffled: rng.shuffle(ws)
        batches.append(([' '.join(ws) for ws in shuffled], at))
    apply = {name:(lambda o, f=f: f(*o)) for name,f in ways.items()}
    return rounds({'pycocoevalcap': usual, **apply}, batches)

def many_captions(old_class, references):
    "CIDEr-D of every caption of up to 8,000 images against the others; tokenizers included"
    ids = list(references)[:8000]
    texts = [references[i][0] for i in ids]
    rest = {i:references[i][1:] for i in ids}
    # the fifth of the captions that is judged is repeated, so that there are 40,000
    scores,tokens = {},dict(earlier=sys.modules['earlier_ssl.metrics.words']._tokens,
                            now=words._tokens)
    def usual(_):
        flat = usual_tokens([*texts*5, *(o for i in ids for o in rest[i])])
        rows = iter([flat[k][0] for k in range(len(flat))])
        caps = [next(rows) for _ in range(5*len(ids))]
        refs = {i:[next(rows) for _ in rest[i]] for i in ids}
        for k in range(5):
            caps_k = {i:[c] for i,c in zip(ids, caps[k*len(ids):])}
            scores['pycocoevalcap'] = Cider().compute_score(refs, caps_k)[1]
    def ours(name, kind):
        def run(_):
            tokens[name].clear()
            scores[name] = kind(rest)(texts*5, ids*5)[:len(ids)]
        return run
    report = rounds({'pycocoevalcap': usual, 'earlier': ours('earlier', old_class),
                     'now': ours('now', CiderD)}, [None])
    apart = np.abs(scores['now']-scores['pycocoevalcap']).max()
    return report | {'captions': 5*len(ids), 'references': sum(map(len, rest.values())),
                     'largest difference to pycocoevalcap': float(apart)}

def tokenizer(texts):
    "Tokens by the Java that stays open, in batches, against one that is started for all texts"
    different,rng = list(dict.fromkeys(texts)),random.Random(1)
    once,kept,start = words._run_once(different),[],0
    while start<len(different):
        size = rng.choice([1, 8, 160, 1000])
        kept += words._run_tokenizer(different[start:start+size])
        start += size
    return dict(captions=len(different), differ=sum(a!=b for a,b in zip(once, kept)))

def choices(old, new, half, n=1000):
    "Scenes that pick another caption out of a pool, and the vectors' differences, with 'toy'"
    ds = ToyScenes(n, seed=904)
    photos,pool = [ds.image(i) for i in range(n)],[c for cs in ds.captions for c in cs]
    x,y = ({k:f(o) for k,o in dict(earlier=old, now=new, half=half).items()} for f in
           (lambda o: o.encode_image(photos), lambda o: o.encode_text(pool)))
    picks = {k:[pool[i] for i in (x[k]@y[k].T).argmax(1).tolist()] for k in x}
    own = {}
    for k in x:
        best = torch.einsum('nd,nsd->ns', x[k], y[k].view(n, 5, -1)).argmax(1).tolist()
        own[k] = [captions[i] for i,captions in zip(best, ds.captions)]
    def agree(a, b): return sum(o==p for o,p in zip(a, b))/n
    report = dict(scenes=n, pool=len(pool),
                  largest_difference=(y['now']-y['earlier']).abs().max().item())
    for k in ('now','half'):
        report[f'same caption of the pool, {k}'] = agree(picks[k], picks['earlier'])
        report[f'same best of five, {k}'] = agree(own[k], own['earlier'])
    return report

def imports(folders, n):
    "CPU seconds of imports and of a command's help, in processes of their own"
    jobs = {'import clipcap_ssl': 'import clipcap_ssl',
            'import all of training': 'import clipcap_ssl.pipeline.experiment',
            'clipcap_train --help': 'from clipcap_ssl.pipeline.cli import clipcap_train as f; f()'}
    report = {}
    for job,code in jobs.items():
        def run(folder):
            with tempfile.TemporaryDirectory() as d:
                (Path(d)/'clipcap_train').write_text(code)
                env = os.environ|dict(PYTHONPATH=str(Path(folder).resolve()))
                subprocess.run([sys.executable, str(Path(d)/'clipcap_train'), '--help'], env=env,
                               check=True, stdout=subprocess.DEVNULL)
        ways = {name:(lambda _, o=folder: run(o)) for name,folder in folders.items()}
        report[job] = rounds(ways, [None]*n)
    return report

def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('earlier', help='a checkout of the version to compare with')
    p.add_argument('--captions', help='file with one JSON object per line that has `captions`')
    p.add_argument('--out', default='nbs/results/data/text_speed.json', help='where to write')
    p.add_argument('--rounds', type=int, default=5, help='rounds of each measurement')
    p.add_argument('--only', nargs='*', help='parts to measure; others stay as they are in --out')
    p.add_argument('--small', action='store_true', help='narrow networks, to try the script')
    a = p.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module,here,made = earlier(a.earlier),Path(__file__).parent.parent,[]
    references = captions_of(a.captions, 300 if a.small else 8000)
    texts = [c for cs in references.values() for c in cs]
    random.Random(0).shuffle(texts)
    old_load,old_cider = module('models.encoder').load_encoder,module('metrics.cider').CiderD
    def encoders():
        "The same random encoder, loaded by both versions, and in bfloat16"
        if not made:
            with tempfile.TemporaryDirectory() as d:
                save_encoder(Path(d)/'clip', a.small)
                name = f'open_clip:{d}/clip'
                made.extend([old_load(name), load_encoder(name),
                             load_encoder(name, dtype=torch.bfloat16)])
        return made
    libraries = ('torch','open_clip_torch','numpy','pycocoevalcap')
    git = ['git', '-C', a.earlier, 'log', '-1', '--format=%h']
    before = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    report = dict(commit=commit(), earlier=before, machine=machine(),
                  captions=a.captions and Path(a.captions).name,
                  versions={o:version(o) for o in libraries})
    parts = dict(
        text_network=lambda: text_network(*encoders(), texts, a.rounds),
        text_reward=lambda: text_reward(module('rewards.reward'), *encoders()[:2], texts, a.rounds),
        cider_reward=lambda: cider_reward(old_cider, references, 2*a.rounds),
        tokenizer=lambda: tokenizer(texts),
        choices=lambda: choices(old_load('toy'), load_encoder('toy'),
                                load_encoder('toy', dtype=torch.bfloat16)),
        many_captions=lambda: many_captions(old_cider, references),
        imports=lambda: imports(dict(earlier=a.earlier, now=here), a.rounds))
    if a.only and Path(a.out).is_file():
        report = json.loads(Path(a.out).read_text(encoding='utf-8'))|report
    for part,f in parts.items():
        if a.only and part not in a.only: continue
        report[part] = f()
        print(part, json.dumps(report[part], indent=1), flush=True)
        write_json(a.out, report)

def machine():
    "The processor, its cores, and whether it knows bfloat16"
    known = Path('/proc/cpuinfo')
    lines = known.read_text().splitlines() if known.is_file() else []
    found = {k:next((o.partition(':')[2].strip() for o in lines if o.startswith(k)), '')
             for k in ('model name','flags')}
    return dict(processor=found['model name'] or platform.processor(), cores=os.cpu_count(),
                bfloat16=[o for o in ('avx512_bf16','amx_bf16') if o in found['flags'].split()])

if __name__=='__main__': main()
