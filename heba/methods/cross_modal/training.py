"""The trainings of the grid. Those of one batch size run side by side: each has its own classifier, batches and
rates, and a step of all takes hardly longer than that of one."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heba.fit.features import shuffled
from heba.fit.loop import cosine
from heba.methods.cross_modal.settings import Settings


@dataclass(frozen=True)
class Samples:
    """Normalised features [n, E] and labels [n]."""

    features: Tensor
    labels: Tensor


@dataclass
class Trained:
    """What a training of the grid leaves.

    Attributes:
        weight: [n_classes, E], the first best on val; where there is no val, the last.
        accuracy: on val. step: after which that was, from 1.
        history: a record for every look at val.
    """

    weight: Tensor
    accuracy: float
    step: int
    history: list[dict[str, float]]


def rate(lr: float, step: int, settings: Settings) -> float:
    """The learning rate of a step (0-based)."""
    if step >= settings.warmup:
        return cosine(lr, step - settings.warmup, settings.steps)
    return lr * step / settings.warmup if step else 1e-5


def sizes_of(settings: Settings, n_images: int, n_texts: int) -> list[int]:
    """The batch sizes that there are enough images and texts for, or the smallest."""
    fitting = [size for size in settings.batch_size if size // 2 < min(n_images, n_texts)]
    return fitting or [min(settings.batch_size)]


def draw(n_images: int, n_texts: int, size: int, steps: int, generator: torch.Generator) -> Tensor:
    """The rows [steps, size] of all batches, texts after images, each half from permutations of its own."""
    halves = []
    for n, offset in ((n_images, 0), (n_texts, n_images)):
        rows: list[Tensor] = []
        while len(rows) < steps:
            rows += shuffled(n, size // 2, generator)
        halves.append(torch.stack(rows[:steps]) + offset)
    return torch.cat(halves, dim=1)


def stack(weights: Sequence[Tensor]) -> Tensor:
    """[points, n_classes, E]."""
    return torch.stack(list(weights))


def train_side_by_side(
    start: Tensor,
    pool: Samples,
    val: Samples,
    rows: Tensor,
    points: list[tuple[float, float]],
    factor: Tensor,
    settings: Settings,
    done: Callable[[int], object],
) -> list[Trained]:
    """Train a classifier [n_classes, E] from `start` for each of the `points`, pairs of lr and weight decay, in
    fp32.

    Args:
        rows: [steps, points, size], of the `pool`.
        done: counts steps of all points.
    Raises:
        FloatingPointError: a loss that is not finite.
    """
    weights = [nn.Parameter(start.clone()) for _ in points]
    groups = [{"params": [w], "weight_decay": decay} for w, (_, decay) in zip(weights, points, strict=True)]
    optimizer = torch.optim.AdamW(groups, fused=True)
    found = [Trained(start, -1.0, 0, []) for _ in points]
    losses: list[Tensor] = []
    for step, batch in enumerate(rows):
        for group, (lr, _) in zip(optimizer.param_groups, points, strict=True):
            group["lr"] = rate(lr, step, settings)
        logits = factor * pool.features[batch] @ stack(weights).mT
        loss = F.cross_entropy(logits.flatten(0, 1), pool.labels[batch].flatten(), reduction="none")
        each = loss.view(batch.shape).mean(dim=1)
        each.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(each.detach())
        if step % settings.every == 0:
            means = torch.stack(losses).mean(dim=0).tolist()
            if not all(map(math.isfinite, means)):
                raise FloatingPointError(f"a loss of the steps up to {step + 1} is not finite; lower lr")
            with torch.no_grad():
                right = (val.features @ stack(weights).mT).argmax(dim=-1) == val.labels
            accuracies = right.float().mean(dim=-1).tolist() if len(val.labels) else [0.0] * len(points)
            for one, weight, mean, accuracy, (lr, _) in zip(
                found, weights, means, accuracies, points, strict=True
            ):
                one.history.append({"epoch": step + 1, "loss": mean, "lr": rate(lr, step, settings)})
                if accuracy > one.accuracy:
                    one.weight, one.accuracy, one.step = weight.detach().clone(), accuracy, step + 1
            losses = []
        done(len(points))
    if not len(val.labels):
        for one, weight in zip(found, weights, strict=True):
            one.weight, one.step = weight.detach(), len(rows)
    return found
