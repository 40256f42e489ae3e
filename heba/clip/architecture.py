"""Which models of open_clip HeBA takes, read from their JSON configs without importing open_clip (seconds)."""

import difflib
import importlib.util
import json
from pathlib import Path
from typing import Any

TINY = Path(__file__).parent / "tiny_clip" / "config.json"
# By the names of timm's models, whose architecture no config tells; `towers` looks at the layers themselves.
TIMM_TOWERS = ("vit_", "eva_", "eva02_", "vitamin_")
POST_NORM = "eva02_enormous"
SUPPORTED = (
    "vision transformers of open_clip (OpenAI, LAION, DataComp, MetaCLIP, CLIPA) or timm (EVA01, EVA02-B and -L, "
    "SigLIP, SigLIP2, PE-Core, ViTamin, MobileCLIP-B, MobileCLIP2-B and -L-14) with open_clip's text transformer"
)


def read_architecture(name: str, root: Path) -> dict[str, Any]:
    """The config of `name`: tiny, a model of open_clip, or a JSON file in open_clip's form, relative to `root`.

    ValueError when there is none, or when HeBA does not fit its towers.
    """
    if name == "tiny":
        path = TINY
    elif name.endswith(".json"):
        path = root / name
        if not path.is_file():
            raise ValueError(f"there is no file {path}")
    else:
        spec = importlib.util.find_spec("open_clip")
        folder = Path(spec.origin if spec and spec.origin else "").parent / "model_configs"
        path = folder / f"{name}.json"
        if path.parent != folder or not path.is_file():
            near = difflib.get_close_matches(name, [file.stem for file in folder.glob("*.json")])
            others = f"; near it are {', '.join(near)}" if near else ""
            raise ValueError(f"open_clip has no model {name!r}{others}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    towers = ("vision_cfg", "text_cfg")
    if not isinstance(config, dict) or not all(isinstance(config.get(tower), dict) for tower in towers):
        raise ValueError(f"{path} is not a model config of open_clip: it needs vision_cfg and text_cfg")
    reason = _refusal(config)
    if reason:
        raise ValueError(f"{name} {reason}; HeBA takes {SUPPORTED}")
    return config


def _refusal(config: dict[str, Any]) -> str | None:
    vision, text = config["vision_cfg"], config["text_cfg"]
    if "multimodal_cfg" in config or text.get("embed_cls"):
        return "is a CoCa, whose texts are read at a class token behind the padding"
    if text.get("hf_model_name"):
        return f"has a text tower of Hugging Face, {text['hf_model_name']}"
    timm = vision.get("timm_model_name")
    if timm and not str(timm).startswith(TIMM_TOWERS):
        return f"has the image tower {timm}, which is no plain vision transformer"
    if timm and str(timm).startswith(POST_NORM):
        return f"has the image tower {timm}, whose blocks normalise after the attention, not before"
    if not timm and not isinstance(vision.get("layers", 12), int):
        return "has a ResNet as its image tower"
    return None


def width(config: dict[str, Any]) -> int:
    """Channels of the narrower tower, as far as `config` tells: timm's towers have a width of their own."""
    widths = [config["text_cfg"].get("width", 512)]  # open_clip's defaults
    if not config["vision_cfg"].get("timm_model_name"):
        widths.append(config["vision_cfg"].get("width", 768))
    return min(widths)


def depth(config: dict[str, Any]) -> int:
    """Blocks of the shallower tower, as far as `config` tells: timm's towers have a depth of their own."""
    layers = [config["text_cfg"].get("layers", 12)]  # open_clip's default
    if not config["vision_cfg"].get("timm_model_name"):
        layers.append(config["vision_cfg"].get("layers", 12))
    return min(layers)
