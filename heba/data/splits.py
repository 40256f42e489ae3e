"""CoOp's few-shot sampling, exactly, and base/novel halves (Zhou et al., "Learning to Prompt for VLMs").

A split is {"train" | "val" | "test": [[path, label, class name], ...]}, as in CoOp's split files.
"""

import json
import random
from pathlib import Path, PurePosixPath

Item = tuple[str, int, str]
Split = dict[str, list[Item]]
PARTS = ("train", "val", "test")


def read_split(path: Path) -> Split:
    """Read and check a split file; ValueError names the file and the first bad entry, and where there is no such
    file it is a FileNotFoundError."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a readable split file: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: a split file is an object with the keys {', '.join(PARTS)}")
    names: dict[int, str] = {}
    split: Split = {}
    for part in PARTS:
        if not isinstance(raw.get(part), list):
            raise ValueError(f"{path}: key {part!r} must be a list of [path, label, class name]")
        split[part] = []
        for i, entry in enumerate(raw[part]):
            match entry:
                case [str() as file, int() as label, str() as name] if label >= 0 and type(label) is int:
                    if names.setdefault(label, name) != name:
                        raise ValueError(
                            f"{path}: {part}[{i}]: label {label} is both {names[label]!r} and {name!r}"
                        )
                    if "\0" in file or PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
                        raise ValueError(f"{path}: {part}[{i}]: {file!r} is no path below the images' folder")
                    split[part].append((file, label, name))
                case _:
                    raise ValueError(
                        f"{path}: {part}[{i}]: expected [path, label >= 0, class name], got {entry!r}"
                    )
    if names and sorted(names) != list(range(len(names))):
        raise ValueError(f"{path}: labels must be 0..n-1 without gaps, got {len(names)} labels up to {max(names)}")
    return split


def write_split(split: Split, path: Path) -> None:
    """Write a split as JSON (see `read_split`)."""
    path.write_text(json.dumps(split, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")


def class_names(split: Split) -> list[str]:
    """Class names by label."""
    names = {label: name for part in PARTS for _, label, name in split[part]}
    return [names[label] for label in sorted(names)]


def sample_few_shot(split: Split, shots: int, seed: int) -> Split:
    """CoOp's sample of `shots` train and min(shots, 4) val images per class; test is untouched.

    Exactly CoOp's order of draws: `random.seed(seed)`, classes in order of first appearance,
    `random.sample` per class; a class with fewer images gives all of them and costs no draw; val goes
    on with the same random state. A split without val, as ImageNet's, gives training images that were not
    drawn.
    """
    if shots < 1:
        raise ValueError(f"shots must be at least 1, got {shots}")
    rng = random.Random(seed)

    def sample(items: list[Item], k: int) -> list[Item]:
        by_label: dict[int, list[Item]] = {}
        for item in items:
            by_label.setdefault(item[1], []).append(item)
        chosen: list[Item] = []
        for group in by_label.values():
            chosen += rng.sample(group, k) if len(group) >= k else group
        return chosen

    train = sample(split["train"], shots)
    left = split["val"]
    if not left:
        drawn = {file for file, _, _ in train}
        left = [item for item in split["train"] if item[0] not in drawn]
    return {"train": train, "val": sample(left, min(shots, 4)), "test": split["test"]}


def base_labels(n_classes: int) -> range:
    """Labels of the base classes: the first ceil(n/2)."""
    return range((n_classes + 1) // 2)


def select_classes(split: Split, labels: range) -> Split:
    """Keep the images of `labels`, relabelled from 0 (base or novel half; chosen after sampling)."""
    new = {label: i for i, label in enumerate(labels)}
    return {
        part: [(file, new[label], name) for file, label, name in split[part] if label in new] for part in PARTS
    }
