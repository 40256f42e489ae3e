"""A user's own images as a split: a folder per class, a CSV file, or a split file like CoOp's.

All three have one folder that holds the images; the paths of the split are relative to it.
"""

import csv
import os
import random
from collections.abc import Callable, Sequence
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
# Files that Windows makes, in lower case.
OF_WINDOWS = {"desktop.ini", "ehthumbs.db", "thumbs.db"}

Parts = dict[str, list[tuple[str, str]]]  # (path, class name) by part; `all` where no split is given
Groups = Sequence[Sequence[str]]
# From the images' paths: those that are to be left out, and the groups of those that show the same picture.
LookAt = Callable[[list[str]], tuple[Sequence[str], Groups]]


@dataclass
class OwnData:
    """What a folder holds: its split, and the files that are no images and were left out."""

    split: Split
    left_out: list[str] = field(default_factory=list)


def trust(files: list[str]) -> tuple[Sequence[str], Groups]:
    """Take all images, each for a picture of its own."""
    return (), ()


def read_own(
    root: Path,
    kind: str,
    file: str | None = None,
    aside: str | None = None,
    look_at: LookAt = trust,
    split: Path | None = None,
) -> OwnData:
    """Read the data set in the folder `root`.

    Args:
        kind: `folder` (a folder per class, or these below train/, val/ and test/), `csv` (columns path, label and
            optionally split) or `coop` (a split file like CoOp's).
        file: the name of the CSV or split file, where the folder has several.
        aside: a file in the folder that is not to be read, such as the descriptions.
        look_at: called once, with all images.
        split: a split file that lies elsewhere, for `coop`.

    Raises ValueError, which names the file and for a CSV the line.
    """
    if root.is_file():
        raise ValueError(f"{root} is a file; name the folder that holds the images")
    if not root.is_dir():
        raise ValueError(f"{root}: there is no such folder")
    left_out: list[str] = []
    if kind == "folder":
        parts = _read_folders(root, aside, left_out)
    elif kind == "csv":
        parts = _read_csv(root, _file(root, ".csv", file, aside))
    elif split is not None and not split.is_file():
        raise ValueError(f"{split}: there is no such split file")
    else:
        return OwnData(_read_labels(root, split or _file(root, ".json", file, aside), look_at))
    without, same = look_at([path for items in parts.values() for path, _ in items])
    return OwnData(_split(parts, set(without), same), left_out)


def _read_labels(root: Path, path: Path, look_at: LookAt) -> Split:
    """A split file, which has labels of its own, but for the images that `look_at` leaves out."""
    found = read_split(path)
    split = {
        part: [(_inside(root, f, str(path)), label, name) for f, label, name in found[part]] for part in PARTS
    }
    without = set(look_at([file for part in PARTS for file, _, _ in split[part]])[0])
    kept: Split = {part: [item for item in split[part] if item[0] not in without] for part in PARTS}
    _need_all({name for part in PARTS for *_, name in split[part]}, {n for part in PARTS for *_, n in kept[part]})
    return kept


def _split(parts: Parts, without: set[str], same: Groups) -> Split:
    """The split of what a folder holds, but for the files `without`."""
    kept = {part: [item for item in items if item[0] not in without] for part, items in parts.items()}
    names, left = ({name for items in found.values() for _, name in items} for found in (parts, kept))
    _need_all(names, left)
    return make_split(_by_name(kept["all"]), same) if "all" in parts else given_split(kept, same)


def _need_all(names: set[str], left: set[str]) -> None:
    if names != left:
        raise ValueError(f"not one image can be read of: {_some(sorted(names - left))}")


def make_split(files: dict[str, list[str]], same: Groups = ()) -> Split:
    """The same split of `files` by class name every time, whatever their order: of a class half to train, a fifth
    to val, the rest to test, but at least one image to train and to test.

    Images of a class that show the `same` picture are in one part, unless a class has one picture only.
    """
    few = [name for name in sorted(files) if len(files[name]) < 2]
    if few:
        raise ValueError(f"a class needs an image to train and one to test; fewer than 2 have: {', '.join(few)}")
    parts: Parts = {part: [] for part in PARTS}
    for name, paths in files.items():
        n_train = max(1, round(TRAIN * len(paths)))
        n_val = min(round(VAL * len(paths)), len(paths) - n_train - 1)
        for part, found in zip(PARTS, _cut(_pictures(paths, same), n_train, n_val), strict=True):
            parts[part] += [(path, name) for path in found]
    return _labelled(parts)


def given_split(parts: Parts, same: Groups = ()) -> Split:
    """The split of (path, class name) by part; without val, a fifth of a class's train images becomes val, but
    images that show the `same` picture stay together."""
    parts = {part: list(parts.get(part, [])) for part in PARTS}
    if not parts["val"]:
        files = _by_name(parts["train"])
        parts["train"] = []
        for name, paths in files.items():
            n_val = min(round(VAL * len(paths)), len(paths) - 1)
            for part, found in zip(("val", "train"), _cut(_pictures(paths, same), n_val), strict=True):
                parts[part] += [(path, name) for path in found]
    return _labelled(parts)


def _pictures(paths: list[str], same: Groups) -> list[list[str]]:
    """`paths`, shuffled, those that show the same picture together, at the place of the first of them; apart where
    there is no other picture."""
    group_of = {path: number for number, group in enumerate(same) for path in group}
    pictures: dict[int | str, list[str]] = {}
    for path in _shuffled(paths):
        pictures.setdefault(group_of.get(path, path), []).append(path)
    return list(pictures.values()) if len(pictures) > 1 else [[path] for path in _shuffled(paths)]


def _cut(pictures: list[list[str]], *sizes: int) -> list[list[str]]:
    """Parts of so many images, and one with the rest, which has a picture at least: each picture is in the first
    part with room for half of its images."""
    parts: list[list[str]] = [[] for _ in range(len(sizes) + 1)]
    for picture in pictures:
        room = [part for part, size in zip(parts, sizes, strict=False) if len(part) + len(picture) / 2 <= size]
        needed = picture is pictures[-1] and not parts[-1]
        (room[0] if room and not needed else parts[-1]).extend(picture)
    return parts


def _by_name(items: list[tuple[str, str]]) -> dict[str, list[str]]:
    files: dict[str, list[str]] = {}
    for path, name in items:
        files.setdefault(name, []).append(path)
    return files


def _items(files: dict[str, list[str]]) -> list[tuple[str, str]]:
    return [(path, name) for name, paths in files.items() for path in paths]


def _shuffled(paths: list[str]) -> list[str]:
    # A generator per class: what is added to one class leaves the others as they are.
    shuffled = sorted(paths)
    random.Random(SPLIT_SEED).shuffle(shuffled)
    return shuffled


def _labelled(parts: Parts) -> Split:
    """Labels in the order of the class names; images in the order of labels and paths."""
    names = sorted({name for items in parts.values() for _, name in items})
    labels = {name: label for label, name in enumerate(names)}
    split: Split = {}
    for part in PARTS:
        ordered = sorted((name, path) for path, name in parts[part])
        split[part] = [(path, labels[name], name) for name, path in ordered]
    return split


def _inside(root: Path, file: str, where: str) -> str:
    """`file` relative to `root`; ValueError where it, or what it links to, lies outside or is no file. A path as
    Windows writes it is taken too."""
    if "\\" in file and not os.path.lexists(root / file):
        file = file.replace("\\", "/")
    lexical = os.path.relpath(os.path.normpath(root / file), root)
    if Path(lexical).parts[:1] == ("..",) or not (root / lexical).resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{where}: {file!r} leads out of the folder {root}")
    if not (root / lexical).is_file() and (root / lexical).exists():
        # To read from a pipe is to wait for who writes into it.
        raise ValueError(f"{where}: {file!r} is no file but a folder, a pipe or the like; remove it")
    return Path(lexical).as_posix()


def is_hidden(name: str) -> bool:
    """Whether a system, not a person, made a file or folder of this name, such as macOS's ._a.png."""
    return name.startswith(".") or name == "__MACOSX" or name.lower() in OF_WINDOWS


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


def _read_folders(root: Path, aside: str | None, left_out: list[str]) -> Parts:
    folders = _folders(root, root, left_out, aside)
    if not all(folder.name.lower() in PART_NAMES for folder in folders):
        return {"all": _items(_classes(root, folders, left_out))}
    parts: Parts = {}
    for folder in folders:
        found = _classes(root, _folders(root, folder, left_out), left_out)
        parts.setdefault(PART_NAMES[folder.name.lower()], []).extend(_items(found))
    _need_train_and_test(parts, str(root))
    return parts


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


def _read_csv(root: Path, path: Path) -> Parts:
    parts: Parts = {}
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
    return parts


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


def _need_train_and_test(parts: Parts, where: str) -> None:
    absent = [part for part in ("train", "test") if not parts.get(part)]
    if absent:
        raise ValueError(f"{where}: a given split has train and test; here is no {' and no '.join(absent)}")


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
