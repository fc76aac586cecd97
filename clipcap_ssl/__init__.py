"Image captioning from few captions and many plain photos"
__version__ = "0.1.0"

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
