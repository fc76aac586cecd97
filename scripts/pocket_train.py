"""Train `pocket`: an image-text encoder and a captioner, about 20 MB together, in minutes on a GPU.
`--help` says how, from what and into what. Only torch, timm, tokenizers, safetensors and Pillow
are needed; `pocket_save.py` makes folders of the result that clipcap_ssl loads."""
import time
born = time.perf_counter()
import argparse, copy, json, math, random, traceback
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np, timm, torch, torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn

about = """PHOTOS is a folder with captions.jsonl, one row per photo: file (relative to the folder),
id, split (train or dev; other splits are not opened) and captions. TEXT holds more sentences, one
per line, and none of them may describe a photo of dev or test. BACKBONE is the ImageNet classifier
timm/tf_efficientnet_lite0 as safetensors.

Four phases, each with its share of SECONDS, after each of which OUT is written:
  1. lm       the language model alone, on all sentences
  2. joint    encoder and captioner together, on augmented photos: contrastive loss and captions
  3. captions a fresh captioner on the encoder's features, kept where dev says that it is better
  4. reward   policy gradient: CIDEr-D of sampled captions, and the encoder's similarity
The dev split decides which weights of a phase are kept. Shares of time are used, so two runs on
machines of different speed differ.

OUT gets encoder.safetensors, captioner.safetensors, supervised.safetensors (before phase 4),
tokenizer.json and report.json.

Example: python scripts/pocket_train.py flickr8k --text other_captions.txt
             --backbone tf_efficientnet_lite0.safetensors --out pocket"""

size, grid_width, longest = 224, 320, 24
cfg = dict(vocab=4000, context=longest, embed_dim=256, text_width=128, text_heads=4, text_layers=2,
           width=240, heads=5, layers=4, positions=64, prefix=8, mapper_layers=2)
pad, unk, eos = 0, 1, 2

# ---- text

rules = (("[’`]", "'"), (r"\s*'\s*s(?![a-z])", " 's"), (r"'(?!s(?![a-z]))", ""),
         (r"[^a-z0-9' -]", " "), (r"(?<![a-z0-9])-+|-+(?![a-z0-9])", " "))

def train_tokenizer(texts, vocab):
    "A byte-pair tokenizer that normalises captions; <pad> is 0, <unk> 1, <eos> 2"
    tok = Tokenizer(models.BPE(unk_token='<unk>', end_of_word_suffix='</w>'))
    cleaned = [normalizers.Replace(Regex(a), b) for a,b in rules]
    tok.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(),
        normalizers.Lowercase(), normalizers.Replace('&', ' and '), *cleaned])
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok.decoder = decoders.BPEDecoder('</w>')
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=['<pad>','<unk>','<eos>'],
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyz0123456789'-"),
        end_of_word_suffix='</w>', show_progress=False)
    tok.train_from_iterator(texts, trainer)
    return tok

def token_rows(tok, texts, length):
    "'n t' token ids, ended (unless cut) and padded with 0"
    rows = np.zeros((len(texts), length), dtype=np.int64)
    for row,found in zip(rows, tok.encode_batch(texts)):
        ids = [*found.ids, eos][:length]
        row[:len(ids)] = ids
    return torch.from_numpy(rows)

def cut(tokens):
    "Drop columns that are padding in every row"
    return tokens[..., :int((tokens!=pad).sum(-1).max())]

# ---- photos

def read_rows(folder, limit):
    "Rows of captions.jsonl by split"
    rows = [json.loads(line) for line in open(Path(folder)/'captions.jsonl', encoding='utf-8')]
    parts = {s:[r for r in rows if r['split']==s and r['captions']] for s in ('train','dev')}
    return {s:r[:limit] if limit else r for s,r in parts.items()}

def read_pixels(folder, rows, workers):
    "'n 3 h w' bytes"
    def read(row):
        im = Image.open(Path(folder)/row['file']).convert('RGB')
        if im.size != (size,size): im = im.resize((size,size), Image.BICUBIC)
        return np.asarray(im).transpose(2, 0, 1)
    with ThreadPoolExecutor(workers) as pool: found = list(pool.map(read, rows))
    return torch.from_numpy(np.stack(found))

def plain(x):
    "Bytes as the backbone wants them"
    return (x.float()/127.5 - 1).contiguous(memory_format=torch.channels_last)

def augment(x, side, area=(.45,1.), jitter=.15):
    "Random crops, stretched, mirrored and of other brightness, `side` pixels wide"
    b,dev = len(x),x.device
    def draw(lo, hi): return torch.empty(b, device=dev).uniform_(lo, hi)
    # 1) crops, in units of half a photo
    a,ratio = draw(*area),draw(-.29, .29).exp()
    w,h = (a*ratio).sqrt().clamp(max=1),(a/ratio).sqrt().clamp(max=1)
    theta = torch.zeros(b, 2, 3, device=dev)
    theta[:,0,0] = w*(draw(0, 1)<.5).float().mul(2).sub(1)
    theta[:,1,1] = h
    theta[:,0,2],theta[:,1,2] = (1-w)*draw(-1, 1),(1-h)*draw(-1, 1)
    grid = F.affine_grid(theta, (b,3,side,side), align_corners=False)
    y = F.grid_sample(x.float()/127.5 - 1, grid, padding_mode='reflection', align_corners=False)
    # 2) brightness and contrast
    y = y*draw(1-jitter, 1+jitter)[:,None,None,None] + draw(-jitter, jitter)[:,None,None,None]
    return y.contiguous(memory_format=torch.channels_last)

# ---- the language model and the mapping network, by the names of GPT-2 and clipcap_ssl

class Conv1D(nn.Module):
    "GPT-2's linear layer"
    def __init__(self, n_in, n_out, std=.02):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_in, n_out)*std)
        self.bias = nn.Parameter(torch.zeros(n_out))
    def forward(self, x): return F.linear(x, self.weight.T, self.bias)

class Attention(nn.Module):
    def __init__(self, e, heads, std):
        super().__init__()
        self.heads = heads
        self.c_attn,self.c_proj = Conv1D(e, 3*e),Conv1D(e, e, std)
    def forward(self, x):
        q,k,v = self.c_attn(x).unflatten(-1, (3,self.heads,-1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))

class MLP(nn.Module):
    def __init__(self, e, std):
        super().__init__()
        self.c_fc,self.c_proj = Conv1D(e, 4*e),Conv1D(4*e, e, std)
    def forward(self, x): return self.c_proj(F.gelu(self.c_fc(x), approximate='tanh'))

class Block(nn.Module):
    def __init__(self, e, heads, std):
        super().__init__()
        self.ln_1,self.ln_2 = nn.LayerNorm(e),nn.LayerNorm(e)
        self.attn,self.mlp = Attention(e, heads, std),MLP(e, std)
        self.drop = nn.Dropout(.1)
    def forward(self, x):
        x = x + self.drop(self.attn(self.ln_1(x)))
        return x + self.drop(self.mlp(self.ln_2(x)))

class LM(nn.Module):
    "GPT-2 behind a prefix"
    def __init__(self, vocab, e, layers, heads, positions):
        super().__init__()
        std = .02/(2*layers)**.5
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(vocab, e), wpe=nn.Embedding(positions, e), drop=nn.Dropout(.1),
            h=nn.ModuleList([Block(e, heads, std) for _ in range(layers)]), ln_f=nn.LayerNorm(e)))
        for o in (self.transformer.wte, self.transformer.wpe): nn.init.normal_(o.weight, std=.02)
    def forward(self, prefix, tokens):
        "Logits of the token behind the prefix, and behind each of `tokens`"
        t,k = self.transformer,prefix.shape[1]
        h = torch.cat([prefix, t.wte(tokens)], 1)
        h = t.drop(h + t.wpe.weight[:h.shape[1]])
        for block in t.h: h = block(h)
        return F.linear(t.ln_f(h[:,k-1:]), t.wte.weight)

class GridMapper(nn.Module):
    "Pooled vector and patches to a prefix"
    def __init__(self, d, k, e, layers, heads, drop=.1):
        super().__init__()
        self.project = nn.Linear(d, e)
        self.const = nn.Parameter(torch.randn(k, e))
        layer = nn.TransformerEncoderLayer(e, heads, 2*e, dropout=drop, batch_first=True,
                                           norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    def forward(self, x):
        h = self.project(x * x.shape[-1]**.5).float()
        const = self.const.expand(len(x), -1, -1)
        return self.layers(torch.cat([h, const], 1))[:,h.shape[1]:]

class Captioner(nn.Module):
    "Features to captions"
    def __init__(self):
        super().__init__()
        e,heads = cfg['width'],cfg['heads']
        self.mapper = GridMapper(grid_width, cfg['prefix'], e, cfg['mapper_layers'], heads)
        self.lm = LM(cfg['vocab'], e, cfg['layers'], heads, cfg['positions'])
        self.null_prefix = nn.Parameter(torch.randn(cfg['prefix'], e)*.02)
    def prefix(self, x): return self.mapper(x.float())
    def null(self, n): return self.null_prefix.expand(n, -1, -1)

def caption_loss(captioner, prefix, tokens, smooth=.1, word_drop=.1):
    "Cross-entropy of captions behind a prefix; some of the words that are read are hidden"
    seen = tokens[:,:-1]
    hidden = (torch.rand(seen.shape, device=seen.device)<word_drop) & (seen>eos)
    logits = captioner.lm(prefix, seen.masked_fill(hidden, unk)).float()
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), ignore_index=pad,
                           label_smoothing=smooth)

def no_repeat(tokens, logits, n=3):
    "Forbid tokens that would repeat an n-gram"
    if tokens.shape[1]<n: return logits
    grams = tokens.unfold(1, n, 1)
    seen = (grams[...,:-1]==tokens[:,None,tokens.shape[1]-n+1:]).all(-1)
    bound = torch.where(seen, -torch.inf, torch.inf).to(logits)
    return logits.scatter_reduce(1, grams[...,-1], bound, 'amin')

@torch.no_grad()
def write(captioner, prefix, temperature=0., length=longest, n=3):
    "'b t' captions, greedy or sampled at a temperature, ended (unless cut) and padded"
    tokens = torch.zeros(len(prefix), 0, dtype=torch.long, device=prefix.device)
    over = torch.zeros(len(prefix), dtype=torch.bool, device=prefix.device)
    for _ in range(length):
        logits = captioner.lm(prefix, tokens)[:,-1].float()
        if n: logits = no_repeat(tokens, logits, n)
        if temperature:
            logits = logits/temperature - torch.empty_like(logits).exponential_().log()
        new = logits.argmax(-1).masked_fill(over, pad)
        over = over | (new==eos)
        tokens = torch.cat([tokens, new[:,None]], 1)
    return tokens

# ---- the encoder, by the names of open_clip

class TextBlock(nn.Module):
    def __init__(self, e, heads):
        super().__init__()
        self.ln_1,self.ln_2 = nn.LayerNorm(e),nn.LayerNorm(e)
        self.attn = nn.MultiheadAttention(e, heads, dropout=.1, batch_first=True)
        self.mlp = nn.Sequential(OrderedDict(c_fc=nn.Linear(e, 4*e), gelu=nn.GELU(),
                                             c_proj=nn.Linear(4*e, e)))
        self.drop = nn.Dropout(.1)
    def forward(self, x, mask):
        y = self.ln_1(x)
        x = x + self.drop(self.attn(y, y, y, need_weights=False, attn_mask=mask)[0])
        return x + self.drop(self.mlp(self.ln_2(x)))

class Encoder(nn.Module):
    "EfficientNet-Lite0 and a small text tower"
    def __init__(self, backbone):
        super().__init__()
        w,d = cfg['text_width'],cfg['embed_dim']
        trunk = timm.create_model('tf_efficientnet_lite0', pretrained=False)
        trunk.reset_classifier(0)
        if backbone: trunk.load_state_dict(load_file(backbone))
        proj = nn.Linear(trunk.num_features, d, bias=False)
        head = nn.Sequential(OrderedDict(drop=nn.Dropout(.2), proj=proj))
        self.visual = nn.ModuleDict(dict(trunk=trunk, head=head))
        self.positional_embedding = nn.Parameter(torch.randn(cfg['context'], w)*.01)
        self.text_projection = nn.Parameter(torch.randn(w, d)*w**-.5)
        self.logit_scale = nn.Parameter(torch.tensor(3.))
        blocks = [TextBlock(w, cfg['text_heads']) for _ in range(cfg['text_layers'])]
        self.transformer = nn.ModuleDict(dict(resblocks=nn.ModuleList(blocks)))
        self.token_embedding = nn.Embedding(cfg['vocab'], w)
        nn.init.normal_(self.token_embedding.weight, std=.05)
        self.ln_final = nn.LayerNorm(w)
        for p in [*trunk.conv_stem.parameters(), *trunk.bn1.parameters(),
                  *trunk.blocks[:3].parameters()]: p.requires_grad_(False)

    def train(self, mode=True):
        "The statistics of the normalisation stay ImageNet's"
        super().train(mode)
        self.visual.trunk.eval()
        return self

    def see(self, x):
        "'b n d' rows of unit length: the pooled vector, then the patches"
        trunk = self.visual.trunk
        with torch.no_grad(): x = trunk.blocks[:3](trunk.bn1(trunk.conv_stem(x)))
        x = trunk.blocks[3:](x)
        whole = self.visual.head(trunk.bn2(trunk.conv_head(x)).mean((2, 3)))
        whole = F.normalize(whole.float(), dim=-1)
        patches = F.normalize(x.flatten(2).transpose(1, 2).float(), dim=-1)
        return torch.cat([F.pad(whole, (0, grid_width-whole.shape[1]))[:,None], patches], 1)

    def read(self, tokens):
        "'b d' vectors of unit length of ended texts"
        n = tokens.shape[1]
        mask = torch.ones(n, n, dtype=torch.bool, device=tokens.device).triu(1)
        x = self.token_embedding(tokens) + self.positional_embedding[:n]
        for block in self.transformer.resblocks: x = block(x, mask)
        at = (tokens==eos).int().argmax(1)
        x = self.ln_final(x)[torch.arange(len(x), device=x.device), at]
        return F.normalize((x @ self.text_projection).float(), dim=-1)

    @property
    def scale(self): return self.logit_scale.clamp(max=4.4).exp()

def contrastive_loss(x, y, scale):
    "Each photo picks its text, each text its photo; half precision is too coarse for that"
    own = torch.arange(len(x), device=x.device)
    with torch.autocast(x.device.type, enabled=False): sim = scale*(x.float()@y.float().T)
    return (F.cross_entropy(sim, own) + F.cross_entropy(sim.T, own))/2

def ended(tokens):
    "Texts whose last column ends them where nothing else does"
    tokens = tokens.clone()
    tokens[:,-1] = torch.where((tokens==eos).any(1), tokens[:,-1], eos)
    return tokens

# ---- CIDEr-D over tokens

class Cider:
    "CIDEr-D [Vedantam 2015] of captions against a photo's references, both as token ids"
    def __init__(self, references, end):
        "'n r t' references; `end`: the end of a caption counts as a word"
        self.n,self.end,self.base = len(references),end,cfg['vocab']
        self.tables = []
        for k in (1, 2, 3, 4):
            code,real = self.codes(references, k)
            owner = torch.arange(self.n, device=code.device)[:,None,None].expand_as(code)[real]
            found,at = code[real].unique(return_inverse=True)
            pairs = (owner*len(found)+at).unique()
            self.tables.append((found, torch.bincount(pairs%len(found), minlength=len(found))))

    def codes(self, tokens, k):
        "Every n-gram as a number, and which are real"
        real = (tokens!=pad) if self.end else (tokens>eos)|(tokens==unk)
        if tokens.shape[-1]<k: tokens,real = F.pad(tokens, (0, k)),F.pad(real, (0, k))
        gram,real = tokens.unfold(-1, k, 1),real.unfold(-1, k, 1).all(-1)
        code = gram[...,0]
        for i in range(1, k): code = code*self.base + gram[...,i]
        return code,real

    def idf(self, code, k):
        "How rare: the logarithm of photos per photo with this n-gram"
        found,df = self.tables[k-1]
        at = torch.searchsorted(found, code).clamp(max=len(found)-1)
        df = torch.where(found[at]==code, df[at], 1)
        return math.log(max(self.n, 2)) - df.clamp(min=1).float().log()

    def __call__(self, tokens, references, sigma=6.):
        "'b t' captions, 'b r t' references -> 'b' scores, 1 is 100"
        total = 0.
        _,two = self.codes(tokens, 2)
        _,twos = self.codes(references, 2)
        far = two.sum(-1)[:,None] - twos.sum(-1)
        for k in (1, 2, 3, 4):
            c,c_real = self.codes(tokens, k)
            r,r_real = self.codes(references, k)
            c_idf = self.idf(c, k).square()*c_real
            r_idf = self.idf(r, k).square()*r_real
            # how often each n-gram of the caption is in the caption, and in each reference
            own = ((c[:,:,None]==c[:,None]) & c_real[:,None]).sum(-1)
            theirs = ((c[:,None,:,None]==r[:,:,None]) & r_real[:,:,None]).sum(-1)
            ref_own = ((r[...,:,None]==r[...,None,:]) & r_real[...,None,:]).sum(-1)
            shared = torch.minimum(own[:,None], theirs)*theirs/own.clamp(min=1)[:,None]
            norm = (own*c_idf).sum(-1).sqrt()[:,None] * (ref_own*r_idf).sum(-1).sqrt()
            total = total + (shared*c_idf[:,None]).sum(-1)/norm.clamp(min=1e-9)
        return (total/4*torch.exp(-far.square()/(2*sigma**2))).mean(1)*10

# ---- training

class Average:
    "A model whose weights are a moving average of another's"
    def __init__(self, model, decay):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        pairs = zip(self.model.parameters(), model.parameters())
        pairs = [(a, b) for a,b in pairs if b.requires_grad]
        self.mine,self.theirs = [list(o) for o in zip(*pairs)]
        self.decay = decay
    @torch.no_grad()
    def update(self, step):
        now = 1 - min(self.decay, (step+1)/(step+10))
        torch._foreach_lerp_(self.mine, [o.detach() for o in self.theirs], now)

def groups(module, lr, wd=.05):
    "Weight decay on matrices alone"
    ps = [p for p in module.parameters() if p.requires_grad]
    return [dict(params=[p for p in ps if p.ndim>1], lr=lr, weight_decay=wd),
            dict(params=[p for p in ps if p.ndim<2], lr=lr, weight_decay=0.)]

def alone(parameter, lr): return [dict(params=[parameter], lr=lr, weight_decay=0.)]

def rate(p, warm=.05):
    "Share of the learning rate: up in a line, down along a cosine"
    return p/warm if p<warm else .5 + .5*math.cos(math.pi*(p-warm)/(1-warm))

def say(**facts):
    "One line of JSON, with the seconds since the start"
    facts = {k:round(v, 4) if isinstance(v, float) else v for k,v in facts.items()}
    print(json.dumps(dict(s=round(time.perf_counter()-born, 1), **facts)), flush=True)

def fit(name, loss_fn, params, seconds, max_steps, after, check, n_checks=8):
    "Train until the time or the steps are over; returns what there is to report"
    opt = torch.optim.AdamW(params, betas=(.9,.98), fused=True)
    base = [g['lr'] for g in opt.param_groups]
    everything = [p for g in opt.param_groups for p in g['params']]
    start,step,checks,losses = time.perf_counter(),0,[],[]
    while True:
        p = max((time.perf_counter()-start)/seconds, step/max_steps)
        if p >= (len(checks)+1)/n_checks or p >= 1:
            checks.append(dict(step=step, **check(step)))
            loss = torch.stack(losses).mean().item() if losses else None
            say(phase=name, loss=loss, **checks[-1])
            losses = []
        if p >= 1: break
        for g,lr in zip(opt.param_groups, base): g['lr'] = lr*rate(p)
        loss = loss_fn(p)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(everything, 1., foreach=True)
        opt.step()
        after(step)
        losses.append(loss.detach())
        step += 1
        if step%10==0: losses[-1].item()   # the clock must not run ahead of the device
    return dict(steps=step, seconds=round(time.perf_counter()-start, 1), checks=checks)

class Batches:
    "Rows in random order, a new order for every epoch"
    def __init__(self, n, size, device):
        self.n,self.size,self.device,self.left = n,min(size, n),device,[]
    def __call__(self):
        if not self.left:
            order = torch.randperm(self.n, device=self.device)
            self.left = list(order[:self.n//self.size*self.size].split(self.size))
        return self.left.pop()

class LongBatches(Batches):
    "The same, with rows of about one length together"
    def __init__(self, lengths, size):
        super().__init__(len(lengths), size, lengths.device)
        self.lengths = lengths
    def __call__(self):
        "Rows, and the longest of their lengths"
        if not self.left:
            noise = 3*torch.rand(self.n, device=self.device)
            rows = (self.lengths+noise).argsort().split(self.size)
            most = torch.stack([self.lengths[o].max() for o in rows]).tolist()
            self.left = list(zip(rows, most))
            random.shuffle(self.left)
        return self.left.pop()

def pick(tokens, k):
    "'b r t' captions of photos -> 'b k t', `k` of each at random"
    b,r = tokens.shape[:2]
    at = torch.rand(b, r, device=tokens.device).argsort(1)[:,:k]
    return tokens[torch.arange(b, device=tokens.device)[:,None], at]

class Best:
    "The weights with the best score on dev"
    def __init__(self): self.score,self.state = -1.,None
    def __call__(self, score, *modules):
        if score > self.score:
            self.score = score
            self.state = [{k:v.clone() for k,v in m.state_dict().items()} for m in modules]

class Pocket:
    "Data, models and phases"
    def __init__(self, args):
        self.args,self.dev = args,torch.device(args.device)
        self.out = Path(args.out)
        self.report = dict(cfg=cfg, args=vars(args), torch=torch.__version__)
        self.out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(args.seed)
        random.seed(args.seed)

    def amp(self):
        "Half precision on a GPU"
        on = self.dev.type=='cuda'
        return torch.autocast(self.dev.type, torch.bfloat16, enabled=on)

    def left(self):
        "Seconds until results must be there"
        return self.args.seconds - (time.perf_counter()-born)

    def batch(self, n):
        "Rows per step; fewer when only a few photos are read, to try the script"
        return min(n, self.args.limit) if self.args.limit else n

    # -- data
    def load(self):
        args = self.args
        rows = read_rows(args.photos, args.limit)
        for s in rows:
            if not rows[s]: raise SystemExit(f'{args.photos}/captions.jsonl has no {s} photos')
        self.rows = rows
        texts = {s:[c for r in rows[s] for c in (r['captions']*5)[:5]] for s in rows}
        more = Path(args.text).read_text(encoding='utf-8').splitlines() if args.text else []
        if args.limit: more = more[:20*args.limit]
        self.tok = train_tokenizer(more+texts['train'], cfg['vocab'])
        cfg['vocab'] = self.tok.get_vocab_size()
        self.tok.save(str(self.out/'tokenizer.json'), pretty=False)
        say(tokens=cfg['vocab'])
        to = dict(device=self.dev, non_blocking=True)
        self.texts = {s:token_rows(self.tok, t, longest).view(-1, 5, longest).to(**to)
                      for s,t in texts.items()}
        all_text = token_rows(self.tok, more+texts['train'], longest)
        words = (all_text!=pad).sum(1)
        self.sentences = all_text[(words>=5)&(all_text==eos).any(1)].to(self.dev)
        self.pixels = {s:read_pixels(args.photos, r, args.workers).to(self.dev)
                       for s,r in rows.items()}
        self.report['data'] = dict(train=len(rows['train']), dev=len(rows['dev']),
                                   sentences=len(self.sentences))
        self.dev_cider = Cider(self.texts['dev'], end=False)
        say(**self.report['data'])

    # -- scores on dev
    @torch.no_grad()
    def features(self, encoder, pixels, view=plain, batch=250):
        parts = pixels.split(batch)
        with self.amp(): return torch.cat([encoder.see(view(o)).bfloat16() for o in parts])

    @torch.no_grad()
    def captions_score(self, captioner, x):
        "CIDEr-D of greedy captions of dev photos, over tokens"
        captioner.eval()
        with self.amp(): tokens = write(captioner, captioner.prefix(x))
        score = self.dev_cider(tokens, self.texts['dev']).mean().item()
        return score,dict(cider=score, distinct=len(tokens.unique(dim=0)))

    @torch.no_grad()
    def retrieval(self, encoder, x):
        "Percent of dev photos whose first text, and of texts whose first photo, is right"
        texts,n = ended(self.texts['dev'].flatten(0, 1)),len(x)
        with self.amp(): y = torch.cat([encoder.read(o) for o in texts.split(500)])
        sim = x[:,0,:cfg['embed_dim']].float() @ y.T
        own = torch.arange(n, device=self.dev)
        i2t,t2i = sim.argmax(1)//5==own,sim.argmax(0)==own.repeat_interleave(5)
        return dict(i2t=100*i2t.float().mean().item(), t2i=100*t2i.float().mean().item())

    # -- phase 1
    def train_lm(self, seconds):
        self.captioner = Captioner().to(self.dev)
        model = self.captioner.train()
        average = Average(model, .995)
        sentences,dev_text = self.sentences,self.texts['dev'].flatten(0, 1)
        batches = LongBatches((sentences!=pad).sum(1), self.batch(512))
        def loss_fn(p):
            rows,length = batches()
            words = sentences[rows, :length]
            with self.amp(): return caption_loss(model, model.null(len(words)), words, 0., .05)
        @torch.no_grad()
        def check(step):
            m,nats = average.model,[]
            for rows in dev_text.split(1000):
                with self.amp(): nats.append(caption_loss(m, m.null(len(rows)), rows, 0., 0.))
            return dict(dev_perplexity=math.exp(torch.stack(nats).mean().item()))
        params = groups(model.lm, 1.5e-3) + alone(model.null_prefix, 1.5e-3)
        steps = 12*len(sentences)//batches.size+1
        self.report['lm'] = fit('lm', loss_fn, params, seconds, steps, average.update, check, 4)
        self.captioner = average.model
        self.lm_state = copy.deepcopy(average.model.state_dict())

    # -- phase 2
    def train_joint(self, seconds):
        captioner = copy.deepcopy(self.captioner).requires_grad_(True).train()
        encoder = Encoder(self.args.backbone).train()
        encoder = encoder.to(self.dev, memory_format=torch.channels_last)
        self.start_words(encoder, captioner)
        averages = [Average(m, .995) for m in (encoder, captioner)]
        batches = Batches(len(self.pixels['train']), self.batch(384), self.dev)
        more = Batches(len(self.sentences), self.batch(256), self.dev)
        best = Best()
        def loss_fn(p):
            rows,words = batches(),self.sentences[more()]
            texts = pick(self.texts['train'][rows], 2)
            with self.amp():
                x = encoder.see(augment(self.pixels['train'][rows], 160 if p<.5 else size))
                # 1) photos and texts
                drop = texts.flatten(0, 1)
                hide = torch.rand(drop.shape, device=self.dev)<.1
                drop = drop.masked_fill(hide&(drop>eos), unk)
                y = encoder.read(ended(drop)).unflatten(0, texts.shape[:2])
                whole = x[:,0,:cfg['embed_dim']]
                pairs = sum(contrastive_loss(whole, y[:,j], encoder.scale) for j in (0, 1))/2
                # 2) captions, and sentences without a photo
                prefix = captioner.prefix(x).repeat_interleave(2, 0)
                told = caption_loss(captioner, prefix, texts.flatten(0, 1))
                unseen = caption_loss(captioner, captioner.null(len(words)), words)
            return pairs + told + .1*unseen
        def after(step):
            for o in averages: o.update(step)
        def check(step):
            enc,cap = [o.model for o in averages]
            x = self.features(enc, self.pixels['dev'])
            score,found = self.captions_score(cap, x)
            best(score, enc, cap)
            return dict(found, scale=enc.scale.item(), **self.retrieval(enc, x))
        trunk = encoder.visual.trunk
        slow = {id(p) for p in trunk.parameters()}
        rest = nn.ParameterList([p for p in encoder.parameters() if id(p) not in slow])
        params = (groups(trunk, 1.5e-4) + groups(rest, 1e-3) + groups(captioner.mapper, 8e-4)
                  + groups(captioner.lm, 3e-4) + alone(captioner.null_prefix, 3e-4))
        epoch = max(1, len(self.pixels['train'])//batches.size)
        self.report['joint'] = fit('joint', loss_fn, params, seconds, 60*epoch, after, check, 8)
        enc,cap = [o.model for o in averages]
        enc.load_state_dict(best.state[0])
        cap.load_state_dict(best.state[1])
        self.encoder,self.captioner,self.score = halved(enc),cap,best.score
        self.save('encoder', self.encoder)
        self.save('supervised', self.captioner)

    def start_words(self, encoder, captioner):
        "The text tower's words start as the main directions of the language model's"
        words = captioner.lm.transformer.wte.weight.detach().float()
        u,s,_ = torch.svd_lowrank(words-words.mean(0), cfg['text_width'], niter=3)
        words = u*s
        encoder.token_embedding.weight.data.copy_(words/words.std()*.05)

    # -- features of the finished encoder
    def make_views(self, n):
        x = self.pixels['train']
        random_view = lambda o: augment(o, size, area=(.55,1.))
        mirrored = lambda o: plain(o.flip(3))
        kinds = [plain, mirrored, *[random_view]*(n-2)]
        self.views = torch.stack([self.features(self.encoder, x, view) for view in kinds])
        self.x_dev = self.features(self.encoder, self.pixels['dev'])
        self.pool = Batches(len(x), self.batch(256), self.dev)
        say(views=list(self.views.shape))

    def some_views(self, rows, keep=40):
        "One view of each photo, with some of its patches"
        which = torch.randint(len(self.views), (len(rows),), device=self.dev)
        x = self.views[which, rows].float()
        kept = torch.rand(len(rows), x.shape[1]-1, device=self.dev).argsort(1)[:,:keep]+1
        x_kept = x.gather(1, kept[...,None].expand(-1, -1, x.shape[2]))
        return torch.cat([x[:,:1], x_kept], 1)

    # -- phase 3
    def train_captions(self, seconds):
        start = Captioner().to(self.dev)
        known = {k:v for k,v in self.lm_state.items() if not k.startswith('mapper.')}
        start.load_state_dict(start.state_dict()|known)
        model = set_dropout(start.train(), .2)
        average,best = Average(model, .995),Best()
        more = Batches(len(self.sentences), self.batch(256), self.dev)
        def loss_fn(p):
            rows,words = self.pool(),self.sentences[more()]
            texts = pick(self.texts['train'][rows], 2).flatten(0, 1)
            with self.amp():
                prefix = model.prefix(self.some_views(rows)).repeat_interleave(2, 0)
                told = caption_loss(model, prefix, texts)
                return told + .1*caption_loss(model, model.null(len(words)), words)
        def check(step):
            score,found = self.captions_score(average.model, self.x_dev)
            best(score, average.model)
            return found
        params = groups(model.mapper, 8e-4) + groups(model.lm, 4e-4)
        params += alone(model.null_prefix, 4e-4)
        epoch = max(1, len(self.rows['train'])//self.pool.size)
        found = fit('captions', loss_fn, params, seconds, 50*epoch, average.update, check, 10)
        kept = best.score > self.score
        self.report['captions'] = found|dict(kept=kept)
        if kept:
            average.model.load_state_dict(best.state[0])
            self.captioner,self.score = average.model,best.score
            self.save('supervised', self.captioner)

    # -- phase 4
    def train_reward(self, seconds, n=8, weight=.1, temperature=.7):
        model = set_dropout(copy.deepcopy(self.captioner).requires_grad_(True), 0.).eval()
        model.null_prefix.requires_grad_(False)
        average,best = Average(model, .98),Best()
        cider = Cider(self.texts['train'], end=True)
        whole = self.views[0,:,0,:cfg['embed_dim']].float()
        pool = Batches(len(whole), self.batch(128), self.dev)
        said = {}
        @torch.no_grad()
        def sampled(x, rows):
            "Captions by chance, and how much better each is than the photo's others"
            with self.amp():
                prefix = model.prefix(x).repeat_interleave(n, 0)
                tokens = write(model, prefix, temperature, n=0)
                y = self.encoder.read(ended(tokens))
            score = cider(tokens, self.texts['train'][rows].repeat_interleave(n, 0))
            own = torch.arange(len(rows), device=self.dev).repeat_interleave(n)
            close = F.log_softmax(self.encoder.scale*y@whole[rows].T, -1)
            close = close.gather(1, own[:,None])[:,0]
            reward = (score + weight*close).view(-1, n)
            others = (reward.sum(1, keepdim=True)-reward)/(n-1)
            said.update(train_cider=score.mean(), close=close.mean(),
                        words=(tokens!=pad).sum()/len(tokens))
            return cut(tokens),(reward-others).flatten()
        def loss_fn(p):
            rows = pool()
            x = self.some_views(rows)
            tokens,gain = sampled(x, rows)
            # autocast keeps what it cast without gradients: a context of its own
            with self.amp():
                prefix = model.prefix(x).repeat_interleave(n, 0)
                logits = model.lm(prefix, tokens[:,:-1]).float()/temperature
                nats = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), ignore_index=pad,
                                       reduction='none').view_as(tokens)
            return (gain[:,None]*nats).sum()/(tokens!=pad).sum()
        def check(step):
            score,found = self.captions_score(average.model, self.x_dev)
            best(score, average.model)
            return dict(found, **{k:v.item() for k,v in said.items()})
        params = groups(model.mapper, 7e-5, 0.) + groups(model.lm, 7e-5, 0.)
        epoch = max(1, len(whole)//pool.size)
        found = fit('reward', loss_fn, params, seconds, 25*epoch, average.update, check, 12)
        self.report['reward'] = found|dict(kept=best.score>self.score)
        if best.score > self.score:
            average.model.load_state_dict(best.state[0])
            self.captioner,self.score = average.model,best.score
            self.save('captioner', self.captioner)

    # -- results
    def save(self, name, model):
        "Half-precision weights, and the report so far"
        state = {k:v.half() if v.is_floating_point() else v for k,v in model.state_dict().items()}
        save_file({k:v.cpu().contiguous() for k,v in state.items()}, self.out/f'{name}.safetensors')
        self.write_report()

    def write_report(self):
        self.report['seconds'] = round(time.perf_counter()-born, 1)
        (self.out/'report.json').write_text(json.dumps(self.report, indent=1))

    def show(self, n=48):
        "Greedy captions of dev photos by the saved weights in full precision, to check a copy by"
        enc,cap = halved(self.encoder).float(),halved(self.captioner).float().eval()
        with torch.no_grad():
            x = enc.see(plain(self.pixels['dev'][:n]))
            tokens = write(cap, cap.prefix(x))
            y = enc.read(ended(self.texts['dev'][:n,0]))
        texts = [self.tok.decode([t for t in row if t>eos]) for row in tokens.tolist()]
        ids = [r['id'] for r in self.rows['dev'][:n]]
        similarity = (x[:,0,:cfg['embed_dim']]*y).sum(1).tolist()
        self.report['shown'] = dict(ids=ids, captions=texts, similarity=similarity)
        self.report['dev_cider_over_tokens'] = self.score
        self.report['trained_on'] = {s:[r['id'] for r in rows] for s,rows in self.rows.items()}
        self.write_report()
        for i,t in list(zip(ids, texts))[:12]: print(i, t)

def halved(model):
    "Weights as they are saved"
    with torch.no_grad():
        for o in [*model.parameters(), *model.buffers()]:
            if o.is_floating_point(): o.copy_(o.half())
    return model

def set_dropout(model, drop):
    "Another dropout everywhere, attention included"
    for m in model.modules():
        if isinstance(m, nn.Dropout): m.p = drop
        if isinstance(m, nn.MultiheadAttention): m.dropout = min(drop, .1)
    return model

def attempt(phase, seconds):
    "A phase that fails leaves what the earlier ones made"
    try: phase(seconds)
    except Exception:
        traceback.print_exc()
        say(failed=phase.__name__)

def main():
    parser = argparse.ArgumentParser(description=__doc__, epilog=about,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('photos', help='folder with captions.jsonl')
    parser.add_argument('--text', help='more sentences, one per line')
    parser.add_argument('--backbone', help='weights of tf_efficientnet_lite0, safetensors')
    parser.add_argument('--out', default='pocket', help='folder for the results')
    parser.add_argument('--seconds', type=float, default=300, help='from start to end')
    parser.add_argument('--seed', type=int, default=1)
    parser.add_argument('--views', type=int, default=12, help='of each photo, for phases 3 and 4')
    parser.add_argument('--workers', type=int, default=16, help='threads that read photos')
    parser.add_argument('--limit', type=int, default=0, help='photos per split; 0: all')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    args = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.mha.set_fastpath_enabled(False)
    say(started=args.device)
    run = Pocket(args)
    run.load()
    run.train_lm(.12*args.seconds)
    run.train_joint(.36*args.seconds)
    run.make_views(args.views)
    attempt(run.train_captions, .12*args.seconds)
    run.save('captioner', run.captioner)
    attempt(run.train_reward, max(1., run.left()-.03*args.seconds))
    run.save('captioner', run.captioner)
    run.show()
    say(done=str(run.out), cider=run.score)

if __name__=='__main__': main()
