"""The settings of CLIP-LoRA: a block of params.yaml."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from heba.data.prompts import Kind
from heba.fit.bounds import Below1, Count, NotNegative, Positive
from heba.fit.work import Work

TITLE = "CLIP-LoRA"
FAMILY = "tower"
READS = "pixels"
NEW_CLASSES = True
DRAWS = True
EVALUATION: frozenset[str] = frozenset()


class Settings(BaseModel):
    """CLIP-LoRA for few-shot learning, which officially has the same settings for all data sets, shots and
    backbones. Other protocols have no official settings and take these.

    Attributes:
        prompts: of no effect; every data set has "a photo of a {name}.".
        towers: that are changed: both, image or text.
        start, end: first and last block of a tower that is changed, counted from 1; None: up to its last one.
        projections: of an attention that are changed: q, k, v and out.
        rank: r of a change. alpha: its weight is alpha / sqrt(r).
        dropout: the share of a change's input that is left out in training.
        steps_per_shot: of the training, for each image of a class.
        batch_size, lr, weight_decay: of AdamW, with a cosine per step from lr to 1e-6.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompts: Kind = "template"
    towers: Literal["both", "image", "text"] = "both"
    start: Count = 1
    end: Count | None = None
    projections: Annotated[list[Literal["q", "k", "v", "out"]], Field(min_length=1)] = ["q", "k", "v"]
    rank: Annotated[int, Field(ge=1, le=4096)] = 2
    alpha: Positive = 1.0
    dropout: Below1 = 0.25
    steps_per_shot: Count = 500
    batch_size: Count = 32
    lr: Positive = 0.0002
    weight_decay: NotNegative = 0.01


def problems(settings: Settings, depth: int | None, width: int | None) -> dict[str, str]:
    """What does not fit together, by the setting that it is about.

    Args:
        depth, width: blocks of the shallower and channels of the narrower tower of the backbone, where known.
    """
    found = {}
    if depth and settings.end and settings.end > depth:
        found["end"] = f"{settings.end} is beyond the last layer, {depth}, of the backbone"
    last = settings.end or depth
    if last and settings.start > last:
        found["start"] = f"{settings.start} is above the last changed layer, {last}"
    return found


def work(settings: Settings, n_images: int, n_classes: int) -> Work:
    return Work(settings.steps_per_shot * (n_images // n_classes), settings.batch_size, n_classes)
