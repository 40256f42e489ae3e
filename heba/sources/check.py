"""Check a data set: what it contains, and what is wrong with it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import pandas as pd

from heba.data.prompts import normalise_class_name
from heba.data.splits import PARTS, Split, class_names
from heba.sources.look import ODD, Look


class Finding(NamedTuple):
    """Something to know about a data set, and the files or classes that it is about.

    `kind` is of those alone that a remedy or a command looks for.
    """

    text: str
    items: list[str]
    kind: Literal["", "leak", "unreadable", "undescribed"] = ""

    def shown(self, most: int | None = None) -> str:
        """As text, with `most` of the items."""
        items = self.items[:most]
        more = [f"... and {len(self.items) - len(items)} more"] if len(items) < len(self.items) else []
        return "\n".join([f"{self.text}:", *(f"  {item}" for item in [*items, *more])])


@dataclass(frozen=True)
class Report:
    """A data set's images.

    Attributes:
        table: rows: class names; columns: train, val, test, all (images), descriptions.
        errors: what must be mended before anything runs. notes: possible problems that do not stop a run.
    """

    table: pd.DataFrame
    errors: list[Finding]
    notes: list[Finding]

    def text(self) -> str:
        """The whole report for a terminal."""
        counts = self.table[[*PARTS, "all"]].sum()
        parts = ", ".join(f"{counts[part]} {part}" for part in PARTS)
        lines = [f"{len(self.table)} classes, {counts['all']} images: {parts}", "", self.table.to_string(), ""]
        lines += [f"note: {finding.shown()}" for finding in self.notes]
        lines += [f"problem: {finding.shown()}" for finding in self.errors]
        return "\n".join(lines if self.errors else [*lines, "no problems"])


@dataclass(frozen=True)
class Rules:
    """What a data set is for.

    Attributes:
        shots: the most training images per class that are asked for.
        allow_leaks: whether the same bytes may be in train, val and test, as a note instead of an error.
        allow_conflicts: the same for the same bytes in different classes.
    """

    shots: int
    allow_leaks: bool
    allow_conflicts: bool = False


def check(
    split: Split,
    looks: Mapping[str, Look],
    same: Sequence[Sequence[str]],
    descriptions: dict[str, list[str]],
    rules: Rules,
) -> Report:
    """What is wrong with a split, from `looks` at its images, and the groups of those that show the `same`
    picture."""
    names = class_names(split)
    texts = {normalise_class_name(name): sentences for name, sentences in descriptions.items()}
    table = _counts(split, names, texts)
    files = _files(split, looks)
    alike = _alike(split, looks, same)
    spoken: dict[str, list[str]] = {}
    for name in names:
        # Windows has no names that end in a space or a dot.
        spoken.setdefault(" ".join(normalise_class_name(name).split()).rstrip(" ."), []).append(name)
    few = table[(table["train"] > 0) & (table["train"] < rules.shots)]
    unknown = sorted(set(texts) - {normalise_class_name(name) for name in names})
    conflict = Finding("the same image, byte for byte, in different classes", files.conflicts)
    leak = Finding("the same bytes in more than one of train, val and test", files.leaks, "leak")
    errors = [
        Finding(
            "fewer than two classes, so that there is nothing to tell apart",
            [] if len(names) > 1 else names or ["none at all"],
        ),
        Finding("images that are missing or cannot be decoded", files.broken, "unreadable"),
        Finding(
            "images of 16 or more bits a channel, of an unknown range; convert them to 8 bit",
            files.deep,
            "unreadable",
        ),
        Finding("classes without test images", list(table.index[table["test"] == 0])),
        # The test sets of domain generalisation have none at all.
        Finding("classes without train images", list(table.index[table["train"] == 0]) if split["train"] else []),
    ]
    notes = [
        Finding("the same bytes more than once", files.twice),
        Finding("the same picture, not byte for byte, in different classes", alike.conflicts),
        Finding("the same picture, not byte for byte, in more than one of train, val and test", alike.leaks),
        Finding("the same picture, not byte for byte, more than once in a part", alike.twice),
        *[Finding(text, [file for file in looks if name in looks[file].odd]) for name, text in ODD.items()],
        Finding(
            "classes whose names are the same in a prompt",
            [" = ".join(map(repr, group)) for group in spoken.values() if len(group) > 1],
        ),
        Finding(
            f"classes with fewer train images than the {rules.shots} shots, which give all that they have",
            [f"{name}: {n}" for name, n in few["train"].items()],
        ),
        Finding(
            "classes without descriptions, which use the template",
            list(table.index[table["descriptions"] == 0]),
            "undescribed",
        ),
        Finding("descriptions of no class", unknown),
    ]
    (notes if rules.allow_conflicts else errors).append(conflict)
    (notes if rules.allow_leaks else errors).append(leak)
    return Report(table, [f for f in errors if f.items], [f for f in notes if f.items])


def _counts(split: Split, names: list[str], texts: dict[str, list[str]]) -> pd.DataFrame:
    """`Report.table`; `texts`: descriptions by normalised name."""
    rows = {part: [0] * len(names) for part in PARTS}
    for part in PARTS:
        for _, label, _ in split[part]:
            rows[part][label] += 1
    # Two classes may have one name.
    table = pd.DataFrame(rows, index=pd.Index(names, name="class"))
    table["all"] = table.sum(axis=1)
    table["descriptions"] = [len(texts.get(normalise_class_name(name), [])) for name in names]
    return table


class _Alike(NamedTuple):
    """Groups of images, each as a text: conflicts, in different classes; leaks, in several parts of one; twice, in
    one part."""

    conflicts: list[str]
    leaks: list[str]
    twice: list[str]


class _Files(NamedTuple):
    """broken: images that cannot be read. deep: those of more than 8 bits. Groups of the same bytes: `_Alike`."""

    broken: list[str]
    deep: list[str]
    conflicts: list[str]
    leaks: list[str]
    twice: list[str]


Uses = dict[str, list[tuple[str, int, str]]]  # of a file: part, label, class name


def _uses(split: Split) -> Uses:
    uses: Uses = {}
    for part in PARTS:
        for file, label, name in split[part]:
            uses.setdefault(file, []).append((part, label, name))
    return uses


def _files(split: Split, looks: Mapping[str, Look]) -> _Files:
    uses = _uses(split)
    by_hash: dict[str, list[str]] = {}
    for file in uses:
        by_hash.setdefault(looks[file].problem or looks[file].digest, []).append(file)
    broken, deep = by_hash.pop("broken", []), by_hash.pop("deep", [])
    return _Files(broken, deep, *_sorted_out(by_hash.values(), uses))


def _alike(split: Split, looks: Mapping[str, Look], same: Sequence[Sequence[str]]) -> _Alike:
    uses = _uses(split)
    groups = [[file for file in group if file in uses] for group in same]
    return _sorted_out([group for group in groups if len({looks[file].digest for file in group}) > 1], uses)


def _sorted_out(groups: Iterable[Sequence[str]], uses: Uses) -> _Alike:
    found = _Alike([], [], [])
    for files in groups:
        where = [(file, *use) for file in files for use in uses[file]]
        if len(where) < 2:
            continue
        _, parts, labels, _ = map(set, zip(*where, strict=True))
        kind = found.conflicts if len(labels) > 1 else found.leaks if len(parts) > 1 else found.twice
        kind.append(" = ".join(f"{file} ({part}, {name})" for file, part, _, name in where))
    return found
