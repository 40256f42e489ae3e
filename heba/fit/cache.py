"""A cache of training images (Tip-Adapter): keys, their features, and values, what each counts for its class."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heba.fit.run import Progress


class Grid(NamedTuple):
    """The values tried on val, of alpha, the weight of the cache, of beta, its sharpness, and of gamma (APE)."""

    alphas: list[float]
    betas: list[float]
    gammas: list[float]


class Cache(nn.Module):
    """keys [S, n_classes, E] and values [S, n_classes] of S places per class, as many as the largest class has
    images; both are 0 in a place that stays empty. A new cache has no places."""

    keys: Tensor
    values: Tensor
    alpha: Tensor
    beta: Tensor

    def __init__(self, clip: Any, n_classes: int, width: int) -> None:
        super().__init__()
        self.factor = clip.logit_scale.detach().exp()
        self.register_buffer("keys", torch.empty(0, n_classes, width))
        self.register_buffer("values", torch.empty(0, n_classes))
        self.register_buffer("alpha", torch.tensor(0.0))
        self.register_buffer("beta", torch.tensor(0.0))

    def forward(self, features: Tensor) -> Tensor:
        """What the cache adds to the logits of normalised `features` [n, E], [n, n_classes]: per class alpha times
        the sum over its images of value exp(-beta (1 - feature . key))."""
        with torch.autocast(features.device.type, enabled=False):
            closeness = torch.exp(-self.beta * (1 - products(features, self.keys)))
            return self.alpha * (closeness * self.values).sum(dim=1)


def places(labels: Tensor, n_classes: int) -> Tensor:
    """[S, n_classes], per class the rows of `labels` [n] that are of it, in their order, and then -1."""
    counts = torch.bincount(labels, minlength=n_classes)
    order = labels.argsort(stable=True)
    place = torch.arange(len(labels), device=labels.device) - (counts.cumsum(0) - counts)[labels[order]]
    rows = labels.new_full((int(counts.max()), n_classes), -1)
    rows[place, labels[order]] = order
    return rows


def cache_keys(views: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [S, n_classes, E], of an image the normalised mean of its raw `views` [passes, n, E], and values, 1, at
    the `rows` that `places` gives."""
    values = (rows >= 0).float()
    return F.normalize(views.mean(dim=0), dim=-1)[rows.clamp(min=0)] * values.unsqueeze(-1), values


def products(features: Tensor, keys: Tensor) -> Tensor:
    """[n, S, n_classes], of `features` [n, E] with `keys` [S, n_classes, E]."""
    return (features.float() @ keys.flatten(0, 1).T).unflatten(1, keys.shape[:2])


def steps(first: float, scale: float, number: int) -> list[float]:
    """`number` values from `first` to `scale`, exclusive, equally far apart."""
    return [i * (scale - first) / number + first for i in range(number)]


@torch.no_grad()
def search(
    cache: Cache,
    logits: Tensor,
    features: Tensor,
    labels: Tensor,
    values: Callable[[float], Tensor],
    grid: Grid,
    initial: dict[str, float],
    progress: Progress,
) -> dict[str, float]:
    """The first best alpha, beta and gamma of `grid`, in the order of the official loops: beta, alpha, gamma; or
    `initial`, where no image is right with any. The cache gets its alpha and beta.

    Args:
        logits: [n, n_classes], without the cache. features: [n, width of the keys], normalised. labels: [n].
        values: those of the cache [S, n_classes] for a gamma.
    """
    counts = right(cache.keys, logits, features, labels, values, grid, progress)
    beta, alpha, gamma = np.unravel_index(counts.argmax(), counts.shape)
    best = {"alpha": grid.alphas[alpha], "beta": grid.betas[beta], "gamma": grid.gammas[gamma]}
    chosen = {name: best[name] for name in initial} if counts.any() else initial
    cache.alpha.fill_(chosen["alpha"])
    cache.beta.fill_(chosen["beta"])
    return chosen


@torch.no_grad()
def right(
    keys: Tensor,
    logits: Tensor,
    features: Tensor,
    labels: Tensor,
    values: Callable[[float], Tensor],
    grid: Grid,
    progress: Progress,
) -> np.ndarray:
    """How many images have their largest logit at their label, [betas, alphas, gammas]; arguments of `search`."""
    found = []
    with progress(len(grid.betas), "search") as done, torch.autocast(features.device.type, enabled=False):
        distances = 1 - products(features, keys).permute(2, 0, 1).contiguous()  # [n_classes, n, S]
        weights = torch.stack([values(gamma) for gamma in grid.gammas]).permute(2, 1, 0)  # [n_classes, S, gammas]
        plain = logits.T.unsqueeze(-1)
        for beta in grid.betas:
            added = torch.exp(-beta * distances) @ weights  # [n_classes, n, gammas]
            predicted = torch.stack([(plain + alpha * added).argmax(dim=0) for alpha in grid.alphas])
            found.append((predicted == labels.unsqueeze(-1)).sum(dim=1))
            done(1)
    return torch.stack(found).cpu().numpy()
