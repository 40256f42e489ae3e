"""A user's own images as a split: a folder per class, a CSV file, or a split file like CoOp's.

All three have one folder that holds the images; the paths of the split are relative to it.
"""

import csv
import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from heba.data.splits import PARTS, Split, read_split

# In lower case; files with them in upper case are images too.
IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
PART_NAMES = {"train": "train", "val": "val", "validation": "val", "test": "test"}
# CoOp's proportions, the rest is test; and its share of val where only train and test are given.
TRAIN, VAL = 0.5, 0.2
SPLIT_SEED = 0


@dataclass
class OwnData:
    """What a folder holds: its split, and the files that are no images and were left out."""

    split: Split
    left_out: list[str] = field(default_factory=list)


def read_own(
    root: Path, kind: str, file: str | None = None, aside: str | None = None, split: Path | None = None
) -> OwnData:
    """Read the data set in the folder `root`.

    Args:
        kind: `folder` (a folder per class, or these below train/, val/ and test/), `csv` (columns path, label and
            optionally split) or `coop` (a split file like CoOp's).
        file: the name of the CSV or split file, where the folder has several.
        aside: a file in the folder that is not to be read, such as the descriptions.
        split: a split file that lies elsewhere, for `coop`.

    Raises ValueError, which names the file and for a CSV the line.
    """
    if not root.is_dir():
        raise ValueError(f"{root}: there is no such folder")
    if kind == "folder":
        return _read_folders(root, aside)
    if kind == "csv":
        return OwnData(_read_csv(root, _file(root, ".csv", file, aside)))
    path = split or _file(root, ".json", file, aside)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such split file")
    found = read_split(path)
    return OwnData(
        {part: [(_inside(root, f, str(path)), label, name) for f, label, name in found[part]] for part in PARTS}
    )


def make_split(files: dict[str, list[str]]) -> Split:
    """The same split of `files` by class name every time, whatever their order: of a class half to train, a fifth
    to val, the rest to test, but at least one image to train and to test."""
    few = [name for name in sorted(files) if len(files[name]) < 2]
    if few:
        raise ValueError(f"a class needs an image to train and one to test; fewer than 2 have: {', '.join(few)}")
    parts: dict[str, list[tuple[str, str]]] = {part: [] for part in PARTS}
    for name, paths in files.items():
        shuffled = _shuffled(paths)
        n_train = max(1, round(TRAIN * len(paths)))
        n_val = min(round(VAL * len(paths)), len(paths) - n_train - 1)
        cuts = {"train": (0, n_train), "val": (n_train, n_train + n_val), "test": (n_train + n_val, len(paths))}
        for part, (first, last) in cuts.items():
            parts[part] += [(path, name) for path in shuffled[first:last]]
    return _labelled(parts)


def given_split(parts: dict[str, list[tuple[str, str]]]) -> Split:
    """The split of (path, class name) by part; without val, a fifth of a class's train images becomes val."""
    parts = {part: list(parts.get(part, [])) for part in PARTS}
    if not parts["val"]:
        files = _by_name(parts["train"])
        parts["train"] = []
        for name, paths in files.items():
            shuffled = _shuffled(paths)
            n_val = min(round(VAL * len(paths)), len(paths) - 1)
            parts["val"] += [(path, name) for path in shuffled[:n_val]]
            parts["train"] += [(path, name) for path in shuffled[n_val:]]
    return _labelled(parts)


def _by_name(items: list[tuple[str, str]]) -> dict[str, list[str]]:
    files: dict[str, list[str]] = {}
    for path, name in items:
        files.setdefault(name, []).append(path)
    return files


def _shuffled(paths: list[str]) -> list[str]:
    # A generator per class: what is added to one class leaves the others as they are.
    shuffled = sorted(paths)
    random.Random(SPLIT_SEED).shuffle(shuffled)
    return shuffled


def _labelled(parts: dict[str, list[tuple[str, str]]]) -> Split:
    """Labels in the order of the class names; images in the order of labels and paths."""
    names = sorted({name for items in parts.values() for _, name in items})
    labels = {name: label for label, name in enumerate(names)}
    split: Split = {}
    for part in PARTS:
        ordered = sorted((name, path) for path, name in parts[part])
        split[part] = [(path, labels[name], name) for name, path in ordered]
    return split


def _inside(root: Path, file: str, where: str) -> str:
    """`file` relative to `root`; ValueError where it, or what it links to, lies outside or is no file."""
    lexical = os.path.relpath(os.path.normpath(root / file), root)
    if Path(lexical).parts[:1] == ("..",) or not (root / lexical).resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{where}: {file!r} leads out of the folder {root}")
    if not (root / lexical).is_file() and (root / lexical).exists():
        # To read from a pipe is to wait for who writes into it.
        raise ValueError(f"{where}: {file!r} is no file but a folder, a pipe or the like; remove it")
    return Path(lexical).as_posix()


def is_hidden(name: str) -> bool:
    """Whether a system, not a person, made a file or folder of this name, such as macOS's ._a.png."""
    return name.startswith(".") or name == "__MACOSX"


def _visible(folder: Path) -> list[Path]:
    """The entries of a folder, without hidden ones."""
    found = sorted(path for path in folder.iterdir() if not is_hidden(path.name))
    for path in found:
        try:
            path.name.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{folder}: the name {path.name!r} is not in UTF-8; rename the file") from None
    return found


def _file(root: Path, suffix: str, name: str | None, aside: str | None) -> Path:
    if name is not None:
        path = root / _inside(root, name, "file")
        if not path.is_file():
            raise ValueError(f"{path}: there is no such file")
        return path
    found = [path for path in _visible(root) if path.suffix.lower() == suffix and path.name != aside]
    if len(found) != 1:
        what = "has no" if not found else f"has {len(found)} files"
        raise ValueError(
            f"{root} {what} {suffix}{'' if found else ' file'}; put one there, or name it with the key `file`"
        )
    return found[0]


def _read_folders(root: Path, aside: str | None) -> OwnData:
    data = OwnData({})
    folders = _folders(root, root, data.left_out, aside)
    if not all(folder.name.lower() in PART_NAMES for folder in folders):
        data.split = make_split(_classes(root, folders, data.left_out))
        return data
    parts: dict[str, list[tuple[str, str]]] = {}
    for folder in folders:
        found = _classes(root, _folders(root, folder, data.left_out), data.left_out)
        items = [(path, name) for name, paths in found.items() for path in paths]
        parts.setdefault(PART_NAMES[folder.name.lower()], []).extend(items)
    _need_train_and_test(parts, str(root))
    data.split = given_split(parts)
    return data


def _folders(root: Path, folder: Path, left_out: list[str], aside: str | None = None) -> list[Path]:
    """The folders in `folder`; other files go to `left_out`, images there are an error."""
    inside = _visible(folder)
    found = [path for path in inside if path.is_dir()]
    files = [path for path in inside if not path.is_dir() and path.name != aside]
    images = [path.name for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    if images:
        raise ValueError(
            f"{folder}: images in no class's folder: {_some(images)}; put each into its class's folder"
        )
    if not found:
        raise ValueError(f"{folder} holds no folders; each class needs one for its images")
    left_out += [path.relative_to(root).as_posix() for path in files]
    return found


def _classes(root: Path, folders: list[Path], left_out: list[str]) -> dict[str, list[str]]:
    """Paths of the images in each class's folder; what is no image goes to `left_out`."""
    found: dict[str, list[str]] = {}
    for folder in folders:
        inside = _visible(folder)
        deeper = [path.name for path in inside if path.is_dir()]
        if deeper:
            raise ValueError(
                f"{folder} holds folders: {_some(deeper)}. The folder of a class holds its images; "
                f"above the classes there may be {', '.join(PART_NAMES)} and nothing else"
            )
        files = [_inside(root, path.relative_to(root).as_posix(), str(folder)) for path in inside]
        images = [file for file in files if Path(file).suffix.lower() in IMAGE_SUFFIXES]
        if not images:
            raise ValueError(f"{folder} holds no images; fill the folder, or remove it")
        left_out += sorted(set(files) - set(images))
        found[folder.name] = images
    return found


def _read_csv(root: Path, path: Path) -> Split:
    parts: dict[str, list[tuple[str, str]]] = {}
    try:
        # Spreadsheets write a byte order mark.
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, strict=True, skipinitialspace=True)
            columns = reader.fieldnames or []
            if not {"path", "label"} <= set(columns):
                raise ValueError(
                    f"{path}: the first line must name the columns path and label, and optionally split, with "
                    f"commas between; it is {','.join(columns)!r}"
                )
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                part, item = _row(row, where, "split" in columns)
                parts.setdefault(part, []).append((_inside(root, item[0], where), item[1]))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable CSV file in UTF-8: {error}") from None
    if not parts:
        raise ValueError(f"{path} names no images")
    if "split" in columns:
        _need_train_and_test(parts, str(path))
        return given_split(parts)
    return make_split(_by_name(parts["all"]))


def _row(row: dict[str | Any, Any], where: str, has_split: bool) -> tuple[str, tuple[str, str]]:
    """The part (`all` without a column for it) and (path, class name) of a CSV's row."""
    if None in row:
        raise ValueError(f"{where}: more values than columns; a value with a comma in it needs quotes")
    values = {key: (row.get(key) or "").strip() for key in ("path", "label", "split")}
    empty = [key for key in ("path", "label") if not values[key]]
    if empty:
        raise ValueError(f"{where}: no {' and no '.join(empty)}")
    part = PART_NAMES.get(values["split"].lower()) if has_split else "all"
    if part is None:
        raise ValueError(f"{where}: split is {values['split']!r}, not one of {', '.join(PART_NAMES)}")
    return part, (values["path"], values["label"])


def _need_train_and_test(parts: dict[str, list[tuple[str, str]]], where: str) -> None:
    absent = [part for part in ("train", "test") if not parts.get(part)]
    if absent:
        raise ValueError(f"{where}: a given split has train and test; here is no {' and no '.join(absent)}")


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
