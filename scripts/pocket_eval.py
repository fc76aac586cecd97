"""Caption the test photos with a folder that `pocket_save.py` made: scores, repeats, distinct
captions, seconds, and a page with the first photos to look at."""
import base64, html, io, json, time
from itertools import product
from pathlib import Path
import torch
from fastcore.script import call_parse, store_true
from clipcap_ssl import Captioner
from clipcap_ssl.core import progress, write_json
from clipcap_ssl.data.base import CaptionFolder, subset
from clipcap_ssl.metrics.coco import score_captions
from clipcap_ssl.metrics.reference_free import distinct, mean_length, repetition

def features(captioner, data, batch=50):
    "Grids of all photos of a data set"
    parts = [range(i, min(i+batch, len(data))) for i in range(0, len(data), batch)]
    def embed(rows): return captioner.embed([data.image(i) for i in rows])
    return torch.cat([embed(o) for o in progress(parts, 'embedding photos')])

def scores(captions, data, metrics):
    "Reference scores and what they do not see"
    refs = dict(zip(data.ids, data.captions))
    found = score_captions(dict(zip(data.ids, captions)), refs, metrics)
    return found|dict(repeats=repetition(captions), repeats_of_3=repetition(captions, 3),
        distinct=round(distinct(captions)*len(captions)), words=mean_length(captions))

def ways(text):
    "Decoding settings of a JSON object; a list means that each of its values is tried"
    given = {k:v if isinstance(v, list) else [v] for k,v in json.loads(text).items()}
    return [dict(zip(given, values)) for values in product(*given.values())]

def page(file, data, captions, close, n):
    "The first photos with their captions"
    rows = []
    for i in range(min(n, len(data))):
        buffer = io.BytesIO()
        data.image(i).save(buffer, 'JPEG', quality=85)
        photo = base64.b64encode(buffer.getvalue()).decode()
        said = ''.join(f'<li>{html.escape(o)}</li>' for o in data.captions[i])
        rows.append(f'<div><img src="data:image/jpeg;base64,{photo}"><b>{i+1}. '
            f'{html.escape(captions[i])}</b> ({close[i]:.2f})<ul>{said}</ul></div>')
    style = 'body{display:grid;grid-template-columns:repeat(4,1fr);gap:1em;font:13px sans-serif}'
    file.write_text(f'<meta charset="utf-8"><style>{style}img{{display:block}}</style>'
        + '\n'.join(rows), encoding='utf-8')

def sheet(file, data, captions, n, columns=4, side=224, line=18):
    "The same as one picture"
    from PIL import Image, ImageDraw
    n = min(n, len(data))
    tall = side+4*line
    out = Image.new('RGB', (columns*(side+8), -(-n//columns)*tall), 'white')
    draw = ImageDraw.Draw(out)
    for i in range(n):
        x,y = i%columns*(side+8),i//columns*tall
        out.paste(data.image(i).resize((side,side)), (x, y))
        words,lines = captions[i].split(),['']
        for w in [f'{i+1}.', *words]:
            if len(lines[-1])+len(w)>36: lines.append('')
            lines[-1] += f'{w} '
        draw.multiline_text((x+2, y+side+2), '\n'.join(lines[:4]), fill='black')
    out.save(file)

@call_parse
def main(
    pocket:Path, # Folder with encoder/ and captioner/
    photos:Path, # Folder with captions.jsonl
    split:str='test', # Part of the photos
    out:Path=None, # Gets scores, captions and two pages of photos; not for the project
    decode:str='{"decode":"beam","num_beams":3,"no_repeat_ngram_size":3}', # JSON; lists are tried
    n:int=0, # Only the first photos; 0: all
    show:int=24, # Photos on the page
    fast:store_true=False, # CIDEr and BLEU alone, without METEOR
):
    "Caption photos and score the captions"
    captioner = Captioner.from_pretrained(pocket/'captioner', encoder=pocket/'encoder')
    data = CaptionFolder(photos, split)
    if n: data = subset(data, range(n))
    start = time.perf_counter()
    x = features(captioner, data)
    seconds = time.perf_counter()-start
    metrics = ('bleu','cider') if fast else ('bleu','rouge_l','cider','meteor')
    every,best = [],None
    for how in ways(decode):
        start = time.perf_counter()
        texts = captioner.write(x, **how)
        took = time.perf_counter()-start
        y = captioner.encoder.encode_text(texts)
        sim = x[:,0,:y.shape[1]] @ y.T
        right = (sim.argmax(1)==torch.arange(len(x))).float().mean().item()
        facts = scores(texts, data, metrics)|dict(similarity=sim.diag().mean().item(),
            own_first=right, embed_seconds=seconds, write_seconds=took)
        every.append(dict(how=how, **{k:round(float(v), 4) for k,v in facts.items()}))
        print(json.dumps(every[-1]), flush=True)
        if best is None or facts['cider']>best[0]: best = (facts['cider'], how, texts, sim.diag())
    if out is None: return
    out.mkdir(parents=True, exist_ok=True)
    _,how,texts,close = best
    write_json(out/'scores.json', dict(split=split, photos=len(data), tried=every))
    write_json(out/'captions.json', dict(how=how, captions=dict(zip(data.ids, texts))))
    page(out/'photos.html', data, texts, close.tolist(), show)
    sheet(out/'photos.png', data, texts, show)
