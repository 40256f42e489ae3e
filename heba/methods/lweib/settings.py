"""The settings of LwEIB: a block of params.yaml."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from heba.data.prompts import Kind
from heba.fit.bounds import Below1, Count, Fraction, NotNegative, Positive
from heba.fit.work import Work, most_classes, steps_per_epoch

TITLE = "LwEIB"
FAMILY = "tower"
READS = "pixels"
NEW_CLASSES = True
DRAWS = True
EVALUATION: frozenset[str] = frozenset()


class Settings(BaseModel):
    """LwEIB as the official base2new.yaml trains it on ViT-B/16, for base-to-novel; it has no other for few shots.

    Attributes:
        prompts: what names a class; the official prompts have descriptions.
        start, end: first and last adapted block of both towers, counted from 1.
        scale: s, the weight of a convolution.
        scale_factor, slow_ratio: slow-fast; s times the factor, with probability 1 - slow_ratio, per block and
            step.
        epochs, batch_size, lr, momentum, weight_decay: of SGD, with a cosine per epoch and drop_last.
        neg_ratio: classes drawn besides the batch's own, as a multiple of their number; 0: none; -1: all classes.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompts: Kind = "descriptions"
    start: Count = 1
    end: Count = 12
    scale: Positive = 0.025
    scale_factor: Positive = 2.5
    slow_ratio: Fraction = 0.8
    epochs: Count = 25
    batch_size: Count = 16
    lr: Positive = 0.28
    momentum: Below1 = 0.9
    weight_decay: NotNegative = 0.0005
    neg_ratio: Annotated[int, Field(ge=-1, le=1_000_000)] = 7


def problems(settings: Settings, depth: int | None, width: int | None) -> dict[str, str]:
    """What does not fit together, by the setting that it is about; `depth`: blocks of the shallower tower."""
    found = {}
    if depth and settings.end > depth:
        found["end"] = f"{settings.end} is beyond the last layer, {depth}, of the backbone"
    if settings.start > settings.end:
        found["start"] = f"{settings.start} is above end {settings.end}"
    return found


def negatives(settings: Settings) -> int | None:
    """The classes drawn per class of the batch; None: all classes."""
    return None if settings.neg_ratio < 0 else settings.neg_ratio


def work(settings: Settings, n_images: int, n_classes: int) -> Work:
    prompts = most_classes(n_classes, settings.batch_size, negatives(settings))
    steps = settings.epochs * steps_per_epoch(n_images, settings.batch_size)
    return Work(steps, settings.batch_size, prompts)
