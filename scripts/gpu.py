"""A graphics card against the processor, at full size and with random weights, in one command:

    python scripts/gpu.py                    # about five minutes on a large card
    python scripts/gpu.py --device cpu --small   # tries the script where there is no card

1. `agree`: the same ViT-B/32, GPT-2 and captioner on both: vectors, log-probabilities, the gradient
   of each loss on the same captions, and every decoder, whose captions the processor scores again.
2. `small`: the drawn world trained on both, from the same seed.
3. `cost`: seconds and peak memory of embedding, stage 1, each route of stage 2 and decoding, in
   float32 and in bfloat16.

The result is written after each part, so that a run that is cut short keeps what it has. Exit
status 1 if a part failed, or if the card and the processor disagree."""
import gc, json, os, sys, tempfile, time, traceback
os.environ.setdefault('TQDM_DISABLE', '1')
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from unittest.mock import patch
import numpy as np, torch
from fastcore.script import call_parse, store_true
from PIL import Image
from clipcap_ssl.core import default_device, set_seed, write_json
from clipcap_ssl.models.captioner import Captioner, caption_loss, new_captioner
from clipcap_ssl.models.encoder import load_encoder
from clipcap_ssl.models.generate import beam, best_of_n, greedy, guided, sample
from clipcap_ssl.models.lm import tokenize_captions
from clipcap_ssl.models.loading import load_lm
from clipcap_ssl.models.mapper import make_mapper
from clipcap_ssl.rewards.bridge import Bridge
from clipcap_ssl.rewards.reward import contrast_with, contrastive_reward
from clipcap_ssl.train.expert import train_expert
from clipcap_ssl.train.gumbel import gumbel_step, train_gumbel
from clipcap_ssl.train.loop import in_precision
from clipcap_ssl.train.policy import frozen_copy, policy_step, train_policy
from clipcap_ssl.train.supervised import Pairs, caption_step, train_supervised
from full_size import save_encoder, save_lm
from grid import commit

texts = [f'a photo of a {size} {colour} {shape} above two {other} squares'
         for size in ('small','large') for colour in ('red','blue','green','grey')
         for shape in ('star','circle','ring','cross') for other in ('white','dotted')]


# ---- the parts

def noise_images(n, size=224):
    "Images of noise"
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (size,size,3), np.uint8)) for _ in range(n)]

class World:
    "Encoder, language model and features of one device"
    def __init__(self, folder, device, n=64):
        self.folder, self.device = folder, torch.device(device)
        self.encoder = load_encoder(f'open_clip:{folder}/clip', device)
        self.images = noise_images(n)
        self.x = self.encoder.encode_image(self.images)

    def captioner(self, kind='mlp'):
        "A new captioner, the same on every device"
        lm,tok = load_lm(self.folder/'gpt2')
        set_seed(0)
        mapper = make_mapper(kind, self.encoder.dim, 10, e=lm.config.hidden_size)
        known = dict(encoder_name=self.encoder.name, encoder_hash=self.encoder.hash)
        return Captioner(mapper, lm, tok, **known).to(self.device).attach(self.encoder)

    def pairs(self, tokenizer, n=64):
        "The captions above as labels of the first images"
        tokens,mask = (o.to(self.device) for o in tokenize_captions(tokenizer, texts[:n]))
        return Pairs(self.x[torch.arange(len(tokens))%len(self.x)], tokens, mask)

def wait(device):
    "Until the card has done what it was told"
    if device.type=='cuda': torch.cuda.synchronize(device)

def fresh(device):
    "Forget the peak of memory, and what is no longer used"
    gc.collect()
    if device.type!='cuda': return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)

def peak_gib(device):
    "Most memory of the card since `fresh`; None without a card"
    if device.type=='cuda': return round(torch.cuda.max_memory_allocated(device)/2**30, 2)

def seconds(call, device, repeats=3):
    "Median seconds of a call, after one that warms up"
    call()
    took = []
    for _ in range(repeats):
        wait(device)
        began = time.perf_counter()
        call()
        wait(device)
        took.append(time.perf_counter()-began)
    return median(took)


# ---- 1) the same numbers

def largest(a, b):
    "Largest difference of two tensors"
    return (a.cpu().double()-b.cpu().double()).abs().max().item()

def vectors(here, there):
    "Differences of what the encoder gives"
    grids = [w.encoder.encode_grid(w.images[:8]) for w in (here, there)]
    said = [w.encoder.encode_text(texts) for w in (here, there)]
    return dict(image=largest(here.x, there.x), grid=largest(*grids), text=largest(*said))

def on(device, g):
    "The same captions on another device"
    return type(g)(g.tokens.to(device), g.mask.to(device), g.logprobs.to(device), g.text)

def gradient(loss_fn, model, rows):
    "Loss and gradient of one batch"
    model.eval()
    torch.manual_seed(1)
    loss = loss_fn(model, rows)[0]
    grads = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    return loss.item(),torch.cat([g.flatten().cpu() for g in grads])

def losses(w, model, written):
    "name -> loss function, of the same captions on every device"
    pairs,bank = w.pairs(model.tokenizer),w.x
    reference = frozen_copy(model)
    given = lambda *args, **kwargs: on(w.device, written)
    more = dict(reference=reference, labelled=pairs, label_batch=8, max_new_tokens=16)
    policy = policy_step(w.x, contrastive_reward(w.encoder, bank, 10.), n_samples=2, **more)
    gumbel = gumbel_step(w.x, Bridge(model.tokenizer, w.encoder), contrast_with(bank, 10.),
                         n_samples=2, **more)
    noise = torch.Tensor.exponential_
    def drawn(out, **kwargs): return out.copy_(noise(torch.empty(out.shape)))
    def sampled(module, step):
        def loss_fn(model, rows):
            with (patch(f'clipcap_ssl.train.{module}.sample', given),
                  patch.object(torch.Tensor, 'exponential_', drawn)): return step(model, rows)
        return loss_fn
    return dict(stage1=caption_step(pairs), policy=sampled('policy', policy),
                gumbel=sampled('gumbel', gumbel))

def gradients(here, there, models):
    "Agreement of loss and gradient, of each route"
    rows,found = torch.arange(8),{}
    written = on('cpu', sample(models[0], here.x[:8], 2, seed=3, max_new_tokens=16))
    steps = [losses(w, m, written) for w,m in zip((here, there), models)]
    for name in steps[0]:
        (l1,g1),(l2,g2) = (gradient(s[name], m, rows) for s,m in zip(steps, models))
        cosine = torch.nn.functional.cosine_similarity(g1.double(), g2.double(), dim=0).item()
        found[name] = dict(loss=l1, loss_difference=abs(l1-l2), gradient_cosine=cosine,
                           gradient_difference=((g1-g2).norm()/g2.norm()).item())
    return found

def ways(encoder):
    "Every decoder"
    return dict(greedy=greedy, sample=partial(sample, n=2),
                by_row=partial(sample, n=2, by_row=True), beam=beam, guided=guided,
                best_of_n=partial(best_of_n, encoder=encoder, n=4))

@torch.no_grad()
def decoded(here, there, models):
    "Log-probabilities of a decoder's captions, against the processor's; and equal captions"
    found = {}
    chance = ('sample','best_of_n')   # what draws from the device's own random numbers
    for name in ways(None):
        written = [ways(w.encoder)[name](m, w.x[:16], max_new_tokens=16)
                   for w,m in zip((here, there), models)]
        g = on(there.device, written[0])
        rows = there.x[:16].repeat_interleave(len(g)//16, 0)
        again = models[1].logprobs(rows, g.tokens, g.mask)
        found[name] = dict(logprob_difference=largest(again, g.logprobs))
        if name not in chance:
            same = [a==b for a,b in zip(written[0].text, written[1].text)]
            found[name]['equal_captions'] = sum(same)/len(same)
    return found

def agree(here, there):
    "A captioner that learnt a little on the card, on both"
    models = [w.captioner() for w in (here, there)]
    train_supervised(models[0], here.pairs(models[0].tokenizer), n_steps=30, batch_size=16,
                     lr=1e-3, lr_lm=1e-4)
    models[1].load_state_dict({k:v.cpu() for k,v in models[0].state_dict().items()})
    return dict(vectors=vectors(here, there), gradients=gradients(here, there, models),
                decoding=decoded(here, there, models))

def disagreements(found):
    "What is farther apart than float32 explains"
    bad = [f'vectors: {k} {v:.1e}' for k,v in found['vectors'].items() if not v<1e-4]
    bad += [f'gradient of {k}: {o}' for k,o in found['gradients'].items()
            if not (o['gradient_cosine']>.999 and o['loss_difference']<1e-3)]
    bad += [f'{k}: {o}' for k,o in found['decoding'].items()
            if not (o['logprob_difference']<1e-2 and o.get('equal_captions', 1)>=.9)]
    return bad


# ---- 2) the small world

def toy(device, steps=60):
    "The drawn world: a captioner from the same seed, its losses and captions"
    from clipcap_ssl.data.scenes import ToyScenes
    encoder = load_encoder('toy', device)
    ds = ToyScenes(160, 5)
    x = encoder.encode_image([ds.image(i) for i in range(len(ds))])
    model = new_captioner(encoder, seed=0)
    tokens,mask = (o.to(device) for o in tokenize_captions(model.tokenizer,
                                                           [o[0] for o in ds.captions]))
    log = train_supervised(model, Pairs(x, tokens, mask), n_steps=steps, batch_size=32)
    more = dict(labelled=Pairs(x, tokens, mask), max_new_tokens=16)
    policy = train_policy(model, x, contrastive_reward(encoder, x, 10.), n_steps=5, **more)
    expert = train_expert(model, x, encoder, rounds=1, n_steps=10, n_null=50, **more)
    gumbel = train_gumbel(model, x, encoder, bank=x, n_steps=3, **more)
    logs = [*policy, *expert, *gumbel]
    finite = bool(np.isfinite([o['loss'] for o in logs]).all())
    return dict(losses=[o['loss'] for o in log], finite=finite,
                captions=greedy(model, x[:8], max_new_tokens=16).text)

def small_world(device):
    "The drawn world on both"
    a,b = toy(device),toy('cpu')
    far = max(abs(i-j) for i,j in zip(a['losses'], b['losses']))
    return dict(first_loss=a['losses'][0], last_loss=a['losses'][-1], largest_difference=far,
                finite=a['finite'], card=a['captions'], processor=b['captions'])


# ---- 3) what it costs

def machine(device):
    "The device, and what it reaches"
    found = dict(device=str(device), torch=torch.__version__, threads=torch.get_num_threads(),
                 python=sys.version.split()[0])
    n = 8192 if device.type=='cuda' else 1024
    for name,dtype in (('float32', torch.float32), ('bfloat16', torch.bfloat16)):
        a,b = (torch.randn(n, n, device=device, dtype=dtype) for _ in 'ab')
        found[f'tflops_{name}'] = round(2*n**3/seconds(lambda: a@b, device)/1e12, 1)
    source = torch.empty(2**28 if device.type=='cuda' else 2**24, device=device)
    target = torch.empty_like(source)
    took = seconds(lambda: target.copy_(source), device)
    found['copy_gb_s'] = round(2*4*len(source)/took/1e9)
    if device.type!='cuda': return found
    about = torch.cuda.get_device_properties(device)
    return dict(found, name=about.name, memory_gib=round(about.total_memory/2**30, 1),
                tf32=torch.backends.cuda.matmul.allow_tf32)

def autocast(device, precision):
    "Autocast to bfloat16, or nothing"
    return torch.autocast(device.type, torch.bfloat16, enabled=precision=='bf16')

def embedding(w, precision, n):
    "Photos and captions per second through the towers; photos from PIL images, too"
    ready = [w.encoder.ready(o) for o in noise_images(min(n, 64))]*(-(-n//64))
    said = [f'{texts[i%len(texts)]} number {i}' for i in range(n)]     # each another text
    with autocast(w.device, precision):
        tower = seconds(lambda: w.encoder.encode_image(ready[:n]), w.device)
        whole = seconds(lambda: w.encoder.encode_image(w.images), w.device, 1)
        text = seconds(lambda: w.encoder.encode_text(said), w.device)
    return dict(photos_s=n/tower, photos_with_preprocessing_s=len(w.images)/whole,
                captions_s=n/text)

def per_step(train, device, n_steps):
    "Seconds of a step, from runs of two lengths"
    def run(n):
        wait(device)
        began = time.perf_counter()
        train(n)
        wait(device)
        return time.perf_counter()-began
    run(2)
    fresh(device)
    short,long = run(2),run(2+n_steps)
    return dict(seconds_step=(long-short)/n_steps, peak_gib=peak_gib(device))

def training(w, precision, sizes):
    "Seconds and memory of a step: stage 1 and each route of stage 2"
    b,s,t,n_steps = (sizes[k] for k in ('batch','samples','tokens','steps'))
    found = {}
    def measured(name, train):
        model = w.captioner()
        pairs = w.pairs(model.tokenizer)
        with in_precision(precision):
            found[name] = per_step(partial(train, model, pairs), w.device, n_steps)
        print(precision, name, found[name], file=sys.stderr, flush=True)
    x = w.x.repeat(-(-2*b//len(w.x)), 1)
    x = torch.nn.functional.normalize(x+.05*torch.randn_like(x), dim=-1)
    rates = dict(lr=1e-4, lr_lm=1e-5, batch_size=b)
    write = dict(max_new_tokens=t)
    measured('stage1', lambda m,p,n: train_supervised(m, p, n_steps=n, **rates))
    def mapper_only(m, p, n):
        m.lm.requires_grad_(False)
        train_supervised(m, p, n_steps=n, **dict(rates, lr_lm=0.))
    measured('stage1_mapper', mapper_only)
    measured('policy', lambda m,p,n: train_policy(m, x, contrastive_reward(w.encoder, x, 10.),
             n_samples=s, n_steps=n, labelled=p, **rates, **write))
    measured('gumbel', lambda m,p,n: train_gumbel(m, x, w.encoder, bank=x, n_samples=1,
             n_steps=n, labelled=p, **rates, **write))
    measured('expert', lambda m,p,n: train_expert(m, x, w.encoder, rounds=1, n_samples=1, n_null=b,
             n_steps=n, labelled=p, **rates, **write))
    return found

def decoding(w, precision, sizes):
    "Captions per second of every decoder"
    model,t,found = w.captioner(),sizes['tokens'],{}
    x = w.x[:sizes['batch']]
    if precision=='bf16': model = model.to(torch.bfloat16)
    def rate(name, write, x, **how):
        fresh(w.device)
        lengths = dict(max_new_tokens=t, min_new_tokens=t)
        took = seconds(lambda: write(model, x, **lengths, **how), w.device, 2)
        found[name] = dict(captions_s=len(x)/took, peak_gib=peak_gib(w.device))
    rate('greedy, one photo at a time', greedy, x[:1])
    rate('greedy', greedy, x)
    rate('sample', sample, x)
    rate('beam 5', beam, x)
    rate('guided', guided, x)
    rate('best of 5', partial(best_of_n, encoder=w.encoder, n=5), x)
    return found

def cost(w, precision, sizes):
    "All of it in one precision"
    return dict(embedding=embedding(w, precision, sizes['embed']),
                training=training(w, precision, sizes), decoding=decoding(w, precision, sizes))


# ---- the command

@call_parse
def main(
    device:str='', # The card; default: the fastest device there is
    small:store_true=False, # Two narrow layers of everything, to try the script
    minutes:float=10., # No new part begins after this
    out:Path=Path('nbs/results/data/gpu.json'), # The result
):
    "Check and measure every route and decoder on a graphics card"
    device,began = torch.device(device or default_device()),time.perf_counter()
    sizes = dict(batch=32, samples=5, tokens=20, steps=10, embed=1024, weights='full size')
    if small: sizes |= dict(batch=4, samples=2, steps=2, embed=64, weights='small')
    report = dict(commit=commit(), date=time.strftime('%Y-%m-%d'), sizes=sizes, failed=[])
    def part(name, call):
        "Run a part, and write what there is"
        start = time.perf_counter()
        if start-began>60*minutes: return report['failed'].append(f'{name}: no time left')
        fresh(device)
        try: report[name] = call()
        except Exception as e:
            traceback.print_exc()
            report['failed'].append(f'{name}: {type(e).__name__}: {e}')
        report.setdefault('seconds', {})[name] = round(time.perf_counter()-start, 1)
        write_json(out, report)
        print(name, report['seconds'][name], 's', file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        save_encoder(d/'clip', small)
        save_lm(d/'gpt2', small)
        card,processor = World(d, device),World(d, 'cpu')
        part('machine', lambda: machine(device))
        part('cost_no', lambda: cost(card, 'no', sizes))
        part('agree', lambda: agree(card, processor))
        part('small', lambda: small_world(device))
        part('cost_bf16', lambda: cost(card, 'bf16', sizes))
    if 'agree' in report: report['failed'] += disagreements(report['agree'])
    write_json(out, report)
    print(json.dumps(report, indent=1))
    sys.exit(bool(report['failed']))
