"Notebook to Markdown, as README.md and the documentation pages need it"
import re
from nbconvert import MarkdownExporter

_directive = re.compile(r'^#\|[ \t]*([\w-]+):?[ \t]*(.*)$', re.M)
_hidden = {'hide', 'default_exp', 'export', 'exporti'}
_fence = re.compile(r'^(```.*?^```[ \t]*$)', re.M | re.S)

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
