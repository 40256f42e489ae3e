"""`python -m pipeline compare A B`: the accuracies of two DVC experiments, git revisions or the workspace.

Both are read from reports/evaluations.csv and params.yaml, as git has them, and compared on what both have: the
same data sets, seeds and, for few_shot, shots. The tests are those of the leaderboard, over data sets; Holm's
correction is over the methods.
"""

import difflib
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import dvc.api
import pandas as pd
import yaml
from dvc.exceptions import DvcException, PathMissingError
from dvc.scm import map_scm_exception

from heba.data.datasets import TABLE, title
from heba.data.protocols import PROTOCOLS
from pipeline.core.git import run_git
from pipeline.report import provenance, statistics
from pipeline.report.leaderboard import holm, paired, tests
from pipeline.report.statistics import ALPHA, FEWEST
from pipeline.report.tables import AVERAGE, HEADS, groups_of, method_title, number, tidy_table

WORKSPACE = "workspace"
EVALUATIONS, PARAMS = "reports/evaluations.csv", "params.yaml"
SHOWN = 20  # changed params
SIDES = ("first", "second")
SAME, OPEN, DIFFERENT, FEW = "the same", "within the noise", "different", "too few data sets to say"


class Revision(NamedTuple):
    """What there is of a revision: its name, its params.yaml, and its evaluations (provenance.COLUMNS)."""

    name: str
    params: dict[str, Any]
    evaluations: pd.DataFrame


class Comparison(NamedTuple):
    """What `compare` found.

    Attributes:
        averages: a row per protocol, method, number of shots and group: the averages of both, their difference,
            its interval and p, and what that says.
        datasets: a row per data set besides: accuracies and their standard deviations over seeds.
        unchanged: by protocol, the methods whose trainings and evaluations are the same in both.
        params: by name, the two values of each param that differs; None where there is none.
        notes: what was left out, and what the tests cannot say.
    """

    averages: pd.DataFrame
    datasets: pd.DataFrame
    unchanged: dict[str, list[str]]
    params: dict[str, tuple[Any, Any]]
    notes: list[str]


def text(first: str, second: str = WORKSPACE, as_json: bool = False) -> str:
    """The comparison of two revisions as Markdown, or as JSON; ValueError says what is wrong with one of them."""
    one, other = read(first), read(second)
    found = compare(one, other)
    return _json(one, other, found) if as_json else _markdown(one, other, found)


# Reading.


def read(name: str) -> Revision:
    """The revision `name`: an experiment, a branch, a tag, a commit, or the workspace."""
    evaluations, params = _content(name, EVALUATIONS), _content(name, PARAMS)
    try:
        frame = pd.read_csv(io.StringIO(evaluations))
    except ValueError as error:
        raise ValueError(f"{EVALUATIONS} of {name}: {error}; make it again with `dvc repro report`") from None
    if tuple(frame.columns) != provenance.COLUMNS:
        raise ValueError(
            f"{EVALUATIONS} of {name}: has the columns {', '.join(frame.columns)}, not "
            f"{', '.join(provenance.COLUMNS)}; make it again with `dvc repro report`"
        )
    try:
        values = yaml.safe_load(params)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{PARAMS} of {name}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{PARAMS} of {name}: does not map names to values")
    return Revision(name, values, frame)


def _content(name: str, path: str) -> str:
    """A file of a revision."""
    if name == WORKSPACE:
        try:
            return Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(
                f"{path}: {error.strerror}; `dvc repro` makes the reports, in the repository's root"
            ) from None
    if _git("rev-parse", "--verify", "--quiet", name) and not _git(
        "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"
    ):
        raise ValueError(f"{name}: is in git, and no commit")
    try:
        with map_scm_exception():
            return str(dvc.api.read(path, repo=".", rev=name, encoding="utf-8"))
    except PathMissingError:
        raise ValueError(
            f"{name}: has no {path}; it was not run to the end, or its reports are not in git"
        ) from None
    except DvcException as error:
        near = difflib.get_close_matches(name, _names(), n=5, cutoff=0.5)
        hint = (
            f"; near it are {', '.join(near)}"
            if near
            else "; nor is there such a folder. `dvc exp list -A` lists experiments"
        )
        raise ValueError(f"{name}: {error}{hint}") from None


def _names() -> list[str]:
    """Of experiments, branches and tags."""
    names = [WORKSPACE]
    for ref in _git("for-each-ref", "--format=%(refname)", "refs/heads", "refs/tags", "refs/exps").split():
        kind, rest = ref.split("/", 2)[1:]
        if kind != "exps":
            names.append(rest)
        elif rest.count("/") == 2:  # <two digits of a commit>/<the others>/<name>
            names.append(rest.rpartition("/")[2])
    return names


def _git(*arguments: str) -> str:
    """What git prints; "" where it fails or takes too long."""
    done = run_git(*arguments)
    return done.stdout if done and not done.returncode else ""


# Comparing.


def compare(one: Revision, other: Revision) -> Comparison:
    """Of all protocols and methods that both have; ValueError where the two cannot be compared."""
    for key in ("suite", "backbone"):
        values = [revision.params.get(key) for revision in (one, other)]
        if values[0] != values[1]:
            raise ValueError(
                f"{one.name} and {other.name} cannot be compared: {key} is {values[0]} and {values[1]}"
            )
    averages: list[dict[str, Any]] = []
    datasets: list[dict[str, Any]] = []
    unchanged, notes = {}, []
    for protocol in PROTOCOLS:
        pair = [r.evaluations[r.evaluations["protocol"] == protocol] for r in (one, other)]
        if pair[0].empty or pair[1].empty:
            continue
        left, right, left_out = _common(pair[0], pair[1], protocol)
        notes += [f"{protocol}: {line}" for line in left_out]
        names = sorted(set(left["method"]), key=_place(other.params.get("methods")))
        same = [name for name in names if _hashes(left, name) == _hashes(right, name)]
        if same:
            unchanged[protocol] = same
        changed = [name for name in names if name not in same]
        rows = _rows(left, right, protocol, changed)
        datasets += [row for row in rows if row["dataset"] != AVERAGE]
        means = [row for row in rows if row["dataset"] == AVERAGE]
        _test(means, left, right)
        averages += means
        sets = len(set(left["dataset"]) & set(TABLE))
        least = min(1.0, len(changed) * statistics.least_p(sets))
        if sets >= FEWEST and least >= ALPHA:
            notes.append(
                f"{protocol}: with {sets} data sets and {len(changed)} methods p (Holm) cannot fall below "
                f"{least:.2f}: the test can show nothing here."
            )
    if not averages and not datasets and not unchanged:
        raise ValueError(f"{one.name} and {other.name} have no evaluations of the same data sets and seeds")
    params = _changed(one.params, other.params)
    return Comparison(pd.DataFrame(averages), pd.DataFrame(datasets), unchanged, params, notes)


def _common(
    left: pd.DataFrame, right: pd.DataFrame, protocol: str
) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """The rows of what both have, and what was left out. The number of shots need not be the same, but for
    few_shot, which has a column for each."""
    left, right = left.copy(), right.copy()
    if protocol != "few_shot":
        left["shots"] = right["shots"] = int(right["shots"].max())
    keys = ["method", "dataset", "shots", "seed", "group"]
    index = [pd.MultiIndex.from_frame(frame[keys]) for frame in (left, right)]
    left_out = []
    for key in ("method", "dataset", "shots", "seed"):
        alone = sorted(set(left[key]) ^ set(right[key]))
        if alone:
            left_out.append(f"{key} {', '.join(map(str, alone))}: in one of the two alone, left out.")
    return left[index[0].isin(index[1])], right[index[1].isin(index[0])], left_out


def _place(listed: Any) -> Callable[[str], tuple[int, str]]:
    """The order of `methods` in params.yaml; what is not listed comes last."""
    names = listed if isinstance(listed, list) else []
    return lambda name: (names.index(name) if name in names else len(names), name)


def _hashes(frame: pd.DataFrame, method: str) -> set[tuple[Any, ...]]:
    """What the evaluations of a method are of, and what they gave."""
    columns = ["dataset", "shots", "seed", "group", "accuracy", "adapter_sha256", "inputs_sha256"]
    return set(frame.loc[frame["method"] == method, columns].itertuples(index=False, name=None))


def _rows(left: pd.DataFrame, right: pd.DataFrame, protocol: str, names: list[str]) -> list[dict[str, Any]]:
    """A row per data set, or their average, method, number of shots and group."""
    keys = ["dataset", "method", "shots", "group"]
    first, second = (tidy_table(frame, protocol, names) for frame in (left, right))
    both = first.merge(second.drop(columns="seeds"), on=keys, suffixes=("_first", "_second"))
    both = both.dropna(subset=["accuracy_first", "accuracy_second"])
    both["difference"] = both["accuracy_second"] - both["accuracy_first"]
    both = both.rename(columns={f"accuracy_{side}": side for side in SIDES})
    both = both.rename(columns={f"std_{side}": f"{side}_std" for side in SIDES})
    order = {group: i for i, group in enumerate(groups_of(protocol))}
    rows = _records(both.assign(protocol=protocol))
    return sorted(rows, key=lambda row: (names.index(row["method"]), row["shots"], order[row["group"]]))


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """A row as a dictionary of Python's own numbers."""
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]


def _test(rows: list[dict[str, Any]], left: pd.DataFrame, right: pd.DataFrame) -> None:
    """Add to the averages the interval and p of their differences, and what these say."""
    both = pd.concat([left.assign(side="first"), right.assign(side="second")])
    both = both[both["dataset"].isin(TABLE)]
    for column in dict.fromkeys((row["shots"], row["group"]) for row in rows):
        shots, group = column
        own = [row for row in rows if (row["shots"], row["group"]) == column]
        found = {}
        for row in own:
            part = both[(both["shots"] == shots) & (both["method"] == row["method"])]
            frame = part.pivot_table(index=["dataset", "seed"], columns=["group", "side"], values="accuracy")
            found[row["method"]] = paired(frame, group, "second", "first")
        ps = tests(found)
        for row, p_holm in zip(own, holm(found), strict=True):
            differences = found[row["method"]]
            low, high = statistics.bootstrap(differences) if len(differences) >= FEWEST else (float("nan"),) * 2
            row |= {"datasets": len(differences), "low": low, "high": high}
            row |= {"p": ps[row["method"]], "p_holm": p_holm, "says": _says(differences, p_holm)}


def _says(differences: list[float], p: float) -> str:
    if not any(differences):
        return SAME
    if len(differences) < FEWEST:
        return FEW
    return DIFFERENT if p < ALPHA else OPEN


def _changed(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """The params, by their dotted names, that are not the same in both."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in dict.fromkeys([*one, *other]):
        before, after = one.get(key), other.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found |= _changed(before, after, f"{prefix}{key}.")
        elif before != after:
            found[f"{prefix}{key}"] = (before, after)
    return found


# Showing.


def _json(one: Revision, other: Revision, found: Comparison) -> str:
    def rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
        return [{key: None if pd.isna(v) else v for key, v in row.items()} for row in _records(frame)]

    content = {
        "first": one.name,
        "second": other.name,
        "params": {key: list(values) for key, values in found.params.items()},
        "averages": rows(found.averages),
        "datasets": rows(found.datasets),
        "unchanged": found.unchanged,
        "notes": found.notes,
    }
    return json.dumps(content, indent=1, ensure_ascii=False, default=str)


def _markdown(one: Revision, other: Revision, found: Comparison) -> str:
    lines = [f"# {one.name} and {other.name}", ""]
    for key, (before, after) in list(found.params.items())[:SHOWN]:
        lines.append(f"- {key}: {json.dumps(before, default=str)} and {json.dumps(after, default=str)}")
    if len(found.params) > SHOWN:
        lines.append(f"- and {len(found.params) - SHOWN} more params")
    lines += [""] if found.params else []
    for protocol, about in PROTOCOLS.items():
        means, datasets = (_of(frame, protocol) for frame in (found.averages, found.datasets))
        same = found.unchanged.get(protocol, [])
        if not (len(means) or len(datasets) or same):
            continue
        lines += [f"## {about.title}", ""]
        if len(means):
            lines += [_averages(means, one.name, other.name), ""]
        if len(datasets):
            lines += [_datasets(datasets), ""]
        if same:
            lines += [f"Trained and evaluated alike in both: {', '.join(map(method_title, same))}.", ""]
    if len(found.averages):
        lines += [
            f"Δ: how far {other.name} is above {one.name}. 95 % interval: of the mean difference over data sets, "
            "by bootstrap. p (Holm): of a signed-rank test over data sets, corrected for the number of methods; "
            f"below {ALPHA} counts as different. ±: over seeds.",
            "",
        ]
    return "\n".join([*lines, *found.notes]).strip()


def _of(frame: pd.DataFrame, protocol: str) -> pd.DataFrame:
    return frame[frame["protocol"] == protocol] if len(frame) else frame


def _head(row: Mapping[str, Any]) -> str:
    """What a row is of, beside its method."""
    if row["protocol"] == "few_shot":
        return f"{row['shots']} shot{'s' if row['shots'] > 1 else ''}"
    return HEADS.get(row["group"], "Accuracy")


def _averages(rows: pd.DataFrame, first: str, second: str) -> str:
    shown = []
    for row in _records(rows):
        tested = not pd.isna(row["p"])
        shown.append(
            {
                "Method": method_title(row["method"]),
                "Average": _head(row),
                first: number(row["first"], row["first_std"]),
                second: number(row["second"], row["second_std"]),
                "Δ": number(row["difference"], sign=True),
                "95 % interval": f"{row['low']:+.2f} to {row['high']:+.2f}" if tested else "",
                "p (Holm)": f"{row['p_holm']:.3f}" if tested else "",
                "": row["says"],
            }
        )
    return _table(shown)


def _datasets(rows: pd.DataFrame) -> str:
    """A row per data set and method, with a column per group or number of shots."""
    shown: dict[tuple[str, str], dict[str, str]] = {}
    for row in _records(rows):
        key = title(row["dataset"]), method_title(row["method"])
        cells = shown.setdefault(key, {"Data set": key[0], "Method": key[1]})
        before, after = (number(row[side], row[f"{side}_std"]) for side in ("first", "second"))
        cells[_head(row)] = f"{before} → {after} ({number(row['difference'], sign=True)})"
    return _table(list(shown.values()))


def _table(rows: list[dict[str, str]]) -> str:
    return str(pd.DataFrame(rows).fillna("").to_markdown(index=False, disable_numparse=True))
