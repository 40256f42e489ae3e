"""Class prototypes that are trained on a pool of augmented views, with a penalty or without one (CLAP, ZS-LP)."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heba.fit.features import train_views
from heba.fit.loop import Schedule, dassl_lr, make_optimizer
from heba.fit.run import Run


class Prototypes(nn.Module):
    """P [n_classes, E], not normalised; the logits of features x are factor * normalised(x) . normalised(P_k)."""

    def __init__(self, factor: Tensor, n_classes: int, dim: int) -> None:
        super().__init__()
        self.factor = factor
        self.prototypes = nn.Parameter(torch.zeros(n_classes, dim, device=factor.device))

    def forward(self, features: Tensor) -> Tensor:
        return self.factor * F.normalize(features, dim=-1) @ F.normalize(self.prototypes, dim=-1).T


@dataclass(frozen=True)
class Pool:
    """The views of n images as N samples: features [N, E], not normalised, and labels [N]."""

    features: Tensor
    labels: Tensor
    n: int

    @classmethod
    def of(cls, views: Tensor, labels: Tensor) -> "Pool":
        """Of `views` [passes, n, E] and `labels` [n]."""
        return cls(views.flatten(0, 1), labels.repeat(len(views)), len(labels))


def batches_per_epoch(n_images: int, size: int) -> int:
    """As many as the images without their views make, of complete batches."""
    return max(1, n_images // size)


def draw(pool: Pool, size: int, generator: torch.Generator) -> Iterable[Tensor]:
    """The rows of an epoch's batches: the first ones of a fresh order of the pool."""
    order = torch.randperm(len(pool.labels), generator=generator)
    return order[: batches_per_epoch(pool.n, size) * size].split(size)


@torch.no_grad()
def multipliers(model: Prototypes, pool: Pool) -> Tensor:
    """lambda [n_classes]: the mean probability of a class over the views of its images, by the prototypes as they
    are; 0 for a class without images."""
    n_classes = len(model.prototypes)
    members = F.one_hot(pool.labels, n_classes).float()
    return (members * model(pool.features).softmax(dim=-1)).sum(dim=0) / members.sum(dim=0).clamp(min=1)


def train_prototypes(
    model: Prototypes,
    start: Tensor,
    pool: Pool,
    weights: Tensor | None,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    batches: Callable[[torch.Generator], Iterable[Tensor]],
    run: Run,
) -> None:
    """Train from where the model stands, by cross-entropy plus mean_k weights_k |P_k - start_k|^2.

    Args:
        start: [n_classes, E]. weights: [n_classes], or None for no penalty.
        batches: the rows of the pool in each batch of an epoch, with its draws from the generator.
    Raises:
        FloatingPointError: a loss that is not finite.
    """

    def loss(features: Tensor, labels: Tensor) -> Tensor:
        value = F.cross_entropy(model(features), labels)
        if weights is None:
            return value
        return value + (weights * (model.prototypes - start).square().sum(dim=-1)).mean()

    train_views(model, optimizer, schedule, pool.features[None], pool.labels, batches, loss, run)


def fit_prototypes(
    model: Prototypes,
    start: Tensor,
    pool: Pool,
    penalty: bool,
    epochs: int,
    batch_size: int,
    lr: float,
    momentum: float,
    run: Run,
) -> None:
    """Train from `start` [n_classes, E] with SGD and Dassl's schedule; with `penalty`, its weights are the
    `multipliers` of the start. FloatingPointError: a loss that is not finite."""
    with torch.no_grad(), torch.autocast(start.device.type, enabled=False):
        model.prototypes.copy_(start)
        weights = multipliers(model, pool) if penalty else None
    optimizer = make_optimizer(model, lr, momentum, weight_decay=0.0)
    steps = batches_per_epoch(pool.n, batch_size)
    schedule = Schedule(epochs, steps, lambda epoch: dassl_lr(lr, epoch, epochs))
    train_prototypes(model, start, pool, weights, optimizer, schedule, partial(draw, pool, batch_size), run)
