"""Hostile folders: python scripts/hostile.py [--only WORD] [--out FILE]

Encoders, language models and captioners whose files ask for code, network, memory or patience. Each is read as a user would read it. No code of a folder may
run, nothing may be fetched or asked on the terminal, nothing may hang, and a folder is either read or refused in one line. nbs/appendix/hostile.ipynb runs a part."""
import argparse, builtins, json, os, resource, shutil, signal, socket, subprocess, sys, tempfile, time
from pathlib import Path
import torch
from clipcap_ssl.core import asset_path
from clipcap_ssl.models.encoder import load_encoder
from clipcap_ssl.models.captioner import Captioner, new_captioner
from clipcap_ssl.models.loading import load_lm
from PIL import Image
from safetensors.torch import load_file, save_file

seen = dict(code=[], network=[], asked=[], watch=False)

class Hung(BaseException): pass

def watch():
    "While seen['watch']: note every process started and every address looked up or called, and let none through; call it once"
    def guarded(call):
        def refuse(*a, **k):
            if not seen['watch']: return call(*a, **k)
            seen['network'].append(str(a)[:100])
            raise OSError('no network in this test')
        return refuse
    for owner, name in ((socket.socket, 'connect'), (socket.socket, 'connect_ex'), (socket, 'getaddrinfo'), (socket, 'create_connection')):
        setattr(owner, name, guarded(getattr(owner, name)))
    def audit(event, args):
        if seen['watch'] and event in ('os.system', 'subprocess.Popen', 'os.exec', 'os.posix_spawn', 'os.fork', 'pty.spawn', 'shutil.rmtree.hostile'):
            seen['code'].append(f'{event} {args}'[:100])
    sys.addaudithook(audit)
    answer = builtins.input
    def ask(*a):
        if not seen['watch']: return answer(*a)
        seen['asked'].append(str(a)[:100])
        raise EOFError
    builtins.input = ask

def edit(file, *path, value=None, drop=False):
    "Set or drop a key of a JSON file"
    found = json.loads(Path(file).read_text())
    at = found
    for k in path[:-1]: at = at[k]
    if drop: del at[path[-1]]
    else: at[path[-1]] = value
    Path(file).unlink()
    Path(file).write_text(json.dumps(found))

def text(name, data):
    "Replace a file by bytes"
    def f(d):
        (d/name).unlink(missing_ok=True)
        (d/name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return f

def key(name, *path, **how): return lambda d: edit(d/name, *path, **how)

def link(name, to):
    "Replace a file by a link"
    def f(d):
        (d/name).unlink(missing_ok=True)
        (d/name).symlink_to(to(d) if callable(to) else to)
    return f

def fifo(name):
    def f(d):
        (d/name).unlink(missing_ok=True)
        os.mkfifo(d/name)
    return f

def folder(name):
    def f(d):
        (d/name).unlink(missing_ok=True)
        (d/name).mkdir()
    return f

def tensors(name, change):
    "Write changed tensors, with the header's notes as they were"
    def f(d):
        raw = (d/name).read_bytes()
        notes = json.loads(raw[8:8+int.from_bytes(raw[:8], 'little')]).get('__metadata__')
        found = {k:v.clone() for k,v in load_file(d/name).items()}
        change(found)
        save_file(found, d/name, notes)
    return f

def header(name, change):
    "Write a changed header before the same numbers"
    def f(d):
        raw = (d/name).read_bytes()
        n = int.from_bytes(raw[:8], 'little')
        found = json.loads(raw[8:8+n])
        new = change(found)
        new = new if isinstance(new, bytes) else json.dumps(found).encode()
        (d/name).write_bytes(len(new).to_bytes(8, 'little')+new+raw[8+n:])
    return f

def both(*fs):
    def f(d):
        for o in fs: o(d)
    return f

def canary(d): return str(Path(d).parent/'canary')
def module(name='evil.py'):
    "Python that leaves a file behind when it is run"
    return lambda d: (d/name).write_text(f'open({canary(d)!r}, "w").write("x")\nclass T: pass\nclass M: pass\nclass C: pass\n')

def first(found): return next(k for k in found if found[k].is_floating_point() and found[k].ndim)
def spoil(value):
    def f(found): found[first(found)].view(-1)[0] = value
    return f
def as_type(kind):
    def f(found): found[first(found)] = found[first(found)].to(kind)
    return f
def offsets(how):
    def f(found):
        name = next(k for k in found if k!='__metadata__')
        found[name].update(how)
    return f
def overlap(found):
    a,b = [k for k in found if k!='__metadata__'][:2]
    found[b]['data_offsets'] = found[a]['data_offsets']
def note(value):
    def f(found): found['__metadata__'] = value
    return f
def repeated(found): return json.dumps(found).encode().replace(b'{', b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},', 1)

class Pickled:
    "A pickle that would leave a file behind"
    def __init__(self, to): self.to = to
    def __reduce__(self): return (exec, (f'open({self.to!r}, "w").write("x")',))
def pickled(name): return lambda d: torch.save(Pickled(canary(d)), d/name)
def deep(n=100_000): return '{"a":'*n+'1'+'}'*n

def any_weights(w):
    "What may be wrong with a weights file"
    return {'weights: fifo': fifo(w), 'weights: device': link(w, '/dev/zero'), 'weights: folder': folder(w),
        'weights: link out of the folder': lambda d: (shutil.move(d/w, d.parent/'outside'), (d/w).symlink_to(d.parent/'outside')),
        'weights: link to itself': link(w, lambda d: d/w), 'weights: broken link': link(w, 'nowhere'), 'weights: missing': lambda d: (d/w).unlink(),
        'weights: pickle under its name': pickled(w), 'weights: pickle beside': both(pickled('pytorch_model.bin'), pickled('open_clip_pytorch_model.bin')),
        'weights: pickle instead': lambda d: ((d/w).unlink(), pickled('pytorch_model.bin')(d), pickled('open_clip_pytorch_model.bin')(d)),
        'weights: empty': text(w, b''), 'weights: no header': text(w, b'\0'*8), 'weights: header of 2**63': text(w, b'\xff'*8+b'{}'),
        'weights: half': lambda d: (d/w).write_bytes((d/w).read_bytes()[:(d/w).stat().st_size//2]),
        'weights: NaN': tensors(w, spoil(float('nan'))), 'weights: infinity': tensors(w, spoil(float('inf'))), 'weights: int8': tensors(w, as_type(torch.int8)),
        'weights: int64': tensors(w, as_type(torch.int64)), 'weights: bool': tensors(w, as_type(torch.bool)), 'weights: one is missing': tensors(w, lambda f: f.pop(first(f))),
        'weights: one too many': tensors(w, lambda f: f.update(more=torch.zeros(3))), 'weights: none': tensors(w, lambda f: f.clear()),
        'weights: another shape': tensors(w, lambda f: f.update({first(f): torch.zeros(3, 3)})), 'header: overlap': header(w, overlap),
        'header: beyond the file': header(w, offsets(dict(data_offsets=[0, 10**15]))), 'header: backwards': header(w, offsets(dict(data_offsets=[8, 0]))),
        'header: huge shape': header(w, offsets(dict(shape=[2**31, 2**31]))), 'header: negative shape': header(w, offsets(dict(shape=[-1]))),
        'header: unknown type': header(w, offsets(dict(dtype='X9'))), 'header: notes are numbers': header(w, note({'stamp': 1})), 'header: notes are a list': header(w, note([1])),
        'header: a name twice': header(w, repeated), 'header: deep': header(w, lambda f: deep().encode()), 'header: no JSON': header(w, lambda f: b'\xff'*100)}

def any_json(c):
    "What may be wrong with a document"
    return {f'{c}: fifo': fifo(c), f'{c}: device': link(c, '/dev/zero'), f'{c}: folder': folder(c), f'{c}: link to /etc/hostname': link(c, '/etc/hostname'),
        f'{c}: link to itself': link(c, lambda d: d/c), f'{c}: empty': text(c, ''), f'{c}: deep': text(c, deep()), f'{c}: deep list': text(c, '['*100_000), f'{c}: a list': text(c, '[]'), f'{c}: null': text(c, 'null'),
        f'{c}: no UTF-8': text(c, b'\xff\xfe{\0}\0'), f'{c}: half': lambda d: (d/c).write_bytes((d/c).read_bytes()[:40]), f'{c}: NUL bytes': text(c, b'\0'*100),
        f'{c}: byte order mark': lambda d: (d/c).write_bytes(b'\xef\xbb\xbf'+(d/c).read_bytes()), f'{c}: a key twice': lambda d: (d/c).write_text((d/c).read_text().replace('{', '{"x": 1, "x": 2,', 1)),
        f'{c}: NaN': lambda d: (d/c).write_text((d/c).read_text().replace('{', '{"x": NaN,', 1)), f'{c}: 1e999': lambda d: (d/c).write_text((d/c).read_text().replace('{', '{"x": 1e999,', 1)),
        f'{c}: half an emoji': lambda d: (d/c).write_text((d/c).read_text().replace('{', '{"x": "\\ud83d",', 1)), f'{c}: a number of 10,000 digits': text(c, '{"x": '+'1'*10_000+'}'),
        f'{c}: 40 MB': lambda d: (d/c).write_text('{"x": "'+'x'*40_000_000+'"}'), f'{c}: of a future version': key(c, 'format_version', value=99)}

def every(c, *where, keys, values=(None, -1, 0, 10**9, 10**30, 1.5, 'x', '', True, [], {}, [1]*4, '../../etc/passwd')):
    "Each key with each wrong value"
    return {f"{c}: {'.'.join((*where, k))}={json.dumps(v)[:24]}": key(c, *where, k, value=v) for k in keys for v in values}

O,T,C,W = 'open_clip_config.json','tokenizer_config.json','config.json','model.safetensors'
tc,vc = ('model_cfg','text_cfg'),('model_cfg','vision_cfg')

def tokenizer_cases():
    evil = {'AutoTokenizer': ['evil.T', 'evil.T']}
    cases = {'tokenizer: auto_map': both(module(), key(T, 'auto_map', value=evil)), 'tokenizer: auto_map as list': both(module(), key(T, 'auto_map', value=['evil.T', None])),
        'tokenizer: auto_map of the hub': key(T, 'auto_map', value={'AutoTokenizer': ['somebody/model--evil.T', None]}), 'tokenizer: trust_remote_code': both(module(), key(T, 'trust_remote_code', value=True), key(T, 'auto_map', value=evil)),
        'tokenizer: link to a file outside': link('tokenizer.json', '/etc/hostname'), 'tokenizer: missing': lambda d: (d/'tokenizer.json').unlink(), 'tokenizer: vocabulary with ids of 10**9': key('tokenizer.json', 'model', 'vocab', 'red', value=10**9),
        'tokenizer: negative id': key('tokenizer.json', 'model', 'vocab', 'red', value=-1), 'tokenizer: vocabulary is a list': key('tokenizer.json', 'model', 'vocab', value=[1]), 'tokenizer: unknown model': key('tokenizer.json', 'model', 'type', value='X'),
        'tokenizer: no end token': key(T, 'eos_token', value=None), 'tokenizer: its end token is a dict': key(T, 'eos_token', value={'a': 1}), 'tokenizer: template with code': key(T, 'chat_template', value="{{ ''.__class__.__mro__ }}")}
    for name in ('AutoTokenizer', 'AutoModelForCausalLM', 'Trainer', 'RagTokenizer', 'os.system', '../evil', 'pipeline', 7, ['x']): cases[f'tokenizer: class {name}'] = key(T, 'tokenizer_class', value=name)
    for k in ('tokenizer_file', 'vocab_file', 'name_or_path', 'gguf_file'): cases[f'tokenizer: {k} is a path'] = key(T, k, value='/etc/hostname')
    return cases | any_json(T) | any_json('tokenizer.json')

def encoder_cases():
    cases = {'encoder: tokenizer_kwargs trust_remote_code': both(module(), key(O, *tc, 'tokenizer_kwargs', value={'trust_remote_code': True}), key(T, 'auto_map', value={'AutoTokenizer': ['evil.T', None]})),
        'encoder: bpe_path': both(key(O, *tc, 'hf_tokenizer_name', value=''), key(O, *tc, 'tokenizer_kwargs', value={'bpe_path': '/etc/hostname'})), 'encoder: hf_model_name': key(O, *tc, 'hf_model_name', value='somebody/model'),
        'encoder: hf_tokenizer_name of the hub': key(O, *tc, 'hf_tokenizer_name', value='somebody/model'), 'encoder: timm of the hub': key(O, *vc, 'timm_model_name', value='hf-hub:somebody/model'),
        'encoder: timm of a folder': key(O, *vc, 'timm_model_name', value='local-dir:/tmp'), 'encoder: timm pretrained': both(key(O, *vc, 'timm_model_name', value='resnet18'), key(O, *vc, 'timm_model_pretrained', value=True)),
        'encoder: timm large': key(O, *vc, 'timm_model_name', value='vit_giant_patch14_clip_224'), 'encoder: unknown key': key(O, 'model_cfg', 'pretrained', value='x'), 'encoder: pretrained_image_path': key(O, 'model_cfg', 'pretrained_image_path', value='/etc/hostname'),
        'encoder: no model_cfg': key(O, 'model_cfg', drop=True), 'encoder: no text_cfg': key(O, *tc, drop=True), 'encoder: custom_text': key(O, 'model_cfg', 'custom_text', value=True), 'encoder: decoder': key(O, 'model_cfg', 'multimodal_cfg', value=dict(width=8)),
        'encoder: std 0': key(O, 'preprocess_cfg', 'std', value=[0, 0, 0]), 'encoder: mean of one': key(O, 'preprocess_cfg', 'mean', value=[1]), 'encoder: trained_on fifo': fifo('trained_on.json'), 'encoder: trained_on wrong': text('trained_on.json', '{"ids": [[1]]}'),
        'encoder: trained_on deep': text('trained_on.json', deep()), 'encoder: recipe deep': text('recipe.json', deep())}
    cases |= every(O, *tc, keys=('context_length','width','heads','layers','vocab_size','eos_id','pool_type')) | every(O, *vc, keys=('image_size','layers','width','head_width')) | every(O, 'model_cfg', keys=('embed_dim','text_cfg','vision_cfg')) | every(O, 'preprocess_cfg', keys=('mean','size','interpolation'))
    return cases | any_json(O) | any_weights('open_clip_model.safetensors') | tokenizer_cases()

def lm_keys(c, *at):
    "What the configuration of a language model may ask for"
    cases = {'auto_map': both(module(), key(c, *at, 'auto_map', value={'AutoConfig': 'evil.C', 'AutoModelForCausalLM': 'evil.M'})), 'auto_map of the hub': key(c, *at, 'auto_map', value={'AutoConfig': 'somebody/model--evil.C', 'AutoModelForCausalLM': 'somebody/model--evil.M'}),
        'quantization': key(c, *at, 'quantization_config', value={'quant_method': 'bitsandbytes'}), 'a method': key(c, *at, 'to_dict', value=1), 'a class': key(c, *at, '__class__', value='x'), 'its path': key(c, *at, '_name_or_path', value='somebody/model'),
        'extra files': key(c, *at, 'extra_files', value=['../x']), 'nested': key(c, *at, 'text_config', value=dict(model_type='gpt2', auto_map={'AutoConfig': 'evil.C'})), 'no model_type': key(c, *at, 'model_type', drop=True)}
    for k in ('attn_implementation', '_attn_implementation', '_attn_implementation_internal', 'experts_implementation'):
        for v in ('kernels-community/flash-attn', 'somebody/kernel:evil', 'paged|somebody/kernel', {'': 'somebody/kernel'}, 7): cases[f'{k}={v}'] = key(c, *at, k, value=v)
    for v in ('load', 'hub.load', 'int8', 7, {}): cases[f'dtype={v}'],cases[f'torch_dtype={v}'] = key(c, *at, 'dtype', value=v),key(c, *at, 'torch_dtype', value=v)
    for v in ('clip', 't5', 'os', '../gpt2', 'encoder-decoder', 7, 'mamba', 'llama'): cases[f'model_type={v}'] = key(c, *at, 'model_type', value=v)
    cases = {f"{'.'.join((c, *at))}: {k}": f for k,f in cases.items()}
    return cases | every(c, *at, keys=('n_embd','n_layer','n_head','n_positions','vocab_size','n_inner','eos_token_id','architectures','id2label'))

def lm_cases():
    cases = {'lm: adapter': text('adapter_config.json', '{"base_model_name_or_path": "somebody/model", "peft_type": "LORA"}'), 'lm: generation with code': text('generation_config.json', '{"custom_generate": "somebody/model"}'),
        'lm: index with paths': lambda d: ((d/W).unlink(), text(W+'.index.json', '{"weight_map": {"a": "../outside.safetensors"}}')(d)), 'lm: index with a pickle': lambda d: ((d/W).unlink(), pickled('x.bin')(d), text(W+'.index.json', '{"weight_map": {"a": "x.bin"}}')(d)),
        'lm: index wrong': lambda d: ((d/W).unlink(), text(W+'.index.json', '{"weight_map": [1]}')(d)), 'lm: modeling file': both(module('modeling_gpt2.py'), module('configuration_gpt2.py')), 'lm: custom_generate': lambda d: ((d/'custom_generate').mkdir(), module('custom_generate/generate.py')(d))}
    return cases | lm_keys(C) | any_json(C) | any_weights(W) | tokenizer_cases()

def captioner_cases():
    m,e,evil = 'mapper_config','encoder_id',lambda d: f"open({canary(d)!r}, 'w').write('x')"
    def mapper(kind, **more): return lambda d: edit(d/C, m, value=dict(kind=kind, d=more.get('d', 128), k=more.get('k', 4), e=more.get('e', 96)))
    cases = {'captioner: mapper is subprocess.call': lambda d: mapper('subprocess:call', d=['touch', canary(d)], k=-1, e=None)(d), 'captioner: mapper is exec': lambda d: mapper('builtins:exec', d=evil(d), k={}, e={})(d), 'captioner: mapper is os.system': mapper('os:system'),
        'captioner: mapper of a library': mapper('torch.nn:Linear'), 'captioner: mapper not imported': both(module(), mapper('evil:M')), 'captioner: mapper is a tool of ours': mapper('clipcap_ssl.pipeline.cli:clipcap_demo'), 'captioner: no mapper': key(C, m, value=None),
        'captioner: lm_source of the hub': both(key(C, 'lm_source', value=dict(name='somebody/model', sha256='0'*64))), 'captioner: lm_source is a path': key(C, 'lm_source', value=dict(name='/etc', sha256='0'*64)), 'captioner: lm_source leaves': key(C, 'lm_source', value=dict(name='../../x', sha256='0'*64)),
        'captioner: lm_source is code': key(C, 'lm_source', value=dict(name='code:interact', sha256='0'*64)), 'captioner: lm_source is sys.exit': key(C, 'lm_source', value=dict(name='sys:exit', sha256='0'*64)), 'captioner: lora': key(C, 'lora', value=dict(r=10**9)), 'captioner: lora of names': key(C, 'lora', value=dict(r=4, targets='(a+)+$')),
        'captioner: local.json of the hub': both(key(C, 'lm_source', value=dict(name='x', sha256='0'*64)), text('local.json', '{"lm": "somebody/model"}')), 'captioner: local.json is code': both(key(C, 'lm_source', value=dict(name='x', sha256='0'*64)), text('local.json', '{"lm": "sys:exit"}')),
        'captioner: local.json fifo': fifo('local.json'), 'captioner: local.json deep': text('local.json', deep()), 'captioner: calibration fifo': fifo('calibration.json'), 'captioner: calibration wrong': text('calibration.json', '{"similarity_p05": "x"}'), 'captioner: calibration deep': text('calibration.json', deep()),
        'captioner: config.toml in its parent': lambda d: (d.parent/'config.toml').write_text('encoder = "os:system"\n'), 'captioner: config.toml of another in its parent': lambda d: (d.parent/'config.toml').write_text('[tool]\nx = 1\n'), 'captioner: trust_remote_code': key(C, 'trust_remote_code', value=True)}
    for name in ('os:system', 'shutil:rmtree', 'huggingface_hub:snapshot_download', 'clipcap_ssl.pipeline.cli:clipcap_demo', 'evil:T', 'open_clip:ViT-B-32/laion2b_s34b_b79k', 'open_clip:/etc', 'open_clip:../..', 'hf-hub:somebody/model', 'open_clip:', '', 'x'*900):
        cases[f'captioner: encoder {name[:40]}'] = both(module(), key(C, e, 'name', value=name))
    cases['captioner: encoder of its folder with code'] = lambda d: (shutil.copytree(asset_path('toy'), d/'clip'), encoder_cases_evil(d/'clip'), edit(d/C, e, value=dict(name='open_clip:clip', sha256='')))
    cases['captioner: another encoder in its folder'] = lambda d: (shutil.copytree(asset_path('toy-judge'), d/'clip'), edit(d/C, e, 'name', value='open_clip:clip'))
    cases |= {f'captioner: decoding {v}': key(C, 'decoding', value=v) for v in (dict(decode='evil'), dict(max_new_tokens=10**9), dict(max_new_tokens='x'), dict(decode='best_of_n', n=10**9), dict(decode='beam', num_beams=10**9), dict(encoder='x'), dict(processors=[1]), [1], dict(temperature=-1), dict(decode='sample', temperature=0.), dict(max_new_tokens=-5), dict(batch_size=0, decode='beam'))}
    cases |= {f'captioner: facts {v}': key(C, 'facts', value=v) for v in (dict(scores=dict(cider='x')), dict(note='<script>alert(1)</script>'), dict(data=7), [1])}
    cases |= every(C, m, keys=('d','k','e','hidden','kind')) | every(C, keys=('lm_config','mapper_config','encoder_id','stamp','lora','lm_source','decoding','facts')) | every(C, e, keys=('name','sha256'))
    return cases | lm_keys(C, 'lm_config') | any_json(C) | any_weights(W) | tokenizer_cases()

def encoder_cases_evil(d):
    module()(d)
    edit(d/O, *tc, 'tokenizer_kwargs', value={'trust_remote_code': True})
    edit(d/T, 'auto_map', value={'AutoTokenizer': ['evil.T', None]})

def read_encoder(d, photo):
    encoder = load_encoder(f'open_clip:{d}')
    x = torch.cat([encoder.encode_image([Image.open(photo)]), encoder.encode_text(['a red circle'])])
    if not x.isfinite().all(): return 'silent: vectors are not finite'

def read_lm(d, photo):
    lm,tok = load_lm(d)
    logits = lm(torch.tensor([tok('a red circle')['input_ids'] or [0]])).logits
    if not logits.isfinite().all(): return 'silent: logits are not finite'

def read_captioner(d, photo):
    from clipcap_ssl.pipeline.cli import clipcap_caption
    clipcap_caption(str(d), [str(photo)], jsonl=True)

def bases(tmp):
    "A good folder of each kind, and how it is read"
    model = new_captioner(load_encoder('toy'), 'toy', n_prefix=4)
    model.decoding = dict(decode='greedy', max_new_tokens=5)
    model.save_pretrained(tmp/'captioner')
    return dict(encoder=(asset_path('toy'), read_encoder, encoder_cases()), lm=(asset_path('toy-lm'), read_lm, lm_cases()), captioner=(tmp/'captioner', read_captioner, captioner_cases()))

def attempt(read, d, photo, seconds):
    "What came of reading a folder: 'read', 'refused: a line', or what is wrong"
    def ring(*_): raise Hung
    signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try: return read(d, photo) or 'read'
    except SystemExit as e: return f'refused: {e.code}' if isinstance(e.code, str) else f'traceback: exit {e.code}'
    except Hung: return 'hang'
    except (ValueError, OSError) as e: return f'refused: {e}'
    except BaseException as e: return f'traceback: {type(e).__name__} {e}'
    finally: signal.alarm(0)

def judge(name, build, base, read, photo, seconds=20):
    "One hostile folder: what came of it, and what it did on the way"
    with tempfile.TemporaryDirectory() as tmp:
        d = Path(tmp)/'folder'
        shutil.copytree(base, d)
        build(d)
        for k in ('code','network','asked'): seen[k].clear()
        start,path = time.time(),list(sys.path)
        seen['watch'] = True
        said = attempt(read, d, photo, seconds)
        seen['watch'] = False
        sys.path[:] = path
        code = seen['code']+(['canary'] if (Path(tmp)/'canary').exists() else [])
        lines = len([o for o in said.splitlines() if o.strip()])
        return dict(case=name, said=' '.join(said.replace(str(tmp), '').split())[:160], code=len(code), network=len(seen['network']), asked=len(seen['asked']),
            traceback=said.startswith('traceback'), hang=said=='hang', silent=said.startswith('silent'), lines=lines, seconds=round(time.time()-start, 2))

def run(only='', every_nth=1, kinds=('encoder','lm','captioner')):
    "Read all hostile folders, or a part of them"
    rows = []
    with tempfile.TemporaryDirectory() as tmp:
        photo = Path(tmp)/'photo.png'
        Image.new('RGB', (64, 64), 'red').save(photo)
        for kind,(base,read,cases) in bases(Path(tmp)).items():
            if kind not in kinds: continue
            chosen = [(n,f) for n,f in cases.items() if only in n]
            rows += [dict(kind=kind)|judge(n, f, base, read, photo) for n,f in chosen[::every_nth]]
    return rows

def bad(r): return bool(r['code'] or r['network'] or r['asked'] or r['traceback'] or r['hang'] or r['silent'] or r['lines']>1)

def summary(rows):
    "Counts"
    counts = {k:sum(bool(r[k]) for r in rows) for k in ('code','network','asked','traceback','hang','silent')}
    return dict(cases=len(rows), read=sum(r['said']=='read' for r in rows), refused=sum(r['said'].startswith('refused') for r in rows), more_than_a_line=sum(r['lines']>1 for r in rows),
        **counts, slowest_seconds=max(r['seconds'] for r in rows), peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss//1024)

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--only', default='', help='cases with this in their name')
    p.add_argument('--out', default='nbs/results/data/hostile.json', help='where the results go')
    args = p.parse_args()
    commit = subprocess.run(['git', 'rev-parse', 'HEAD'], capture_output=True, text=True).stdout.strip()
    watch()
    rows = run(args.only)
    for r in rows:
        if bad(r): print(r, file=sys.stderr)
    found = summary(rows)
    print(json.dumps(found, indent=1))
    short = [dict(kind=r['kind'], case=r['case'], said=r['said'][:120]) for r in rows]
    if not args.only: Path(args.out).write_text(json.dumps(dict(commit=commit, summary=found, cases=short), indent=0)+'\n')
    return any(map(bad, rows))

if __name__=='__main__': sys.exit(main())
