"""The settings of ProLIP: a block of params.yaml."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from heba.data.prompts import Kind
from heba.fit.bounds import Count, NotNegative, Positive
from heba.fit.work import Work

TITLE = "ProLIP"
FAMILY = "adapter"
READS = "features"
NEW_CLASSES = True
DRAWS = True
EVALUATION: frozenset[str] = frozenset()


class Settings(BaseModel):
    """ProLIP without validation images, as officially in all protocols.

    Attributes:
        prompts: what names a class; officially the data set's template.
        lr, steps: of Adam, with full batches and a cosine per step.
        penalty: of the squared distance from the start; None: 1 / shots.
        search: whether lr and penalty are the first best pair of search_lr and search_penalty on val, in the order
            of these lists; without images in val they are lr and penalty.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompts: Kind = "template"
    lr: Positive = 1e-5
    penalty: NotNegative | None = None
    steps: Count = 300
    search: bool = False
    search_lr: Annotated[list[Positive], Field(min_length=1)] = [1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8]
    search_penalty: Annotated[list[NotNegative], Field(min_length=1)] = [10.0, 1.0, 0.1, 0.01, 1e-3, 1e-4, 0.0]


def penalty_of(settings: Settings, shots: int) -> float:
    return 1 / shots if settings.penalty is None else settings.penalty


def grid_of(settings: Settings) -> list[tuple[float, float]]:
    """The pairs (lr, penalty) that are tried on val."""
    if not settings.search:
        return []
    return [(lr, penalty) for lr in settings.search_lr for penalty in settings.search_penalty]


def problems(settings: Settings, depth: int | None, width: int | None) -> dict[str, str]:
    return {}


def work(settings: Settings, n_images: int, n_classes: int) -> Work:
    return Work(steps=settings.steps * (1 + len(grid_of(settings))), images=0, prompts=0)
