"""Stage `download`: the images of one data set, outside DVC's cache, and a manifest that DVC tracks."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock
from tqdm import tqdm

from pipeline.params import Params
from pipeline.paths import OUT, data_folder, new_file, new_folder

ARCHIVES = Path(__file__).parent / "archives.yaml"


class DataError(ValueError):
    """Data that is missing or not what the manifest says."""


def manifest_path(dataset: str) -> Path:
    return OUT / "download" / f"{dataset}.json"


def describe_folder(folder: Path) -> dict[str, Any]:
    """The manifest of a data set: images, bytes, a hash over names and contents, the split's hash."""
    files = sorted(p for p in (folder / "images").rglob("*") if p.is_file())
    digest = hashlib.sha256()
    total = 0
    for path in tqdm(files, desc=f"hash {folder.name}", delay=2, unit="file"):
        content = path.read_bytes()
        total += len(content)
        name = path.relative_to(folder).as_posix()
        digest.update(f"{name}\0{hashlib.sha256(content).hexdigest()}\n".encode())
    return {
        "images": len(files),
        "bytes": total,
        "images_sha256": digest.hexdigest(),
        "split_sha256": hashlib.sha256((folder / "split.json").read_bytes()).hexdigest(),
    }


def run(params: Params, dataset: str) -> None:
    """Provide the images of `dataset` and write out/download/<dataset>.json."""
    folder = data_folder(params.data_root, params.suite, dataset)
    if params.suite == "real":
        raise DataError(needed_archives(dataset, folder))
    from heba.embedded import suite

    folder.parent.mkdir(parents=True, exist_ok=True)
    # Two experiments may ask for the same data set at the same time.
    with FileLock(folder.with_name(f".{dataset}.lock")):
        info = suite.DATASETS[dataset]
        with new_folder(folder) as temporary, tqdm(desc=f"draw {dataset}", delay=2, unit="image") as bar:
            suite.generate(dataset, temporary, progress=bar.update)
        manifest = {"dataset": dataset, "suite": params.suite, "title": info.title} | describe_folder(folder)
    with new_file(manifest_path(dataset)) as path:
        path.write_text(json.dumps(manifest, indent=1) + "\n")


def needed_archives(dataset: str, folder: Path) -> str:
    """What a user has to fetch by hand for a real benchmark, and where to put it."""
    entry = yaml.safe_load(ARCHIVES.read_text())[dataset]
    lines = [f"  {a['file']}  {a['url'] or '(no public address)'}" for a in entry["archives"]]
    return (
        f"{dataset}: this version does not fetch the real benchmarks yet. The data set needs\n"
        + "\n".join(lines)
        + f"\nunpacked under {folder} (images/ and a CoOp split.json). "
        "`python -m pipeline preset demo` goes back to the embedded data."
    )


def verified_folder(params: Params, dataset: str, images: bool = False) -> Path:
    """The data set's folder, after checking it against the manifest: the split file's hash, and with
    `images` the number of image files and their bytes."""
    manifest = json.loads(manifest_path(dataset).read_text())
    folder = data_folder(params.data_root, params.suite, dataset)
    remedy = f"make it again with `dvc repro --force --single-item download@{dataset}`"
    split = folder / "split.json"
    if not split.is_file():
        raise DataError(f"{split} is missing, though its manifest is there; {remedy}")
    if hashlib.sha256(split.read_bytes()).hexdigest() != manifest["split_sha256"]:
        raise DataError(f"{split} is not the file of the manifest {manifest_path(dataset)}; {remedy}")
    if images:
        sizes = [
            os.path.getsize(os.path.join(base, name))
            for base, _, names in os.walk(folder / "images")
            for name in names
        ]
        if (len(sizes), sum(sizes)) != (manifest["images"], manifest["bytes"]):
            raise DataError(
                f"{folder / 'images'} has {len(sizes)} files of {sum(sizes)} bytes in all, the manifest "
                f"{manifest_path(dataset)} says {manifest['images']} of {manifest['bytes']}; {remedy}"
            )
    return folder
