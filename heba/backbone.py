"""The frozen model and its tokenizer, by the name of its architecture and of its weights.

Architectures are those of `heba.architecture`; weights are a tag of open_clip or a local file.
"""

import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from heba.architecture import read_config
from heba.images import Preprocess, preprocess_of
from heba.towers import check_towers

OPENAI_ONLY = {"input_resolution", "context_length", "vocab_size"}  # in OpenAI's state dicts, besides the weights


class Backbone(NamedTuple):
    """clip: the model (fp32, eval mode, on the CPU). tokenizer: texts to tokens [n, context].
    preprocess: how the model wants its images."""

    clip: Any
    tokenizer: Callable[[list[str]], Tensor]
    preprocess: Preprocess


def load(name: str, pretrained: str, root: Path = Path()) -> Backbone:
    """The model `name` with the weights `pretrained`.

    Args:
        name: tiny, a model of open_clip, or a JSON file in the form of its configs; beside the towers, that may
            have open_clip's preprocess_cfg (mean, std, interpolation, resize_mode).
        pretrained: a tag of open_clip, whose weights are downloaded when they are not in its cache yet, or a file:
            open_clip's or OpenAI's weights, safetensors or pickled (loaded with weights_only). Ignored for tiny.
        root: the folder that files are relative to.
    Raises:
        ValueError: an unknown or unsupported model, weights that do not fit, or a tokenizer that can not be had.
    """
    config = read_config(name, root)
    if name == "tiny":
        from heba.embedded.model import load_tiny_clip

        clip, tokenizer = load_tiny_clip()
        return Backbone(clip, tokenizer, preprocess_of(clip))
    # What costs little is tried first: a download of weights may take long.
    tokenizer = load_tokenizer(name, root)
    clip = build(config)
    check_towers(clip)
    file = weights_file(name, pretrained, root)
    clip.visual.preprocess_cfg = _preprocess_cfg(name, pretrained, config)
    load_weights(clip, file, name)
    return Backbone(clip.eval(), tokenizer, preprocess_of(clip))


def build(config: dict[str, Any]) -> Any:
    """The model of a config of open_clip, with random weights."""
    import open_clip

    config = {k: v for k, v in config.items() if k != "preprocess_cfg"}
    layout = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    vision = config.pop("vision_cfg") | {"timm_model_pretrained": False}
    return layout(**config, vision_cfg=vision)


def load_tokenizer(name: str, root: Path = Path()) -> Callable[[list[str]], Tensor]:
    """open_clip's tokenizer of the model `name`; SigLIP's and some others are Hugging Face's, which are downloaded
    and need the package transformers."""
    import open_clip

    model = name
    if name.endswith(".json"):
        open_clip.add_model_config(root / name)
        model = Path(name).stem
    try:
        return open_clip.get_tokenizer(model)
    except Exception as error:  # whatever goes wrong in packages that are not ours
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"the tokenizer of {name} can not be loaded: {reason}; it is one of Hugging Face, which needs "
            "`pip install transformers sentencepiece` and access to its hub the first time"
        ) from None


def weights_file(name: str, pretrained: str, root: Path = Path()) -> Path:
    """The file of the weights: a local one, or open_clip's for a tag, which is downloaded when it is not in its
    cache yet. ValueError for an unknown tag, and for weights of the other GELU."""
    if name == "tiny":
        from heba.embedded.model import FOLDER

        return FOLDER / "model.safetensors"
    path = root / pretrained
    if path.is_file():
        return path
    from open_clip import get_model_config
    from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model

    config = get_pretrained_cfg(name, pretrained)
    if not config:
        known = ", ".join(list_pretrained_tags_by_model(name)) or "none"
        raise ValueError(
            f"{pretrained!r} is neither a file under {root.resolve()} nor weights that open_clip has for {name}, "
            f"which are: {known}"
        )
    if config.get("quick_gelu") and not (get_model_config(name) or {}).get("quick_gelu"):
        raise ValueError(_wrong_gelu(name, f"the weights {pretrained!r}"))
    return Path(download_pretrained(config))


def sha256(path: Path) -> str:
    """The hash of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _preprocess_cfg(name: str, pretrained: str, config: dict[str, Any]) -> dict[str, Any]:
    """What open_clip notes for the weights. It can not know a local file; all published weights of an architecture
    want their images in one way, which is taken to be that of the file."""
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    published = list_pretrained_tags_by_model(name)
    tag = pretrained if get_pretrained_cfg(name, pretrained) else published[0] if published else ""
    return get_pretrained_cfg(name, tag) | config.get("preprocess_cfg", {})


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
        raise ValueError(_wrong_gelu(name, "OpenAI's weights"))


def _wrong_gelu(name: str, weights: str) -> str:
    remedy = f'set "quick_gelu": true in {name}' if name.endswith(".json") else f"use {name}-quickgelu"
    return f"{weights} were trained with QuickGELU: {remedy}"


def is_torchscript(file: Path) -> bool:
    """A zip archive with code in it, as torch.jit.save writes it."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(n.endswith("/constants.pkl") for n in archive.namelist())
