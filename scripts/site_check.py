"""The built site as a reader's browser has it, without a network: python scripts/site_check.py [FOLDER] [--pictures FOLDER]

FOLDER is what scripts/docs.py made (default _docs). Every page is opened in Chromium, wide in light colours and narrow in dark ones, and a
fault is: anything asked of another address, a file that is not there, an error in the console, a link or anchor that leads nowhere, a
picture without a text, a page wider than the window, code or a table that is cut instead of scrolled, text that is hard to read on its
background. Then the search is used. What is wrong is printed, then the counts, and the exit status says whether they are zero.

--pictures leaves a picture of the pages that one looks at first. Needs Chromium and selenium: see scripts/chromium.py."""
import argparse, configparser, http.server, json, sys, tempfile, threading
from collections import Counter
from pathlib import Path
from urllib.parse import unquote, urlsplit
from chromium import browser
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

top = Path(__file__).resolve().parent.parent
shapes = [('wide', 1400, 900, 'light'), ('narrow', 390, 844, 'dark')]
words = ['leave_one_out', 'leave-one-out', 'from_pretrained', 'photo_world']
asked = ['asked of another address', 'link that leads nowhere', 'anchor that is not there', 'picture without a text']  # printed when zero, too
looked_at = ['index', 'policy_gradient', 'settings', 'tutorials/your_photos', 'results/main', 'results/cost', 'results/pocket', 'appendix/check']

# What is wrong with the page that is open: [[kind, what], ...], and its links
look = r'''
const faults = [], say = (kind, o) => faults.push([kind, String(o).trim().replace(/\s+/g, ' ').slice(0, 100)])
const shown = o => o.checkVisibility({opacityProperty: true, visibilityProperty: true}) && o.getClientRects().length
for (const o of document.images) {
  if (!o.alt.trim()) say('picture without a text', o.src)
  if (!o.complete || !o.naturalWidth) say('picture that does not load', o.src)
}
if (document.documentElement.scrollWidth > innerWidth) say('page wider than the window', document.documentElement.scrollWidth)
for (const o of document.querySelectorAll('article pre, article table, article math[display=block], article img')) {
  if (!shown(o)) continue
  let up = o, scrolls = false
  for (; up && up.tagName != 'ARTICLE'; up = up.parentElement) scrolls ||= ['auto', 'scroll'].includes(getComputedStyle(up).overflowX)
  scrolls ||= [...o.querySelectorAll('code')].some(c => ['auto', 'scroll'].includes(getComputedStyle(c).overflowX))
  if (!scrolls && o.getBoundingClientRect().right > innerWidth) say('cut at the right', o.textContent || o.src)
}
const rgba = s => (s.match(/[\d.]+/g) || []).map(Number)
const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true})
const parse = s => {
  if (s.startsWith('rgb')) { const [r, g, b, a=1] = rgba(s); return [r, g, b, a] }
  canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = s; canvas.fillRect(0, 0, 1, 1)
  const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data
  return [r, g, b, a / 255]
}
const over = (f, b) => [0, 1, 2].map(i => f[i]*f[3] + b[i]*(1-f[3])).concat(1)
const behind = o => {
  const layers = []
  for (; o; o = o.parentElement) {
    const c = parse(getComputedStyle(o).backgroundColor)
    if (c[3]) layers.push(c)
    if (c[3] == 1) break
  }
  return layers.reduceRight((b, f) => over(f, b), [255, 255, 255, 1])
}
const light = c => [.2126, .7152, .0722].reduce((sum, w, i) => sum + w*((v => v <= .03928 ? v/12.92 : ((v+.055)/1.055)**2.4)(c[i]/255)), 0)
const seen = new Set()
for (const root of document.querySelectorAll('article, .md-sidebar, .md-header, .md-footer')) {
  const walk = document.createTreeWalker(root, NodeFilter.SHOW_TEXT)
  while (walk.nextNode()) {
    const o = walk.currentNode.parentElement
    if (!walk.currentNode.textContent.trim() || !shown(o) || o.closest('script, style, noscript, svg, .md-clipboard')) continue
    const css = getComputedStyle(o), back = behind(o), key = css.color + back + css.fontSize
    if (seen.has(key)) continue
    seen.add(key)
    const [a, b] = [light(over(parse(css.color), back)), light(back)].sort((x, y) => y - x), ratio = (a + .05)/(b + .05)
    const large = parseFloat(css.fontSize) >= 24 || (parseFloat(css.fontSize) >= 18.66 && css.fontWeight >= 700)
    if (ratio < (large ? 3 : 4.5)) say('hard to read', `${ratio.toFixed(2)} ${css.color} on ${back.slice(0, 3).map(Math.round)}: <${o.tagName.toLowerCase()} class="${o.className}"> ${walk.currentNode.textContent}`)
  }
}
return {faults, links: [...document.querySelectorAll('a[href]')].map(o => o.href), ids: [...document.querySelectorAll('[id], a[name]')].map(o => o.id || o.name)}
'''

def serve(folder):
    "A server of `folder` on this machine alone, below the path that the published site has, and its address."
    settings = configparser.ConfigParser(delimiters=['='])
    settings.read(top/'settings.ini', encoding='utf-8')
    base = settings['DEFAULT']['doc_baseurl']

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *a): super().__init__(*a, directory=str(folder))
        def translate_path(self, path): return super().translate_path(path.removeprefix(base))
        def log_message(self, *a): pass

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f'http://127.0.0.1:{server.server_port}{base}/'

def requests(b, home):
    "What the browser asked of others, and what it asked for in vain, since the last call."
    faults = []
    for o in b.get_log('performance'):
        m = json.loads(o['message'])['message']
        if m['method'] == 'Network.requestWillBeSent':
            url = m['params']['request']['url']
            if not url.startswith((home, 'data:', 'blob:', 'about:')): faults.append(('asked of another address', url[:100]))
        if m['method'] == 'Network.responseReceived' and m['params']['response']['status'] >= 400:
            faults.append(('not there', m['params']['response']['url']))
    return faults + [('error in the console', o['message'][:150]) for o in b.get_log('browser') if o['level'] == 'SEVERE']

def set_shape(b, width, height, scheme):
    "A window of another size, of a reader who has not chosen colours yet."
    if b.current_url.startswith('http'):
        b.execute_script('localStorage.clear()')
        b.get('about:blank')                   # an open page would see the colours change, and remember its own
    b.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 600))
    b.execute_cdp_cmd('Emulation.setEmulatedMedia', dict(features=[dict(name='prefers-color-scheme', value=scheme)]))

def lead_nowhere(links, ids, home):
    "Links between pages whose page or anchor is not there; how many links lead elsewhere."
    faults, away = [], 0
    for page, url in links:
        if not url.startswith(home):
            away += 1
            continue
        o = urlsplit(url)
        name, anchor = unquote(url.split('#')[0].removeprefix(home)) or 'index.html', unquote(o.fragment)
        if name.endswith('/'): name += 'index.html'
        if name not in ids and not name.endswith(('.png', '.ipynb', '.svg')): faults.append((page, 'link that leads nowhere', url))
        elif anchor and name in ids and anchor not in ids[name]: faults.append((page, 'anchor that is not there', url))
    return faults, away

def search(b, home, word):
    "The pages that the search finds for `word`, best first."
    b.get(f'{home}index.html')
    field = b.find_element(By.CSS_SELECTOR, '.md-search__input')
    b.execute_script("document.querySelector('[data-md-toggle=search]').click()")
    WebDriverWait(b, 30).until(lambda _: field.is_displayed())
    field.send_keys(word)
    WebDriverWait(b, 30).until(lambda _: b.find_elements(By.CSS_SELECTOR, '.md-search-result__item'))
    found = b.execute_script("return [...document.querySelectorAll('.md-search-result__item > a')].map(o => o.href)")
    return [o.removeprefix(home).split('?')[0] + ('#' + urlsplit(o).fragment if urlsplit(o).fragment else '') for o in found]

def visit(b, home, pages):
    "Open every page in every shape: faults, links between and out of pages, and the anchors of each page."
    faults, links, ids = [], set(), {}
    for shape, *how in shapes:
        set_shape(b, *how)
        for page in pages:
            b.get(home + page)
            found = b.execute_script(look)
            ids[page] = {*found['ids'], '__top'}
            links |= {(page, o) for o in found['links'] if o.startswith('http')}
            faults += [(f'{page} ({shape})', *o) for o in found['faults'] + requests(b, home)]
    return faults, links, ids

def use_search(b, home, folder, pictures):
    "Look for each word: faults where none of the first three places has it."
    faults = []
    set_shape(b, *shapes[0][1:])
    for word in words:
        found = search(b, home, word)
        text = ''.join((folder/o.split('#')[0]).read_text(encoding='utf-8') for o in found[:3])
        print(f'search for {word}: {len(found)} places, first {", ".join(found[:3])}')
        if word.replace('-', '_') not in text: faults.append((word, 'found in the wrong place', found[0]))
        if pictures: b.save_screenshot(str(pictures/f'search-{word}.png'))
        faults += [(f'search for {word}', *o) for o in requests(b, home)]
    return faults

def take_pictures(b, home, pictures):
    "Pictures of the pages that one looks at first."
    for shape, *how in [*shapes, ('wide-dark', 1400, 900, 'dark')]:
        set_shape(b, *how)
        for page in looked_at:
            b.get(f'{home}{page}.html')
            b.save_screenshot(str(pictures/f'{page.replace("/", "-")}-{shape}.png'))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folder', nargs='?', default=top/'_docs'), p.add_argument('--pictures', type=Path)
    args = p.parse_args()
    folder = Path(args.folder).resolve()
    pages = sorted(o.relative_to(folder).as_posix() for o in folder.rglob('*.html'))
    if 'index.html' not in pages: raise SystemExit(f'{folder} has no index.html. Build the site first: python scripts/docs.py')
    if args.pictures: args.pictures.mkdir(parents=True, exist_ok=True)
    server, home = serve(folder)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as tmp:
        b = browser(1400, 900, Path(tmp))
        try:
            b.get('about:blank')
            for o in ('performance', 'browser'): b.get_log(o)                     # what the browser's own first page asked for
            faults, links, ids = visit(b, home, pages)
            faults += use_search(b, home, folder, args.pictures)
            if args.pictures: take_pictures(b, home, args.pictures)
        finally: b.quit()
    server.shutdown()
    lost, away = lead_nowhere(links, ids, home)
    faults = list(dict.fromkeys([*faults, *lost]))
    for o in faults: print(*o, sep=': ')
    kinds = Counter(kind for _, kind, _ in faults)
    print(f'{len(pages)} pages, {len(links) - away} links between them, {away} links elsewhere (not followed)')
    for kind in dict.fromkeys((*asked, *kinds)): print(f'{kinds[kind]:5d}  {kind}')
    return int(bool(faults))

if __name__ == '__main__': sys.exit(main())
