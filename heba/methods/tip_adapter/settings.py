"""The settings of Tip-Adapter: a block of params.yaml."""

from pydantic import BaseModel, ConfigDict

from heba.data.prompts import Kind
from heba.fit.bounds import NotNegative, Scale, Steps
from heba.fit.work import Work

TITLE = "Tip-Adapter"
FAMILY = "cache"
READS = "features"
NEW_CLASSES = False
DRAWS = True
EVALUATION: frozenset[str] = frozenset()


class Settings(BaseModel):
    """Tip-Adapter, with the official values for ImageNet.

    Attributes:
        prompts: what names a class; officially the data set's template, on ImageNet an ensemble.
        alpha, beta: weight and sharpness of the cache without val images, and where no val image is right with any
            of those that are tried.
        alpha_scale, beta_scale: the values tried on val begin at 0.1 and end before this.
        alpha_steps, beta_steps: how many they are.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompts: Kind = "template"
    alpha: NotNegative = 1.17
    beta: NotNegative = 1.0
    alpha_scale: Scale = 3.0
    alpha_steps: Steps = 20
    beta_scale: Scale = 7.0
    beta_steps: Steps = 200


def problems(settings: Settings, depth: int | None, width: int | None) -> dict[str, str]:
    return {}


def work(settings: Settings, n_images: int, n_classes: int) -> Work:
    return Work(steps=0, images=0, prompts=0)
