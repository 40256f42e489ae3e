"""What the evaluations of a project say: a row per test, and per method how good it is and what it confuses."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from heba import artifact, methods
from heba.data.splits import class_names, read_split
from heba.evaluation.record import read_record
from pipeline.commands.common import shown
from pipeline.commands.photos import verdict
from pipeline.commands.photos.splits import Plan
from pipeline.commands.photos.verdict import Advice
from pipeline.core.params import Params
from pipeline.core.trainings import evaluations, trainings
from pipeline.stages.download import dataset_folder
from pipeline.tracking.log import SECONDS
from pipeline.tracking.models import find_run
from pipeline.tracking.store import answering, client

# A row per method, split, few-shot sample and test image; `label` and `predicted` are labels.
TESTS = ("method", "split", "shots", "seed", "file", "label", "predicted")


class Line(NamedTuple):
    """A method in the table. Accuracy and its interval in percent; the seconds of a training, where known."""

    method: str
    title: str
    accuracy: float
    low: float
    high: float
    seconds: float | None
    confused: str


class Results(NamedTuple):
    """All that is shown.

    Attributes:
        lines: in the order of the table, the simplest method first.
        tests: the frame TESTS, of all shots. names: of the classes, by label.
        shots: of the table. n: different test images.
    """

    lines: list[Line]
    tests: pd.DataFrame
    names: list[str]
    shots: int
    n: int
    advice: Advice

    def at(self, method: str) -> pd.DataFrame:
        """The tests of a method, with the shots of the table."""
        return self.tests[(self.tests["method"] == method) & (self.tests["shots"] == self.shots)]

    def confusion(self, method: str) -> np.ndarray:
        """[classes, classes], rows are the true classes; over all splits and samples."""
        return confusion(self.at(method), len(self.names))


def read_tests(params: Params) -> pd.DataFrame:
    """The frame TESTS of the evaluations that params.yaml asks for."""
    tested = {name: read_split(dataset_folder(params, name) / "split.json")["test"] for name in params.own}
    parts = []
    for evaluation in evaluations(params):
        record = read_record(evaluation.path)
        group = record.groups["all"]
        files, labels, _ = zip(*tested[evaluation.dataset], strict=True)
        columns = {"file": files, "label": labels, "predicted": group.predicted}
        about = (record.method, evaluation.dataset, record.shots, record.seed)
        parts.append(pd.DataFrame(dict(zip(TESTS, about, strict=False)) | columns))
    return pd.concat(parts, ignore_index=True)[list(TESTS)]


def shares_at(tests: pd.DataFrame, shots: int) -> dict[str, float]:
    """The accuracy of each method, 0 to 1: the mean over its splits or samples."""
    return {method: float(runs.mean()) for method, runs in _runs(_right(tests, shots)).items()}


def _right(tests: pd.DataFrame, shots: int) -> pd.DataFrame:
    """The tests with this many shots, and whether each is `right`."""
    return tests[tests["shots"] == shots].assign(right=lambda t: t["label"] == t["predicted"])


def _runs(right: pd.DataFrame) -> dict[str, pd.Series]:
    """By method, the share of right tests of each split or sample."""
    return {str(m): part.groupby(["split", "seed"])["right"].mean() for m, part in right.groupby("method")}


def training_seconds(params: Params, shots: int) -> dict[str, float]:
    """By method, the mean seconds of its trainings with `shots`, as MLflow has them; without those it has not."""
    found: dict[str, list[float]] = {}
    with answering():
        store = client()
        for training in trainings(params):
            run = find_run(store, training.folder) if training.shots == shots else None
            if run and SECONDS in run.data.metrics:
                found.setdefault(training.method, []).append(run.data.metrics[SECONDS])
    return {method: float(np.mean(values)) for method, values in found.items()}


def summarise(params: Params, plan: Plan, tests: pd.DataFrame, seconds: dict[str, float]) -> Results:
    """The table and the advice, of the most shots."""
    shots = max(params.few_shot.shots)
    names = class_names(next(iter(plan.splits.values())))
    right = _right(tests, shots)
    runs = _runs(right)
    n = right["file"].nunique()
    order = [method for method in params.methods if method in runs]
    titles = {method: methods.part(method, "settings").TITLE for method in order}
    lines = []
    for method in order:
        own = right[right["method"] == method]
        low, high = interval(plan, list(runs[method]), n)
        most = confused(confusion(own, len(names)), names)
        share = float(runs[method].mean())
        lines.append(Line(method, titles[method], 100 * share, 100 * low, 100 * high, seconds.get(method), most))
    shares = {line.method: line.accuracy / 100 for line in lines}
    best = max(shares, key=lambda name: shares[name])
    ps = {method: difference(right, best, method) for method in order if method != best}
    known = {method: seconds.get(method) for method in order}
    advice = verdict.advise(shares, ps, titles, known, n)
    return Results(lines, tests, names, shots, n, advice)


def interval(plan: Plan, shares: list[float], n: int) -> tuple[float, float]:
    """The interval of a mean accuracy on `n` different test images; `shares` of the splits or samples."""
    if plan.kind == "given":
        return verdict.same_test(shares, n)
    return verdict.resampled(shares, plan.test_ratio(), n)


def difference(right: pd.DataFrame, one: str, other: str) -> float:
    """The p of the difference of two methods, over test images; each counts once, however often it was tested."""
    keys = ["split", "seed", "file"]
    first, second = (right[right["method"] == m].set_index(keys)["right"].astype(float) for m in (one, other))
    return verdict.images_differ(list((first - second).groupby("file").mean()))


def confusion(tests: pd.DataFrame, n: int) -> np.ndarray:
    """[n, n], rows are the true classes."""
    flat = np.bincount(tests["label"].to_numpy() * n + tests["predicted"].to_numpy(), minlength=n * n)
    return flat.reshape(n, n)


def pairs(matrix: np.ndarray, most: int) -> list[tuple[int, int, int]]:
    """The (true class, predicted class, tests) that are confused most."""
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    places = [divmod(int(place), len(matrix)) for place in order]
    return [(true, taken, int(wrong[true, taken])) for true, taken in places if wrong[true, taken]]


def confused(matrix: np.ndarray, names: list[str]) -> str:
    """What is confused most, in words."""
    for true, taken, count in pairs(matrix, 1):
        share = 100 * count / int(matrix[true].sum())
        return f"{names[true]} taken for {names[taken]} ({share:.0f} %)"
    return "nothing"


def table(results: Results) -> str:
    """The table for a terminal."""
    rows = [
        (
            line.title,
            f"{line.accuracy:.1f}",
            f"{line.low:.1f} to {line.high:.1f}",
            "" if line.seconds is None else f"{line.seconds:.2f}",
            line.confused,
        )
        for line in results.lines
    ]
    heads = ("method", "accuracy, %", "95 % interval", "seconds", "confuses most")
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    lines = []
    for row in (heads, *rows):
        cells = [row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3)), row[4]]
        lines.append("  ".join(cells).rstrip())
    return shown("\n".join(lines))


def hardest(results: Results, most: int) -> list[tuple[str, str, str]]:
    """The test images that the advised method, and then the others, got wrong most often: file, class, and what
    they were taken for by how many of the methods."""
    tests = results.tests[results.tests["shots"] == results.shots]
    tests = tests.assign(wrong=tests["label"] != tests["predicted"])
    own = tests[tests["method"] == results.advice.method].groupby("file")["wrong"].mean()
    every = tests.groupby("file")["wrong"].mean()
    order = pd.DataFrame({"own": own, "every": every}).query("own > 0")
    order = order.sort_values(["own", "every"], ascending=False, kind="stable").head(most)
    found = []
    for file in order.index:
        there = tests[(tests["file"] == file) & tests["wrong"]]
        taken = there.groupby("predicted")["method"].nunique().sort_values(ascending=False, kind="stable")
        listed = [f"{results.names[label]} ({count})" for label, count in taken.items()]
        found.append((str(file), results.names[int(there["label"].iloc[0])], ", ".join(listed[:3])))
    return found


def chosen_by_methods(params: Params, shots: int) -> list[str]:
    """What methods chose on validation images by themselves, in a sentence each; a value per split or sample."""
    found: dict[str, dict[str, list[str]]] = {}
    for training in trainings(params):
        if training.shots == shots:
            for name, value in artifact.read_config(training.folder).chosen.items():
                found.setdefault(training.method, {}).setdefault(name, []).append(f"{value:g}")
    return [
        f"{methods.part(method, 'settings').TITLE} chose "
        + "; ".join(f"{name} {', '.join(values)}" for name, values in chosen.items())
        + "."
        for method, chosen in found.items()
    ]


def artifact_folder(params: Params, plan: Plan, method: str, shots: int) -> Path:
    """The training of a method that is handed out: on the first split, with the first sample."""
    first, seed = next(iter(plan.splits)), plan.seeds[0]
    same = (first, method, shots, seed)
    return next(t.folder for t in trainings(params) if (t.dataset, t.method, t.shots, t.seed) == same)
