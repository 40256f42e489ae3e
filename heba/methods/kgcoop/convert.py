"""Official checkpoints of KgCoOp, <run>/prompt_learner/model.pth.tar-<epoch>, to ours and back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from heba.clip.context import Texts
from heba.clip.features import Classes
from heba.fit import official
from heba.fit.prompts import Learner, count_words
from heba.methods.kgcoop import method
from heba.methods.kgcoop.settings import Settings

MODEL = "prompt_learner"


def fits(tensors: Mapping[str, Tensor]) -> bool:
    return set(tensors) == {"ctx"} and tensors["ctx"].ndim == 2


def from_official(
    checkpoint: official.Checkpoint, given: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = official.rename(checkpoint, {"ctx": "ctx"})
    told: dict[str, Any] = {"epochs": checkpoint.epoch}
    m = official.context_of(checkpoint, "ctx")
    if "words" not in given and m != count_words(Settings().words):
        told["words"] = " ".join(["X"] * m)  # as in the official code, for a context that began at random
    return tensors, official.settings_of(Settings, told, given, checkpoint)


def texts_of(model: Learner, classes: Classes, settings: Settings) -> Texts:
    return method.texts_of(model, classes, settings)


def to_official(
    tensors: dict[str, Tensor], settings: Settings, shots: int | None, run: Path, source: Path
) -> Path:
    return official.write(run, MODEL, tensors, settings.epochs)
