"""The settings of CLAP: a block of params.yaml."""

from pydantic import BaseModel, ConfigDict

from heba.data.prompts import Kind
from heba.fit.bounds import Below1, Count, Positive
from heba.fit.work import Work

TITLE = "CLAP"
FAMILY = "linear"
READS = "features"
NEW_CLASSES = False
DRAWS = True
EVALUATION: frozenset[str] = frozenset()


class Settings(BaseModel):
    """CLAP as its authors train it, with the same settings on every data set.

    Attributes:
        prompts: what names a class; officially the template, on ImageNet an ensemble.
        epochs: of as many batches as the images make without their views.
        batch_size, lr, momentum: of SGD; a cosine per epoch after a first epoch at 1e-5.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompts: Kind = "template"
    epochs: Count = 300
    batch_size: Count = 256
    lr: Positive = 0.1
    momentum: Below1 = 0.9


def problems(settings: Settings, depth: int | None, width: int | None) -> dict[str, str]:
    return {}


def work(settings: Settings, n_images: int, n_classes: int) -> Work:
    return Work(steps=settings.epochs * max(1, n_images // settings.batch_size), images=0, prompts=0)
