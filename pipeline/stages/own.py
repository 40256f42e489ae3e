"""Data sets of the user's own, from their entry in params.yaml."""

import difflib
import json
import os
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from heba.data import datasets
from heba.data.prompts import all_prompts, read_descriptions
from heba.data.splits import Split, base_labels, class_names, read_split, write_split
from heba.sources.own import read_own
from pipeline.core.params import Params, ParamsError
from pipeline.core.paths import data_folder, main_root
from pipeline.core.trainings import samples

if TYPE_CHECKING:  # these import torch, which takes seconds
    from heba.sources.check import Report
    from heba.sources.look import Look

SHOWN = 20  # files of a kind that a stage's error names
LINE = 100  # letters of a line of words


@dataclass(frozen=True)
class Checked:
    """An own data set, read.

    Attributes:
        split, left_out: `heba.sources.own.OwnData`.
        descriptions: by class name.
        looks: at each image, also at those that cannot be read. same: groups of those that show the same picture.
        skipped: images that cannot be read, and are in no part of the split.
    """

    split: Split
    left_out: list[str]
    descriptions: dict[str, list[str]]
    looks: dict[str, "Look"]
    same: list[list[str]]
    skipped: list[str]


def images_folder(params: Params, name: str) -> Path:
    """Where the user has the images."""
    return main_root() / params.own[name].path


def read(params: Params, name: str) -> Checked:
    """Read an own data set, and open each image once; ParamsError names it and what is wrong."""
    from heba.sources.duplicates import same_pictures  # these import torch, which other commands do without
    from heba.sources.look import look_at

    entry, root = params.own[name], images_folder(params, name)
    looks: dict[str, Look] = {}
    same: list[list[str]] = []
    skipped: list[str] = []

    def look(files: list[str]) -> tuple[list[str], list[list[str]]]:
        with tqdm(total=len(set(files)), desc=f"look at {name}", delay=2, unit="image") as bar:
            looks.update(look_at(root, files, bar.update))
        if entry.skip_unreadable:
            skipped.extend(file for file in looks if looks[file].problem)
        same.extend(same_pictures(looks))
        return skipped, same

    try:
        split = main_root() / entry.split if entry.split else None
        data = read_own(root, entry.kind, entry.file, entry.descriptions, look, split)
        descriptions = read_descriptions(root / entry.descriptions) if entry.descriptions else {}
    except ValueError as error:
        raise ParamsError(f"own.{name}: {error}") from None
    return Checked(data.split, data.left_out, descriptions, looks, same, skipped)


def lay_out(params: Params, name: str, folder: Path, data: Checked) -> None:
    """Fill `folder` as download does for a benchmark; the images are a link to where they are."""
    write_split(data.split, folder / "split.json")
    text = json.dumps(data.descriptions, ensure_ascii=False, indent=0)
    (folder / "descriptions.json").write_text(text + "\n", encoding="utf-8")
    (folder / "images").symlink_to(images_folder(params, name).resolve(), target_is_directory=True)


def is_linked(params: Params, name: str, folder: Path) -> bool:
    """Whether `folder` has its images from where params.yaml has them."""
    link = folder / "images"
    return link.is_symlink() and Path(os.readlink(link)) == images_folder(params, name).resolve()


def most_shots(params: Params, name: str) -> int:
    """The most training images per class that a protocol asks for."""
    return max((shots for _, shots, _ in samples(params, name)), default=0)


def check(params: Params, name: str, shots: int = 0) -> "Report":
    """The report on an own data set, or on a benchmark that was downloaded."""
    if name in params.own:
        return check_own(params, name, read(params, name), shots)
    from heba.sources.check import Rules
    from heba.sources.check import check as examine
    from heba.sources.look import look_at

    folder = data_folder(params.data.root, params.suite, name)
    if not (folder / "split.json").is_file():
        stage = "download-variant" if name in params.transfer.variants else "download"
        raise ParamsError(f"{folder} is not there yet; run `dvc repro {stage}@{name}` first")
    split = read_split(folder / "split.json")
    files = {file: None for part in split.values() for file, _, _ in part}
    with tqdm(total=len(files), desc=f"check {name}", delay=2, unit="image") as bar:
        looks = look_at(folder / "images", files, bar.update, small=False)
    # The protocol fixes a benchmark's split: whatever is in it stays.
    rules = Rules(shots, allow_leaks=True, allow_conflicts=True)
    return examine(split, looks, [], read_descriptions(folder / "descriptions.json"), rules)


def check_own(params: Params, name: str, data: Checked, shots: int = 0) -> "Report":
    """The report on an own data set that was read; `shots`: the most per class that are asked for."""
    from heba.sources.check import Finding, Rules
    from heba.sources.check import check as examine

    entry, names = params.own[name], class_names(data.split)
    report = examine(data.split, data.looks, data.same, data.descriptions, Rules(shots, entry.allow_leaks))
    if data.skipped:
        report.notes.append(Finding("images that cannot be read, skipped", data.skipped))
    if data.left_out:
        report.notes.append(Finding("no images by their suffix, left out", data.left_out))
    if params.seeds and entry.base_to_novel and len(names) in (2, 3):
        report.notes.append(Finding(*_single_class_halves(names)))
    if params.suite == "embedded":
        unknown, known = _unknown_words(names, data.descriptions, entry.template)
        if unknown:
            text = (
                "words that the tiny CLIP does not know; take others for classes, template and descriptions, or "
            )
            report.errors.append(Finding(f"{text}a real backbone", unknown))
            report.notes.append(Finding("all words that the tiny CLIP knows", known))
    return report


def _unknown_words(
    names: list[str], descriptions: dict[str, list[str]], template: str
) -> tuple[list[str], list[str]]:
    """The words of the prompts that the tiny CLIP does not know, with the nearest that it does; and lines of all
    that it knows."""
    from heba.clip.tiny import KnownWords, new_tiny_clip, words_of
    from heba.embedded import suite

    prompts = all_prompts(names, descriptions, template, datasets.ensemble(template, True))
    unknown = KnownWords(new_tiny_clip()[1]).unknown([text for part in prompts.values() for text in part.texts])
    if not unknown:
        return [], []
    drawn = [suite.descriptions(dataset) for dataset in suite.DATASETS]
    texts = [text for found in drawn for name, sentences in found.items() for text in (name, *sentences)]
    texts += [datasets.template(dataset, True) for dataset in suite.DATASETS]
    known = sorted({word.lower() for word in words_of(texts) if word.isalnum()})
    near = {word: difflib.get_close_matches(word.lower(), known) for word in unknown}
    lines = [f"{word}; near is {', '.join(found)}" if found else word for word, found in near.items()]
    return lines, textwrap.wrap(", ".join(known), LINE)


def _single_class_halves(names: list[str]) -> tuple[str, list[str]]:
    """A note on base_to_novel of two or three classes, and its halves."""
    base = [names[label] for label in base_labels(len(names))]
    novel = names[len(base) :]
    alone = "the novel half has only one, so that its accuracy is"
    if len(base) == 1:
        alone = "each half has only one, so that the accuracies are"
    text = f"base_to_novel of {len(names)} classes trains on {len(base)} of them, and {alone} always 100 %"
    return text, [f"base: {', '.join(base)}", f"novel: {', '.join(novel)}"]


def refuse_problems(params: Params, name: str, data: Checked) -> None:
    """ParamsError with the errors of `check_own`; its notes go to stderr.

    Only the words that the tiny CLIP does not know depend on other params than those of the data set, which the
    stage therefore does not list: what it writes is the same with every backbone, and a refusal leaves nothing.
    """
    report = check_own(params, name, data)
    for finding in report.notes:
        print(f"{name}: {finding.shown(SHOWN)}", file=sys.stderr)
    if report.errors:
        found = "\n".join(finding.shown(SHOWN) for finding in report.errors)
        raise ParamsError(
            f"own.{name}: {found}\n{remedy(name, report)} `python -m pipeline check-data {name}` lists all."
        )


def remedy(name: str, report: "Report") -> str:
    """What to do about the errors of an own data set."""
    text, kinds = "Mend these", {finding.kind for finding in report.errors}
    if "leak" in kinds:
        text += f", or set own.{name}.allow_leaks: true for the same bytes"
    if "unreadable" in kinds:
        text += f", or set own.{name}.skip_unreadable: true to go on without the images that cannot be read"
    return f"{text}."
