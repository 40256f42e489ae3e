"""What a method costs, as it is counted. Imports no torch."""

import json
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

CLASSES, IMAGES = 50, 16  # of the training that is counted, and images of each

Count = Annotated[int, Field(ge=0)]


class Cost(BaseModel):
    """The floating-point operations of a method with `CLASSES` classes and `IMAGES` training images of each.

    Attributes:
        image: of a test image, with the image tower, and without the texts of the classes where they are the same
            for all images.
        step: of a training step through the towers; 0 for a method on frozen features.
        steps: of a training.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    image: Count
    step: Count
    steps: Count


def read_cost(path: Path) -> Cost:
    """Read a method's cost; ValueError names the file and the remedy."""
    try:
        return Cost.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path}: cannot be read ({reason}); make it with `dvc repro cost@{path.stem}`") from None


def write_cost(cost: Cost, path: Path) -> None:
    path.write_text(json.dumps(cost.model_dump(), indent=1) + "\n", encoding="utf-8")
