"""HeBA: heterogeneous bottleneck adapters for CLIP (arXiv 2603.16653), as the official code computes it.

With h the output of a block's first norm, or of the first linear layer of its MLP, the adapted stream is

    h + s A(h),    A(h) = LayerNorm(h + up(GELU(mid(down(h)))))

on the patches of images, where `mid` is a depthwise 3x3 convolution, and on the tokens of texts, without `mid`
(`adapters.py`). The logits of an image are exp(logit_scale) cos(image, w_k), with w_k the normalised mean of the
normalised features of the prompts of class k (`heba.fit.adapters` has the loss, `heba.fit.draws` the draws).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heba.clip.features import Classes, class_features, cosine_logits, encode_prompts
from heba.data.images import Images, LabelledImages, decode_all
from heba.fit.draws import text_bank
from heba.fit.run import Progress, Run, silent
from heba.methods.heba.adapters import Variant
from heba.methods.heba.model import AdaptedCLIP
from heba.methods.heba.settings import Settings
from heba.methods.heba.training import train as train_adapters


def build(clip: Any, n_classes: int, settings: Settings, seed: int) -> AdaptedCLIP:
    """The adapters on `clip`, as they are before the training; the draws are those of `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        variant = Variant.of(settings.model_dump())
        model = AdaptedCLIP(clip, settings.start, settings.end, settings.scale, settings.ratio, variant=variant)
    return model.to(clip.logit_scale.device)


def trained(model: AdaptedCLIP) -> nn.Module:
    return model.adapters


def fit(
    model: AdaptedCLIP,
    train: LabelledImages,
    val: LabelledImages,
    classes: Classes,
    settings: Settings,
    run: Run,
) -> dict[str, float]:
    with run.progress(len(train.files), "decode training images") as done:
        images = decode_all(train.files, done, train.as_seen)
    with run.autocast(model.clip.logit_scale.device):
        bank = text_bank(model, classes)
    train_adapters(model, images, train.labels, bank, settings, run)
    return {}


def classifier(
    model: AdaptedCLIP, classes: Classes, settings: Settings, trained: bool, progress: Progress = silent
) -> dict[str, Tensor]:
    """weights [n_classes, E], normalised, and the scale s, which is another one for classes that are new."""
    scale = settings.scale if trained or settings.scale_novel is None else settings.scale_novel

    def encode(tokens: Tensor) -> Tensor:
        return model.encode_text(tokens, scale)

    with progress(len(classes.tokens), "prompts") as done:
        where = model.clip.logit_scale.device
        features = encode_prompts(model.clip, classes.tokens, encode, where, progress=done)
    weights = class_features(features, classes.index, len(classes.names))
    return {"weights": weights, "scale": torch.tensor(scale)}


def logits(model: AdaptedCLIP, classifier: dict[str, Tensor], images: Images) -> Tensor:
    scales = classifier["scale"].to(images.pixels.device).expand(model.end - model.start + 1)
    hidden = images.after_blocks(model.clip, model.start - 1)
    features = F.normalize(model.encode_image_from(hidden, scales).float(), dim=-1)
    return cosine_logits(model.logit_factor(), features, classifier["weights"])


def detach(model: AdaptedCLIP) -> None:
    model.detach()
