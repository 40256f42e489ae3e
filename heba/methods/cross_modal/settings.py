"""The settings of cross-modal adaptation: a block of params.yaml."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from heba.data.prompts import Kind
from heba.fit.bounds import Count, Fraction, NotNegative, Positive
from heba.fit.work import Work

TITLE = "Cross-modal"
FAMILY = "linear"
READS = "features"
NEW_CLASSES = False
DRAWS = True
EVALUATION: frozenset[str] = frozenset()

Size = Annotated[int, Field(ge=2, le=1_000_000, multiple_of=2)]


class Settings(BaseModel):
    """The official grid of the linear classifier: 12 trainings of 12,800 steps.

    Attributes:
        prompts: what names a class, each prompt a sample; officially the data set's template, on ImageNet seven.
        init: the classifier's start; the README has zeroshot, the script random.
        wise_ft: the share of the zero-shot classifier in the final one; 0.5 is WiSE-FT.
        lr, weight_decay, batch_size: of AdamW, a batch half images and half texts; the first best on val in the
            order lr, weight_decay, batch_size. A size whose halves are not smaller than what there is of images
            and of texts is left out; where none remains, the smallest is cut to that.
        steps, warmup: of a training; lr rises in `warmup` steps and falls by a cosine of `steps`.
        every: steps from one look at val to the next.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompts: Kind = "template"
    init: Literal["zeroshot", "random"] = "zeroshot"
    wise_ft: Fraction = 0.0
    lr: Annotated[list[Positive], Field(min_length=1)] = [0.001, 0.0001]
    weight_decay: Annotated[list[NotNegative], Field(min_length=1)] = [0.0, 0.01, 0.0001]
    batch_size: Annotated[list[Size], Field(min_length=1)] = [8, 32]
    steps: Count = 12800
    warmup: Annotated[int, Field(ge=0, le=1_000_000)] = 50
    every: Count = 100


def problems(settings: Settings, depth: int | None, width: int | None) -> dict[str, str]:
    return {}


def work(settings: Settings, n_images: int, n_classes: int) -> Work:
    trainings = len(settings.lr) * len(settings.weight_decay) * len(settings.batch_size)
    return Work(steps=trainings * settings.steps, images=0, prompts=0)
