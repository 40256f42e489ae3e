"""Official checkpoints of VPT in the code of MaPLe, <run>/prompt_learner/model.pth.tar-<epoch>, to ours and back.

They hold all of CLIP, too, which is left out.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from heba.clip.features import Classes
from heba.fit import official
from heba.methods.vpt import method
from heba.methods.vpt.settings import Settings

MODEL = "prompt_learner"
WORDS = "a photo of a"  # that the official code does not let one choose
FIRST, TOWER = "image_encoder.VPT", "image_encoder"


def names_of(depth: int) -> dict[str, str]:
    """The official names of our tensors."""
    return {f"image.{j}": name for j, name in enumerate(official.context_names(FIRST, TOWER, depth))}


def fits(tensors: Mapping[str, Tensor]) -> bool:
    return FIRST in tensors and "ctx" not in tensors


def from_official(
    checkpoint: official.Checkpoint, given: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    depth = official.depth_of(checkpoint, TOWER)
    tensors = official.rename(checkpoint, names_of(depth))
    told = {
        "words": WORDS,
        "context": official.context_of(checkpoint, FIRST),
        "depth": depth,
        "epochs": checkpoint.epoch,
    }
    return tensors, official.settings_of(Settings, told, given, checkpoint)


def texts_of(model: method.Model, classes: Classes, settings: Settings) -> None:
    """A checkpoint has no texts."""


def to_official(
    tensors: dict[str, Tensor], settings: Settings, shots: int | None, run: Path, source: Path
) -> Path:
    """ValueError, with the name `source`, for other words than those of the official code."""
    if settings.words != WORDS:
        raise ValueError(f"{source}: the official code has the words {WORDS!r} and no other")
    names = names_of(settings.depth)
    state = {names[ours]: tensor for ours, tensor in tensors.items()}
    return official.write(run, MODEL, state, settings.epochs)
