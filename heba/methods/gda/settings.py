"""The settings of GDA: a block of params.yaml."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from heba.data.prompts import Kind
from heba.fit.bounds import Positive
from heba.fit.work import Work

TITLE = "GDA"
FAMILY = "linear"
READS = "features"
NEW_CLASSES = True
DRAWS = True
EVALUATION: frozenset[str] = frozenset()


class Settings(BaseModel):
    """GDA, as the official code has it for few shots.

    Attributes:
        prompts: what names a class; officially the data set's template, on ImageNet an ensemble.
        covariance: of the classes that it is trained on. pooled: of all samples around the means of their classes,
            with a ridge. mean: the mean of the classes' own, without one; officially so for base_to_novel.
        alphas: the weights of the Gaussian logits that are tried on val, in this order.
        alpha: the one without val images, and where no val image is right with any of them.
        neighbours: training samples that are taken for samples of a new class.
        text_copies: how often the text feature of a new class counts in its mean.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompts: Kind = "template"
    covariance: Literal["pooled", "mean"] = "pooled"
    alphas: Annotated[list[Positive], Field(min_length=1, max_length=1000)] = [
        0.0001,
        0.001,
        0.01,
        0.1,
        1.0,
        10.0,
        100.0,
    ]
    alpha: Positive = 0.1
    neighbours: Annotated[int, Field(ge=2, le=1_000_000)] = 64
    text_copies: Annotated[int, Field(ge=0, le=1_000_000)] = 16


def problems(settings: Settings, depth: int | None, width: int | None) -> dict[str, str]:
    return {}


def work(settings: Settings, n_images: int, n_classes: int) -> Work:
    return Work(steps=0, images=0, prompts=0)
