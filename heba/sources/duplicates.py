"""Images that are the same picture to the eye, though their bytes differ.

A picture is reduced to a small one, without its brightness and contrast. That stays nearly the same when a picture
is saved anew, resized, lit a little more or mirrored, and differs in another photograph of the same thing. The
bounds below lie between the two; tests/heba/test_duplicates.py has photographs, drawings and handwritten digits.
"""

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

from heba.sources.look import SIDE, Look

LIKENESS = 0.9965  # the correlation of two pictures of half the side, all colours together
RESIDUAL = 32.0  # the largest difference of a pixel, of 255, once brightness and contrast are matched ...
RESIDUAL_SHARE = 0.7  # ... and in standard deviations of the picture
GAIN = 1.4  # of contrast, up or down
OFFSET = 48.0  # of brightness, up or down, of a colour
PLAIN = 8.0  # standard deviation within a picture below which only its bytes tell it from another
ASPECT = 1.1  # of the ratios of width to height
CANDIDATES = 8  # of later images, the likeliest, that an image is looked at with; a fixed camera's are all alike
AT_ONCE = 10_000_000  # comparisons


def same_pictures(looks: dict[str, Look]) -> list[list[str]]:
    """The groups, of two or more, of files that show the same picture: the same bytes, saved anew, resized, a
    little brighter or darker, or mirrored.

    A file that cannot be read is in no group. Groups and their files are sorted.

    Args:
        looks: by file, `heba.sources.look.look_at`.
    """
    seen = {file: (look, look.small) for file, look in sorted(looks.items()) if look.small is not None}
    files = list(seen)
    if not files:
        return []
    first: dict[str, int] = {}
    pairs = [(first.setdefault(look.digest, i), i) for i, (look, _) in enumerate(seen.values())]
    small = np.stack([small for _, small in seen.values()])
    aspects = np.array([look.aspect for look, _ in seen.values()])
    # Plain pictures have nothing to be compared by, and of the same bytes the first is enough.
    rows = [i for one, i in pairs if one == i and _level(small[i])[0].std() >= PLAIN]
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
    for start in tqdm(range(0, n, step), desc="compare pictures", delay=2, unit="block"):
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


def _level(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A picture [side, side, 3] without its colours' means, and these [3]."""
    means = picture.mean(axis=(0, 1), dtype=np.float32)
    return picture - means, means


def _vectors(small: np.ndarray) -> np.ndarray:
    """[n, d], whose products are the correlations of pictures of half the side."""
    half = SIDE // 2
    vectors = np.empty((len(small), half * half * 3), dtype=np.float32)
    for vector, picture in zip(vectors, small, strict=True):
        vector[:] = _level(picture.reshape(half, 2, half, 2, 3).mean(axis=(1, 3)))[0].ravel()
        vector /= max(float(np.linalg.norm(vector)), 1e-6)  # of a fine chequered pattern nothing is left
    return vectors


def _is_same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two small pictures [SIDE, SIDE, 3] differ in brightness, contrast and noise only."""
    (a, dark), (b, bright) = _level(one), _level(other)
    gain = float((a * b).sum() / (a * a).sum())
    if np.abs(bright - dark).max() > OFFSET or not 1 / GAIN < gain < GAIN:
        return False
    return float(np.abs(b - gain * a).max()) <= min(RESIDUAL, RESIDUAL_SHARE * b.std())
