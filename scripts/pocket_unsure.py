"""Calibrate when `pocket` is unsure, and measure how often that is right.

    python scripts/pocket_unsure.py PHOTOS FOLDER

PHOTOS holds captions.jsonl with Flickr8k's splits train, dev and test, and unlabelled.jsonl with
photos of other things. Candidates were chosen on dev photos and on the 1,000 other photos that an
earlier threshold had been chosen and reported on. What is reported is of test photos and of the 500
other photos that nothing had used. Features and captions are kept in FOLDER, so that a second call
goes on where the first one ended.

Beside it: captions without a captioner (the consensus of the nearest training photos' captions),
what people reach, and what each part of pocket's training brought on dev photos."""
import json
from pathlib import Path
import numpy as np, torch
from fastcore.script import call_parse
from PIL import Image
from safetensors.torch import load_file
from clipcap_ssl import Captioner, load_encoder
from clipcap_ssl.core import asset_path, progress, write_json, write_lines, write_tensors
from clipcap_ssl.core import write_text
from clipcap_ssl.data.base import CaptionFolder, subset
from clipcap_ssl.metrics.cider import CiderD
from clipcap_ssl.metrics.coco import score_captions
from clipcap_ssl.metrics.wording import nouns_and_adjectives
from clipcap_ssl.models.calibration import Calibration, fit_captions, fit_photos, is_wrong
from clipcap_ssl.models.calibration import write_calibration
from clipcap_ssl.models.consensus import consensus
from clipcap_ssl.models.encoder import pooled, weights_hash
from clipcap_ssl.report.evaluate import human_row
from grid import commit

def load_pocket():
    "The captioner as it ships"
    return Captioner.from_pretrained(asset_path('pocket/captioner')).attach(load_encoder('pocket'))

def embedded(model, data, file, *, whole=False, batch=50):
    "Half-precision features of photos, kept in a file after every 20 batches"
    done = load_file(file)['x'] if file.exists() else None
    parts = [] if done is None else [done]
    start = 0 if done is None else len(done)
    embed = model.encoder.encode_image if whole else model.embed
    for n,i in enumerate(progress(range(start, len(data), batch), file.stem)):
        rows = range(i, min(i+batch, len(data)))
        parts.append(embed([data.image(j) for j in rows]).half())
        if n%20==19: write_tensors(file, dict(x=torch.cat(parts)))
    x = torch.cat(parts)
    if len(x)>start: write_tensors(file, dict(x=x))
    return x.float()

def written(file, write):
    "What `write` returns, kept in a file"
    if not file.exists(): write_lines(file, write())
    return [json.loads(o) for o in file.read_text(encoding='utf-8').splitlines()]

def auroc(high, low):
    "How often a value of `high` is above one of `low`; a tie is half"
    d = np.asarray(high)[:,None]-np.asarray(low)[None]
    return round(float((d>0).mean()+.5*(d==0).mean()), 4)

def best_border(inside, outside):
    "The distance that tells both apart best, each side counting one half"
    cuts = np.unique(np.concatenate([inside, outside]))
    good = [(np.mean(inside<=c)+np.mean(outside>c))/2 for c in cuts]
    return float(cuts[int(np.argmax(good))])

def nouns(text):
    "The nouns of a text"
    return set(nouns_and_adjectives(text)[0])

def wrongs(captions, data):
    "Three ways to say by references that captions are wrong"
    at = dict(zip(data.ids, data.captions))
    cider = CiderD(at, 'unicode')(captions, data.ids)
    none = [not any(nouns(c)&nouns(r) for r in rs) for c,rs in zip(captions, data.captions)]
    half = [is_wrong(c, rs) for c,rs in zip(captions, data.captions)]
    return dict(half_of_words=np.array(half), no_noun=np.array(none), cider_below_10=cider<.1)

def sampled(model, x, n=8, batch=100):
    "Several captions of each photo by chance"
    found = []
    for part in x.split(batch):
        texts = model.write(part, n, decode='sample', max_new_tokens=24)
        found += [texts[i:i+n] for i in range(0, len(texts), n)]
    return found

def agreement(captions, samples):
    "How many words a caption shares with samples: the mean F1"
    def f1(a, b):
        a,b = set(a.split()),set(b.split())
        return 2*len(a&b)/max(1, len(a)+len(b))
    return np.array([np.mean([f1(c, o) for o in said]) for c,said in zip(captions, samples)])

def signs(file, model, x, captions):
    "Log-probability and similarity of captions, kept in a file"
    def weighed():
        return [dict(logprob=o.logprob, similarity=o.similarity) for o in model.weigh(x, captions)]
    rows = written(file, weighed)
    return {k:np.array([o[k] for o in rows]) for k in ('logprob','similarity')}

def wrong_aurocs(wrong, found):
    "AUROC of each sign, low values meaning wrong, for each way to be wrong"
    return {sign:{k:auroc(v[~w], v[w]) for k,w in wrong.items()} for sign,v in found.items()}

def shares(flags, wrong):
    "How many are flagged, and how many of these and of the others are wrong"
    flags,w = np.asarray(flags, bool),wrong['half_of_words']
    return dict(flagged=flags.mean(), wrong_flagged=w[flags].mean(), wrong_others=w[~flags].mean())

def curve(report):
    "CIDEr-D of dev photos, over tokens, after each part of the training"
    return {k:max(o['cider'] for o in report[k]['checks']) for k in ('joint','captions','reward')}

was = """Where its
caption is not like the photo by its own encoder, it says that it is unsure."""
now = """Where the
photo is unlike those that it knows, or its caption improbable, it says that it is unsure."""

def put(calibration, folder):
    "Write a calibration into a captioner's folder, whose weights stay as they are"
    write_calibration(calibration, folder)
    config = json.loads((folder/'config.json').read_text())
    config['facts']['note'] = config['facts']['note'].replace(was, now)
    names = ('calibration.json','calibration.safetensors')
    config['files'] |= {o:weights_hash(folder/o) for o in names}
    write_json(folder/'config.json', config)
    card = folder/'README.md'
    write_text(card, card.read_text().replace(was, now))

@call_parse
def main(
    photos:Path, # Folder with captions.jsonl and unlabelled.jsonl
    kept:Path, # Folder in which features and captions are kept; not for the project
    report:Path=None, # report.json of pocket_train.py, for the curve
    result:Path=Path('nbs/results/data/pocket.json'), # Gets the figures
    out:Path=Path('clipcap_ssl/assets/pocket/captioner'), # Gets the calibration
    n_fit:int=1000, # training photos whose features the Gaussian is fitted on
    n_bank:int=5999, # training photos whose captions the consensus may choose from
):
    "Calibrate when pocket is unsure"
    model,d = load_pocket(),load_encoder('pocket').dim
    train = CaptionFolder(photos, 'train')
    order = np.random.default_rng(0).permutation(len(train))[:n_bank].tolist()
    train = subset(train, order)
    dev,test = CaptionFolder(photos, 'dev'),CaptionFolder(photos, 'test')
    other = CaptionFolder(photos, manifest='unlabelled.jsonl')
    seen = np.random.default_rng(0).permutation(len(other))       # as pocket_ship.py drew them
    used,fresh = seen[:1000],seen[1000:]
    # 1) features and captions
    x = {k:embedded(model, o, kept/f'{k}.safetensors')
         for k,o in dict(dev=dev, test=test, other=other).items()}
    bank = embedded(model, train, kept/'train.safetensors', whole=True)
    said = {k:written(kept/f'{k}.jsonl', lambda o=o: model.write(o)) for k,o in x.items()}
    drawn = written(kept/'samples.jsonl', lambda: sampled(model, x['dev']))
    whole = {k:pooled(o, d) for k,o in x.items()}
    # 2) candidates, on dev photos and other photos that were used before
    found = {k:signs(kept/f'signs-{k}.jsonl', model, o, said[k]) for k,o in x.items()}
    wrong = {k:wrongs(said[k], o) for k,o in dict(dev=dev, test=test).items()}
    candidates = dict(found['dev'], agreement=agreement(said['dev'], drawn))
    domain = {k:auroc(v, found['other'][k][used]) for k,v in found['dev'].items()}
    for rank in (16, 32, 64, 96):
        fitted = fit_photos(bank[:n_fit], whole['dev'], rank=rank)
        far = {k:fitted.distance(whole[k]).numpy() for k in ('dev','other')}
        domain[f'distance, {rank} directions'] = auroc(far['other'][used], far['dev'])
        if rank==64: candidates['distance'] = -far['dev']
    chosen = dict(domain=domain, wrong=wrong_aurocs(wrong['dev'], candidates))
    # 3) the calibration
    fitted = fit_photos(bank[:n_fit], whole['dev'])
    far = {k:fitted.distance(o).numpy() for k,o in whole.items()}
    fitted.border = best_border(far['dev'], far['other'][used])
    found = {k:{s:torch.tensor(v) for s,v in o.items()} for k,o in found.items()}
    bad = torch.tensor(wrong['dev']['half_of_words'])
    model.calibration = Calibration(fitted, fit_captions(found['dev']['logprob'], bad),
        note=f'{n_fit:,} training photos; borders from {len(dev):,} dev photos '
             f'and {len(used):,} photos of other things')
    # 4) how often it is right, on photos that nothing was chosen on
    far_test,far_fresh = far['test'],far['other'][fresh]
    rows = [json.loads(o) for o in (photos/'unlabelled.jsonl').read_text().splitlines()]
    kinds = np.array([rows[i]['set'] for i in fresh])
    # Flickr8k's photos are squares of 224 pixels here: scenes that are so, too
    alike = np.array([rows[i]['set']=='ade20k-val' and
                      Image.open(photos/rows[i]['file']).size==(224,224) for i in fresh])
    why = {k:np.array(model.calibration.why(whole[k], **found[k])) for k in ('test','other')}
    why['other'] = why['other'][fresh]
    flags = {k:v!='' for k,v in why.items()}
    strange = {k:np.array(['unlike' in o for o in v]) for k,v in why.items()}
    doubted = {k:np.array(['improbable' in o for o in v]) for k,v in why.items()}
    unsure = dict(photos=dict(fit=n_fit, dev=len(dev), used=len(used), test=len(test),
            fresh=len(fresh)), chosen=chosen,
        auroc=auroc(far_fresh, far_test),
        auroc_of_kind={k:auroc(far_fresh[kinds==k], far_test) for k in sorted(set(kinds))},
        square_scenes=dict(n=int(alike.sum()), auroc=auroc(far_fresh[alike], far_test)),
        auroc_similarity=auroc(found['test']['similarity'], found['other']['similarity'][fresh]),
        auroc_logprob=auroc(found['test']['logprob'], found['other']['logprob'][fresh]),
        wrong=wrong_aurocs(wrong['test'], dict(found['test'], distance=-far_test)),
        wrong_share={k:float(v.mean()) for k,v in wrong['test'].items()},
        unsure={k:float(v.mean()) for k,v in flags.items()},
        unlike={k:float(v.mean()) for k,v in strange.items()},
        improbable={k:float(v.mean()) for k,v in doubted.items()},
        right_when=dict(unsure=shares(flags['test'], wrong['test']),
                        improbable=shares(doubted['test'], wrong['test']),
                        unlike=shares(strange['test'], wrong['test'])))
    # 5) captions without a captioner, and people's
    refs = dict(zip(test.ids, test.captions))
    near = consensus(whole['test'], bank, train.captions)
    human,others = human_row(refs)
    def scores(said, refs):
        found = score_captions(said, refs)
        return {k:float(found[k]) for k in ('cider','bleu4','meteor','rouge_l')}
    beside = dict(consensus=dict(scores(dict(zip(test.ids, near)), refs), photos=len(bank),
                                 distinct=len(set(near))),
                  human=scores(human, others),
                  pocket_against_four=scores(dict(zip(test.ids, said['test'])), others))
    # 6) files
    facts = json.loads(result.read_text())
    facts.update(unsure=unsure, beside=beside, unsure_commit=commit())
    if report: facts['curve'] = curve(json.loads(report.read_text()))
    put(model.calibration, out)
    size = sum(o.stat().st_size for o in out.parent.rglob('*') if o.is_file())/1e6
    facts['megabytes'] = round(size, 2)
    write_json(result, json.loads(json.dumps(facts, default=float)))
    print(json.dumps(dict(unsure=unsure, beside=beside), indent=1, default=float))
