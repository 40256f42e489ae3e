"""TCP (Yao et al. 2024): the words before a class name are learned, and give way inside the tower to tokens that
are made of the class itself, as the official code has it.

With e the token embeddings of a class's text, P the context [M, width], T the frozen text tower, and z_k the
normalised feature of class k's own prompt, by T too,

    D_k = up(qgelu(down(z_k))), M tokens of the tower's width
    t_k = T([e_0, P, e_{1+M}, ...], with D_k in the place of positions 1 to M after the first blocks)
    logits = exp(logit_scale) cos(x, t_k)
    loss = cross-entropy + weight (1 - mean_k cos(t_k, z_k))

for the feature x of an image; qgelu(v) = v sigmoid(1.702 v). P begins as N(0, 0.02^2). The optimiser is Adam with
a large eps and L2 in the gradient. The code has a weight to blend D_k with the context, which is always 1. New
classes take the same P and have a z_k of their own.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heba.clip.activation import quick_gelu
from heba.clip.context import (
    Texts,
    check_text_context,
    embed_texts,
    encode_texts,
    text_width,
    tokens_with_room,
    with_context,
)
from heba.clip.features import Classes
from heba.clip.towers import check_text_inside, feature_width, text_blocks
from heba.data.images import Images, LabelledImages
from heba.data.prompts import spoken_class_name
from heba.fit.batches import Training, descend, frozen_features, train_batches
from heba.fit.loop import dassl_schedule
from heba.fit.prompts import STD, feature_logits, forgotten, teachers
from heba.fit.run import Progress, Run, silent
from heba.fit.work import steps_per_epoch
from heba.methods.tcp.settings import Settings


class Learned(nn.Module):
    """The context, and what makes the tokens of a class."""

    def __init__(self, dim: int, width: int, settings: Settings) -> None:
        super().__init__()
        if settings.reduction > dim:
            raise ValueError(f"tcp.reduction: {settings.reduction} leaves nothing of features of width {dim}")
        self.ctx = nn.Parameter(torch.empty(settings.context, width).normal_(std=STD))
        bottleneck = dim // settings.reduction
        down, up = nn.Linear(dim, bottleneck), nn.Linear(bottleneck, settings.context * width)
        self.meta_net = nn.ModuleDict({"linear1": down, "linear2": up})

    def class_tokens(self, known: Tensor) -> Tensor:
        """[n_classes, M, width], of what CLIP knows of the classes, [n_classes, E]."""
        down, up = self.meta_net["linear1"], self.meta_net["linear2"]
        with torch.autocast(known.device.type, enabled=False):
            return up(quick_gelu(down(known))).unflatten(-1, self.ctx.shape)


class Model(nn.Module):
    """A frozen CLIP and what is learned."""

    def __init__(self, clip: Any, settings: Settings) -> None:
        super().__init__()
        check_text_context(clip, "tcp", context=settings.context)
        check_text_inside(clip, "tcp")
        depth = len(text_blocks(clip).blocks)
        if settings.after >= depth:
            raise ValueError(
                f"tcp.after: no block of the text tower's {depth} comes after the first {settings.after}"
            )
        self.clip, self.after = clip.requires_grad_(False).eval(), settings.after
        self.learned = Learned(feature_width(clip), text_width(clip), settings)

    def encode(self, texts: Texts, known: Tensor) -> Tensor:
        """The normalised features [n_classes, E] of the `texts` of classes, and what CLIP knows of these."""
        embedded = with_context(texts, self.learned.ctx)
        deep = {self.after: self.learned.class_tokens(known)}
        return F.normalize(encode_texts(self.clip, texts, embedded, deep).float(), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Features [n, E] of `tokens` [n, context] that have room for the context, which stands here for the
        tokens of the classes too."""
        texts = embed_texts(self.clip, tokens)
        deep = {self.after: self.learned.ctx.expand(len(tokens), -1, -1)}
        return encode_texts(self.clip, texts, with_context(texts, self.learned.ctx), deep)


def texts_of(model: Model, classes: Classes, settings: Settings) -> Texts:
    texts = [settings.text.format(spoken_class_name(name)) for name in classes.names]
    return embed_texts(model.clip, tokens_with_room(classes.tokenizer, texts, settings.context))


def build(clip: Any, n_classes: int, settings: Settings, seed: int) -> Model:
    """The model as it is before the training; the draws are those of `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Model(clip, settings)
    return model.to(clip.logit_scale.device)


def trained(model: Model) -> nn.Module:
    return model.learned


def fit(
    model: Model, train: LabelledImages, val: LabelledImages, classes: Classes, settings: Settings, run: Run
) -> dict[str, float]:
    source = frozen_features(model.clip, train, settings.batch_size, settings.views, run)
    train_batches(training_of(model, len(train.labels), classes, settings, run), source, run)
    return {}


def training_of(model: Model, n_images: int, classes: Classes, settings: Settings, run: Run) -> Training:
    optimizer = torch.optim.Adam(
        model.learned.parameters(), settings.lr, eps=settings.eps, weight_decay=settings.weight_decay, fused=True
    )
    schedule = dassl_schedule(settings.lr, settings.epochs, steps_per_epoch(n_images, settings.batch_size))
    take = descend(model.learned, optimizer, loss_of(model, classes, settings), run.bf16)
    return Training(model.learned, optimizer, schedule, take)


def loss_of(model: Model, classes: Classes, settings: Settings) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss, of the features [n, E] and the labels [n] of images."""
    texts, known = texts_of(model, classes, settings), teachers(model.clip, classes)

    def loss(features: Tensor, labels: Tensor) -> Tensor:
        learned = model.encode(texts, known)
        found = feature_logits(model.clip, features, learned)
        return F.cross_entropy(found, labels) + settings.weight * forgotten(learned, known)

    return loss


@torch.no_grad()
def classifier(
    model: Model, classes: Classes, settings: Settings, trained: bool, progress: Progress = silent
) -> dict[str, Tensor]:
    """weights [n_classes, E], normalised."""
    return {"weights": model.encode(texts_of(model, classes, settings), teachers(model.clip, classes))}


@torch.no_grad()
def logits(model: Model, classifier: dict[str, Tensor], images: Images) -> Tensor:
    return feature_logits(model.clip, images.features, classifier["weights"])


def detach(model: Model) -> None:
    """Nothing is attached."""
