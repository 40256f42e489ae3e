"""The settings of LP++: a block of params.yaml."""

from pydantic import BaseModel, ConfigDict

from heba.data.prompts import Kind
from heba.fit.bounds import Below1, Count, NotNegative
from heba.fit.work import Work

TITLE = "LP++"
FAMILY = "linear"
READS = "features"
NEW_CLASSES = False
DRAWS = True
EVALUATION: frozenset[str] = frozenset()


class Settings(BaseModel):
    """LP++ as its authors train it; its learning rates follow from the images.

    Attributes:
        prompts: what names a class; officially the template, on ImageNet an ensemble.
        epochs: of one step over all images.
        momentum: of SGD on the classifier and the bias.
        every: epochs from one step of the weights of the texts to the next.
        scale: of the start of these weights, times the mean cosine of an image and its class.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompts: Kind = "template"
    epochs: Count = 300
    momentum: Below1 = 0.9
    every: Count = 10
    scale: NotNegative = 250.0


def problems(settings: Settings, depth: int | None, width: int | None) -> dict[str, str]:
    return {}


def work(settings: Settings, n_images: int, n_classes: int) -> Work:
    return Work(steps=settings.epochs, images=0, prompts=0)
