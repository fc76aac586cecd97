"""A headless Chromium that writes down every request, for scripts that look at a page as a reader does.

Needs Chromium or Chrome with its driver, and selenium, which the package does not require:
    apt-get install chromium chromium-driver; pip install selenium
Without them a script says so and ends with status 77. No test of the package needs it."""
import shutil, sys, tempfile

def missing(what):
    print(f'{what}: nothing was tested in a browser. What is needed stands at the top of scripts/chromium.py', file=sys.stderr)
    sys.exit(77)

try:
    from selenium import webdriver
    from selenium.common.exceptions import SessionNotCreatedException
except ImportError: missing('selenium is not installed')

def browser(width, height, downloads, profile=None):
    "A Chromium whose window has this size, and which saves files in `downloads`; fresh, or with what an earlier one kept in `profile`."
    binary = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
    driver = shutil.which('chromedriver')
    if not binary or not driver: missing('No Chromium or no chromedriver')
    o = webdriver.ChromeOptions()
    o.binary_location = binary
    for a in ('--headless=new', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update',
              '--disable-sync', '--disable-dev-shm-usage', '--hide-scrollbars', f'--user-data-dir={profile or tempfile.mkdtemp(dir=downloads)}', f'--window-size={width},{height}'): o.add_argument(a)
    o.add_experimental_option('prefs', {'download.default_directory': str(downloads)})
    o.set_capability('goog:loggingPrefs', {'performance': 'ALL', 'browser': 'ALL'})
    for k in range(3):                                                # on a busy machine the browser may start too late for its driver
        try:
            b = webdriver.Chrome(options=o, service=webdriver.ChromeService(driver))
            break
        except SessionNotCreatedException:
            if k == 2: raise
    b.set_page_load_timeout(300)
    b.execute_cdp_cmd('Network.enable', {})
    b.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 600))
    if width < 600: b.execute_cdp_cmd('Emulation.setTouchEmulationEnabled', dict(enabled=True))
    return b
