"""Official checkpoints of MaPLe, <run>/MultiModalPromptLearner/model.pth.tar-<epoch>, to ours and back.

They hold all of CLIP, too, which is left out.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from heba.clip.context import Texts
from heba.clip.features import Classes
from heba.fit import official
from heba.methods.maple import method
from heba.methods.maple.settings import Settings

MODEL = "MultiModalPromptLearner"
WORDS = 4  # officially, a longer context begins at random, without words


def names_of(depth: int) -> dict[str, str]:
    """The official names of our tensors, without the prefix."""
    names = {"text.0": "ctx", "project.0.weight": "proj.weight", "project.0.bias": "proj.bias"}
    for j in range(1, depth):
        names[f"text.{j}"] = f"compound_prompts_text.{j - 1}"
        for part in ("weight", "bias"):
            names[f"project.{j}.{part}"] = f"compound_prompt_projections.{j - 1}.{part}"
    return names


def fits(tensors: Mapping[str, Tensor]) -> bool:
    return {"ctx", "proj.weight"} <= set(tensors)


def from_official(
    checkpoint: official.Checkpoint, given: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    depth = 1 + sum(name.startswith("compound_prompts_text.") for name in checkpoint.tensors)
    tensors = official.rename(checkpoint, names_of(depth))
    m = official.context_of(checkpoint, "ctx")
    told = {"context": m, "depth": depth, "epochs": checkpoint.epoch}
    if m > WORDS:
        given = {"words": None, **given}
    return tensors, official.settings_of(Settings, told, given, checkpoint)


def texts_of(model: method.Model, classes: Classes, settings: Settings) -> Texts:
    return method.texts_of(model.clip, classes, settings)


def to_official(
    tensors: dict[str, Tensor], settings: Settings, shots: int | None, run: Path, source: Path
) -> Path:
    names = names_of(settings.depth)
    state = {f"prompt_learner.{names[ours]}": tensor for ours, tensor in tensors.items()}
    return official.write(run, MODEL, state, settings.epochs)
