"Notebook to Markdown, as README.md and the documentation pages need it"
import re
from nbconvert import MarkdownExporter
from nbformat.v4 import new_markdown_cell

_directive = re.compile(r'^#\|[ \t]*([\w-]+):?[ \t]*(.*)$', re.M)
_hidden = {'hide', 'default_exp', 'export', 'exporti'}
_fence = re.compile(r'^(```.*?^```[ \t]*$)', re.M | re.S)
_shows_doc = re.compile(r'^show_doc\((\w+)', re.M)
_longest_open = 30 # lines of code that are shown without a click

def _shown(cell):
    "Whether readers see `cell`; its `#|` lines and Quarto's `:::` lines are taken out on the way."
    if cell.cell_type == 'markdown': cell.source = re.sub(r'^:::.*\n?', '', cell.source, flags=re.M)
    if cell.cell_type != 'code': return bool(cell.source.strip())
    flags = dict(_directive.findall(cell.source))
    cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip('\n')
    cell.metadata['alt'] = flags.get('fig-alt', '').strip('"')
    cell.metadata['transient'] = {'remove_source': flags.get('echo') == 'false' or not cell.source}
    return not (flags.keys() & _hidden) and flags.get('include') != 'false' and bool(cell.source or cell.outputs)

def to_markdown(nb,         # a notebook, as nbformat reads it; changed in place
                figures,    # folder of its figures, relative to the page that is made
                name,       # first part of the figures' file names
               ):           # the text, and {path of a figure: its bytes}
    "What a reader of `nb` sees, as Markdown."
    nb.cells = [c for c in nb.cells if _shown(c)]
    bad = [o.ename for c in nb.cells for o in c.get('outputs', []) if o.output_type == 'error']
    if bad: raise ValueError(f'a cell of {name} has stored an error: {bad[0]}')
    nb.metadata['language_info'] = {'name': 'python'}
    text, res = MarkdownExporter().from_notebook_node(nb, {'output_files_dir': figures, 'unique_key': name})
    def _alt(m): return f'![{nb.cells[int(m[2])].metadata.get("alt") or m[1]}]({m[0].split("](")[1]}'
    text = re.sub(rf'!\[(\w+)\]\({re.escape(figures)}/{re.escape(name)}_(\d+)_\d+\.\w+\)', _alt, text)
    text = re.sub(r'[ \t]+$', '', text, flags=re.M)
    return re.sub(r'\n{3,}', '\n\n', text).strip() + '\n', res.get('outputs', {})

def outside_code(f,     # a function from text to text
                 text   # Markdown
                ):      # Markdown in which `f` was applied to everything but fenced code
    "Apply `f` to the prose of `text`."
    return ''.join(p if i % 2 else f(p) for i, p in enumerate(_fence.split(text)))

def _exported(cell):
    "The code of an exported cell with a body, or nothing."
    flags = dict(_directive.findall(cell.source)) if cell.cell_type == 'code' else {}
    if not flags.keys() & {'export', 'exporti'}: return ''
    code = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip('\n')
    body = [o for o in code.splitlines() if o.strip() and not re.match(r'(from|import|#|\)|    \w+(, \w+)*,?$)', o)]
    return code if body else ''

def _code_block(code):
    "Code as Markdown: open where it is short, else behind a line that says how much there is."
    lines = code.count('\n')+1
    fence = f'```python\n{code}\n```'
    if lines <= _longest_open: return fence
    names = ', '.join(re.findall(r'^(?:def|class) (\w+)', code, re.M))
    return f'<details class="code" markdown="1"><summary>Code: {names} ({lines} lines)</summary>\n\n{fence}\n\n</details>'

def add_source(nb,      # a notebook as nbdev processed it for the site: signatures instead of exported code
               written  # the same notebook as it was written
              ):        # `nb`, with the code of every exported cell where it stood
    "Put the code back under the signatures; a signature that is short and stands in the code is left out."
    at = {c.id: i for i, c in enumerate(nb.cells)}
    cells, done = [], 0
    for cell in written.cells:
        code = _exported(cell)
        if cell.id in at: cells, done = cells + nb.cells[done:at[cell.id] + 1], at[cell.id] + 1
        if not code: continue
        while done < len(nb.cells):
            name = _shows_doc.search(nb.cells[done].source)
            if not name or not re.search(rf'^(?:def|class) {name[1]}\b|^{name[1]}\b', code, re.M): break
            if code.count('\n') < _longest_open: _without_signature(nb.cells[done])
            cells.append(nb.cells[done])
            done += 1
        cells.append(new_markdown_cell(_code_block(code)))
    nb.cells = cells + nb.cells[done:]
    return nb

def _without_signature(cell):
    "Leave the name and the meaning of what a cell shows."
    for o in cell.get('outputs', []):
        data = o.get('data', {})
        if 'text/markdown' in data: data['text/markdown'] = _fence.sub('', ''.join(data['text/markdown']))
