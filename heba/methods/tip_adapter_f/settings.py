"""The settings of Tip-Adapter-F: a block of params.yaml."""

from pydantic import BaseModel, ConfigDict

from heba.data.prompts import Kind
from heba.fit.bounds import Count, NotNegative, Positive, Scale, Steps
from heba.fit.work import Work

TITLE = "Tip-Adapter-F"
FAMILY = "cache"
READS = "features"
NEW_CLASSES = False
DRAWS = True
EVALUATION: frozenset[str] = frozenset()


class Settings(BaseModel):
    """Tip-Adapter-F, with the official values for ImageNet.

    Attributes:
        prompts: what names a class; officially the data set's template, on ImageNet an ensemble.
        alpha, beta: weight and sharpness of the cache in training; also after it without val images, and where no
            val image is right with any of those that are tried.
        alpha_scale, beta_scale: the values tried on val begin at 0.1 and end before this.
        alpha_steps, beta_steps: how many they are.
        epochs, batch_size, lr, weight_decay, eps: of AdamW, with a cosine per step and the smaller last batch;
            officially 100 epochs on EuroSAT.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompts: Kind = "template"
    alpha: NotNegative = 1.17
    beta: NotNegative = 1.0
    alpha_scale: Scale = 3.0
    alpha_steps: Steps = 20
    beta_scale: Scale = 7.0
    beta_steps: Steps = 200
    epochs: Count = 20
    batch_size: Count = 256
    lr: Positive = 0.001
    weight_decay: NotNegative = 0.01
    eps: Positive = 0.0001


def problems(settings: Settings, depth: int | None, width: int | None) -> dict[str, str]:
    return {}


def work(settings: Settings, n_images: int, n_classes: int) -> Work:
    """Its steps run on frozen features, without the towers."""
    return Work(settings.epochs * -(-n_images // settings.batch_size), images=0, prompts=0)
