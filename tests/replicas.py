"""Replicas of the real benchmarks: archives with the true layout and file names, a few generated images a class.

`python -m tests.replicas FOLDER` writes the archives of all fifteen under FOLDER/<data set>/ and a catalogue that
names their checksums, FOLDER/catalog.yaml: with `data.mirror` and `data.catalog` of params.yaml set to them, the
paper's whole DAG runs without a network. File names come from the real split files under HEBA_SHARED where these
are at hand, else they are made up in the same form.
"""

import hashlib
import io
import json
import os
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from heba.sources.benchmarks import imagenet_classes
from heba.sources.catalog import CATALOG

SHARED = Path(os.environ.get("HEBA_SHARED", "../shared"))
PER_CLASS = {"train": 2, "val": 1, "test": 1}
Files = dict[str, bytes]


def load_names() -> list[str]:
    """The data sets of the catalogue."""
    return list(yaml.safe_load(CATALOG.read_text()))


def jpeg(label: int) -> bytes:
    """A small picture whose colours tell the class."""
    rng = np.random.default_rng(label)
    pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(10, 0).repeat(12, 1)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def tar_of(files: Files, mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def zip_of(files: Files) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def made_up_path(name: str, part: str, label: int, i: int) -> str:
    """A path of the form that a data set's split file has."""
    folder = f"class_{label}"
    if name == "stanford_cars":
        folder = "cars_test" if part == "test" else "cars_train"
    elif name == "sun397":  # a folder for the letter, and in some classes one more for their kind
        folder = f"c/{folder}" + "/outdoor" * (label % 2)
    return f"{folder}/{part}_{label}_{i}.jpg"


def coop_split(name: str, split_name: str, classes: int) -> dict:
    """A few images a class of the real split file, or made-up ones of the same form."""
    path = SHARED / "splits" / split_name
    if path.is_file():
        real = json.loads(path.read_text())
    else:
        real = {
            part: [[made_up_path(name, part, c, i), c, f"class {c}"] for c in range(classes) for i in range(4)]
            for part in PER_CLASS
        }
    split: dict = {}
    for part, n in PER_CLASS.items():
        taken: dict[int, int] = {}
        split[part] = []
        for item in real[part]:
            taken[item[1]] = taken.get(item[1], 0) + 1
            if taken[item[1]] <= n:
                split[part].append(item)
    return split


ROOTS = {  # the folder of the split's paths in the first archive of the catalogue
    "caltech101": "101_ObjectCategories/",
    "oxford_pets": "images/",
    "stanford_cars": "stanford_cars/",
    "oxford_flowers": "jpg/",
    "food101": "food-101/images/",
    "sun397": "sun397/SUN397/",
    "dtd": "dtd/images/",
    "eurosat": "2750/",
    "ucf101": "ucf101/UCF-101-midframes/",
}


def archive_of(file: str, files: Files) -> bytes:
    if file.endswith(".zip"):
        return zip_of(files)
    return tar_of(files, "w:gz" if file.endswith("gz") else "w")


def imagenet_archives() -> list[bytes]:
    from scipy.io import savemat

    classes = imagenet_classes()
    pictures = {wnid: jpeg(i) for i, (wnid, _) in enumerate(classes)}
    inner = {f"{wnid}.tar": tar_of({f"{wnid}_{i}.JPEG": pictures[wnid] for i in (10, 2)}) for wnid, _ in classes}
    # The devkit numbers the classes in an order of its own, and the flat images are not in the order of classes.
    numbered = [wnid for wnid, _ in reversed(classes)]
    order = np.random.default_rng(0).permutation(len(classes))
    flat = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": pictures[numbered[k]] for i, k in enumerate(order)}
    synsets = np.zeros(len(numbered) + 1, [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")])
    for i, wnid in enumerate([*numbered, "n00001740"]):
        synsets[i] = (i + 1, wnid, 0 if i < len(numbered) else 2)
    mat = io.BytesIO()
    savemat(mat, {"synsets": synsets})
    devkit = {
        "ILSVRC2012_devkit_t12/data/meta.mat": mat.getvalue(),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": "".join(
            f"{k + 1}\n" for k in order
        ).encode(),
    }
    return [tar_of(inner), tar_of(flat), tar_of(devkit, "w:gz")]


def build(name: str, entry: dict, folder: Path) -> dict:
    """Write the archives of the data set `name` into `folder`; returns its catalogue entry."""
    folder.mkdir(parents=True, exist_ok=True)
    entry = json.loads(json.dumps(entry))
    first = entry["sources"][0]
    classes = imagenet_classes() if name.startswith("imagenet") else []
    counts = dict.fromkeys(PER_CLASS, 0)
    contents: list[bytes]
    if entry["layout"] == "coop":
        split = coop_split(name, entry["split"]["file"], entry["classes"])
        counts = {part: len(items) for part, items in split.items()}
        names = {item[2] for items in split.values() for item in items}
        entry["split"] = publish(folder, entry["split"]["file"], json.dumps(split).encode())
        files = {ROOTS[name] + path: jpeg(label) for items in split.values() for path, label, _ in items}
        if "inner" in first[0]:
            files = {"caltech-101/" + first[0]["inner"]: tar_of(files, "w:gz"), "caltech-101/Annotations.tar": b""}
        contents = [archive_of(first[0]["file"], files)]
    elif entry["layout"] == "fgvc":
        names = [f"Variant {i}" for i in range(entry["classes"])]
        data, files, number = "fgvc-aircraft-2013b/data/", {}, 1000000
        files[data + "variants.txt"] = "\n".join(names).encode() + b"\n"
        for part, n in PER_CLASS.items():
            lines = []
            for label, variant in enumerate(names):
                for _ in range(n):
                    number += 1
                    lines.append(f"{number} {variant}")
                    files[f"{data}images/{number}.jpg"] = jpeg(label)
            counts[part] = len(lines)
            files[f"{data}images_variant_{part}.txt"] = "\n".join(lines).encode() + b"\n"
        contents = [archive_of(first[0]["file"], files)]
    elif entry["layout"] == "imagenet":
        contents = imagenet_archives()
        names = [c for _, c in classes]
        counts = {"train": 2000, "val": 0, "test": 1000}
    else:
        keys = [w for w, _ in classes] if entry["layout"] == "wnid" else [str(i) for i in range(1000)]
        chosen = range(0, 1000, 1000 // entry["classes"])
        names = [classes[i][1] for i in chosen]
        top = {"imagenetv2": "imagenetv2-matched-frequency-format-val", "imagenet_sketch": "sketch"}.get(
            name, name
        )
        ends = {"imagenetv2": (".jpeg", ".jpeg"), "imagenet_sketch": (".JPEG", ".JPEG")}.get(
            name, (".JPG", ".jpg")
        )
        files = {f"{top}/{keys[i]}/{n}{end}": jpeg(i) for i in chosen for n, end in zip("ba", ends, strict=True)}
        files[f"{top}/README.txt"] = b"not an image"
        counts["test"] = 2 * len(chosen)
        contents = [archive_of(first[0]["file"], files)]
    prompts = {
        n.replace("_", " "): [f"which is number {i} of its kind.", "seen from afar."] for i, n in enumerate(names)
    }
    module = f"prompts = {json.dumps(prompts)}\n".encode()
    entry["descriptions"] = publish(folder, entry["descriptions"]["file"], module)
    entry["sources"] = [
        [
            publish(folder, file["file"], content) | ({"inner": file["inner"]} if "inner" in file else {})
            for file, content in zip(first, contents, strict=True)
        ]
    ]
    entry["counts"] = counts
    return entry


def publish(folder: Path, name: str, content: bytes) -> dict:
    (folder / name).write_bytes(content)
    return {"file": name, "url": None, "sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}


def build_all(folder: Path, names: list[str] | None = None) -> Path:
    """Replicas of all data sets, or of `names`; returns the catalogue's path."""
    catalog = yaml.safe_load(CATALOG.read_text())
    built = {name: build(name, catalog[name], folder / name) for name in names or catalog}
    path = folder / "catalog.yaml"
    path.write_text(yaml.safe_dump(built, sort_keys=False))
    return path


if __name__ == "__main__":
    print(build_all(Path(sys.argv[1])))
