"""The settings of HeBA: a block of params.yaml."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from heba.data.prompts import Kind
from heba.fit.bounds import Below1, Count, Fraction, NotNegative, Positive
from heba.fit.work import Work, most_classes, steps_per_epoch

TITLE = "HeBA"
FAMILY = "tower"
READS = "pixels"
NEW_CLASSES = True
DRAWS = True
EVALUATION = frozenset({"scale_novel"})


class Settings(BaseModel):
    """HeBA as the paper trains it on ViT-B/16, for base-to-novel.

    Attributes:
        prompts: what names a class; the paper's prompts have descriptions.
        start, end: first and last adapted block of both towers, counted from 1.
        ratio: width of the stream over width of the bottleneck.
        scale: s, the weight of an adapter. scale_novel: s for classes that it was not trained on; None: the same.
        scale_factor, slow_ratio: slow-fast; s times the factor, with probability 1 - slow_ratio, per block and
            step.
        init, visual_block, text_block, expansion, gradient_scale, towers: for ablations (`adapters.Variant`).
        epochs, batch_size, lr, momentum, weight_decay: of SGD, with a cosine per epoch and drop_last.
        label_smoothing: of the cross-entropy.
        neg_ratio: classes drawn besides the batch's own, as a multiple of their number; 0: all classes.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompts: Kind = "descriptions"
    start: Count = 1
    end: Count = 12
    ratio: Count = 4
    scale: Positive = 0.025
    scale_novel: NotNegative | None = None
    scale_factor: Positive = 2.25
    slow_ratio: Fraction = 0.8
    init: Literal["kaiming", "zero"] = "kaiming"
    visual_block: Literal["conv", "linear"] = "conv"
    text_block: Literal["linear", "conv1d"] = "linear"
    expansion: Annotated[int, Field(ge=1, le=64)] = 1
    gradient_scale: bool = True
    towers: Literal["both", "image", "text"] = "both"
    epochs: Count = 30
    batch_size: Count = 16
    lr: Positive = 0.0075
    momentum: Below1 = 0.9
    weight_decay: NotNegative = 0.0005
    label_smoothing: Below1 = 0.1
    neg_ratio: Annotated[int, Field(ge=0, le=1_000_000)] = 5


def problems(settings: Settings, depth: int | None, width: int | None) -> dict[str, str]:
    """What does not fit together, by the setting that it is about.

    Args:
        depth, width: blocks of the shallower and channels of the narrower tower of the backbone, where known.
    """
    found = {}
    if depth and settings.end > depth:
        found["end"] = f"{settings.end} is beyond the last layer, {depth}, of the backbone"
    if settings.start > settings.end:
        found["start"] = f"{settings.start} is above end {settings.end}"
    if width and settings.ratio > width * settings.expansion:
        found["ratio"] = f"{settings.ratio} leaves nothing of the width {width} of the backbone"
    return found


def negatives(settings: Settings) -> int | None:
    """The classes drawn per class of the batch; None: all classes."""
    return settings.neg_ratio or None


def work(settings: Settings, n_images: int, n_classes: int) -> Work:
    prompts = most_classes(n_classes, settings.batch_size, negatives(settings))
    steps = settings.epochs * steps_per_epoch(n_images, settings.batch_size)
    return Work(steps, settings.batch_size, prompts)
