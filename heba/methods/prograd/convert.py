"""Official checkpoints of ProGrad, <run>/prompt_learner/model.pth.tar-<epoch>, to ours and back.

One does not tell the words that the context began with, the setting `words`. They matter where they have a comma,
which is a token of its own: their last token then stays behind the context.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from heba.clip.context import Texts
from heba.clip.features import Classes
from heba.fit import official
from heba.fit.prompts import Learner
from heba.methods.prograd import method
from heba.methods.prograd.settings import Settings, epochs_of

MODEL = "prompt_learner"


def fits(tensors: Mapping[str, Tensor]) -> bool:
    return set(tensors) == {"ctx"} and tensors["ctx"].ndim == 2


def from_official(
    checkpoint: official.Checkpoint, given: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = official.rename(checkpoint, {"ctx": "ctx"})
    told = {"context": official.context_of(checkpoint, "ctx"), "epochs": checkpoint.epoch}
    return tensors, official.settings_of(Settings, told, {"words": None, **given}, checkpoint)


def texts_of(model: Learner, classes: Classes, settings: Settings) -> Texts:
    return method.texts_of(model, classes, settings)


def to_official(
    tensors: dict[str, Tensor], settings: Settings, shots: int | None, run: Path, source: Path
) -> Path:
    return official.write(run, MODEL, tensors, epochs_of(settings, shots) if shots else settings.epochs)
