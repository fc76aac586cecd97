"""Could expert iteration choose better captions to learn from? `expert_longer` is trained on the tuning seed, its pool is written once more, and each
image chooses from it in several ways. Chosen captions are scored by the scene graph and by CIDEr against the references of these images, which
nothing here learns from. Then a fourth round of training, on the choice of the recipe and on another. Second world; nothing is read on test."""
import json
from pathlib import Path
import numpy as np
import torch
from fastcore.script import call_parse
from clipcap_ssl import Captioner
from clipcap_ssl.core import read_json, write_text
from clipcap_ssl.data.base import subset
from clipcap_ssl.data.scenes import synonyms
from clipcap_ssl.metrics.cider import CiderD
from clipcap_ssl.metrics.intervals import bootstrap_ci
from clipcap_ssl.metrics.oracle import claims_table, oracle_scores, precision_by_attribute
from clipcap_ssl.models.generate import greedy
from clipcap_ssl.models.lm import tokenize_captions
from clipcap_ssl.pipeline import experiment
from clipcap_ssl.pipeline.config import load_config
from clipcap_ssl.pipeline.setup import scene_parts
from clipcap_ssl.rewards.reward import embed_unique
from clipcap_ssl.train.expert import candidate_captions, caption_prior, expert_step, length_bonus, pool_bias, select_captions
from clipcap_ssl.train.loop import Checkpoint, batches, fit, warmup_cosine
from clipcap_ssl.train.policy import copy_captioner
from clipcap_ssl.train.supervised import Pairs, optimiser
from grid import commit
from closer import steadied
from trials import begin

few = 16                                       # captions of an image that the other ways choose from: the best by the recipe's score
sizes = {w for s in ('large','small') for w in synonyms[s]}


class Pool:
    "The captions of a round, and what the recipe's choice knows of them"
    def __init__(self, cfg, parts, model, first, words):
        self.scale,self.target = parts.encoder.logit_scale,words
        self.texts = candidate_captions(model, parts.x, cfg.expert_samples, n_null=cfg.expert_null, seed=cfg.seed*1000+2*cfg.expert_rounds,
                                        max_new_tokens=cfg.max_new_tokens)
        self.y,self.prior = embed_unique(parts.encoder, self.texts),caption_prior(first, self.texts)
        self.words = torch.tensor([float(len(t.split())) for t in self.texts])
        self.hub = pool_bias(parts.x, self.y, self.prior, scale=self.scale, prior_weight=0.)
        self.some = parts.x[::max(len(parts.x)//500, 1)]

    def best(self, x, top, *, prior_weight=.3, target=None):
        "The best captions of images by the recipe's score, and the scores"
        bias = self.hub+prior_weight*self.prior
        bias = bias+length_bonus(self.scale*self.some@self.y.T+bias, self.words, target or self.target)*self.words
        return select_captions(x, self.y, bias, scale=self.scale, top=top)

    def likely(self, model, x, at, batch=64):
        "Log-probability of an image's captions `at` under a captioner, which sees the image"
        out = torch.zeros(at.shape)
        for i in range(0, len(x), batch):
            some,these = x[i:i+batch],at[i:i+batch]
            tokens,mask = tokenize_captions(model.tokenizer, [self.texts[j] for j in these.flatten().tolist()])
            with torch.no_grad(): logp = model.logprobs(some.repeat_interleave(at.shape[1], 0), tokens, mask)
            out[i:i+batch] = logp.sum(1).view(these.shape)
        return out

    def paraphrased(self, first, at, least=.95):
        "For each caption one of the pool that the text tower can hardly tell from it, drawn as stage 1 would write it"
        drawn,torch_rng = [],torch.Generator().manual_seed(0)
        for part in at.split(256):
            near = self.y[part]@self.y.T
            chance = self.prior.masked_fill(near<least, -torch.inf).softmax(1)
            drawn.append(torch.multinomial(chance, 1, generator=torch_rng)[:,0])
        return torch.cat(drawn)


def vote(pool, at, score, own, weight):
    "Similarity and the captioner's own opinion: its log-probability over the root of the length, as the prior has it"
    return score+weight*own/(pool.words[at]+1)**.5


def choices(cfg, pool, x, steady, stage1, model, graphs, cider, ids):
    "(name, text for each image) of each way to choose"
    at,score = pool.best(x, few)
    own,first = (pool.likely(m, x, at) for m in (model, stage1))
    def of(score, at=at): return [pool.texts[j] for j in at.gather(1, score.argmax(1, keepdim=True))[:,0].tolist()]
    def again(**how): return [pool.texts[j] for j in pool.best(x, 1, **how)[0][:,0].tolist()]
    recipe = of(score)
    yield 'recipe',recipe
    for w in (.25, .5, 1., 2.): yield f'vote_{w}',of(vote(pool, at, score, own, w))
    # by features averaged over shifts of the picture, alone and with a vote
    still,score_still = pool.best(steady, few)
    own_still = pool.likely(model, x, still)
    for w in (0., .5): yield f'shifts_vote_{w}',of(vote(pool, still, score_still, own_still, w), still)
    for w in (0., .15, .6): yield f'prior_{w}',again(prior_weight=w)
    # silent on what is optional: of captions that are nearly as good, the one that the labels' captioner finds likeliest
    near = score>score.max(1, keepdim=True).values-1
    yield 'certain_first',of(first.masked_fill(~near, -torch.inf))
    yield 'certain_prior',of(pool.prior[at].masked_fill(~near, -torch.inf))
    yield 'silent_0.25',of(score+.25*first)
    # length
    said = greedy(stage1, x, max_new_tokens=cfg.max_new_tokens).text
    own_target = torch.tensor([float(len(t.split())) for t in said])
    for t in (8.5, round(own_target.mean().item(), 2), 10.5): yield f'length_{t}',again(target=t)
    yield 'length_own',of(score-.25*(pool.words[at]-own_target[:,None]).abs())
    yield 'paraphrased',[pool.texts[j] for j in pool.paraphrased(stage1, at[:,0]).tolist()]
    # bounds, which know what no captioner may know
    yield 'bound_no_sizes',[' '.join(w for w in t.split(' on a ')[0].split() if w not in sizes) for t in recipe]
    table = torch.stack([torch.from_numpy(claims_table([pool.texts[j] for j in row], [graphs[i]]))[0] for i,row in zip(ids, at.tolist())])
    yield 'bound_graph',of(10.*table+score)
    flat = [pool.texts[j] for j in at.flatten().tolist()]
    yield 'bound_cider',of(torch.from_numpy(cider(flat, [i for i in ids for _ in range(few)])).view(at.shape))


def told(said, graphs, cider, base=None):
    "Scores of one caption per image, and how far its CIDEr is from that of the recipe's choice"
    ids = list(said)
    each = np.asarray(cider(list(said.values()), ids))
    found = {k:round(float(v), 4) for k,v in oracle_scores(said, graphs).items()}
    by = {a:[round(p, 4), n] for a,(p,n) in precision_by_attribute(said, graphs).items()}
    found |= dict(cider=round(float(each.mean()), 4), words=round(float(np.mean([len(t.split()) for t in said.values()])), 2), by_attribute=by)
    if base is not None: found['minus_recipe'] = [round(float(v), 4) for v in ((each-base).mean(), *bootstrap_ci(each-base))]
    return found,each


def one_more(cfg, parts, model, pool, labelled, how):
    "A fourth round of training, on captions chosen by the recipe or with the captioner's vote"
    at,score = pool.best(parts.x, few if how else cfg.expert_top)
    if how:
        score = vote(pool, at, score, pool.likely(model, parts.x, at), how)
        at = at.gather(1, score.topk(cfg.expert_top, dim=1).indices)
    tokens,mask = tokenize_captions(model.tokenizer, [pool.texts[j] for j in at.flatten().tolist()])
    pairs = Pairs(parts.x[torch.arange(len(at)).repeat_interleave(cfg.expert_top)], tokens, mask)
    new,order = copy_captioner(model),cfg.seed*1000+cfg.expert_rounds
    opt = optimiser(new, cfg.expert_lr, cfg.expert_lr_lm)
    fit(new, batches(len(pairs), cfg.batch, order), expert_step(pairs, labelled, cfg.label_weight), opt=opt, n_steps=cfg.expert_steps,
        sched=warmup_cosine(opt, cfg.expert_steps, 20), seed=order)
    return new


@call_parse
def main(
    out:str='nbs/results/data/web/choices.json', # where it is written
    runs:str='runs/choices', # folder of the captioner and of the captions that it learnt from
    seed:int=23, # the tuning seed
    n:int=3000, # images whose choices are scored
):
    "Ways to choose captions, compared. Example: OMP_NUM_THREADS=1 python scripts/choices.py"
    torch.set_num_threads(1)
    cfg = load_config('web_scenes', n_test=20, seed=seed, n_unlabelled=36000, expert_samples=2, expert_steps=1500)
    parts,dev,stage1,_ = begin(cfg)
    train,more,_ = scene_parts(cfg)
    plain = [i for i in parts.plain.ids if i in parts.features]
    drawn = {i:s for ds in (train, more) if ds for i,s in zip(ds.ids, ds.scenes)}
    refs = dict(zip(train.ids, train.captions))
    ids = [i for i in plain if i in refs][:n]
    assert ids==plain[:n]
    graphs,cider = {i:drawn[i] for i in ids},CiderD({i:refs[i] for i in ids}, cfg.tokenize)
    # 1) the captioner, and what it learnt from
    folder = Path(runs)/'longer'
    if folder.is_dir(): model = Captioner.from_pretrained(folder).attach(parts.encoder)
    else:
        model = copy_captioner(stage1)
        experiment._expert(cfg, parts, model, checkpoint=Checkpoint(Path(runs), every=10**9))
        model.save_pretrained(folder)
    kept = [read_json(f)['texts'][::cfg.expert_top][:n] for f in sorted(Path(runs).glob('kept-*.json'))]
    before = read_json(Path(out))['dev'] if Path(out).is_file() else {}
    found = dict(seed=seed, commit=commit(), torch=torch.__version__, images=n, dev=before|dict(stage1=dev.score(stage1), longer=dev.score(model)),
                 kept=[told(dict(zip(ids, texts)), graphs, cider)[0] for texts in kept])
    found['captioner'] = told(dict(zip(ids, greedy(model, parts.x[:n], max_new_tokens=cfg.max_new_tokens).text)), graphs, cider)[0]
    # 2) other choices
    words = float(np.mean(experiment._label_lengths(cfg, parts)))
    pool = Pool(cfg, parts, model, stage1, words)
    found |= dict(pool=len(pool.texts), target=round(words, 2), choices={})
    base = None
    place = {i:k for k,i in enumerate(parts.plain.ids)}
    steady = steadied(parts.encoder, subset(parts.plain, [place[i] for i in ids]), [(0,0), (2,0), (-2,0), (0,2), (0,-2)])
    for name,texts in choices(cfg, pool, parts.x[:n], steady, stage1, model, graphs, cider, ids):
        found['choices'][name],each = told(dict(zip(ids, texts)), graphs, cider, base)
        if base is None: base = each
        print(name, {k:v for k,v in found['choices'][name].items() if k!='by_attribute'}, flush=True)
        write_text(Path(out), json.dumps(found, indent=1, allow_nan=False)+'\n')
    # 3) one more round of training
    labelled = experiment._tokenized(parts, model, parts.labels_to_train)
    for name,how in dict(recipe=None, vote=.5).items():
        if f'fourth_{name}' in found['dev']: continue
        found['dev'][f'fourth_{name}'] = dev.score(one_more(cfg, parts, model, pool, labelled, how))
        print(name, found['dev'][f'fourth_{name}'], flush=True)
        write_text(Path(out), json.dumps(found, indent=1, allow_nan=False)+'\n')
