"Image captioning from few captions and many plain photos"
__version__ = "0.1.0"

import sys

def _as_command():
    "In a command of ours: Ctrl-C while Python imports ends without a word, and so does a reader that has gone"
    import atexit, os, signal
    def last_words():
        try: sys.stdout.flush()
        except OSError: os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler: signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    if hasattr(sys.stdout, 'reconfigure'): sys.stdout.reconfigure(errors='backslashreplace')
    atexit.register(last_words)

if sys.argv and sys.argv[0].replace('\\', '/').rpartition('/')[2].startswith('clipcap_'): _as_command()

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .metrics.coco import score_captions
    from .models.captioner import Captioner
    from .models.encoder import load_encoder
    from .pipeline.config import load_config
    from .pipeline.experiment import run
    from .report.evaluate import evaluate

# The front door: name -> module. A module is imported when its name is first asked for, so `import clipcap_ssl` loads no torch.
_homes = {
    'Captioner': 'models.captioner',
    'load_encoder': 'models.encoder',
    'load_config': 'pipeline.config',
    'run': 'pipeline.experiment',
    'score_captions': 'metrics.coco',
    'evaluate': 'report.evaluate',
}
__all__ = ['Captioner', 'evaluate', 'load_config', 'load_encoder', 'run', 'score_captions']

def __getattr__(name):
    if name not in _homes: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    found = getattr(import_module(f'.{_homes[name]}', __name__), name)
    globals()[name] = found
    return found

def __dir__(): return sorted({*globals(), *_homes})
