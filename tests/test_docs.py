"""The README and docs/: what they name exists, and the site needs no network."""

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from itertools import pairwise

import pytest
import typer.main
import yaml
from dvc.cli.parser import get_main_parser

from heba import methods
from heba.data.datasets import title
from pipeline.commands import cli, use
from pipeline.report.tables import published_figures
from tests.test_rooms import FILES, ROOT

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL = {"", "sh", "bash"}
COMMANDS = {
    ("python", "-m", "pipeline"): typer.main.get_command(cli.app),
    ("heba",): typer.main.get_command(use.app),
}
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
VARIABLE = "…"  # in a quoted message


def commands(text):
    """The commands in a page's shell blocks and in its code spans, as lists of words."""
    text = text.replace("\\\n", " ")
    lines = [line for kind, block in FENCE.findall(text) if kind in SHELL for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    for line in lines:
        for part in re.split(r"&&|\||;| -> ", re.sub(r"\s#.*", "", line)):
            try:
                yield shlex.split(part)
            except ValueError:  # a quotation mark that is closed elsewhere: no command of ours
                continue


def problem(words):
    """What a command names that there is not; "" where all is there."""
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words = words[1:]
    if words[:4] == ["python", "-m", "pipeline", "dvc"]:
        words = words[3:]
    for start, group in COMMANDS.items():
        if tuple(words[: len(start)]) == start and len(words) > len(start):
            return _unknown(group, words[len(start) :])
    match words:
        case ["dvc", *rest] if rest:
            return _unknown_to_dvc(rest)
        case ["python", "-m", module, *_] if module.startswith(("benchmarks", "tests", "heba", "pipeline.")):
            return "" if importlib.util.find_spec(module) else f"no module {module}"
        case ["make", target]:
            found = re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
            return "" if found else f"no target {target}"
    return ""


def _unknown(group, words):
    if words[0].startswith("-"):
        return "" if words[0] == "--help" else f"no option {words[0]}"
    if words[0].isupper():  # a word that stands for any command
        return ""
    if words[0] not in group.commands:
        return f"no command {words[0]}"
    known = {"--help", *(option for param in group.commands[words[0]].params for option in param.opts)}
    options = [word.partition("=")[0] for word in words[1:] if re.match(r"--\w", word)]
    return "".join(f"{words[0]} has no option {option}" for option in options if option not in known)


def _unknown_to_dvc(words):
    """The page may leave out arguments that DVC asks for; what it has must be right."""
    parser, words, targets = get_main_parser(), iter(words), []
    for word in words:
        commands = next((action.choices for action in parser._actions if isinstance(action.choices, dict)), None)
        if word.startswith("-"):
            option, equals, _ = word.partition("=")
            if option not in parser._option_string_actions:
                return f"dvc has no option {option} there"
            if parser._option_string_actions[option].nargs != 0 and not equals:
                next(words, None)  # its value
        elif commands is None:
            targets.append(word)
        elif word in commands:
            parser = commands[word]
        else:
            return f"dvc has no command {word}"
    stages = targets if parser.prog.endswith((" repro", " exp run")) else []
    absent = [
        name
        for name in stages
        if name.strip(".").partition("@")[0] not in STAGES and not name.strip(".").isupper()
    ]
    return "".join(f"no stage {name}" for name in absent if name != "..." and not name.startswith("$"))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_that_is_named_exists(page):
    found = {" ".join(words): problem(words) for words in commands(page.read_text(encoding="utf-8"))}
    assert {line: what for line, what in found.items() if what} == {}


def test_a_command_that_does_not_exist_is_found():
    page = """```
X=1 python -m pipeline trian --dataset dtd   # a comment
dvc repro splt@dtd && heba predict a.jpg --top=3 --tpo 3
```
`python -m pipeline dvc exp rnu`
`dvc exp run -Z shots=4` `dvc reproduce` `make rpro` `python -m benchmarks.setp` `heba.load` `heba info F`
"""
    found = [problem(words) for words in commands(page)]
    assert [what for what in found if what] == [
        "no command trian",
        "no stage splt@dtd",
        "predict has no option --tpo",
        "dvc has no command rnu",
        "dvc has no option -Z there",
        "dvc has no command reproduce",
        "no target rpro",
        "no module benchmarks.setp",
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_and_variable_that_is_named_exists(page):
    text = page.read_text(encoding="utf-8")
    files = re.findall(r"`((?:heba|pipeline|tests|benchmarks|docs|reports)/[\w./-]+)`", text)
    found = [name for name in files if not (ROOT / name).exists() and "/X" not in name]
    code = "".join(path.read_text(encoding="utf-8") for path in [*FILES, *(ROOT / "tests").rglob("*.py")])
    found += [name for name in re.findall(r"HEBA_[A-Z_]+", text) if name not in code]
    assert found == []


@cache
def messages():
    """All strings of the code but docstrings, with a mark for each value in them."""
    found = []
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documented = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        found += [_text(node) for node in ast.walk(tree) if id(node) not in documented]
    return [" ".join(text.split()) for text in found if text]


def _text(node):
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(_text(value) or VARIABLE for value in values)
    return ""


def is_said(quoted):
    """Whether a string of the code has the fixed parts of a quoted message, in their order."""
    parts = [re.escape(part.strip()) for part in quoted.split(VARIABLE)]
    pattern = re.compile(".*?".join(parts))
    return len(quoted) > 8 and any(pattern.search(text) for text in messages())


def quoted_messages():
    """The code in the first cells of tables whose first column is `message`."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    for table in re.findall(r"^\| message \|.*\n\|[-| ]+\|\n((?:\|.*\n)+)", text, re.MULTILINE):
        for row in table.splitlines():
            yield from re.findall(r"`` (.+?) ``|`([^`]+)`", row.split(" | ")[0])


def test_every_message_of_the_troubleshooting_page_is_one_of_the_code():
    quoted = [long or short for long, short in quoted_messages()]
    assert len(quoted) > 150
    assert len(set(quoted)) == len(quoted)
    assert [message for message in quoted if not is_said(message)] == []
    assert not is_said("`dvc.lock` was eaten by a dog")


def test_the_readme_fits_a_few_screens_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 120
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_pictures_are_there():
    for page in PAGES:  # MkDocs does not look at HTML
        for picture in re.findall(r'<img src="([^"]+)"', page.read_text(encoding="utf-8")):
            assert (page.parent / picture).is_file(), f"{page}: {picture}"


def test_the_diagram_of_the_readme_is_that_of_dvc_yaml():
    ((_, diagram),) = [
        found for found in FENCE.findall(PAGES[0].read_text(encoding="utf-8")) if found[0] == "mermaid"
    ]
    edges = [
        (source, target)
        for line in diagram.splitlines()
        for parts in [[part.split(" & ") for part in line.strip().split(" --> ")]]
        for sources, targets in pairwise(parts)
        for source in sources
        for target in targets
    ]
    assert len(edges) > 8
    for source, target in edges:
        assert any(dep.startswith(f"out/{source}") for dep in STAGES[target]["deps"]), (source, target)


def test_the_expected_results_are_those_of_the_report():
    text = (ROOT / "docs" / "expected.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if "](#sources)" in line
    ]
    novel = {"base_to_novel": [("base", 1), ("novel", 2), ("h", 3)]}
    transfer = {"cross_dataset": [("all", 1)], "domain_generalization": [("all", 3)]}
    shown = {
        (protocol, row[0], group): row[i]
        for row in rows
        for protocol, groups in (transfer if row[2].startswith("[") else novel).items()
        for group, i in groups
    }
    assert {key: value for key, value in shown.items() if value != "–"} == _published(
        lambda name: name == "average"
    )


def _published(wanted):
    """(protocol, method, group), and the data set where that is not the average, to the figure as it is shown."""
    return {
        (protocol, method, group, *([] if dataset == "average" else [title(dataset)])): f"{value:.2f}"
        for protocol in ("base_to_novel", "cross_dataset", "domain_generalization")
        for method, figures in published_figures(protocol)
        for (dataset, group), value in figures.items()
        if wanted(dataset)
    }


@pytest.mark.parametrize(
    ("heading", "protocol", "group"),
    [
        ("Base-to-novel, H", "base_to_novel", "h"),
        ("Base-to-novel, Base", "base_to_novel", "base"),
        ("Base-to-novel, Novel", "base_to_novel", "novel"),
        ("Cross-data-set transfer", "cross_dataset", "all"),
        ("Domain generalisation", "domain_generalization", "all"),
    ],
)
def test_the_expected_results_by_data_set_are_those_of_the_report(heading, protocol, group):
    text = (ROOT / "docs" / "expected.md").read_text(encoding="utf-8")
    table = text.partition(f"### {heading}\n")[2].partition("\n#")[0].strip().splitlines()
    (_, *names), _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    shown = {
        (protocol, name, group, row[0]): cell for row in rows for name, cell in zip(names, row[1:], strict=True)
    }
    figures = _published(lambda dataset: dataset != "average")
    assert shown == {
        key: cell for key, cell in figures.items() if key[:3:2] == (protocol, group) and key[1] in names
    }
    assert len(names) > 3


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="pip install -c constraints.txt -e '.[docs]'")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", out]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_the_site_loads_nothing_from_afar(site):
    pages = list(site.rglob("*.html"))
    assert {page.stem for page in pages} >= {page.stem for page in PAGES if page.parent.name == "docs"}
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(
            r"<(?:script|img|iframe|link|source)\b[^>]*?(?:src|href)=[\"']?((?:https?:)?//[^\"' >]+)", text
        )
        assert loaded == [], page
        assert 'class="mermaid"' not in text, f"{page}: the theme would load Mermaid from afar"
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert not re.search(r"url\([\"']?(?:https?:)?//|@import", styles)


def test_the_site_has_the_settings_of_every_method_and_the_functions_of_the_library(site):
    settings = (site / "settings.html").read_text(encoding="utf-8")
    for name in methods.names():
        about = methods.part(name, "settings")
        assert f"{about.TITLE}<" in settings
        (first, *_) = about.Settings.model_fields
        assert f">{first}<" in settings
    reference = (site / "api.html").read_text(encoding="utf-8")
    assert re.search(r">\s*heba\.load\s*<", reference)
    assert re.search(r">\s*heba\.zero_shot\s*<", reference)
