"""The record of an evaluation: one training of one method on one data set's test images. Imports no torch."""

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from heba.data.protocols import PROTOCOLS
from heba.evaluation.metrics import harmonic_mean

Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Group(_Strict):
    """The test images of some classes, told apart among these classes alone (`classification_report`).

    `predicted`, of own data alone, is the predicted label of each test image, in the order of the split.
    """

    n: Annotated[int, Field(ge=1)]
    accuracy: Percent
    class_names: list[str]
    per_class: list[Percent | None]
    confusion: list[list[int]]
    predicted: list[int] | None = None


class Record(_Strict):
    """An evaluation.

    Attributes:
        protocol, dataset, method, shots, seed: what was evaluated, on whose test images.
        source: the data set of the training where that is another one.
        suite, backbone: what it was made with; backbone as in params.yaml.
        settings: those of the method that only an evaluation reads.
        trained_parameters: numbers that the training changed. adapter_bytes: of the file that it left.
        adapter_sha256, inputs_sha256: of the training. evaluated_sha256: of all that this record depends on.
        groups: base and novel, or all.
    """

    protocol: str
    dataset: str
    method: str
    shots: int
    seed: int
    source: str | None
    suite: str
    backbone: dict[str, str]
    settings: dict[str, Any]
    trained_parameters: Annotated[int, Field(ge=0)]
    adapter_bytes: Annotated[int, Field(ge=0)]
    adapter_sha256: str
    inputs_sha256: str
    evaluated_sha256: str
    groups: dict[str, Group]

    @model_validator(mode="after")
    def _known(self) -> "Record":
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"protocol: unknown protocol {self.protocol!r}")
        groups = PROTOCOLS[self.protocol].groups
        if not self.groups or any(group not in groups for group in self.groups):
            raise ValueError(f"groups: must be among {', '.join(groups)}")
        return self

    def accuracies(self) -> dict[str, float]:
        """Accuracy by group, and h, the harmonic mean of base and novel, where there are both."""
        found = {name: group.accuracy for name, group in self.groups.items()}
        if {"base", "novel"} <= set(found):
            found["h"] = harmonic_mean(found["base"], found["novel"])
        return found


def read_record(path: Path) -> Record:
    """Read a record; ValueError names the file and the keys that are wrong."""
    try:
        return Record.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        told = [(".".join(map(str, e["loc"])), e["msg"]) for e in error.errors()[:3]]
        found = "; ".join(f"key '{key}': {message}" if key else message for key, message in told)
        raise ValueError(
            f"{path}: not a record of an evaluation ({found}); evaluate this data set again"
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); evaluate this data set again") from None


def write_record(record: Record, path: Path) -> None:
    text = json.dumps(record.model_dump(), ensure_ascii=False, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
