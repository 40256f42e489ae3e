"""How a model wants its images: decoding, the test transform, and normalisation."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)


CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


# What Pillow raises for files that are not images, are damaged or are too large.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


# The longer side of an image to its shorter one. Resizing takes memory in proportion to it: a line of one pixel by
# 65500, which is a small file, takes 13 GB at 224.
MAX_ASPECT = 100


@dataclass(frozen=True)
class Preprocess:
    """How a model wants its images; the defaults are those of OpenAI's CLIP.

    Attributes:
        size: side of the square image, in pixels.
        mean, std: of red, green and blue in 0..1; the input is (x - mean) / std.
        interpolation: bicubic or bilinear.
        resize_mode: shortest, the shorter side to `size`, then the centre of the longer; or squash, both sides to
            `size` whatever the aspect.
    """

    size: int = 224
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"

    def __post_init__(self) -> None:
        for key, known in (("interpolation", ("bicubic", "bilinear")), ("resize_mode", ("shortest", "squash"))):
            if getattr(self, key) not in known:
                raise ValueError(f"preprocess_cfg: {key} must be {' or '.join(known)}, not {getattr(self, key)!r}")
        for key in ("mean", "std"):
            value = getattr(self, key)
            if not isinstance(value, tuple) or len(value) != 3:
                raise ValueError(f"preprocess_cfg: {key} must have three values, not {value!r}")


def preprocess_of(clip: Any) -> Preprocess:
    """How `clip` wants its images, as open_clip records it in the model; what it does not record is OpenAI's."""
    size = clip.visual.image_size
    height, width = size if isinstance(size, tuple | list) else (size, size)
    if height != width:
        raise ValueError(f"the model takes images of {width} x {height} pixels, HeBA takes square ones")
    noted = getattr(clip.visual, "preprocess_cfg", {})
    values: dict[str, Any] = {k: noted[k] for k in ("interpolation", "resize_mode") if noted.get(k)}
    values |= {
        k: tuple(noted[k]) if isinstance(noted[k], list) else noted[k] for k in ("mean", "std") if noted.get(k)
    }
    return Preprocess(height, **values)


class DeepImage(ValueError):
    """An image of 16 or more bits a channel; Pillow would turn it white in RGB without a warning."""


class LongImage(ValueError):
    """An image of which one side is more than MAX_ASPECT times the other."""


def to_rgb(image: Image.Image) -> Image.Image:
    """The image as RGB. DeepImage when its values do not fit into 8 bits (what they range over is not known);
    LongImage when no picture has its shape."""
    if image.mode.startswith(("I", "F")):
        raise DeepImage(f"an image of 16 or more bits a channel (Pillow's mode {image.mode}); convert it to 8 bit")
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise LongImage(
            f"{image.width} x {image.height} pixels, one side more than {MAX_ASPECT} times the other; crop it"
        )
    return image.convert("RGB")


def decode(path: Path) -> Image.Image:
    """Decode an image file completely, as RGB. ValueError names a file that is missing or damaged; DeepImage and
    LongImage, one that `to_rgb` refuses."""
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except (DeepImage, LongImage) as error:
        raise type(error)(f"{path}: {error}") from None
    except UNREADABLE as error:
        raise ValueError(
            f"{path}: not a readable image ({error}); restore the file or download it again"
        ) from None


def resize_and_crop(image: Image.Image, preprocess: Preprocess) -> np.ndarray:
    """The model's test transform up to uint8, pixel for pixel as open_clip's PIL transform.
    Returns [3, size, size]."""
    size, (width, height) = preprocess.size, image.size
    if preprocess.resize_mode == "squash":
        new = (size, size)
    else:
        shorter = min(width, height)
        new = (int(size * width / shorter), int(size * height / shorter))
    if new != image.size:
        image = image.resize(new, Image.Resampling[preprocess.interpolation.upper()])
    left, top = round((new[0] - size) / 2.0), round((new[1] - size) / 2.0)
    return np.asarray(image.crop((left, top, left + size, top + size))).transpose(2, 0, 1)


@cache
def mean_and_std(preprocess: Preprocess, device: torch.device) -> tuple[Tensor, Tensor]:
    """[3, 1, 1] each, made once: on a GPU it waits for them."""
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (preprocess.mean, preprocess.std))
    return mean, std


def normalise(images: Tensor, preprocess: Preprocess) -> Tensor:
    """uint8 or float images [n, 3, h, w] in 0..255 to the model's input: (x / 255 - mean) / std, fp32."""
    mean, std = mean_and_std(preprocess, images.device)
    # A copy, also of floats; then in place, since each pass over a batch costs as much as reading it.
    return images.to(torch.float32, copy=True).div_(255).sub_(mean).div_(std)
