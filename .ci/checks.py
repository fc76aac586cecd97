"""The checks of .ci/run that are more than one command: python .ci/checks.py NAME [ARGUMENT...], in the top folder of a checkout"""
import ast, configparser, graphlib, io, json, re, subprocess, sys, tarfile, tokenize, zipfile
from importlib import metadata
from pathlib import Path

def settings():
    "settings.ini"
    cfg = configparser.ConfigParser(delimiters=['='])
    cfg.read('settings.ini', encoding='utf-8')
    return cfg['DEFAULT']

def tracked(*patterns):
    "Files under version control."
    return subprocess.run(['git', 'ls-files', '-z', '--', *patterns], check=True, capture_output=True, text=True).stdout.split('\0')[:-1]

def canonical(name):
    "A distribution's name as registries compare it."
    return re.sub(r'[-_.]+', '-', re.split(r'[<>=!~;\[\s]', name, maxsplit=1)[0]).lower()

def code_cells(path):
    "The sources of a notebook's code cells, magics and shell lines left out."
    cells = [c for c in json.loads(Path(path).read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
    return [re.sub(r'^\s*[%!].*', '', ''.join(c['source']), flags=re.M) for c in cells]

def imported(tree, optional=True):
    "Names of the modules that `tree` imports, in full; without the `optional` ones, those inside `try`."
    if not optional and isinstance(tree, ast.Try): return set()
    found = {o.name for o in tree.names} if isinstance(tree, ast.Import) else set()
    if isinstance(tree, ast.ImportFrom):
        base = 'clipcap_ssl' + (f'.{tree.module}' if tree.module else '') if tree.level else tree.module
        found = {f'{base}.{o.name}' for o in tree.names} if base == 'clipcap_ssl' else {base}
    return found.union(*(imported(o, optional) for o in ast.iter_child_nodes(tree)))

def command(name):
    "Print the commands that stand in README.md under the marker `<!-- name -->`."
    found = re.search(rf'<!-- {name} -->\s*```\w*\n(.*?)^```', Path('README.md').read_text(encoding='utf-8'), re.M | re.S)
    if not found: return [f'README.md has no block of commands under <!-- {name} -->']
    print(found[1].strip())

def notebooks():
    "Print what nbdev_test runs; none may be left out by its front matter or by a .notest file."
    files = [o for o in tracked('nbs/*.ipynb') if not any(p[0] in '_.' for p in Path(o).parts)]
    print(*files, sep='\n')
    bad = [f'{o}: skip_exec' for o in files if re.search(r'skip_exec:\s*true', Path(o).read_text(encoding='utf-8'), re.I)]
    return bad + [f'{o} switches its neighbours off' for o in tracked('nbs/**.notest', 'nbs/.notest')]

def chapters():
    """{notebook: its place}: chapters of the story by number and letter. Everything else has no place: the appendix, and the overview, which
    exports nothing and shows what the chapters build."""
    found = {o: re.match(r'(\d+)([a-z]?)_', Path(o).name) for o in tracked('nbs/*.ipynb')}
    return {o: (int(m[1]), m[2]) for o, m in found.items() if m and Path(o).parent == Path('nbs') and Path(o).name != '00_overview.ipynb'}

def exports():
    "{module: the notebook that exports it}."
    found = {o: re.search(r'#\| *default_exp ([\w.]+)', Path(o).read_text(encoding='utf-8')) for o in tracked('nbs/*.ipynb')}
    return {m[1]: o for o, m in found.items() if m}

def own(names, modules):
    "The package's modules among imported `names`, and the names that are none of them."
    found, odd = set(), set()
    for m in names:
        if not m.startswith('clipcap_ssl.'): continue
        parts = m.split('.')[1:]
        hit = next((k for i in range(len(parts), 0, -1) if (k := '.'.join(parts[:i])) in modules), None)
        if hit: found.add(hit)
        elif len(parts) > 1: odd.add(m)
    return found, odd

def order():
    "A chapter imports from earlier chapters or from the appendix, and modules form no cycle."
    place, module, bad = chapters(), exports(), []
    for o in tracked('nbs/*.ipynb'):
        used, odd = own(set().union(*(imported(ast.parse(c)) for c in code_cells(o))), module)
        bad += [f'{o} imports {m}, which no notebook exports' for m in sorted(odd)]
        if o in place: bad += [f'{o} imports {m} of the later {module[m]}' for m in sorted(used) if place.get(module[m], (-1, '')) > place[o]]
    bad += cycles(module)
    return bad

def requires():
    "The package imports only what settings.ini requires."
    bad = []
    required, owners = {canonical(o) for o in settings()['requirements'].split()}, metadata.packages_distributions()
    for o in tracked('clipcap_ssl/*.py'):
        for m in sorted({m.split('.')[0] for m in imported(ast.parse(Path(o).read_text(encoding='utf-8')), optional=False)}):
            if m in sys.stdlib_module_names or m == 'clipcap_ssl': continue
            if not required & {canonical(d) for d in owners.get(m, [])}: bad.append(f'{o} imports {m}, which settings.ini does not require')
    return bad

def absolute(tree, path):
    "Names of the modules that the module at `path` imports, relative ones in full; what only type checkers see is left out."
    if isinstance(tree, ast.If) and ast.unparse(tree.test) == 'TYPE_CHECKING': return set()
    found = {o.name for o in tree.names} if isinstance(tree, ast.Import) else set()
    if isinstance(tree, ast.ImportFrom):
        up = Path(path).parts[:-tree.level] if tree.level else ()
        base = '.'.join([*up, *([tree.module] if tree.module else [])])
        found = {f'{base}.{o.name}' for o in tree.names}
    return found.union(*(absolute(o, path) for o in ast.iter_child_nodes(tree)))

def cycles(modules):
    "Modules that import each other, in a circle."
    files = {m: Path('clipcap_ssl', *m.split('.')).with_suffix('.py') for m in modules}
    graph = {m: own(absolute(ast.parse(f.read_text(encoding='utf-8')), f), modules)[0] - {m} for m, f in files.items()}
    try: list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as e: return ['modules import each other: ' + ' -> '.join(e.args[1])]
    return []

def cells():
    """What the documentation would lose or trip over. Text beside the title in its cell is dropped, and a cell that holds an
    import is run, without the cells before it: so imports have a cell of their own."""
    bad = []
    for o in tracked('nbs/*.ipynb'):
        text = [''.join(c['source']) for c in json.loads(Path(o).read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'markdown']
        title = next((c for c in text if re.search(r'^# ', c, re.M)), None)
        if title is None: bad.append(f'{o} has no title')
        elif not re.fullmatch(r'# .+(\n+> .+)?', title.strip()): bad.append(f'{o}: the cell of the title holds more than `# Title` and one line `> what it does`')
    for o in tracked('nbs/*.ipynb'):
        for i, source in enumerate(code_cells(o), 1):
            kinds = {isinstance(c, (ast.Import, ast.ImportFrom)) for c in ast.parse(source).body}
            if len(kinds) == 2 and not re.search(r'^#\| *exports?i?\b|nbdev_export\(\)', source, re.M):
                bad.append(f'{o}, code cell {i} mixes imports with other code: {source[:60]!r}')
    return bad

def joined(source):
    "Numbers of the lines of code in which `;` joins statements."
    found = []
    try:
        for t in tokenize.generate_tokens(io.StringIO(source).readline):
            if t.type == tokenize.OP and t.string == ';' and t.line[t.end[1]:].strip(): found.append(t.start[0])
    except tokenize.TokenError: pass
    return found

def prose(source):
    "Markdown without code, formulas, links' targets and addresses."
    for o in (r'```.*?```', r'`[^`]*`', r'\$\$.*?\$\$', r'\$[^$\n]*\$', r'\]\([^)]*\)', r'<[^>]+>', r'https?://\S+'): source = re.sub(o, ' ', source, flags=re.S)
    return source

def style(*names):
    """What CONTRIBUTING.md promises of a notebook's form: lines of at most 100 characters (120 for a parameter with its comment), no `;` that
    joins statements, no literature that is no key of references.bib, no figure without an alt text, few semicolons in prose."""
    keys = set(re.findall(r'^@\w+\{([^,]+),', Path('nbs/references.bib').read_text(encoding='utf-8'), re.M))
    param, bad = re.compile(r'^\s*(\*|[A-Za-z_]\w*\s*[:=,].*|\)\s*->.*)#'), []
    for o in names or tracked('nbs/*.ipynb'):
        words = semicolons = 0
        for i, c in enumerate(json.loads(Path(o).read_text(encoding='utf-8'))['cells']):
            source, where = ''.join(c['source']), f'{o}, cell {i}'
            if c['cell_type'] == 'code':
                for n, line in enumerate(source.split('\n'), 1):
                    if not line.startswith('#|') and len(line) > (120 if param.match(line) else 100): bad.append(f'{where}, line {n} has {len(line)} characters')
                bad += [f'{where}, line {n} joins statements with ;' for n in joined(re.sub(r'^\s*[%!].*', '', source, flags=re.M))]
                shows = any(k.startswith('image/') for out in c.get('outputs', []) for k in out.get('data', {}))
                if shows and not re.search(r'^#\| *fig-alt: *\S', source, re.M): bad.append(f'{where} shows a figure and has no `#| fig-alt: ...`')
            elif c['cell_type'] == 'markdown':
                text = prose(source)
                bad += [f'{where} cites {k}, which references.bib lacks' for g in re.findall(r'\[(-?@[^\]]+)\]', text) for k in re.findall(r'@([\w:-]+)', g) if k not in keys]
                bad += [f'{where}: cite by key, not "{m}"' for m in re.findall(r'[A-Z][\w-]+ (?:et al\.|and [A-Z][\w-]+),? \(?\d{4}\)?', text)]
                bad += [f'{where}: an image without an alt text' for _ in re.findall(r'!\[\s*\]\(', source)]
                words += len(text.split())
                semicolons += text.count(';')
        if semicolons > max(1, words/300): bad.append(f'{o}: {semicolons} semicolons in {words} words of prose, one in 300 is the limit')
    return bad

def pins():
    "Every installed distribution is pinned in constraints.txt, and installed as pinned."
    lines = [o.split('#')[0].strip() for o in Path('constraints.txt').read_text(encoding='utf-8').splitlines()]
    pinned = {canonical(o): o.split('==')[1] for o in lines if o}
    own = {'clipcap-ssl', 'pip', 'setuptools', 'wheel', 'triton'}
    there = {canonical(d.name): d.version.split('+')[0] for d in metadata.distributions()}
    there = {k: v for k, v in there.items() if k not in own and not k.startswith(('nvidia-', 'cuda-'))}
    bad = [f'constraints.txt lacks {k}=={v}' for k, v in there.items() if k not in pinned]
    bad += [f'{k} is pinned to {pinned[k]}, and {v} is installed' for k, v in there.items() if pinned.get(k, v) != v]
    return sorted(bad)

def paths():
    "No tracked text names a folder of somebody's machine."
    place = re.compile(r'(?<![\w.~})/-])/(?:home|root|Users|work|workspace|tmp|mnt|media|private|var|srv|opt)/[\w.-]+|\b[A-Z]:\\\\?Users\\')
    bad = []
    for o in tracked():
        if Path(o).is_symlink() or b'\0' in Path(o).read_bytes()[:8000]: continue
        for i, line in enumerate(Path(o).read_text(encoding='utf-8', errors='replace').splitlines(), 1):
            bad += [f'{o}:{i}: {m[0]}' for m in place.finditer(line)]
    return bad

def archives(folder):
    "The sdist and the wheel in `folder` hold every module, recipe and asset."
    sdist, wheel = next(Path(folder).glob('*.tar.gz')), next(Path(folder).glob('*.whl'))
    with tarfile.open(sdist) as f: names = {'sdist': {o.split('/', 1)[-1] for o in f.getnames()}}
    with zipfile.ZipFile(wheel) as f: names['wheel'] = set(f.namelist())
    want, bad = tracked('clipcap_ssl'), []
    for part in ('recipes/*.toml', 'assets/*'):
        if not tracked(f'clipcap_ssl/{part}'): bad.append(f'nothing is tracked in clipcap_ssl/{part}')
    for kind, have in names.items(): bad += [f'the {kind} lacks {o}' for o in want if o not in have]
    bad += [f'the sdist lacks {o}' for o in ('settings.ini', 'setup.py', 'README.md', 'LICENSE') if o not in names['sdist']]
    return bad

def installed(prefix):
    "The package as installed under `prefix`: imported from there, every module and every command."
    import importlib, pkgutil, clipcap_ssl
    here = Path(clipcap_ssl.__file__).resolve()
    if not here.is_relative_to(Path(prefix).resolve()): return [f'imported from {here}, not from {prefix}']
    for m in pkgutil.walk_packages(clipcap_ssl.__path__, 'clipcap_ssl.'): importlib.import_module(m.name)
    bad = []
    for o in metadata.distribution('clipcap_ssl').entry_points:
        if o.group != 'console_scripts': continue
        try: o.load()
        except (ImportError, AttributeError) as e: bad.append(f'settings.ini promises the command {o.name}: {e}')
    return bad

def alone():
    """Every module can be imported alone in a new process, what its `__all__` names is there, answers a
    call without arguments (or says which it lacks), and has annotations that can be read; wherever `Captioner` can be had, it is the
    whole class; `import clipcap_ssl` and what commands need for their help import no torch."""
    own = [('.'.join(Path(o).with_suffix('').parts)) for o in tracked('clipcap_ssl/**.py') if not Path(o).name.startswith('_')]
    code = """import importlib, inspect, os, sys
names, light, whole = {names!r}, {light!r}, {whole!r}
for name in [*light, None, *(o for o in names if o not in light)]:
    if name is None: # libraries are imported once and not in every child
        from clipcap_ssl.core import ensure_torchvision
        ensure_torchvision()
        import accelerate, open_clip, pycocoevalcap, transformers
        continue
    if pid := os.fork():
        if os.waitpid(pid, 0)[1]: print(f'{{name}} does not stand alone')
        continue
    code = 1
    try:
        m = importlib.import_module(name)
        heavy = name in light and 'torch' in sys.modules
        lost = [o for o in getattr(m, '__all__', []) if not hasattr(m, o)]
        part = [o for o in whole if hasattr(m, 'Captioner') and not hasattr(m.Captioner, o)]
        if lost: print(f'{{name}} promises {{lost}}', flush=True)
        for o in getattr(m, '__all__', []):
            if callable(f := getattr(m, o, None)) and getattr(f, '__module__', '') == name:
                try: inspect.signature(f, eval_str=True)
                except (NameError, AttributeError, SyntaxError) as e: print(f'{{name}}.{{o}}: an annotation cannot be read: {{e}}', flush=True)
                except ValueError: continue # no signature to be had, as of some classes
                needs = [a for a in inspect.signature(f).parameters.values() if a.default is a.empty and a.kind < 2]
                if inspect.isclass(f) or name.endswith('.cli') or o == 'clipcap_study': continue
                try: f()
                except TypeError as e:
                    if not needs: print(f'{{name}}.{{o}}() does not work: {{e}}', flush=True)
                except ValueError: pass # it says what it lacks
                except Exception as e: print(f'{{name}}.{{o}}() does not work: {{type(e).__name__}}: {{e}}', flush=True)
        if part: print(f'{{name}}: Captioner lacks {{part}}', flush=True)
        if heavy: print(f'{{name}} imports torch', flush=True)
        code = 0
    except Exception as e: print(f'{{name}}: {{type(e).__name__}}: {{e}}', flush=True)
    finally: os._exit(code)
"""
    light = ['clipcap_ssl', 'clipcap_ssl.core', 'clipcap_ssl.pipeline.config', 'clipcap_ssl.pipeline.cli', 'clipcap_ssl.report.study']
    whole = ['caption', 'embed', 'attach', 'encoder', 'save_pretrained', 'from_pretrained', 'push_to_hub', 'set_card', 'device', 'dtype']
    r = subprocess.run([sys.executable, '-c', code.format(names=['clipcap_ssl', *own], light=light, whole=whole)], capture_output=True, text=True)
    return r.stdout.splitlines() + (r.stderr.splitlines()[-3:] if r.returncode else [])

if __name__ == '__main__':
    checks = {f.__name__: f for f in (command, notebooks, order, cells, style, requires, alone, pins, paths, archives, installed)}
    if len(sys.argv) < 2 or sys.argv[1] not in checks: sys.exit(f'{__doc__}\nNAME is one of: {", ".join(checks)}')
    problems = checks[sys.argv[1]](*sys.argv[2:]) or []
    for o in problems: print(o, file=sys.stderr)
    sys.exit(bool(problems))
