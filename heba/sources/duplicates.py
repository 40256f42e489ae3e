"""Images that are the same picture to the eye, though their bytes differ.

A picture is reduced to a small one, without its brightness and contrast. That stays nearly the same when a picture
is saved anew, resized, lit a little more or mirrored, and differs in another photograph of the same thing. The
bounds below lie between the two; tests/heba/test_duplicates.py has photographs, drawings and handwritten digits.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from heba.clip.preprocess import UNREADABLE, to_rgb
from heba.data.images import for_each_image

SIDE = 32  # of the small picture, in pixels; half of it where all are compared with all
DRAFT = 4 * SIDE  # a JPEG decodes much faster at a fraction of its size
LIKENESS = 0.9965  # the correlation of two pictures of half the side, all colours together
RESIDUAL = 32.0  # the largest difference of a pixel, of 255, once brightness and contrast are matched ...
RESIDUAL_SHARE = 0.7  # ... and in standard deviations of the picture
GAIN = 1.4  # of contrast, up or down
OFFSET = 48.0  # of brightness, up or down
PLAIN = 8.0  # standard deviation of a picture below which only the bytes tell it from another
ASPECT = 1.1  # of the ratios of width to height
CANDIDATES = 8  # of later images, the likeliest, that an image is looked at with; a fixed camera's are all alike
AT_ONCE = 10_000_000  # comparisons


class Sight(NamedTuple):
    """An image as it is compared: the sha256 of its bytes, width / height, and [SIDE, SIDE, 3] uint8."""

    digest: str
    aspect: float
    small: np.ndarray


def near_duplicates(
    root: Path, files: Sequence[str], done: Callable[[int], object] | None = None
) -> list[list[str]]:
    """The groups, of two or more, of those `files` under `root` that show the same picture: the same bytes, saved
    anew, resized, a little brighter or darker, or mirrored.

    A file that cannot be read is in no group. Groups and their files are sorted; `done` counts the files.
    """

    def look(file: str) -> Sight | None:
        try:
            return see(root / file)
        except UNREADABLE:
            return None

    seen: dict[str, Sight] = {}
    for file, sight in zip(files, for_each_image(look, files), strict=True):
        if sight is not None:
            seen[file] = sight
        if done is not None:
            done(1)
    return same_pictures(seen)


def see(path: Path) -> Sight:
    """Look at an image once. Raises UNREADABLE where it is none."""
    with path.open("rb") as stream, Image.open(stream) as image:
        image.draft("RGB", (DRAFT, DRAFT))
        upright = to_rgb(ImageOps.exif_transpose(image))
        small = upright.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        stream.seek(0)
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return Sight(digest, upright.width / upright.height, np.asarray(small))


def same_pictures(seen: dict[str, Sight]) -> list[list[str]]:
    """`near_duplicates` of files that were looked at."""
    files = sorted(seen)
    if not files:
        return []
    first: dict[str, int] = {}
    pairs = [(first.setdefault(seen[file].digest, i), i) for i, file in enumerate(files)]
    small = np.stack([seen[file].small for file in files])
    aspects = np.array([seen[file].aspect for file in files])
    # Plain pictures have nothing to be compared by, and of the same bytes the first is enough.
    rows = [i for one, i in pairs if one == i and small[i].std() >= PLAIN]
    pairs += [(rows[i], rows[j]) for i, j in _like(small[rows], aspects[rows])]
    one, other = np.array(pairs).T
    graph = coo_array((np.ones(len(pairs), dtype=bool), (one, other)), shape=(len(files), len(files)))
    groups: dict[int, list[str]] = {}
    for file, group in zip(files, connected_components(graph, directed=False)[1].tolist(), strict=True):
        groups.setdefault(group, []).append(file)
    return sorted(group for group in groups.values() if len(group) > 1)


def _like(small: np.ndarray, aspects: np.ndarray) -> list[tuple[int, int]]:
    """The rows of `small` [n, SIDE, SIDE, 3] that show the same picture, as pairs."""
    n = len(small)
    vectors = _vectors(small)
    found = []
    step = max(1, AT_ONCE // max(n, 1))
    for start in range(0, n, step):
        for mirrored in (False, True):
            block = small[start : start + step, :, ::-1] if mirrored else small[start : start + step]
            likeness = _vectors(block) @ vectors[start:].T
            # Each pair once: of a row those behind it.
            likeness[np.tri(*likeness.shape, dtype=np.bool_)] = 0
            for row in np.flatnonzero((likeness > LIKENESS).any(axis=1)).tolist():
                best = np.argpartition(-likeness[row], min(CANDIDATES, n - start - 1))[:CANDIDATES]
                for other in best[likeness[row, best] > LIKENESS].tolist():
                    i, j = start + row, start + other
                    shaped = max(aspects[i], aspects[j]) <= ASPECT * min(aspects[i], aspects[j])
                    if shaped and _is_same(block[row], small[j]):
                        found.append((i, j))
    return found


def _vectors(small: np.ndarray) -> np.ndarray:
    """[n, d], whose products are the correlations of pictures of half the side."""
    half = SIDE // 2
    vectors = np.empty((len(small), half * half * 3), dtype=np.float32)
    for vector, picture in zip(vectors, small, strict=True):
        vector[:] = picture.reshape(half, 2, half, 2, 3).mean(axis=(1, 3)).ravel()
        vector -= vector.mean()
        vector /= max(float(np.linalg.norm(vector)), 1e-6)  # of a fine chequered pattern nothing is left
    return vectors


def _is_same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two small pictures [SIDE, SIDE, 3] differ in brightness, contrast and noise only."""
    a, b = one.astype(np.float32), other.astype(np.float32)
    offset = b.mean() - a.mean()
    a -= a.mean()
    b -= b.mean()
    gain = float((a * b).sum() / (a * a).sum())
    if abs(offset) > OFFSET or not 1 / GAIN < gain < GAIN:
        return False
    return float(np.abs(b - gain * a).max()) <= min(RESIDUAL, RESIDUAL_SHARE * b.std())
