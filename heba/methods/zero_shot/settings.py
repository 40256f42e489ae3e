"""Zero-shot CLIP has no settings."""

from pydantic import BaseModel, ConfigDict

from heba.fit.work import Work

TITLE = "CLIP"
READS = "features"
NEW_CLASSES = True
DRAWS = False
EVALUATION: frozenset[str] = frozenset()


class Settings(BaseModel):
    """None: the prompts are those of the data set."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def problems(settings: Settings, depth: int | None, width: int | None) -> dict[str, str]:
    return {}


def work(settings: Settings, n_images: int, n_classes: int) -> Work:
    return Work(steps=0, images=0, prompts=0)
