"""The settings of CoOp: a block of params.yaml."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from heba.data.prompts import Kind
from heba.fit.bounds import Below1, Context, Count, NotNegative, Positive, Words
from heba.fit.work import Work, epochs_by_shots, steps_per_epoch

TITLE = "CoOp"
FAMILY = "prompt"
READS = "features"
NEW_CLASSES = True
DRAWS = True
EVALUATION: frozenset[str] = frozenset()


class Settings(BaseModel):
    """CoOp for ViT-B/16, for few-shot learning (vit_b16.yaml, _ep100, _ep50).

    Attributes:
        prompts: of no effect; the context is learned.
        words: where the context begins, one vector a token; None: `context` random vectors.
        context: M, the number of random vectors.
        per_class: a context of its own for each class, which then cannot classify new classes.
        position: of the class name: at the end, in the middle or in front of the context.
        epochs: with 8 shots and more. epochs_few: with 2 to 7. epochs_one: with one.
        batch_size, lr, momentum, weight_decay: of SGD, with Dassl's schedule per epoch and drop_last.
        views: train on the views that are there already, in place of crops drawn anew in every epoch.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompts: Kind = "template"
    words: Words | None = None
    context: Context = 16
    per_class: bool = False
    position: Literal["end", "middle", "front"] = "end"
    epochs: Count = 200
    epochs_few: Count = 100
    epochs_one: Count = 50
    batch_size: Count = 32
    lr: Positive = 0.002
    momentum: Below1 = 0.9
    weight_decay: NotNegative = 0.0005
    views: bool = False


def epochs_of(settings: Settings, shots: int) -> int:
    """The epochs of a training with so many images a class."""
    return epochs_by_shots(shots, settings.epochs, settings.epochs_few, settings.epochs_one)


def problems(settings: Settings, depth: int | None, width: int | None) -> dict[str, str]:
    return {}


def work(settings: Settings, n_images: int, n_classes: int) -> Work:
    epochs = epochs_of(settings, n_images // n_classes)
    images = 0 if settings.views else settings.batch_size
    return Work(epochs * steps_per_epoch(n_images, settings.batch_size), images, n_classes)
