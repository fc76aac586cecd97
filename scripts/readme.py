"""README.md from nbs/index.ipynb, and CONTRIBUTING.md's table of modules from the notebooks' titles: python scripts/readme.py [--check]

With --check nothing is written: the exit status says whether both, the figures and the links are as they should be."""
import re, sys
from pathlib import Path
import nbformat
from nb2md import outside_code, to_markdown

top = Path(__file__).resolve().parent.parent
note = '<!-- Made from nbs/index.ipynb by scripts/readme.py: edit the notebook. -->\n\n'

def _relink(text):
    "Links relative to nbs/ become relative to the top."
    return re.sub(r'(\]\(|<img [^>]*?src=")(?![a-z]+:|#|/|nbs/)([^)\s"]+)', r'\1nbs/\2', text).replace('(nbs/../', '(')

def modules():
    "CONTRIBUTING.md with its table of modules: chapters first, in their order, then the appendix."
    rows = []
    for path in sorted((top/'nbs').rglob('[0-9a-z]*.ipynb')):
        cells = nbformat.read(path, 4).cells
        found = re.search(r'^#\| *default_exp ([\w.]+)', '\n'.join(c.source for c in cells), re.M)
        if found is None: continue
        line = re.search(r'^> (.+)', cells[0].source, re.M)[1]
        where = path.relative_to(top).as_posix()
        rows.append(('appendix' in path.parts, where, f'| `{found[1]}` | [{path.stem}]({where}) | {line} |'))
    table = '\n'.join(['| module | notebook | what it is for |', '|---|---|---|', *(r for *_, r in sorted(rows))])
    text = (top/'CONTRIBUTING.md').read_text(encoding='utf-8')
    return re.sub(r'(<!-- modules:.*?-->\n).*?(<!-- end of modules -->)', lambda m: f'{m[1]}\n{table}\n\n{m[2]}', text, flags=re.S)

def build():
    "{path: bytes} of all that the notebooks give."
    nb = nbformat.read(top/'nbs/index.ipynb', 4)
    text, figures = to_markdown(nb, 'images', 'readme')
    files = {'nbs/'+k: v for k, v in figures.items()}
    return {'README.md': (note + outside_code(_relink, text)).encode(), 'CONTRIBUTING.md': modules().encode(), **files}

def dead_links(text):
    "Relative links of `text` that lead nowhere."
    found = []
    outside_code(lambda s: found.extend(re.findall(r'\]\((?![a-z]+:|#)([^)#\s]+)', s)) or s, text)
    return [o for o in found if not (top/o).exists()]

def main(check):
    "Write the files, or compare them with what is there."
    bad = []
    for path, data in build().items():
        file = top/path
        if not check:
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(data)
        elif not file.exists() or file.read_bytes() != data: bad.append(f'{path} is not what the notebooks give: run scripts/readme.py')
    bad += [f'README.md links to {o}, which is not there' for o in dead_links((top/'README.md').read_text(encoding='utf-8'))]
    for o in bad: print(o)
    return bool(bad)

if __name__ == '__main__': sys.exit(main('--check' in sys.argv[1:]))
