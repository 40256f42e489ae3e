"""The tables, by hand; the files, as a reader opens them."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.report import render, tables


def record(dataset, seed, zero, heba, protocol="base_to_novel", suite="embedded"):
    names = ("base", "novel") if protocol == "base_to_novel" else ("all",)
    groups = {
        g: {"zero_shot": {"accuracy": z}, "heba": {"accuracy": h}}
        for g, z, h in zip(names, zero, heba, strict=True)
    }
    return {"protocol": protocol, "suite": suite, "dataset": dataset, "seed": seed, "shots": 16, "groups": groups}


RECORDS = [
    record("dtd", 1, (50.0, 60.0), (70.0, 60.0)),
    record("dtd", 2, (50.0, 60.0), (74.0, 64.0)),
    record("eurosat", 1, (40.0, 40.0), (90.0, 30.0)),
    record("eurosat", 2, (40.0, 40.0), (90.0, 34.0)),
    record("dtd", 1, (30.0,), (35.0,), "cross_dataset"),
    record("eurosat", 1, (50.0,), (45.0,), "cross_dataset"),
]


def test_base_to_novel_by_hand():
    table = tables.base_to_novel_table(RECORDS)
    dtd, average = table.loc["dtd"], table.loc["average"]
    assert dtd["heba_base"] == 72
    assert dtd["heba_base_std"] == pytest.approx(8**0.5)
    assert dtd["heba_h"] == pytest.approx(2 * 72 * 62 / (72 + 62))
    assert average["heba_base"] == 81
    assert average["heba_novel"] == 47
    # H of the averages, not the average of H.
    assert average["heba_h"] == pytest.approx(2 * 81 * 47 / (81 + 47))
    assert average["difference_base"] == 81 - 45
    assert average["heba_base_std"] == pytest.approx(2**0.5)


def test_transfer_by_hand():
    table = tables.transfer_table(RECORDS, "cross_dataset")
    assert list(table["difference"]) == [5, -5, 0]
    assert "±" not in tables.display_transfer(table, True).to_string()


def test_few_shot_by_hand():
    def few(dataset, seed, shots, heba):
        return record(dataset, seed, (40.0,), (heba,), "few_shot") | {"shots": shots}

    records = [few("dtd", 1, 1, 50.0), few("dtd", 2, 1, 54.0), few("dtd", 1, 16, 80.0), few("dtd", 2, 16, 80.0)]
    records += [few("eurosat", 1, 1, 60.0), few("eurosat", 2, 1, 60.0), few("eurosat", 1, 16, 90.0)]
    table = tables.few_shot_table(records)
    assert tables.shots_of(table) == [1, 16]
    assert table.loc["dtd", "heba_1"] == 52
    assert table.loc["dtd", "heba_1_std"] == pytest.approx(8**0.5)
    assert table.loc["average", "heba_1"] == 56
    assert table.loc["average", "heba_1_std"] == pytest.approx(2**0.5)
    assert table.loc["average", "heba_16"] == 85
    assert tables.incomplete(table) == ["eurosat"]
    assert table.isna().loc["average", "heba_16_std"]


def test_a_missing_seed_is_named_and_the_average_says_over_how_many():
    table = tables.base_to_novel_table(RECORDS[:3])
    assert tables.incomplete(table) == ["eurosat"]
    assert any("EuroSAT" in n for n in render.notes(table, "base_to_novel", True))
    assert "Average of 2" in tables.display_base_to_novel(table, True).to_string()
    assert table.isna().loc["average", "heba_base_std"]


def test_files(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        render.render_report(RECORDS, tmp_path / name, published=False)
    for file in render.FILES:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    page = (tmp_path / "a" / "index.html").read_text()
    assert not re.search(r"https?://", page)
    assert all(s.startswith("data:") for s in re.findall(r'(?:src|href)="([^"]*)', page))
    for file in ("index.html", "README.md", "base_to_novel.md", "base_to_novel.tex"):
        assert "no paper result" in (tmp_path / "a" / file).read_text()
    assert "published" not in (tmp_path / "a" / "base_to_novel.md").read_text()
    assert "nor in its average: ImageNet, Caltech101" in (tmp_path / "a" / "base_to_novel.md").read_text()
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert metrics["base_to_novel"]["average"]["heba_base"] == 81
    assert "no results" in (tmp_path / "a" / "domain_generalization.md").read_text()


def test_published_rows_stand_apart_and_name_their_source(tmp_path):
    records = [r | {"suite": "real"} for r in RECORDS]
    render.render_report(records, tmp_path, published=True)
    text = (tmp_path / "base_to_novel.md").read_text()
    assert "HeBA (published)" in text
    assert "81.35" in text
    assert "github" in text
    assert "no paper result" not in text
    assert "published" not in (tmp_path / "base_to_novel.csv").read_text()


def test_a_malformed_record_is_named(tmp_path):
    path = tmp_path / "r.json"
    path.write_text(json.dumps({k: v for k, v in RECORDS[0].items() if k != "seed"}))
    with pytest.raises(ValueError, match=r"r\.json: key 'seed'"):
        tables.load_records([path])


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"groups": None}, "groups.base.zero_shot.accuracy"),
        ({"groups": {"base": RECORDS[0]["groups"]["base"]}}, "groups.novel.zero_shot.accuracy"),
        ({"groups": {"base": {"zero_shot": {"accuracy": float("nan")}}}}, "groups.base.zero_shot.accuracy"),
        ({"groups": {"base": {"zero_shot": {"accuracy": True}}}}, "groups.base.zero_shot.accuracy"),
        ({"protocol": "other"}, "protocol"),
    ],
)
def test_a_wrong_value_is_named(tmp_path, change, key):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(RECORDS[0] | change))
    with pytest.raises(ValueError, match=rf"r\.json: key '{key}'"):
        tables.load_records([path])


def test_two_suites_do_not_share_a_table(tmp_path):
    for name, suite in (("a", "real"), ("b", "embedded")):
        (tmp_path / f"{name}.json").write_text(json.dumps(RECORDS[0] | {"suite": suite}))
    with pytest.raises(ValueError, match=r"b\.json: key 'suite'"):
        tables.load_records(sorted(tmp_path.iterdir()))


def test_the_notes_are_typeset_in_latex(tmp_path):
    render.render_report(RECORDS, tmp_path, published=False)
    tex = (tmp_path / "base_to_novel.tex").read_text()
    assert "%" not in tex
    assert "±" not in tex
    assert "\n\\* A generated stand-in" in (tmp_path / "base_to_novel.md").read_text()


@given(st.floats(0, 100), st.floats(0, 100))
def test_harmonic_mean_lies_between_and_below_the_mean(a, b):
    h = tables.harmonic_mean(a, b)
    assert h == tables.harmonic_mean(b, a)
    assert min(a, b) - 1e-9 <= h <= (a + b) / 2 + 1e-9
