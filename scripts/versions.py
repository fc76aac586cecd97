"""Does clipcap_ssl work with the versions that are installed? python scripts/versions.py [--bounds] [STEP...]

A small world goes through everything that asks the libraries below for something: all modules, ten architectures of language models, LoRA, GGUF,
half precision, a run of every route, captions by command, scores, figures. It takes about a minute on one core and needs no network.
One line per step, and the exit status is 1 if one fails. A step whose optional package is missing is left out, and the line says so.
With names of steps only these are run (commands needs run).

With --bounds nothing is run: constraints-lowest.txt is compared with settings.ini, whose lower bounds it must hold,
and the versions that README.md names with constraints.txt."""
import configparser, contextlib, importlib, io, json, math, os, pkgutil, re, subprocess, sys, tempfile, time, traceback
from importlib import metadata
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE='1', TQDM_DISABLE='1', MPLBACKEND='agg', TOKENIZERS_PARALLELISM='false')
top = Path(__file__).resolve().parent.parent
steps = []

def step(f):
    "Register a step: a function of a temporary folder, whose docstring says what works if it returns"
    steps.append(f)
    return f

def settings():
    "settings.ini"
    cfg = configparser.ConfigParser(delimiters=['='])
    cfg.read(top/'settings.ini', encoding='utf-8')
    return cfg['DEFAULT']

def canonical(name):
    "A distribution's name as registries compare it"
    return re.sub(r'[-_.]+', '-', name).lower()

def required():
    "{distribution: its lower bound, or None} of the package and of its optional extras"
    extras = ('requirements', 'lora_requirements', 'gguf_requirements')
    found = [re.match(r'([\w.-]+)(?:\[[^]]*\])?(?:.*?>=([\w.]+))?', o) for k in extras for o in settings()[k].split()]
    return {canonical(m[1]): m[2] for m in found}

def release(version):
    "A version's numbers, without zeros at the end: 2.4 and 2.4.0 are the same"
    return re.sub(r'(\.0)+$', '', version)

def pinned(name):
    "{distribution: version} of a file of constraints"
    lines = [o.split('#')[0].strip() for o in (top/name).read_text(encoding='utf-8').splitlines()]
    return {canonical(o.split('==')[0]): o.split('==')[1] for o in lines if o}

def bounds():
    "What is wrong with constraints-lowest.txt, and with the versions that README.md names"
    lowest, newest = pinned('constraints-lowest.txt'), pinned('constraints.txt')
    bad = [f'constraints-lowest.txt lacks {k}' for k in required() if k not in lowest]
    bad += [f'settings.ini asks for {k}>={v}, and constraints-lowest.txt has {lowest[k]}'
            for k, v in required().items() if v and k in lowest and release(lowest[k]) != release(v)]
    named = re.findall(r'(\w+)==([\d.]+)', (top/'README.md').read_text(encoding='utf-8'))
    return bad + [f'README.md names {k}=={v}, and constraints.txt has {newest.get(k)}' for k, v in named if newest.get(k) != v]

# ---- the steps

def words():
    "A tokenizer of twelve words"
    from clipcap_ssl.models.lm import word_tokenizer
    return word_tokenizer('a small large red green blue circle square star above below and'.split())

def same(a, b, eps=1e-4):
    "Fail where two tensors differ"
    worst = (a.float()-b.float()).abs().max().item()
    assert worst < eps, f'differ by {worst}'

@step
def modules(tmp):
    "every module can be imported"
    import clipcap_ssl
    for m in pkgutil.walk_packages(clipcap_ssl.__path__, 'clipcap_ssl.'): importlib.import_module(m.name)

@step
def shipped(tmp):
    "the shipped encoders and the shipped language model load, and a captioner of them writes"
    from PIL import Image
    from clipcap_ssl import load_encoder
    from clipcap_ssl.models.captioner import new_captioner
    from clipcap_ssl.models.loading import load_lm
    lm, tok = load_lm('toy')
    ids = tok('a small red circle', add_special_tokens=False)['input_ids']
    assert len(tok) == lm.get_input_embeddings().num_embeddings and tok.unk_token_id not in ids
    assert tok.decode(ids) == 'a small red circle' and None not in (tok.pad_token_id, tok.eos_token_id)
    for name in ('toy', 'toy-judge'):
        enc = load_encoder(name)
        x, y = enc.encode_image([Image.new('RGB', (64, 64), 'red')]), enc.encode_text(['a red circle'])
        assert x.shape == y.shape == (1, enc.dim)
    for mapper in ('mlp', 'transformer', 'grid'):
        assert isinstance(new_captioner(load_encoder('toy'), mapper=mapper).caption(Image.new('RGB', (64, 64))), str)

@step
def architectures(tmp):
    "language models of ten architectures learn, write, and come back from their folder"
    import torch
    from clipcap_ssl.models.captioner import Captioner, caption_loss
    from clipcap_ssl.models.generate import beam, greedy, sample
    from clipcap_ssl.models.lm import new_lm, tokenize_captions
    from clipcap_ssl.models.mapper import MLPMapper
    tok, x = words(), torch.nn.functional.normalize(torch.randn(2, 8), dim=-1)
    tokens, mask = tokenize_captions(tok, ['a small red star', 'a star'])
    for kind in 'gpt2 llama mistral qwen2 qwen3 gemma phi opt gpt_neox smollm3'.split():
        if kind not in known(): continue
        try:
            model = Captioner(MLPMapper(8, k=3, e=32), new_lm(tok, e=32, n_heads=4, kind=kind), tok)
            caption_loss(model, x, tokens, mask=mask).backward()
            assert model.null_prefix.grad is None and all(p.grad is not None for p in model.mapper.parameters())
            for write in (greedy, sample, beam):
                assert len(write(model, x, max_new_tokens=5).text) == 2
            model.eval().save_pretrained(tmp/kind)
            with torch.no_grad(): same(Captioner.from_pretrained(tmp/kind).logprobs(x, tokens, mask), model.logprobs(x, tokens, mask))
        except Exception as e:
            e.add_note(f'with the architecture {kind}')
            raise

def known():
    "Architectures of this version of transformers"
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    return CONFIG_MAPPING_NAMES

@step
def half_precision(tmp):
    "captioners in bfloat16 and float16 write, and give finite log-probabilities"
    import torch
    from PIL import Image
    from clipcap_ssl import load_encoder
    from clipcap_ssl.models.captioner import new_captioner
    from clipcap_ssl.models.lm import tokenize_captions
    for dtype in (torch.bfloat16, torch.float16):
        model = new_captioner(load_encoder('toy')).to(dtype)
        assert isinstance(model.caption(Image.new('RGB', (64, 64))), str)
        tokens, mask = tokenize_captions(model.tokenizer, ['a red circle'])
        assert model.logprobs(torch.randn(1, model.encoder.dim), tokens, mask).isfinite().all()

@step
def lora(tmp):
    "low-rank updates learn and come back from their folder (peft)"
    import torch
    from clipcap_ssl import Captioner, load_encoder
    from clipcap_ssl.models.captioner import caption_loss, new_captioner
    from clipcap_ssl.models.lm import new_lm, tokenize_captions
    from clipcap_ssl.models.loading import load_lm
    import peft # after the package, which mends torchvision first
    for lm in (load_lm('toy'), (new_lm(words(), kind='llama'), words())):
        model = new_captioner(load_encoder('toy'), lm=lm, lora=2)
        x = torch.nn.functional.normalize(torch.randn(2, model.encoder.dim), dim=-1)
        tokens, mask = tokenize_captions(model.tokenizer, ['a small red star', 'a star'])
        caption_loss(model, x, tokens, mask=mask).backward()
        assert any(p.grad is not None for n, p in model.named_parameters() if '.lora_' in n)
        model.eval().save_pretrained(tmp/'lora')
        with torch.no_grad(): same(Captioner.from_pretrained(tmp/'lora').logprobs(x, tokens, mask), model.logprobs(x, tokens, mask))

@step
def quantised(tmp):
    "a llama.cpp file is read (gguf)"
    import gguf, torch
    from clipcap_ssl.models.lm import bpe_tokenizer, new_lm
    from clipcap_ssl.models.loading import load_lm
    tok = bpe_tokenizer(['a small red star', 'a large red square', 'a star above'], vocab_size=300)
    lm, path = new_lm(tok, kind='llama'), tmp/'small.gguf'
    write_gguf(gguf, lm, tok, path)
    back, back_tok = load_lm(path)
    ids = tok('a small red star')['input_ids']
    assert back_tok('a small red star', add_special_tokens=False)['input_ids'] == ids
    with torch.no_grad(): same(back(torch.tensor([ids])).logits, lm(torch.tensor([ids])).logits)

def write_gguf(gguf, lm, tok, path):
    "A Llama of transformers as llama.cpp has it: nbs/appendix/loading.ipynb has this in small steps"
    c, w = lm.config, gguf.GGUFWriter(path, 'llama')
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_block_count(c.num_hidden_layers)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_rope_dimension_count(c.head_dim)
    w.add_vocab_size(c.vocab_size)
    data = json.loads(tok.backend_tokenizer.to_str())['model']
    pieces = sorted(tok.get_vocab(), key=tok.get_vocab().get)
    w.add_tokenizer_model('gpt2')
    w.add_token_list(pieces)
    w.add_token_types([3]+[1]*(len(pieces)-1))
    w.add_token_merges([m if isinstance(m, str) else ' '.join(m) for m in data['merges']])
    w.add_bos_token_id(tok.bos_token_id)
    w.add_eos_token_id(tok.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers)
    for k, t in lm.state_dict().items():
        if 'q_proj' in k or 'k_proj' in k:
            heads = c.num_attention_heads if 'q_proj' in k else c.num_key_value_heads
            t = t.view(heads, 2, -1, t.shape[1]).transpose(1, 2).reshape(t.shape)
        w.add_tensor(names.get_name(k, try_suffixes=('.weight',)), t.contiguous().numpy())
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()

rows = ['stage1', 'guided', 'stage2_expert', 'stage2_policy', 'stage2_gumbel', 'best_of_n', 'human']
sizes = dict(n_train=60, n_test=20, n_pairs=30, n_dev_pairs=6, steps=20, expert_rounds=1, expert_steps=20, expert_samples=2, expert_null=20,
             policy_steps=20, policy_batch=8, policy_samples=2, gumbel_steps=20, gumbel_samples=1, bank=16, rows=rows)

@step
def run(tmp):
    "a run trains stage 1 and each route of stage 2 for 20 steps, and goes on from its folder"
    from clipcap_ssl import load_config, run
    cfg = load_config('scenes', **sizes)
    scores = run(cfg, tmp/'run', say=lambda text: None)
    assert set(scores) == set(rows) and all(math.isfinite(s['cider']) for s in scores.values())
    again = run(cfg, tmp/'run', say=lambda text: None)
    assert all(again[k]['cider'] == scores[k]['cider'] for k in rows)
    for name in ('scores.json', 'gallery.png', 'captioner/model.safetensors'): assert (tmp/'run'/name).exists(), name

def command(tmp, name, *args):
    "Output of a command of the package"
    file = tmp/f'{name}.py'
    file.write_text(f'from clipcap_ssl.pipeline.cli import {name}\n{name}()\n', encoding='utf-8')
    r = subprocess.run([sys.executable, file, *map(str, args)], capture_output=True, text=True)
    if r.returncode: raise RuntimeError(f'{name} ended with {r.returncode}: {r.stderr[-1500:]}')
    return r.stdout

@step
def commands(tmp):
    "clipcap_caption and Captioner.caption write the same caption; clipcap_eval judges the run once more"
    from PIL import Image
    from clipcap_ssl import Captioner
    Image.new('RGB', (64, 64), 'green').save(tmp/'photo.png')
    out = command(tmp, 'clipcap_caption', tmp/'run', tmp/'photo.png', '--jsonl')
    assert json.loads(out)['caption'] == Captioner.from_pretrained(tmp/'run'/'captioner').caption(tmp/'photo.png')
    assert 'cider' in command(tmp, 'clipcap_eval', tmp/'run')

@step
def scores(tmp):
    "the scores of a corpus, METEOR by Java included"
    from clipcap_ssl import score_captions
    refs = {'1': ['a red circle', 'one red circle'], '2': ['a blue star', 'one blue star']}
    found = score_captions({'1': 'a red circle', '2': 'a blue star'}, refs)
    assert found['bleu1'] > .99 and found['meteor'] > .9 and found['cider'] > 1, found

@step
def pretraining(tmp):
    "the small world's own encoders and language model can be trained anew"
    import tomllib
    from clipcap_ssl.core import asset_path
    from clipcap_ssl.train.pretrain import build_world
    world = tomllib.loads((asset_path('..')/'recipes'/'toy_world.toml').read_text(encoding='utf-8'))
    for o in world['encoder'].values(): o |= dict(pairs=64, steps=4, batch=16, warmup=1)
    world['lm'] |= dict(sentences=2000, steps=4, batch=16)
    assert set(build_world(world, tmp/'world')) == {'toy', 'toy-judge', 'toy-lm'}

# ----

def main(names):
    "Run all steps, and say how many failed"
    there = {k: metadata.version(k) for k in required() if has(k)}
    print('Python', sys.version.split()[0], *(f'{k} {v}' for k, v in there.items()), sep='\n  ')
    todo = [f for f in steps if not names or f.__name__ in names]
    failed = 0
    with tempfile.TemporaryDirectory() as tmp:
        os.environ['CLIPCAP_HOME'] = str(Path(tmp)/'home')
        for f in todo:
            start, word, why, noise = time.time(), 'ok', '', io.StringIO()
            try:
                with contextlib.redirect_stderr(noise): f(Path(tmp))
            except ModuleNotFoundError as e:
                if e.name in ('peft', 'gguf'): word, why = 'left out', f' ({e.name} is not installed)'
                else: word, why = 'FAILED', '\n'+traceback.format_exc()
            except Exception: word, why = 'FAILED', '\n'+traceback.format_exc()
            failed += word == 'FAILED'
            print(f'{word:9}{time.time()-start:4.0f} s  {f.__name__}: {f.__doc__}{why}', flush=True)
    print(f'{len(todo)-failed} passed, {failed} failed')
    return int(failed > 0)

def has(name):
    "Is a distribution installed?"
    try: return bool(metadata.version(name))
    except metadata.PackageNotFoundError: return False

if __name__ == '__main__':
    if sys.argv[1:] == ['--bounds']:
        problems = bounds()
        for o in problems: print(o, file=sys.stderr)
        sys.exit(bool(problems))
    unknown = set(sys.argv[1:])-{f.__name__ for f in steps}
    if unknown: sys.exit(f'{__doc__}\n\nSTEP is one of: '+' '.join(f.__name__ for f in steps))
    sys.exit(main(sys.argv[1:]))
