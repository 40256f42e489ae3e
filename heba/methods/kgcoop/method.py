"""KgCoOp (Yao et al. 2023): CoOp's words, held near what CLIP knows, as the official code has it.

With e the token embeddings of "<words> <name>.", P the context [M, width], T the frozen text tower, and z_k the
normalised feature of class k's own prompt, by T too,

    t_k = T([e_0, P, e_{1+M}, ...]),    logits = exp(logit_scale) cos(x, t_k)
    loss = cross-entropy + weight (1 - mean_k cos(t_k, z_k))

for the feature x of an image. P begins as the embeddings of `words`. The paper has the squared distance of t_k and
z_k, which is twice this term. New classes take the same context.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heba.clip.context import Texts
from heba.clip.features import Classes
from heba.data.images import Images, LabelledImages
from heba.fit.batches import Training, descend, frozen_features, train_batches
from heba.fit.loop import dassl_schedule, make_optimizer
from heba.fit.prompts import (
    Learner,
    begin_with,
    build_learner,
    class_texts,
    count_words,
    feature_logits,
    forgotten,
    teachers,
)
from heba.fit.run import Progress, Run, silent
from heba.fit.work import steps_per_epoch
from heba.methods.kgcoop.settings import Settings


def texts_of(model: Learner, classes: Classes, settings: Settings) -> Texts:
    m = count_words(settings.words)
    return class_texts(model.clip, classes.names, classes.tokenizer, settings.words, m)


def build(clip: Any, n_classes: int, settings: Settings, seed: int) -> Learner:
    """The context as it is before the training, at random; `fit` puts `words` into its place."""
    return build_learner(clip, "kgcoop", (count_words(settings.words),), seed)


def trained(model: Learner) -> nn.Module:
    return model.learned


def fit(
    model: Learner, train: LabelledImages, val: LabelledImages, classes: Classes, settings: Settings, run: Run
) -> dict[str, float]:
    begin_with(model, classes.tokenizer, settings.words)
    source = frozen_features(model.clip, train, settings.batch_size, settings.views, run)
    train_batches(training_of(model, len(train.labels), classes, settings, run), source, run)
    return {}


def training_of(model: Learner, n_images: int, classes: Classes, settings: Settings, run: Run) -> Training:
    optimizer = make_optimizer(model.learned, settings.lr, settings.momentum, settings.weight_decay)
    steps = steps_per_epoch(n_images, settings.batch_size)
    schedule = dassl_schedule(settings.lr, settings.epochs, steps)
    take = descend(model.learned, optimizer, loss_of(model, classes, settings), run.bf16)
    return Training(model.learned, optimizer, schedule, take)


def loss_of(model: Learner, classes: Classes, settings: Settings) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss, of the features [n, E] and the labels [n] of images."""
    texts, known = texts_of(model, classes, settings), teachers(model.clip, classes)

    def loss(features: Tensor, labels: Tensor) -> Tensor:
        learned = model.encode(texts)
        found = feature_logits(model.clip, features, learned)
        return F.cross_entropy(found, labels) + settings.weight * forgotten(learned, known)

    return loss


@torch.no_grad()
def classifier(
    model: Learner, classes: Classes, settings: Settings, trained: bool, progress: Progress = silent
) -> dict[str, Tensor]:
    """weights [n_classes, E], normalised."""
    return {"weights": model.encode(texts_of(model, classes, settings))}


@torch.no_grad()
def logits(model: Learner, classifier: dict[str, Tensor], images: Images) -> Tensor:
    return feature_logits(model.clip, images.features, classifier["weights"])


def detach(model: Learner) -> None:
    """Nothing is attached."""
