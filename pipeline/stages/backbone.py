"""Stage `backbone`, and the frozen CLIP that params.yaml names, its tokenizer, device and precision.

out/backbone.json: name, pretrained, and the sha256 of the weights' file and of a config of your own; what uses the
weights depends on it.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heba.clip import backbone
from heba.clip.device import in_bf16
from heba.fit.memory import keep_freed_memory
from pipeline.core.params import Params, ParamsError
from pipeline.core.paths import OUT, main_root, new_file, reading

Tokenizer = Callable[[list[str]], Tensor]
RECORD = OUT / "backbone.json"


def run(params: Params) -> str:
    """Fetch the weights where open_clip knows them by a tag, check that they fit, and write out/backbone.json;
    returns a line about it."""
    name, pretrained = params.backbone.name, params.backbone.pretrained
    try:
        backbone.load(name, pretrained, main_root())
        file = backbone.weights_file(name, pretrained, main_root())
    except ValueError as error:
        raise ParamsError(f"backbone: {error}") from None
    hashes = {key: backbone.sha256(path) for key, path in ({"sha256": file} | _local_files(params)).items()}
    record = params.backbone.model_dump() | hashes
    with new_file(RECORD) as path:
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return f"{name} {pretrained}, {file.stat().st_size / 1e6:.1f} MB"


def read_record() -> dict[str, Any]:
    """What out/backbone.json says."""
    with reading(RECORD, "backbone"):
        record = json.loads(RECORD.read_text(encoding="utf-8"))
        if not isinstance(record, dict) or not {"name", "pretrained", "sha256"} <= set(record):
            raise ValueError("it must have name, pretrained and sha256")
    return record


def _local_files(params: Params) -> dict[str, Path]:
    """The files of the user that make the backbone, by the key of their hash in the record."""
    files = {
        "sha256": main_root() / params.backbone.pretrained,
        "config_sha256": main_root() / params.backbone.name,
    }
    return {key: path for key, path in files.items() if path.is_file()}


def load_backbone(params: Params) -> tuple[Any, Tokenizer]:
    """The model (eval mode, in the precision and on the device of params) and its tokenizer; ValueError when the
    weights or the config are not those of out/backbone.json."""
    if RECORD.is_file():
        record = read_record()
        for key, file in _local_files(params).items():
            if backbone.sha256(file) != record.get(key):
                raise ValueError(f"{file} is not that of {RECORD}; run `dvc repro --force --single-item backbone`")
    keep_freed_memory()
    if params.threads:
        torch.set_num_threads(params.threads)
    loaded = backbone.load(params.backbone.name, params.backbone.pretrained, main_root())
    clip = in_bf16(loaded.clip) if use_bf16(params) else loaded.clip
    return clip.to(device(params)), loaded.tokenizer


def device(params: Params) -> torch.device:
    """`device` of params; auto takes the GPU when there is one."""
    if params.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda, but torch finds no GPU; set device: auto or cpu in params.yaml")
    if params.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(params.device)


def device_name(params: Params) -> str:
    """What it runs on, in words: the GPU's name, or CPU."""
    where = device(params)
    return torch.cuda.get_device_name(where) if where.type == "cuda" else "CPU"


def be_deterministic() -> None:
    """From here on the same work gives the same bytes on a GPU too; to be called before the first work on it."""
    # cuBLAS reads it when it starts; its kernels may add up in any order without it.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)


def use_bf16(params: Params) -> bool:
    """bf16 autocast where params say so; auto means on a GPU."""
    return params.precision == "bf16" or (params.precision == "auto" and device(params).type == "cuda")


@contextmanager
def computing(params: Params) -> Iterator[None]:
    """Without gradients, in the precision of params."""
    where = device(params)
    with torch.no_grad(), torch.autocast(where.type, torch.bfloat16, enabled=use_bf16(params)):
        yield
