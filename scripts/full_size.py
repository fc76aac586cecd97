"""Full size, random weights: an OpenCLIP ViT-B/32 and a 12-layer GPT-2, saved to folders and
loaded back by path, through one step of stage 1 and of each route of stage 2, and every decoder.
Prints JSON: seconds, CPU seconds and peak memory of each part.

Nothing is downloaded. GPT-2's tokenizer is not in any of the required packages, and too few texts
are at hand to learn 50,257 pieces from: CLIP's own byte pairs (49,408 tokens, from open_clip's
wheel) stand in for it, in front of GPT-2's 50,257 rows."""
import argparse, json, os, platform, resource, sys, tempfile, time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
import numpy as np, torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from clipcap_ssl.core import default_device, set_seed, write_json
from clipcap_ssl.models.lm import PreTrainedTokenizerFast, freeze, new_lm, tokenize_captions
from clipcap_ssl.models.loading import add_lora, load_lm
from clipcap_ssl.models.encoder import load_encoder, open_clip
from clipcap_ssl.train.expert import train_expert
from clipcap_ssl.models.captioner import Captioner
from clipcap_ssl.models.generate import beam, best_of_n, greedy, guided, sample
from clipcap_ssl.train.gumbel import train_gumbel
from clipcap_ssl.models.mapper import make_mapper
from clipcap_ssl.rewards.reward import contrastive_reward
from clipcap_ssl.train.policy import train_policy
from clipcap_ssl.train.supervised import Pairs, train_supervised

def peak():
    "Largest resident memory so far, GiB; since `forget_peak` where Linux allows it"
    try:
        lines = Path('/proc/self/status').read_text().splitlines()
        return int(next(o for o in lines if o.startswith('VmHWM')).split()[1])/2**20
    except (OSError, StopIteration):
        unit = 2**30 if sys.platform=='darwin' else 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/unit

def forget_peak(device):
    "Begin to measure anew"
    try: Path('/proc/self/clear_refs').write_text('5')
    except OSError: pass
    if device.type=='cuda': torch.cuda.reset_peak_memory_stats(device)

@contextmanager
def measured(name, report, device):
    "Time and memory of a part, into `report` and onto stderr"
    forget_peak(device)
    wall, cpu, row = time.perf_counter(), time.process_time(), {}
    yield row
    if device.type=='cuda':
        torch.cuda.synchronize(device)
        row['peak_gpu_gib'] = round(torch.cuda.max_memory_allocated(device)/2**30, 2)
    seconds,cpu_seconds = time.perf_counter()-wall,time.process_time()-cpu
    report[name] = dict(seconds=round(seconds, 2), cpu_seconds=round(cpu_seconds, 2),
                        peak_gib=round(peak(), 2), **row)
    print(name, report[name], file=sys.stderr, flush=True)

def clip_bpe_tokenizer():
    "CLIP's byte pairs as a tokenizer of transformers, with one special token for both ends"
    simple = open_clip.tokenizer.SimpleTokenizer()
    merges = sorted(simple.bpe_ranks, key=simple.bpe_ranks.get)
    tok = Tokenizer(models.BPE(vocab=simple.encoder, merges=merges, end_of_word_suffix='</w>'))
    tok.normalizer = normalizers.Lowercase()
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(words, 'removed', invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.BPEDecoder(suffix='</w>')
    end = '<end_of_text>'
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token=end, eos_token=end)

def save_encoder(folder, small):
    "An OpenCLIP model with random weights, as a folder"
    cfg = open_clip.get_model_config('ViT-B-32')
    if small:
        cfg['vision_cfg'] |= dict(layers=2, width=64, head_width=32)
        cfg['text_cfg'] |= dict(layers=2, width=64, heads=2)
        cfg['embed_dim'] = 64
    folder.mkdir()
    save_file(open_clip.CLIP(**cfg).state_dict(), folder/'open_clip_model.safetensors')
    preprocess = dict(mean=[.5]*3, std=[.25]*3)
    write_json(folder/'open_clip_config.json', dict(model_cfg=cfg, preprocess_cfg=preprocess))

def save_lm(folder, small):
    "A GPT-2 with random weights and a tokenizer, as a folder"
    tok = clip_bpe_tokenizer()
    width,layers,heads = (64, 2, 2) if small else (768, 12, 12)
    lm = new_lm(tok, width, layers, n_heads=heads, n_positions=1024)
    lm.resize_token_embeddings(50_257, mean_resizing=False)
    lm.save_pretrained(folder)
    tok.save_pretrained(folder)

def decoders_of(model, x, encoder, *, n_tokens, report, device):
    "Every way of writing, and what its log-probabilities are worth"
    ways = dict(greedy=greedy, sample=partial(sample, n=2),
                sample_by_row=partial(sample, n=2, by_row=True), beam=beam, guided=guided,
                best_of_n=partial(best_of_n, encoder=encoder, n=4, lm_weight=.1))
    for name,write in ways.items():
        with measured(f'decode: {name}', report, device) as row:
            g = write(model, x, max_new_tokens=n_tokens)
        rows = x.repeat_interleave(len(g)//len(x), 0)
        with torch.no_grad():
            again = model.logprobs(rows, g.tokens.to(x.device), g.mask.to(x.device))
        difference = float((again-g.logprobs.to(again)).abs().max())
        report[f'decode: {name}']['largest_difference_to_rescoring'] = difference

def main():
    as_written = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    p.add_argument('--device', default=None, help='cpu, cuda, ...; default: the fastest there is')
    p.add_argument('--batch', type=int, default=4, help='photos per step')
    p.add_argument('--tokens', type=int, default=12, help='longest caption')
    p.add_argument('--small', action='store_true',
                   help='two narrow layers of everything, to try the script itself')
    a = p.parse_args()
    device, report, n = torch.device(a.device or default_device()), {}, a.batch
    step = partial(measured, report=report, device=device)
    set_seed(0)
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        with step('save encoder and language model'):
            save_encoder(d/'clip', a.small)
            save_lm(d/'gpt2', a.small)
        with step('load encoder') as row:
            encoder = load_encoder(f'open_clip:{d}/clip', device)
            row['weights'] = sum(o.numel() for o in encoder.model.parameters())
        with step('load language model') as row:
            lm,tok = load_lm(d/'gpt2', device)
            row['weights'] = sum(o.numel() for o in lm.parameters())
        noise = [np.random.default_rng(i).integers(0, 256, (224,224,3), np.uint8) for i in range(n)]
        images = [Image.fromarray(o) for o in noise]
        with step('embed photos') as row:
            x = encoder.encode_image(images)
            row['photos'] = n
        with step('embed photos, with their grid') as row:
            grid = encoder.encode_grid(images)
            row['shape'] = list(grid.shape)
        texts = ['a photo of a small red star above a blue square', 'two dogs run on a beach']*n
        tokens,mask = (o.to(device) for o in tokenize_captions(tok, texts))
        pairs = Pairs(x.repeat(2, 1), tokens, mask)
        known = dict(encoder_name=encoder.name, encoder_hash=encoder.hash)
        mapper = make_mapper('mlp', encoder.dim, 10, e=lm.config.hidden_size)
        model = Captioner(mapper, lm, tok, **known).to(device).attach(encoder)
        common = dict(batch_size=n, lr=1e-4, lr_lm=1e-5)
        with step('stage 1, one step'): log = train_supervised(model, pairs, n_steps=1, **common)
        report['stage 1, one step']['loss'] = log[-1]['loss']
        common |= dict(n_steps=1, max_new_tokens=a.tokens)
        common |= dict(labelled=pairs)
        with step('stage 2, expert, one step'):
            train_expert(model, x, encoder, rounds=1, n_samples=1, n_null=n, top=1, **common)
        with step('stage 2, policy, one step'):
            train_policy(model, x, contrastive_reward(encoder, x, 10.), n_samples=2, **common)
        with step('stage 2, gumbel, one step'):
            train_gumbel(model, x, encoder, bank=x, n_samples=1, **common)
        decoders_of(model, x, encoder, n_tokens=a.tokens, report=report, device=device)
        with step('save and load the captioner') as row:
            model.save_pretrained(d/'captioner')
            again = Captioner.from_pretrained(d/'captioner').to(device).attach(encoder)
            row['megabytes'] = round((d/'captioner/model.safetensors').stat().st_size/1e6)
        texts = [greedy(o, x, max_new_tokens=a.tokens).text for o in (again, model)]
        report['save and load the captioner']['same_captions'] = texts[0]==texts[1]
        del again, model
        for kind,features in (('transformer', x), ('grid', grid)):
            lm,_ = load_lm(d/'gpt2', device)
            heads = 2 if a.small else 8
            width = lm.config.hidden_size
            mapper = make_mapper(kind, features.shape[-1], 10, e=width, n_heads=heads)
            light = Captioner(mapper, freeze(lm), tok, **known).to(device).attach(encoder)
            if kind=='grid': add_lora(light.lm).to(device)
            lora = ' with LoRA' if kind=='grid' else ''
            with step(f'frozen language model{lora}, {kind} mapper, stage 1, one step') as row:
                twice = Pairs(features.repeat(2, *[1]*(features.ndim-1)), tokens, mask)
                train_supervised(light, twice, n_steps=1, batch_size=n, lr=1e-4, lr_lm=1e-4)
                light.save_pretrained(d/kind)
                row['megabytes'] = round((d/kind/'model.safetensors').stat().st_size/1e6)
            del light, lm
    print(json.dumps(dict(device=str(device), processor=platform.processor() or platform.machine(),
        threads=torch.get_num_threads(), torch=torch.__version__, batch=n, tokens=a.tokens,
        small=a.small, tokenizer="CLIP's byte pairs, 49,408 tokens, in front of 50,257 rows",
        parts=report), indent=1))

if __name__ == '__main__': main()
