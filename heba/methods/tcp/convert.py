"""Official checkpoints of TCP, <run>/prompt_learner/model.pth.tar-<epoch>, to ours and back.

One does not tell what follows the context in a text, which officially differs between data sets; it is the setting
`text`. The prompts that make the tokens of a class are the data set's here; those of the official code differ from
them for Food101, FGVCAircraft and DTD.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from heba.clip.context import Texts
from heba.clip.features import Classes
from heba.fit import official
from heba.methods.tcp import method
from heba.methods.tcp.settings import Settings

MODEL = "prompt_learner"
OFFICIAL = {"context": 4, "after": 8, "reduction": 4}  # that the official code does not let one choose
NAMES = {"ctx", *(f"meta_net.linear{i}.{part}" for i in (1, 2) for part in ("weight", "bias"))}


def fits(tensors: Mapping[str, Tensor]) -> bool:
    return set(tensors) == NAMES and tensors["meta_net.linear2.bias"].numel() == tensors["ctx"].numel()


def from_official(
    checkpoint: official.Checkpoint, given: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = official.rename(checkpoint, {name: name for name in NAMES})
    told = {"context": official.context_of(checkpoint, "ctx"), "epochs": checkpoint.epoch}
    return tensors, official.settings_of(Settings, told, given, checkpoint)


def texts_of(model: method.Model, classes: Classes, settings: Settings) -> Texts:
    return method.texts_of(model, classes, settings)


def to_official(
    tensors: dict[str, Tensor], settings: Settings, shots: int | None, run: Path, source: Path
) -> Path:
    """ValueError, with the name `source`, for settings that the official code cannot have."""
    other = [f"{name} {value}" for name, value in OFFICIAL.items() if getattr(settings, name) != value]
    if other:
        raise ValueError(f"{source}: the official code has {', '.join(other)} and no other")
    return official.write(run, MODEL, tensors, settings.epochs)
