"""Official checkpoints of HeBA, <run>/adapter_learner/model.pth.tar-<epoch>, to ours and back.

Its tensors have our names; the table of tokenised prompts beside them belongs to the data set and is left out. The
scale and the backbone are in the official YAML config, and the names of the classes in the data set. Ours have the
scale too, under a key that the official code does not look at.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from heba.clip.features import Classes
from heba.fit import official
from heba.methods.heba.adapters import HEBA
from heba.methods.heba.model import AdaptedCLIP
from heba.methods.heba.settings import Settings

OFFICIAL_RATIO = 4
MODEL = "adapter_learner"
NOT_WEIGHTS = ("tk_prompts", "text_features_for_inference")
WEIGHTS = {
    "text": ("down.weight", "up.weight", "norm.weight", "norm.bias"),
    "visual": ("down.weight", "mid.weight", "up.weight", "norm.weight", "norm.bias"),
}


def fits(tensors: Mapping[str, Tensor]) -> bool:
    return any(name.startswith(("text_adapter.", "visual_adapter.")) for name in tensors)


def from_official(
    checkpoint: official.Checkpoint, given: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`given` has the scale, ADAPTER_SCALE_BASE of the official config, unless `to_official` wrote it into the
    checkpoint."""
    tensors = {name: value for name, value in checkpoint.tensors.items() if name not in NOT_WEIGHTS}
    start, end = _span(tensors, checkpoint.path)
    scale = checkpoint.content.get("scale")
    if scale is not None and (type(scale) not in (int, float) or not 0 <= scale < float("inf")):
        raise ValueError(f"{checkpoint.path}: its scale is no number from 0")
    scale = given.get("scale", scale)
    if scale is None:
        raise ValueError(
            f"{checkpoint.path}: does not tell its scale; give ADAPTER_SCALE_BASE of its config (--scale)"
        )
    told = {
        "start": start,
        "end": end,
        "ratio": _ratio(tensors, checkpoint.path),
        "epochs": checkpoint.epoch,
        **asdict(HEBA),
    }
    return tensors, official.settings_of(Settings, told, {**given, "scale": scale}, checkpoint)


def texts_of(model: AdaptedCLIP, classes: Classes, settings: Settings) -> None:
    """A checkpoint has no embeddings of texts."""


def to_official(
    tensors: dict[str, Tensor], settings: Settings, shots: int | None, run: Path, source: Path
) -> Path:
    """ValueError, with the name `source`, for an ablation, whose adapters the official code cannot have."""
    _span(tensors, source)
    if _ratio(tensors, source) != OFFICIAL_RATIO:
        raise ValueError(f"{source}: the official code's adapters have the ratio {OFFICIAL_RATIO} and no other")
    return official.write(run, MODEL, tensors, settings.epochs, scale=settings.scale)


def _ratio(tensors: dict[str, Tensor], path: Path) -> int:
    ratios = {v.shape[1] // v.shape[0] for k, v in tensors.items() if k.endswith("down.weight")}
    if len(ratios) != 1:
        raise ValueError(f"{path}: the adapters have different ratios, {sorted(ratios)}")
    return ratios.pop()


def _span(tensors: dict[str, Any], path: Path) -> tuple[int, int]:
    """First and last layer of a complete set of official adapters; ValueError lists what is missing or unknown."""
    layers = {int(m[1]) for name in tensors if (m := re.match(r"(?:text|visual)_adapter\.(\d+)\.", name))}
    if not layers:
        raise ValueError(
            f"{path}: it has no adapters; the official ones are named text_adapter and visual_adapter"
        )
    start, end = min(layers), max(layers)
    expected = {
        f"{tower}_adapter.{layer}.{part}.{weight}"
        for tower, weights in WEIGHTS.items()
        for layer in range(start, end + 1)
        for part in ("att_conv", "mlp_conv")
        for weight in weights
    }
    problems = [f"missing {name}" for name in sorted(expected - set(tensors))]
    problems += [f"unexpected {name}" for name in sorted(set(tensors) - expected)]
    if problems:
        raise ValueError(f"{path}: not the adapters of the official code:\n  " + "\n  ".join(problems))
    return start, end
