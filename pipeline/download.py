"""Stage `download`: the images of one data set, outside DVC's cache, and a manifest that DVC tracks.

data/<suite>/<dataset>/    images/, split.json, descriptions.json
data/archives/             archives that a user put there, and below, by data set, those that were fetched
"""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from filelock import FileLock
from tqdm import tqdm

from heba.splits import read_split
from pipeline.params import Params
from pipeline.paths import OUT, data_folder, main_root, new_file, new_folder


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
        "descriptions_sha256": hashlib.sha256((folder / "descriptions.json").read_bytes()).hexdigest(),
    }


def run(params: Params, dataset: str) -> None:
    """Provide the images of `dataset` and write out/download/<dataset>.json."""
    folder = data_folder(params.data.root, params.suite, dataset)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Two experiments may ask for the same data set at the same time.
    with FileLock(folder.with_name(f".{dataset}.lock")):
        with new_folder(folder) as temporary:
            if params.suite == "embedded":
                about = _generate(dataset, temporary)
            else:
                about = _fetch(params, dataset, temporary)
        manifest = {"dataset": dataset, "suite": params.suite} | about | describe_folder(folder)
    with new_file(manifest_path(dataset)) as path:
        path.write_text(json.dumps(manifest, indent=1) + "\n")


def _generate(dataset: str, folder: Path) -> dict[str, Any]:
    """Draw a data set of the embedded suite; returns its title for the manifest."""
    from heba.embedded import suite

    with tqdm(desc=f"draw {dataset}", delay=2, unit="image") as bar:
        suite.generate(dataset, folder, progress=bar.update)
    (folder / "descriptions.json").write_text(json.dumps(suite.descriptions(dataset), indent=0) + "\n")
    return {"title": suite.DATASETS[dataset].title}


def _fetch(params: Params, dataset: str, folder: Path) -> dict[str, Any]:
    """Get a real data set; returns its title and its archives for the manifest."""
    from heba.data.benchmarks import parse_descriptions, prepare
    from heba.data.fetch import FetchError, Local, obtain

    entry = catalog_entry(params, dataset)
    archives = main_root() / params.data.root / "archives"
    mirror = params.data.mirror
    if mirror and "://" not in mirror:
        mirror = str(main_root() / mirror)

    def say(text: str) -> None:
        print(text, file=sys.stderr)

    def unpack(files: list[Local]) -> None:
        shutil.rmtree(folder)  # what another source has left
        folder.mkdir()
        prepare(entry, files, split, folder)

    say(f"{dataset}: terms: {entry.terms}")
    check_disk(dataset, entry, archives, mirror, say)
    what = "class descriptions"
    try:
        # The small files first: should they not be had, nothing big was fetched in vain.
        (file,) = obtain([[entry.descriptions]], archives, dataset, mirror, say)
        descriptions = parse_descriptions(file.path.read_text(encoding="utf-8"), str(file.path))
        split = None
        if entry.split:
            what = "split file"
            (file,) = obtain([[entry.split]], archives, dataset, mirror, say)
            split = read_split(file.path)
        what = "images"
        files = obtain(entry.sources, archives, dataset, mirror, say, unpack)
    except FetchError as error:
        account = entry.account if what == "images" else None
        remedy = _how_to_get(dataset, what, error.missing, archives / dataset, account)
        raise DataError(f"{remedy}\n{error}".rstrip()) from None
    text = json.dumps(descriptions, ensure_ascii=False, indent=0)
    (folder / "descriptions.json").write_text(text + "\n", encoding="utf-8")
    own = [str(file.path) for file in files if file.path.is_relative_to(archives)]
    if own:
        say(f"{dataset}: the archives are needed no more and may be deleted: {', '.join(own)}")
    used = [{"file": f.file.file, "bytes": f.path.stat().st_size, "sha256": f.sha256} for f in files]
    return {"title": entry.title, "archives": used}


def _how_to_get(dataset: str, what: str, missing: list[list[str]], folder: Path, account: str | None) -> str:
    """What to do about `missing`, the names of absent files by source."""
    if not missing:
        return f"{dataset}: the archives that are here do not hold its {what}:"
    names = " or ".join(dict.fromkeys(", ".join(files) for files in missing))
    how = f" To get what is missing, {account}." if account else ""
    return (
        f"{dataset}: its {what} can not be had, for want of {names}.{how} Put {names} into {folder} "
        "and run the stage again; what is there is checked and used without a network."
    )


def catalog_entry(params: Params, dataset: str) -> Any:
    """The catalogue's entry (heba.data.catalog.Benchmark) of a real benchmark."""
    from heba.data.catalog import CATALOG, load_catalog

    catalog = load_catalog(main_root() / params.data.catalog if params.data.catalog else CATALOG)
    if dataset not in catalog:
        raise DataError(f"{dataset}: not in the catalogue {params.data.catalog}, which has {', '.join(catalog)}")
    return catalog[dataset]


def template_of(params: Params, dataset: str) -> str:
    """The prompt of a class without descriptions, with one {}."""
    if params.suite == "real":
        return catalog_entry(params, dataset).template
    from heba.embedded import suite

    return suite.DATASETS[dataset].template


def check_disk(dataset: str, entry: Any, archives: Path, mirror: str | None, say: Any) -> None:
    """Say how much disk a data set still takes, for the source that takes least; DataError when there is not as
    much. `entry` is a heba.data.catalog.Benchmark."""
    from heba.data.fetch import bytes_to_fetch

    # Pictures hardly compress: the images take about as much as their archives.
    needed = min(
        bytes_to_fetch(files, archives, dataset, mirror) + sum(file.size for file in files)
        for files in entry.sources
    )
    folder = archives.parent
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    text = f"{dataset}: needs about {needed / 1e9:.1f} GB under {folder}, where {free / 1e9:.1f} GB are free"
    say(text)
    if free < needed:
        raise DataError(f"{text}; make room, or set data.root in params.yaml to a folder on a bigger disk")


def verified_folder(params: Params, dataset: str, images: bool = False) -> Path:
    """The data set's folder, after checking it against the manifest: the split file's hash, and with
    `images` the number of image files and their bytes. DataError says what is missing."""
    manifest = json.loads(manifest_path(dataset).read_text())
    folder = data_folder(params.data.root, params.suite, dataset)
    stage = "download-variant" if dataset in params.transfer.variants else "download"
    remedy = f"make it again with `dvc repro --force --single-item {stage}@{dataset}`"
    split = folder / "split.json"
    if not split.is_file():
        raise DataError(f"{split} is missing, though its manifest is there; {remedy}")
    for file, key in ((split, "split_sha256"), (folder / "descriptions.json", "descriptions_sha256")):
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != manifest[key]:
            raise DataError(f"{file} is not the file of the manifest {manifest_path(dataset)}; {remedy}")
    if images:
        sizes = [
            os.path.getsize(os.path.join(base, name))
            for base, _, names in os.walk(folder / "images")
            for name in names
        ]
        if (len(sizes), sum(sizes)) != (manifest["images"], manifest["bytes"]):
            from heba.data.benchmarks import missing_images

            missing = missing_images(read_split(split), folder / "images")
            named = f"; {len(missing)} of the split are missing: {', '.join(missing[:3])}" if missing else ""
            raise DataError(
                f"{folder / 'images'} has {len(sizes)} files of {sum(sizes)} bytes in all, the manifest "
                f"{manifest_path(dataset)} says {manifest['images']} of {manifest['bytes']}{named}; {remedy}"
            )
    return folder
