"""Official checkpoints of CoOp, <run>/prompt_learner/model.pth.tar-<epoch>, to ours and back.

One does not tell where the class name stands, which is the setting `position`. Of the words that a context began
with, nothing but the context counts.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from heba.clip.context import Texts
from heba.clip.features import Classes
from heba.fit import official
from heba.fit.prompts import Learner
from heba.methods.coop import method
from heba.methods.coop.settings import Settings, epochs_of

MODEL = "prompt_learner"


def fits(tensors: Mapping[str, Tensor]) -> bool:
    return set(tensors) == {"ctx"} and tensors["ctx"].ndim in (2, 3)


def from_official(
    checkpoint: official.Checkpoint, given: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = official.rename(checkpoint, {"ctx": "ctx"})
    told = {
        "context": official.context_of(checkpoint, "ctx", per_class=True),
        "per_class": tensors["ctx"].ndim == 3,
        "epochs": checkpoint.epoch,
    }
    return tensors, official.settings_of(Settings, told, given, checkpoint)


def texts_of(model: Learner, classes: Classes, settings: Settings) -> Texts:
    return method.texts_of(model.clip, classes.names, classes.tokenizer, settings)


def to_official(
    tensors: dict[str, Tensor], settings: Settings, shots: int | None, run: Path, source: Path
) -> Path:
    return official.write(run, MODEL, tensors, epochs_of(settings, shots) if shots else settings.epochs)
