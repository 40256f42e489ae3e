"""Official checkpoints of CoCoOp, <run>/prompt_learner/model.pth.tar-<epoch>, to ours and back.

Its tensors have the names of TCP's; the width of what the bottleneck makes tells them apart.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from heba.clip.context import Texts
from heba.clip.features import Classes
from heba.fit import official
from heba.methods.cocoop import method
from heba.methods.cocoop.settings import Settings

MODEL = "prompt_learner"
REDUCTION = 16  # of the official code
NAMES = {"ctx", *(f"meta_net.linear{i}.{part}" for i in (1, 2) for part in ("weight", "bias"))}


def fits(tensors: Mapping[str, Tensor]) -> bool:
    return set(tensors) == NAMES and tensors["meta_net.linear2.bias"].shape == tensors["ctx"].shape[1:]


def from_official(
    checkpoint: official.Checkpoint, given: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = official.rename(checkpoint, {name: name for name in NAMES})
    told = {
        "context": official.context_of(checkpoint, "ctx"),
        "reduction": REDUCTION,
        "epochs": checkpoint.epoch,
    }
    return tensors, official.settings_of(Settings, told, {"words": None, **given}, checkpoint)


def texts_of(model: method.Model, classes: Classes, settings: Settings) -> Texts:
    return method.texts_of(model, classes, settings)


def to_official(
    tensors: dict[str, Tensor], settings: Settings, shots: int | None, run: Path, source: Path
) -> Path:
    """ValueError, with the name `source`, for a bottleneck that the official code cannot have."""
    if settings.reduction != REDUCTION:
        raise ValueError(f"{source}: the official code's bottleneck has the reduction {REDUCTION} and no other")
    return official.write(run, MODEL, tensors, settings.epochs)
