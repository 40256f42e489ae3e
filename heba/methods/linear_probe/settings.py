"""The settings of the linear probe: a block of params.yaml."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from heba.data.prompts import Kind
from heba.fit.work import Work

TITLE = "Linear probe"
FAMILY = "linear"
READS = "features"
NEW_CLASSES = False
DRAWS = True
EVALUATION: frozenset[str] = frozenset()


class Settings(BaseModel):
    """The linear probe as CoOp has it (lpclip).

    Attributes:
        prompts: of no effect; class names are not read.
        c: C, the inverse strength of the penalty, where there are no validation images; CLIP's own example.
        steps: halvings of the range of C around the best power of 100.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompts: Kind = "template"
    c: Annotated[float, Field(ge=1e-7, le=1e7, allow_inf_nan=False)] = 0.316
    steps: Annotated[int, Field(ge=1, le=30)] = 8


def problems(settings: Settings, depth: int | None, width: int | None) -> dict[str, str]:
    return {}


def work(settings: Settings, n_images: int, n_classes: int) -> Work:
    return Work(steps=0, images=0, prompts=0)
