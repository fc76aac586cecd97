"""How fast is each job, beside the plain way of doing it? One command, one file:

    python benchmarks/run.py [--only JOB ...] [--quick]

Every job runs in a process of its own, on one thread, with random ViT-B/32 and GPT-2. Its variants
take turns (A B C, A B C, ...), so that a machine that grows busy is busy for all of them. We write
CPU seconds per unit: median, least and most. Peak memory comes from further processes, one per
variant. `--quick` takes narrow models and two rounds: it tries the script and measures nothing.
Results go to nbs/results/data/benchmarks.json, jobs that were not run keep what they had there."""
import argparse, copy, inspect, itertools, json, os, platform, random, resource, statistics, subprocess, sys
import tempfile, time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
top = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(top), str(top/'scripts'), str(Path(__file__).parent)]

words = ('a the dog cat man woman child street red blue small large wooden table holding riding '
         'standing near with on in of two three people water grass plate food train bus sign').split()

def texts_of(n, seed=0):
    "Made-up captions, as long as COCO's: 10.5 words with a few long ones"
    rng = random.Random(seed)
    lengths = [max(6, round(rng.gauss(10.5, 2)))+(rng.random()<.01)*25 for _ in range(n)]
    return [' '.join(rng.choices(words, k=k)) for k in lengths]

def fresh_texts(n):
    "Other captions at each call, since a reward remembers those that it has seen"
    seeds = itertools.count()
    return lambda: texts_of(n, next(seeds))

def cpu():
    "CPU seconds of this process and of those it has waited for"
    found = [resource.getrusage(o) for o in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(o.ru_utime+o.ru_stime for o in found)

def status(key):
    "A line of the process's memory account, GiB; None where there is none"
    try: lines = Path('/proc/self/status').read_text().splitlines()
    except OSError: return None
    return int(next(o for o in lines if o.startswith(key)).split()[1])/2**20

# ---- what jobs share

def load_parts(work, quick):
    "Encoder, captioner with a frozen language model, image features"
    import numpy as np, torch
    from PIL import Image
    from clipcap_ssl.core import set_seed
    from clipcap_ssl.models.captioner import new_captioner
    from clipcap_ssl.models.encoder import load_encoder
    set_seed(0)
    encoder = load_encoder(f'open_clip:{work}/clip')
    model = new_captioner(encoder, str(work/'gpt2'), 'mlp', n_prefix=10, train_lm=False).eval()
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (480,640,3), np.uint8)) for _ in range(32)]
    x = torch.nn.functional.normalize(torch.randn(32, encoder.dim), dim=-1)
    return SimpleNamespace(encoder=encoder, model=model, images=images, x=x, quick=quick, work=work,
                           n_tokens=6 if quick else 20, end=model.tokenizer.eos_token_id)

def half(model):
    "The same captioner in bfloat16"
    import torch
    return copy.deepcopy(model).to(torch.bfloat16)

def half_encoder(p):
    "The same encoder in bfloat16, where `load_encoder` offers that"
    import torch
    from clipcap_ssl.models.encoder import load_encoder
    if 'dtype' not in inspect.signature(load_encoder).parameters: return None
    return load_encoder(f'open_clip:{p.work}/clip', dtype=torch.bfloat16)

def has_bf16():
    "Has the processor products of bfloat16?"
    try: return 'avx512_bf16' in Path('/proc/cpuinfo').read_text()
    except OSError: return False

# ---- jobs: each gives variants, name -> (function, units); the first is the baseline

def image_embedding(p):
    "Images per second through ViT-B/32, reading and preprocessing left in"
    from baselines import embed_one_by_one
    n = 2 if p.quick else 8
    found = {'one at a time': (lambda: embed_one_by_one(p.encoder, p.images[:n]), n),
             'ours': (lambda: p.encoder.encode_image(p.images), 32)}
    light = half_encoder(p)
    if light and has_bf16(): found['ours, bf16'] = (lambda: light.encode_image(p.images), 32)
    return found

def labelled(p, n=240):
    "Pairs of features and made-up captions"
    from clipcap_ssl.models.lm import tokenize_captions
    from clipcap_ssl.train.supervised import Pairs
    tokens,mask = tokenize_captions(p.model.tokenizer, texts_of(n))
    return Pairs(p.x.repeat(n//32+1, 1)[:n], tokens, mask)

def stage1(p):
    "Samples per second of stage 1 with a frozen language model, batches of 40"
    from baselines import pad_to_corpus, train_prefix
    from clipcap_ssl.train.supervised import train_supervised
    pairs,batch = labelled(p),4 if p.quick else 40
    tokens,mask = pad_to_corpus(pairs.tokens, pairs.mask, p.model.mapper.k)
    mapper,lm = copy.deepcopy(p.model.mapper),copy.deepcopy(p.model.lm).requires_grad_(True)
    def plain(): train_prefix(mapper, lm, pairs.x, tokens, mask, 1, batch)
    def ours(model, n=3):
        return lambda: train_supervised(model, pairs, n_steps=n, batch_size=batch, lr=2e-5, lr_lm=0)
    found = {'ClipCap, --only_prefix': (plain, batch), 'ours': (ours(p.model), 3*batch)}
    if has_bf16():
        light = copy.deepcopy(p.model)
        from clipcap_ssl.train.loop import in_precision
        def bf16():
            with in_precision('bf16'): ours(light)()
        found['ours, bf16'] = (bf16, 3*batch)
    return found

def stage2(p):
    "Images per second of the policy gradient, five samples each, whole captioner trained"
    from baselines import embed_texts_padded, policy_batched, policy_one_by_one, policy_parts
    from clipcap_ssl.models.encoder import open_clip
    from clipcap_ssl.rewards.reward import clip_reward
    from clipcap_ssl.train.policy import train_policy
    padded = open_clip.tokenizer.SimpleTokenizer()
    def plain_reward(texts, x):
        y = embed_texts_padded(p.encoder, padded, texts).view(len(x), -1, p.encoder.dim)
        return (y*x[:,None]).sum(-1)
    m,b = p.model,2 if p.quick else 8
    parts,opt = policy_parts(m.mapper, m.lm, m.tokenizer, plain_reward)
    model = copy.deepcopy(m)
    for o in model.parameters(): o.requires_grad_(True)
    model.__dict__['_encoder'] = p.encoder
    reward,seeds = clip_reward(p.encoder),itertools.count()
    def ours():
        "Three steps, among which the copy of the reference and the optimiser's first step are shared"
        train_policy(model, p.x[:b], reward, n_steps=3, batch_size=b, n_samples=5, lr=1e-6,
                     lr_lm=1e-6, label_weight=0, max_new_tokens=p.n_tokens, seed=next(seeds))
    return {'one by one': (lambda: policy_one_by_one(parts, opt, p.x[:1], n_tokens=p.n_tokens), 1),
            'batched': (lambda: policy_batched(parts, opt, p.x[:b], n_tokens=p.n_tokens), b),
            'ours': (ours, 3*b)}

def decoding(p, ours, n, plain, plain_name):
    "Variants of a decoder"
    found = {plain_name: (plain, 1), 'ours': (lambda: ours(p.model), n)}
    if has_bf16():
        light = half(p.model)
        found['ours, bf16'] = (lambda: ours(light), n)
    return found

def bare_generate(p, n):
    "transformers' own `generate`, without anything around it"
    import torch
    @torch.no_grad()
    def run():
        h = p.model.prefix(p.x[:n])
        mask = torch.ones(h.shape[:2], dtype=torch.long)
        return p.model.lm.generate(inputs_embeds=h, attention_mask=mask, do_sample=False,
            max_new_tokens=p.n_tokens, pad_token_id=p.end, eos_token_id=p.end)
    return run

def greedy_batch(p, n):
    "Greedy captions of `n` images at a time"
    import torch
    from baselines import greedy_one
    from clipcap_ssl.models.generate import greedy
    def plain():
        with torch.no_grad(): prefix = p.model.prefix(p.x[:1])
        return greedy_one(p.model.lm, prefix, p.n_tokens, p.end)
    def ours(model): return greedy(model, p.x[:n], max_new_tokens=p.n_tokens)
    found = decoding(p, ours, n, plain, 'ClipCap, one at a time, no cache')
    found["transformers' generate"] = (bare_generate(p, n), n)
    return found

def greedy_1(p):
    "Greedy captions per second, one image at a time"
    return greedy_batch(p, 1)

def greedy_32(p):
    "Greedy captions per second, 32 images at a time"
    return greedy_batch(p, 32)

def beam_5(p):
    "Captions per second by five beams, eight images at a time"
    import torch
    from baselines import beam_one
    from clipcap_ssl.models.generate import beam
    def plain():
        with torch.no_grad(): prefix = p.model.prefix(p.x[:1])
        return beam_one(p.model.lm, prefix, p.n_tokens, p.end)
    def ours(model): return beam(model, p.x[:8], 5, max_new_tokens=p.n_tokens)
    return decoding(p, ours, 8, plain, 'ClipCap, one at a time, no cache')

def text_reward(p):
    "Captions per second through CLIP's text tower, as a reward"
    from baselines import embed_texts_padded
    from clipcap_ssl.models.encoder import open_clip
    from clipcap_ssl.rewards.reward import clip_reward
    padded,reward = open_clip.tokenizer.SimpleTokenizer(),clip_reward(p.encoder)
    x,(for_plain,for_ours) = p.x[:16],(fresh_texts(64), fresh_texts(64))
    def plain():
        y = embed_texts_padded(p.encoder, padded, for_plain()).view(16, 4, -1)
        return (y*x[:,None]).sum(-1)
    return {'padded to 77': (plain, 64), 'ours': (lambda: reward(for_ours(), x), 64)}

def captions_and_references(n):
    "A caption and five references of `n` photos"
    said,refs = texts_of(n, 1),texts_of(5*n, 2)
    ids = [str(i) for i in range(n)]
    return dict(zip(ids, said)),{o:refs[5*i:5*i+5] for i,o in enumerate(ids)}

def cider_corpus(p):
    "CIDEr-D of 40,000 captions with five references each"
    from baselines import cider_of_coco
    from clipcap_ssl.metrics.cider import CiderD
    n = 200 if p.quick else 40_000
    said,refs = captions_and_references(n)
    one = {i:[o] for i,o in said.items()}
    return {'pycocoevalcap': (lambda: cider_of_coco(one, refs), n),
            'ours': (lambda: CiderD(refs)(list(said.values()), list(said)), n)}

def cider_reward(p):
    "CIDEr-D as a reward: steps of 160 captions, 5 of each of 32 photos of 1,000"
    import torch
    from baselines import cider_of_coco
    from clipcap_ssl.metrics.cider import CiderD
    from clipcap_ssl.rewards.reward import cider_reward
    _,refs = captions_and_references(50 if p.quick else 1000)
    ids,known = list(refs),torch.nn.functional.normalize(torch.randn(len(refs), 64), dim=-1)
    reward = cider_reward(CiderD(refs), ids, known)
    for_plain,for_ours = fresh_texts(160),fresh_texts(160)
    def plain():
        said = for_plain()
        names = [ids[i//5] for i in range(160)]
        one = {f'{o} {i}':[said[i]] for i,o in enumerate(names)}
        return cider_of_coco(one, {f'{o} {i}':refs[o] for i,o in enumerate(names)})
    return {'pycocoevalcap': (plain, 1), 'ours': (lambda: reward(for_ours(), known[:32]), 1)}

def started(code):
    "Run Python once"
    path = os.pathsep.join(filter(None, [str(top), os.environ.get('PYTHONPATH')]))
    def run():
        subprocess.run([sys.executable, '-c', code], check=True, stdout=subprocess.DEVNULL,
                       env=os.environ | dict(PYTHONPATH=path))
    return run

plain_imports = ('from clipcap_ssl.core import ensure_torchvision\nensure_torchvision()\n'
                 'import torch, open_clip\nfrom transformers import GPT2LMHeadModel, GPT2Tokenizer')

def start_import(p):
    "CPU seconds until the package can work"
    ours = 'from clipcap_ssl import Captioner, load_encoder, load_config, run, evaluate'
    return {'torch, open_clip and transformers': (started(plain_imports), 1),
            'ours': (started(ours), 1)}

def start_help(p):
    "CPU seconds of `clipcap_train --help`"
    plain = plain_imports+'\nimport argparse\nargparse.ArgumentParser().print_help()'
    ours = ("import sys\nsys.argv = ['clipcap_train','--help']\n"
            'from clipcap_ssl.pipeline.cli import clipcap_train\n'
            'try: clipcap_train()\nexcept SystemExit: pass')
    return {'imports first, then argparse': (started(plain), 1), 'ours': (started(ours), 1)}

# ---- growth: the same job at several sizes; a variant's name is its size

def sizes(p, quick, whole):
    "Sizes to try"
    return quick if p.quick else whole

def grow_labels(p):
    "Labelled pairs made ready for training: tokens and features"
    from clipcap_ssl.data.base import Captioned
    from clipcap_ssl.data.features import Features
    from clipcap_ssl.train.supervised import labelled_pairs
    said = texts_of(30_000)
    def ready(n):
        ids = [str(i) for i in range(n)]
        ds = Captioned(ids, [[o] for o in said[:n]], lambda i: None)
        feats = Features(ids, p.x.repeat(n//32+1, 1)[:n], '')
        return lambda: labelled_pairs(ds, [(i,0) for i in range(n)], feats, p.model)
    return {str(n):(ready(n), 1) for n in sizes(p, (100,300), (1000,3000,10_000,30_000))}

def grow_photos(p):
    "Expert iteration's choice: two captions per photo, every photo compared with every caption"
    import torch
    from clipcap_ssl.train.expert import pool_bias, select_captions
    def choice(n):
        x,y = (torch.nn.functional.normalize(torch.randn(o, 512), dim=-1) for o in (n, 2*n))
        def run():
            bias = pool_bias(x, y, torch.zeros(2*n), scale=100.)
            select_captions(x, y, bias, scale=100.)
        return run
    return {str(n):(choice(n), 1) for n in sizes(p, (200,400), (1000,2000,4000,8000))}

def grow_samples(p):
    "A step of the policy gradient on two photos, by samples per photo"
    from clipcap_ssl.rewards.reward import clip_reward
    from clipcap_ssl.train.policy import train_policy
    for o in p.model.parameters(): o.requires_grad_(True)
    def step(n):
        return lambda: train_policy(p.model, p.x[:2], clip_reward(p.encoder), n_steps=1,
            batch_size=2, n_samples=n, lr=1e-6, lr_lm=1e-6, label_weight=0,
            max_new_tokens=p.n_tokens)
    return {str(n):(step(n), 1) for n in sizes(p, (2,4), (2,4,8,16))}

def grow_lengths(p):
    "Greedy captions of eight photos, by tokens"
    from clipcap_ssl.models.generate import greedy
    def write(n): return lambda: greedy(p.model, p.x[:8], max_new_tokens=n)
    return {str(n):(write(n), 1) for n in sizes(p, (4,8), (5,10,20,40,80))}

# job -> (variants, unit, against which baselines, by how much: the goals)
jobs = dict(
    image_embedding=(image_embedding, 'images', {'one at a time': (1.2, 2.3)}),
    stage1=(stage1, 'samples', {'ClipCap, --only_prefix': (3, 4)}),
    stage2=(stage2, 'images', {'one by one': (12, None), 'batched': (4, None)}),
    greedy_1=(greedy_1, 'captions', {'ClipCap, one at a time, no cache': (4, None),
                                     "transformers' generate": (1, None)}),
    greedy_32=(greedy_32, 'captions', {'ClipCap, one at a time, no cache': (20, 35)}),
    beam_5=(beam_5, 'captions', {'ClipCap, one at a time, no cache': (12, 15)}),
    text_reward=(text_reward, 'captions', {'padded to 77': (6, None)}),
    cider_corpus=(cider_corpus, 'captions', {'pycocoevalcap': (2.5, None)}),
    cider_reward=(cider_reward, 'steps', {'pycocoevalcap': (15, None)}),
    start_import=(start_import, 'starts', {}),
    start_help=(start_help, 'starts', {}),
    grow_labels=(grow_labels, 'runs', {}), grow_photos=(grow_photos, 'runs', {}),
    grow_samples=(grow_samples, 'runs', {}), grow_lengths=(grow_lengths, 'runs', {}))
seconds_goals = dict(start_import=2., start_help=1.)
needs_no_models = ('cider_corpus','cider_reward','start_import','start_help','grow_photos')

# ---- measuring

def parts_of(name, work, quick):
    "What a job is handed"
    return SimpleNamespace(quick=quick) if name in needs_no_models else load_parts(work, quick)

def flops(run):
    "Floating-point operations of a function, as torch counts them; None where it cannot"
    from torch.utils.flop_counter import FlopCounterMode
    try:
        with FlopCounterMode(display=False) as counter: run()
        return counter.get_total_flops()
    except Exception: return None

def difference(a, b):
    "Largest difference of two results that are numbers; None otherwise"
    import torch
    try: a,b = (torch.as_tensor(o).float() for o in (a, b))
    except Exception: return None
    n = min(len(a), len(b)) if a.ndim and b.ndim else 0
    return float((a[:n]-b[:n]).abs().max()) if n and a[:n].shape==b[:n].shape else None

def measure(name, work, quick, rounds):
    "Time the variants of a job in turns"
    import torch
    torch.set_num_threads(1)
    variants = jobs[name][0](parts_of(name, work, quick))
    results = {k:run() for k,(run,_) in variants.items()}                # warm, and compare
    first = next(iter(results))
    times = {k:[] for k in variants}
    for _ in range(rounds):
        for k,(run,n) in variants.items():
            began = cpu()
            run()
            times[k].append((cpu()-began)/n)
    found = {}
    for k,(run,n) in variants.items():
        t = sorted(times[k])
        count = flops(run) if name not in needs_no_models and k.startswith('ours') else None
        found[k] = dict(units=n, cpu_seconds_per_unit=statistics.median(t), least=t[0], most=t[-1],
            rounds=rounds, flop_per_unit=count/n if count else None,
            largest_difference=difference(results[first], results[k]) if k!=first else None)
    return found

def memory(name, variant, work, quick):
    "Peak memory of one variant above what its models take, GiB"
    import torch
    torch.set_num_threads(1)
    run,_ = jobs[name][0](parts_of(name, work, quick))[variant]
    before = status('VmRSS')
    try: Path('/proc/self/clear_refs').write_text('5')
    except OSError: pass
    run()
    peak = status('VmHWM')
    if peak is None: return dict(peak_gib=None, above_gib=None)
    if name.startswith('start'):                        # the work is done by a process of its own
        peak,before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss/2**20,0
    return dict(peak_gib=round(peak, 3), above_gib=round(max(peak-before, 0), 3))

def peaks(quick):
    "GFLOP/s of a product of matrices and GB/s of a copy, one thread"
    import torch
    torch.set_num_threads(1)
    n,found = 256 if quick else 2048,{}
    def best(run, repeats=5):
        times = []
        for _ in range(repeats):
            began = time.process_time()
            run()
            times.append(time.process_time()-began)
        return max(min(times), 1e-9)
    for kind in ('float32','bfloat16'):
        a,b = (torch.randn(n, n).to(getattr(torch, kind)) for _ in range(2))
        a@b
        found[f'gflops_{kind}'] = round(2*n**3/best(lambda: a@b)/1e9, 1)
    source = torch.randn(2**20 if quick else 2**27)
    target = torch.empty_like(source)
    found['memory_gb_s'] = round(2*source.nbytes/best(lambda: target.copy_(source))/1e9, 1)
    return found

def machine():
    "What the numbers were measured on"
    from coco_miniature import machine as facts
    names = ('open_clip_torch','numpy','tokenizers','pycocoevalcap')
    return facts() | {o:metadata.version(o) for o in names} | dict(
        load=round(os.getloadavg()[0], 1) if hasattr(os, 'getloadavg') else None)

def child(*args):
    "This script in a process of its own, which prints JSON last"
    env = os.environ | dict(OMP_NUM_THREADS='1', TQDM_DISABLE='1')
    found = subprocess.run([sys.executable, __file__, *args], stdout=subprocess.PIPE, text=True,
                           env=env, check=True)
    return json.loads(found.stdout.splitlines()[-1])

def main():
    as_written = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    p.add_argument('--only', nargs='+', choices=list(jobs))
    p.add_argument('--quick', action='store_true', help='narrow models, two rounds')
    p.add_argument('--rounds', type=int, help='default: 5, with --quick 2')
    p.add_argument('--out', type=Path, default=top/'nbs/results/data/benchmarks.json')
    for o in ('--job','--variant','--work','--peaks'): p.add_argument(o, help=argparse.SUPPRESS)
    a = p.parse_args()
    rounds,work = a.rounds or (2 if a.quick else 5),Path(a.work or '.')
    # 1) in a process of its own
    if a.peaks: return print(json.dumps(peaks(a.quick)))
    if a.variant: return print(json.dumps(memory(a.job, a.variant, work, a.quick)))
    if a.job: return print(json.dumps(measure(a.job, work, a.quick, rounds)))
    # 2) all jobs, one after the other
    from clipcap_ssl.core import write_json
    from coco_miniature import commit
    from full_size import save_encoder, save_lm
    out = a.out if not a.quick or a.out!=p.get_default('out') else Path('benchmarks-quick.json')
    before = json.loads(out.read_text(encoding='utf-8'))['jobs'] if out.is_file() else {}
    quick = ['--quick']*a.quick
    with tempfile.TemporaryDirectory() as d:
        save_encoder(Path(d)/'clip', a.quick)
        save_lm(Path(d)/'gpt2', a.quick)
        about = dict(quick=a.quick, machine=machine(), peaks=child('--peaks', 'yes', *quick))
        for name in a.only or jobs:
            of_job,unit,goals = jobs[name]
            began = time.perf_counter()
            args = ['--job', name, '--work', d, *quick]
            found = child(*args, '--rounds', str(rounds))
            for k,row in found.items(): row |= child(*args, '--variant', k)
            before[name] = dict(what=of_job.__doc__, unit=unit, variants=found, commit=commit(),
                goals=[dict(against=k, float32=o[0], bf16=o[1]) for k,o in goals.items()],
                seconds_goal=seconds_goals.get(name), seconds=round(time.perf_counter()-began))
            write_json(out, dict(**about, jobs=before))
            per = {k:f"{row['cpu_seconds_per_unit']:.4g}" for k,row in found.items()}
            print(name, per, file=sys.stderr, flush=True)

if __name__ == '__main__': main()
