"""Images: decoding, the test transform packed as uint8, and the training augmentation."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from heba.clip.preprocess import Preprocess, decode, normalise, resize_and_crop

# The longer side of an image to its shorter one. Resizing takes memory in proportion to it: a line of one pixel by
# 65500, which is a small file, takes 13 GB at 224.
MAX_ASPECT = 100


class LongImage(ValueError):
    """An image of which one side is more than MAX_ASPECT times the other."""


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
