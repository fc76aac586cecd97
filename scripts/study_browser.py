"""The study's page in a real browser: python scripts/study_browser.py [FOLDER] [--run RUN --row_a ROW --row_b ROW]

Makes a study of 20 pairs (from a run, or from hand-written captions of drawn scenes), answers it by mouse and by keys, saves half of
it, closes the browser, opens it again, goes back and changes an answer, saves the rest, and has clipcap_study report on all files.
Fails if anything is lost, or if the page asks the network for anything. Leaves pictures of the page in FOLDER (default: a temporary
one), wide and narrow, light and dark.

Needs Chromium and selenium: see scripts/chromium.py. Without them it says so and ends with status 77."""
import argparse, base64, http.server, json, tempfile, threading, time
from dataclasses import replace
from pathlib import Path
from chromium import browser
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from PIL import Image
from clipcap_ssl.pipeline.config import load_config, save_config
from clipcap_ssl.core import read_json, write_text
from clipcap_ssl.data.scenes import foil
from clipcap_ssl.report.study_page import make_study, questions, test_photos
from clipcap_ssl.report.study import clipcap_study

odd = '</script><img src=x onerror="document.title=1"> "it\'s" 🐕 כלב 犬 & &amp;'     # must be shown as it is

def tiny_run(folder):
    "A folder that looks like a run's: one row true, one with colours that are wrong, and one caption that is an attack."
    cfg = replace(load_config('scenes'), n_test=60, seed=3)
    ds = test_photos(cfg)
    true, false = zip(*(foil(s, 'colour', i) for i, s in zip(ds.ids, ds.scenes)))
    rows = [dict(id=i, references=c[1:], stage2_policy=f'{odd} {k}' if k % 4 == 0 else b, full=a) for k, (i, c, a, b) in enumerate(zip(ds.ids, ds.captions, true, false))]
    save_config(cfg, folder/'config.toml')
    write_text(folder/'captions.jsonl', ''.join(json.dumps(o) + '\n' for o in rows))
    return folder

def check(b, page, log):
    "No request but for the page itself and what it holds; no error in the console."
    for m in (json.loads(o['message'])['message'] for o in b.get_log('performance')):
        if m['method'] == 'Network.requestWillBeSent': log.append(m['params']['request']['url'][:80])
    outside = {o for o in log if not o.startswith(('data:', 'blob:')) and o != page[:80]}
    assert not outside, f'the page asked for {outside}'
    errors = [o['message'] for o in b.get_log('browser') if o['level'] == 'SEVERE']
    assert not errors, errors

def at(b): return b.find_element(By.ID, 'where').text
def done(b, k): return len(b.execute_script('return Object.values(state.answers).filter(o => Object.keys(o).length === 4)')) == k
def wait(b, what): WebDriverWait(b, 60).until(lambda _: what())

def press(b, selector):
    "Scroll to something and click it."
    o = b.find_element(By.CSS_SELECTOR, selector)
    b.execute_script("arguments[0].scrollIntoView({block: 'center'})", o)
    o.click()

def answer_to(o, q, k):
    "What our rater says: the side that the key calls better, a tie for detail, both wrong for every fifth pair."
    if 'a' in (o['left'], o['right']) and k % 5 == 0: return 'neither'
    if q == 'detail': return 'tie'
    return 'left' if o['left'] in ('b', 'true') else 'right'

def answer_item(b, key, k, keys):
    "Answer one item, by keys or by mouse."
    for q in questions:
        value = answer_to(key['items'][str(k)], q, k)
        if keys: b.switch_to.active_element.send_keys({'left': '1', 'right': '2', 'tie': '3', 'neither': '4'}[value])
        else: press(b, f'#q-{q} input[value={value}]')
    wait(b, lambda: b.find_element(By.ID, 'next').is_enabled())
    if keys: b.switch_to.active_element.send_keys(Keys.ENTER)
    else: b.find_element(By.ID, 'next').click()

def chosen(b): return {o.get_attribute('name'): o.get_attribute('value') for o in b.find_elements(By.CSS_SELECTOR, '#form input:checked')}

def labels(b):
    "What a screen reader says of the answers: every one has a name, in a group that has the question's."
    nodes = b.execute_cdp_cmd('Accessibility.getFullAXTree', {})['nodes']
    named = lambda role: [o['name']['value'] for o in nodes if o.get('role', {}).get('value') == role and not o.get('ignored')]
    assert named('radio') == ['Caption 1', 'Caption 2', 'About the same', 'Both are wrong'] * len(questions), named('radio')
    assert set(questions.values()) <= set(named('group') + named('radiogroup')), named('group')
    assert named('image') == ['The picture that both captions are about'] and all(named('button')) and all(named('progressbar'))

def go_back(b, key, k):
    "Back by key, change the last answer and change it again, by key and by arrows, and forward."
    b.switch_to.active_element.send_keys(Keys.BACKSPACE)
    assert at(b) == f'Picture {k-1} of {len(key["items"])}', at(b)
    was = chosen(b)
    assert was == {q: answer_to(key['items'][str(k-1)], q, k-1) for q in questions}, was
    radio = b.find_element(By.CSS_SELECTOR, '#q-overall input:checked')
    radio.send_keys('1')
    assert chosen(b)['overall'] == 'left'
    b.find_element(By.CSS_SELECTOR, '#q-overall input:checked').send_keys(Keys.ARROW_RIGHT)
    b.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert chosen(b)['overall'] == 'tie' and b.switch_to.active_element.get_attribute('name') == 'overall', chosen(b)
    press(b, f'#q-overall input[value={was["overall"]}]')
    b.find_element(By.ID, 'next').click()
    assert at(b) == f'Picture {k} of {len(key["items"])}', at(b)

def saved(b, out, button):
    "Press a button that saves; the file."
    before = set(out.glob('answers-*.json'))
    b.find_element(By.ID, button).click()
    wait(b, lambda: set(out.glob('answers-*.json')) - before)
    return (set(out.glob('answers-*.json')) - before).pop()

def answer_all(page, key, out, size, shots):
    "One rater, in two sittings; returns the two files that were saved."
    n, log, files, profile = len(key['items']), [], [], tempfile.mkdtemp(dir=out)
    b = browser(*size, out, profile)
    try:
        b.get('about:blank')
        for o in ('performance', 'browser'): b.get_log(o)             # what the browser's own first page asked for
        b.get(page)
        shots(b, 'start')
        b.find_element(By.ID, 'name').send_keys(f'Zoë {size[0]}')
        b.find_element(By.ID, 'begin').click()
        shots(b, 'first')
        labels(b)
        said = [o.text for o in b.find_elements(By.CSS_SELECTOR, '.said')]
        assert len(said) == 2 and all(said), said
        assert b.execute_script('return document.documentElement.scrollWidth <= innerWidth'), 'the page is wider than the screen'
        for k in range(1, n + 1):
            assert at(b) == f'Picture {k} of {n}', at(b)
            shown, meant = (b.execute_script(s) for s in ("return [...document.querySelectorAll('.said')].map(o => o.textContent)", f'return items[{k-1}].captions'))
            assert shown == meant, (shown, meant)
            if '</script>' in ''.join(meant): shots(b, 'odd')
            if k == n // 2:                              # two questions in, then the browser is closed
                first = {q: answer_to(key['items'][str(k)], q, k) for q in list(questions)[:2]}
                for q, value in first.items(): press(b, f'#q-{q} input[value={value}]')
                shots(b, 'half')
                files.append(saved(b, out, 'save'))
                check(b, page, log)
                b.quit()
                b = browser(*size, out, profile)
                b.get('about:blank')
                for o in ('performance', 'browser'): b.get_log(o)
                b.get(page)
                assert at(b) == f'Picture {k} of {n}' and done(b, k - 1), 'progress was lost'
                assert chosen(b) == first, 'half an item was lost'
                for q in list(questions)[2:]: press(b, f'#q-{q} input[value={answer_to(key["items"][str(k)], q, k)}]')
                b.switch_to.active_element.send_keys(Keys.ENTER)
                go_back(b, key, k + 1)
            else: answer_item(b, key, k, keys=k % 3 == 1)
        assert b.find_element(By.ID, 'end').is_displayed()
        shots(b, 'end')
        b.refresh()
        assert b.find_element(By.ID, 'end').is_displayed(), 'the end was lost'
        assert b.title == 'Which caption is better?', 'a caption ran as a program'
        files.append(saved(b, out, 'export'))
        check(b, page, log)
        print(f'{size[0]} px: {n} items in two sittings, {len(log)} entries in the network log, none outside the page')
        return files
    finally: b.quit()

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folder', nargs='?'), p.add_argument('--run'), p.add_argument('--row_a'), p.add_argument('--row_b', default='full')
    args = p.parse_args()
    out = Path(args.folder or tempfile.mkdtemp()).resolve()
    out.mkdir(parents=True, exist_ok=True)
    run = Path(args.run) if args.run else tiny_run(out/'run')
    page, keyfile, key = make_study(run, run, args.row_a, row_b=args.row_b, n=20, seed=1, out=out/'study.html')
    print(f'{page.stat().st_size/1e3:.0f} kB, {len(key["items"])} items')

    def shots(b, name):
        width = b.execute_script('return innerWidth')
        b.save_screenshot(str(out/f'study-{width}-{name}.png'))
        if name in ('first', 'half', 'odd'):
            full = b.execute_cdp_cmd('Page.captureScreenshot', dict(captureBeyondViewport=True))
            (out/f'study-{width}-{name}-whole.png').write_bytes(base64.b64decode(full['data']))
        b.execute_cdp_cmd('Emulation.setEmulatedMedia', dict(features=[dict(name='prefers-color-scheme', value='dark')]))
        time.sleep(.3)                                                # colours change slowly
        b.save_screenshot(str(out/f'study-{width}-{name}-dark.png'))
        b.execute_cdp_cmd('Emulation.setEmulatedMedia', dict(features=[]))

    for o in out.glob('answers-*.json'): o.unlink()
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *a): super().__init__(*a, directory=str(out))
        def log_message(self, *a): asked.append(self.path)

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    files = answer_all(page.as_uri(), key, out, (1280, 900), shots)                                                  # from disk
    files += answer_all(f'http://127.0.0.1:{server.server_port}/{page.name}', key, out, (390, 844), shots)           # as a static page
    server.shutdown()
    assert set(asked) == {f'/{page.name}'}, asked                                                                    # not even a favicon
    clipcap_study.__wrapped__([], report=[str(o) for o in files[::-1]], out=str(out/'report.json'))
    report = read_json(out/'report.json')
    assert len(report['raters']) == 2 and report['questions']['overall']['pairs'] == 20 and report['verdict'].startswith(key['b']), report
    assert report['questions']['detail']['ties'] > .7 and report['questions']['overall']['both_wrong']['mean'] > .1, report
    wide, narrow = (Image.open(out/f'study-{w}-half.png').convert('RGB') for w in (1280, 390))
    both = Image.new('RGB', (1280 + 20 + 390, 900), '#888888')
    both.paste(wide, (0, 0)), both.paste(narrow, (1300, 0))
    both.resize((1014, 540), Image.LANCZOS).quantize(64).save(out/'study.png', optimize=True)      # the picture in nbs/images
    print(f'Pictures of the page: {out}')

if __name__ == '__main__': main()
