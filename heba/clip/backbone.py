"""The frozen model and its tokenizer, by the name of its architecture and of its weights.

Architectures are those of `heba.clip.architecture`; weights are a tag of open_clip or a local file.
"""

import hashlib
import importlib
import io
import shlex
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from heba.clip import hub
from heba.clip.architecture import read_architecture
from heba.clip.preprocess import Preprocess, preprocess_of
from heba.clip.towers import check_towers

OPENAI_ONLY = {"input_resolution", "context_length", "vocab_size"}  # in OpenAI's state dicts, besides the weights
# TorchScript runs what its file says, so it is opened only as OpenAI published it: by the
# sha256 of ViT-B-32, ViT-B-16, ViT-L-14 and ViT-L-14-336px, which stand in the addresses of its downloads.
OPENAI_FILES = {
    "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
}
HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # unless open_clip names another
CONVERT = (
    "import sys, torch; from safetensors.torch import save_file; "
    "state = torch.jit.load(sys.argv[1], 'cpu').state_dict(); "
    "save_file({k: v.clone().contiguous() for k, v in state.items()}, sys.argv[2])"
)


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
        ValueError: an unknown or unsupported model, weights that do not fit or are TorchScript other than
            OpenAI's, or weights or a tokenizer that cannot be had.
    """
    config = read_architecture(name, root)
    if name == "tiny":
        from heba.clip.tiny import load_tiny_clip

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
    text = (open_clip.get_model_config(model) or {}).get("text_cfg", {})
    # A tokenizer of Hugging Face may bring code, which its name or the config may ask to be run.
    options = {"trust_remote_code": False} if text.get("hf_tokenizer_name") else {}
    try:
        if options:
            importlib.import_module("transformers")
            if not Path(text["hf_tokenizer_name"]).is_dir():
                hub.fetch(text["hf_tokenizer_name"], ["tokenizer_config.json"])
        return open_clip.get_tokenizer(model, **options)
    except Exception as error:  # packages that are not ours may raise anything
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"the tokenizer of {name} cannot be loaded: {reason}; it is one of Hugging Face, which needs "
            "`pip install transformers sentencepiece` and access to its hub the first time"
        ) from None


def weights_file(name: str, pretrained: str, root: Path = Path()) -> Path:
    """The file of the weights: a local one, or open_clip's for a tag, which is downloaded when it is not in its
    cache yet. ValueError for an unknown tag, for weights that cannot be downloaded, and for those of the other
    GELU."""
    if name == "tiny":
        from heba.clip.tiny import FOLDER

        return FOLDER / "model.safetensors"
    path = root / pretrained
    if path.is_file():
        return path
    from open_clip import get_model_config
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    config = get_pretrained_cfg(name, pretrained)
    if not config:
        known = ", ".join(list_pretrained_tags_by_model(name)) or "none"
        raise ValueError(
            f"{pretrained!r} is neither a file under {root.resolve()} nor weights that open_clip has for {name}, "
            f"which are: {known}"
        )
    if config.get("quick_gelu") and not (get_model_config(name) or {}).get("quick_gelu"):
        raise ValueError(_wrong_gelu(name, f"the weights {pretrained!r}"))
    repo, _, file = config.get("hf_hub", "").rpartition("/")
    names = [Path(file).with_suffix(".safetensors").name, file] if file else list(HUB_FILES)
    try:
        return hub.fetch(repo, list(dict.fromkeys(names)))
    except hub.HubError as error:
        own = f"models/{names[0]}"
        raise ValueError(
            f"the weights {pretrained!r} of {name}: {error}. Get that file on a machine with a network, save it "
            f"as {own} under {root.resolve()}, and give --pretrained {own} (in params.yaml: backbone.pretrained)"
        ) from None


def sha256(path: Path) -> str:
    """The hash of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _preprocess_cfg(name: str, pretrained: str, config: dict[str, Any]) -> dict[str, Any]:
    """What open_clip notes for the weights. It knows nothing of a local file; all published weights of an
    architecture want their images in one way, and the file is taken to be like them."""
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    published = list_pretrained_tags_by_model(name)
    tag = pretrained if get_pretrained_cfg(name, pretrained) else published[0] if published else ""
    return get_pretrained_cfg(name, tag) | config.get("preprocess_cfg", {})


def load_weights(clip: Any, file: Path, name: str) -> None:
    """Load open_clip's or OpenAI's weights, safetensors or pickled; ValueError when they do not fit.

    OpenAI's are known by their sha256, TorchScript as published, or by the numbers that their state dict has
    besides the weights. Any other file does not tell which GELU it was trained with; that is for the user to know.
    Other TorchScript is refused, unopened.
    """
    import open_clip
    from open_clip.transformer import QuickGELU

    text = getattr(clip, "text", clip)
    quick = isinstance(text.transformer.resblocks[0].mlp.gelu, QuickGELU)
    torchscript = is_torchscript(file)
    # Read once, so that what is opened is what was hashed.
    content = file.read_bytes() if torchscript else b""
    if torchscript and hashlib.sha256(content).hexdigest() not in OPENAI_FILES:
        raise ValueError(
            f"{file}: is TorchScript, a program that runs when it is opened, and none that OpenAI published; if "
            f'you trust it, convert it: python -c "{CONVERT}" {shlex.join([str(file), f"{file}.safetensors"])}'
        )
    try:
        if torchscript:
            state = torch.jit.load(io.BytesIO(content), map_location="cpu").state_dict()
            keys = clip.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
        else:
            keys = open_clip.load_checkpoint(clip, str(file), strict=False, weights_only=True)
        unknown = sorted(set(keys.unexpected_keys) - OPENAI_ONLY)
        if keys.missing_keys or unknown:
            raise ValueError(f"missing: {keys.missing_keys[:3]}, unknown: {unknown[:3]}")
    except Exception as error:  # a file from outside may be wrong in any way
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
