"""Do the photos that `clipcap_label` chooses teach more than random ones? On drawn scenes: stage 1
with 100 labelled scenes, then 100 more that are chosen or drawn by lot, and stage 1 again from the
start with all of them. Judged by the scene graphs of 500 other scenes: python scripts/label_choice.py"""
import os
os.environ.update(OMP_NUM_THREADS='1', TQDM_DISABLE='1', HF_HUB_OFFLINE='1')
import random, time
from pathlib import Path
import numpy as np
from fastcore.script import call_parse
from grid import commit

def trained(encoder, ds, x, rows, *, seed):
    "A captioner from the first captions of some scenes"
    from clipcap_ssl.models.captioner import new_captioner
    from clipcap_ssl.models.lm import tokenize_captions
    from clipcap_ssl.train.supervised import Pairs, train_supervised
    model = new_captioner(encoder, seed=seed)
    tokens,mask = tokenize_captions(model.tokenizer, [ds.captions[i][0] for i in rows])
    train_supervised(model, Pairs(x[rows], tokens, mask), n_steps=300, batch_size=64, seed=seed)
    return model

def scores(model, test, x):
    "What the scene graphs say of its captions"
    from clipcap_ssl.metrics.oracle import oracle_scores
    from clipcap_ssl.models.generate import greedy
    said = dict(zip(test.ids, greedy(model, x).text))
    found = oracle_scores(said, dict(zip(test.ids, test.scenes)))
    return {k:float(found[k]) for k in ('precision','recall')}

@call_parse
def main(
    seeds:int=5, # Seeds, from 30 on
    first:int=100, # Labelled scenes at the start
    more:int=100, # Scenes that are labelled then
    n:int=3000, # Scenes to choose from
    out:Path=Path('nbs/results/data/label_choice.json'), # The result
):
    "Chosen against random labels"
    import torch
    from clipcap_ssl.core import write_json
    from clipcap_ssl.data.scenes import ToyScenes
    from clipcap_ssl.models.encoder import load_encoder
    from clipcap_ssl.report.label import _doubts, next_photos
    encoder,rows = load_encoder('toy'),[]
    def embedded(ds):
        return torch.cat([encoder.encode_image([ds.image(i) for i in range(j, min(j+100, len(ds)))])
                          for j in range(0, len(ds), 100)])
    for seed in range(30, 30+seeds):
        began = time.process_time()
        ds,test = ToyScenes(n, 50_000+2*seed, n_captions=1),ToyScenes(500, 50_001+2*seed)
        x,x_test = embedded(ds),embedded(test)
        start,rest = list(range(first)),list(range(first, n))
        model = trained(encoder, ds, x, start, seed=seed)
        row = dict(seed=seed, start=scores(model, test, x_test))
        # 1) by lot, and by choice
        doubts = _doubts(model, x[rest])[1]
        ways = dict(random=random.Random(seed).sample(range(len(rest)), more),
            doubtful=[int(i) for i in np.argsort(-doubts, kind='stable')[:more]],
            chosen=next_photos(x[rest].numpy(), doubts, x[start].numpy(), n=more))
        # 2) train with them
        for way,taken in ways.items():
            again = trained(encoder, ds, x, start+[rest[i] for i in taken], seed=seed)
            row[way] = scores(again, test, x_test)
        rows.append(dict(row, cpu_seconds=round(time.process_time()-began)))
        print(rows[-1], flush=True)
        write_json(out, dict(commit=commit(), first=first, more=more, n=n, device='cpu', rows=rows))
