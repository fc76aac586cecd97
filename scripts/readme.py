"""README.md from nbs/index.ipynb: python scripts/readme.py [--check]

With --check nothing is written: the exit status says whether README.md, its figures and its links are as they should be."""
import re, sys
from pathlib import Path
import nbformat
from nb2md import outside_code, to_markdown

top = Path(__file__).resolve().parent.parent
note = '<!-- Made from nbs/index.ipynb by scripts/readme.py: edit the notebook. -->\n\n'

def _relink(text):
    "Links relative to nbs/ become relative to the top."
    return re.sub(r'(\]\(|<img [^>]*?src=")(?![a-z]+:|#|/|nbs/)([^)\s"]+)', r'\1nbs/\2', text).replace('(nbs/../', '(')

def build():
    "{path: bytes} of all that the notebook gives."
    nb = nbformat.read(top/'nbs/index.ipynb', 4)
    text, figures = to_markdown(nb, 'images', 'readme')
    files = {'nbs/'+k: v for k, v in figures.items()}
    return {'README.md': (note + outside_code(_relink, text)).encode(), **files}

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
        elif not file.exists() or file.read_bytes() != data: bad.append(f'{path} is not what nbs/index.ipynb gives: run scripts/readme.py')
    bad += [f'README.md links to {o}, which is not there' for o in dead_links((top/'README.md').read_text(encoding='utf-8'))]
    for o in bad: print(o)
    return bool(bad)

if __name__ == '__main__': sys.exit(main('--check' in sys.argv[1:]))
