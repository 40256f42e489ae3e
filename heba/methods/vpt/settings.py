"""The settings of VPT: a block of params.yaml."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from heba.data.prompts import Kind
from heba.fit.bounds import Below1, Count, NotNegative, Positive, Words
from heba.fit.work import Work, steps_per_epoch

TITLE = "VPT"
FAMILY = "prompt"
READS = "pixels"
NEW_CLASSES = True
DRAWS = True
EVALUATION: frozenset[str] = frozenset()


class Settings(BaseModel):
    """VPT for ViT-B/16, as the repository of MaPLe has it (vit_b16_c2_ep5_batch4_4.yaml).

    Attributes:
        prompts: of no effect; a text is `words` and the name of a class.
        words: before a class name, for every data set.
        context: M, the learned tokens of an image.
        depth: J, the first blocks of the image tower that have a context of their own.
        epochs, batch_size, lr, momentum, weight_decay: of SGD, with Dassl's schedule per epoch and drop_last.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompts: Kind = "template"
    words: Words = "a photo of a"
    context: Annotated[int, Field(ge=1, le=1024)] = 8
    depth: Count = 12
    epochs: Count = 5
    batch_size: Count = 4
    lr: Positive = 0.0025
    momentum: Below1 = 0.9
    weight_decay: NotNegative = 0.0005


def problems(settings: Settings, depth: int | None, width: int | None) -> dict[str, str]:
    if depth and settings.depth > depth:
        return {"depth": f"{settings.depth} is beyond the last layer, {depth}, of the backbone"}
    return {}


def work(settings: Settings, n_images: int, n_classes: int) -> Work:
    return Work(settings.epochs * steps_per_epoch(n_images, settings.batch_size), settings.batch_size, 0)
