"""A table that is shown, as Markdown, HTML and LaTeX: the best of a column bold, the second underlined."""

import html
import re
from collections.abc import Callable

from pipeline.report.tables import GAP, Block

Marks = tuple[Callable[[str], str], Callable[[str], str], Callable[[str], str]]  # plain, best, second
MARKDOWN: Marks = (lambda t: t.replace("*", r"\*").replace("|", r"\|"), "**{}**".format, "<u>{}</u>".format)
HTML: Marks = (lambda t: html.escape(t, quote=False), "<b>{}</b>".format, "<u>{}</u>".format)
LATEX_LETTERS = {
    "±": r"$\pm$",
    "Δ": r"$\Delta$",
    "χ": r"$\chi$",
    "²": r"$^2$",
    "<": "$<$",
    GAP: "--",
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
}
# Of \documentclass{article}, in pt: the page, and by size of the font the width of a letter and of the space
# beside a column; a bold letter is wider.
PAGE = 345.0
NORMAL, SMALL = (5.0, 12.0), (4.0, 4.0)
BOLD = 1.16


def latex_text(text: str) -> str:
    """Text as LaTeX typesets it."""
    text = "".join(LATEX_LETTERS.get(letter, letter) for letter in text)
    return re.sub(r"(?<!\\)([_%&#])", r"\\\1", text)


LATEX: Marks = (latex_text, r"\textbf{{{}}}".format, r"\underline{{{}}}".format)


def marked(block: Block, marks: Marks) -> list[list[str]]:
    """The cells of a block, a list per row, as text with marks."""
    plain, best, second = marks
    rows = []
    for cells, ranks in zip(block.cells.itertuples(index=False), block.ranks.itertuples(index=False), strict=True):
        shown = [plain(cell) for cell in cells]
        rows.append([(str, best, second)[rank](text) for text, rank in zip(shown, ranks, strict=True)])
    return rows


def markdown(block: Block) -> str:
    heads = [MARKDOWN[0](head) for head in block.cells.columns]
    lines = [heads, [":--", *["--:"] * (len(heads) - 1)], *marked(block, MARKDOWN)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table_html(block: Block, sortable: bool = False) -> str:
    """A table; `sortable` ones are sorted by the page's script."""
    heads = "".join(f"<th>{HTML[0](head)}</th>" for head in block.cells.columns)
    rows = ("".join(f"<td>{cell}</td>" for cell in row) for row in marked(block, HTML))
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    kind = ' class="sortable"' if sortable else ""
    return f"<table{kind}><thead><tr>{heads}</tr></thead><tbody>\n{body}\n</tbody></table>"


def latex(block: Block) -> str:
    """Tabulars with booktabs' rules, which fit a page that they are pasted into: small where need be, and below
    one another where that is not enough, each with the first column."""
    widths = []
    for head in block.cells.columns:
        pairs = zip(block.cells[head], block.ranks[head], strict=True)
        widths.append(max(len(head), *(len(cell) * (BOLD if rank == 1 else 1) for cell, rank in pairs)))
    small = _width(widths, NORMAL) > PAGE
    lines = []
    for columns in _fitting(widths) if small else [list(range(len(widths)))]:
        lines += _tabular(Block("", block.cells.iloc[:, columns], block.ranks.iloc[:, columns]))
        lines += [r"\par\smallskip"]
    lines.pop()
    if small:
        lines = [r"{\scriptsize\setlength{\tabcolsep}{2pt}", *lines, r"\par}"]
    if block.title:
        lines = [rf"\par\medskip\textbf{{{latex_text(block.title)}}}\par\nopagebreak", *lines]
    return "\n".join(lines) + "\n"


def _width(widths: list[float], size: tuple[float, float]) -> float:
    letter, space = size
    return sum(letter * n + space for n in widths)


def _fitting(widths: list[float]) -> list[list[int]]:
    """The columns in parts that fit the page in the small font, each after the first column."""
    parts = [[0]]
    for i in range(1, len(widths)):
        if len(parts[-1]) > 1 and _width([widths[j] for j in (*parts[-1], i)], SMALL) > PAGE:
            parts.append([0])
        parts[-1].append(i)
    return parts


def _tabular(block: Block) -> list[str]:
    heads = [latex_text(str(head)) for head in block.cells.columns]
    rows = [" & ".join(row) + r" \\" for row in [heads, *marked(block, LATEX)]]
    columns = f"l{'r' * (len(heads) - 1)}"
    return [
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        rows[0],
        r"\midrule",
        *rows[1:],
        r"\bottomrule",
        r"\end{tabular}",
    ]
