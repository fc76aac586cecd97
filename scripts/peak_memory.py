"""Peak memory of training steps at full size: an OpenCLIP ViT-B/32 and GPT-2, random weights.

    python scripts/peak_memory.py                 # all of them, to nbs/results/data/memory.json
    python scripts/peak_memory.py policy saved    # one, printed as JSON

Every measurement is a process of its own, since a peak cannot be taken back. 'plain' keeps all
logits, reads a prefix again for each caption of a photo, and leaves activation functions as they
are. 'saved' is what the package does by default. Two steps are taken: the optimiser's memory is
there from the second on. A caption of random weights has no reason to end, so all are as long as
they may be. The plain way takes 16 GB."""
import argparse, json, os, platform, subprocess, sys, tempfile, time
from pathlib import Path
import torch
from clipcap_ssl.core import set_seed, write_json
from clipcap_ssl.models.captioner import Captioner
from clipcap_ssl.models.encoder import load_encoder
from clipcap_ssl.models.lm import freeze, large_from, tokenize_captions
from clipcap_ssl.models.loading import add_lora, load_lm
from clipcap_ssl.models.mapper import make_mapper
from clipcap_ssl.rewards.reward import contrastive_reward
from clipcap_ssl.train.gumbel import train_gumbel
from clipcap_ssl.train.policy import train_policy
from clipcap_ssl.train.supervised import Pairs, train_supervised
from full_size import forget_peak, peak, save_encoder, save_lm

text = 'a photo of a small red star above a blue square and two dogs that run along the wide beach'
ways = dict(plain=10**15, saved=2**25)

def parts(folder, *, tokens, update, device):
    "A captioner, its encoder, features and labelled pairs"
    encoder = load_encoder(f'open_clip:{folder}/clip', device)
    lm,tok = load_lm(folder/'gpt2', device)
    if update=='lora': lm = add_lora(freeze(lm)).to(device)
    mapper = make_mapper('mlp', encoder.dim, 10, e=lm.config.hidden_size)
    model = Captioner(mapper, lm, tok, encoder_name=encoder.name, encoder_hash=encoder.hash)
    x = torch.nn.functional.normalize(torch.randn(256, encoder.dim), dim=-1).to(device)
    said = [o.to(device) for o in tokenize_captions(tok, [text]*256, tokens)]
    return model.to(device).attach(encoder), encoder, x, Pairs(x, *said)

def jobs(model, encoder, x, pairs, *, batch, samples, tokens):
    "route -> two steps of it"
    steps = dict(n_steps=2, lr=1e-4, lr_lm=1e-5)
    stage2 = dict(steps, batch_size=batch, labelled=pairs, max_new_tokens=tokens)
    reward = contrastive_reward(encoder, x, 10.)
    def policy(**how): return train_policy(model, x, reward, n_samples=samples, **stage2, **how)
    return dict(stage1=lambda: train_supervised(model, pairs, batch_size=40, **steps),
                policy=policy, policy_by_8=lambda: policy(micro_batch=8),
                policy_by_8_lora=lambda: policy(micro_batch=8),
                gumbel=lambda: train_gumbel(model, x, encoder, bank=x, n_samples=2, **stage2))

def measure(route, way, a):
    "Peak memory and time of one route"
    device = torch.device(a.device)
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        save_encoder(Path(folder)/'clip', a.small)
        save_lm(Path(folder)/'gpt2', a.small)
        update = 'lora' if 'lora' in route else 'all'
        with large_from(ways[way]):
            have = parts(Path(folder), tokens=a.tokens, update=update, device=device)
    job = jobs(*have, batch=a.batch, samples=a.samples, tokens=a.tokens)[route]
    forget_peak(device)
    before, wall, cpu = peak(), time.perf_counter(), time.process_time()
    with large_from(ways[way]): log = job()
    found = dict(route=route, way=way, batch=a.batch, loaded_gib=before, peak_gib=peak())
    if device.type=='cuda': found['peak_gpu_gib'] = torch.cuda.max_memory_allocated(device)/2**30
    found |= dict(seconds_per_step=(time.perf_counter()-wall)/2,
                  cpu_seconds_per_step=(time.process_time()-cpu)/2)
    return {k:round(v, 3) if isinstance(v, float) else v for k,v in found.items()}|dict(
        losses=[o['loss'] for o in log])

everything = [('policy','plain'), ('policy','saved'), ('policy_by_8','saved'),
              ('policy_by_8_lora','saved'), ('gumbel','plain'), ('gumbel','saved'),
              ('stage1','plain'), ('stage1','saved')]

def commit():
    "Of the code that was run"
    said = subprocess.run(['git','rev-parse','--short','HEAD'], capture_output=True, text=True)
    return said.stdout.strip()

def main():
    as_written = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    p.add_argument('route', nargs='?', help='one route; without it: all, to the file')
    p.add_argument('way', nargs='?', default='saved', choices=ways)
    p.add_argument('--batch', type=int, default=32, help='photos per step')
    p.add_argument('--samples', type=int, default=5, help='captions per photo (policy)')
    p.add_argument('--tokens', type=int, default=20, help='longest caption')
    p.add_argument('--device', default='cpu')
    p.add_argument('--small', action='store_true', help='narrow models, to try the script itself')
    p.add_argument('--out', default='nbs/results/data/memory.json')
    a = p.parse_args()
    if a.route:
        print(json.dumps(measure(a.route, a.way, a)))
        return
    sizes = dict(batch=a.batch, samples=a.samples, tokens=a.tokens, small=a.small)
    meta = dict(**sizes, commit=commit(), processor=platform.processor() or platform.machine(),
                torch=torch.__version__, threads=torch.get_num_threads(), device=a.device)
    rows = []
    for route,way in everything:
        same = [f'--{k}={v}' for k,v in sizes.items() if k!='small']+['--small']*a.small
        command = [sys.executable, __file__, route, way, *same, '--device', a.device]
        # every tensor of a megabyte goes back to the system when it is freed
        env = dict(os.environ, MALLOC_MMAP_THRESHOLD_='1000000')
        said = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env)
        if said.returncode:
            print(f'{route} {way}: failed with status {said.returncode}', file=sys.stderr)
            continue
        rows.append(json.loads(said.stdout.splitlines()[-1]))
        print(rows[-1], file=sys.stderr, flush=True)
        write_json(Path(a.out), dict(meta=meta, rows=rows))

if __name__ == '__main__': main()
