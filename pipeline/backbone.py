"""Stage `backbone`, and the frozen CLIP that params.yaml names, its tokenizer, device and precision.

out/backbone.json: name, pretrained, and the sha256 of the weights' file; what uses the weights depends on it.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heba.images import CLIP_MEAN, CLIP_STD
from heba.memory import keep_freed_memory
from pipeline.params import Params, ParamsError
from pipeline.paths import OUT, main_root, new_file

RECORD = OUT / "backbone.json"
OPENAI_ONLY = {"input_resolution", "context_length", "vocab_size"}  # in OpenAI's state dicts, besides the weights


def run(params: Params) -> None:
    """Fetch the weights where open_clip knows them by a tag, check that they fit, and write out/backbone.json."""
    record = params.backbone.model_dump() | {"sha256": _sha256(weights_file(params))}
    _load(params)
    with new_file(RECORD) as path:
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_file(params: Params) -> Path:
    """The file of the weights: a local one (relative to the main repository), or open_clip's for a tag, which is
    downloaded when it is not in its cache yet."""
    name, pretrained = params.backbone.name, params.backbone.pretrained
    if name == "tiny":
        from heba.embedded.model import FOLDER

        return FOLDER / "model.safetensors"
    path = main_root() / pretrained
    if path.is_file():
        return path
    from open_clip import get_model_config
    from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model

    config = get_pretrained_cfg(name, pretrained)
    if not config:
        known = ", ".join(list_pretrained_tags_by_model(name)) or "none"
        raise ParamsError(
            f"backbone.pretrained: {pretrained!r} is neither a file under {main_root()} nor weights that "
            f"open_clip has for {name}, which are: {known}"
        )
    if (tuple(config["mean"] or CLIP_MEAN), tuple(config["std"] or CLIP_STD)) != (CLIP_MEAN, CLIP_STD):
        raise ParamsError(f"backbone: {name} {pretrained} normalises images in another way than OpenAI's CLIP")
    if config.get("quick_gelu") and not (get_model_config(name) or {}).get("quick_gelu"):
        raise ParamsError(_wrong_gelu(name, f"the weights {pretrained!r}"))
    return Path(download_pretrained(config))


def _load(params: Params) -> tuple[Any, Callable[[list[str]], Tensor]]:
    name = params.backbone.name
    if name == "tiny":
        from heba.embedded.model import load_tiny_clip

        return load_tiny_clip()
    import open_clip

    if name.endswith(".json"):
        open_clip.add_model_config(main_root() / name)
    model = Path(name).stem if name.endswith(".json") else name
    file = weights_file(params)
    clip = open_clip.create_model(model, load_weights=False, pretrained=None)
    load_weights(clip, file, name)
    return clip, open_clip.get_tokenizer(model)


def load_weights(clip: Any, file: Path, name: str) -> None:
    """Load open_clip's or OpenAI's weights, safetensors or pickled; ValueError when they do not fit.

    OpenAI's are known by their form: TorchScript as published, or the numbers that their state dict has besides
    the weights. Any other file does not tell which GELU it was trained with; that is for the user to know.
    """
    import open_clip
    from open_clip.transformer import QuickGELU

    text = getattr(clip, "text", clip)
    quick = isinstance(text.transformer.resblocks[0].mlp.gelu, QuickGELU)
    torchscript = is_torchscript(file)
    try:
        if torchscript:
            # TorchScript archives hold no pickled objects.
            state = torch.jit.load(file, map_location="cpu").state_dict()
            keys = clip.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
        else:
            keys = open_clip.load_checkpoint(clip, str(file), strict=False, weights_only=True)
        unknown = sorted(set(keys.unexpected_keys) - OPENAI_ONLY)
        if keys.missing_keys or unknown:
            raise ValueError(f"missing: {keys.missing_keys[:3]}, unknown: {unknown[:3]}")
    except Exception as error:  # whatever is wrong with a file from outside
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{file}: not weights of {name}: {reason}") from None
    if not quick and (torchscript or OPENAI_ONLY & set(keys.unexpected_keys)):
        raise ParamsError(_wrong_gelu(name, "OpenAI's weights"))


def _wrong_gelu(name: str, weights: str) -> str:
    remedy = f'set "quick_gelu": true in {name}' if name.endswith(".json") else f"use {name}-quickgelu"
    return f"backbone.name: {weights} were trained with QuickGELU: {remedy}"


def is_torchscript(file: Path) -> bool:
    """A zip archive with code in it, as torch.jit.save writes it."""
    import zipfile

    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(n.endswith("/constants.pkl") for n in archive.namelist())


def load_backbone(params: Params) -> tuple[Any, Callable[[list[str]], Tensor]]:
    """The model (fp32, eval mode, on the device of params) and its tokenizer; ValueError when the weights are not
    those of out/backbone.json."""
    file = main_root() / params.backbone.pretrained
    if RECORD.is_file() and file.is_file() and _sha256(file) != json.loads(RECORD.read_text())["sha256"]:
        raise ValueError(f"{file} is not the file of {RECORD}; run `dvc repro --force --single-item backbone`")
    keep_freed_memory()
    if params.threads:
        torch.set_num_threads(params.threads)
    clip, tokenizer = _load(params)
    return clip.to(device(params)).eval(), tokenizer


def device(params: Params) -> torch.device:
    """`device` of params; auto takes the GPU when there is one."""
    if params.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda, but torch finds no GPU; set device: auto or cpu in params.yaml")
    if params.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(params.device)


def use_bf16(params: Params) -> bool:
    """bf16 autocast where params say so; auto means on a GPU."""
    return params.precision == "bf16" or (params.precision == "auto" and device(params).type == "cuda")
