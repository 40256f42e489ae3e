"""reports/: Markdown, CSV, LaTeX, one HTML page that needs no network, and metrics.json for DVC."""

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Template

from heba.data.datasets import title
from heba.data.protocols import PROTOCOLS
from heba.evaluation.record import Record
from pipeline.report import ablation, formats, tables
from pipeline.report.figures import figures
from pipeline.report.tables import Block

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
MARKS = "The best of a column is bold, the second underlined."
# Fixed, so that dvc.yaml can list them; a table without results says so in its files.
FILES = ["README.md", "index.html", "metrics.json", "overview.csv", "overview.tex"] + [
    f"{name}.{e}" for name in (*PROTOCOLS, "ablation") for e in ("md", "csv", "tex")
]


def notes(records: list[Record], table: pd.DataFrame, protocol: str, names: list[str]) -> list[str]:
    """Sentences under the tables of the methods `names`, whose tidy table was made of `records`."""
    embedded = any(r.suite == "embedded" for r in records)
    found = (
        [H_NOTE]
        if protocol == "base_to_novel"
        else ["Accuracy in percent; ± is the sample standard deviation over seeds."]
    )
    unable = [n for n in names if not all(tables.able(n, protocol, g) for g in PROTOCOLS[protocol].groups)]
    if unable:
        listed = ", ".join(map(tables.method_title, unable))
        found.append(f"{tables.GAP}: cannot classify classes that it was not trained on ({listed}).")
    fewer = tables.incomplete(tables.long_table(records), protocol, names)
    if fewer:
        lacking = (f"{title(d)} ({', '.join(map(tables.method_title, few))})" for d, few in fewer.items())
        found.append(f"Fewer seeds than the others: {', '.join(lacking)}.")
    averaged, own = tables.benchmarks(table), tables.own_data(table)
    absent = [title(d) for d in PROTOCOLS[protocol].complete if d not in averaged]
    if absent and averaged:
        found.append("Not in this table, nor in its average: " + ", ".join(absent) + ".")
    if own:
        found.append("Own data, in no average: " + ", ".join(own) + ".")
    return found + ([EMBEDDED] if embedded else []) + ([STAR] if embedded and averaged else [])


PAGE = Template(
    """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>HeBA: results</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
.wide { overflow-x: auto }
.warning { background: #fff3cd; padding: .6rem 1rem; border-left: 4px solid #d9a400 }
.note { color: #555; font-size: 13px }
summary { cursor: pointer }
img { max-width: 100% }
</style>
<h1>HeBA: results</h1>
{% if embedded %}<p class="warning">{{ embedded }}</p>{% endif %}
{% for s in sections %}
<h2>{{ s.title }}</h2>
{% for t in s.open %}<div class="wide">{{ t.html }}</div>{% endfor %}
{% for t in s.folded %}<details><summary>{{ t.title }}</summary><div class="wide">{{ t.html }}</div></details>
{% endfor %}
{% for n in s.notes %}<p class="note">{{ n }}</p>{% endfor %}
{% for f in s.figures %}<p><img alt="{{ s.title }}" src="data:image/png;base64,{{ f }}"></p>{% endfor %}
{% endfor %}
</html>
""",
    autoescape=False,
)


def no_table(out: Path, name: str, columns: tuple[str, ...]) -> None:
    """Write the files of a table without results, which can be read and pasted as those of others."""
    (out / f"{name}.md").write_text(f"no results of {name}\n")
    (out / f"{name}.tex").write_text(f"% no results of {name}\n")
    (out / f"{name}.csv").write_text(",".join(columns) + "\n")


def write_table(
    out: Path, name: str, title: str, table: pd.DataFrame, blocks: list[Block], below: list[str]
) -> None:
    """Write the numeric `table` as CSV, and what is shown of it, with the notes `below`, as Markdown and LaTeX."""
    text = [f"# {title}", ""]
    for block in blocks:
        text += [f"## {formats.MARKDOWN[0](block.title)}", ""] if block.title else []
        text += [formats.markdown(block), ""]
    text += [f"{note}\n".replace("* ", "\\* ", 1) for note in below]  # "* " at the start would be a bullet
    (out / f"{name}.md").write_text("\n".join(text), encoding="utf-8")
    table.round(4).to_csv(out / f"{name}.csv", index=False)
    # Not comments: the notes must go where the table goes.
    typeset = "".join(f"\n\\par\\footnotesize {formats.latex_text(note)}\n" for note in below)
    (out / f"{name}.tex").write_text("\n".join(map(formats.latex, blocks)) + typeset, encoding="utf-8")


def tidied(records: list[Record], names: list[str]) -> dict[str, pd.DataFrame]:
    """By protocol, its tidy table; without those that have no results."""
    data = tables.long_table(records)
    found = {protocol: tables.tidy_table(data, protocol, names) for protocol in PROTOCOLS}
    return {protocol: table for protocol, table in found.items() if len(table)}


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
    found = tidied(records, names)
    numbers, whole = tables.overview(found, names)
    sections: list[dict[str, Any]] = []
    text = ["# Results", ""] + ([f"**{EMBEDDED}**", ""] if embedded else [])
    if whole.cells.empty:
        (out / "overview.tex").write_text("% no results\n")
    else:
        below = [f"Averages over the benchmarks, in percent. {MARKS}"]
        text += [formats.markdown(whole), "", *below, ""]
        (out / "overview.tex").write_text(formats.latex(whole), encoding="utf-8")
        sections.append({"title": "Overview", "open": [_shown(whole)], "notes": below})
    numbers.round(4).to_csv(out / "overview.csv")
    for protocol, about in PROTOCOLS.items():
        if protocol not in found:
            no_table(out, protocol, tables.TIDY)
            continue
        table = found[protocol]
        compared = published and bool(tables.benchmarks(table))
        blocks = tables.blocks(table, protocol, names, embedded, compared)
        below = [settings[protocol]] if settings and protocol in settings else []
        below += [*notes(records, table, protocol, names), MARKS]
        below += tables.published_sources(protocol) if compared else []
        write_table(out, protocol, about.title, table, blocks, below)
        text += _section(about.title, protocol, blocks[0], len(blocks), below)
        drawn = figures(table, protocol, names, embedded)
        sections.append(_page_section(about.title, blocks, below) | {"figures": drawn})
    if ablations is None or ablations.empty:
        no_table(out, "ablation", ablation.COLUMNS)
    else:
        table = ablation.ablation_table(ablations)
        shown = ablation.display_ablation(table)
        below = ablation.notes(ablations) + ([EMBEDDED] if embedded else [])
        write_table(out, "ablation", "Ablations", table.reset_index(), [shown], below)
        text += _section("Ablations", "ablation", shown, 1, below)
        sections.append(_page_section("Ablations", [shown], below))
    (out / "README.md").write_text("\n".join(text), encoding="utf-8")
    page = PAGE.render(sections=sections, embedded=EMBEDDED if embedded else "")
    (out / "index.html").write_text(page + "\n", encoding="utf-8")
    (out / "metrics.json").write_text(json.dumps(metrics(found), indent=1) + "\n")


def _section(title: str, name: str, first: Block, n: int, below: list[str]) -> list[str]:
    """Lines of README.md: the first table, and where the others are."""
    more = f"The tables of all data sets: [{name}.md]({name}.md)." if n > 1 else f"Alone: [{name}.md]({name}.md)."
    head = [f"**{first.title}**", ""] if first.title else []
    return [
        f"## {title}",
        "",
        *head,
        formats.markdown(first),
        "",
        *(f"{b}\n".replace("* ", "\\* ", 1) for b in below),
        more,
        "",
    ]


def _shown(block: Block) -> dict[str, str]:
    return {"title": html.escape(block.title, quote=False), "html": formats.table_html(block)}


def _page_section(title: str, blocks: list[Block], below: list[str]) -> dict[str, Any]:
    """What the page has of some tables: the first one open, the others folded."""
    shown = [_shown(block) for block in blocks]
    return {
        "title": title if len(blocks) == 1 else f"{title}: {shown[0]['title']}",
        "open": shown[:1],
        "folded": shown[1:],
        "notes": [html.escape(line, quote=False) for line in below],
    }


def metrics(found: dict[str, pd.DataFrame]) -> dict[str, Any]:
    """By protocol, for the average and for own data, the accuracies of each method: for `dvc metrics show`."""
    shown: dict[str, Any] = {}
    for protocol, table in found.items():
        for dataset in [tables.AVERAGE, *tables.own_data(table)]:
            there = table[table["dataset"] == dataset].dropna(subset="accuracy")
            for _, method, shots, group, accuracy, *_ in there.itertuples(index=False):
                of = shown.setdefault(protocol, {}).setdefault(dataset, {}).setdefault(method, {})
                of[str(shots) if protocol == "few_shot" else group] = round(accuracy, 2)
    return shown


def summary_text(records: list[Record], names: list[str]) -> str:
    """The averages, and the tables of own data, for the terminal."""
    found = tidied(records, names)
    if not found:
        return "no results"
    embedded = any(r.suite == "embedded" for r in records)
    _, whole = tables.overview(found, names)
    shown = [] if whole.cells.empty else [whole]
    for protocol, table in found.items():
        own = table[table["dataset"].isin(tables.own_data(table))]
        if len(own):
            shown += tables.blocks(own, protocol, names, embedded, False)
    text = [f"{block.title}\n{block.cells.to_string(index=False)}".strip() for block in shown]
    return "\n\n".join(text + ([EMBEDDED] if embedded else []))
