"""What the bridge (nbs/appendix/bridge.ipynb) costs: the Gumbel route behind language models whose
vocabularies fit the text tower's more or less, beside the policy gradient, which crosses none."""
import time
from pathlib import Path
from fastcore.script import Param, call_parse
from grid import commit

metrics = 'cider oracle_p_at_1_100 precision recall reward mean_length cpu_seconds'.split()


def bpe(n, texts):
    "A byte-level tokenizer of GPT-2's kind, with at most `n` tokens, of letters that occur"
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from clipcap_ssl.models.lm import PreTrainedTokenizerFast
    t,end = Tokenizer(models.BPE()),'<|endoftext|>'
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=n, special_tokens=[end], show_progress=False)
    t.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=t, eos_token=end, bos_token=end)


def pretrain(folder, n, recipe, *, steps):
    "A language model shaped like 'toy', trained like it, with a tokenizer of its own"
    import torch
    from clipcap_ssl.core import set_seed, write_json
    from clipcap_ssl.models.lm import new_lm, tokenize_captions
    from clipcap_ssl.train.pretrain import lm_step, sentences
    from clipcap_ssl.train.loop import batches, fit, warmup_cosine
    t,texts = time.process_time(),sentences(recipe['sentences'], recipe['data_seed'])
    tok = bpe(n, texts[:5000])
    tokens,mask = tokenize_captions(tok, texts)
    set_seed(recipe['seed'])
    lm = new_lm(tok, recipe['width'], recipe['layers'], n_heads=recipe['heads'], n_positions=64)
    opt = torch.optim.AdamW(lm.parameters(), lr=recipe['lr'], weight_decay=.01)
    loader = batches(len(tokens), recipe['batch'], recipe['seed'])
    sched = warmup_cosine(opt, steps, min(50, steps//5))
    fit(lm, loader, lm_step(tokens, mask), opt=opt, n_steps=steps, sched=sched,
        desc=f'training {folder.name}')
    lm.half().save_pretrained(folder)
    tok.save_pretrained(folder)
    done = dict(recipe=recipe | {'steps':steps, 'tokens':len(tok)},
                cpu_seconds=round(time.process_time()-t, 1),
                supervision=dict(sentences=recipe['sentences']))
    write_json(folder/'recipe.json', done)   # last: its presence says that the model is done


def fidelity(tok, encoder, captions):
    "How well a tokenizer's captions cross the bridge"
    from clipcap_ssl.rewards.bridge import Bridge, bridge_fidelity
    words = tok([f' {w}' for c in captions for w in c.split()[1:]])['input_ids']
    f = bridge_fidelity(Bridge(tok, encoder), encoder, tok, texts=captions)
    return dict(tokens=len(tok), whole_words=sum(len(o)==1 for o in words)/len(words),
                longest=max(len(o) for o in tok(captions)['input_ids']), captions=len(captions),
                fidelity=f.mean().item(), fidelity_p05=f.quantile(.05).item(),
                share_below_085=(f<.85).float().mean().item())


@call_parse
def main(
    sizes:Param("Vocabularies of further language models, in tokens, beside the tower's own",
                int, nargs='*')=(400, 120),
    seeds:Param('Seeds of scenes, labels and training; all language models see the first one first',
                int, nargs='*')=(11, 12),
    out:str='runs/bridge', # Folder of language models and runs; what is there is not done again
    result:str='nbs/results/data/bridge.json', # The result, written after each run
    lm_steps:int=None, # Steps of pretraining (by default those of the language model that ships)
    set:Param('A setting for all runs, as key=value; may be repeated', str, action='append')=None,
):
    """Measure what the bridge loses and what that costs the Gumbel route.
    Example: python scripts/bridge_cost.py --sizes 400 120 --seeds 11 12"""
    import torch
    from clipcap_ssl import __version__
    from clipcap_ssl.pipeline.config import load_config
    from clipcap_ssl.core import asset_path, read_json, write_json
    from clipcap_ssl.models.loading import load_lm
    from clipcap_ssl.models.encoder import load_encoder
    from clipcap_ssl.pipeline.experiment import run
    from clipcap_ssl.data.scenes import ToyScenes
    torch.set_num_threads(1)
    out,recipe = Path(out),read_json(asset_path('toy-lm')/'recipe.json')['recipe']
    rows = ['stage1','stage2_gumbel','stage2_policy']
    settings = dict(policy_from='stage1', policy_steps=150, rows=rows)
    settings |= dict(o.split('=', 1) for o in set or [])
    names = {'toy':'toy'} | {f'bpe-{n}':out/f'bpe-{n}' for n in sizes}
    captions = [c for cs in ToyScenes(200, seed=61).captions for c in cs]
    found = dict(version=__version__, torch=torch.__version__, device='cpu, one thread',
                 commit=commit(), recipe='scenes', settings=settings, seeds=[],
                 language_models={}, runs=[])
    for name,n in zip(list(names)[1:], sizes):
        if (names[name]/'recipe.json').is_file(): continue
        pretrain(names[name], n, recipe, steps=lm_steps or recipe['steps'])
    encoder = load_encoder(load_config('scenes').encoder)
    for name,lm in names.items():
        seconds = None if name=='toy' else read_json(lm/'recipe.json')['cpu_seconds']
        crossed = fidelity(load_lm(lm)[1], encoder, captions)
        found['language_models'][name] = crossed | dict(pretraining_cpu_seconds=seconds)
        print(name, found['language_models'][name], flush=True)
    for seed in seeds:
        for name,lm in names.items():
            longest = found['language_models'][name]['longest']   # captions are longer in pieces
            room = {} if name=='toy' else dict(max_new_tokens=longest+2)
            config = load_config('scenes', **settings, **room, lm=str(lm), seed=seed)
            scores = run(config, out/f'{name}-seed{seed}', say=lambda o: None)
            rows = {r:{k:float(s[k]) for k in metrics} for r,s in scores.items()}
            found['runs'].append(dict(language_model=name, seed=seed, rows=rows))
            print(found['runs'][-1], flush=True)
            seen = sorted({o['seed'] for o in found['runs']})
            write_json(result, found | dict(seeds=seen, cpu_seconds=round(time.process_time(), 1)))
