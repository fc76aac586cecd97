"""Three imitation users go from a folder of photos to captions by the four commands alone: one with
photos of a theme, one with drawn scenes in other colours, one who makes mistakes. `--help` says how.
Nothing of theirs is kept but counts, minutes and scores."""
import encodings.utf_8_sig # noqa: for forks of another user, who may not read this Python's folder
import json, os, random, re, shutil, subprocess, sys, time
from pathlib import Path
import numpy as np
from fastcore.script import call_parse
from PIL import Image
from clipcap_ssl.core import asset_path, read_json, write_json, write_lines
from clipcap_ssl.data import painter
from clipcap_ssl.data.scenes import ToyScenes
from clipcap_ssl.metrics.intervals import paired_difference

# ---- a shell that counts

class Shell:
    "Runs commands in a folder, each once, and notes seconds and exit statuses"
    def __init__(self, bin, folder, threads=1):
        self.bin,self.folder = Path(bin),Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = self.folder/'commands.json'
        self.log = read_json(self.file) if self.file.is_file() else []
        known = ('PATH','HOME','LANG','TMPDIR','SSL_CERT_FILE')
        self.env = {k:os.environ[k] for k in known if k in os.environ}
        self.env |= dict(CLIPCAP_HOME=str(self.folder/'home'), OMP_NUM_THREADS=str(threads),
                         HF_HUB_OFFLINE='1', TQDM_DISABLE='1')

    def __call__(self, *argv):
        "Run a command of the package; its note"
        command = ' '.join(map(str, argv))
        done = [o for o in self.log if o['command']==command]
        if done: return done[0]
        began,out = time.time(),self.folder/f'command-{len(self.log)}.txt'
        with out.open('w') as f:
            p = subprocess.Popen([str(self.bin/argv[0]), *map(str, argv[1:])], cwd=self.folder,
                                 env=self.env, stdout=f, stderr=subprocess.STDOUT)
            _,status,used = os.wait4(p.pid, 0)
        p.returncode = os.waitstatus_to_exitcode(status)
        note = dict(command=command, status=p.returncode, wall=round(time.time()-began, 1),
                    cpu=round(used.ru_utime+used.ru_stime, 1), said=out.read_text())
        self.log.append(note)
        write_json(self.file, self.log)
        print(f"{note['status']} {note['cpu']} s of {note['wall']} s: {command}", flush=True)
        return note

def minutes(log):
    "Commands, failures, and minutes of all"
    return dict(commands=len(log), failed=sum(o['status']!=0 for o in log),
                wall_minutes=round(sum(o['wall'] for o in log)/60, 1),
                cpu_minutes=round(sum(o['cpu'] for o in log)/60, 1))

# ---- scenes in other colours

other_colours = dict(red=(150,30,60), blue=(40,60,130), green=(90,130,40), yellow=(200,180,90),
                     orange=(190,100,50), purple=(90,60,110), pink=(210,150,160), cyan=(100,160,150))

def other_ground(background, rng):
    "A paper-like background that shades from corner to corner: 64 x 64 x 3"
    base = dict(white=(245,232,205), grey=(125,135,150), black=(20,30,45))[background]
    away = np.array([rng.uniform(-25, 25) for _ in range(3)])
    slope = np.linspace(-.5, .5, 64)
    shade = slope[:,None]*rng.choice((-1,1))+slope[None]*rng.choice((-1,1))
    grain = np.random.default_rng(rng.getrandbits(32)).normal(0, 6, (64,64,1))
    return np.clip(np.array(base)+shade[...,None]*away+grain, 0, 255)

def draw_other(scene, seed):
    "A scene in other colours on another background"
    rng = random.Random(f'paint {seed}')
    im = other_ground(scene.background, random.Random(f'ground {seed}'))
    boxes = painter._halves[scene.relation] if scene.relation else [painter._whole]
    for group,box in zip(scene.groups, boxes):
        colour = np.array(other_colours[group.colour])+np.array([rng.uniform(-12,12) for _ in range(3)])
        for at in painter._places(rng, box, group.count): painter._paint(im, group, at, colour=colour)
    return Image.fromarray(np.clip(im, 0, 255).astype(np.uint8)).resize((96,96), Image.BICUBIC)

def scene_user(folder, n=300, plain=2000, new=24, seed=4711):
    "A folder of PNG files with captions.jsonl, and new ones beside it; the graphs of the new ones"
    data,fresh = folder/'shapes',folder/'new'
    ds = ToyScenes(n+plain+new, seed, n_captions=1)
    for o in (data/'images', fresh): o.mkdir(parents=True, exist_ok=True)
    for i,scene in enumerate(ds.scenes):
        where = fresh/f'{i}.png' if i>=n+plain else data/'images'/f'{i:05}.png'
        draw_other(scene, f'{seed} {i}').save(where)
    write_lines(data/'captions.jsonl', [dict(file=f'images/{i:05}.png', captions=list(ds.captions[i]))
                                        for i in range(n)])
    return data,fresh,ds.scenes[n+plain:]

# ---- photos of a theme

theme = re.compile(r'\b(dog|dogs|puppy|puppies)\b')

def themed(photos, seed, theme):
    "Rows of photos with the theme's words in two captions or more: those that `pocket` has seen, and others"
    known = set(read_json(asset_path('pocket/encoder')/'trained_on.json')['ids'])
    rows = [json.loads(o) for o in (photos/'captions.jsonl').read_text(encoding='utf-8').splitlines()]
    rows = [o for o in rows if o['set']=='flickr8k'
            and sum(bool(theme.search(c.lower())) for c in o['captions'])>=2]
    random.Random(f'theme {seed}').shuffle(rows)
    return [o for o in rows if o['id'] in known],[o for o in rows if o['id'] not in known]

def plain_words(caption):
    "As somebody would type it: no capital, no space before the full stop"
    return re.sub(r' ?\.$', '', caption.strip()).lower()

def photo_user(folder, photos, n_train=240, n_test=60, new=24, plain=2000, seed=4711, rename=True, theme=theme, name='dogs'):
    "A folder of photos with one caption each and a split, the test unseen by `pocket`, and new ones beside it"
    seen,unseen = themed(photos, seed, theme)
    data,fresh = folder/name,folder/'new'
    for o in (data/'images', fresh): o.mkdir(parents=True, exist_ok=True)
    test,later,rest = unseen[:n_test],unseen[n_test:n_test+new],unseen[n_test+new:]
    train,others = seen[:n_train],(seen[n_train:]+rest)[:plain]
    lines,rng = [],random.Random(f'caption {seed}')
    for k,(row,split) in enumerate([(o,'train') for o in train]+[(o,'test') for o in test]+[(o,'') for o in others]):
        file = f'images/{name}-{k:04}.jpg' if rename else f"images/{Path(row['file']).name}"
        shutil.copyfile(photos/row['file'], data/file)
        if split: lines.append(dict(file=file, split=split, captions=[plain_words(rng.choice(row['captions']))]))
    write_lines(data/'captions.jsonl', lines)
    for k,row in enumerate(later): shutil.copyfile(photos/row['file'], fresh/f'{k:02}.jpg')
    return data,fresh,dict(theme=theme.pattern, train=len(train), test=len(test), without=len(others), new=len(later),
                           unseen_by_the_encoder=len(test)+len(rest)+len(later))

# ---- what came out

def table_of(run):
    "Rows and scores of a run, and what it says about stage 2"
    scores = read_json(run/'scores.json')
    wanted = ('cider','clip_score','p_at_1_100','bleu4','repetition','distinct','mean_length','cpu_seconds')
    rows = {r:{k:round(v, 4) for k,v in o.items() if k in wanted} for r,o in scores['rows'].items()}
    dev = {r:round(o['cider'], 4) for r,o in scores.get('dev', {}).items()}
    return dict(rows=rows, dev_cider=dev)

def gain_of(run, row='stage2_policy'):
    "The paired difference of a row and stage 1 in CIDEr, with its interval"
    each = read_json(run/'each.json')
    a,b = (np.array(each[o]['cider'], dtype=float) for o in (row, 'stage1'))
    return [round(float(o), 4) for o in paired_difference(a, b)]

def lines_with(said, *starts):
    "Lines of an output that begin so"
    return [o.strip() for o in said.splitlines() if o.strip().startswith(starts)]

def account(sh, run, **more):
    "The account of a user"
    said = {o['command'].split()[0]+str(k):o['said'] for k,o in enumerate(sh.log)}
    text = '\n'.join(said.values())
    log = [{k:v for k,v in o.items() if k!='said'} for o in sh.log]
    sight = next(iter(re.findall(r'finds the right one among 100 in (\d+) % \((\d+) to (\d+)\)', text)), ())
    return dict(**minutes(sh.log), log=log, verdict=lines_with(text, 'stage 2: ')[-1:],
                retrieval=list(map(int, sight)), kept=lines_with(text, 'kept: ')[-1:],
                gain_said=lines_with(text, 'stage2_policy minus', 'stage2_expert minus')[-1:], **table_of(run),
                gain={r:gain_of(run, r) for r in read_json(run/'each.json') if r.startswith('stage2')}, **more)

def look_sheet(rows, out, folder):
    "Photos with their captions as one picture to look at and count by; it stays in the work folder"
    import matplotlib.pyplot as plt
    fig,axs = plt.subplots(4, 6, figsize=(18,13))
    for ax,o in zip(axs.flat, rows):
        ax.imshow(Image.open(folder/o['file']).convert('RGB'))
        text = o['caption']+(' (?)' if o.get('unsure') else '')
        ax.set_title(f"{Path(o['file']).stem}: "+'\n'.join(re.findall(r'.{1,34}(?:\s|$)', text)), fontsize=10)
        ax.axis('off')
    fig.tight_layout()
    fig.savefig(out, dpi=70)

def go(sh, name, fresh, settings=()):
    "The four commands"
    sh('clipcap_init', name)
    sh('clipcap_check', f'{name}.toml')
    sh('clipcap_train', f'{name}.toml', *settings)
    sh('clipcap_caption', f'runs/{name}-seed0', fresh.name, '--html', 'captions.html')
    said = sh('clipcap_caption', f'runs/{name}-seed0', fresh.name, '--jsonl')
    sh.log = sh.log[:4]              # the fifth is ours: it gives the sheet to count by
    rows = [json.loads(o) for o in said['said'].splitlines() if o.startswith('{')]
    look_sheet(rows, sh.folder/'sheet.png', sh.folder)
    return rows

# ---- mistakes

def forked(bin, folder, argv, user=None):
    "A console script in a fork of this process, which has its imports behind it; exit status and output"
    out = folder/'said.txt'
    out.write_text('')
    pid = os.fork()
    if not pid:
        import runpy
        from fastcore import script
        script._cli_func.set(None)              # as if it were the first command of this process
        fd = os.open(out, os.O_WRONLY|os.O_APPEND)
        os.chdir(folder)
        for k in (1,2): os.dup2(fd, k)
        sys.argv = [str(bin/argv[0]), *map(str, argv[1:])]
        os.environ |= dict(CLIPCAP_HOME=str(folder/'home'), TQDM_DISABLE='1')
        status = 1
        try:
            if user:
                os.setgroups([])
                os.setgid(user)
                os.setuid(user)
            runpy.run_path(sys.argv[0], run_name='__main__')
            status = 0
        except SystemExit as e:
            if isinstance(e.code, str): print(e.code, file=sys.stderr)
            status = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]),out.read_text()

def typed(folder, run, out):
    "What somebody typed into the page, and the command that adds it"
    page = (folder/'label.html').read_text()
    items = json.loads(page.split('id="data">')[1].split('</script>')[0])['items']
    name = f"typed-{Path(out).stem}.jsonl"
    write_lines(folder/name, [dict(file=items[0 if '2' in out else 1]['file'], captions=['two red stars'])])
    return 'clipcap_label',run,'--add',name,'--out',out

few = ['steps=20','expert_steps=8','expert_rounds=1','expert_null=20','policy_steps=3','policy_batch=4',
       'max_new_tokens=12','rows=stage1,stage2_expert','keep=stage2_expert']

def small_folder(folder, n=40, plain=30, seed=4712, kind='jsonl', captioned=None):
    "A small folder of scenes in other colours"
    ds = ToyScenes(n+plain, seed, n_captions=1)
    (folder/'images').mkdir(parents=True)
    for i,scene in enumerate(ds.scenes): draw_other(scene, f'{seed} {i}').save(folder/'images'/f'{i:05}.png')
    rows = [dict(file=f'images/{i:05}.png', captions=list(ds.captions[i]) if captioned is None or i<captioned else [])
            for i in range(n)]
    if kind=='jsonl': write_lines(folder/'captions.jsonl', rows)
    return folder,ds

def mistakes(bin, folder, user=65534):
    "What a user does wrong, what is said, and whether it ends well"
    import clipcap_ssl.pipeline.experiment, clipcap_ssl.models.captioner, clipcap_ssl.pipeline.check # noqa: once, for all forks
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    found = []
    def note(mistake, *argv, works=False, says=(), user=None):
        began = time.time()
        status,said = forked(bin, folder, argv, user)
        lines = [o for o in said.splitlines() if o.strip()]
        says = (says,) if isinstance(says, str) else says
        good = (status==0)==works and 'Traceback' not in said and all(o in said for o in says)
        found.append(dict(mistake=mistake, command=' '.join(map(str, argv)), status=status, good=good,
            lines=len(lines), seconds=round(time.time()-began, 1), said=said.replace(f'{folder}/', '')[-700:]))
        print('good' if good else 'BAD ', mistake, '|', status, '|', said.replace(f'{folder}/', '')[-400:].strip(), '\n', flush=True)
        return said
    sets = [x for o in few for x in ('--set', o)]
    # 1) names
    small_folder(folder/'shapes')
    note('a folder that is not there', 'clipcap_check', 'shaeps', says='no folder')
    note('a folder that is not there', 'clipcap_init', 'shaeps', says='no folder')
    note('the photos without their captions', 'clipcap_check', 'shapes/images', says='captions')
    note('the photos without their captions', 'clipcap_init', 'shapes/images', says='captions')
    note('the folder above', 'clipcap_init', '.', says='captions')
    note('a folder where a recipe belongs', 'clipcap_train', 'shapes', says='clipcap_init')
    note('a photo where a folder belongs', 'clipcap_init', 'shapes/images/00000.png')
    # 2) no splits, half of the captions, none
    note('no splits', 'clipcap_init', 'shapes', works=True, says='shapes.splits.jsonl')
    small_folder(folder/'half', captioned=20)
    note('half of the captions missing', 'clipcap_init', 'half', works=True, says='without')
    note('half of the captions missing', 'clipcap_train', 'half.toml', *sets, works=True, says='Written to')
    small_folder(folder/'bare', kind='none')
    note('no captions at all', 'clipcap_check', 'bare', says='captions')
    note('no captions at all', 'clipcap_init', 'bare', says='captions')
    small_folder(folder/'three', captioned=3)
    note('three captions', 'clipcap_init', 'three', says='five are the least')
    # 3) a typo
    note('a typo in a setting', 'clipcap_train', 'shapes.toml', '--set', 'polcy_steps=3', says="did you mean 'policy_steps'")
    note('a word where a number belongs', 'clipcap_train', 'shapes.toml', '--set', 'steps=many', says='steps is int')
    recipe = (folder/'shapes.toml').read_text()
    (folder/'typo.toml').write_text(recipe.replace('n_dev ', 'n_devs '))
    note('a typo in the recipe', 'clipcap_train', 'typo.toml', says="did you mean 'n_dev'")
    (folder/'quote.toml').write_text(recipe.replace('"none"', 'none').replace('lm = "toy"', 'lm = toy'))
    note('quotation marks missing in the recipe', 'clipcap_train', 'quote.toml', says='quote.toml')
    note('an unknown option', 'clipcap_train', 'shapes.toml', '--stesp', '3')
    # 4) links
    (folder/'links'/'images').mkdir(parents=True)
    for o in sorted((folder/'shapes'/'images').iterdir()): (folder/'links'/'images'/o.name).symlink_to(o)
    (folder/'links'/'captions.jsonl').symlink_to(folder/'shapes'/'captions.jsonl')
    (folder/'links'/'images'/'99999.png').symlink_to(folder/'gone.png')
    note('photos and captions are links', 'clipcap_init', 'links', works=True)
    note('photos and captions are links, one of them to nothing', 'clipcap_train', 'links.toml', *sets, works=True, says='cannot be read')
    (folder/'linked').symlink_to(folder/'shapes')
    note('the folder is a link', 'clipcap_init', 'linked', works=True)
    # 5) photos later, the same command again
    note('(a run)', 'clipcap_train', 'shapes.toml', *sets, works=True, says='Written to')
    note('the same command again', 'clipcap_train', 'shapes.toml', *sets, works=True, says='done before')
    ds = ToyScenes(10, 4713)
    for i in range(10): draw_other(ds.scenes[i], i).save(folder/'shapes'/'images'/f'new-{i}.png')
    note('photos added, nothing else', 'clipcap_train', 'shapes.toml', *sets, works=True, says='10 of the photos')
    note('photos added, then clipcap_init', 'clipcap_init', 'shapes', says='--force')
    note('photos added, then clipcap_init --force', 'clipcap_init', 'shapes', '--force', works=True)
    note('photos added, into the old run', 'clipcap_train', 'shapes.toml', *sets, says='--out')
    note('photos added, into a new run', 'clipcap_train', 'shapes.toml', *sets, '--out', 'runs/more', works=True)
    # 6) moved
    (folder/'elsewhere').mkdir()
    (folder/'runs'/'more').rename(folder/'elsewhere'/'mine')
    note('the run was moved', 'clipcap_caption', 'elsewhere/mine', 'shapes/images/00001.png', works=True)
    note('the run was moved', 'clipcap_label', 'elsewhere/mine', '--next', '3', works=True)
    note('captions typed later', *typed(folder, 'elsewhere/mine', 'shapes/captions-2.jsonl'), works=True, says='captions more')
    printed = re.search(r'clipcap_train .*', found[-1]['said'])[0].split()
    note('captions typed later, the command as it was printed', *printed, works=True, says='Written to')
    note('captions typed a second time', *typed(folder, 'elsewhere/mine-2', 'shapes/captions-3.jsonl'), works=True, says='captions more')
    (folder/'shapes').rename(folder/'figures')
    note('the photos were moved', 'clipcap_label', 'elsewhere/mine', '--next', '3', says='shapes')
    note('the photos were moved', 'clipcap_train', 'shapes.toml', *sets, says='shapes')
    note('the photos were moved, captions of others', 'clipcap_caption', 'elsewhere/mine', 'figures/images/00001.png', works=True)
    (folder/'figures').rename(folder/'shapes')
    note('a run that is not there', 'clipcap_caption', 'runs/none', 'shapes/images/00001.png', says='no folder')
    note('a recipe where a run belongs', 'clipcap_caption', 'shapes.toml', 'shapes/images/00001.png')
    note('a photo that is not there', 'clipcap_caption', 'runs/shapes-seed0', 'shapes/images/nope.png', says='nope.png')
    # 7) tables as spreadsheets write them
    for k,(name,text) in enumerate({'with a byte order mark': '\ufefffile,caption\n', 'with semicolons': 'file;caption\n',
                                    'without a first line': ''}.items()):
        data = folder/f'table{k}'
        small_folder(data, n=30, kind='none')
        sep = ';' if ';' in text else ','
        rows = ToyScenes(30, 4712, n_captions=1).captions
        (data/'captions.csv').write_text(text+''.join(f'images/{i:05}.png{sep}{o[0]}\n' for i,o in enumerate(rows)), encoding='utf-8')
        note(f'a table {name}', 'clipcap_init', data.name, works=bool(text), says='' if text else 'the first line names the columns')
    # 8) rights
    for o in (folder/'home', folder/'runs'): subprocess.run(['chmod', '-R', 'a+rwX', str(o)])
    small_folder(folder/'locked')
    (folder/'locked'/'images').chmod(0)
    note('photos that may not be read', 'clipcap_init', 'locked', user=user, says='ermission')
    (folder/'locked'/'images').chmod(0o755)
    (folder/'locked'/'captions.jsonl').chmod(0)
    note('captions that may not be read', 'clipcap_check', 'locked', user=user, says='ermission')
    (folder/'locked').chmod(0)
    note('a folder that may not be opened', 'clipcap_check', 'locked', user=user, says='ermission')
    (folder/'locked').chmod(0o755)
    (folder/'closed').mkdir()
    note('a place where nothing may be written', 'clipcap_init', 'shapes', '--out', 'closed/shapes.toml', user=user, says='ermission')
    note('a place where nothing may be written', 'clipcap_train', 'shapes.toml', *sets, '--out', 'closed/run', user=user, says='ermission')
    return found


# ---- all of it

def commit():
    "The commit of this checkout, with + if files differ from it"
    def git(*args):
        return subprocess.run(['git', '-C', Path(__file__).parent, *args], capture_output=True, text=True).stdout.strip()
    return git('rev-parse', '--short=12', 'HEAD')+('+' if git('status', '--porcelain', '-uno') else '')


@call_parse
def main(
    photos:Path=None, # Folder of photos with captions.jsonl, for the user with a theme
    bin:Path=Path(sys.executable).parent, # Where the commands lie: those of a fresh environment
    work:Path=Path('imitation_users'), # Folder for data and runs, of which nothing is kept
    only:str='theme scenes mistakes', # Which users
    seed:int=4711, # Of photos, scenes and captions
    budget:str='15m', # Time that training may take, as clipcap_train --budget has it
    looked:str='', # What was counted by eye, as theme=RIGHT,PARTLY,WRONG scenes=RIGHT,PARTLY,WRONG
    install:str='', # What the environment took, as WALL,CPU in minutes
    out:Path=Path('nbs/results/data/imitation_users.json'), # The account
):
    "Imitate users, and keep what it took, what came out and what they were told"
    work = work.resolve()
    found = read_json(out) if out.is_file() else {}
    found |= dict(commit=commit(), seed=seed, threads=1)
    if install: found['install_minutes'] = list(map(float, install.split(',')))
    if 'scenes' in only:
        sh = Shell(bin, work/'scenes')
        if not (work/'scenes'/'shapes').is_dir(): scene_user(work/'scenes', seed=seed)
        go(sh, 'shapes', work/'scenes'/'new', ('--budget', budget))
        found['scenes'] = account(sh, work/'scenes'/'runs'/'shapes-seed0')
    if 'theme' in only and photos:
        sh = Shell(bin, work/'theme')
        if not (work/'theme'/'dogs').is_dir(): write_json(work/'theme'/'parts.json', photo_user(work/'theme', photos, seed=seed)[2])
        go(sh, 'dogs', work/'theme'/'new', ('--budget', budget))
        found['theme'] = account(sh, work/'theme'/'runs'/'dogs-seed0', data=read_json(work/'theme'/'parts.json'))
    if 'mistakes' in only: found['mistakes'] = mistakes(bin, work/'mistakes')
    for o in looked.split():
        name,_,counts = o.partition('=')
        found[name]['looked'] = dict(zip(('right','partly','wrong'), map(int, counts.split(','))))
    write_json(out, found)
