"""Images: decoding, the test transform packed as uint8, and the training augmentation."""

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from heba.clip.device import send
from heba.clip.preprocess import Preprocess, decode, normalise, resize_and_crop
from heba.clip.towers import embed_images


@dataclass(frozen=True)
class Images:
    """Images as a method reads them (`READS` of its settings); what it does not read is empty.

    Attributes:
        features: [n, E], of the frozen image tower, not normalised.
        hidden: [n, width], the same before the projection; [n, 0] where the tower has none.
        pixels: [n, 3, size, size], preprocessed (`heba.clip.preprocess.normalise`).
    """

    features: Tensor
    hidden: Tensor
    pixels: Tensor
    _states: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of_features(cls, features: Tensor, hidden: Tensor) -> "Images":
        return cls(features, hidden, torch.empty(0))

    @classmethod
    def of_pixels(cls, pixels: Tensor) -> "Images":
        return cls(torch.empty(0), torch.empty(0), pixels)

    def after_blocks(self, clip: Any, n: int) -> Tensor:
        """What the first `n` blocks of the frozen image tower make of `pixels` (`heba.clip.towers.embed_images`).

        It is kept: models that change the tower behind these blocks alone share it.
        """
        return embed_images(clip, self.pixels, n, self._states)


@dataclass(frozen=True)
class Views:
    """What the frozen image tower makes of n few-shot images, not normalised.

    Attributes:
        plain, flipped: [n, E], of the test transform and of its mirror image.
        augmented: [passes, n, E], of random crops, mirrored half of the time.
        plain_hidden, flipped_hidden, augmented_hidden: the same before the projection, [..., width]; width 0 where
            the tower has none.
    """

    plain: Tensor
    flipped: Tensor
    augmented: Tensor
    plain_hidden: Tensor
    flipped_hidden: Tensor
    augmented_hidden: Tensor

    def broken(self) -> Tensor:
        """[n], whether a feature of an image is not finite."""
        fixed = (self.plain, self.flipped, self.plain_hidden, self.flipped_hidden)
        bad = [~tensor.isfinite().all(dim=-1) for tensor in fixed]
        bad += [~t.isfinite().all(dim=-1).all(dim=0) for t in (self.augmented, self.augmented_hidden)]
        return torch.stack(bad).any(dim=0)

    def select(self, rows: Tensor) -> "Views":
        """Those of the images `rows` [m]."""
        return Views(
            self.plain[rows],
            self.flipped[rows],
            self.augmented[:, rows],
            self.plain_hidden[rows],
            self.flipped_hidden[rows],
            self.augmented_hidden[:, rows],
        )


@dataclass(frozen=True)
class LabelledImages:
    """The few-shot images of a training.

    Attributes:
        files: their paths. labels: from 0 on.
        views: their frozen features, for a method that reads features; of validation images, `augmented` has no
            passes.
        as_seen: how the files are opened (`heba.clip.preprocess.to_rgb`).
    Raises:
        ValueError: names an image whose features are not finite.
    """

    files: list[Path]
    labels: list[int]
    views: Views | None = None
    as_seen: bool = False

    def __post_init__(self) -> None:
        broken = (
            [row for row, bad in enumerate(self.views.broken().tolist()) if bad] if self.views is not None else []
        )
        if broken:
            more = f", and {len(broken) - 1} more" if len(broken) > 1 else ""
            raise ValueError(
                f"{self.files[broken[0]]}{more}: the frozen features are not finite; replace the image, or "
                "compute them with `precision: fp32` in params.yaml"
            )


def decode_all(files: Sequence[Path], done: Callable[[int], object], as_seen: bool = False) -> list[Tensor]:
    """The images [3, height, width] uint8, as they are, for the crops of all epochs; `done` counts them, and
    `as_seen` is how they are opened (`heba.clip.preprocess.to_rgb`).

    ValueError names a file that cannot be read, and says so when they do not fit into the memory that is free.
    """
    needed = 0
    for file in files:
        with suppress(OSError), Image.open(file) as image:  # reads its head only; a damaged one is named below
            needed += 3 * image.width * image.height
    free = psutil.virtual_memory().available
    if needed > free:
        raise ValueError(
            f"{len(files)} training images take {needed / 1e9:.1f} GB of memory, of which {free / 1e9:.1f} GB are "
            "free: scale them down, to a shorter side of some 500 pixels, or take fewer shots"
        )

    def pixels(path: Path) -> Tensor:
        return torch.from_numpy(np.array(decode(path, as_seen)).transpose(2, 0, 1))

    images = []
    for image in for_each_image(pixels, files):
        images.append(image)
        done(1)
    return images


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
    paths: Sequence[Path],
    preprocess: Preprocess,
    out: Path,
    progress: Callable[[int], object],
    as_seen: bool = False,
) -> None:
    """Decode, resize and crop the images at `paths` into one array [n, 3, size, size] uint8 in the file `out`;
    `as_seen` is how they are opened (`heba.clip.preprocess.to_rgb`)."""
    header = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)),
        "fortran_order": False,
        "shape": (len(paths), 3, preprocess.size, preprocess.size),
    }
    # Written, not mapped: on a full disk a write is an error, and a page of a map the end of the process.
    with out.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for pixels in for_each_image(lambda path: resize_and_crop(decode(path, as_seen), preprocess), paths):
            file.write(pixels.tobytes())
            progress(1)


def open_packed(path: Path) -> np.ndarray:
    """The array of `pack_images` as a memory map. Copy on write, because torch takes only writable arrays."""
    return np.load(path, mmap_mode="c")


def sample_crop(
    height: int, width: int, generator: torch.Generator, smallest: float = 0.08
) -> tuple[int, int, int, int]:
    """RandomResizedCrop's box (top, left, height, width): area `smallest` to 1 of the image, aspect 3/4 to 4/3,
    as torchvision draws it (ten tries, then the central crop)."""
    for _ in range(10):
        u = torch.rand(4, generator=generator).tolist()
        area = height * width * (smallest + (1 - smallest) * u[0])
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


def make_views(
    folder: Path,
    file: str,
    preprocess: Preprocess,
    seed: int,
    passes: int,
    smallest: float,
    as_seen: bool = False,
) -> Tensor:
    """The test transform of an image, its mirror image, and `passes` random crops of at least the area `smallest`,
    mirrored half of the time: [2 + passes, 3, size, size], preprocessed.

    An image has the same crops in every sample of a seed. `as_seen`: `heba.clip.preprocess.to_rgb`.
    """
    image = decode(folder / file, as_seen)
    plain = torch.from_numpy(resize_and_crop(image, preprocess).copy())
    fixed = normalise(torch.stack([plain, plain.flip(-1)]), preprocess)
    if not passes:
        return fixed
    number = int.from_bytes(hashlib.sha256(f"{seed} {file}".encode()).digest()[:8], "big") >> 1
    generator = torch.Generator().manual_seed(number)
    pixels = torch.from_numpy(np.array(image).transpose(2, 0, 1))
    boxes = [sample_crop(image.height, image.width, generator, smallest) for _ in range(passes)]
    flips = (torch.rand(passes, generator=generator) < 0.5).tolist()
    return torch.cat([fixed, crop_batch([pixels] * passes, boxes, flips, preprocess)])


CPU = torch.device("cpu")
MOST_ON_GPU = 8e9  # bytes of a training's images; an H200 has 140e9, a small GPU 12e9
# The antialiased resize of a GPU keeps a row of weights on the chip, which a side of more than 42 times the size
# overruns.
LARGEST = 32


def keep_images(images: Sequence[Tensor], preprocess: Preprocess, where: torch.device) -> list[Tensor]:
    """uint8 `images` [3, h, w], kept for crops on `where`: there, or, where they take more than `MOST_ON_GPU`, in
    memory that a GPU copies from while it computes. One with too long a side stays for the CPU to crop."""
    if where.type != "cuda":
        return list(images)
    fits = sum(image.numel() for image in images) <= MOST_ON_GPU

    def keep(image: Tensor) -> Tensor:
        if max(image.shape) > LARGEST * preprocess.size:
            return image
        return image.to(where) if fits else image.pin_memory()

    return [keep(image) for image in images]


def crop_batch(
    images: Sequence[Tensor],
    boxes: Sequence[Sequence[int]],
    flips: Sequence[bool],
    preprocess: Preprocess,
    where: torch.device = CPU,
) -> Tensor:
    """Cut the boxes out of uint8 `images` [3, h, w], resize to the model's size (antialiased), flip where asked,
    and normalise. Returns [n, 3, size, size] fp32 on `where`; `images` are those of `keep_images`."""
    out = []
    size, mode = (preprocess.size, preprocess.size), preprocess.interpolation
    for image, (top, left, h, w), flip in zip(images, boxes, flips, strict=True):
        if max(image.shape) <= LARGEST * preprocess.size:
            image = image.to(where, non_blocking=True)
        crop = image[None, :, top : top + h, left : left + w].float()
        crop = send(interpolate(crop, size=size, mode=mode, antialias=True, align_corners=False), where)
        out.append(crop.flip(-1) if flip else crop)
    return normalise(torch.cat(out).round_().clamp_(0, 255), preprocess)
