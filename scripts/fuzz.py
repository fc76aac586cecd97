"""Damaged and hostile files of every kind that the package reads: python scripts/fuzz.py [--only coco photos] [--n 20000] [--seed 0] [--seconds 240]

A kind is a valid file, a function that reads it, and a judge of what was read. Half of the inputs have bytes changed, cut or put in; the
others are JSON with a value replaced, a key twice, deep nesting, huge numbers, NaN, another encoding. An input may be refused by ValueError
or OSError in one line. What is accepted is judged: equal to the undamaged, or equal again when it is written and read. Results:
nbs/results/data/fuzz.json (for kinds that were run; the others stay)."""
import argparse, io, json, os, random, shutil, signal, subprocess, sys, tempfile, time, traceback, warnings
from dataclasses import replace
from pathlib import Path

top = Path(__file__).parent.parent
os.environ['TQDM_DISABLE'] = '1'
hostile = [None, True, False, 0, -1, 1.5, 1e308, float('nan'), float('inf'), 10**400, '', ' ', '\0', '\ud83d', 'x'*10_000,
           '../up', '/etc/passwd', [], {}, [[]], [None], {'a': 1}, '\u2028', '5', 'null']

# ---- what may happen to a file

def places(o, path=()):
    "Paths of all values in a JSON document"
    yield path
    items = o.items() if isinstance(o, dict) else enumerate(o) if isinstance(o, list) else ()
    for k, v in items: yield from places(v, (*path, k))

def put(o, path, value):
    "The document with another value at a path"
    if not path: return value
    o = dict(o) if isinstance(o, dict) else list(o)
    o[path[0]] = put(o[path[0]], path[1:], value)
    return o

def drop(o, path):
    "The document without what lies at a path"
    if len(path) > 1: return put(o, path[:1], drop(o[path[0]], path[1:]))
    if isinstance(o, dict): return {k: v for k, v in o.items() if k != path[0]}
    return [v for i, v in enumerate(o) if i != path[0]]

def structured(data, rng):
    "A JSON document, or one line of many, with one thing changed"
    lines = data.decode().split('\n')
    whole = len([o for o in lines if o.strip()]) != 1 and lines[0].strip() in ('{', '[')
    i = 0 if whole else rng.choice([i for i, o in enumerate(lines) if o.strip()])
    o = json.loads(data if whole else lines[i])
    path = rng.choice(list(places(o)))
    how = rng.randrange(6)
    if how == 0 and path: text = json.dumps(drop(o, path))
    elif how == 1:
        depth = rng.choice([50, 400, 950, 3000, 50_000])
        text = json.dumps(put(o, path, '@@')).replace('"@@"', '['*depth+']'*depth)
    elif how == 2 and path and isinstance(path[-1], str):
        key = json.dumps(path[-1])
        text = json.dumps(o).replace(f'{key}:', f'{key}: {json.dumps(rng.choice(hostile[:20]))}, {key}:', 1)
    elif how == 3: text = json.dumps(put(o, path, '@@')).replace('"@@"', rng.choice(['9'*5000, '1e999', '-0', 'NaN', '-Infinity', '01']))
    else: text = json.dumps(put(o, path, rng.choice(hostile)), ensure_ascii=rng.random() < .5)
    new = text if whole else '\n'.join([*lines[:i], text, *lines[i+1:]])
    return new.encode('utf-8', 'surrogatepass')

def bytewise(data, rng):
    "A file with some bytes changed, cut, put in, doubled, or in another encoding"
    b, how = bytearray(data), rng.randrange(8)
    at = rng.randrange(len(b)+1)
    if how == 0: return bytes(b[:at])
    if how == 1: return b'\xef\xbb\xbf'+bytes(b)
    if how == 2:
        try: return data.decode().encode(rng.choice(['utf-16', 'utf-32', 'latin-1', 'utf-16-be']), 'replace')
        except UnicodeDecodeError: return bytes(b[at:])
    if how == 3: b[at:at] = rng.choice([b'\0', b'\n', b'"', b'\r', b',', b'\t', b'#', b'=', b'\xff', b'[', b'{', b'\xe2\x80\xa8'])*rng.choice([1, 1, 2, 500])
    elif how == 4:
        end = min(len(b), at+rng.randrange(1, 40))
        b[at:at] = b[at:end]
    elif how == 5: del b[at:at+rng.randrange(1, 20)]
    else:
        for _ in range(rng.choice([1, 1, 2, 8])): b[rng.randrange(len(b))] = rng.randrange(256)
    return bytes(b)

def damaged(data, rng, is_json):
    return (structured if is_json and rng.random() < .5 else bytewise)(data, rng)

# ---- kinds: a valid file, its reader, its judge

class Kind:
    "A kind of file: its content, where it lies, who reads it, and who judges what was read"
    def __init__(self, data, name, read, again=None, is_json=False): self.data, self.name, self.read, self.again, self.is_json = data, name, read, again, is_json

def of_captions(data, name, manifest, is_json=False):
    from clipcap_ssl.data.captions import read_rows
    def plain(rows): return [(o.file, o.captions, o.split, o.id or o.file) for o in rows]
    def again(rows, folder):
        "Written as captions.jsonl and read again"
        lines = [json.dumps({k: v for k, v in dict(file=f, captions=c, split=s, id=i).items() if v is not None}) for f, c, s, i in rows]
        (folder/'again.jsonl').write_text('\n'.join(lines))
        new = plain(read_rows(folder, 'again.jsonl'))
        return len({f for f, *_ in rows}) < len(rows) or new == rows and all(c.strip() and '..' not in Path(f).parts for f, cs, *_ in rows for c in cs)
    return Kind(data, name, lambda p: plain(read_rows(p.parent, manifest)), again, is_json)

def document_kinds():
    "Files that people and runs write"
    from clipcap_ssl.core import write_json
    from clipcap_ssl.data.base import Captioned
    from clipcap_ssl.models import calibration
    from clipcap_ssl.pipeline import config, parent
    from clipcap_ssl.pipeline.config import load_config, save_config
    from clipcap_ssl.report import evaluate, live, study, study_page
    from clipcap_ssl.pipeline import experiment
    from clipcap_ssl.documents import read_document
    def dump(o): return json.dumps(o).encode()
    rows = [dict(file='a/1.png', captions=['a dog', 'ein Hund \u2028'], split='train', id=1), dict(file='2.png', caption='a cat', split='test', extra={'a': [1]})]
    table = 'file,caption,split\n1.png,"a dog, running",train\n1.png,a cat,train\n2.png,,test\n'
    coco = dict(info={}, images=[dict(id=1, file_name='1.png', height=4), dict(id='2', file_name='b/2.png')],
                annotations=[dict(id=7, image_id=1, caption=' a dog '), dict(id=8, image_id=2, caption='a cat')])
    karpathy = dict(dataset='coco', images=[dict(filename='1.png', filepath='v', split='restval', sentences=[dict(raw='a dog', tokens=['a'])]),
                                            dict(filename='2.png', split='test', sentences=[])])
    kinds = dict(
        jsonl=of_captions('\n'.join(map(json.dumps, rows)).encode(), 'captions.jsonl', 'captions.jsonl', True),
        metadata_jsonl=of_captions('\n'.join(json.dumps(dict(file_name=f'{i}.png', text='a dog')) for i in range(3)).encode(), 'metadata.jsonl', None, True),
        metadata_csv=of_captions(b'file_name,text\n1.png,a dog\n2.png,a cat\n', 'metadata.csv', None),
        csv=of_captions(table.encode(), 'captions.csv', 'captions.csv'),
        tsv=of_captions(table.replace(',', '\t').replace('dog\t', 'dog,').encode(), 'captions.tsv', 'captions.tsv'),
        coco=of_captions(dump(coco), 'coco.json', 'coco.json', True),
        coco_results=of_captions(dump([dict(image_id=1, caption='a dog')]), 'results.json', 'results.json', True),
        coco_instances=of_captions(dump(dict(images=coco['images'], annotations=[dict(image_id=1, bbox=[1, 2, 3, 4])])), 'i.json', 'i.json', True),
        karpathy=of_captions(dump(karpathy), 'dataset_coco.json', 'dataset_coco.json', True),
        flickr=of_captions(b'1.jpg#0\ta dog\n1.jpg#1\ta cat\n2.jpg#0\tone\n', 'Flickr8k.token.txt', None))

    def written(write, read):
        "Judge by writing what was read and reading it again"
        return lambda found, folder: read(write(found, folder)) == found
    def as_json(found, folder): return write_json(folder/'again.json', found)
    kinds['recipe'] = Kind(b''.join(f'{k} = {json.dumps(v)}\n'.encode() for k, v in vars(load_config('scenes')).items()), 'r.toml',
                           load_config, written(lambda o, folder: save_config(o, folder/'again.toml'), load_config))
    key = dict(study='s', version=2, a='A', b='B', seed=1, items={'1': dict(photo='p', left='a', right='b', written=['A dog.', 'a dog'], run='x'), '2': dict(photo='q', left='wrong', right='true')})
    said = dict(study='s', version=2, rater='ann', started='now', saved='then', answers=[dict(item='1', question='overall', answer='neither', seconds=2.),
                dict(item='2', question='accuracy', answer='right', seconds=1)])
    scores = dict(meta=dict(seed=1, config=dict(steps=1)), rows=dict(a=dict(cider=.5, n=3)), each=dict(a=dict(cider=[.5, None])))
    def json_kind(data, name, read): return Kind(dump(data), name, read, written(as_json, read), True)
    def captions_of(p): return study_page._lines(p)
    def lines_again(found, folder):
        (folder/'again.jsonl').write_text('\n'.join(map(json.dumps, found.values())))
        return captions_of(folder/'again.jsonl') == found
    def report(p):
        "A rater's file and what comes of it"
        found = study.read_answers([p])
        try: made = study.study_report(found, key)
        except ValueError as e:
            if 'the key is of' in str(e): return found[0]
            raise
        study.report_table(made)
        for o in made['questions'].values(): assert 0 <= o['low'] <= o['win_rate'] <= o['high'] <= 1, o
        return found[0]
    def numbers(p):
        "Scores, with NaN that equals itself"
        return {r: (dict(o[0]), {k: [None if x != x else x for x in v] for k, v in o[0].each.items()}) for r, o in evaluate.load_scores([p]).items()}
    def scores_again(found, folder):
        new = dict(rows={r: o for r, (o, _) in found.items()}, each={r: e for r, (_, e) in found.items()})
        return numbers(write_json(folder/'again.json', new)) == found
    look = dict(step=1, captions=['a dog'], reward=.5, cider=.1)
    seen = dict(row='stage1', n_steps=3, fresh=True, log=dict(loss=[[1, 2.5]]), looks=[look])
    def page(p):
        "What a row left for the live page, and the page that is made of it"
        found = read_document(p, live._LiveFile)
        made = live.live_page([found], ['data:image/png;base64,'])
        assert '<script' not in made
        return found
    uses = parent.Uses([['a.png', 0]], [['b.png', 1]], plain=['c.png'], dev=['d.png'], test=['e.png'], contents={'a.png': '01'})
    child = parent.Parent(Path('runs/a'), 'stage1', dict(steps=1, lm='x'), 'ab', 'cd', dict(labelled_pairs=2), 1.5, uses)
    known = Path(tempfile.mkdtemp(prefix='fuzz-'))/'parent.json'
    child.save(known)
    def parent_again(found, folder):
        found.save(folder/'again.json')
        return parent.read_parent(folder/'again.json') == found
    lines = '\n'.join(json.dumps(dict(id=i, references=['a'], full='a dog', stage1='a')) for i in 'ab')
    kinds |= dict(
        study_key=json_kind(key, 'k.json', study_page.read_key), study_answers=json_kind(said, 'a.json', report),
        run_captions=Kind(lines.encode(), 'captions.jsonl', captions_of, lines_again, True),
        scores=Kind(dump(scores), 's.json', numbers, scores_again, True),
        live=json_kind(seen, 'stage1.json', page), parent=Kind(known.read_bytes(), 'parent.json', parent.read_parent, parent_again, True),
        splits=Kind(dump(dict(labelled=[['a', 0]], labelled_to_choose=[['b', 1]], without_captions=['c'], dev=['d'], test=['e'],
                              photos=dict(train={'a': '01', 'b': '02'}), hashes={}, before=vars(uses))), 'splits.json',
                    lambda p: parent.read_uses(p.parent), lambda o, _: o.known_as(Captioned(['a', 'c'], [(), ()], None), {'a': '01'}) is not None, True),
        row=json_kind(dict(cpu_seconds=1.5, captions=dict(a='x'), dev={}, trace=[dict(step=1)]), 'row.json', lambda p: read_document(p, experiment._RowFile)),
        card=Kind(dump(dict(facts=dict(row='full', stage='x'))), 'config.json', lambda p: config.saved_row(p.parent), lambda o, _: isinstance(o, str | None), True),
        calibration=Kind(dump(dict(similarity_p05=.2, note='')), 'calibration.json', lambda p: calibration.read_calibration(p.parent).similarity, lambda o, _: o is None or abs(o) < float('inf'), True))
    return kinds

def photo_kinds():
    "Small images; what is read is judged by its size and mode, since any bytes may be a picture"
    from PIL import Image
    from clipcap_ssl.data.photos import read_photo
    warnings.filterwarnings('ignore', module='PIL')
    picture, kinds = Image.effect_mandelbrot((24, 16), (-2, -1, 1, 1), 20).convert('RGB'), {}
    for kind in ('png', 'jpeg', 'gif', 'webp', 'bmp', 'tiff'):
        f = io.BytesIO()
        picture.save(f, kind.upper())
        kinds[f'photo_{kind}'] = Kind(f.getvalue(), f'1.{kind}', read_photo, lambda o, _: o.mode == 'RGB' and min(o.size) > 0 and len(o.tobytes()) == 3*o.width*o.height)
    return kinds

class _Eye:
    "An encoder that costs nothing, so that the reading of features is what is tried"
    name,hash,dim,logit_scale = 'fuzz:eye','0001',4,1.
    def encode_image(self, images):
        import torch
        return torch.tensor([[*o.getpixel((0, 0)), 255.] for o in images])/255

def feature_kinds():
    "Feature caches; what comes back has to be the undamaged"
    import torch
    from PIL import Image
    from clipcap_ssl.data.base import Captioned
    from clipcap_ssl.data.features import encode_dataset
    torch.set_num_threads(1)
    eye, home = _Eye(), Path(tempfile.mkdtemp(prefix='fuzz-'))
    pictures = [Image.new('RGB', (2, 2), (90*i, 7, 0)) for i in range(3)]
    ds = Captioned(['a', 'b\n', 'c'], [(), (), ()], lambda i: pictures[i])
    true = encode_dataset(eye, ds, cache=home/'f.safetensors')
    def features(p):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            return encode_dataset(eye, ds, cache=p)
    return dict(features=Kind((home/'f.safetensors').read_bytes(), 'f.safetensors', features, lambda o, _: o.ids == true.ids and torch.equal(o.x, true.x)))

def store_kinds():
    "The files of a store of two shards; a damaged one is refused, or every row is as it was"
    import torch
    from PIL import Image
    from clipcap_ssl.data.base import Captioned
    from clipcap_ssl.data.store import _summary, embed_store, merge_store, read_store
    torch.set_num_threads(1)
    eye, home = _Eye(), Path(tempfile.mkdtemp(prefix='fuzz-'))/'store'
    pictures = [Image.new('RGB', (2, 2), (90*i, 7, 0)) for i in range(3)]
    ds = Captioned(['a', 'b', 'c'], [(), (), ()], lambda i: pictures[i], stamp=lambda i: f's{i}')
    embed_store(eye, ds, home, rows=2)
    merge_store(home, ds)
    def read(folder):
        found = read_store(folder)
        _summary(folder)
        return found.ids, found.contents, found.x[:].tolist()
    true = read(home)
    def merged(folder):
        merge_store(folder, ds)
        return read(folder)
    def same(o, _): return o == true
    kinds = _files_of(home, 'store', read, same, ['store.json', '00000.json', '00000.safetensors'])
    made = _files_of(home, 'store', merged, same, ['plan.json', '00000.json'])
    return kinds | {f'{k}_merged': v for k, v in made.items()} | dict(store_tar=tar_kind())

def tar_kind():
    "A tar file of photos; what is read of a damaged one are photos by names that stay in their folder"
    import tarfile
    from PIL import Image
    from clipcap_ssl.data.store import TarPhotos
    warnings.filterwarnings('ignore', module='PIL')
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode='w') as tar:
        for i in range(2):
            photo = io.BytesIO()
            Image.new('RGB', (3, 2), (90*i, 7, 0)).save(photo, 'png')
            for name, data in ((f'{i}.png', photo.getvalue()), (f'{i}.json', json.dumps(dict(caption=f'dog {i}')).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    def read(path):
        photos, seen = TarPhotos(path), []
        for i in range(len(photos)):
            try: seen.append(photos.image(i))
            except (ValueError, OSError) as e: assert '\n' not in str(e), e
        if not seen: raise ValueError('no photo')
        return photos, seen
    def judge(found, _):
        photos, seen = found
        return all(o.mode == 'RGB' for o in seen) and not any('..' in Path(o).parts or o.startswith('/') for o in photos.ids)
    return Kind(written.getvalue(), '00000.tar', read, judge)

def _in_folder(whole, name, read):
    "Read a folder of which one file is damaged; the folder is whole again each time"
    folder = whole.with_name(f'{whole.name}-{name}')
    def damaged(p):
        shutil.copytree(whole, folder, dirs_exist_ok=True)
        shutil.copy(p, folder/name)
        return read(folder)
    return damaged

def _files_of(whole, prefix, read, again, names=None):
    "A kind for each file of a folder"
    files = [whole/o for o in names] if names else [p for p in sorted(whole.iterdir()) if p.suffix in ('.json', '.safetensors')]
    return {f'{prefix}_{p.name}': Kind(p.read_bytes(), p.name, _in_folder(whole, p.name, read), again, p.suffix == '.json') for p in files}

def small_encoder(home):
    "A folder with an encoder of one layer each and the shipped tokenizer: what is damaged is the format, so the size may be small"
    import open_clip, torch
    from safetensors.torch import save_file
    from clipcap_ssl.core import asset_path, read_json, write_json
    whole = shutil.copytree(asset_path('toy'), home/'eye')
    about = read_json(whole/'open_clip_config.json')
    cfg = about['model_cfg']
    cfg |= dict(embed_dim=16, vision_cfg=dict(image_size=64, patch_size=32, layers=1, width=16, head_width=8))
    cfg['text_cfg'] |= dict(width=16, heads=2, layers=1)
    write_json(whole/'open_clip_config.json', about)
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**cfg).state_dict(), whole/'open_clip_model.safetensors')
    write_json(whole/'trained_on.json', dict(ids=['a.jpg', 1], contents=['0123']))
    return whole

def small_lm(home):
    "A folder with a language model of one layer and the shipped tokenizer"
    from clipcap_ssl.core import asset_path
    from clipcap_ssl.models.lm import new_lm
    from clipcap_ssl.models.loading import load_tokenizer
    tok = load_tokenizer(asset_path('toy-lm'), 80)
    new_lm(tok, 16, 1, n_heads=2, n_positions=64).save_pretrained(home/'lm')
    tok.save_pretrained(home/'lm')
    return home/'lm'

def captioner_kinds():
    "The files of a captioner's folder: with its language model inside, and (config.json again) with LoRA on one that is elsewhere"
    import torch
    from clipcap_ssl.models.captioner import Captioner, new_captioner
    from clipcap_ssl.models.encoder import load_encoder
    torch.set_num_threads(1)
    encoder, home = load_encoder('toy'), Path(tempfile.mkdtemp(prefix='fuzz-'))
    model = new_captioner(encoder, str(small_lm(home)), train_lm=True).set_card(data='scenes', stage='1')
    model.decoding = dict(decode='guided', strength=1.3, max_new_tokens=6)
    model.save_pretrained(home/'whole')
    new_captioner(encoder, lora=2).save_pretrained(home/'light')
    def judge(true):
        words = ['a red dot', 'two blue squares above a green ring']
        weights, ids = true.state_dict(), true.tokenizer(words)['input_ids']
        def same(o, folder):
            "The weights and the tokens of the undamaged; what a changed config.json says is said again when it is written"
            state = o.state_dict()
            if state.keys() != weights.keys() or any(not torch.equal(v, weights[k]) for k, v in state.items()): return False
            if o.tokenizer(words)['input_ids'] != ids: return False
            o.save_pretrained(folder/'again')
            new = Captioner.from_pretrained(folder/'again')
            return (new.facts, new.decoding, new.encoder_name, new.encoder_hash) == (o.facts, o.decoding, o.encoder_name, o.encoder_hash)
        return same
    read = Captioner.from_pretrained
    return _files_of(home/'whole', 'captioner', read, judge(read(home/'whole'))) | _files_of(home/'light', 'light_captioner', read, judge(read(home/'light')), ['config.json'])

def encoder_kinds():
    "The files of an encoder's folder; a damaged one is refused, or it is another encoder by its hash and gives finite vectors"
    import torch
    from PIL import Image
    from clipcap_ssl.models.encoder import load_encoder
    torch.set_num_threads(1)
    whole = small_encoder(Path(tempfile.mkdtemp(prefix='fuzz-')))
    def read(folder): return load_encoder(f'open_clip:{folder}')
    true, picture = read(whole), Image.effect_mandelbrot((24, 16), (-2, -1, 1, 1), 20).convert('RGB')
    x, t = true.encode_image([picture]), true.encode_text(['a red dot'])
    def judge(o, _):
        new = o.encode_image([picture]), o.encode_text(['a red dot'])
        return all(torch.isfinite(v).all() for v in new) and (o.hash != true.hash or torch.equal(new[0], x) and torch.equal(new[1], t))
    return _files_of(whole, 'encoder', read, judge, ['open_clip_config.json', 'open_clip_model.safetensors', 'tokenizer.json', 'tokenizer_config.json', 'trained_on.json'])

def lm_kinds():
    "The files of a language model's folder; a damaged one is refused, or gives finite numbers"
    import torch
    from clipcap_ssl.models.lm import tokenize_captions
    from clipcap_ssl.models.loading import load_lm
    torch.set_num_threads(1)
    whole = small_lm(Path(tempfile.mkdtemp(prefix='fuzz-')))
    def judge(found, _):
        lm, tok = found
        ids, mask = tokenize_captions(tok, ['a red dot', 'words unseen'])
        with torch.no_grad(): return bool(torch.isfinite(lm(ids, attention_mask=mask.long()).logits).all())
    return _files_of(whole, 'lm', load_lm, judge, ['config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json'])

def state_kinds():
    "The two files of a training's state; a damaged one is refused, or it is the same state"
    import torch
    from torch import nn
    from clipcap_ssl.train.loop import RowMemory, load_state, save_state
    torch.set_num_threads(1)
    class Seen(RowMemory):
        "A hook that remembers rows"
        def __init__(self): self.rows = []
    def parts():
        "Model, optimiser, schedule and hook as they are before the first step"
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        opt = torch.optim.AdamW(model.parameters(), lr=.1)
        return model, opt, torch.optim.lr_scheduler.CosineAnnealingLR(opt, 9), Seen()
    def flat(step, extra, model, opt, sched, hook):
        "All that a state brings back, as text"
        memory = {i: {k: v.tolist() for k, v in o.items()} for i, o in opt.state_dict()['state'].items()}
        return json.dumps([step, extra, {k: v.tolist() for k, v in model.state_dict().items()}, memory, [g['lr'] for g in opt.param_groups],
                           sched.state_dict(), hook.rows, torch.rand(3).tolist(), random.random()], sort_keys=True)
    whole = Path(tempfile.mkdtemp(prefix='fuzz-'))/'state'
    model, opt, sched, hook = parts()
    for _ in range(3):
        model(torch.ones(1, 3)).sum().backward()
        opt.step(), sched.step(), hook.rows.append(dict(step=1, loss=.5))
    save_state(whole, model, opt, step=3, extra=dict(key='a'), sched=sched, hooks=[hook])
    def read(folder):
        chance, (model, opt, sched, hook) = (torch.get_rng_state(), random.getstate()), parts()
        try:
            step, extra = load_state(folder, model, opt, sched=sched, hooks=[hook])
            return flat(step, extra, model, opt, sched, hook)
        finally: torch.set_rng_state(chance[0]), random.setstate(chance[1])
    true = read(whole)
    return _files_of(whole, 'state', read, lambda o, _: o == true)

# ---- the run

class Hang(BaseException): "A reader did not come back"

hung = []    # a reader may turn what it meets into its own error, so we note it here as well

def _alarm(*_):
    hung.append(time.time())
    raise Hang

def one(kind, data, folder, limit):
    "What became of one input: refused, accepted, wrong, traceback or hang; and why"
    path = folder/kind.name
    path.write_bytes(data)
    hung.clear()
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        found = kind.read(path)
        good = kind.again(found, folder)
        return ('accepted', '') if good else ('wrong', 'another value')
    except (ValueError, OSError) as e:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if hung: return 'hangs', str(e)[:200]
        return ('refused', '') if '\n' not in str(e).strip() else ('several_lines', str(e)[:200])
    except Hang: return 'hangs', ''
    except AssertionError as e: return 'wrong', str(e)[:200]
    except Exception as e: return 'tracebacks', ''.join(traceback.format_exception_only(e))[:200]+str(traceback.extract_tb(e.__traceback__)[-1])
    finally: signal.setitimer(signal.ITIMER_REAL, 0)

def fuzz(kind, n, seed, limit=60., keep=None, seconds=None):
    "Counts of what became of `n` inputs, or of as many as `seconds` allow, and an example of each fault"
    rng, counts, faults, slowest = random.Random(seed), {}, {}, 0.
    began, busy = time.time(), time.process_time()
    with tempfile.TemporaryDirectory(prefix='fuzz-') as d:
        folder = Path(d)
        assert one(kind, kind.data, folder, limit)[0] == 'accepted' or kind.name in ('results.json', 'i.json'), 'the undamaged file is not read'
        for i in range(n):
            if seconds and time.time()-began > seconds:
                n = i
                break
            data = damaged(kind.data, rng, kind.is_json)
            start = time.time()
            what, why = one(kind, data, folder, limit)
            slowest = max(slowest, time.time()-start)
            counts[what] = counts.get(what, 0)+1
            if what in ('refused', 'accepted') or len(faults) > 40: continue
            faults.setdefault((what, why), data)
    if keep:
        for j, ((what, why), data) in enumerate(faults.items()): (keep/f'{what}-{j}').write_bytes(data)
    zero = dict.fromkeys(('refused', 'accepted', 'wrong', 'tracebacks', 'several_lines', 'hangs'), 0)
    return dict(inputs=n, **(zero | counts), seconds=round(time.time()-began, 1), cpu_seconds=round(time.process_time()-busy, 1), slowest=round(slowest, 2)), faults

def all_kinds(only=()):
    "The kinds asked for; models are built only if they are"
    groups = dict(documents=document_kinds, photos=photo_kinds, features=feature_kinds, store=store_kinds, captioner=captioner_kinds, encoder=encoder_kinds, lm=lm_kinds, state=state_kinds)
    slow, found = dict(features=['features'], store=['store'], captioner=['captioner', 'light'], encoder=['encoder'], lm=['lm'], state=['state']), {}
    for group, make in groups.items():
        starts = slow.get(group, [''])
        if only and group not in only and not any(o.startswith(s) for o in only for s in starts): continue
        found |= {k: v for k, v in make().items() if not only or group in only or k.startswith(tuple(only))}
    return found

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--only', nargs='*', default=[], help='kinds, their beginnings, or documents, photos, features, store, captioner, encoder, lm, state')
    p.add_argument('--n', type=int, default=20_000)
    p.add_argument('--seconds', type=float, help='the longest that one kind takes')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--keep', type=Path, help='a folder for inputs that found a fault')
    p.add_argument('--out', type=Path, default=top/'nbs/results/data/fuzz.json')
    a = p.parse_args()
    if a.keep: a.keep.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=top, capture_output=True, text=True).stdout.strip()
    found = json.loads(a.out.read_text()) if a.out.is_file() else {}
    bad = 0
    for name, kind in all_kinds(a.only).items():
        counts, faults = fuzz(kind, a.n, f'{a.seed} {name}', keep=a.keep, seconds=a.seconds)
        found[name] = counts | dict(commit=commit, seed=a.seed)
        a.out.write_text(json.dumps(found, indent=1)+'\n')
        print(name, counts, flush=True)
        for what, why in list(faults)[:8]: print('   ', what, why.replace('\n', ' | '), flush=True)
        bad += sum(counts[k] for k in ('wrong', 'tracebacks', 'several_lines', 'hangs'))
    return int(bad > 0)

if __name__ == '__main__':
    signal.signal(signal.SIGALRM, _alarm)
    sys.exit(main())
