"""The cost of a training."""

from typing import NamedTuple


class Work(NamedTuple):
    """steps: of the training. images, prompts: that a step takes forward and backward through the towers.
    tested: prompts of its own that each test image takes through the text tower."""

    steps: int
    images: int
    prompts: int
    tested: int = 0


def steps_per_epoch(n_images: int, size: int) -> int:
    """Complete batches in an epoch; fewer images than a batch make one batch of all, as in Dassl's loader."""
    return max(1, n_images // size)


def epochs_by_shots(shots: int, epochs: int, few: int, one: int) -> int:
    """CoOp's: `epochs` with 8 images a class and more, `few` with 2 to 7, `one` with one."""
    if shots >= 8:
        return epochs
    return few if shots > 1 else one


def most_classes(n_classes: int, batch_size: int, neg_ratio: int | None) -> int:
    """The largest number of classes that a step of `batch_size` images can have (`draws.step_classes`)."""
    if n_classes <= batch_size or neg_ratio is None:
        return n_classes
    return min(n_classes, batch_size * (1 + neg_ratio))
