"""MMA (Yang et al. 2024): adapters beside the upper blocks of both towers, with a projection that they share, as
the official code has them.

With h the output of a block's first norm, for every token, the output of the whole block gets added

    y = s (U relu(S relu(D h + d) + c) + u)

D, d, U and u are a tower's own; S [dim, dim] and c are those of the same block of the other tower too. U does
not begin at 0, so the training does not begin at CLIP. The logits of an image are exp(logit_scale) cos(image,
w_k), w_k the feature of "a photo of a {name}." for every data set. The loss is the cross-entropy over all
classes. The adapters get the true gradients / s; the weight decay is not divided. Where the image tower has
fewer blocks than the text tower, the official code fails; here both towers need the adapted blocks, no more.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heba.clip.blocks import Change, Packing
from heba.clip.features import Classes, cosine_logits, encode_prompts
from heba.clip.towers import (
    check_inside,
    embed_images,
    frozen_texts,
    image_blocks,
    run_image_blocks,
    run_text_blocks,
    text_blocks,
)
from heba.data.images import Images, LabelledImages
from heba.data.prompts import TEMPLATE, template_prompts
from heba.fit.batches import Training, crops, descend, train_batches
from heba.fit.gradient import scale_gradient
from heba.fit.loop import Schedule, cosine, make_optimizer
from heba.fit.run import Progress, Run, silent
from heba.fit.work import steps_per_epoch
from heba.methods.mma.settings import Settings


class Adapters(nn.Module):
    """The adapters of blocks `start` to `end` (1-based), under the official names."""

    def __init__(self, text_width: int, visual_width: int, start: int, end: int, dim: int) -> None:
        super().__init__()
        layers = [str(layer) for layer in range(start, end + 1)]

        def active(inside: int, outside: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(inside, outside), nn.ReLU())

        def tower(width: int) -> nn.ModuleDict:
            return nn.ModuleDict(
                {k: nn.ModuleDict({"down": active(width, dim), "up": nn.Linear(dim, width)}) for k in layers}
            )

        self.text_adapter, self.visual_adapter = tower(text_width), tower(visual_width)
        self.shared_adapter = nn.ModuleDict({k: active(dim, dim) for k in layers})
        for linear in self.modules():
            if isinstance(linear, nn.Linear):
                nn.init.kaiming_normal_(linear.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(linear.bias)


class Model(nn.Module):
    """A frozen CLIP and its adapters."""

    def __init__(self, clip: Any, settings: Settings) -> None:
        super().__init__()
        check_inside(clip, "mma")
        text, visual = text_blocks(clip), image_blocks(clip)
        start, end, deepest = settings.start, settings.end, min(len(text.blocks), len(visual.blocks))
        if not start <= end <= deepest:
            raise ValueError(
                f"mma: start {start} and end {end} must satisfy start <= end <= {deepest}, the depth of the "
                f"shallower tower (text {len(text.blocks)}, image {len(visual.blocks)})"
            )
        self.clip, self.first, self.scale = clip.requires_grad_(False).eval(), start - 1, settings.scale
        self.adapters = Adapters(text.widths[0], visual.widths[0], start, end, settings.dim)

    def changes(self, tower: nn.ModuleDict) -> dict[int, Change]:
        """The adapters of a tower beside its blocks, by block (0-based)."""
        return {int(layer) - 1: Change(beside=partial(self.adapt, tower[layer], layer)) for layer in tower}

    def adapt(self, adapter: Any, layer: str, h: Tensor) -> Tensor:
        """y, of h [..., width]."""
        x = self.adapters.shared_adapter[layer](adapter["down"](h))
        return F.linear(x, self.scale * adapter["up"].weight, self.scale * adapter["up"].bias)

    def encode_image(self, images: Tensor) -> Tensor:
        """Features [n, E], not normalised, of preprocessed images [n, 3, size, size]."""
        return self.encode_image_from(embed_images(self.clip, images, self.first))

    def encode_image_from(self, hidden: Tensor) -> Tensor:
        """The same from what enters the first adapted block."""
        return run_image_blocks(self.clip, hidden, self.first, self.changes(self.adapters.visual_adapter))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Features [n, E], not normalised, of tokens [n, context]."""
        return self.encode_text_from(*frozen_texts(self.clip, tokens, self.first))

    def encode_text_from(self, hidden: Tensor, packing: Packing) -> Tensor:
        """The same from what enters the first adapted block."""
        changes = self.changes(self.adapters.text_adapter)
        return run_text_blocks(self.clip, hidden, packing, self.first, changes=changes)

    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        """[n, n_classes], of features [n, E] and [n_classes, E]."""
        images, texts = F.normalize(images.float(), dim=-1), F.normalize(texts.float(), dim=-1)
        return cosine_logits(self.clip.logit_scale.exp(), images, texts)


def tokens_of(classes: Classes) -> Tensor:
    """[n_classes, context], a prompt of each class."""
    return classes.tokenizer(template_prompts(classes.names, [TEMPLATE]).texts)


def build(clip: Any, n_classes: int, settings: Settings, seed: int) -> Model:
    """The adapters as they are before the training; the draws are those of `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Model(clip, settings)
    return model.to(clip.logit_scale.device)


def trained(model: Model) -> nn.Module:
    return model.adapters


def fit(
    model: Model, train: LabelledImages, val: LabelledImages, classes: Classes, settings: Settings, run: Run
) -> dict[str, float]:
    training = training_of(model, len(train.labels), classes, settings, run)
    train_batches(training, crops(model.clip, train, settings.batch_size, run), run)
    return {}


def loss_of(model: Model, classes: Classes) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of a batch of images and its labels. What is frozen of the texts is computed once, here."""
    texts = frozen_texts(model.clip, tokens_of(classes), model.first)
    factor = torch.tensor(1 / model.scale, device=model.clip.logit_scale.device)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        logits = model.logits(model.encode_image(images), model.encode_text_from(*texts))
        return scale_gradient(F.cross_entropy(logits, labels), factor)

    return loss


def training_of(model: Model, n_images: int, classes: Classes, settings: Settings, run: Run) -> Training:
    optimizer = make_optimizer(model.adapters, settings.lr, settings.momentum, settings.weight_decay)
    steps = steps_per_epoch(n_images, settings.batch_size)
    schedule = Schedule(settings.epochs, steps, lambda epoch: cosine(settings.lr, epoch, settings.epochs))
    with run.autocast(model.clip.logit_scale.device):
        loss = loss_of(model, classes)
    take = descend(model.adapters, optimizer, loss, run.bf16)
    return Training(model.adapters, optimizer, schedule, take)


@torch.no_grad()
def classifier(
    model: Model, classes: Classes, settings: Settings, trained: bool, progress: Progress = silent
) -> dict[str, Tensor]:
    """weights [n_classes, E], normalised."""
    tokens = tokens_of(classes)
    with progress(len(tokens), "prompts") as done:
        where = model.clip.logit_scale.device
        features = encode_prompts(model.clip, tokens, model.encode_text, where, progress=done)
    return {"weights": F.normalize(features, dim=-1)}


@torch.no_grad()
def logits(model: Model, classifier: dict[str, Tensor], images: Images) -> Tensor:
    hidden = images.after_blocks(model.clip, model.first)
    return model.logits(model.encode_image_from(hidden), classifier["weights"])


def detach(model: Model) -> None:
    """Nothing is attached."""
