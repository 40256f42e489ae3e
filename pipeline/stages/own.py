"""Data sets of the user's own, from their entry in params.yaml."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from heba.data.prompts import read_descriptions
from heba.data.splits import base_labels, class_names, read_split, write_split
from heba.sources.own import OwnData, read_own
from pipeline.core.params import Params, ParamsError
from pipeline.core.paths import data_folder, main_root

SHOWN = 20  # files of a kind that a stage's error names


def images_folder(params: Params, name: str) -> Path:
    """Where the user has the images."""
    return main_root() / params.own[name].path


def read(params: Params, name: str) -> tuple[OwnData, dict[str, list[str]]]:
    """The split and the descriptions of an own data set; ParamsError names it and what is wrong."""
    entry, root = params.own[name], images_folder(params, name)
    try:
        split = main_root() / entry.split if entry.split else None
        data = read_own(root, entry.kind, entry.file, entry.descriptions, split)
        return data, read_descriptions(root / entry.descriptions) if entry.descriptions else {}
    except ValueError as error:
        raise ParamsError(f"own.{name}: {error}") from None


def lay_out(params: Params, name: str, folder: Path) -> None:
    """Fill `folder` as download does for a benchmark; the images are a link to where they are."""
    data, descriptions = read(params, name)
    write_split(data.split, folder / "split.json")
    text = json.dumps(descriptions, ensure_ascii=False, indent=0)
    (folder / "descriptions.json").write_text(text + "\n", encoding="utf-8")
    (folder / "images").symlink_to(images_folder(params, name).resolve(), target_is_directory=True)


def is_linked(params: Params, name: str, folder: Path) -> bool:
    """Whether `folder` has its images from where params.yaml has them."""
    link = folder / "images"
    return link.is_symlink() and Path(os.readlink(link)) == images_folder(params, name).resolve()


def most_shots(params: Params, name: str) -> int:
    """The most training images per class that a protocol asks for."""
    shots = [params.shots] if params.seeds else []
    if name in params.few_shot.datasets and params.few_shot.seeds:
        shots += params.few_shot.shots
    return max(shots, default=0)


def check(params: Params, name: str, shots: int = 0) -> Any:
    """The heba.sources.check.Report, see there, of an own data set or of a benchmark that was downloaded."""
    from heba.sources.check import Finding, Rules  # imports torch, which most data sets do without
    from heba.sources.check import check as look

    left_out: list[str] = []
    if name in params.own:
        data, descriptions = read(params, name)
        split, images, left_out = data.split, images_folder(params, name), data.left_out
        allow_leaks = params.own[name].allow_leaks
    else:
        folder = data_folder(params.data.root, params.suite, name)
        if not (folder / "split.json").is_file():
            stage = "download-variant" if name in params.transfer.variants else "download"
            raise ParamsError(f"{folder} is not there yet; run `dvc repro {stage}@{name}` first")
        split, images = read_split(folder / "split.json"), folder / "images"
        descriptions = read_descriptions(folder / "descriptions.json")
        allow_leaks = True
    total = sum(map(len, split.values()))
    # The protocol fixes a benchmark's split: whatever is in it stays.
    allow_conflicts = name not in params.own
    with tqdm(total=total, desc=f"check {name}", delay=2, unit="image") as bar:
        rules = Rules(shots, allow_leaks, allow_conflicts)
        report = look(split, images, descriptions, rules, bar.update)
    if left_out:
        report.notes.append(Finding("no images by their suffix, left out", left_out))
    if params.seeds and name in params.own and len(report.table) in (2, 3):
        report.notes.append(Finding(*_single_class_halves(class_names(split))))
    return report


def _single_class_halves(names: list[str]) -> tuple[str, list[str]]:
    """A note on base_to_novel of two or three classes, and its halves."""
    base = [names[label] for label in base_labels(len(names))]
    novel = names[len(base) :]
    alone = "the novel half has only one, so that its accuracy is"
    if len(base) == 1:
        alone = "each half has only one, so that the accuracies are"
    text = (
        f"base_to_novel of {len(names)} classes trains on {len(base)} of them, and {alone} always 100 %; for an "
        "adapter of all classes name the data set in few_shot.datasets"
    )
    return text, [f"base: {', '.join(base)}", f"novel: {', '.join(novel)}"]


def refuse_problems(params: Params, name: str) -> None:
    """ParamsError with the errors of `check`, which depend on the params of the data set only; its notes go to
    stderr."""
    report = check(params, name)
    for finding in report.notes:
        print(f"{name}: {finding.shown(SHOWN)}", file=sys.stderr)
    if report.errors:
        found = "\n".join(finding.shown(SHOWN) for finding in report.errors)
        leak = any("the same bytes" in finding.text for finding in report.errors)
        remedy = f", or set own.{name}.allow_leaks to true for the same bytes" if leak else ""
        raise ParamsError(
            f"own.{name}: {found}\nMend these{remedy}. `python -m pipeline check-data {name}` lists all."
        )
