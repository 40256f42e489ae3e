"""The settings of MaPLe: a block of params.yaml."""

from pydantic import BaseModel, ConfigDict

from heba.data.prompts import Kind
from heba.fit.bounds import Below1, Context, Count, NotNegative, Positive, Words
from heba.fit.work import Work, steps_per_epoch

TITLE = "MaPLe"
FAMILY = "prompt"
READS = "pixels"
NEW_CLASSES = True
DRAWS = True
EVALUATION: frozenset[str] = frozenset()


class Settings(BaseModel):
    """MaPLe for ViT-B/16, for base-to-novel (vit_b16_c2_ep5_batch4_2ctx.yaml).

    Attributes:
        prompts: of no effect; the context is learned.
        words: before a class name; the context begins as their first `context` tokens, and the others stay. None:
            it begins at random, alone before the name.
        context: M, the tokens of a context, in texts and in images.
        depth: J, the first blocks of both towers that have a context of their own.
        epochs, batch_size, lr, momentum, weight_decay: of SGD, with Dassl's schedule per epoch and drop_last.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompts: Kind = "template"
    words: Words | None = "a photo of a"
    context: Context = 2
    depth: Count = 9
    epochs: Count = 5
    batch_size: Count = 4
    lr: Positive = 0.0035
    momentum: Below1 = 0.9
    weight_decay: NotNegative = 0.0005


def problems(settings: Settings, depth: int | None, width: int | None) -> dict[str, str]:
    if depth and settings.depth > depth:
        return {"depth": f"{settings.depth} is beyond the last layer, {depth}, of the backbone"}
    return {}


def work(settings: Settings, n_images: int, n_classes: int) -> Work:
    steps = steps_per_epoch(n_images, settings.batch_size)
    return Work(settings.epochs * steps, settings.batch_size, n_classes)
