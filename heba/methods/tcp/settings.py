"""The settings of TCP: a block of params.yaml."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from heba.data.prompts import TEMPLATE_PATTERN, Kind
from heba.fit.bounds import Context, Count, NotNegative, Positive
from heba.fit.work import Work, steps_per_epoch

TITLE = "TCP"
FAMILY = "prompt"
READS = "features"
NEW_CLASSES = True
DRAWS = True
EVALUATION: frozenset[str] = frozenset()


class Settings(BaseModel):
    """TCP for ViT-B/16, from base to new classes (vit_b16_ep100_ctxv1.yaml, and Adam's eps by its README).

    Attributes:
        prompts: what makes the tokens of a class, and what its text keeps near to; officially the data set's
            template.
        text: what follows the context, {} the class name.
        context: M, the number of learned vectors, and of the tokens that a class has of its own.
        after: the blocks of the text tower before a class's tokens take the place of the context.
        reduction: width of the features over width of the bottleneck that makes these tokens.
        weight: of the distance from the prompts' features in the loss.
        epochs, batch_size, lr, weight_decay, eps: of Adam, the decay added to the gradient, with Dassl's schedule
            per epoch and drop_last.
        views: train on the views that are there already, in place of crops drawn anew in every epoch.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompts: Kind = "template"
    text: Annotated[str, Field(max_length=400, pattern=TEMPLATE_PATTERN)] = "{}."
    context: Context = 4
    after: Annotated[int, Field(ge=1, le=1000)] = 8
    reduction: Count = 4
    weight: NotNegative = 8.0
    epochs: Count = 50
    batch_size: Count = 32
    lr: Positive = 0.002
    weight_decay: NotNegative = 0.0005
    eps: Positive = 0.001
    views: bool = False


def problems(settings: Settings, depth: int | None, width: int | None) -> dict[str, str]:
    """What does not fit the backbone, by setting."""
    if depth and settings.after >= depth:
        return {"after": f"no layer of the backbone's {depth} comes after the first {settings.after}"}
    return {}


def work(settings: Settings, n_images: int, n_classes: int) -> Work:
    images = 0 if settings.views else settings.batch_size
    return Work(settings.epochs * steps_per_epoch(n_images, settings.batch_size), images, n_classes)
