"""The plainest form of what captioning code does, as baselines for run.py.

Written by us after the loops that ClipCap's repository made common (one image at a time, no
key-value cache, captions padded to the corpus, gradients of a language model that is not trained),
with our models in them, so that only the way of computing differs."""
import copy
import torch, torch.nn.functional as F
from torch import nn

# ---- images and texts

@torch.no_grad()
def embed_one_by_one(encoder, images):
    "Features of images, one at a time"
    found = [encoder.model.encode_image(encoder.preprocess(o)[None]) for o in images]
    return F.normalize(torch.cat(found).float(), dim=-1)

@torch.no_grad()
def embed_texts_padded(encoder, tokenizer, texts):
    "Features of texts, every one padded to the 77 tokens of CLIP"
    return F.normalize(encoder.model.encode_text(tokenizer(texts)).float(), dim=-1)

# ---- stage 1

def pad_to_corpus(tokens, mask, k):
    "Captions padded to mean and ten standard deviations of the corpus; a mask with the prefix"
    lengths = mask.sum(1).float()
    longest = min(int(lengths.mean()+10*lengths.std()), int(lengths.max()))
    tokens = tokens[:,:longest].masked_fill(~mask[:,:longest], 0)
    return tokens,torch.cat([torch.ones(len(mask), k), mask[:,:longest].float()], 1)

def all_logits(mapper, lm, x, tokens, mask):
    "Logits of every position, those of the prefix too"
    h = torch.cat([mapper(x), lm.get_input_embeddings()(tokens)], 1)
    return lm(inputs_embeds=h, attention_mask=mask).logits

def train_prefix(mapper, lm, x, tokens, mask, n_steps, batch, lr=2e-5):
    "ClipCap's `--only_prefix`: the optimiser has the mapper alone, gradients are of everything"
    opt,k = torch.optim.AdamW(mapper.parameters(), lr=lr),mask.shape[1]-tokens.shape[1]
    for step in range(n_steps):
        at = torch.arange(step*batch, (step+1)*batch)%len(x)
        lm.zero_grad()
        mapper.zero_grad()
        logits = all_logits(mapper, lm, x[at], tokens[at], mask[at])[:,k-1:-1]
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[at].flatten(), ignore_index=0)
        loss.backward()
        opt.step()
    return loss.item()

# ---- decoding without a cache

@torch.no_grad()
def greedy_one(lm, prefix, n_tokens, end):
    "The likeliest token at every step, of one image, all read again for each token"
    h,said = prefix,[]
    for _ in range(n_tokens):
        logits = lm(inputs_embeds=h, use_cache=False).logits[:,-1]
        ordered,_ = logits.sort(descending=True)      # the top-p rule, which greedy needs not
        ordered.softmax(-1).cumsum(-1)
        token = logits.argmax(-1, keepdim=True)
        said.append(token.item())
        h = torch.cat([h, lm.get_input_embeddings()(token)], 1)
        if said[-1]==end: break
    return said

@torch.no_grad()
def beam_one(lm, prefix, n_tokens, end, n_beams=5):
    "Beam search of one image, all read again for each token"
    h,tokens,scores = prefix,None,None
    lengths,stopped = torch.ones(n_beams),torch.zeros(n_beams, dtype=torch.bool)
    for _ in range(n_tokens):
        logp = lm(inputs_embeds=h, use_cache=False).logits[:,-1].log_softmax(-1)
        if scores is None:
            scores,token = logp[0].topk(n_beams)
            tokens,h = token[:,None],h.expand(n_beams, -1, -1)
        else:
            logp[stopped] = -torch.inf
            logp[stopped,0] = 0
            total = scores[:,None]+logp
            lengths[~stopped] += 1
            mean,at = (total/lengths[:,None]).flatten().topk(n_beams)
            source,token = at//logp.shape[1],at%logp.shape[1]
            lengths,stopped,tokens,h = lengths[source],stopped[source],tokens[source],h[source]
            tokens,scores = torch.cat([tokens, token[:,None]], 1),mean*lengths
        h = torch.cat([h, lm.get_input_embeddings()(tokens[:,-1:])], 1)
        stopped = stopped | (tokens[:,-1]==end)
        if stopped.all(): break
    return tokens[(scores/lengths).argmax()].tolist()

@torch.no_grad()
def sample_rows(lm, prefix, n_tokens):
    "Sampled tokens, all read again for each token; rows go on to the longest caption"
    h,said = prefix,[]
    for _ in range(n_tokens):
        logits = lm(inputs_embeds=h, use_cache=False).logits[:,-1]
        token = torch.multinomial(logits.softmax(-1), 1)
        said.append(token)
        h = torch.cat([h, lm.get_input_embeddings()(token)], 1)
    return torch.cat(said, 1)

# ---- stage 2

def policy_loss(parts, x, n, n_tokens):
    "REINFORCE with the mean of the others as baseline, and a divergence from the start"
    mapper,lm,reference,tokenizer,reward = parts
    rows = x.repeat_interleave(n, 0)
    tokens = sample_rows(lm, mapper(rows).detach(), n_tokens)
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    r = reward(texts, x)
    advantage = ((r-r.mean(1, keepdim=True))*n/(n-1)).flatten() if n>1 else r.flatten()
    mask = torch.ones(len(rows), mapper.k+n_tokens)
    def logp(net):
        found = all_logits(net[0], net[1], rows, tokens, mask)[:,mapper.k-1:-1]
        return found.log_softmax(-1)
    now = logp((mapper, lm))
    with torch.no_grad(): before = logp(reference)
    taken = now.gather(-1, tokens[...,None]).squeeze(-1)
    divergence = (now.exp()*(now-before)).sum(-1).mean()
    return -(advantage[:,None]*taken).mean()+.1*divergence

def policy_batched(parts, opt, x, n=5, n_tokens=20):
    "A step of all images at once"
    opt.zero_grad()
    policy_loss(parts, x, n, n_tokens).backward()
    opt.step()

def policy_one_by_one(parts, opt, x, n=5, n_tokens=20):
    "A step in which every sample of every image is written, judged and scored by itself"
    opt.zero_grad()
    for i in range(len(x)):
        for _ in range(n): (policy_loss(parts, x[i:i+1], 1, n_tokens)/(n*len(x))).backward()
    opt.step()

def policy_parts(mapper, lm, tokenizer, reward):
    "What the loops above need: a policy that is trained whole, and its frozen start"
    mapper,lm = copy.deepcopy(mapper),copy.deepcopy(lm).requires_grad_(True)
    start = nn.ModuleList([copy.deepcopy(mapper), copy.deepcopy(lm)]).requires_grad_(False)
    opt = torch.optim.AdamW([*mapper.parameters(), *lm.parameters()], lr=1e-6)
    return (mapper, lm, start, tokenizer, reward),opt

# ---- CIDEr-D

def cider_of_coco(captions, references):
    "CIDEr-D of every caption by pycocoevalcap, its Java tokenizer first"
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    def rows(found): return {i:[dict(caption=o) for o in cs] for i,cs in found.items()}
    tokenizer = PTBTokenizer()
    refs,said = tokenizer.tokenize(rows(references)),tokenizer.tokenize(rows(captions))
    return Cider().compute_score(refs, said)[1]
