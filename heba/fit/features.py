"""Training on frozen features: small modules on features that are there already, in seconds and so without
checkpoints."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import count

import torch
from torch import Tensor, nn

from heba.fit.loop import Schedule, cosine, finite, train_epochs, update
from heba.fit.run import Run


def dassl_lr(lr: float, epoch: int, epochs: int) -> float:
    """The learning rate of an epoch (0-based) in Dassl: 1e-5 in the first, then a cosine that begins one epoch
    late and so does not reach 0."""
    return 1e-5 if epoch == 0 else cosine(lr, epoch - 1, epochs)


def passes(augmented: Tensor, plain: Tensor) -> Tensor:
    """The augmented views [passes, n, E]; where there are no passes, the plain ones [n, E] as the only pass."""
    return augmented if len(augmented) else plain[None]


def shuffled(n: int, size: int, generator: torch.Generator) -> list[Tensor]:
    """The batches of an epoch, rows [size] of n in a fresh order, without what is left over; fewer rows than a
    batch make one batch of all, as in Dassl's loader."""
    order = torch.randperm(n, generator=generator)
    return list(order[: max(1, n // size) * size].split(size))


def train_views(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    views: Tensor,
    labels: Tensor,
    batches: Callable[[torch.Generator], Iterable[Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    run: Run,
) -> None:
    """Train `module` in place, in fp32, by mini-batches of features.

    Args:
        views: [passes, n, E]; epoch e takes the pass e modulo their number, as if images were augmented anew.
        labels: [n].
        batches: the rows of each batch of an epoch, with its draws from the generator.
        loss: of a batch's features [b, E] and labels [b].
    Raises:
        FloatingPointError: a loss that is not finite.
    """
    epochs = count()

    def run_epoch(generator: torch.Generator, done: Callable[[int], object]) -> list[float]:
        features = views[next(epochs) % len(views)]
        losses = []
        for rows in batches(generator):
            value = loss(features[rows], labels[rows])
            update(module, optimizer, value)
            losses.append(value.detach())
            done(1)
        return finite(losses)

    with torch.autocast(views.device.type, enabled=False):
        train_epochs(module, optimizer, schedule, run_epoch, replace(run, checkpoint=None), "lower lr")
