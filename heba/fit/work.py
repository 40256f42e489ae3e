"""The cost of a training."""

from typing import NamedTuple


class Work(NamedTuple):
    """steps: of the training. images, prompts: that a step takes forward and backward through the towers."""

    steps: int
    images: int
    prompts: int
