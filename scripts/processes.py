"""Do two processes train what one trains? python scripts/processes.py

Three parts, each kept in nbs/results/data/processes.json (see `--out`), all on the CPU with gloo:

1. `routes`: the weights after 20 steps of each training by a loss, in double precision, with
   two processes, with three, and with two passes per batch (`accumulate=2`), beside those of one.
   All have the same batches, and captions that were sampled before, as chance alone would make a
   difference.
2. `torchrun` and `accelerate`: `clipcap_train` in one process and in two. Every file is written
   once, and the captions are compared.
3. `kill`: two processes are killed in the middle of a row, and started again."""
import os
os.environ.update(OMP_NUM_THREADS='1', TQDM_DISABLE='1', HF_HUB_OFFLINE='1',
    ACCELERATE_USE_CPU='true')
import json, shutil, signal, socket, subprocess, sys, tempfile, time, warnings
from pathlib import Path
from unittest.mock import patch
from fastcore.script import Param, call_parse
from grid import commit


# ---- several processes, forked from one that has imported everything

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def in_processes(n, work):
    "Do `work(rank)` in `n` processes that know of each other"
    from accelerate.state import AcceleratorState, GradientState
    port,children = free_port(),[]
    sys.stdout.flush()
    for rank in range(n):
        pid = os.fork()
        if pid:
            children.append(pid)
            continue
        status = 1
        try:
            if n>1: os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n),
                                      MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
            work(rank)
            status = 0
        except Exception:
            import traceback
            traceback.print_exc()
        finally: os._exit(status)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    if any(statuses): raise SystemExit(f'{n} processes ended with {statuses}')


# ---- 1. the routes

class World:
    "A captioner in double precision, features, pairs, and captions sampled beforehand"
    def __init__(self):
        import torch
        from clipcap_ssl.data.base import split_labelled
        from clipcap_ssl.data.features import encode_dataset
        from clipcap_ssl.data.scenes import ToyScenes
        from clipcap_ssl.models.captioner import new_captioner
        from clipcap_ssl.models.encoder import load_encoder
        from clipcap_ssl.models.generate import sample
        from clipcap_ssl.train.supervised import labelled_pairs, train_supervised
        torch.set_num_threads(1)
        self.enc = load_encoder('toy')
        ds,plain = ToyScenes(120, seed=41),ToyScenes(120, seed=42)
        feats = encode_dataset(self.enc, ds)
        self.model = new_captioner(self.enc)
        pairs = labelled_pairs(ds, split_labelled(ds, n_pairs=120), feats, self.model)
        train_supervised(self.model, pairs, n_steps=40)
        x = encode_dataset(self.enc, plain).x
        self.rollouts = sample(self.model, x, 3, seed=0, max_new_tokens=12)
        for o in (self.model, self.enc.model): o.double()
        for o in self.model.modules():
            if isinstance(o, torch.nn.Dropout): o.p = 0.
        self.x,pairs.x = x.double(),pairs.x.double()
        self.pairs = pairs
        self.texts = self.rollouts.text[::3]

    def sample(self, model, xs, n=1, **how):
        "The captions that were sampled beforehand"
        import torch
        at = torch.cdist(xs, self.x).argmin(1)
        return self.rollouts[(at[:,None]*3+torch.arange(n)).flatten()]

def trained(world, route, accumulate=1):
    "Weights of a captioner after 20 steps of a route"
    import torch
    from clipcap_ssl.rewards.reward import contrastive_reward
    from clipcap_ssl.train import expert, gumbel, policy
    from clipcap_ssl.train.loop import new_accelerator, training_with
    from clipcap_ssl.train.supervised import train_supervised
    from clipcap_ssl.train.text_only import train_text_only
    model,x,enc = policy.copy_captioner(world.model),world.x,world.enc
    few = dict(n_steps=20, batch_size=13)
    with (training_with(new_accelerator(accumulate=accumulate)),
          patch.object(policy, 'sample', world.sample),
          patch.object(gumbel, 'sample', world.sample),
          patch.object(expert, '_write_and_choose', lambda *a, **k: (world.texts, {})),
          patch.object(torch.Tensor, 'exponential_', lambda o, **_: o.fill_(.7)), # Gumbel's noise
          patch.object(torch.Tensor, 'float', torch.Tensor.double)):   # `.float()` inside losses
        if route=='stage1': log = train_supervised(model, world.pairs, **few)
        if route=='text_only': log = train_text_only(model, world.texts, enc, x=x, **few)
        if route=='expert':
            log = expert.train_expert(model, x, enc, labelled=world.pairs, rounds=1, **few)
        how = dict(labelled=world.pairs, n_samples=3, **few)
        if route=='policy':
            reward = contrastive_reward(enc, x[:64], 10.)
            log = policy.train_policy(model, x, reward, **how)
        if route=='in_batch':          # the others of an image are those of the whole batch
            log = policy.train_policy(model, x, contrastive_reward(enc, None, 10.), **how)
        if route=='batch_normed':      # the spread of the rewards is that of the whole batch
            reward = contrastive_reward(enc, x[:64], 10.)
            log = policy.train_policy(model, x, reward, objective='batch_normed', **how)
        if route=='gumbel':
            log = gumbel.train_gumbel(model, x, enc, bank=x[:64], labelled=world.pairs, **few)
    return torch.cat([p.detach().flatten() for p in model.parameters()]),log

all_routes = ('stage1','text_only','expert','policy','in_batch','batch_normed','gumbel')

def routes(place, which):
    "1. Weights of one process, of several, and of several passes"
    import torch
    from safetensors.torch import load_file, save_file
    world,found = World(),{}
    start = torch.cat([p.detach().flatten() for p in world.model.parameters()])
    for route in which:
        def after(n, accumulate):
            def work(rank):
                weights,log = trained(world, route, accumulate)
                save_file({'w': weights}, place/f'{rank}.safetensors')
            began = time.time()
            in_processes(n, work)
            all_weights = [load_file(place/f'{rank}.safetensors')['w'] for rank in range(n)]
            return all_weights,time.time()-began
        (one,),seconds = after(1, 1)
        row = dict(moved=(one-start).abs().max().item(), seconds=round(seconds, 1))
        ways = [('two',2,1), ('three',3,1), ('two_passes',1,2)]
        if route=='batch_normed': ways.pop()     # is refused, since passes do not know of each other
        for name,n,accumulate in ways:
            weights,seconds = after(n, accumulate)
            row[name] = max((w-one).abs().max().item() for w in weights)
            row[f'{name}_seconds'] = round(seconds, 1)
        found[route] = row
        print(route, row, flush=True)
    return found


# ---- 2. the command

tiny = dict(n_train=120, n_test=300, n_pairs=40, n_dev_pairs=8, steps=20, expert_rounds=1,
    expert_steps=20, expert_samples=1, expert_null=20, policy_steps=12, gumbel_steps=3,
    max_new_tokens=12, rows='stage1,guided,best_of_n,stage2_expert,stage2_policy,stage2_gumbel')

def command(place, out, more=()):
    "`clipcap_train` as pip would install it, and its arguments"
    script = place/'clipcap_train'
    script.write_text(f'#!{sys.executable}\nimport sys\n'
        'from clipcap_ssl.pipeline.cli import clipcap_train\n'
        "if __name__=='__main__': sys.exit(clipcap_train())\n")
    script.chmod(0o755)
    sets = [o for k,v in tiny.items() for o in ('--set', f'{k}={v}')]
    return [str(o) for o in (script, 'scenes', *sets, *more, '--device', 'cpu', '--out', out)]

def launched(how):
    "What stands before the command to run it in two processes"
    port = str(free_port())
    if how=='one': return []
    if how=='torchrun':
        return [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '2',
                '--master_port', port, '--no-python']
    # on a machine without a GPU, `--multi_gpu` starts processes on the CPU; `--cpu` starts one
    return [sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu',
            '--num_processes', '2', '--num_machines', '1', '--mixed_precision', 'no',
            '--dynamo_backend', 'no',
            '--main_process_port', port, '--no_python']

def started(place, how, out):
    env = os.environ|dict(CLIPCAP_HOME=str(place/'home'))
    return subprocess.Popen(launched(how)+command(place, out), env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)

def captions(out): return [json.loads(o) for o in (out/'captions.jsonl').read_text().splitlines()]

def compared(one, two):
    "What two runs have in common"
    from clipcap_ssl.core import read_json
    a,b = captions(one),captions(two)
    rows = [r for r in a[0] if r not in ('id','references')]
    same = {r:sum(x[r]==y[r] for x,y in zip(a, b))/len(a) for r in rows}
    logs = [(o/'log.jsonl').read_text().splitlines() for o in (one, two)]
    scores = [read_json(o/'scores.json') for o in (one, two)]
    tables = [o['rows'] for o in scores]
    files = [sorted(str(p.relative_to(o)) for p in o.rglob('*')) for o in (one, two)]
    return dict(processes=[o['meta']['processes'] for o in scores],
                equal_captions={r:round(v, 3) for r,v in same.items()},
                same_files=files[0]==files[1], log_lines=[len(o) for o in logs],
                cider={r:[round(t[r]['cider'], 4) for t in tables] for r in rows})

def commands(place, launchers):
    "2. `clipcap_train` by itself, by torchrun and by accelerate"
    found = {}
    for how in ('one', *launchers):
        began = time.time()
        process = started(place, how, place/how)
        out,err = process.communicate()
        if process.returncode: raise SystemExit(f'{how}: {err[-3000:]}')
        found[how] = dict(seconds=round(time.time()-began, 1),
                          tables_printed=out.count('| stage1 |'), done_lines=err.count('stage1: '))
        if how!='one': found[how] |= compared(place/'one', place/how)
        print(how, found[how], flush=True)
    return found

def kill(place):
    "3. Two processes, killed in the middle of a row"
    whole,broken = place/'whole',place/'broken'
    for out in (whole, broken):
        process = started(place, 'torchrun', out)
        if out==broken:
            log = broken/'rows'/'stage2_policy.log.jsonl'
            while not (log.is_file() and len(log.read_bytes().splitlines())>=6): time.sleep(.01)
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            process = started(place, 'torchrun', out)
        err = process.communicate()[1]
        if process.returncode: raise SystemExit(err[-3000:])
    found = compared(whole, broken)
    print('kill', found, flush=True)
    return found


@call_parse
def processes(
    out:str='nbs/results/data/processes.json', # the result; parts that are not run again stay in it
    only:Param('routes, command or kill; default: all', str, nargs='+')=None,
    which:Param('of routes', str, nargs='+')=all_routes,
    launchers:Param('of command, beside one process', str, nargs='+')=('torchrun','accelerate'),
):
    "Compare one process with several, and write what came of it"
    from clipcap_ssl.core import read_json, write_json
    warnings.simplefilter('ignore')
    found = read_json(out) if only and Path(out).is_file() else {}
    steps = dict(routes=lambda place: routes(place, which),
                 command=lambda place: commands(place, launchers), kill=kill)
    for name,step in steps.items():
        if only and name not in only: continue
        with tempfile.TemporaryDirectory() as d:
            before = found.get(name, {}) if name=='routes' else {}    # others of `which` stay
            found[name] = before | step(Path(d).resolve()) | dict(commit=commit())
        write_json(out, found)
