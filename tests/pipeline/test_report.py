"""The tables, by hand; the files, as a reader opens them."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from pipeline.commands import presets
from pipeline.commands.cli import app
from pipeline.core.params import load_params
from pipeline.core.paths import evaluate_path
from pipeline.report import render, selection, tables
from tests.pipeline.repository import ROOT


def record(dataset, seed, zero, heba, protocol="base_to_novel", suite="embedded"):
    names = ("base", "novel") if protocol == "base_to_novel" else ("all",)
    groups = {
        g: {"zero_shot": {"accuracy": z}, "heba": {"accuracy": h}}
        for g, z, h in zip(names, zero, heba, strict=True)
    }
    about = {"protocol": protocol, "suite": suite, "backbone": {"name": "tiny", "pretrained": "embedded"}}
    return about | {"dataset": dataset, "seed": seed, "shots": 16, "groups": groups}


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
        tables.load_record(path)


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
        tables.load_record(path)


def test_the_notes_are_typeset_in_latex(tmp_path):
    render.render_report(RECORDS, tmp_path, published=False)
    tex = (tmp_path / "base_to_novel.tex").read_text()
    assert "%" not in tex
    assert "±" not in tex
    assert "\n\\* A generated stand-in" in (tmp_path / "base_to_novel.md").read_text()


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
    """A folder with params.yaml and four evaluations that it asks for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    shutil.copy(ROOT / "ablation.csv", tmp_path)
    params = yaml.safe_load((ROOT / "params.yaml").read_text()) | {
        "datasets": ["imagenet", "dtd"],
        "seeds": [1, 2],
    }
    params["transfer"] |= {"targets": ["dtd"], "seeds": [1]}
    params["few_shot"] |= {"datasets": ["dtd"], "seeds": [1], "shots": [4]}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    put(record("dtd", 1, (50.0, 60.0), (70.0, 60.0)))
    put(record("dtd", 2, (50.0, 60.0), (74.0, 64.0)))
    put(record("dtd", 1, (30.0,), (35.0,), "cross_dataset"))
    put(record("dtd", 1, (30.0,), (35.0,), "few_shot") | {"shots": 4})
    return tmp_path


def put(evaluation):
    """Write a record to where its evaluation does."""
    path = evaluate_path(*(evaluation[key] for key in ("protocol", "dataset", "seed", "shots")))
    path.parent.mkdir(parents=True, exist_ok=True)
    source = "imagenet" if evaluation["protocol"] in ("cross_dataset", "domain_generalization") else None
    path.write_text(json.dumps({"source": source} | evaluation))
    return str(path)


def report():
    """The command, in the folder: what it says on stderr, and metrics.json."""
    result = CliRunner().invoke(app, ["report"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stderr, json.loads(Path("reports/metrics.json").read_text())


@pytest.mark.parametrize(
    ("protocol", "other"),
    [
        ("base_to_novel", {"seed": 3}),
        ("base_to_novel", {"dataset": "ucf101"}),
        ("base_to_novel", {"dataset": "gone_from_own"}),
        ("base_to_novel", {"seed": 2, "shots": 4}),
        ("base_to_novel", {"seed": 2, "suite": "real"}),
        ("base_to_novel", {"seed": 2, "backbone": {"name": "ViT-B-32", "pretrained": "laion2b_e16"}}),
        ("cross_dataset", {"seed": 2}),
        ("cross_dataset", {"dataset": "ucf101"}),
        ("cross_dataset", {"shots": 4}),
        ("cross_dataset", {"source": "sun397"}),
        ("domain_generalization", {"dataset": "dtd"}),
        ("few_shot", {"shots": 8}),
        ("few_shot", {"shots": 4, "seed": 2}),
    ],
)
def test_a_record_of_another_params_file_is_left_out_and_named(evaluated, protocol, other):
    n = 2 if protocol == "base_to_novel" else 1
    params = load_params()
    wanted = selection.wanted(params)
    before, none = selection.select(params)
    assert (len(before), none) == (4, [])
    path = Path(put(record("dtd", 1, (1.0,) * n, (2.0,) * n, protocol) | other))
    after, left_out = selection.select(params)
    assert left_out == [path]
    assert len(after) == (3 if path in wanted else 4)
    assert all(kept in before for kept in after)
    assert (
        selection.left_out_text(left_out)
        == f"left out, since params.yaml does not ask for it: 1 evaluation, {path}"
    )


def backbone():
    return load_params().backbone.model_dump()


def test_records_left_over_from_the_demo_do_not_stop_the_report_of_the_real_suite(evaluated):
    presets.write("paper")
    said, metrics = report()
    assert metrics == {}
    assert "4 evaluations" in said
    assert said.strip().endswith(" and 1 more")
    put(record("dtd", 1, (50.0, 60.0), (71.0, 60.0), suite="real") | {"backbone": backbone()})
    said, metrics = report()
    assert "3 evaluations" in said
    assert metrics["base_to_novel"]["datasets"]["dtd"]["heba_base"] == 71
    assert "no paper result" not in (evaluated / "reports" / "README.md").read_text()


def test_each_table_says_what_its_adapters_were_trained_with(evaluated):
    report()
    for file in ("README.md", "index.html"):
        text = (evaluated / "reports" / file).read_text()
        assert text.count("16 shots, seeds 1, 2, backbone tiny (embedded).") == 1
        assert text.count("16 shots, seed 1, backbone tiny (embedded).") == 1
    params = yaml.safe_load((evaluated / "params.yaml").read_text())
    params |= {"suite": "real", "backbone": {"name": "ViT-B-16", "pretrained": "my_weights/100%<a>.pt"}}
    (evaluated / "params.yaml").write_text(yaml.safe_dump(params))
    put(record("dtd", 1, (50.0, 60.0), (71.0, 60.0), suite="real") | {"backbone": backbone()})
    report()
    assert "my_weights/100%<a>.pt" in (evaluated / "reports" / "base_to_novel.md").read_text()
    assert "my_weights/100%&lt;a&gt;.pt" in (evaluated / "reports" / "index.html").read_text()
    assert r"my\_weights/100\%" in (evaluated / "reports" / "base_to_novel.tex").read_text()
