"""Training on frozen features: small modules on features that are there already, in seconds and so without
checkpoints."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heba.clip.device import send
from heba.fit.loop import Schedule, cosine, finite, train_epochs, update
from heba.fit.run import Run
from heba.fit.search import accuracy, first_best


def passes(augmented: Tensor, plain: Tensor) -> Tensor:
    """The augmented views [passes, n, E]; where there are no passes, the plain ones [n, E] as the only pass."""
    return augmented if len(augmented) else plain[None]


def shuffled(n: int, size: int, generator: torch.Generator, keep_last: bool = False) -> list[Tensor]:
    """The batches of an epoch, rows [size] of n in a fresh order, without what is left over unless `keep_last`;
    fewer rows than a batch make one batch of all, as in Dassl's loader."""
    order = torch.randperm(n, generator=generator)
    if keep_last:
        return list(order.split(size))
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

    def run_epoch(epoch: int, generator: torch.Generator, done: Callable[[int], object]) -> list[float]:
        features = views[epoch % len(views)]
        losses = []
        for rows in batches(generator):
            rows = send(rows, views.device)
            value = loss(features[rows], labels[rows])
            update(module, optimizer, value)
            losses.append(value.detach())
            done(1)
        return finite(losses)

    with torch.autocast(views.device.type, enabled=False):
        train_epochs(module, optimizer, schedule, run_epoch, replace(run, checkpoint=None), "lower lr")


@dataclass(frozen=True)
class Problem:
    """A linear map of features that is trained to keep near its start.

    The logits of features x are factor * normalised(map(x)) . weights; the loss is their cross-entropy plus a
    penalty times the sum of squares of what the map's entries are away from their start.

    Attributes:
        map: the module that is trained, [..., width] to [..., E].
        factor: of the logits. weights: [n_classes, E], normalised.
        views: [passes, n, width]. labels: [n].
    """

    map: nn.Module
    factor: Tensor
    weights: Tensor
    views: Tensor
    labels: Tensor

    def logits(self, features: Tensor) -> Tensor:
        return self.factor * F.normalize(self.map(features), dim=-1) @ self.weights.T


RECORDS = 10  # steps of full batches that are one record of a history


def train_full_batch(
    problem: Problem,
    lr: float,
    penalty: float,
    steps: int,
    done: Callable[[int], object],
    on_epoch: Callable[[dict[str, float]], object] = lambda record: None,
) -> None:
    """Train the map of `problem` in place, in fp32: Adam with eps 1e-4, a cosine per step, and in step i (0-based)
    the view i + 1 modulo their number.

    Args:
        done: counts steps. on_epoch: gets a record of every `RECORDS` steps.
    Raises:
        FloatingPointError: a loss that is not finite.
    """
    start = [p.detach().clone() for p in problem.map.parameters()]
    optimizer = torch.optim.Adam(problem.map.parameters(), lr, eps=1e-4, fused=True)
    losses = []
    with torch.autocast(problem.views.device.type, enabled=False):
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = cosine(lr, step, steps)
            x = problem.views[(step + 1) % len(problem.views)]
            loss = F.cross_entropy(problem.logits(x), problem.labels)
            far = [((p - p0) ** 2).sum() for p, p0 in zip(problem.map.parameters(), start, strict=True)]
            loss = loss + penalty * torch.stack(far).sum()
            update(problem.map, optimizer, loss)
            losses.append(loss.detach())
            done(1)
            if len(losses) == RECORDS or step + 1 == steps:
                try:
                    mean = sum(finite(losses)) / len(losses)
                except FloatingPointError as error:
                    raise FloatingPointError(f"after step {step + 1 - len(losses)}: {error}; lower lr") from None
                on_epoch({"epoch": step + 1, "loss": mean, "lr": cosine(lr, step, steps)})
                losses = []


def fit_full_batch(
    problem: Problem,
    val: tuple[Tensor, Tensor],
    lr: float,
    penalty: float,
    grid: list[tuple[float, float]],
    steps: int,
    run: Run,
) -> dict[str, float]:
    """Train the map of `problem` in place with the first of the pairs (lr, penalty) of `grid` that is best on
    `val`, features [m, width] and labels [m]; with `lr` and `penalty` where there is no grid or no image in val.

    Returns:
        The lr and the penalty that it was trained with.
    """
    features, labels = val
    start = {name: p.clone() for name, p in problem.map.state_dict().items()}
    tries = grid if len(labels) else []
    with run.progress((len(tries) + 1) * steps, "train") as done:

        def score(pair: tuple[float, float]) -> float:
            problem.map.load_state_dict(start)
            train_full_batch(problem, *pair, steps, done)
            with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
                return accuracy(problem.logits(features), labels)

        if tries:
            lr, penalty = first_best(tries, score)
            problem.map.load_state_dict(start)
        train_full_batch(problem, lr, penalty, steps, done, run.on_epoch)
    return {"lr": lr, "penalty": penalty}
