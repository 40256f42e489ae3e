"""The settings of CoCoOp: a block of params.yaml."""

from pydantic import BaseModel, ConfigDict

from heba.data.prompts import Kind
from heba.fit.bounds import Below1, Context, Count, NotNegative, Positive, Words
from heba.fit.work import Work, steps_per_epoch

TITLE = "CoCoOp"
FAMILY = "prompt"
READS = "features"
NEW_CLASSES = True
DRAWS = True
EVALUATION: frozenset[str] = frozenset()


class Settings(BaseModel):
    """CoCoOp for ViT-B/16 (vit_b16_c4_ep10_batch1_ctxv1.yaml), which has no configuration for few-shot learning.

    Attributes:
        prompts: of no effect; the context is learned.
        words: where the context begins, one vector a token; None: `context` random vectors.
        context: M, the number of random vectors.
        reduction: width of the features over width of the bottleneck.
        epochs: of the training.
        batch_size, lr, momentum, weight_decay: of SGD, with Dassl's schedule per epoch and drop_last. A step takes
            batch_size texts of each class through the text tower.
        views: train on the views that are there already, in place of crops drawn anew in every epoch.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompts: Kind = "template"
    words: Words | None = "a photo of a"
    context: Context = 4
    reduction: Count = 16
    epochs: Count = 10
    batch_size: Count = 1
    lr: Positive = 0.002
    momentum: Below1 = 0.9
    weight_decay: NotNegative = 0.0005
    views: bool = False


def problems(settings: Settings, depth: int | None, width: int | None) -> dict[str, str]:
    return {}


def work(settings: Settings, n_images: int, n_classes: int) -> Work:
    steps = settings.epochs * steps_per_epoch(n_images, settings.batch_size)
    images = 0 if settings.views else settings.batch_size
    return Work(steps, images, settings.batch_size * n_classes, tested=n_classes)
