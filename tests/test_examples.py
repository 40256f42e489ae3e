"""The examples, as a user runs them, on drawn images."""

import re
from pathlib import Path

import pytest

from examples import adapt, compare, predict
from tests.heba.artifacts import photos_of
from tests.test_rooms import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
CLASSES = ("fish", "balloon", "clock")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of 16 drawings for each of three classes."""
    folder = tmp_path_factory.mktemp("photos")
    return photos_of(folder, CLASSES, 16)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_short_and_says_how_it_is_run(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 40
    assert f"\npython examples/{path.name} " in text
    assert f"`{path.name}`" in (ROOT / "docs" / "export.md").read_text(encoding="utf-8")


def test_adapt_and_predict(photos, tmp_path, capsys):
    adapt.main(str(photos), str(tmp_path / "adapter"))
    printed = capsys.readouterr().out
    share, low, high = map(float, re.search(r"([\d.]+) % of 15 .* ([\d.]+) and ([\d.]+) %", printed).groups())
    assert 100 / 3 < low < share <= high
    assert "knows balloon, clock, fish" in printed
    image = str(photos / "fish" / "00.png")
    predict.main(image, str(tmp_path / "adapter"))
    predict.main(image, *CLASSES)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[0].endswith(" fish")
    with pytest.raises(SystemExit, match="not a readable image"):
        predict.main(str(Path(__file__)), *CLASSES)


def test_compare(photos, capsys):
    compare.main(str(photos), "zero_shot", "gda")
    zero_shot, gda, verdict = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r" +zero_shot +[\d.]+ %  \[.*\]", zero_shot)
    assert re.fullmatch(r" +gda +[\d.]+ %  \[.*\]", gda)
    assert re.match(r"(zero_shot|gda) is best", verdict)
