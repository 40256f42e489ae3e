"""Stage `download`: the images of one data set, outside DVC's cache, and a manifest that DVC tracks.

data/<suite>/<dataset>/    images/, split.json, descriptions.json
data/own/<name>/           the same of the user's own data; images is a link to where they are
data/archives/             archives that a user put there, and below, by data set, those that were fetched
"""

import hashlib
import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from filelock import FileLock
from tqdm import tqdm

from heba.data import datasets
from heba.data.splits import Split, read_split
from pipeline.core.params import Params, stage_of
from pipeline.core.paths import OUT, data_folder, main_root, new_file, new_folder, reading, writable
from pipeline.stages.own import is_linked, lay_out, read, refuse_problems

THREADS = 8  # that read and hash images
AT_ONCE = 4096  # images that they are given


class DataError(ValueError):
    """Data that is missing, or differs from its manifest."""


def manifest_path(dataset: str) -> Path:
    return OUT / "download" / f"{dataset}.json"


def dataset_folder(params: Params, dataset: str) -> Path:
    return data_folder(params.data.root, "own" if dataset in params.own else params.suite, dataset)


def read_manifest(dataset: str) -> dict[str, Any]:
    """What `run` wrote about a data set."""
    path = manifest_path(dataset)
    with reading(path, stage_of("download", dataset)):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        missing = {"images", "bytes", "split_sha256", "descriptions_sha256"}.difference(manifest)
        if not isinstance(manifest, dict) or missing:
            raise ValueError(f"{', '.join(sorted(missing))} missing")
        if not all(isinstance(manifest[key], int) for key in ("images", "bytes")):
            raise ValueError("images and bytes must be numbers")
    return manifest


def image_files(folder: Path, own: bool) -> list[str]:
    """The images that the manifest counts: all that are there, or of own data those of the split."""
    images = folder / "images"
    if own:
        split = read_split(folder / "split.json")
        return [os.path.join(images, file) for file in {file for part in split.values() for file, _, _ in part}]
    return [os.path.join(base, name) for base, _, names in os.walk(images) for name in names]


def describe_folder(folder: Path, own: bool) -> dict[str, Any]:
    """The manifest of a data set: images, bytes, a hash over names and contents, the split's hash."""
    files = sorted(map(Path, image_files(folder, own)))
    digest = hashlib.sha256()
    total = 0
    # Reading and hashing let other threads run. Not all files at once: a waiting one takes a kilobyte.
    bar = tqdm(total=len(files), desc=f"hash {folder.name}", delay=2, unit="file")
    with bar, ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(files), AT_ONCE):
            some = files[start : start + AT_ONCE]
            for path, (sha256, size) in zip(some, pool.map(_hash, some), strict=True):
                digest.update(f"{path.relative_to(folder).as_posix()}\0{sha256}\n".encode())
                total += size
                bar.update()
    return {
        "images": len(files),
        "bytes": total,
        "images_sha256": digest.hexdigest(),
        "split_sha256": hashlib.sha256((folder / "split.json").read_bytes()).hexdigest(),
        "descriptions_sha256": hashlib.sha256((folder / "descriptions.json").read_bytes()).hexdigest(),
    }


def _hash(path: Path) -> tuple[str, int]:
    content = path.read_bytes()
    return hashlib.sha256(content).hexdigest(), len(content)


def run(params: Params, dataset: str) -> str:
    """Provide the images of `dataset` and write out/download/<dataset>.json; returns a line about it."""
    data = read(params, dataset) if dataset in params.own else None
    if data:
        refuse_problems(params, dataset, data)
    folder = dataset_folder(params, dataset)
    with _locked(folder):
        with new_folder(folder) as temporary:
            if data:
                lay_out(params, dataset, temporary, data)
                about = {"template": params.own[dataset].template}
            elif params.suite == "embedded":
                about = _generate(dataset, temporary)
            else:
                about = _fetch(params, dataset, temporary)
        suite = "own" if data else params.suite
        manifest = {"dataset": dataset, "suite": suite} | about | describe_folder(folder, own=bool(data))
    with new_file(manifest_path(dataset)) as path:
        path.write_text(json.dumps(manifest, indent=1) + "\n")
    return f"{manifest['images']} images, {manifest['bytes'] / 1e6:.1f} MB"


def _locked(folder: Path) -> AbstractContextManager[object]:
    """For two experiments that ask for the same data set at the same time."""
    with writable(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(folder.with_name(f".{folder.name}.lock")).acquire()


def _generate(dataset: str, folder: Path) -> dict[str, Any]:
    """Draw a data set of the embedded suite; returns what it shows for the manifest."""
    from heba.embedded import suite

    with tqdm(desc=f"draw {dataset}", delay=2, unit="image") as bar:
        suite.generate(dataset, folder, progress=bar.update)
    (folder / "descriptions.json").write_text(json.dumps(suite.descriptions(dataset), indent=0) + "\n")
    return {"shows": suite.DATASETS[dataset].title}


def _fetch(params: Params, dataset: str, folder: Path) -> dict[str, Any]:
    """Get a real data set; returns its archives for the manifest."""
    from heba.sources.benchmarks import parse_descriptions, prepare
    from heba.sources.fetch import FetchError, Local, obtain

    entry = catalog_entry(params, dataset)
    archives = main_root() / params.data.root / "archives"
    mirror = mirror_of(params)

    def say(text: str) -> None:
        print(text, file=sys.stderr)

    def unpack(files: list[Local]) -> None:
        with writable(folder):
            shutil.rmtree(folder)  # what another source has left
            folder.mkdir()
            prepare(entry, files, split, folder)

    say(f"{dataset}: terms: {entry.terms}")
    check_disk(dataset, entry, archives, mirror, say)
    what = "class descriptions"
    try:
        with writable(archives / dataset):
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
    return {"archives": used}


def _how_to_get(dataset: str, what: str, missing: list[list[str]], folder: Path, account: str | None) -> str:
    """What to do about `missing`, the names of absent files by source."""
    if not missing:
        return f"{dataset}: the archives that are here do not hold its {what}:"
    names = " or ".join(dict.fromkeys(", ".join(files) for files in missing))
    how = f" To get what is missing, {account}." if account else ""
    return (
        f"{dataset}: its {what} cannot be had, for want of {names}.{how} Put {names} into {folder} "
        "and run the stage again; what is there is checked and used without a network."
    )


def catalog_entry(params: Params, dataset: str) -> Any:
    """The catalogue's entry (heba.sources.catalog.Benchmark) of a real benchmark."""
    from heba.sources.catalog import CATALOG, load_catalog

    catalog = load_catalog(main_root() / params.data.catalog if params.data.catalog else CATALOG)
    if dataset not in catalog:
        raise DataError(f"{dataset}: not in the catalogue {params.data.catalog}, which has {', '.join(catalog)}")
    return catalog[dataset]


def template_of(params: Params, dataset: str) -> str:
    """The prompt of a class without descriptions, with one {}."""
    if dataset in params.own:
        return json.loads(manifest_path(dataset).read_text(encoding="utf-8"))["template"]
    return datasets.template(dataset, params.suite == "embedded")


def bytes_needed(dataset: str, entry: Any, archives: Path, mirror: str | None) -> int:
    """Disk that a data set still takes, for the source that takes least."""
    from heba.sources.fetch import bytes_to_fetch

    # Pictures hardly compress: the images take about as much as their archives.
    return min(
        bytes_to_fetch(files, archives, dataset, mirror) + sum(file.size for file in files)
        for files in entry.sources
    )


def mirror_of(params: Params) -> str | None:
    """data.mirror; a folder is resolved against the main repository."""
    mirror = params.data.mirror
    return str(main_root() / mirror) if mirror and "://" not in mirror else mirror


def check_disk(dataset: str, entry: Any, archives: Path, mirror: str | None, say: Any) -> None:
    """Say how much disk a data set still takes, for the source that takes least; DataError when there is not as
    much. `entry` is a heba.sources.catalog.Benchmark."""
    needed = bytes_needed(dataset, entry, archives, mirror)
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
    manifest = read_manifest(dataset)
    own = dataset in params.own
    folder = dataset_folder(params, dataset)
    remedy = f"make it again with `dvc repro --force --single-item {stage_of('download', dataset)}`"
    if own and (_changed(folder, manifest) or not is_linked(params, dataset, folder)):
        # When images or params go back to what they were, DVC takes the manifest from its cache and runs nothing.
        with _locked(folder), new_folder(folder) as temporary:
            lay_out(params, dataset, temporary, read(params, dataset))
    if changed := _changed(folder, manifest):
        what = "is not the file of" if changed.is_file() else "is missing, though there is"
        raise DataError(f"{changed} {what} the manifest {manifest_path(dataset)}; {remedy}")
    if images:
        # Own images may be links inside their folder, as heba.sources.own has seen; others are files.
        files = [f for f in image_files(folder, own) if os.path.isfile(f) and (own or not os.path.islink(f))]
        sizes = [os.path.getsize(file) for file in files]
        if (len(sizes), sum(sizes)) != (manifest["images"], manifest["bytes"]):
            raise DataError(
                f"{folder / 'images'} has {len(sizes)} files of {sum(sizes)} bytes in all, the manifest "
                f"{manifest_path(dataset)} says {manifest['images']} of {manifest['bytes']}"
                f"{_damage(folder / 'images', read_split(folder / 'split.json'), own)}; {remedy}"
            )
    return folder


def _changed(folder: Path, manifest: dict[str, Any]) -> Path | None:
    """The first file that is not, byte for byte, the one that the manifest was made of."""
    for name, key in (("split.json", "split_sha256"), ("descriptions.json", "descriptions_sha256")):
        file = folder / name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != manifest[key]:
            return file
    return None


def _damage(images: Path, split: Split, own: bool) -> str:
    """The images of `split` that are missing, cannot be decoded, or are links where they may not be, in words."""
    from heba.clip.preprocess import decode
    from heba.data.images import for_each_image
    from heba.sources.benchmarks import missing_images

    def broken(file: str) -> str | None:
        try:
            decode(images / file, as_seen=own)
        except ValueError:
            return file
        return None

    missing = missing_images(split, images)
    files = sorted({file for part in split.values() for file, _, _ in part}.difference(missing))
    checked = tqdm(for_each_image(broken, files), total=len(files), desc="find damaged images", delay=2)
    damaged = [file for file in checked if file]
    links = [] if own else [file for file in files if (images / file).resolve() != images.resolve() / file]
    return "".join(
        f"; {len(names)} of the split are {how}: {', '.join(names[:3])}"
        for how, names in (("missing", missing), ("damaged", damaged), ("links", links))
        if names
    )
