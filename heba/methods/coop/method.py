"""CoOp (Zhou et al. 2022): the words before a class name are learned, as the official code has them.

With e the token embeddings of "<words> <name>.", P the context [M, width], and T the frozen text tower,

    t_k = T([e_0, P, e_{1+M}, ...]),    logits = exp(logit_scale) cos(x, t_k)

for the feature x of an image. P begins as the embeddings of `words`, or as N(0, 0.02^2). The loss is the
cross-entropy. With the class name in the middle, floor(M/2) vectors come before it and the rest behind; in front,
all come behind it; the full stop stays last. New classes take the same context.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heba.clip.context import Texts, Tokenizer, text_lengths
from heba.clip.features import Classes
from heba.data.images import Images, LabelledImages
from heba.data.prompts import spoken_class_name
from heba.fit.batches import Training, descend, frozen_features, train_batches
from heba.fit.loop import dassl_schedule, make_optimizer
from heba.fit.prompts import Learner, begin_with, build_learner, class_texts, count_words, feature_logits
from heba.fit.run import Progress, Run, silent
from heba.fit.work import steps_per_epoch
from heba.methods.coop.settings import Settings, epochs_of


def room(settings: Settings) -> int:
    """M, the tokens of a context."""
    return count_words(settings.words) or settings.context


def texts_of(clip: Any, names: list[str], tokenizer: Tokenizer, settings: Settings) -> Texts:
    """The texts of classes, with the order of their tokens where the name does not come last."""
    m = room(settings)
    texts = class_texts(clip, names, tokenizer, settings.words, m)
    if settings.position == "end":
        return texts
    before = m // 2 if settings.position == "middle" else 0
    length, orders = texts.packing.length, []
    lengths = text_lengths(clip, tokenizer([spoken_class_name(name) for name in names]))
    for n in (n - 2 for n in lengths):  # the tokens of a name
        places = list(range(length))
        name = places[1 + m : 1 + m + n]
        orders.append([*places[: 1 + before], *name, *places[1 + before : 1 + m], *places[1 + m + len(name) :]])
    return replace(texts, order=torch.tensor(orders, device=texts.tokens.device))


def build(clip: Any, n_classes: int, settings: Settings, seed: int) -> Learner:
    """The context as it is before the training, at random; `fit` puts `words` into its place."""
    shape = (n_classes, room(settings)) if settings.per_class else (room(settings),)
    return build_learner(clip, "coop", shape, seed)


def trained(model: Learner) -> nn.Module:
    return model.learned


def fit(
    model: Learner, train: LabelledImages, val: LabelledImages, classes: Classes, settings: Settings, run: Run
) -> dict[str, float]:
    if settings.words:
        begin_with(model, classes.tokenizer, settings.words)
    source = frozen_features(model.clip, train, settings.batch_size, settings.views, run)
    train_batches(training_of(model, len(train.labels), classes, settings, run), source, run)
    return {}


def training_of(model: Learner, n_images: int, classes: Classes, settings: Settings, run: Run) -> Training:
    texts = texts_of(model.clip, classes.names, classes.tokenizer, settings)
    optimizer = make_optimizer(model.learned, settings.lr, settings.momentum, settings.weight_decay)
    steps = steps_per_epoch(n_images, settings.batch_size)
    schedule = dassl_schedule(settings.lr, epochs_of(settings, run.shots), steps)

    def loss(features: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(feature_logits(model.clip, features, model.encode(texts)), labels)

    return Training(model.learned, optimizer, schedule, descend(model.learned, optimizer, loss, run.bf16))


@torch.no_grad()
def classifier(
    model: Learner, classes: Classes, settings: Settings, trained: bool, progress: Progress = silent
) -> dict[str, Tensor]:
    """weights [n_classes, E], normalised. ValueError for new classes of a context per class."""
    if settings.per_class and not trained:
        raise ValueError("coop.per_class: new classes have no context; set it to false")
    return {"weights": model.encode(texts_of(model.clip, classes.names, classes.tokenizer, settings))}


@torch.no_grad()
def logits(model: Learner, classifier: dict[str, Tensor], images: Images) -> Tensor:
    return feature_logits(model.clip, images.features, classifier["weights"])


def detach(model: Learner) -> None:
    """Nothing is attached."""
