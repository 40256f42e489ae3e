"""LwEIB (Yang et al. 2025): depthwise convolutions in the blocks of both towers, as the official code has them.

An adapted block takes its tokens x to x'', with s a small weight:

    a = LN1(x),             x' = x + Attention(a + s A(a)),
    h = W1 LN2(x') + b1,    x'' = x' + W2 QuickGELU(h + s M(h)) + b2

A and M are depthwise convolutions without norm, activation or bias: of texts over a token and its two neighbours,
of images 3x3 over the patches; CLS stays as it is. They begin at random, so the model does not begin as CLIP.

A convolution of texts looks one token ahead, so EOT sees the padding behind it. Attention looks back alone: with
two convolutions in each of k blocks, the feature of a text depends on 2k tokens behind EOT and no further, and
texts are cut so far behind the longest.

The logits of an image are exp(logit_scale) cos(image, w_k), with w_k the normalised mean of the normalised
features of the prompts of class k. The loss is the cross-entropy over the classes of a step, with one prompt of
each; a step draws blocks whose s is larger (`heba.fit.draws`). Gradients of A and M are the true ones times 1/s.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heba.clip.blocks import Packing
from heba.clip.features import Classes, class_features, cosine_logits, encode_prompts
from heba.clip.hooks import HookedCLIP, at_places
from heba.clip.towers import image_blocks, padded_texts, text_blocks
from heba.data.images import Images, LabelledImages, decode_all
from heba.fit.adapters import train as train_adapters
from heba.fit.draws import Recipe, text_bank
from heba.fit.gradient import scale_gradient
from heba.fit.run import Progress, Run, silent
from heba.methods.lweib.settings import Settings, negatives

KERNEL = 3


class Convolution(nn.Module):
    """h + s A(h), of texts or of images (`visual`) with so many channels."""

    def __init__(self, width: int, visual: bool) -> None:
        super().__init__()
        kind = nn.Conv2d if visual else nn.Conv1d
        self.conv = kind(width, width, KERNEL, padding=KERNEL // 2, groups=width, bias=False)

    def forward(
        self, h: Tensor, scale: Tensor, grid: tuple[int, int] | None = None, packing: Packing | None = None
    ) -> Tensor:
        """Adapt `h` [..., width] (`heba.clip.hooks.HookedCLIP` has the arguments)."""
        weight = scale * scale_gradient(self.conv.weight, 1 / scale)
        if grid is not None:
            before = h.shape[1] - grid[0] * grid[1]  # CLS
            a = convolve(h[:, before:].unflatten(1, grid), weight).flatten(1, 2)
            return h + F.pad(a.to(h.dtype), (0, 0, before, 0))
        texts = h if packing is None else packing.unpack(h)  # each begins and ends with a zero
        a = convolve(texts.unsqueeze(2), weight.unsqueeze(3)).squeeze(2)
        return h + (a if packing is None else packing.pack(a)).to(h.dtype)


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    """Depthwise convolution of `x` [n, rows, columns, channels] by `weight` [channels, 1, height, width] of odd
    sizes, with zeros beyond the ends."""
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    x = x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    return F.conv2d(x, weight, padding=padding, groups=len(weight)).permute(0, 2, 3, 1)


class Adapters(nn.Module):
    """All convolutions, named as officially: `{text,visual}_adapter.<layer>.{att_conv,mlp_conv}.conv.weight`."""

    def __init__(self, clip: Any, start: int, end: int) -> None:
        super().__init__()
        text, visual = text_blocks(clip).widths, image_blocks(clip).widths
        self.text_adapter = at_places(text, start, end, lambda width: Convolution(width, visual=False))
        self.visual_adapter = at_places(visual, start, end, lambda width: Convolution(width, visual=True))


def build(clip: Any, n_classes: int, settings: Settings, seed: int) -> HookedCLIP:
    """The convolutions on `clip`, as they are before the training; the draws are those of `seed`."""
    start, end = settings.start, settings.end
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapters = Adapters(clip, start, end)
    reach = 2 * (end - start + 1)
    model = HookedCLIP(clip, adapters, start, end, settings.scale, mixes=True, reach=reach)
    return model.to(clip.logit_scale.device)


def trained(model: HookedCLIP) -> nn.Module:
    return model.adapters


def recipe(settings: Settings) -> Recipe:
    return Recipe(
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        label_smoothing=0.0,
        scale_factor=settings.scale_factor,
        slow_ratio=settings.slow_ratio,
        neg_ratio=negatives(settings),
    )


def fit(
    model: HookedCLIP, train: LabelledImages, val: LabelledImages, classes: Classes, settings: Settings, run: Run
) -> dict[str, float]:
    with run.progress(len(train.files), "decode training images") as done:
        images = decode_all(train.files, done, train.as_seen)
    with run.autocast(model.clip.logit_scale.device):
        bank = text_bank(model, classes)
    train_adapters(model, images, train.labels, bank, recipe(settings), run)
    return {}


def classifier(
    model: HookedCLIP, classes: Classes, settings: Settings, trained: bool, progress: Progress = silent
) -> dict[str, Tensor]:
    """weights [n_classes, E], normalised."""
    clip, reach = model.clip, model.reach
    tokens = padded_texts(clip, classes.tokens, reach, classes.tokenizer)
    with progress(len(tokens), "prompts") as done:
        where = clip.logit_scale.device
        features = encode_prompts(clip, tokens, model.encode_text, where, progress=done, reach=reach)
    return {"weights": class_features(features, classes.index, len(classes.names))}


@torch.no_grad()
def logits(model: HookedCLIP, classifier: dict[str, Tensor], images: Images) -> Tensor:
    hidden = images.after_blocks(model.clip, model.start - 1)
    features = F.normalize(model.encode_image_from(hidden).float(), dim=-1)
    return cosine_logits(model.logit_factor(), features, classifier["weights"])


def detach(model: HookedCLIP) -> None:
    model.detach()
