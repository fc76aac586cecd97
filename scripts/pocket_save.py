"""Make folders that clipcap_ssl loads of what `pocket_train.py` wrote: OUT/encoder
(load_encoder("open_clip:OUT/encoder")) and OUT/captioner (Captioner.from_pretrained). With
--photos, compare captions and similarities with those that the training script noted."""
import json
from pathlib import Path
import torch
from fastcore.script import call_parse
from safetensors.torch import load_file
from tokenizers import Tokenizer, processors
from clipcap_ssl import Captioner, load_encoder
from clipcap_ssl.core import write_json
from clipcap_ssl.data.photos import read_photo
from clipcap_ssl.models.mapper import make_mapper
from clipcap_ssl.train.pretrain import new_encoder, save_encoder
# transformers comes after our encoder module, which mends torchvision
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

def tokenizer(file, end=False):
    "The tokenizer for transformers; with `end` it closes every text, as a text tower wants"
    tok = Tokenizer.from_file(str(file))
    if end:
        tok.post_processor = processors.TemplateProcessing(
            single='$A <eos>', special_tokens=[('<eos>', 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tok, clean_up_tokenization_spaces=False,
        pad_token='<pad>', unk_token='<unk>', bos_token='<eos>', eos_token='<eos>')

def make_encoder(source, folder, cfg, report):
    "Write the encoder's folder; its hash"
    vision = dict(image_size=224, timm_model_name='tf_efficientnet_lite0', timm_pool='avg',
                  timm_proj='linear')
    text = dict(context_length=cfg['context'], width=cfg['text_width'], heads=cfg['text_heads'],
                layers=cfg['text_layers'])
    model = new_encoder(folder, dict(embed_dim=cfg['embed_dim'], vision_cfg=vision, text_cfg=text),
        tokenizer(source/'tokenizer.json', end=True),
        preprocess_cfg=dict(mean=[.5]*3, std=[.5]*3, interpolation='bicubic', resize_mode='squash'))
    model.load_state_dict(load_file(source/'encoder.safetensors'))
    save_encoder(folder, model)
    ids = report.get('trained_on')
    if ids: write_json(folder/'trained_on.json', dict(ids=[*ids['train'], *ids['dev']]))

def make_captioner(source, folder, cfg, *, name, encoder):
    "Write the captioner's folder"
    tok = tokenizer(source/'tokenizer.json')
    lm = GPT2LMHeadModel(GPT2Config(vocab_size=len(tok), n_positions=cfg['positions'],
        n_embd=cfg['width'], n_layer=cfg['layers'], n_head=cfg['heads'],
        activation_function='gelu_pytorch_tanh', resid_pdrop=0., embd_pdrop=0., attn_pdrop=0.,
        bos_token_id=2, eos_token_id=2))
    mapper = make_mapper('grid', 320, cfg['prefix'], cfg['width'],
        n_layers=cfg['mapper_layers'], n_heads=cfg['heads'])
    captioner = Captioner(mapper, lm, tok, encoder_name=encoder.name, encoder_hash=encoder.hash)
    found = captioner.load_state_dict(load_file(source/f'{name}.safetensors'), strict=False)
    if found.unexpected_keys or found.missing_keys!=['lm.lm_head.weight']:
        raise SystemExit(f'{name}.safetensors is of another model: {found}')
    captioner.half().save_pretrained(folder)

def compare(captioner, photos, shown):
    "Share of the noted captions that come out the same, and the largest difference of similarity"
    rows = [json.loads(line) for line in open(photos/'captions.jsonl', encoding='utf-8')]
    at = {r['id']:r for r in rows}
    rows = [at[i] for i in shown['ids']]
    images = [read_photo(photos/r['file']) for r in rows]
    x = captioner.embed(images)
    texts = captioner.write(x, decode='greedy', no_repeat_ngram_size=3, max_new_tokens=24)
    y = captioner.encoder.encode_text([r['captions'][0] for r in rows])
    close = (x[:,0,:y.shape[1]]*y).sum(1)
    same = sum(a==b for a,b in zip(texts, shown['captions']))
    differ = [o for o in zip(texts, shown['captions']) if o[0]!=o[1]]
    worst = (close-torch.tensor(shown['similarity'])).abs().max().item()
    return dict(same=same, of=len(texts), similarity_differs=worst, differ=differ[:5])

@call_parse
def main(
    source:Path, # Folder that pocket_train.py wrote
    out:Path, # Gets encoder/ and captioner/
    name:str='captioner', # Which captioner: captioner or supervised
    photos:Path=None, # Folder with captions.jsonl that it was trained on
):
    "Make folders that clipcap_ssl loads of what pocket_train.py wrote"
    report = json.loads((source/'report.json').read_text())
    cfg = report['cfg']
    make_encoder(source, out/'encoder', cfg, report)
    encoder = load_encoder(f"open_clip:{out/'encoder'}")
    make_captioner(source, out/'captioner', cfg, name=name, encoder=encoder)
    captioner = Captioner.from_pretrained(out/'captioner', encoder=out/'encoder')
    files = [f for part in ('encoder','captioner') for f in (out/part).iterdir()]
    print(f'{sum(f.stat().st_size for f in files)/1e6:.2f} MB,', captioner.dtype)
    if photos and name=='captioner': print(json.dumps(compare(captioner, photos, report['shown'])))
