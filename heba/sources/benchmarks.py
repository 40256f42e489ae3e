"""From a benchmark's archives to images/, split.json and descriptions.json, whatever the archives' layout.

CoOp's protocol fixes the splits: where CoOp ships a split file it is used as it is; FGVCAircraft and ImageNet have
their official lists, with images sorted by name, so that a sample does not depend on the file system's order.
"""

import ast
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from heba.data.splits import PARTS, Item, Split, class_names, write_split
from heba.sources.catalog import Benchmark
from heba.sources.fetch import Local
from heba.sources.own import IMAGE_SUFFIXES
from heba.sources.unpack import ArchiveError, members_of_tar, naming_damage, unpack, unpack_tar


def prepare(entry: Benchmark, archives: list[Local], split: Split | None, folder: Path) -> None:
    """Fill `folder` with images/ and split.json, and check them against the catalogue; `split` is CoOp's where the
    data set has one.

    Images are unpacked inside `folder` and moved, not copied. Raises ValueError when classes, counts or images
    are not those of the catalogue.
    """
    raw = folder / "raw"
    if entry.layout == "imagenet":
        split = _imagenet(archives, folder / "images")
    else:
        for archive in archives:
            unpack(archive.path, raw, archive.file.inner)
        if split is not None:
            root = find_root(raw, split)
        elif entry.layout == "fgvc":
            lists = _only(raw.rglob("images_variant_train.txt"), "images_variant_train.txt").parent
            split, root = _fgvc(lists), lists / "images"
        else:
            root, split = _folders_of_classes(raw, entry)
        os.replace(root, folder / "images")
    shutil.rmtree(raw, ignore_errors=True)
    check_split(split, entry, folder / "images")
    write_split(split, folder / "split.json")


def check_split(split: Split, entry: Benchmark, images: Path) -> None:
    """ValueError unless classes and counts are those of the catalogue and every image is there."""
    problems = []
    n = len(class_names(split))
    if n != entry.classes:
        problems.append(f"{n} classes instead of {entry.classes}")
    for part in PARTS:
        expected = getattr(entry.counts, part)
        if len(split[part]) != expected:
            problems.append(f"{len(split[part])} {part} images instead of {expected}")
    missing = missing_images(split, images)
    if missing:
        problems.append(f"{len(missing)} images of the split are not in the archives: {', '.join(missing[:3])}")
    if problems:
        raise ValueError("; ".join(problems))


def missing_images(split: Split, images: Path) -> list[str]:
    """Paths of `split` that are no file under `images`."""
    return [file for part in PARTS for file, _, _ in split[part] if not (images / file).is_file()]


def _only(found: Iterator[Path], name: str) -> Path:
    path = min(found, default=None)
    if path is None:
        raise ValueError(f"the archives contain no {name}")
    return path


def find_root(raw: Path, split: Split) -> Path:
    """The folder below `raw` that the paths of `split` start from, wherever a mirror has put it."""
    first = split["train"][0][0]
    match = _only((p for p in raw.rglob(Path(first).name) if p.as_posix().endswith("/" + first)), first)
    return match.parents[len(Path(first).parts) - 1]


def _fgvc(lists: Path) -> Split:
    lines = [line.strip() for line in (lists / "variants.txt").read_text().splitlines()]
    names = {name: i for i, name in enumerate(line for line in lines if line)}

    def part(name: str) -> list[Item]:
        lines = (lists / f"images_variant_{name}.txt").read_text().splitlines()
        pairs = [line.strip().split(" ", 1) for line in lines if line.strip()]
        return [(f"{image}.jpg", names[variant], variant) for image, variant in pairs]

    return {name: part(name) for name in PARTS}


def imagenet_classes() -> list[tuple[str, str]]:
    """(wnid, name) of ImageNet's 1000 classes in the order of their labels: wnids as timm has them, names as
    open_clip has them, which are those of CoOp's classnames.txt."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
    from timm.data import ImageNetInfo

    return list(zip(sorted(ImageNetInfo("imagenet-1k").label_names()), IMAGENET_CLASSNAMES, strict=True))


def _images_below(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)


def _folders_of_classes(raw: Path, entry: Benchmark) -> tuple[Path, Split]:
    """The folder with a folder per class, and the test split: folders named by wnid (a subset of ImageNet's
    classes makes labels of its own, in the order of the wnids) or by the index of a wnid."""
    classes = imagenet_classes()
    keys = [wnid if entry.layout == "wnid" else str(i) for i, (wnid, _) in enumerate(classes)]
    names = dict(zip(keys, (name for _, name in classes), strict=True))
    roots: dict[Path, int] = {}
    for path in raw.rglob("*"):
        if path.name in names and path.is_dir():
            roots[path.parent] = roots.get(path.parent, 0) + 1
    if not roots:
        raise ValueError(f"the archives contain no folder named by {entry.layout}")
    root = max(roots, key=lambda r: roots[r])
    present = [key for key in keys if (root / key).is_dir()]
    test = [(f"{k}/{file}", i, names[k]) for i, k in enumerate(present) for file in _images_below(root / k)]
    return root, {"train": [], "val": [], "test": test}


def _imagenet(archives: list[Local], images: Path) -> Split:
    """Train: a tar of one tar per class. Validation, which is CoOp's test: flat, sorted by the devkit's lists."""
    from scipy.io import loadmat

    paths = {a.file.file.split(".")[0].rsplit("_", 1)[-1]: a.path for a in archives}
    classes = imagenet_classes()
    train, wnids = paths["train"], {wnid for wnid, _ in classes}
    with naming_damage(train), train.open("rb") as stream:
        for path, size, inner in members_of_tar(stream, train.stat().st_size, train):
            if path.stem not in wnids:
                raise ArchiveError(f"{train}: unexpected member {str(path)!r}")
            unpack_tar(inner, size, images / "train" / path.stem, train / path)
    flat = images / "val"
    unpack(paths["val"], flat)
    unpack(paths["t12"], images / "devkit")
    devkit = _only((images / "devkit").rglob("meta.mat"), "meta.mat").parent
    synsets = loadmat(devkit / "meta.mat", squeeze_me=True)["synsets"]
    wnid_of = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if int(row["num_children"]) == 0}
    truth = (devkit / "ILSVRC2012_validation_ground_truth.txt").read_text().split()
    flat_images = _images_below(flat)
    if len(flat_images) != len(truth):
        raise ValueError(f"ImageNet: {len(flat_images)} validation images, but the devkit labels {len(truth)}")
    for name, number in zip(flat_images, truth, strict=True):
        target = flat / wnid_of[int(number)]
        target.mkdir(exist_ok=True)
        os.replace(flat / name, target / name)
    shutil.rmtree(images / "devkit")

    def part(folder: str) -> list[Item]:
        return [
            (f"{folder}/{wnid}/{file}", label, name)
            for label, (wnid, name) in enumerate(classes)
            if (images / folder / wnid).is_dir()
            for file in _images_below(images / folder / wnid)
        ]

    return {"train": part("train"), "val": [], "test": part("val")}


def parse_descriptions(source: str, title: str) -> dict[str, list[str]]:
    """Descriptions {class name: [sentence, ...]} from JSON, or from a Python module that assigns one such literal,
    as the official code ships them. Nothing is executed."""
    parse: Callable[[str], object] = json.loads if source.lstrip().startswith("{") else _python_literal
    try:
        found = parse(source)
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"{title}: neither JSON nor a Python literal: {error}") from None
    if not isinstance(found, dict) or not all(
        isinstance(k, str) and isinstance(v, list) and all(isinstance(t, str) for t in v) for k, v in found.items()
    ):
        raise ValueError(f"{title}: expected class names with a list of sentences each")
    return found


def _python_literal(source: str) -> object:
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            return ast.literal_eval(node.value)
    raise ValueError("it assigns nothing")
