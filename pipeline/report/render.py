"""reports/: Markdown, CSV, LaTeX, figures, one HTML page that needs no network, and metrics.json for DVC."""

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Template

from heba import methods
from heba.data.datasets import title
from heba.data.protocols import PROTOCOLS
from heba.evaluation.cost import Cost
from heba.evaluation.record import Record
from pipeline.report import ablation, cost, figures, formats, leaderboard, metrics, provenance, tables
from pipeline.report.leaderboard import Board
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
LOSSES = "Base-to-novel trainings: the mean loss of an epoch, over seeds; a line per data set."
MARKS = "The best of a column is bold, the second underlined"
AVERAGES = "; an average is bold by the rule of the leaderboard"
# Fixed, so that dvc.yaml can list them; a table without results says so in its files.
FILES = [
    *("README.md", "index.html", "metrics.json", "averages.json", "evaluations.csv"),
    *("overview.csv", "overview.tex"),
    *(f"{name}.{e}" for name in (*PROTOCOLS, "leaderboard", "cost", "ablation") for e in ("md", "csv", "tex")),
]
FIGURES = "figures"  # a folder: which figures there are depends on the results


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
.sortable th { cursor: pointer }
.sortable th[aria-sort=ascending]::after { content: " ▲" }
.sortable th[aria-sort=descending]::after { content: " ▼" }
.wide { overflow-x: auto }
.warning { background: #fff3cd; padding: .6rem 1rem; border-left: 4px solid #d9a400 }
.note { color: #555; font-size: 13px }
summary { cursor: pointer }
svg { max-width: 100%; height: auto; display: block; margin: 1rem 0 }
</style>
<h1>HeBA: results</h1>
{% if embedded %}<p class="warning">{{ embedded }}</p>{% endif %}
{% for s in sections %}
<h2>{{ s.title }}</h2>
{% for t in s.open %}{% if t.title %}<h3>{{ t.title }}</h3>{% endif %}<div class="wide">{{ t.html }}</div>
{% endfor %}
{% for t in s.folded %}<details><summary>{{ t.title }}</summary><div class="wide">{{ t.html }}</div></details>
{% endfor %}
{% for n in s.notes %}<p class="note">{{ n }}</p>{% endfor %}
{% for f in s.figures %}{{ f }}{% endfor %}
{% if s.figures %}<p class="note">Colours:{% for name, colour in families %}
<span style="color:{{ colour }}">■</span> {{ name }}{% endfor %}.</p>{% endif %}
{% endfor %}
<script>{{ script }}</script>
</html>
""",
    autoescape=False,
)
# Sorts by a click on a heading, the highest first, and the other way by the next. Cells without a value stay last.
SCRIPT = """
document.querySelectorAll("table.sortable th").forEach((head) => {
  head.tabIndex = 0;
  head.onkeydown = (event) => { if (event.key === "Enter") head.onclick(); };
  head.onclick = () => {
    const body = head.closest("table").tBodies[0], column = head.cellIndex;
    const text = (row) => row.cells[column].textContent.trim().replaceAll(",", "");
    const value = (row) => parseFloat(text(row));
    const rows = [...body.rows], empty = (row) => ["", "–"].includes(text(row));
    const numbers = rows.some((row) => !empty(row)) && rows.every((row) => empty(row) || !isNaN(value(row)));
    const down = head.ariaSort ? head.ariaSort === "ascending" : numbers;
    const compare = (a, b) => numbers ? value(a) - value(b) : text(a).localeCompare(text(b));
    rows.sort((a, b) => empty(a) - empty(b) || (empty(a) ? 0 : (down ? -1 : 1) * compare(a, b)));
    [...head.parentNode.cells].forEach((cell) => { cell.ariaSort = null; });
    head.ariaSort = down ? "descending" : "ascending";
    body.append(...rows);
  };
});
"""


def no_table(out: Path, name: str, columns: tuple[str, ...]) -> None:
    """Write the files of a table without results, which can be read and pasted as those of others."""
    (out / f"{name}.md").write_text(f"no results of {name}\n")
    (out / f"{name}.tex").write_text(f"% no results of {name}\n")
    (out / f"{name}.csv").write_text(",".join(columns) + "\n")


Part = tuple[Sequence[Block], Sequence[str]]  # tables, and the sentences below them


def write_table(out: Path, name: str, title: str, table: pd.DataFrame, parts: Sequence[Part]) -> None:
    """Write the numeric `table` as CSV, and what is shown of it as Markdown and LaTeX."""
    text, typeset = [f"# {title}", ""], []
    for blocks, below in parts:
        for block in blocks:
            text += [f"## {formats.MARKDOWN[0](block.title)}", ""] if block.title else []
            text += [formats.markdown(block), ""]
            typeset += [formats.latex(block)]
        text += _markdown_notes(below)
        # Not comments: the notes must go where the table goes.
        typeset += [f"{{\\footnotesize\\sloppy {formats.latex_text(note)}\\par}}\n" for note in below]
    (out / f"{name}.md").write_text("\n".join(text), encoding="utf-8")
    (out / f"{name}.tex").write_text("\n".join(typeset), encoding="utf-8")
    table.round(4).to_csv(out / f"{name}.csv", index=False)


def _markdown_notes(below: Sequence[str]) -> list[str]:
    return [f"{note}\n".replace("* ", "\\* ", 1) for note in below]  # "* " at the start would be a bullet


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
    made: Mapping[str, Sequence[str]] | None = None,
    reference: str | None = None,
    costs: Mapping[str, Cost] | None = None,
    timings: pd.DataFrame | None = None,
    epochs: pd.DataFrame | None = None,
) -> None:
    """Write all report files into `out`.

    Args:
        names: of the methods, in the order of the tables.
        published: whether published figures appear, as rows of their own.
        ablations: lines of ablation.csv.
        made: by protocol, sentences for under its tables about where they come from.
        reference: the method that the others are compared with; None: the last of `names`.
        costs: by method, what was counted of it. timings: lines of timings.csv.
        epochs: the losses of the trainings, for `figures.losses`.
    """
    suites = {r.suite for r in records} | set([] if ablations is None else ablations["suite"])
    embedded, reference = "embedded" in suites, reference or names[-1]
    data, found = tables.long_table(records), tidied(records, names)
    parameters = {(r.protocol, r.dataset, r.method, r.shots): r.trained_parameters for r in records}
    boards = {p: leaderboard.leaderboard(data, t, p, names, reference, parameters) for p, t in found.items()}
    ranked = {protocol: board for protocol, board in boards.items() if board is not None}
    numbers, whole = tables.overview(found, names, {protocol: board.bold() for protocol, board in ranked.items()})
    reading = leaderboard.reading(reference)
    sections: list[dict[str, Any]] = []
    text = ["# Results", ""] + ([f"**{EMBEDDED}**", ""] if embedded else [])
    if whole.cells.empty:
        (out / "overview.tex").write_text("% no results\n")
    else:
        below = ["Averages over the benchmarks, in percent.", *reading]
        text += [formats.markdown(whole), "", *_markdown_notes(below)]
        (out / "overview.tex").write_text(formats.latex(whole), encoding="utf-8")
        sections.append(_page_section("Overview", [whole], [], below))
    numbers.round(4).to_csv(out / "overview.csv")
    provenance.evaluations(records).round(4).to_csv(out / "evaluations.csv", index=False)
    write_leaderboards(out, ranked, names, [*reading, *([EMBEDDED] if embedded else [])], made or {})
    (out / FIGURES).mkdir()
    for protocol, about in PROTOCOLS.items():
        if protocol not in found:
            no_table(out, protocol, tables.TIDY)
            continue
        table, board = found[protocol], ranked.get(protocol)
        compared = published and bool(tables.benchmarks(table))
        blocks = tables.blocks(table, protocol, names, embedded, compared, board.bold() if board else None)
        below = [*(made or {}).get(protocol, []), *notes(records, table, protocol, names)]
        below += tables.published_sources(protocol) if compared else []
        marks = f"{MARKS}{AVERAGES if board else ''}."
        write_table(out, protocol, about.title, table, [(blocks, [*below, marks])])
        drawn = figures.draw(protocol, table, names, board, embedded)
        for name, figure in drawn.items():
            (out / FIGURES / f"{name}.svg").write_text(figure, encoding="utf-8")
        if board:
            first = leaderboard.blocks(board, names)
            below = [*leaderboard.notes(board), *below]
        else:
            first, blocks, below = blocks[:1], blocks[1:], [*below, marks]
        text += _section(about.title, protocol, first, below, list(drawn))
        folded = [block._replace(title=block.title or "Data sets") for block in blocks]
        sections.append(_page_section(about.title, first, folded, below) | {"figures": list(drawn.values())})
    spent = cost.cost_table(records, names, costs or {}, timings)
    if spent.empty:
        no_table(out, "cost", cost.SHOWN)
    else:
        shown = cost.cost_block(spent, whole.cells)
        below = cost.notes(timings) + ([EMBEDDED] if embedded else [])
        write_table(out, "cost", "Cost", spent, [([shown], below)])
        text += _section("Cost", "cost", [shown], below, [])
        sections.append(_page_section("Cost", [shown], [], below))
    drawn = {} if epochs is None else figures.losses(epochs, names)
    if drawn:
        for name, figure in drawn.items():
            (out / FIGURES / f"{name}.svg").write_text(figure, encoding="utf-8")
        text += ["## Training", "", *(f"![{name}]({FIGURES}/{name}.svg)\n" for name in drawn), LOSSES, ""]
        sections.append(_page_section("Training", [], [], [LOSSES]) | {"figures": list(drawn.values())})
    if ablations is None or ablations.empty:
        no_table(out, "ablation", ablation.COLUMNS)
    else:
        table = ablation.ablation_table(ablations)
        shown = ablation.display_ablation(table)
        below = ablation.notes(ablations) + ([EMBEDDED] if embedded else [])
        write_table(out, "ablation", "Ablations", table.reset_index(), [([shown], below)])
        text += _section("Ablations", "ablation", [shown], below, [])
        sections.append(_page_section("Ablations", [shown], [], below))
    (out / "README.md").write_text("\n".join(text), encoding="utf-8")
    families = list(zip(methods.FAMILIES, figures.COLOURS, strict=True))
    page = PAGE.render(sections=sections, embedded=EMBEDDED if embedded else "", families=families, script=SCRIPT)
    (out / "index.html").write_text(page + "\n", encoding="utf-8")
    (out / "metrics.json").write_text(json.dumps(metrics.headline(found, reference), indent=1) + "\n")
    (out / "averages.json").write_text(json.dumps(metrics.averages(found), indent=1) + "\n")


def write_leaderboards(
    out: Path,
    ranked: dict[str, Board],
    names: list[str],
    below: Sequence[str],
    made: Mapping[str, Sequence[str]],
) -> None:
    """Write the leaderboards of all protocols, and the sentences `below` all of them."""
    if not ranked:
        no_table(out, "leaderboard", leaderboard.COLUMNS)
        return
    parts: list[Part] = []
    for protocol, board in ranked.items():
        first, *others = leaderboard.blocks(board, names)
        blocks = [first._replace(title=PROTOCOLS[protocol].title), *others]
        parts.append((blocks, [*leaderboard.notes(board), *made.get(protocol, [])]))
    rows = pd.concat([board.rows for board in ranked.values()], ignore_index=True)
    write_table(out, "leaderboard", "Leaderboards", rows, [*parts, ([], below)])


def _section(title: str, name: str, first: Sequence[Block], below: list[str], drawn: list[str]) -> list[str]:
    """Lines of README.md: the first tables, the figures, and where the others are."""
    lines = [f"## {title}", ""]
    for block in first:
        lines += [f"**{block.title}**", ""] if block.title else []
        lines += [formats.markdown(block), ""]
    lines += _markdown_notes(below)
    lines += [f"![{figure}]({FIGURES}/{figure}.svg)\n" for figure in drawn]
    return [*lines, f"All tables: [{name}.md]({name}.md).", ""]


def _shown(block: Block, sortable: bool = False) -> dict[str, str]:
    return {"title": html.escape(block.title, quote=False), "html": formats.table_html(block, sortable)}


def _page_section(
    title: str, first: Sequence[Block], folded: Sequence[Block], below: Sequence[str]
) -> dict[str, Any]:
    """What the page has of some tables: the first ones open and sortable, the others folded."""
    return {
        "title": title,
        "open": [_shown(block, sortable=True) for block in first],
        "folded": [_shown(block) for block in folded],
        "notes": [html.escape(line, quote=False) for line in below],
    }


def summary_text(records: list[Record], names: list[str]) -> str:
    """The averages, and the tables of own data, for the terminal."""
    found = tidied(records, names)
    if not found:
        return "no results"
    embedded = any(r.suite == "embedded" for r in records)
    _, whole = tables.overview(found, names, {})
    shown = [] if whole.cells.empty else [whole]
    for protocol, table in found.items():
        own = table[table["dataset"].isin(tables.own_data(table))]
        if len(own):
            shown += tables.blocks(own, protocol, names, embedded, False)
    text = [f"{block.title}\n{block.cells.to_string(index=False)}".strip() for block in shown]
    return "\n\n".join(text + ([EMBEDDED] if embedded else []))
