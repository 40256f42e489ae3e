"""What a look at an image file tells: whether it can be read, what is odd about it, and what it shows."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from heba.clip.preprocess import UNREADABLE, DeepImage, is_deep, is_transparent, to_rgb
from heba.data.images import for_each_image

SIDE = 32  # of the small picture, in pixels
DRAFT = 4 * SIDE  # a JPEG decodes much faster at a fraction of its size

# What may be odd about an image, and what is made of it.
ODD = {
    "animated": "images of several frames, of which the first is taken",
    "cmyk": "CMYK images, whose colours are converted without a profile",
    "deep": "images of 16 bits a channel, scaled to 8",
    "transparent": "images with transparent parts, which are taken as white",
}


class Look(NamedTuple):
    """What is seen of an image.

    Attributes:
        problem: why it cannot be used: broken (or missing), or deep, with more than 8 bits of an unknown range.
        digest: the sha256 of its bytes.
        odd: of ODD.
        aspect: width / height, upright.
        small: [SIDE, SIDE, 3] uint8, upright; None where it cannot be used, or is not asked for.
    """

    problem: Literal["", "broken", "deep"]
    digest: str = ""
    odd: tuple[str, ...] = ()
    aspect: float = 1.0
    small: np.ndarray | None = None


def look_at(
    root: Path, files: Iterable[str], done: Callable[[int], object] = lambda n: None, small: bool = True
) -> dict[str, Look]:
    """Open each of `files` under `root` once; `done` counts them. A file takes 3 KB of memory, and less without
    `small`."""
    files = list(dict.fromkeys(files))
    found = {}
    for file, look in zip(files, for_each_image(look_at_one, [root / file for file in files]), strict=True):
        found[file] = look if small else look._replace(small=None)
        done(1)
    return found


def look_at_one(path: Path) -> Look:
    """Open an image file."""
    try:
        with path.open("rb") as stream, Image.open(stream) as image:
            odd = tuple(name for name, has in _oddities(image).items() if has)
            image.draft("RGB", (DRAFT, DRAFT))
            seen = to_rgb(image, as_seen=True)
            small = np.asarray(seen.resize((SIDE, SIDE), Image.Resampling.BILINEAR))
            stream.seek(0)
            return Look(
                "", hashlib.file_digest(stream, "sha256").hexdigest(), odd, seen.width / seen.height, small
            )
    except DeepImage:
        return Look("deep")
    except UNREADABLE:
        return Look("broken")


def _oddities(image: Image.Image) -> dict[str, bool]:
    """Of each of ODD, whether an image is so; before it is decoded, which may change its mode."""
    return {
        # Many cameras save a preview as a second frame (MPO).
        "animated": image.format != "MPO" and _is_animated(image),
        "cmyk": image.mode == "CMYK",
        "deep": is_deep(image),
        "transparent": is_transparent(image),
    }


def _is_animated(image: Image.Image) -> bool:
    """Whether there is a second frame. Pillow looks for all of them; those behind a damaged one do not count."""
    try:
        return bool(getattr(image, "is_animated", False))
    except UNREADABLE:
        image.seek(0)
        return True
