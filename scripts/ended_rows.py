"""What is saved where rows that have ended leave a batch: python scripts/ended_rows.py

GPT-2 with random weights has no reason to end a caption, so a rule ends them: lengths are spread
around eleven of at most twenty tokens, as COCO's are. CPU seconds, one thread, both ways in turns.
Written to nbs/results/data/ended_rows.json."""
import argparse, statistics, tempfile, time
from pathlib import Path
from unittest.mock import patch
import torch
from clipcap_ssl.core import set_seed, write_json
from clipcap_ssl.models import decoding
from clipcap_ssl.models.captioner import new_captioner
from clipcap_ssl.models.encoder import load_encoder
from coco_miniature import commit, machine
from full_size import save_encoder, save_lm

chances = [0]*5+[.02,.04,.08,.15,.25]+[.3]*10

class Ends:
    "Ends a caption with a chance that depends on its own tokens alone"
    def __init__(self, end): self.end = end
    def __call__(self, tokens, scores):
        t = tokens.shape[1]
        if not t: return scores
        number = (tokens*torch.arange(1, t+1)*7919).sum(1)%1000
        now = number<1000*chances[t]
        scores = scores.clone()
        scores[now,self.end] = 1e4
        scores[~now,self.end] = -torch.inf
        return scores

def ways(model, x, how, **more):
    "name -> a function that writes captions: rows stay, rows leave"
    ends = [Ends(model.tokenizer.eos_token_id)]
    def leave():
        torch.manual_seed(0)
        return decoding.decode(model, x, how, processors=ends, max_new_tokens=20, **more)
    def stay():
        with patch.object(decoding, '_may_leave', lambda *_: False): return leave()
    return dict(stay=stay, leave=leave)

def measured(run):
    began = time.process_time()
    g = run()
    return time.process_time()-began, g

def main():
    as_written = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    p.add_argument('--rounds', type=int, default=3)
    p.add_argument('--small', action='store_true', help='narrow models, to try the script itself')
    p.add_argument('--out', type=Path, default=Path('nbs/results/data/ended_rows.json'))
    a = p.parse_args()
    torch.set_num_threads(1)
    set_seed(0)
    with tempfile.TemporaryDirectory() as d:
        save_encoder(Path(d)/'clip', a.small)
        save_lm(Path(d)/'gpt2', a.small)
        encoder = load_encoder(f'open_clip:{d}/clip')
        model = new_captioner(encoder, f'{d}/gpt2', 'mlp', n_prefix=10, train_lm=False).eval()
    x,found = torch.nn.functional.normalize(torch.randn(32, encoder.dim), dim=-1),{}
    sampled = dict(do_sample=True, top_k=0)
    five = x.repeat_interleave(5, 0)
    jobs = {'greedy, 32 photos': ways(model, x, dict(do_sample=False)),
            'samples, 5 of each of 32 photos': ways(model, five, sampled, together=5)}
    for name,job in jobs.items():
        seconds,last = {k:[] for k in job},{}
        for _ in range(a.rounds):
            for k,run in job.items():
                took,last[k] = measured(run)
                seconds[k].append(took)
        row = {k:statistics.median(v) for k,v in seconds.items()}
        row |= {f'{k}_all':v for k,v in seconds.items()}
        row |= {f'{k}_mean_length':g.mask.sum(1).float().mean().item() for k,g in last.items()}
        a_text,b_text = last['stay'].text,last['leave'].text
        row['same_captions'] = sum(map(str.__eq__, a_text, b_text))/len(a_text)
        row['ratio'] = row['stay']/row['leave']
        found[name] = row
        print(name, row, flush=True)
        about = dict(commit=commit(), small=a.small, rounds=a.rounds, machine=machine())
        write_json(a.out, dict(about, jobs=found))

if __name__ == '__main__': main()
