"""The settings of TaskRes: a block of params.yaml."""

from pydantic import BaseModel, ConfigDict

from heba.data.prompts import Kind
from heba.fit.bounds import Count, NotNegative, Positive
from heba.fit.work import Work

TITLE = "TaskRes"
FAMILY = "linear"
READS = "features"
NEW_CLASSES = False
DRAWS = True
EVALUATION: frozenset[str] = frozenset()


class Settings(BaseModel):
    """TaskRes with its regular base; officially alpha is 1 on Oxford Flowers and lr 0.0002 on ImageNet.

    Attributes:
        prompts: what names a class; officially the data set's template, on ImageNet eight templates.
        alpha: the weight of the residual.
        epochs: with 8 shots and more. epochs_few: with fewer.
        batch_size, lr, weight_decay: of Adam, with the decay added to the gradient, Dassl's schedule per epoch and
            drop_last.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompts: Kind = "template"
    alpha: Positive = 0.5
    epochs: Count = 200
    epochs_few: Count = 100
    batch_size: Count = 256
    lr: Positive = 0.002
    weight_decay: NotNegative = 0.0005


def epochs_of(settings: Settings, shots: int) -> int:
    return settings.epochs if shots >= 8 else settings.epochs_few


def problems(settings: Settings, depth: int | None, width: int | None) -> dict[str, str]:
    return {}


def work(settings: Settings, n_images: int, n_classes: int) -> Work:
    epochs = epochs_of(settings, n_images // n_classes)
    return Work(steps=epochs * max(1, n_images // settings.batch_size), images=0, prompts=0)
