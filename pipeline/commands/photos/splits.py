"""Splits of a folder's images into those that are trained on, those that settings are chosen on, and those that
are tested.

Images that show the same picture are a unit: it is on one side of every split. The same folder gives the same
splits each time, and what is added to one class leaves the others as they are.
"""

import random
from pathlib import PurePosixPath
from typing import Literal, NamedTuple

from heba.data.splits import PARTS, Item, Split, class_names
from heba.sources.own import PART_NAMES, TRAIN, VAL

SMALL = 10  # units: where a class has fewer, each image is tested once, by cross-validation
Units = dict[str, list[list[Item]]]  # of each class


class Plan(NamedTuple):
    """The splits of a folder.

    Attributes:
        kind: given, the folder has a test part; repeated, drawn anew each time; folds, of a cross-validation.
        splits: by the name of their entry in params.yaml.
        seeds: of the few-shot samples that are drawn of each.
        left_out: of a given split, training or validation images that show the same picture as a test image, and
            training images that show the same as a validation image.
    """

    kind: Literal["given", "repeated", "folds"]
    splits: dict[str, Split]
    seeds: list[int]
    left_out: list[str]

    def test_ratio(self) -> float:
        """Images that are tested, per image that is not, in the mean split."""
        tested = [len(split["test"]) for split in self.splits.values()]
        others = [len(split["train"]) + len(split["val"]) for split in self.splits.values()]
        return sum(tested) / sum(others)

    def text(self) -> str:
        """What is done, in a sentence."""
        n = len(self.splits)
        tested = len({item[0] for split in self.splits.values() for item in split["test"]})
        if self.kind == "given":
            draws = f"{len(self.seeds)} few-shot samples" if len(self.seeds) > 1 else "one few-shot sample"
            return f"the folder's own test part, {tested} images; {draws} of the others"
        if self.kind == "folds":
            return f"cross-validation with {n} folds, since classes are small; {tested} images, each tested once"
        if n == 1:
            return f"one split, with {tested} test images"
        return f"{n} splits, each with 30 % of the images to test; {tested} different test images"


def make_plan(split: Split, same: list[list[str]], repeats: int) -> Plan:
    """The splits of the images of `split`, which is kept where the folder has a test part.

    Args:
        same: groups of files that show the same picture.
        repeats: how many splits, or few-shot samples of a given split.
    Raises:
        ValueError: names classes that have no two different images.
    """
    group = {file: i for i, files in enumerate(same) for file in files}
    if all(PurePosixPath(f).parts[0].lower() in PART_NAMES and f.count("/") == 2 for f, *_ in _items(split)):
        kept, left_out = without_copies(split, group)
        return Plan("given", {"images": _checked(kept)}, list(range(1, repeats + 1)), left_out)
    units = units_of(split, group)
    few = [name for name in class_names(split) if len(units.get(name, [])) < 2]
    if few:
        raise ValueError(
            f"a class needs two images that do not show the same picture, one to train and one to test; fewer "
            f"have: {', '.join(few)}"
        )
    fewest = min(map(len, units.values()))
    if repeats > 1 and fewest < SMALL:
        n = min(repeats, fewest)
        splits = [_fold(units, n, k) for k in range(n)]
    else:
        n = repeats
        splits = [_drawn(units, number) for number in range(1, n + 1)]
    named = {f"split-{i + 1}": _checked(one) for i, one in enumerate(splits)}
    return Plan("folds" if repeats > 1 and fewest < SMALL else "repeated", named, [1], [])


def _items(split: Split) -> list[Item]:
    return [item for part in PARTS for item in split[part]]


def units_of(split: Split, group: dict[str, int]) -> Units:
    """The units of each class, by the first file; one of several classes is of that of its first file."""
    found: dict[object, list[Item]] = {}
    for item in sorted(_items(split)):
        found.setdefault(group.get(item[0], item[0]), []).append(item)
    units: Units = {}
    for unit in found.values():
        units.setdefault(unit[0][2], []).append(unit)
    return units


def without_copies(split: Split, group: dict[str, int]) -> tuple[Split, list[str]]:
    """A given split without the training images that show what a test or validation image shows, and without the
    validation images that show what a test image shows; and their files."""
    shown: set[int] = set()
    kept: Split = {}
    left_out = []
    for part in reversed(PARTS):
        kept[part] = [item for item in split[part] if group.get(item[0]) not in shown]
        left_out += sorted(item[0] for item in split[part] if group.get(item[0]) in shown)
        shown |= {group[item[0]] for item in split[part] if item[0] in group}
    return {part: kept[part] for part in PARTS}, left_out


def _shuffled(units: list[list[Item]], *seed: object) -> list[list[Item]]:
    shuffled = list(units)
    random.Random(" ".join(map(str, seed))).shuffle(shuffled)
    return shuffled


def _drawn(units: Units, number: int) -> Split:
    """Of each class half to train, a fifth to val and the rest to test; `number` is of the draw."""
    parts: dict[str, list[Item]] = {part: [] for part in PARTS}
    for name, own in units.items():
        n = len(own)
        n_train = max(1, round(TRAIN * n))
        n_val = min(round(VAL * n), n - n_train - 1)
        for i, unit in enumerate(_shuffled(own, number, name)):
            parts["train" if i < n_train else "val" if i < n_train + n_val else "test"] += unit
    return parts


def _fold(units: Units, n: int, k: int) -> Split:
    """Fold `k` of `n` to test; of the others of each class a fifth to val, where that leaves some to train."""
    parts: dict[str, list[Item]] = {part: [] for part in PARTS}
    dealt = 0
    for name, own in units.items():
        shuffled = _shuffled(own, "folds", name)
        folds = [(dealt + i) % n for i in range(len(own))]  # so that all folds have about as many
        dealt += len(own)
        parts["test"] += [item for unit, fold in zip(shuffled, folds, strict=True) if fold == k for item in unit]
        rest = [unit for unit, fold in zip(shuffled, folds, strict=True) if fold != k]
        n_val = min(round(VAL * len(rest)), len(rest) - 1)
        parts["val"] += [item for unit in rest[:n_val] for item in unit]
        parts["train"] += [item for unit in rest[n_val:] for item in unit]
    return parts


def _checked(split: Split) -> Split:
    """In the order of labels and files; ValueError where a class has nothing to train or to test, since what it
    has are copies of other images."""
    names = class_names(split)
    for part in ("train", "test"):
        absent = sorted(set(names) - {name for *_, name in split[part]})
        if absent:
            raise ValueError(
                f"no image is left to {part} for {', '.join(absent)}: the others show the same pictures as images "
                "that are on the other side; remove the copies"
            )
    return {part: sorted(split[part], key=lambda item: (item[1], item[0])) for part in PARTS}
