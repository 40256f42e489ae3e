"""Official checkpoints of PromptSRC, <run>/VLPromptLearner/model.pth.tar-<epoch>, to ours and back.

They hold all of CLIP, too, and the frozen teacher, which are left out. Those of IVLP, which has the same model and
another loss, have the same names.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from heba.clip.context import Texts
from heba.clip.features import Classes
from heba.fit import official
from heba.methods.promptsrc import method
from heba.methods.promptsrc.settings import Settings

MODEL = "VLPromptLearner"
WORDS = 4  # officially, a longer context begins at random, without words


def names_of(text_depth: int, image_depth: int) -> dict[str, str]:
    """The official names of our tensors, without the prefix."""
    text = official.context_names("ctx", "text_encoder", text_depth)
    image = official.context_names("image_encoder.VPT", "image_encoder", image_depth)
    return {f"text.{j}": name for j, name in enumerate(text)} | {
        f"image.{j}": name for j, name in enumerate(image)
    }


def fits(tensors: Mapping[str, Tensor]) -> bool:
    return {"ctx", "image_encoder.VPT"} <= set(tensors)


def from_official(
    checkpoint: official.Checkpoint, given: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    depths = {f"{tower}_depth": official.depth_of(checkpoint, f"{tower}_encoder") for tower in ("text", "image")}
    tensors = official.rename(checkpoint, names_of(**depths))
    m = official.context_of(checkpoint, "ctx")
    told = {
        "text_context": m,
        "image_context": official.context_of(checkpoint, "image_encoder.VPT"),
        "epochs": checkpoint.epoch,
        **depths,
    }
    if m > WORDS:
        given = {"words": None, **given}
    return tensors, official.settings_of(Settings, told, given, checkpoint)


def texts_of(model: method.Model, classes: Classes, settings: Settings) -> Texts:
    return method.texts_of(model.clip, classes, settings)


def to_official(
    tensors: dict[str, Tensor], settings: Settings, shots: int | None, run: Path, source: Path
) -> Path:
    names = names_of(settings.text_depth, settings.image_depth) | {"text.0": "prompt_learner.ctx"}
    state = {names[ours]: tensor for ours, tensor in tensors.items()}
    return official.write(run, MODEL, state, settings.epochs)
