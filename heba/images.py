"""Images: decoding, the test transform packed as uint8, and the training augmentation."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# What Pillow raises at files that are no images, or damaged, or too large.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
# The longer side of an image to its shorter one. Resizing takes memory in proportion to it: a line of one pixel by
# 65500, which is a small file, takes 13 GB at 224.
MAX_ASPECT = 100


@dataclass(frozen=True)
class Preprocess:
    """How a model wants its images; by default as OpenAI's CLIP.

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
    """How `clip` wants its images, as open_clip notes it in the model; what it does not note is as OpenAI's."""
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
    """An image of 16 or more bits a channel, which Pillow would make white in RGB without a word."""


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


def for_each_image(work: Callable[[Any], Any], paths: Iterable[Any]) -> Iterator[Any]:
    """Yield `work(path)` in the order of `paths`, worked on by as many threads as torch has (Pillow decodes and
    resizes without Python's lock). Few are worked on ahead of what is taken, so memory stays small."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[Future] = deque()
        try:
            for path in paths:
                ahead.append(pool.submit(work, path))
                if len(ahead) > 4 * threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def pack_images(
    paths: Sequence[Path], preprocess: Preprocess, out: Path, progress: Callable[[int], object]
) -> None:
    """Decode, resize and crop the images at `paths` into one array [n, 3, size, size] uint8 in the file `out`."""
    header = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)),
        "fortran_order": False,
        "shape": (len(paths), 3, preprocess.size, preprocess.size),
    }
    # Written, not mapped: on a full disk a write is an error, and a page of a map the end of the process.
    with out.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for pixels in for_each_image(lambda path: resize_and_crop(decode(path), preprocess), paths):
            file.write(pixels.tobytes())
            progress(1)


def open_packed(path: Path) -> np.ndarray:
    """The array of `pack_images` as a memory map. Copy on write, because torch takes only writable arrays."""
    return np.load(path, mmap_mode="c")


def normalise(images: Tensor, preprocess: Preprocess) -> Tensor:
    """uint8 or float images [n, 3, h, w] in 0..255 to the model's input: (x / 255 - mean) / std, fp32."""
    mean = torch.tensor(preprocess.mean, device=images.device).view(3, 1, 1)
    std = torch.tensor(preprocess.std, device=images.device).view(3, 1, 1)
    # A copy, also of floats; then in place, since each pass over a batch costs as much as reading it.
    return images.to(torch.float32, copy=True).div_(255).sub_(mean).div_(std)


def sample_crop(height: int, width: int, generator: torch.Generator) -> tuple[int, int, int, int]:
    """RandomResizedCrop's box (top, left, height, width): area 0.08 to 1 of the image, aspect 3/4 to 4/3,
    as torchvision draws it (ten tries, then the central crop)."""
    for _ in range(10):
        u = torch.rand(4, generator=generator).tolist()
        area = height * width * (0.08 + 0.92 * u[0])
        ratio = math.exp(math.log(3 / 4) + u[1] * (math.log(4 / 3) - math.log(3 / 4)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(u[2] * (height - h + 1)), int(u[3] * (width - w + 1)), h, w
    if width / height < 3 / 4:
        w, h = width, round(width / (3 / 4))
    elif width / height > 4 / 3:
        h, w = height, round(height * (4 / 3))
    else:
        h, w = height, width
    return (height - h) // 2, (width - w) // 2, h, w


def crop_batch(
    images: Sequence[Tensor], boxes: Sequence[Sequence[int]], flips: Sequence[bool], preprocess: Preprocess
) -> Tensor:
    """Cut the boxes out of uint8 `images` [3, h, w], resize to the model's size (antialiased), flip where asked,
    and normalise. Returns [n, 3, size, size] fp32."""
    out = []
    size, mode = (preprocess.size, preprocess.size), preprocess.interpolation
    for image, (top, left, h, w), flip in zip(images, boxes, flips, strict=True):
        crop = image[None, :, top : top + h, left : left + w].float()
        crop = interpolate(crop, size=size, mode=mode, antialias=True, align_corners=False)
        out.append(crop.flip(-1) if flip else crop)
    return normalise(torch.cat(out).round_().clamp_(0, 255), preprocess)
