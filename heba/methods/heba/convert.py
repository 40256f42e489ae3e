"""Convert checkpoints of the official implementation to our adapter folders and back.

The official trainer writes <run>/adapter_learner/model.pth.tar-<epoch>, a pickled {"state_dict", "epoch", ...}.
Its tensors have our names; the table of tokenised prompts beside them belongs to the data set and is left out. The
scale and the backbone are in the official YAML config, and the names of the classes in the data set. Ours have the
scale too, under a key that the official code does not look at.
"""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from heba.methods.heba.adapters import HEBA
from heba.methods.heba.settings import Settings

OFFICIAL_RATIO = 4
MODEL_NAME = "adapter_learner"  # the folder of the official checkpoints
NOT_WEIGHTS = ("tk_prompts", "text_features_for_inference")
WEIGHTS = {
    "text": ("down.weight", "up.weight", "norm.weight", "norm.bias"),
    "visual": ("down.weight", "mid.weight", "up.weight", "norm.weight", "norm.bias"),
}
# In checkpoints with the accuracy of a validation, which may be a number of NumPy. Old files have its old names.
_SCALAR: Any = np.float64(0).__reduce__()[0]  # type: ignore[index]
NUMPY_SCALARS: list[Any] = [
    (_SCALAR, "numpy._core.multiarray.scalar"),
    (_SCALAR, "numpy.core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f4", "f8", "i8")),
]


def read_official(path: Path) -> tuple[dict[str, Tensor], int, float | None]:
    """The adapters' tensors under our names, the number of epochs, and the scale if it is told, of an official
    checkpoint.

    ValueError names `path` when it is no such checkpoint, or holds more than tensors and numbers.
    """
    try:
        with torch.serialization.safe_globals(NUMPY_SCALARS):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}; the official code writes model.pth.tar-<epoch>") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # a file from outside may be wrong in any way
        # Not torch's own text, which advises to load the file without weights_only.
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds {found[1]}" if found else "it is of another kind or damaged"
        raise ValueError(f"{path}: not a checkpoint of tensors and numbers alone: {reason}") from None
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not isinstance(checkpoint.get("epoch"), int):
        raise ValueError(f"{path}: not an official checkpoint: it has no state_dict and epoch")
    scale = checkpoint.get("scale")
    if scale is not None and (type(scale) not in (int, float) or not 0 <= scale < float("inf")):
        raise ValueError(f"{path}: its scale is no number from 0")
    tensors = {}
    for key, value in state.items():
        name = key.removeprefix("module.").removeprefix(f"{MODEL_NAME}.")
        if name not in NOT_WEIGHTS:
            tensors[name] = value
    _span(tensors, path)
    return tensors, checkpoint["epoch"], scale


def from_official(checkpoint: Path, scale: float | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The adapters' tensors of an official checkpoint, and its settings. Those that it does not tell are the
    defaults, which are the official code's.

    `scale`: ADAPTER_SCALE_BASE of the official config; None: that of the checkpoint, if `to_official` wrote it.
    """
    tensors, epoch, told = read_official(checkpoint)
    scale = told if scale is None else scale
    if scale is None:
        raise ValueError(f"{checkpoint}: does not tell its scale; give ADAPTER_SCALE_BASE of its config (--scale)")
    start, end = _span(tensors, checkpoint)
    own: dict[str, Any] = {
        "start": start,
        "end": end,
        "ratio": _ratio(tensors, checkpoint),
        "scale": scale,
        "epochs": epoch,
    }
    return tensors, Settings(**own, **asdict(HEBA)).model_dump()


def to_official(tensors: dict[str, Tensor], settings: dict[str, Any], run: Path, source: Path) -> Path:
    """Write adapters as an official checkpoint under the folder `run`, in fp32; returns its path. ValueError, with
    the name `source`, for an ablation, whose adapters the official code cannot have."""
    _span(tensors, source)
    if _ratio(tensors, source) != OFFICIAL_RATIO:
        raise ValueError(f"{source}: the official code's adapters have the ratio {OFFICIAL_RATIO} and no other")
    epoch = settings["epochs"]
    path = run / MODEL_NAME / f"model.pth.tar-{epoch}"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    torch.save({"state_dict": tensors, "epoch": epoch, "scale": settings["scale"]}, temporary)
    temporary.replace(path)
    return path


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
    problems += [f"{k} is no tensor" for k, v in tensors.items() if not isinstance(v, Tensor)]
    if problems:
        raise ValueError(f"{path}: not the adapters of the official code:\n  " + "\n  ".join(problems))
    return start, end
