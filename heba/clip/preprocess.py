"""How a model wants its images: decoding, the test transform, and normalisation."""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# What Pillow raises for files that are not images, are damaged or are too large.
UNREADABLE = (
    *(OSError, SyntaxError, ValueError, Image.DecompressionBombError),
    *(LookupError, EOFError, struct.error),  # a GIF that is cut off
    RuntimeError,  # a damaged AVIF
)

# Of 65536: an image of 16 bits that is darker everywhere uses 12 bits or fewer of them, and would come out black.
LEAST_OF_16_BITS = 4096

# The longer side of an image to its shorter one. Resizing takes memory in proportion to it: a line of one pixel by
# 65500, which is a small file, takes 13 GB at 224.
MAX_ASPECT = 100

# What turns an image as its EXIF orientation says; 1 is upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


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
    """An image of 16 or more bits a channel, of which the range of its values is not known; Pillow would turn it
    white in RGB without a warning."""


class LongImage(ValueError):
    """An image of which one side is more than MAX_ASPECT times the other."""


def to_rgb(image: Image.Image, as_seen: bool = False) -> Image.Image:
    """The image as RGB, of an animated one the first frame. DeepImage when its values do not fit into 8 bits (what
    they range over is not known); LongImage when no picture has its shape.

    `as_seen`: as a viewer shows it, turned as its EXIF tag says and on white where it is transparent. The official
    code of the benchmarks does neither.
    """
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise LongImage(
            f"{image.width} x {image.height} pixels, one side more than {MAX_ASPECT} times the other; crop it"
        )
    deep = is_deep(image)
    if as_seen:
        image = upright(image)
    if deep:
        image = _eight_bits(image)
    elif image.mode.startswith(("I", "F")):
        raise _deep(image)
    if as_seen and is_transparent(image):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def is_deep(image: Image.Image) -> bool:
    """Whether an image has values of 0 to 65535. Pillow has those of some files as 32 bits."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def is_transparent(image: Image.Image) -> bool:
    """Whether an image says how transparent its pixels are."""
    return "A" in image.getbands() or "transparency" in image.info


def upright(image: Image.Image) -> Image.Image:
    """The image, turned and mirrored as its EXIF tag says."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except UNREADABLE:  # damaged tags; the picture may be whole
        return image
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


def _eight_bits(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image)
    if pixels.max() < LEAST_OF_16_BITS:
        raise _deep(image)
    return Image.fromarray((pixels >> 8).astype(np.uint8))


def _deep(image: Image.Image) -> DeepImage:
    return DeepImage(
        f"an image of 16 or more bits a channel (Pillow's mode {image.mode}), and what its values range over is "
        "not known; convert it to 8 bit"
    )


def decode(path: Path, as_seen: bool = False) -> Image.Image:
    """Decode an image file completely, as RGB (`to_rgb`). ValueError names a file that is missing or damaged;
    DeepImage and LongImage, one that `to_rgb` refuses."""
    try:
        with Image.open(path) as image:
            return to_rgb(image, as_seen)
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


def _of_channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """[3, 1, 1], filled on the device: a copy from the CPU would wait for the GPU."""
    return torch.cat([torch.full((1, 1, 1), value, device=device) for value in values])


def normalise(images: Tensor, preprocess: Preprocess) -> Tensor:
    """uint8 or float images [n, 3, h, w] in 0..255 to the model's input: (x / 255 - mean) / std, fp32."""
    mean, std = (_of_channels(values, images.device) for values in (preprocess.mean, preprocess.std))
    # A copy, also of floats; then in place, since each pass over a batch costs as much as reading it.
    return images.to(torch.float32, copy=True).div_(255).sub_(mean).div_(std)
