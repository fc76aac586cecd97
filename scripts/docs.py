"""The documentation without Quarto: python scripts/docs.py [FOLDER]

nbdev processes the notebooks exactly as it does for Quarto (into _proc), each becomes Markdown with the exported code where it
stood, and mkdocs-material builds the site into FOLDER (default _docs). The table of contents is _quarto.yml's. Mathematics becomes
MathML, so that the site works without a network.
Errors are: broken links and anchors, citations that nbs/references.bib lacks, notebooks missing from the table of contents,
formulas that cannot be converted, pictures without a text, pages without a description, and anything that a browser would fetch
from elsewhere."""
import html, os, re, subprocess, sys, tempfile, shutil
from pathlib import Path
import nbformat, yaml
from latex2mathml.converter import convert
from nb2md import add_source, outside_code, to_markdown

top = Path(__file__).resolve().parent.parent

def frontmatter(nb):
    "What nbdev put before the first cell: the title, the description, the page's name."
    return yaml.safe_load(nb.cells.pop(0).source.strip().strip('-')) if nb.cells and nb.cells[0].cell_type == 'raw' else {}

def number(path):
    "A chapter's number from its file's name: 14a of 14a_stage2.ipynb."
    m = re.match(r'0*(\d+[a-z]?)_', Path(path).name)
    return f'{m[1]}. ' if m else ''

def nav(items, names, titles):
    "mkdocs' table of contents from Quarto's sidebar; chapters with their numbers."
    def one(o):
        if isinstance(o, dict): return {o['section']: nav(o['contents'], names, titles)}
        if o == 'index.ipynb': return {'Home': names[o]}
        return {number(o) + titles[o]: names[o]} if o in titles else names.get(o, o)
    return [one(o) for o in items]

def bibliography(text):
    "{key: (authors, year, the line in the list)} from BibTeX."
    res = {}
    for key, body in re.findall(r'^@\w+\{([^,]+),\n(.*?)^\}', text, re.M | re.S):
        f = {k: re.sub(r'\{\\`i\}', 'ì', v).replace('{', '').replace('}', '') for k, v in re.findall(r'^\s*(\w+)\s*=\s*\{(.*)\},?$', body, re.M)}
        lost = [k for k in ('title', 'author', 'year') if k not in f]
        if lost: raise SystemExit(f'references.bib: {key} has no {", ".join(lost)}')
        if key in res: raise SystemExit(f'references.bib has {key} twice')
        names = [o.split(',')[0] for o in f['author'].split(' and ')]
        short = names[0] if len(names) == 1 else ' and '.join(names) if len(names) == 2 else f'{names[0]} et al.'
        parts = [f'{", ".join(names)} ({f["year"]})', f'*{f["title"]}*', f.get('booktitle') or f.get('journal') or '']
        if 'eprint' in f: parts[2:] = [f.get('booktitle', 'arXiv'), f'[arXiv:{f["eprint"]}](https://arxiv.org/abs/{f["eprint"]})']
        elif 'doi' in f or 'url' in f: parts.append(f'[link]({f.get("url") or "https://doi.org/" + f["doi"]})')
        res[key] = short, f['year'], '. '.join(o for o in parts if o)
    return res

def cite(text, bib, up):
    "Replace `[@key; @key]` by links into the list of references."
    def _one(m):
        keys = re.findall(r'@([\w:-]+)', m[1])
        unknown = [k for k in keys if k not in bib]
        if unknown: raise SystemExit(f'references.bib has no {unknown[0]}')
        return '(' + '; '.join(f'[{bib[k][0]} {bib[k][1]}]({up}references.md#{k})' for k in keys) + ')'
    return re.sub(r'\[(-?@[\w:-]+(?:;\s*-?@[\w:-]+)*)\](?!\()', _one, text)

def relink(text, folder, names, site):
    "Links to notebooks and to the published site become links between pages."
    def _one(m):
        path, anchor = m[1], (m[2] or '').replace('.', '')
        if path.startswith(site): path = os.path.relpath(path[len(site):].strip('/').removesuffix('.html') + '.md', folder)
        else: path = os.path.relpath(names.get(os.path.normpath(os.path.join(folder, path)), os.path.join(folder, path)), folder)
        return f']({path}{anchor})'
    return re.sub(r'\]\(((?:' + re.escape(site) + r'/?[\w/-]*\.html)|(?![a-z]+:)[^)\s#]+)(#[^)\s]*)?\)', _one, text)

def page(nb, front, rel, dest, pages, edit):
    "Write one processed notebook as the page `dest`, its figures beside it."
    if 'description' not in front: raise SystemExit(f'{rel} has no line that says what it is about: "> ..." under its title')
    head = f'# {number(rel)}{front["title"]}\n\n> {front["description"]}\n\n'
    about = yaml.safe_dump({'description': re.sub(r'[`*]', '', front['description'])}, allow_unicode=True, width=1000)
    text, figures = to_markdown(nb, rel.stem + '_files', rel.stem)
    (pages/dest).parent.mkdir(parents=True, exist_ok=True)
    (pages/dest).write_text(f'---\n{about}---\n' + outside_code(edit, head + text), encoding='utf-8')
    for k, v in figures.items():
        file = (pages/dest).parent/k
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(v)

def _double_struck(letter):
    "A capital such as the expectation's: browsers leave mathvariant alone."
    return {'C': 'ℂ', 'H': 'ℍ', 'N': 'ℕ', 'P': 'ℙ', 'Q': 'ℚ', 'R': 'ℝ', 'Z': 'ℤ'}.get(letter) or chr(0x1d538 + ord(letter) - ord('A'))

def mathml(text):
    "Formulas of a built page as MathML, which browsers draw themselves."
    def _one(m):
        tex = html.unescape(m[2])
        try: res = convert(tex, display='block' if m[1] == 'div' else 'inline')
        except Exception as e: raise SystemExit(f'the formula {tex!r} cannot be converted: {e}')
        res = re.sub(r'<(mi|mo)>(log|exp|max|min|sim|std|mean|softmax|onehot|sg)</\1>', r'<\1>\2</\1><mspace width=".15em"/>', res)
        return re.sub(r'<mi mathvariant="double-struck">([A-Z])</mi>', lambda o: f'<mi>{_double_struck(o[1])}</mi>', res)
    return re.sub(r'<(div|span) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', _one, text, flags=re.S)

def linked_figures(text):
    "A figure leads to itself alone, so that one can see it in full on a small screen."
    return re.sub(r'<img alt="[^"]*" src="(\w+_files/[^"]+)" ?/?>', lambda m: f'<a href="{m[1]}">{m[0]}</a>', text)

def finish(out):
    "Convert the formulas of every page, and return what is wrong with the pages."
    faults = []
    for file in sorted(out.rglob('*.html')):
        text = linked_figures(mathml(file.read_text(encoding='utf-8')))
        file.write_text(text, encoding='utf-8')
        name = file.relative_to(out)
        if 'class="arithmatex"' in text: faults.append(f'{name}: a formula was not converted')
        for tag in re.findall(r'<(?:script|link|img|iframe|source)\b[^>]*>', text):
            away = re.search(r'(?:src|href)="((?:https?:)?//[^"]+)"', tag)
            if away and 'rel="canonical"' not in tag: faults.append(f'{name} fetches {away[1]}')
            if tag.startswith('<img') and not re.search(r'alt="[^"]+"', tag): faults.append(f'{name}: a picture without a text: {tag[:100]}')
        if name.name != '404.html' and '<meta name="description"' not in text: faults.append(f'{name} has no description')
    return faults

def config(cfg, contents, pages, out):
    "mkdocs' configuration; everything that can be wrong with a link is a warning, and a warning is an error."
    warn = dict.fromkeys(('not_found', 'anchors', 'absolute_links', 'unrecognized_links'), 'warn')
    def shade(scheme, icon, other): # follows the reader's system until the reader chooses
        toggle = {'icon': f'material/{icon}', 'name': f'To {other} colours'}
        media = '(prefers-color-scheme: dark)' if scheme == 'slate' else '(prefers-color-scheme: light)'
        return {'media': media, 'scheme': scheme, 'toggle': toggle}
    return {
        'site_name': cfg.title, 'site_url': f'{cfg.doc_host}{cfg.doc_baseurl}/', 'site_description': cfg.description,
        'docs_dir': str(pages), 'site_dir': str(out), 'nav': contents, 'strict': True, 'extra_css': ['styles.css'],
        'use_directory_urls': False,
        # no repo_url: the theme would ask GitHub for stars on every page
        'extra': {'generator': False, 'social': [{'icon': 'fontawesome/brands/github', 'link': cfg.git_url, 'name': 'Source on GitHub'}]},
        'plugins': [{'search': {'separator': r'[\s\-_,:!=\[\]()"/`.]+'}}],
        'theme': {'name': 'material', 'font': False,
                  'features': ['navigation.sections', 'navigation.footer', 'navigation.top', 'toc.integrate', 'content.code.copy', 'search.highlight'],
                  'palette': [shade('default', 'weather-night', 'dark'), shade('slate', 'weather-sunny', 'light')]},
        'validation': {'nav': {'omitted_files': 'warn', 'not_found': 'warn', 'absolute_links': 'warn'}, 'links': warn},
        'markdown_extensions': ['attr_list', 'md_in_html', 'tables', 'footnotes', {'toc': {'permalink': True}}, 'pymdownx.superfences',
                                {'pymdownx.highlight': {'use_pygments': True, 'pygments_lang_class': True}}, {'pymdownx.arithmatex': {'generic': True}}]}

def main(out):
    "Build the site into `out` and return mkdocs' exit status."
    from nbdev.config import get_config
    from nbdev.doclinks import nbglob
    from nbdev.serve import proc_nbs
    os.chdir(top)
    cfg = get_config()
    cache = proc_nbs(force=True, n_workers=2)
    books = {o.relative_to(cache): nbformat.read(o, 4) for o in sorted(cache.rglob('*.ipynb'))}
    lost = {o.relative_to(cfg.nbs_path) for o in nbglob(as_path=True)} - books.keys()
    if lost: raise SystemExit(f'nbdev made nothing of {sorted(map(str, lost))}')
    fronts = {rel: frontmatter(nb) for rel, nb in books.items()}
    names = {str(rel): str(rel.parent/Path(f.get('output-file', rel.name)).with_suffix('.md')) for rel, f in fronts.items()}
    titles = {str(rel): f['title'] for rel, f in fronts.items() if str(rel) != 'index.ipynb'}
    names['references.qmd'] = 'references.md'
    bib = bibliography((cfg.nbs_path/'references.bib').read_text(encoding='utf-8'))
    contents = yaml.safe_load((top/'_quarto.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']
    with tempfile.TemporaryDirectory() as tmp:
        pages = Path(tmp)/'pages'
        shutil.copytree(cache, pages, ignore=shutil.ignore_patterns('*.ipynb', '*.qmd', '*.yml', '*.bib'))
        for rel, nb in books.items():
            def edit(text): return relink(cite(text, bib, '../'*(len(rel.parts)-1)), str(rel.parent), names, cfg.doc_host + cfg.doc_baseurl)
            add_source(nb, nbformat.read(cfg.nbs_path/rel, 4))
            page(nb, fronts[rel], rel, names[str(rel)], pages, edit)
        lines = [f'- <a id="{k}"></a>{o[2]}' for k, o in sorted(bib.items(), key=lambda o: o[1])]
        (pages/'references.md').write_text('---\ndescription: Papers that the pages cite\n---\n# References\n\n' + '\n'.join(lines) + '\n', encoding='utf-8')
        conf = Path(tmp)/'mkdocs.yml'
        conf.write_text(yaml.safe_dump(config(cfg, nav(contents, names, titles), pages, out)), encoding='utf-8')
        build = [sys.executable, '-m', 'mkdocs', 'build', '--strict', '-f', conf]
        status = subprocess.run(build, env={**os.environ, 'NO_MKDOCS_2_WARNING': '1'}).returncode
    if status: return status
    faults = finish(out)
    for o in faults: print(o, file=sys.stderr)
    print(f'{out/"index.html"} (a browser searches it only from a server: python -m http.server --directory {out})')
    return int(bool(faults))

if __name__ == '__main__': sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else top/'_docs').resolve()))
