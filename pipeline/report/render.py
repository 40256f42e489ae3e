"""reports/: Markdown, CSV, LaTeX, one HTML page that needs no network, and metrics.json for DVC."""

import base64
import html
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Template
from matplotlib.figure import Figure

from heba.data.datasets import title
from heba.data.protocols import PROTOCOLS
from heba.evaluation.record import Record
from pipeline.report import ablation, tables

EMBEDDED = (
    "These numbers come from the embedded suite: a tiny CLIP and small generated images. "
    "They show that the pipeline works and are no paper result."
)
STAR = "* A generated stand-in, not the data set of that name (FGVCAircraft: scikit-learn's handwritten digits)."
H_NOTE = (
    "H of a data set is the harmonic mean of its base and novel accuracy averaged over seeds; H of the average "
    "is the harmonic mean of the averaged base and novel, as in the papers. ± is the sample standard deviation "
    "over seeds."
)
# Fixed, so that dvc.yaml can list them; a table without results says so in its files.
FILES = ["README.md", "index.html", "metrics.json"] + [
    f"{name}.{e}" for name in (*PROTOCOLS, "ablation") for e in ("md", "csv", "tex")
]


def numeric(records: list[Record], protocol: str, names: list[str]) -> pd.DataFrame:
    """The numeric table of a protocol over the methods `names`; empty when there are no records."""
    data = tables.long_table(records)
    if not (data["protocol"] == protocol).any():
        return pd.DataFrame()
    if protocol == "base_to_novel":
        return tables.base_to_novel_table(data, names)
    if protocol == "few_shot":
        return tables.few_shot_table(data, names)
    return tables.transfer_table(data, protocol, names)


def displayed(table: pd.DataFrame, protocol: str, names: list[str], embedded: bool) -> pd.DataFrame:
    if protocol == "base_to_novel":
        return tables.display_base_to_novel(table, names, embedded)
    if protocol == "few_shot":
        return tables.display_few_shot(table, names, embedded)
    return tables.display_transfer(table, protocol, names, embedded)


def notes(records: list[Record], table: pd.DataFrame, protocol: str, names: list[str]) -> list[str]:
    """Sentences under a table of the methods `names`, which was made of `records`."""
    embedded = any(r.suite == "embedded" for r in records)
    found = (
        [H_NOTE]
        if protocol == "base_to_novel"
        else ["Accuracy in percent; ± is the sample standard deviation over seeds."]
    )
    unable = [n for n in names if not all(tables.able(n, protocol, g) for g in PROTOCOLS[protocol].groups)]
    found += [
        f"{tables.GAP}: {tables.method_title(name)} cannot classify classes that it was not trained on."
        for name in unable
    ]
    fewer = tables.incomplete(tables.long_table(records), protocol, names)
    if fewer:
        listed = (f"{title(d)} ({', '.join(map(tables.method_title, lacking))})" for d, lacking in fewer.items())
        found.append(f"Fewer seeds than the others: {', '.join(listed)}.")
    averaged, own = tables.benchmarks(table), tables.own_data(table)
    absent = [title(d) for d in PROTOCOLS[protocol].complete if d not in averaged]
    if absent and averaged:
        found.append("Not in this table, nor in its average: " + ", ".join(absent) + ".")
    if own:
        found.append("Own data, in no average: " + ", ".join(own) + ".")
    return found + ([EMBEDDED] if embedded else []) + ([STAR] if embedded and averaged else [])


def bars(table: pd.DataFrame, columns: list[tuple[str, str]], embedded: bool, label: str) -> str:
    """A bar chart over the rows of `table` as a base64 PNG."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(columns)
    for i, (column, name) in enumerate(columns):
        axes.bar([x + i * width for x in range(len(table))], table[column], width, label=name)
    titles = [tables.row_title(str(d), table, embedded) for d in table.index]
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(table))], titles, rotation=35, ha="right")
    axes.set_ylabel(label)
    axes.axhline(0, color="black", linewidth=0.6)
    if len(columns) > 1:
        axes.legend(ncols=2, fontsize="small")
    return png(figure)


def curves(table: pd.DataFrame, names: list[str], embedded: bool) -> str:
    """Accuracy over the number of shots, a small plot per row of `table`: a curve per method that learns, a dotted
    line per method that takes no shots. The first of these is what the curves start from, at 0 shots."""
    flat = [name for name in names if not tables.draws(name)]
    learning = [name for name in names if tables.draws(name)]
    columns = min(4, len(table))
    rows = -(-len(table) // columns)
    figure = Figure(figsize=(9, 2.4 * rows), layout="constrained")
    plots = figure.subplots(rows, columns, squeeze=False).flat
    for (dataset, row), axes in zip(table.iterrows(), plots, strict=False):
        ticks = {0} if flat else set()
        for name in learning:
            points = [(0, row[flat[0]], 0.0)] if flat else []
            points += [(k, row[f"{name}_{k}"], row[f"{name}_{k}_std"]) for k in tables.shots_of(table, name)]
            shots, values, spread = zip(*points, strict=True)
            errors = [0 if pd.isna(s) else s for s in spread]
            axes.errorbar(shots, values, yerr=errors, marker="o", markersize=3, label=tables.method_title(name))
            ticks |= set(shots)
        for name in flat:
            axes.axhline(row[name], color="grey", linestyle=":", linewidth=1)
        axes.set_title(tables.row_title(str(dataset), table, embedded), fontsize="small")
        axes.set_xticks(sorted(ticks))
        if len(learning) > 1:
            axes.legend(fontsize="x-small")
    for axes in list(plots):
        axes.set_axis_off()
    figure.supxlabel(f"shots (0: {tables.method_title(flat[0])})" if flat else "shots", fontsize="small")
    figure.supylabel("accuracy, %", fontsize="small")
    return png(figure)


def png(figure: Figure) -> str:
    buffer = io.BytesIO()
    # The library's version would change the bytes of the report.
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return base64.b64encode(buffer.getvalue()).decode()


def figures(table: pd.DataFrame, protocol: str, names: list[str], embedded: bool) -> list[str]:
    titles = {name: tables.method_title(name) for name in names}
    if protocol == "base_to_novel":
        columns = [(f"{name}_{g}", f"{titles[name]} {g}") for g in ("base", "novel") for name in names]
        found = [bars(table, columns, embedded, "accuracy, %")]
        if len(names) > 1:
            gains = [(f"difference_{g}", g) for g in ("base", "novel")]
            gain = f"{titles[names[-1]]} minus {titles[names[0]]}, points"
            found.append(bars(table, gains, embedded, gain))
        return found
    if protocol == "few_shot":
        return [curves(table, names, embedded)]
    return [bars(table, list(titles.items()), embedded, "accuracy, %")]


PAGE = Template(
    """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>HeBA: results</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
tr:last-child td { font-weight: 600 }
.no-average tr:last-child td { font-weight: 400 }
.warning { background: #fff3cd; padding: .6rem 1rem; border-left: 4px solid #d9a400 }
.note { color: #555; font-size: 13px }
img { max-width: 100% }
</style>
<h1>HeBA: results</h1>
{% if embedded %}<p class="warning">{{ embedded }}</p>{% endif %}
{% for s in sections %}
<h2>{{ s.title }}</h2>
{% if s.averaged %}{{ s.table }}{% else %}<div class="no-average">{{ s.table }}</div>{% endif %}
{% for n in s.notes %}<p class="note">{{ n }}</p>{% endfor %}
{% for f in s.figures %}<p><img alt="{{ s.title }}" src="data:image/png;base64,{{ f }}"></p>{% endfor %}
{% if s.published %}<h3>Published</h3><div class="no-average">{{ s.published }}</div>{% endif %}
{% endfor %}
</html>
""",
    autoescape=False,
)


def no_table(out: Path, name: str) -> None:
    """Write the files of a table without results."""
    for extension in ("md", "csv", "tex"):
        (out / f"{name}.{extension}").write_text(f"no results of {name}\n")


def markdown(shown: pd.DataFrame, below: list[str]) -> list[str]:
    """Lines of Markdown: a table and its notes."""
    # Markdown reads "* " at the start of a line as a bullet.
    table = shown.to_markdown(index=False, disable_numparse=True)
    return [table, "", *(f"{n}\n".replace("* ", "\\* ", 1) for n in below)]


def write_table(
    out: Path, name: str, title: str, table: pd.DataFrame, shown: pd.DataFrame, text: list[str], below: list[str]
) -> None:
    """Write the numeric `table` as CSV, its Markdown `text`, and `shown` with the notes `below` as LaTeX."""
    (out / f"{name}.md").write_text(f"# {title}\n\n" + "\n".join(text), encoding="utf-8")
    table.round(4).to_csv(out / f"{name}.csv")
    latex = shown.rename(columns=lambda c: c.replace("Δ", r"$\Delta$")).replace("±", r"$\\pm$", regex=True)
    latex = latex.replace(tables.GAP, "--")
    latex = latex.replace("_", r"\\_", regex=True)  # in names of own data
    style = latex.style.hide(axis="index")
    # Not comments: the notes must go where the table goes.
    typeset = "".join(f"\n\\par\\footnotesize {n}\n" for n in below)
    typeset = re.sub(r"([_%&#])", r"\\\1", typeset.replace("±", r"$\pm$").replace("Δ", r"$\Delta$"))
    typeset = typeset.replace(tables.GAP, "--")
    (out / f"{name}.tex").write_text(
        style.to_latex(hrules=True, column_format="l" + "r" * (len(shown.columns) - 1)) + typeset,
        encoding="utf-8",
    )


def render_report(
    records: list[Record],
    names: list[str],
    out: Path,
    published: bool,
    ablations: pd.DataFrame | None = None,
    settings: Mapping[str, str] | None = None,
) -> None:
    """Write all report files into `out`.

    Args:
        names: of the methods, in the order of the tables.
        published: whether published figures appear, as rows of their own.
        ablations: lines of ablation.csv.
        settings: by protocol, a line about the trainings for under its table.
    """
    suites = {r.suite for r in records} | set([] if ablations is None else ablations["suite"])
    embedded = "embedded" in suites
    sections: list[dict[str, Any]] = []
    summary = ["# Results", ""] + ([f"**{EMBEDDED}**", ""] if embedded else [])
    for protocol, about in PROTOCOLS.items():
        table = numeric(records, protocol, names)
        if table.empty:
            no_table(out, protocol)
            continue
        shown = displayed(table, protocol, names, embedded)
        below = notes(records, table, protocol, names)
        if settings and protocol in settings:
            below.insert(0, settings[protocol])
        compared = published and tables.benchmarks(table)
        other = pd.DataFrame(tables.published_rows(protocol, ["Base", "Novel", "H"])) if compared else None
        other = None if other is None or other.empty else other
        text = markdown(shown, below)
        if other is not None:
            text += [
                "Published figures:",
                "",
                other.fillna("").to_markdown(index=False, disable_numparse=True),
                "",
            ]
        write_table(out, protocol, about.title, table, shown, text, below)
        summary += [f"## {about.title}", "", *text]
        sections.append(
            {
                "title": about.title,
                "table": shown.to_html(index=False, border=0),
                "averaged": "average" in table.index,
                "notes": [html.escape(line, quote=False) for line in below],
                "figures": figures(table, protocol, names, embedded),
                "published": None if other is None else other.fillna("").to_html(index=False, border=0),
            }
        )
    if ablations is None or ablations.empty:
        no_table(out, "ablation")
    else:
        table = ablation.ablation_table(ablations)
        shown = ablation.display_ablation(table)
        below = ablation.notes(ablations) + ([EMBEDDED] if embedded else [])
        text = markdown(shown, below)
        write_table(out, "ablation", "Ablations", table, shown, text, below)
        summary += ["## Ablations", "", *text]
        page_table = f'<div class="no-average">{shown.to_html(index=False, border=0)}</div>'
        sections.append({"title": "Ablations", "table": page_table, "notes": below})
    (out / "README.md").write_text("\n".join(summary), encoding="utf-8")
    page = PAGE.render(sections=sections, embedded=EMBEDDED if embedded else "")
    (out / "index.html").write_text(page + "\n", encoding="utf-8")
    (out / "metrics.json").write_text(json.dumps(metrics(records, names), indent=1) + "\n")


def metrics(records: list[Record], names: list[str]) -> dict[str, Any]:
    """The averages, and every data set, for `dvc metrics show`."""
    found: dict[str, Any] = {}
    for protocol in PROTOCOLS:
        table = numeric(records, protocol, names).round(2)
        if table.empty:
            continue
        rows = {d: row.drop("seeds").dropna().to_dict() for d, row in table.iterrows()}
        average = {"average": rows.pop("average")} if "average" in rows else {}
        found[protocol] = average | {"datasets": rows}
    return found


def summary_text(records: list[Record], names: list[str]) -> str:
    """The base-to-novel table for the terminal."""
    table = numeric(records, "base_to_novel", names)
    if table.empty:
        return "no base_to_novel results"
    embedded = any(r.suite == "embedded" for r in records)
    shown = displayed(table, "base_to_novel", names, embedded)
    return shown.to_string(index=False) + (f"\n{EMBEDDED}" if embedded else "")
