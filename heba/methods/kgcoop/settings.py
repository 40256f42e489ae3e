"""The settings of KgCoOp: a block of params.yaml."""

from pydantic import BaseModel, ConfigDict

from heba.data.prompts import Kind
from heba.fit.bounds import Below1, Count, NotNegative, Positive, Words
from heba.fit.work import Work, steps_per_epoch

TITLE = "KgCoOp"
FAMILY = "prompt"
READS = "features"
NEW_CLASSES = True
DRAWS = True
EVALUATION: frozenset[str] = frozenset()


class Settings(BaseModel):
    """KgCoOp for ViT-B/16 (vit_b16_ep100_ctxv1.yaml and the scripts), the same in every protocol.

    Attributes:
        prompts: whose features the learned texts keep near to; officially the data set's template.
        words: where the context begins, one vector a word.
        weight: of the distance from these features in the loss.
        epochs, batch_size, lr, momentum, weight_decay: of SGD, with Dassl's schedule per epoch and drop_last.
        views: train on the views that are there already, in place of crops drawn anew in every epoch.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompts: Kind = "template"
    words: Words = "a photo of a"
    weight: NotNegative = 8.0
    epochs: Count = 100
    batch_size: Count = 128
    lr: Positive = 0.002
    momentum: Below1 = 0.9
    weight_decay: NotNegative = 0.0005
    views: bool = False


def problems(settings: Settings, depth: int | None, width: int | None) -> dict[str, str]:
    return {}


def work(settings: Settings, n_images: int, n_classes: int) -> Work:
    images = 0 if settings.views else settings.batch_size
    return Work(settings.epochs * steps_per_epoch(n_images, settings.batch_size), images, n_classes)
