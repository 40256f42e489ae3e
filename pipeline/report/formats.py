"""A table that is shown, as Markdown, HTML and LaTeX: the best of a column bold, the second underlined."""

import html
import re
from collections.abc import Callable

from pipeline.report.tables import GAP, Block

Marks = tuple[Callable[[str], str], Callable[[str], str], Callable[[str], str]]  # plain, best, second
MARKDOWN: Marks = (lambda t: t.replace("*", r"\*").replace("|", r"\|"), "**{}**".format, "<u>{}</u>".format)
HTML: Marks = (lambda t: html.escape(t, quote=False), "<b>{}</b>".format, "<u>{}</u>".format)
LATEX_LETTERS = {"±": r"$\pm$", "Δ": r"$\Delta$", GAP: "--", "\\": r"\textbackslash{}", "~": r"\textasciitilde{}"}


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


def table_html(block: Block) -> str:
    heads = "".join(f"<th>{HTML[0](head)}</th>" for head in block.cells.columns)
    rows = ("".join(f"<td>{cell}</td>" for cell in row) for row in marked(block, HTML))
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table><thead><tr>{heads}</tr></thead><tbody>\n{body}\n</tbody></table>"


def latex(block: Block) -> str:
    """A tabular with booktabs' rules, which fits a page that is pasted into: small, where it has many columns."""
    heads = [latex_text(head) for head in block.cells.columns]
    rows = [" & ".join(row) + r" \\" for row in [heads, *marked(block, LATEX)]]
    lines = [
        rf"\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}",
        r"\toprule",
        rows[0],
        r"\midrule",
        *rows[1:],
        r"\bottomrule",
        r"\end{tabular}",
    ]
    if len(heads) > 6:
        lines = [r"{\scriptsize\setlength{\tabcolsep}{2pt}", *lines, "}"]
    if block.title:
        lines = [rf"\par\medskip\textbf{{{latex_text(block.title)}}}\par\nopagebreak", *lines]
    return "\n".join(lines) + "\n"
