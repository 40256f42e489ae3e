"""Checkpoints of official code on Dassl: <run>/<model>/model.pth.tar-<epoch>, pickled {"state_dict", "epoch"}.

Tensors and numbers alone are read of such a file. What differs between methods stands in their own convert.py.
"""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from heba.clip.context import Texts
from heba.data.validation import keys_and_reasons

PREFIXES = ("module.", "prompt_learner.", "adapter_learner.")  # of wrapped models, and of models saved whole
FROZEN = ("image_encoder.", "text_encoder.", "ZS_image_encoder.", "logit_scale")  # CLIP's, in a model saved whole
LEARNED = "VPT"  # in the names of what is learned inside CLIP's towers
FIXED = ("token_prefix", "token_suffix", "token_midfix")  # embeddings of the training's class names
SUFFIX = "token_suffix"  # of them, what comes behind the context
TOLERANCE = 0.01  # relative, of embeddings in fp16 that an average over epochs has rounded again
# In checkpoints with the accuracy of a validation, which may be a number of NumPy. Old files have its old names.
_SCALAR: Any = np.float64(0).__reduce__()[0]  # type: ignore[index]
NUMPY_SCALARS: list[Any] = [
    (_SCALAR, "numpy._core.multiarray.scalar"),
    (_SCALAR, "numpy.core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f4", "f8", "i8")),
]
# Dassl pickles the scheduler that follows a warm-up as an object.
KEEP_TENSORS = (
    "import sys, torch; c = torch.load(sys.argv[1], 'cpu', weights_only=False); "
    "torch.save({k: c[k] for k in ('state_dict', 'epoch')}, sys.argv[2])"
)


class Checkpoint(NamedTuple):
    """An official checkpoint.

    Attributes:
        path: of its file.
        tensors: what was trained, by its official name without `PREFIXES`.
        epoch: the number of epochs.
        suffix: the embeddings [n_classes, length, width] of what came behind the context in the texts of the
            training; None where none were kept.
        content: all of the file.
    """

    path: Path
    tensors: dict[str, Tensor]
    epoch: int
    suffix: Tensor | None
    content: dict[str, Any]


def read(path: Path) -> Checkpoint:
    """The checkpoint in a file; ValueError names `path` when it is none, or has more than tensors and numbers."""
    content = _load(path)
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or type(content.get("epoch")) is not int:
        raise ValueError(f"{path}: not an official checkpoint: it has no state_dict and epoch")
    tensors = {}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{path}: {key} is no tensor")
        name = str(key)
        for prefix in PREFIXES:
            name = name.removeprefix(prefix)
        if LEARNED in name or not name.startswith(FROZEN):
            tensors[name] = value
    fixed = {name: tensors.pop(name) for name in FIXED if name in tensors}
    return Checkpoint(path, tensors, content["epoch"], fixed.get(SUFFIX), content)


def _load(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(NUMPY_SCALARS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}; the official code writes model.pth.tar-<epoch>") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # a file from outside may be wrong in any way
        # Not torch's own text, which advises to load the file without weights_only.
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds {found[1]}" if found else "it is of another kind or damaged"
        if found and found[1].startswith("torch.optim."):
            files = shlex.join([str(path), f"{path}.tensors"])
            reason += f'; if you trust it, keep its tensors alone: python -c "{KEEP_TENSORS}" {files}'
        raise ValueError(f"{path}: not a checkpoint of tensors and numbers alone: {reason}") from None


def write(run: Path, model: str, tensors: Mapping[str, Tensor], epoch: int, **more: Any) -> Path:
    """Write `tensors` as a checkpoint of the official `model` under the folder `run`; returns its path."""
    path = run / model / f"model.pth.tar-{epoch}"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    torch.save({"state_dict": dict(tensors), "epoch": epoch, **more}, temporary)
    temporary.replace(path)
    return path


def rename(checkpoint: Checkpoint, names: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of a checkpoint, in fp32, under our names; `names` has the official name of each. ValueError
    lists what is missing or unknown."""
    official = set(names.values())
    problems = [f"missing {name}" for name in sorted(official - set(checkpoint.tensors))]
    problems += [f"unexpected {name}" for name in sorted(set(checkpoint.tensors) - official)]
    if problems:
        raise ValueError(f"{checkpoint.path}: not what the official code trains:\n  " + "\n  ".join(problems))
    return {ours: checkpoint.tensors[name].float() for ours, name in names.items()}


def context_of(checkpoint: Checkpoint, name: str, per_class: bool = False) -> int:
    """M, of a context `name` [M, width] or, if it may be `per_class`, [n_classes, M, width]."""
    shape = checkpoint.tensors[name].shape
    if len(shape) != 2 and not (per_class and len(shape) == 3):
        raise ValueError(f"{checkpoint.path}: {name} has shape {tuple(shape)}, which is no context")
    return shape[-2]


def settings_of(
    settings: type[BaseModel], told: Mapping[str, Any], given: Mapping[str, Any], checkpoint: Checkpoint
) -> dict[str, Any]:
    """All settings of a method: those that a checkpoint tells, those that are given besides, and the defaults."""
    clash = [f"{name} is {told[name]}" for name in given if name in told and told[name] != given[name]]
    if clash:
        raise ValueError(f"{checkpoint.path}: tells its settings itself: {', '.join(clash)}")
    try:
        return settings.model_validate({**told, **given}).model_dump()
    except ValidationError as error:
        raise ValueError(f"{checkpoint.path}: settings: {keys_and_reasons(error)}") from None


@torch.no_grad()
def check_texts(checkpoint: Checkpoint, texts: Texts, context_length: int) -> None:
    """Raise ValueError where a checkpoint was trained with other tokens behind the context than `texts` have, of a
    backbone with this `context_length`: with other classes, other words, or another backbone."""
    if checkpoint.suffix is None:
        return
    ours, theirs = texts.embeddings.float().cpu(), checkpoint.suffix.float()
    if theirs.ndim != 3 or theirs.shape[2] != ours.shape[2] or theirs.shape[1] >= context_length:
        raise ValueError(
            f"{checkpoint.path}: {SUFFIX} has shape {tuple(theirs.shape)}, not of this backbone's texts"
        )
    if len(theirs) != len(ours):
        raise ValueError(
            f"{checkpoint.path}: was trained on {len(theirs)} classes, and these are {len(ours)}; see --dataset "
            "and --all-classes"
        )
    first = context_length - theirs.shape[1]
    for k, end in enumerate((texts.packing.eot + 1).tolist()):
        own, other = ours[k, first:end], theirs[k, : end - first]
        if not (own - other).norm() <= TOLERANCE * own.norm():
            raise ValueError(
                f"{checkpoint.path}: the text of its class {k + 1} was another one than here, behind the context; "
                "see --dataset, --all-classes, the backbone, and the words, which --set gives"
            )


def depth_of(checkpoint: Checkpoint, tower: str) -> int:
    """How many blocks of a `tower` have a context; that of the first has another name."""
    later = re.compile(rf"{tower}\.transformer\.resblocks\.\d+\.VPT_shallow")
    return 1 + sum(later.fullmatch(name) is not None for name in checkpoint.tensors)


def context_names(first: str, tower: str, depth: int) -> list[str]:
    """The official names of the contexts of the first `depth` blocks of a `tower`."""
    return [first, *(f"{tower}.transformer.resblocks.{j}.VPT_shallow" for j in range(1, depth))]
