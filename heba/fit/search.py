"""Values that a method chooses on validation images."""

from collections.abc import Callable, Iterable
from typing import TypeVar

from torch import Tensor

Value = TypeVar("Value")


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share, 0 to 1, of the images whose largest of the `logits` [n, classes] is that of their label [n]; 0
    without images."""
    return (logits.argmax(dim=-1) == labels).float().mean().item() if len(labels) else 0.0


def first_best(candidates: Iterable[Value], score: Callable[[Value], float]) -> Value:
    """The first of the candidates with the highest score: a later one that is as good loses, as in the official
    codes, so their order decides where few validation images make many ties."""
    best, highest = None, float("-inf")
    for candidate in candidates:
        value = score(candidate)
        if value > highest:
            best, highest = candidate, value
    if best is None:
        raise ValueError("there are no candidates")
    return best
