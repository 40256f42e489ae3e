"""The cost of a training."""

from typing import NamedTuple


class Work(NamedTuple):
    """steps: of the training. images, prompts: that a step takes forward and backward through the towers."""

    steps: int
    images: int
    prompts: int


def steps_per_epoch(n_images: int, size: int) -> int:
    """Complete batches in an epoch; fewer images than a batch make one batch of all, as in Dassl's loader."""
    return max(1, n_images // size)
