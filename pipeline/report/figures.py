"""The figures of the report, as base64 PNGs."""

import base64
import io

import pandas as pd
from matplotlib.figure import Figure

from pipeline.report import tables

GROUPS = {"base": "base", "novel": "novel", "h": "H", "all": "accuracy"}


def figures(table: pd.DataFrame, protocol: str, names: list[str], embedded: bool) -> list[str]:
    """Of a protocol's tidy table: curves over shots, or bars of the average."""
    if protocol == "few_shot":
        return [curves(table, names, embedded)]
    averages = table[table["dataset"] == tables.AVERAGE]
    return [bars(averages, names, tables.groups_of(protocol))] if len(averages) else []


def bars(averages: pd.DataFrame, names: list[str], groups: list[str]) -> str:
    """A horizontal bar per method and group of the averages."""
    names = [name for name in names if name in set(averages["method"])]
    figure = Figure(figsize=(8, 0.8 + 0.25 * len(names) * len(groups)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(groups)
    for i, group in enumerate(groups):
        found = averages[averages["group"] == group].set_index("method")["accuracy"].reindex(names)
        places = [y + i * height for y in range(len(names))]
        shade = str(0.75 - 0.55 * i / max(1, len(groups) - 1)) if len(groups) > 1 else "0.4"
        axes.barh(places, found, height, color=shade, label=GROUPS[group])
        for y, value in zip(places, found, strict=True):
            if not pd.isna(value):
                axes.text(value, y, f" {value:.1f}", va="center", fontsize="x-small")
    axes.set_yticks([y + 0.4 - height / 2 for y in range(len(names))], list(map(tables.method_title, names)))
    axes.invert_yaxis()
    axes.set_xlabel("average accuracy, %")
    if len(groups) > 1:
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return png(figure)


MARKERS = "osD^v<>PX*dph"


def curves(table: pd.DataFrame, names: list[str], embedded: bool) -> str:
    """Accuracy over the number of shots, a small plot per data set: a curve per method that learns, a dotted line
    per method that takes no shots."""
    datasets = list(dict.fromkeys(table["dataset"]))
    columns = min(3, len(datasets))
    rows = -(-len(datasets) // columns)
    figure = Figure(figsize=(9, 2.8 * rows + 0.2 * len(names)), layout="constrained")
    plots = list(figure.subplots(rows, columns, squeeze=False).flat)
    shots = sorted(set(table["shots"]))
    for dataset, axes in zip(datasets, plots, strict=False):
        part = table[table["dataset"] == dataset].set_index(["method", "shots"])
        for i, name in enumerate(names):
            found = [(k, *part.loc[(name, k), ["accuracy", "std"]]) for k in shots if (name, k) in part.index]
            if not found:
                continue
            style = {"color": f"C{i % 10}", "label": tables.method_title(name)}
            if not tables.draws(name):
                axes.axhline(found[0][1], linestyle=":", linewidth=1.2, **style)
                continue
            ks, values, spread = zip(*found, strict=True)
            errors = [0 if pd.isna(s) else s for s in spread]
            marker = MARKERS[i % len(MARKERS)]
            axes.errorbar(ks, values, yerr=errors, marker=marker, markersize=4, linewidth=1.2, **style)
        axes.set_title(tables.dataset_title(dataset, table, embedded), fontsize="small")
        axes.set_xscale("log", base=2)
        axes.set_xticks(shots, list(map(str, shots)))
        axes.minorticks_off()
    for axes in plots[len(datasets) :]:
        axes.set_axis_off()
    figure.supxlabel("shots", fontsize="small")
    figure.supylabel("accuracy, %", fontsize="small")
    handles, labels = plots[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize="x-small")
    return png(figure)


def png(figure: Figure) -> str:
    buffer = io.BytesIO()
    # The library's version would change the bytes of the report.
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return base64.b64encode(buffer.getvalue()).decode()
