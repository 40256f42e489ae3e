"""The settings of zero-shot CLIP: a block of params.yaml."""

from pydantic import BaseModel, ConfigDict

from heba.data.prompts import Kind
from heba.fit.work import Work

TITLE = "CLIP"
FAMILY = "frozen"
READS = "features"
NEW_CLASSES = True
DRAWS = False
EVALUATION: frozenset[str] = frozenset()


class Settings(BaseModel):
    """prompts: what names a class; CoOp's zero-shot rows have the template, CuPL's the descriptions or both."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompts: Kind = "descriptions"


def problems(settings: Settings, depth: int | None, width: int | None) -> dict[str, str]:
    return {}


def work(settings: Settings, n_images: int, n_classes: int) -> Work:
    return Work(steps=0, images=0, prompts=0)
