"""The settings of APE: a block of params.yaml."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from heba.data.prompts import Kind
from heba.fit.bounds import NotNegative, Scale, Steps
from heba.fit.work import Work

TITLE = "APE"
FAMILY = "cache"
READS = "features"
NEW_CLASSES = False
DRAWS = True
EVALUATION: frozenset[str] = frozenset()

# exp(gamma D) must not overflow: D, in bits, is below 20.
Gamma = Annotated[float, Field(ge=0, le=4)]


class Settings(BaseModel):
    """APE, with the official values for ImageNet.

    Attributes:
        prompts: what names a class; officially templates and descriptions.
        channels: the share of the channels that is kept; officially counts out of 1024, such as 500.
        similarity, variance: weights of the two parts of a channel's score.
        alpha, beta, gamma: without val images, and where no val image is right with any of those that are tried.
        alpha_scale, beta_scale: the values tried on val begin at 0.1 and end before this. gamma_scale: from 0.
        alpha_steps, beta_steps, gamma_steps: how many they are.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompts: Kind = "both"
    channels: Annotated[float, Field(gt=0, le=1)] = 500 / 1024
    similarity: NotNegative = 0.7
    variance: NotNegative = 0.3
    alpha: NotNegative = 2.0
    beta: NotNegative = 1.0
    gamma: Gamma = 0.1
    alpha_scale: Scale = 7.0
    alpha_steps: Steps = 20
    beta_scale: Scale = 7.0
    beta_steps: Steps = 200
    gamma_scale: Gamma = 0.5
    gamma_steps: Steps = 5


def problems(settings: Settings, depth: int | None, width: int | None) -> dict[str, str]:
    return {}


def work(settings: Settings, n_images: int, n_classes: int) -> Work:
    return Work(steps=0, images=0, prompts=0)
