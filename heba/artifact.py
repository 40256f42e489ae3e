"""The result of a training: a folder with the settings, the trained tensors and the classifier of its classes.

    config.json               `Config`
    adapter.safetensors       what was trained, under the official names where there are any
    classifier.safetensors    what the method keeps of the training's class names
    history.csv               epoch, loss, lr

Nothing else reads or writes these files. Importing this module imports no torch, which takes seconds.
"""

import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from heba import methods
from heba.data.validation import keys_and_reasons

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

CONFIG_FILE, ADAPTER_FILE, CLASSIFIER_FILE = "config.json", "adapter.safetensors", "classifier.safetensors"
HISTORY_FILE = "history.csv"
FILES = (CONFIG_FILE, ADAPTER_FILE, CLASSIFIER_FILE)  # what predictions depend on
EPOCH = ("epoch", "loss", "lr")
REMEDY = "train again, or restore it with `dvc checkout`"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Backbone(_Strict):
    """The frozen model, with the hash of its weights' file and that of a JSON config of one's own."""

    name: str
    pretrained: str
    sha256: str
    config_sha256: str | None = None


class Config(_Strict):
    """The config of a training.

    Attributes:
        method: its name. settings: all of its settings.
        class_names: the classes it was trained on, in the order of the logits.
        protocol, dataset, suite: what it was trained for and on.
        seed, shots, inputs_sha256: None for a converted checkpoint. The hash is of all its inputs.
        bf16, threads, cuda_graphs, deterministic: how it ran.
        chosen: the values that the method chose on validation images, such as a weight of its cache.
    """

    method: str
    settings: dict[str, Any]
    class_names: Annotated[list[str], Field(min_length=1)]
    backbone: Backbone
    protocol: str
    dataset: str
    suite: str
    bf16: bool
    seed: int | None = None
    shots: int | None = None
    threads: int | None = None
    cuda_graphs: bool = False
    deterministic: bool = False
    inputs_sha256: str | None = None
    chosen: dict[str, float] = {}

    def method_settings(self) -> Any:
        """`settings` as the method's own Settings; ValueError names what is wrong with them."""
        settings = methods.part(self.method, "settings").Settings
        missing = set(settings.model_fields) - set(self.settings)
        if missing:
            raise ValueError(f"settings: {', '.join(sorted(missing))} missing")
        return settings.model_validate(self.settings)


def read_config(folder: Path) -> Config:
    """The config in `folder`; ValueError when there is no artifact, or the config is damaged."""
    path = folder / CONFIG_FILE
    if not path.is_file() or not (folder / ADAPTER_FILE).is_file():
        raise ValueError(
            f"{folder}: no adapter; name the folder that a training wrote, with {ADAPTER_FILE} and {CONFIG_FILE} "
            "in it, such as out/train/eurosat/heba/base_to_novel-16-1"
        )
    try:
        config = Config.model_validate_json(path.read_text(encoding="utf-8"))
        config.method_settings()
    except ValidationError as error:
        raise ValueError(f"{path}: damaged ({keys_and_reasons(error)}); {REMEDY}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged ({error}); {REMEDY}") from None
    return config


def write_config(config: Config, folder: Path) -> None:
    text = json.dumps(config.model_dump(), ensure_ascii=False, indent=1, sort_keys=True)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def write_tensors(tensors: Mapping[str, "Tensor"], folder: Path, dtype: "torch.dtype") -> None:
    """Write what was trained, in `dtype`; ValueError when a value does not fit into it, and nothing is written."""
    from safetensors.torch import save_file

    tensors = {name: t.detach().cpu().to(dtype).contiguous() for name, t in tensors.items()}
    overflowed = [name for name, t in tensors.items() if not t.isfinite().all()]
    if overflowed:
        raise ValueError(f"{', '.join(overflowed)}: not finite as {dtype}; save the adapters in fp32")
    save_file(tensors, folder / ADAPTER_FILE)


def read_tensors(folder: Path) -> dict[str, "Tensor"]:
    """What was trained, in fp32; ValueError names a damaged file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return {name: tensor.float() for name, tensor in load_file(folder / ADAPTER_FILE).items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / ADAPTER_FILE}: damaged ({error}); {REMEDY}") from None


def write_classifier(classifier: Mapping[str, "Tensor"], folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.cpu().contiguous() for name, tensor in classifier.items()}, folder / CLASSIFIER_FILE)


def read_classifier(folder: Path, n_classes: int) -> dict[str, "Tensor"]:
    """What the method keeps of the training's own classes; ValueError when that is not of `n_classes` classes."""
    from safetensors.torch import load_file

    path = folder / CLASSIFIER_FILE
    try:
        classifier = load_file(path)
        weights = classifier["weights"]
        if weights.ndim != 2 or len(weights) != n_classes:
            raise ValueError(f"shape {tuple(weights.shape)} for {n_classes} classes")
    except Exception as error:  # the file may be wrong in any way
        raise ValueError(f"{path}: no classifier of this training ({error}); {REMEDY}") from None
    return classifier


def load_tensors(module: "nn.Module", tensors: Mapping[str, "Tensor"], source: str) -> None:
    """Copy `tensors` into `module`; ValueError names `source` and all that is missing, unexpected or misshapen.

    A buffer of length 0, such as a cache of training images, takes the length that it has there.
    """
    for name, buffer in list(module.named_buffers()):
        if name in tensors and buffer.ndim and len(buffer) == 0 and buffer.shape[1:] == tensors[name].shape[1:]:
            owner = module.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], buffer.new_empty(tensors[name].shape))
    own = module.state_dict()
    found = [f"missing {name}" for name in own if name not in tensors]
    found += [f"unexpected {name}" for name in tensors if name not in own]
    found += [
        f"{name} has shape {tuple(tensors[name].shape)}, the model needs {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if found:
        raise ValueError(f"{source} does not fit the model:\n  " + "\n  ".join(found))
    module.load_state_dict(tensors)


def load(clip: Any, folder: Path) -> tuple["nn.Module", Config]:
    """The trained model of `folder` on `clip`, and its config; ValueError names the file and what is wrong."""
    config = read_config(folder)
    method = methods.part(config.method, "method")
    try:
        model = method.build(clip, len(config.class_names), config.method_settings(), seed=0)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG_FILE}: {error}; {REMEDY}") from None
    load_tensors(method.trained(model), read_tensors(folder), str(folder / ADAPTER_FILE))
    return model, config


def write_history(history: Sequence[Mapping[str, float]], folder: Path) -> None:
    with (folder / HISTORY_FILE).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, EPOCH, lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)


def read_history(folder: Path) -> list[dict[str, float]]:
    """The epochs of a training; ValueError when the file is damaged."""
    path = folder / HISTORY_FILE
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = [{key: float(value) for key, value in row.items()} for row in reader]
            if tuple(reader.fieldnames or ()) != EPOCH:
                raise ValueError(f"its columns must be {', '.join(EPOCH)}")
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({error}); {REMEDY}") from None
    return rows


def sha256(folder: Path) -> str:
    """The content hash of what was trained, by which MLflow runs and evaluations know it."""
    return hashlib.sha256((folder / ADAPTER_FILE).read_bytes()).hexdigest()
