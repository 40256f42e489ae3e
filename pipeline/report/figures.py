"""The figures of the report, as SVG. The same numbers give the same bytes.

A method's colour is its family's; its marker, full or hollow, is its own, also in grey. Names stand at the curves
and points, so that twenty methods can be told apart.
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from heba import methods
from heba.data.datasets import order, title
from pipeline.report import statistics, tables
from pipeline.report.leaderboard import Board

# By the order of FAMILIES; Okabe and Ito's colours, which the colour-blind tell apart.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#56B4E9", "#D55E00", "#009E73")
MARKERS = "osD^v<>PX*dph"
LINES = ("-", "--", "-.")
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "report",  # the ids are random without one
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "mathtext.default": "regular",
}
Drawn = dict[str, str]  # SVG by the name of its file, without suffix


def draw(protocol: str, table: pd.DataFrame, names: list[str], board: Board | None, embedded: bool) -> Drawn:
    """All figures of a protocol, of its tidy table and its leaderboard."""
    found: Drawn = {}
    with mpl.rc_context(STYLE):
        if protocol == "few_shot":
            found |= curves(table, names, embedded)
        if board is not None:
            found |= scatter(board, names) if board.score[1] == "h" else {}
            found |= differences(board, names)
            found |= ranks(board)
            found |= over_parameters(board, names)
    return found


def curves(table: pd.DataFrame, names: list[str], embedded: bool) -> Drawn:
    """Accuracy over the number of shots: of the average, with the names at the curves, and of each data set."""
    datasets = list(dict.fromkeys(table["dataset"]))
    found = {}
    if tables.AVERAGE in datasets:
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots()
        ends = _curves(axes, table[table["dataset"] == tables.AVERAGE], names)
        axes.set_xlabel("shots")
        axes.set_ylabel("accuracy, %")
        axes.set_title(tables.dataset_title(tables.AVERAGE, table, embedded))
        _labels(axes, ends, names)
        found["few_shot_average"] = svg(figure, "Accuracy over shots")
        datasets.remove(tables.AVERAGE)
    columns = min(3, len(datasets))
    rows = -(-len(datasets) // columns)
    figure = Figure(figsize=(9, 2.7 * rows + 0.15 * len(names)), layout="constrained")
    plots = list(figure.subplots(rows, columns, squeeze=False).flat)
    for dataset, axes in zip(datasets, plots, strict=False):
        _curves(axes, table[table["dataset"] == dataset], names)
        axes.set_title(_text(tables.dataset_title(dataset, table, embedded)), fontsize="medium")
    for axes in plots[len(datasets) :]:
        axes.set_axis_off()
    figure.supxlabel("shots", fontsize="medium")
    figure.supylabel("accuracy, %", fontsize="medium")
    handles, labels = plots[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize="small", frameon=False)
    found["few_shot_datasets"] = svg(figure, "Accuracy over shots, by data set")
    return found


def _curves(axes: Axes, part: pd.DataFrame, names: list[str]) -> dict[str, tuple[float, float]]:
    """A curve per method, horizontal where it takes no shots; returns their last points."""
    shots = sorted(set(part["shots"]))
    ends = {}
    for name in names:
        own = part[(part["method"] == name) & part["accuracy"].notna()].sort_values("shots")
        if own.empty:
            continue
        style = _style(name, names)
        if not tables.draws(name):
            own, style = own.tail(1), style | {"marker": "", "linestyle": ":"}
            own = pd.concat([own.assign(shots=shots[0]), own.assign(shots=shots[-1])])
        spread = None if own["std"].isna().all() else own["std"].fillna(0)
        axes.errorbar(own["shots"], own["accuracy"], yerr=spread, **style)
        ends[name] = (own["shots"].iloc[-1], own["accuracy"].iloc[-1])
    axes.set_xscale("log", base=2)
    axes.set_xticks(shots, list(map(str, shots)))
    axes.minorticks_off()
    return ends


def losses(epochs: pd.DataFrame, names: list[str]) -> Drawn:
    """Loss over epochs: a plot per method that has epochs, and in it a line per data set, the mean over seeds.

    Args:
        epochs: a row per training and epoch: method, dataset, epoch, loss.
    """
    trained = [name for name in names if name in set(epochs["method"])]
    if not trained:
        return {}
    columns = min(3, len(trained))
    rows = -(-len(trained) // columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 2.7 * rows), layout="constrained")
        plots = list(figure.subplots(rows, columns, squeeze=False).flat)
        for name, axes in zip(trained, plots, strict=False):
            means = epochs[epochs["method"] == name].groupby(["dataset", "epoch"])["loss"].mean()
            for dataset in sorted(means.index.unique("dataset"), key=order):
                line = means[dataset]
                axes.plot(line.index, line, color=_colour(name), linewidth=0.8, alpha=0.7)
            _line_ends(axes, {dataset: means[dataset].iloc[-1] for dataset in means.index.unique("dataset")})
            axes.set_title(tables.method_title(name), fontsize="medium")
        for axes in plots[len(trained) :]:
            axes.set_axis_off()
        figure.supxlabel("epoch", fontsize="medium")
        figure.supylabel("loss", fontsize="medium")
        return {"losses": svg(figure, "Loss over epochs")}


def _line_ends(axes: Axes, ends: Mapping[str, float]) -> None:
    """The names of data sets right of the plot, none on another."""
    low, high = axes.get_ylim()
    listed = sorted(ends, key=lambda dataset: ends[dataset])
    heights = [(ends[dataset] - low) / (high - low) for dataset in listed]
    for dataset, height in zip(listed, apart(heights, 0.075), strict=True):
        at, name = (1.02, height), _text(title(dataset))
        axes.annotate(name, at, xycoords="axes fraction", fontsize=6, color="0.3", va="center")


def scatter(board: Board, names: list[str]) -> Drawn:
    """Average base against novel accuracy, with lines of equal H."""
    base, novel = (board.column(board.score[0], group) for group in ("base", "novel"))
    there = [name for name in names if name in base.index and name in novel.index]
    points = {name: (base["accuracy"][name], novel["accuracy"][name]) for name in there}
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, (x, y) in points.items():
        error = {"xerr": base["std"].fillna(0)[name], "yerr": novel["std"].fillna(0)[name]}
        axes.errorbar(x, y, **error, **_style(name, names) | {"linestyle": ""})
    axes.margins(0.08)
    _lines_of_h(axes)
    axes.set_xlabel("base, %")
    axes.set_ylabel("novel, %")
    axes.set_title("Average of base and novel classes; grey: equal H")
    _labels(axes, points, names)
    return {f"{board.protocol}_scatter": svg(figure, "Base against novel accuracy, with lines of equal H")}


def _lines_of_h(axes: Axes) -> None:
    """Lines of equal harmonic mean, with their values, within the limits as they are."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    x = np.linspace(max(left, 1e-3), right, 200)
    least, most = (2 * a * b / (a + b) for a, b in ((max(left, 1e-3), max(low, 1e-3)), (right, high)))
    step = next(s for s in (0.25, 0.5, 1, 2, 5, 10, 20, 50) if (most - least) / s <= 10)
    for h in np.arange(np.ceil(least / step) * step, most, step):
        with np.errstate(divide="ignore"):
            y = np.where(2 * x > h, h * x / (2 * x - h), np.inf)
        there = (y >= low) & (y <= high)
        if there.any():
            axes.plot(x[there], y[there], color="0.8", linewidth=0.8, zorder=0)
            first = int(np.argmax(there))
            axes.annotate(f"{h:g}", (x[first], y[first]), color="0.45", fontsize="x-small", ha="left", va="top")
    axes.set_xlim(left, right)
    axes.set_ylim(low, high)


def differences(board: Board, names: list[str]) -> Drawn:
    """Of each method, its differences to the reference on the data sets, as sorted bars."""
    others = [n for n in names if n in board.scores and n != board.reference]
    if board.reference not in board.scores or not others:
        return {}
    columns = min(4, len(others))
    rows, n = -(-len(others) // columns), len(board.scores)
    figure = Figure(figsize=(2.6 * max(columns, 2), rows * (0.7 + 0.17 * n) + 0.4), layout="constrained")
    plots = list(figure.subplots(rows, columns, squeeze=False, sharex=True).flat)
    for name, axes in zip(others, plots, strict=False):
        found = (board.scores[name] - board.scores[board.reference]).sort_values(kind="stable")
        # Told apart in grey too: those below 0 are hollow.
        faces = [_colour(name) if value > 0 else "white" for value in found]
        axes.barh(range(n), found, color=faces, edgecolor=_colour(name), height=0.7)
        axes.set_yticks(range(n), [_text(title(str(d))) for d in found.index], fontsize="x-small")
        axes.tick_params(axis="x", labelsize="x-small", labelbottom=True)
        axes.axvline(0, color="0.3", linewidth=0.8)
        axes.set_title(f"{tables.method_title(name)}: {found.mean():+.2f}", fontsize="small")
    for axes in plots[len(others) :]:
        axes.set_axis_off()
    what = "H" if board.score[1] == "h" else "accuracy"
    figure.supxlabel(f"{what} above that of {tables.method_title(board.reference)}, %", fontsize="medium")
    return {f"{board.protocol}_differences": svg(figure, "Differences to the reference, by data set")}


def ranks(board: Board) -> Drawn:
    """The critical-difference diagram: average ranks, the best on the right; a bar joins methods that ranks do not
    tell apart."""
    if board.friedman is None:
        return {}
    ranking = board.ranking()["rank"].sort_values(kind="stable")
    order, values, k = list(map(str, ranking.index)), list(ranking), len(ranking)
    told = board.friedman.p < statistics.ALPHA
    groups = statistics.alike(values, board.friedman.critical) if told else [(0, k - 1)]
    half = -(-k // 2)
    depth = 0.5 + 0.22 * len(groups)
    figure = Figure(figsize=(8, 1.1 + 0.24 * (half + len(groups))), layout="constrained")
    axes = figure.subplots()
    axes.set_xlim(k + 0.5, 0.5)
    axes.set_ylim(depth + 0.6 * half - 0.2, -1.6)
    axes.axis("off")
    axes.plot([1, k], [0, 0], color="black", linewidth=1)
    for tick in range(1, k + 1):
        axes.plot([tick, tick], [0, -0.15], color="black", linewidth=1)
        axes.text(tick, -0.25, str(tick), ha="center", va="bottom", fontsize="small")
    critical = min(board.friedman.critical, k - 1)
    axes.plot([1, 1 + critical], [-1.2, -1.2], color="0.4", marker="|", linewidth=1)
    axes.text(1 + critical, -1.2, f"critical difference {board.friedman.critical:.2f}  ", ha="right", va="center")
    for i, (first, last) in enumerate(groups):
        ends = [values[first] - 0.03, values[last] + 0.03]
        axes.plot(ends, [0.35 + 0.22 * i] * 2, color="black", linewidth=3, solid_capstyle="butt")
    for i, (name, rank) in enumerate(zip(order, values, strict=True)):
        right = i < half
        y = depth + 0.6 * (i if right else k - 1 - i)
        edge = 0.5 if right else k + 0.5
        axes.plot([rank, rank, edge], [0, y, y], color=_colour(name), linewidth=0.9)
        weight = "bold" if name == board.reference else "normal"
        label = f" {tables.method_title(name)} {rank:.2f} "
        axes.text(edge, y, label, ha="left" if right else "right", va="center", weight=weight)
    return {f"{board.protocol}_ranks": svg(figure, "Critical-difference diagram of average ranks")}


def over_parameters(board: Board, names: list[str]) -> Drawn:
    """The average over the number of trained parameters, where that is known; those that train none at 0."""
    ranking = board.ranking().dropna(subset="parameters")
    if ranking.empty:
        return {}
    points = {n: (ranking["parameters"][n], ranking["accuracy"][n]) for n in names if n in ranking.index}
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, (x, y) in points.items():
        error = ranking["std"].fillna(0)[name]
        axes.errorbar(x, y, yerr=error, **_style(name, names) | {"linestyle": ""})
    counts = [x for x, _ in points.values() if x] or [1]
    # Logarithmic from the smallest on, and below it linear, down to 0.
    axes.set_xscale("symlog", linthresh=min(counts), linscale=0.5)
    powers = [10**i for i in range(math.ceil(math.log10(min(counts))), math.floor(math.log10(max(counts))) + 1)]
    axes.set_xticks([0, *powers], [f"{x:,}" for x in (0, *powers)])
    axes.set_xlim(left=-min(counts) / 4)
    axes.set_xlabel("trained parameters")
    axes.set_ylabel("H, %" if board.score[1] == "h" else "accuracy, %")
    _labels(axes, points, names)
    return {f"{board.protocol}_parameters": svg(figure, "Accuracy over trained parameters")}


def _colour(name: str) -> str:
    return COLOURS[list(methods.FAMILIES).index(methods.part(name, "settings").FAMILY)]


def _style(name: str, names: list[str]) -> dict[str, Any]:
    """How a method is drawn: the colour of its family, a marker of its own; the last one is the reference."""
    i, last = names.index(name), name == names[-1]
    hollow = i // len(MARKERS) % 2 == 1
    return {
        "color": _colour(name),
        "label": tables.method_title(name),
        "marker": MARKERS[i % len(MARKERS)],
        "markersize": 6 if last else 4.5,
        "markerfacecolor": "white" if hollow and not last else _colour(name),
        "linestyle": "-" if last else LINES[i % len(LINES)],
        "linewidth": 2.2 if last else 1.1,
        "elinewidth": 0.7,
    }


def _text(text: str) -> str:
    """Text without mathematics: own data may have any name."""
    return text.replace("$", r"\$")


def _labels(axes: Axes, points: Mapping[str, tuple[float, float]], names: list[str]) -> None:
    """The names of methods right of the plot, each with a line to its point, none on another."""
    low, high = axes.get_ylim()
    listed = sorted(points, key=lambda name: points[name][1])
    heights = [(points[name][1] - low) / (high - low) for name in listed]
    for name, height in zip(listed, apart(heights, 0.045), strict=True):
        axes.annotate(
            tables.method_title(name),
            points[name],
            xytext=(1.06, height),
            textcoords="axes fraction",
            color="0.15",
            fontsize="small",
            weight="bold" if name == names[-1] else "normal",
            va="center",
            arrowprops={"arrowstyle": "-", "color": _colour(name), "linewidth": 0.7, "shrinkB": 3},
        )


def apart(values: Sequence[float], gap: float) -> list[float]:
    """Places that are at least `gap` apart, as near as possible to `values`, which rise."""
    # Without the gaps the places must only rise: the mean of each stretch that falls.
    stretches: list[list[float]] = []
    for i, value in enumerate(values):
        stretches.append([value - gap * i])
        while len(stretches) > 1 and np.mean(stretches[-2]) > np.mean(stretches[-1]):
            stretches[-2:] = [stretches[-2] + stretches[-1]]
    places = [float(np.mean(stretch)) for stretch in stretches for _ in stretch]
    return [place + gap * i for i, place in enumerate(places)]


def svg(figure: Figure, title: str) -> str:
    """A figure as the element <svg>, which fits into a page."""
    buffer = io.StringIO()
    # The date and the library's version would change the bytes of the report; nobody reads the rest.
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing | {"Title": title})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
