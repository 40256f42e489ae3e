"""Tip-Adapter-F (Zhang et al. 2022): Tip-Adapter, with its keys trained.

The cache has a key per training image, K_i; it starts as the normalised mean of the raw features of the
image's augmented views. With f the normalised feature of an image and T the zero-shot classifier, the logit
of class k is

    exp(logit_scale) f . T_k + alpha sum over the training images i of class k of exp(-beta (1 - f . K_i))

The keys are trained by the cross-entropy of these at the initial alpha and beta, on another augmented view in
each epoch; they are not normalised again. Then beta and alpha are the first best of a grid on the val images,
beta in the outer loop. Paper and code have the two names swapped; these are the code's.

The official code takes the epoch that is best on the test images, and reports the better of two test
accuracies; here it is the last epoch, and one test. It searches on the test images of ImageNet, and on the
whole val split of other data sets; here the search sees the few-shot val images alone. Without any, or where
none is right at any point, the initial values stand; officially the cache then counts nothing.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heba.clip.features import Classes, class_features, cosine_logits
from heba.clip.towers import feature_width
from heba.data.images import Images, LabelledImages
from heba.fit.cache import Cache, Grid, cache_keys, places, search, steps
from heba.fit.features import passes
from heba.fit.loop import Schedule, cosine, finite, train_epochs, update
from heba.fit.run import Progress, Run, silent
from heba.methods.tip_adapter_f.settings import Settings

Batches = Callable[[torch.Generator], Iterable[Tensor]]


def build(clip: Any, n_classes: int, settings: Settings, seed: int) -> Cache:
    return Cache(clip, n_classes, feature_width(clip)).to(clip.logit_scale.device)


def trained(model: Cache) -> nn.Module:
    return model


def fit(
    model: Cache, train: LabelledImages, val: LabelledImages, classes: Classes, settings: Settings, run: Run
) -> dict[str, float]:
    assert train.views is not None
    assert val.views is not None
    where = model.factor.device
    views = passes(train.views.augmented, train.views.plain).to(where)
    labels = torch.tensor(train.labels, device=where)
    kept = classifier(model, classes, settings, True)
    model.keys, model.values = cache_keys(views, places(labels, len(classes.names)))
    train_keys(model, views, labels, kept, settings, partial(shuffled, len(labels), settings.batch_size), run)
    features = F.normalize(val.views.plain.to(where), dim=-1)
    labels = torch.tensor(val.labels, device=where, dtype=torch.long)
    plain = cosine_logits(model.factor, features, kept["weights"])
    initial = {"alpha": settings.alpha, "beta": settings.beta}
    return search(model, plain, features, labels, lambda _: model.values, grid(settings), initial, run.progress)


def shuffled(n: int, size: int, generator: torch.Generator) -> list[Tensor]:
    """The rows of the batches of an epoch, in a fresh order; the last one may be smaller."""
    return list(torch.randperm(n, generator=generator).split(size))


def train_keys(
    model: Cache,
    views: Tensor,
    labels: Tensor,
    classifier: dict[str, Tensor],
    settings: Settings,
    batches: Batches,
    run: Run,
) -> None:
    """Train the keys in place; seconds, so without a checkpoint.

    Args:
        views: [passes, n, E], raw; epoch e takes the pass e modulo their number, as if images were augmented anew.
        labels: [n]. classifier: as `classifier` gives it.
        batches: the rows of the batches of an epoch, with its draws from the generator.
    """
    model.alpha.fill_(settings.alpha)
    model.beta.fill_(settings.beta)
    model.keys.requires_grad_()
    optimizer = torch.optim.AdamW([model.keys], settings.lr, eps=settings.eps, weight_decay=settings.weight_decay)
    per_epoch = -(-len(labels) // settings.batch_size)
    total, step = settings.epochs * per_epoch, count()

    def run_epoch(_: int, generator: torch.Generator, done: Callable[[int], object]) -> list[float]:
        losses = []
        for rows, i in zip(batches(generator), step, strict=False):
            optimizer.param_groups[0]["lr"] = cosine(settings.lr, i, total)
            images = Images.of_features(views[i // per_epoch % len(views), rows], torch.empty(0))
            loss = F.cross_entropy(logits(model, classifier, images), labels[rows])
            update(model, optimizer, loss)
            losses.append(loss.detach())
            done(1)
        return finite(losses)

    schedule = Schedule(settings.epochs, per_epoch, lambda epoch: cosine(settings.lr, epoch * per_epoch, total))
    with torch.autocast(views.device.type, enabled=False):
        train_epochs(model, optimizer, schedule, run_epoch, replace(run, checkpoint=None), "lower lr")
    model.keys = model.keys.detach()


def grid(settings: Settings) -> Grid:
    alphas = steps(0.1, settings.alpha_scale, settings.alpha_steps)
    return Grid(alphas, steps(0.1, settings.beta_scale, settings.beta_steps), [0.0])


def classifier(
    model: Cache, classes: Classes, settings: Settings, trained: bool, progress: Progress = silent
) -> dict[str, Tensor]:
    """weights [n_classes, E], normalised."""
    weights = class_features(classes.features, classes.index, len(classes.names))
    return {"weights": weights.to(model.factor.device)}


def logits(model: Cache, classifier: dict[str, Tensor], images: Images) -> Tensor:
    features = F.normalize(images.features.float(), dim=-1)
    return cosine_logits(model.factor, features, classifier["weights"]) + model(features)


def detach(model: Cache) -> None:
    """Nothing is attached."""
