"""Check the metrics on real captions: equality with pycocoevalcap's own route, what people score
against people, and seconds for 5,000 captions."""
import json, os, random, time
from pathlib import Path
from unittest.mock import patch
from fastcore.script import call_parse


def usual_route(captions, references):
    "The scores as pycocoevalcap's own classes give them, with a java on their PATH"
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    from clipcap_ssl.metrics.coco import java_home
    def tokenized(o):
        return PTBTokenizer().tokenize({i: [{'caption':c} for c in cs] for i,cs in o.items()})
    with patch.dict(os.environ, PATH=f"{java_home()/'bin'}{os.pathsep}{os.environ['PATH']}"):
        refs,caps = tokenized(references),tokenized({i:[c] for i,c in captions.items()})
        bleu = Bleu(4).compute_score(refs, caps, verbose=0)[0]
        out = dict(zip(('bleu1','bleu2','bleu3','bleu4'), bleu))
        others = dict(rouge_l=Rouge, cider=Cider, meteor=Meteor)
        return out | {k:float(s().compute_score(refs, caps)[0]) for k,s in others.items()}


def timed(f, *args):
    "What a function gives, and its seconds"
    t = time.perf_counter()
    out = f(*args)
    return out,round(time.perf_counter()-t, 2)


def times(captions, references, *, judge, lm):
    "Seconds by metric, for these captions"
    import torch
    from clipcap_ssl.metrics.cider import CiderD
    from clipcap_ssl.metrics.coco import _tokens, ptb_tokenize, score_captions
    from clipcap_ssl.metrics.reference_free import clip_score, hits_at_k, p_at_1, p_at_1_near
    from clipcap_ssl.metrics.wording import broken_ending, coverage
    from clipcap_ssl.metrics.wording import nouns_and_adjectives, perplexity
    texts,out = list(captions.values()),{}
    _tokens.clear()
    every = [*texts, *(c for cs in references.values() for c in cs)]
    _,out[f'PTB tokenizer, {len(every):,} texts, Java started'] = timed(ptb_tokenize, every)
    for m in ('bleu','rouge_l','cider','meteor'):
        _,out[m] = timed(score_captions, captions, references, [m])
    cider,out['CIDEr-D, counting the references'] = timed(CiderD, references)
    _,out['CIDEr-D, the captions'] = timed(cider, texts, list(captions))
    def words():
        for i,t in captions.items():
            broken_ending(t),nouns_and_adjectives(t),coverage(t, references[i])
    _,out['words: repetition to coverage'] = timed(words)
    y,out[f"{judge.name}, embedding the captions"] = timed(judge.encode_text, texts)
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    x = torch.nn.functional.normalize(y+.5*noise, dim=-1)   # in the place of photos
    _,out['CLIP-S of features'] = timed(clip_score, x, y)
    def retrieval(): return hits_at_k(y@x.T, 5),p_at_1(y@x.T),p_at_1_near(y@x.T, x)
    _,out['recall and P@1 of features'] = timed(retrieval)
    _,out["perplexity, the scenes' language model"] = timed(perplexity, texts, *lm)
    return out


@call_parse
def main(
    photos:str, # Folder with captions.jsonl: five captions per photo
    out:str='nbs/results/data/metrics-photos.json', # The result
    n:int=5000, # Captions whose times are taken
):
    "Check the metrics on real captions. Example: python scripts/metrics.py photos"
    import torch
    from clipcap_ssl import __version__
    from clipcap_ssl.core import write_text
    from clipcap_ssl.data.base import CaptionFolder, references
    from clipcap_ssl.models.loading import load_lm
    from clipcap_ssl.models.encoder import load_encoder
    from clipcap_ssl.report.evaluate import evaluate, human_row
    from clipcap_ssl.metrics.coco import score_captions
    torch.set_num_threads(1)
    every,test = references(CaptionFolder(photos)),references(CaptionFolder(photos, 'test'))
    captions,others = human_row(every)
    ours,seconds = timed(score_captions, captions, others)
    usual,usual_seconds = timed(usual_route, captions, others)
    people = {f'person {k+1} of 5': dict(evaluate(*human_row(test, k))) for k in range(5)}
    some = random.Random(0).sample(sorted(captions), min(n, len(captions)))
    largest = max(abs(ours[k]-usual[k]) for k in usual)
    equality = dict(ours=ours, pycocoevalcap=usual, largest_difference=largest, seconds=seconds,
                    pycocoevalcap_seconds=usual_seconds)
    part = {i:captions[i] for i in some},{i:others[i] for i in some}
    taken = times(*part, judge=load_encoder('toy-judge'), lm=load_lm('toy'))
    found = dict(version=__version__, torch=torch.__version__, device='cpu, one thread',
                 photos=len(every), test_photos=len(test), equality=equality, people=people,
                 times=dict(n=len(some), seconds=taken))
    write_text(out, json.dumps(found, indent=1)+'\n')
    print(json.dumps(found, indent=1))
