"""The policy gradient over the pool that all images share, as expert iteration has it: half of an image's captions are its own
samples, half are drawn from the pool's captions that suit the image best. Two ways to learn from captions that the captioner
did not write: importance weights, and a preference of the best caption over the worse ones. Beside them the package's policy
gradient, on own samples alone, for as many steps, with either loss. Tuning seed, dev scenes only."""
import json, time
from dataclasses import replace
from functools import partial
from pathlib import Path
import torch
from fastcore.script import call_parse
from clipcap_ssl.core import read_json, write_text
from clipcap_ssl.models.generate import sample
from clipcap_ssl.models.lm import tokenize_captions
from clipcap_ssl.pipeline import experiment
from clipcap_ssl.pipeline.config import load_config
from clipcap_ssl.rewards.gradient import leave_one_out, preference_loss
from clipcap_ssl.rewards.reward import embed_unique, rewarded
from clipcap_ssl.train.expert import candidate_captions, caption_prior, length_bonus, pool_bias, select_captions
from clipcap_ssl.train.loop import batches, fit, warmup_cosine
from clipcap_ssl.train.policy import anchors, copy_captioner, frozen_copy
from clipcap_ssl.train.supervised import optimiser
from grid import commit
from trials import begin


def suited(model, first, x, encoder, *, cfg, words, seed, most=32):
    "The captions of a new pool that suit each image best, and how likely each is drawn"
    pool = candidate_captions(model, x, cfg.expert_samples, n_null=cfg.expert_null, seed=seed, max_new_tokens=cfg.max_new_tokens)
    y,prior = embed_unique(encoder, pool),caption_prior(first, pool)
    lengths = torch.tensor([float(len(t.split())) for t in pool])
    bias = pool_bias(x, y, prior, scale=encoder.logit_scale, prior_weight=cfg.expert_prior)
    some = x[::max(len(x)//500, 1)]
    bias = bias+length_bonus(encoder.logit_scale*some@y.T+bias, lengths, words)*lengths
    at,score = select_captions(x, y, bias, scale=encoder.logit_scale, top=most)
    return pool,at,score.softmax(1)


def mixed_step(x, reward, reference, *, labelled, cfg, pooled, how, n_own=4, n_pool=4, clip=5.):
    "A loss over own samples and captions of the pool; `pooled` holds what `suited` gave"
    taught = anchors(reference, labelled, cfg.policy_kl, label_weight=cfg.label_weight, label_batch=cfg.label_batch)
    temperature = cfg.policy_temperature if how=='preference' else 1.   # weights are those of the policy as it is

    def loss_fn(model, rows):
        model.eval()
        xs,(pool,at,chance) = x[rows],pooled
        # 1) captions: an image's own, and some of the pool
        own = sample(model, xs, n_own, temperature=temperature, seed=int(torch.randint(2**31, ())), max_new_tokens=cfg.max_new_tokens)
        drawn = torch.multinomial(chance[rows], n_pool)
        others = [[pool[j] for j in at[i][k].tolist()] for i,k in zip(rows, drawn)]
        texts = [t for i,more in enumerate(others) for t in (*own.text[i*n_own:(i+1)*n_own], *more)]
        rewards = rewarded(reward, texts, xs, ids=rows)
        # 2) their log-probabilities
        tokens,mask = tokenize_captions(model.tokenizer, texts, cfg.max_new_tokens)
        logp = model.logprobs(xs, tokens, mask)
        by_image = partial(torch.unflatten, dim=0, sizes=(len(xs), n_own+n_pool))
        stats = dict(reward=rewards[:,:n_own].mean().item(), reward_pool=rewards[:,n_own:].mean().item())
        if how=='preference':
            with torch.no_grad(): ref = reference.logprobs(xs, tokens, mask)
            loss = preference_loss(by_image(logp), by_image(ref), by_image(mask), rewards=rewards)
        else:
            # 3) weights: the policy's probability over that of the mixture which drew, no more than `clip`
            total = by_image(logp.sum(1))
            near = at[rows]                                       # which pool caption is this, and how likely was it drawn
            where = {(i,pool[j]):c for i in range(len(rows)) for j,c in zip(near[i].tolist(), chance[rows[i]].tolist())}
            drawn_from_pool = torch.tensor([where.get((i//(n_own+n_pool),t), 0.) for i,t in enumerate(texts)]).view_as(total)
            behaviour = torch.logaddexp(total.detach(), drawn_from_pool.clamp(min=1e-30).log())-torch.tensor(2.).log()
            weight = (total.detach()-behaviour).exp().clamp(max=clip)
            stats |= dict(weight_own=weight[:,:n_own].mean().item(), weight_pool=weight[:,n_own:].mean().item())
            loss = -(weight*leave_one_out(rewards)*total).mean()
        loss = cfg.policy_reward_weight*loss if how!='preference' else loss
        # 4) anchors
        logits = model.scores(xs, own.tokens, own.mask)
        return taught(loss, stats, model, xs, own, logits, images=len(xs))
    return loss_fn


def train(cfg, parts, model, *, how, lr, lr_lm, steps, rounds, hooks):
    "Stage 2 over the pool, which is written anew in each of the rounds"
    labelled = experiment._tokenized(parts, model, parts.labels_to_train)
    reward,first,x = experiment._reward(cfg, parts, model),frozen_copy(model),parts.x
    words = sum(map(len, (parts.train.captions[i][j].split() for i,j in parts.labels)))/len(parts.labels)
    opt,log = optimiser(model, lr, lr_lm),[]
    sched = warmup_cosine(opt, steps, 10)
    for r in range(rounds):
        pooled = suited(model, first, x, parts.encoder, cfg=cfg, words=words, seed=cfg.seed*1000+2*r)
        step = mixed_step(x, reward, first, labelled=labelled, cfg=cfg, pooled=pooled, how=how)
        log += fit(model, batches(len(x), cfg.policy_batch, cfg.seed*1000+r), step, opt=opt, sched=sched, n_steps=steps*(r+1)//rounds,
                   start=steps*r//rounds, seed=cfg.seed, hooks=hooks)
    return log


# own samples alone: as the recipe has it, at the temperature of importance weights, and with the other loss
alone = dict(own={}, own_hot=dict(policy_temperature=1.), own_preference=dict(policy_objective='preference', policy_reward_weight=1.))


@call_parse
def main(
    out:str='nbs/results/data/web/pool_policy.json', # where trials are written
    steps:int=300, # of each trial
    rounds:int=3, # how often the pool is written anew
    lr:float=4e-3, # of the mapping network; the policy gradient's best trial had it
    lr_lm:float=1.4e-3, # of the language model
    seed:int=23, # the tuning seed
):
    "Trials of the policy gradient over a shared pool, and without one. Example: OMP_NUM_THREADS=1 python scripts/pool_policy.py"
    torch.set_num_threads(1)
    out,version = Path(out),commit()
    cfg = load_config('web_scenes', n_test=20, seed=seed)
    parts,dev,stage1,seconds = begin(cfg)
    found = read_json(out) if out.is_file() else []
    for how in ('preference','importance',*alone):
        if any(o['how']==how and o['lr']==lr for o in found): continue
        model,began = copy_captioner(stage1),time.process_time()
        if how in alone:
            own = replace(cfg, policy_steps=steps, policy_lr=lr, policy_lr_lm=lr_lm, **alone[how])
            log = experiment.row_training['stage2_policy'](own, parts, model, hooks=[])
        else: log = train(cfg, parts, model, how=how, lr=lr, lr_lm=lr_lm, steps=steps, rounds=rounds, hooks=[])
        spent = round(time.process_time()-began, 1)
        tail = log[-25:]
        means = {k:round(sum(o[k] for o in tail)/len(tail), 4) for k in ('reward','reward_pool','weight_own','weight_pool','kl') if k in tail[0]}
        found.append(dict(how=how, lr=lr, lr_lm=lr_lm, steps=steps, rounds=rounds, seed=seed, commit=version, torch=torch.__version__,
                          stage1=dev.score(stage1), dev=dev.score(model), end_of_log=means, cpu_seconds=spent))
        write_text(out, json.dumps(found, indent=1, allow_nan=False)+'\n')
        print(how, lr, found[-1]['dev'], means, spent, flush=True)
