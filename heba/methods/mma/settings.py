"""The settings of MMA: a block of params.yaml."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from heba.data.prompts import Kind
from heba.fit.bounds import Below1, Count, NotNegative, Positive
from heba.fit.work import Work, steps_per_epoch

TITLE = "MMA"
FAMILY = "tower"
READS = "pixels"
NEW_CLASSES = True
DRAWS = True
EVALUATION: frozenset[str] = frozenset()


class Settings(BaseModel):
    """MMA for ViT-B/16, for base-to-novel (vit_b16_ep5.yaml); ImageNet has batches of 128, officially too
    (vit_b16_ep5_imnet.yaml). Other protocols have no official settings and take these.

    Attributes:
        prompts: of no effect; every data set has "a photo of a {name}.".
        start, end: first and last adapted block of both towers, counted from 1.
        dim: width of the bottleneck, and so of what the towers share.
        scale: s, the weight of an adapter.
        epochs, batch_size, lr, momentum, weight_decay: of SGD, with a cosine per epoch and drop_last.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompts: Kind = "template"
    start: Count = 5
    end: Count = 12
    dim: Annotated[int, Field(ge=1, le=4096)] = 32
    scale: Positive = 0.001
    epochs: Count = 5
    batch_size: Count = 16
    lr: Positive = 0.0015
    momentum: Below1 = 0.9
    weight_decay: NotNegative = 0.0005


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
    return found


def work(settings: Settings, n_images: int, n_classes: int) -> Work:
    steps = settings.epochs * steps_per_epoch(n_images, settings.batch_size)
    return Work(steps, settings.batch_size, n_classes)
