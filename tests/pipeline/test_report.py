"""The tables, by hand; the files, as a reader opens them."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from heba import methods
from heba.data.protocols import PROTOCOLS
from heba.evaluation.cost import Cost, write_cost
from heba.evaluation.record import read_record, write_record
from pipeline.commands import presets
from pipeline.commands.cli import app
from pipeline.core.params import load_params
from pipeline.core.trainings import Evaluation, Training, cost_path, evaluations
from pipeline.report import formats, metrics, provenance, render, selection, tables
from tests.heba import third
from tests.pipeline.records import METHODS, RECORDS, pair, record
from tests.pipeline.repository import ROOT


def tidy(records, protocol="base_to_novel", names=METHODS):
    """The tidy table, by data set, method, shots and group."""
    found = tables.tidy_table(tables.long_table(records), protocol, names)
    return found.set_index(["dataset", "method", "shots", "group"])


def shown(records, protocol, names=METHODS):
    """The cells of each table by its title, with the methods as index, and the notes."""
    table = tables.tidy_table(tables.long_table(records), protocol, names)
    found = tables.blocks(table, protocol, names, True, False)
    cells = {block.title: block.cells.set_index("Method") for block in found}
    return cells, render.notes(records, table, protocol, names)


def test_the_long_table_has_a_row_per_record_and_group():
    table = tables.long_table(RECORDS)
    columns = ["protocol", "dataset", "method", "seed", "shots", "group", "accuracy", "n"]
    assert list(table.columns) == columns
    assert len(table) == 8 * 2 + 4
    rows = list(table.itertuples(index=False, name=None))
    assert rows[:3] == [
        ("base_to_novel", "dtd", "zero_shot", 1, 16, "base", 50.0, 100),
        ("base_to_novel", "dtd", "zero_shot", 1, 16, "novel", 60.0, 100),
        ("base_to_novel", "dtd", "heba", 1, 16, "base", 70.0, 100),
    ]
    assert rows[-1] == ("cross_dataset", "eurosat", "heba", 1, 16, "all", 45.0, 100)
    assert list(tables.long_table([]).columns) == columns


def test_base_to_novel_by_hand():
    table = tidy(RECORDS)
    assert table.loc[("dtd", "heba", 16, "base"), "accuracy"] == 72
    assert table.loc[("dtd", "heba", 16, "base"), "std"] == pytest.approx(8**0.5)
    assert table.loc[("dtd", "heba", 16, "h"), "accuracy"] == pytest.approx(2 * 72 * 62 / (72 + 62))
    average = table.sort_index().loc[("average", "heba", 16)]
    assert average.loc["base", "accuracy"] == 81
    assert average.loc["novel", "accuracy"] == 47
    # H of the averages, not the average of H.
    assert average.loc["h", "accuracy"] == pytest.approx(2 * 81 * 47 / (81 + 47))
    assert average.loc["base", "std"] == pytest.approx(2**0.5)
    assert table["std"].xs("zero_shot", level="method").isna().all()
    assert set(table["seeds"]) == {2}
    assert list(dict.fromkeys(table.index.get_level_values("dataset"))) == ["dtd", "eurosat", "average"]


def test_transfer_by_hand():
    table = tidy(RECORDS, "cross_dataset")["accuracy"]
    assert [table[d, "heba", 16, "all"] for d in ("dtd", "eurosat", "average")] == [35, 45, 40]
    (cells,) = shown(RECORDS, "cross_dataset")[0].values()
    assert list(cells.columns) == ["DTD*", "EuroSAT*", "Average of 2"]
    assert list(cells.loc["HeBA"]) == ["35.00", "45.00", "40.00"]


def few_shot_records():
    def few(dataset, seed, shots, heba):
        return pair(dataset, seed, (40.0,), (heba,), "few_shot", shots=shots)

    found = [few("dtd", 1, 1, 50.0), few("dtd", 2, 1, 54.0), few("dtd", 1, 16, 80.0), few("dtd", 2, 16, 80.0)]
    found += [few("eurosat", 1, 1, 60.0), few("eurosat", 2, 1, 60.0), few("eurosat", 1, 16, 90.0)]
    return [r for records in found for r in records]


def test_few_shot_by_hand():
    records = few_shot_records()
    table = tidy(records, "few_shot")
    assert table.loc[("dtd", "heba", 1, "all"), "accuracy"] == 52
    assert table.loc[("dtd", "heba", 1, "all"), "std"] == pytest.approx(8**0.5)
    assert table.loc[("average", "heba", 1, "all"), "accuracy"] == 56
    assert table.loc[("average", "heba", 1, "all"), "std"] == pytest.approx(2**0.5)
    assert table.loc[("average", "heba", 16, "all"), "accuracy"] == 85
    assert table.isna().loc[("average", "heba", 16, "all"), "std"]
    assert [table.loc[(d, "heba", 16, "all"), "seeds"] for d in ("dtd", "eurosat", "average")] == [2, 1, 1]
    assert tables.incomplete(tables.long_table(records), "few_shot", METHODS) == {"eurosat": METHODS}
    cells, _ = shown(records, "few_shot")
    assert list(cells) == ["Average of 2", "DTD*", "EuroSAT*"]
    assert list(cells["DTD*"].columns) == ["1 shot", "16 shots"]
    assert list(cells["DTD*"].loc["HeBA"]) == ["52.00 ± 2.83", "80.00 ± 0.00"]


def test_a_missing_seed_is_named_and_the_average_says_over_how_many():
    records = RECORDS[:6]
    cells, notes = shown(records, "base_to_novel")
    assert "Fewer seeds than the others: EuroSAT (CLIP, HeBA)." in notes
    assert next(iter(cells)) == "Average of 2"
    assert tidy(records).isna().loc[("average", "heba", 16, "base"), "std"]


def test_one_method_that_lacks_a_seed_or_a_data_set_is_named_and_has_no_wrong_average():
    lacks_seed = [r for r in RECORDS if (r.dataset, r.method, r.seed) != ("eurosat", "heba", 2)]
    table = tidy(lacks_seed)
    assert table.loc[("eurosat", "heba", 16, "novel"), "accuracy"] == 30
    assert [table.loc[(d, "heba", 16, "base"), "seeds"] for d in ("dtd", "eurosat", "average")] == [2, 1, 1]
    assert table.isna().loc[("average", "heba", 16, "base"), "std"]
    assert "Fewer seeds than the others: EuroSAT (HeBA)." in shown(lacks_seed, "base_to_novel")[1]
    lacks_set = [r for r in RECORDS if (r.dataset, r.method) != ("eurosat", "heba")]
    table = tidy(lacks_set)["accuracy"]
    # The average of dtd alone would stand beside that of both data sets.
    assert table["average", "zero_shot", 16, "base"] == 45
    assert table.sort_index()["average", "heba"].isna().all()
    assert ("eurosat", "heba", 16, "base") not in table.index
    cells, notes = shown(lacks_set, "base_to_novel")
    assert list(cells["EuroSAT*"].loc["HeBA"]) == list(cells["Average of 2"].loc["HeBA"]) == [""] * 3
    assert "Fewer seeds than the others: EuroSAT (HeBA)." in notes
    (cross,) = shown(lacks_set, "cross_dataset")[0].values()
    assert list(cross.loc["HeBA", ["EuroSAT*", "Average of 2"]]) == ["", ""]


def test_one_seed_has_no_deviation():
    one = [r for r in RECORDS if r.seed == 1]
    assert tidy(one)["std"].isna().all()
    cells, notes = shown(one, "base_to_novel")
    assert not any("±" in block.to_string() for block in cells.values())
    assert not any("Fewer seeds" in note for note in notes)


def test_one_method_alone_is_not_the_best(tmp_path):
    records = [r for r in [*RECORDS, *few_shot_records()] if r.method == "heba"]
    render.render_report(records, ["heba"], tmp_path, published=False)
    assert "**81" not in (tmp_path / "base_to_novel.md").read_text()
    assert "Against" not in (tmp_path / "index.html").read_text()
    drawn = sorted(path.stem for path in (tmp_path / "figures").iterdir())
    parameters = [f"{protocol}_parameters" for protocol in ("base_to_novel", "cross_dataset", "few_shot")]
    assert drawn == sorted(["base_to_novel_scatter", "few_shot_average", "few_shot_datasets", *parameters])


def test_the_best_is_bold_and_the_second_underlined_as_they_are_printed():
    accuracies = {"zero_shot": 60.0, "heba": 60.004, "probe": 50.0}
    rows = [("dtd", name, 16, "base", value, float("nan"), 1) for name, value in accuracies.items()]
    table = tables.pd.DataFrame(rows, columns=list(tables.TIDY))
    column = [("Base", "dtd", 16, "base")]
    names = ["zero_shot", "heba"]
    assert list(tables.block("", table, "base_to_novel", names, column, []).ranks["Base"]) == [1, 1]
    cells = tables.pd.DataFrame([["a_b*", "1.00 ± 2.00"], ["c", "0.50"], ["d", ""]], columns=["Method", "Base"])
    ranks = tables.pd.DataFrame([[0, 1], [0, 2], [0, 0]], columns=cells.columns)
    block = tables.Block("x & y", cells, ranks)
    assert formats.markdown(block).splitlines()[2:4] == ["| a_b\\* | **1.00 ± 2.00** |", "| c | <u>0.50</u> |"]
    assert "<td>a_b*</td><td><b>1.00 ± 2.00</b></td>" in formats.table_html(block)
    assert r"a\_b* & \textbf{1.00 $\pm$ 2.00} \\" in formats.latex(block)
    assert r"c & \underline{0.50} \\" in formats.latex(block)
    assert r"\textbf{x \& y}" in formats.latex(block)


@pytest.fixture
def probe(tmp_path):
    """A third method, which cannot classify new classes."""
    with third.installed(tmp_path / "methods") as name:
        yield name


def test_a_third_method_stands_between_the_others(probe):
    names = ["zero_shot", probe, "heba"]
    records = [*RECORDS, *(record(probe, d, s, (60.0 + s,)) for d in ("dtd", "eurosat") for s in (1, 2))]
    table, before = tidy(records, names=names), tidy(RECORDS)
    assert before.sort_index().equals(table.drop(probe, level="method").sort_index())
    row = table.loc[("dtd", "probe", 16, "base")]
    assert row["accuracy"] == table.loc[("average", "probe", 16, "base"), "accuracy"] == 61.5
    assert row["std"] == pytest.approx(0.5**0.5)
    cells, notes = shown(records, "base_to_novel", names)
    assert list(cells["DTD*"].index) == ["CLIP", "Probe", "HeBA"]
    assert cells["DTD*"].loc["Probe", "Base"] == "61.50 ± 0.71"
    assert not any("Fewer seeds" in note for note in notes)


def test_a_method_that_cannot_do_new_classes_has_gaps_and_the_reason_below(probe, tmp_path):
    records = [*RECORDS, *(record(probe, d, s, (60.0,)) for d in ("dtd", "eurosat") for s in (1, 2))]
    records += [record(probe, "dtd", 1, (33.0,), "few_shot"), *pair("dtd", 1, (30.0,), (35.0,), "few_shot")]
    names = ["zero_shot", "heba", probe]
    reason = "–: cannot classify classes that it was not trained on (Probe)."
    assert set(tidy(records, names=names).sort_index().loc[("dtd", "probe", 16)].index) == {"base"}
    cells, notes = shown(records, "base_to_novel", names)
    for block in cells.values():
        assert list(block.loc["Probe"]) == ["60.00 ± 0.00", "–", "–"]
    assert reason in notes
    cells, notes = shown(records, "cross_dataset", names)
    (cross,) = cells.values()
    assert list(cross.loc["Probe"]) == ["–"] * 3
    assert reason in notes
    assert not any("Fewer seeds" in note for note in notes)
    cells, notes = shown(records, "few_shot", names)
    assert cells["DTD*"].loc["Probe", "16 shots"] == "33.00"
    assert reason not in notes
    render.render_report(records, names, tmp_path, published=False)
    for file in ("README.md", "index.html", "base_to_novel.md", "cross_dataset.md"):
        assert reason in (tmp_path / file).read_text(encoding="utf-8")
    tex = (tmp_path / "base_to_novel.tex").read_text(encoding="utf-8")
    assert "–" not in tex
    assert "--: cannot" in tex
    assert "–" not in (tmp_path / "base_to_novel.csv").read_text(encoding="utf-8")
    averages = json.loads((tmp_path / "averages.json").read_text())
    assert averages["base_to_novel"]["average"]["probe"] == {"base": 60}


def test_own_data_counts_in_no_average():
    mine = [r for seed in (1, 2) for r in pair("my_set", seed, (10.0, 10.0), (20.0, 10.0))]
    table = tidy([*RECORDS, *mine])
    assert list(dict.fromkeys(table.index.get_level_values("dataset"))) == ["dtd", "eurosat", "my_set", "average"]
    assert table.drop("my_set", level="dataset").equals(tidy(RECORDS))
    cells, notes = shown([*RECORDS, *mine], "base_to_novel")
    assert list(cells) == ["Average of 2 benchmarks", "DTD*", "EuroSAT*", "my_set"]
    assert "Own data, in no average: my_set." in notes
    assert "average" not in tidy(mine).index.get_level_values("dataset")
    assert "my_set" in render.summary_text(mine, METHODS)


def test_files(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        render.render_report(RECORDS, METHODS, tmp_path / name, published=False)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert {str(file) for file in files if file.parent == Path()} == set(render.FILES)
    assert len(files) > len(render.FILES)
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    page = (tmp_path / "a" / "index.html").read_text()
    assert not re.search(r"https?://", re.sub(r'xmlns(:\w+)?="[^"]*"', "", page))  # a name, which nobody opens
    assert page.count("<svg") == len(files) - len(render.FILES)
    assert all(s.startswith("#") for s in re.findall(r'(?:src|href)="([^"]*)', page))
    for file in ("index.html", "README.md", "base_to_novel.md", "base_to_novel.tex"):
        assert "no paper result" in (tmp_path / "a" / file).read_text()
    assert "published" not in (tmp_path / "a" / "base_to_novel.md").read_text()
    assert "nor in its average: ImageNet, Caltech101" in (tmp_path / "a" / "base_to_novel.md").read_text()
    averages = json.loads((tmp_path / "a" / "averages.json").read_text())
    assert averages["base_to_novel"]["average"]["heba"]["base"] == 81
    # A protocol that is off has files that can be read and pasted all the same.
    assert "no results" in (tmp_path / "a" / "domain_generalization.md").read_text()
    assert (tmp_path / "a" / "domain_generalization.tex").read_text().startswith("%")
    assert list(tables.pd.read_csv(tmp_path / "a" / "domain_generalization.csv").columns) == list(tables.TIDY)


def test_the_losses_are_drawn_by_method_and_data_set(tmp_path):
    epochs = [("heba", d, e, 2.0 / e) for d in ("dtd", "eurosat") for e in (1, 2, 3)]
    frame = tables.pd.DataFrame(epochs, columns=["method", "dataset", "epoch", "loss"])
    render.render_report(RECORDS, METHODS, tmp_path, published=False, epochs=frame)
    drawn = (tmp_path / "figures" / "losses.svg").read_text()
    assert "HeBA" in drawn
    assert "CLIP" not in drawn  # which has no epochs
    assert drawn.count("DTD") == drawn.count("EuroSAT") == 1
    assert "figures/losses.svg" in (tmp_path / "README.md").read_text()
    assert drawn.strip() in (tmp_path / "index.html").read_text()


def test_metrics_are_few(tmp_path):
    records = [*RECORDS, *few_shot_records()]
    records += [
        r for k in (2, 4, 8) for d in ("dtd", "eurosat") for r in pair(d, 1, (1.0,), (2.0,), "few_shot", shots=k)
    ]
    render.render_report(records, METHODS, tmp_path, published=False)
    averages = json.loads((tmp_path / "averages.json").read_text())
    assert averages["few_shot"]["average"]["heba"] == {"1": 56, "16": 85}
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found == {
        "heba": {"base": 81.0, "novel": 47.0, "h": 59.48, "cross": 40.0, "few_shot": 85.0},
        "best": {"h": 59.48, "cross": 40.0, "few_shot": 85.0},
    }
    # As many with all methods; of own data, the scores alone.
    names = [*(name for name in methods.names() if name != "heba"), "heba"]
    records = [r for name in names for r in (record(name, d, 1, (50.0, 50.0)) for d in ("dtd", "mine"))]
    assert metrics.headline(render.tidied(records, names), "heba") == {
        "heba": {"base": 50.0, "novel": 50.0, "h": 50.0},
        "best": {"h": 50.0},
        "mine": {"heba_h": 50.0, "best_h": 50.0},
    }


def test_each_number_leads_to_its_run(tmp_path):
    """By the tags of a training's run in MLflow."""
    record = RECORDS[0].model_copy(update={"adapter_sha256": "a1", "inputs_sha256": "b2"})
    render.render_report([record, *RECORDS[1:]], METHODS, tmp_path, published=False)
    table = tables.pd.read_csv(tmp_path / "evaluations.csv", dtype=str)
    assert len(table) == 20
    assert list(table.iloc[0]) == (
        ["base_to_novel", "dtd", "zero_shot", "16", "1", "base", "50.0", "100", "a1", "b2"]
    )


def test_the_hashes_under_a_table_are_of_what_it_was_made_of(evaluated):
    params = load_params()
    records, _ = selection.select(params)
    before = provenance.lines(params, records)
    assert before == provenance.lines(params, records)
    assert "weights" not in before["few_shot"][1]
    stage = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["report"]
    assert list(provenance.PARAMS) == stage["params"]
    assert str(provenance.BACKBONE) in stage["deps"]
    # A training of few_shot with other settings, data or code changes its line and no other.
    changed = [r.model_copy(update={"inputs_sha256": "1"}) if r.protocol == "few_shot" else r for r in records]
    after = provenance.lines(params, changed)
    assert [name for name in before if before[name] != after[name]] == ["few_shot"]
    other = provenance.lines(params.model_copy(update={"shots": 4}), records)
    assert all(before[name][1] != other[name][1] for name in before)
    provenance.BACKBONE.write_text(json.dumps(backbone() | {"sha256": "c3" * 32}))
    assert "weights of the backbone c3c3c3c3c3c3," in provenance.lines(params, records)["few_shot"][1]
    provenance.BACKBONE.write_text(json.dumps(backbone() | {"name": "other", "sha256": "c3" * 32}))
    assert provenance.lines(params, records) == before


def test_published_rows_stand_apart_and_name_their_source(tmp_path):
    records = [r.model_copy(update={"suite": "real"}) for r in RECORDS]
    render.render_report(records, METHODS, tmp_path, published=True)
    text = (tmp_path / "base_to_novel.md").read_text()
    assert "HeBA (published)" in text
    assert "81.35" in text
    assert "github" in text
    assert "no paper result" not in text
    assert "published" not in (tmp_path / "base_to_novel.csv").read_text()


def test_a_malformed_record_is_named(tmp_path):
    path = tmp_path / "r.json"
    path.write_text(json.dumps(RECORDS[0].model_dump(exclude={"seed"})))
    with pytest.raises(ValueError, match=r"r\.json: .*key 'seed'"):
        read_record(path)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"groups": None}, "key 'groups'"),
        ({"groups": {}}, "groups: must be among base, novel"),
        ({"groups": {"all": RECORDS[-1].model_dump()["groups"]["all"]}}, "groups: must be among base, novel"),
        ({"groups": {"base": {"accuracy": float("nan")}}}, "key 'groups.base.accuracy'"),
        ({"groups": {"base": {"accuracy": True}}}, "key 'groups.base.accuracy'"),
        ({"groups": {"base": {"accuracy": 101.0}}}, "key 'groups.base.accuracy'"),
        ({"protocol": "other"}, "unknown protocol 'other'"),
        ({"more": 1}, "key 'more'"),
    ],
)
def test_a_wrong_value_is_named(tmp_path, change, key):
    record = RECORDS[0].model_dump()
    if isinstance(change.get("groups"), dict):
        change = {"groups": {g: record["groups"].get(g, {}) | v for g, v in change["groups"].items()}}
    path = tmp_path / "r.json"
    path.write_text(json.dumps(record | change))
    with pytest.raises(ValueError, match=rf"r\.json: .*{key}"):
        read_record(path)


def test_the_notes_are_typeset_in_latex(tmp_path):
    render.render_report(RECORDS, METHODS, tmp_path, published=False)
    tex = (tmp_path / "base_to_novel.tex").read_text()
    assert "%" not in tex
    assert "±" not in tex
    assert "\n\\* A generated stand-in" in (tmp_path / "base_to_novel.md").read_text()


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
    """A folder with params.yaml and the evaluations of four trainings of either method that it asks for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    for name in ("ablation.csv", "timings.csv"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "out" / "cost").mkdir(parents=True)
    for name in methods.names():
        write_cost(Cost(image=0, step=0, steps=0), tmp_path / cost_path(name))
    params = yaml.safe_load((ROOT / "params.yaml").read_text()) | {
        "datasets": ["imagenet", "dtd"],
        "methods": METHODS,
        "seeds": [1, 2],
    }
    params["transfer"] |= {"targets": ["dtd"], "seeds": [1]}
    params["few_shot"] |= {"datasets": ["dtd"], "seeds": [1], "shots": [4]}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    for one in (
        *pair("dtd", 1, (50.0, 60.0), (70.0, 60.0)),
        *pair("dtd", 2, (50.0, 60.0), (74.0, 64.0)),
        *pair("dtd", 1, (30.0,), (35.0,), "cross_dataset"),
        *pair("dtd", 1, (30.0,), (35.0,), "few_shot", shots=4),
    ):
        put(one)
    return tmp_path


def put(one):
    """Write a record to where its evaluation does."""
    trained_as, source = PROTOCOLS[one.protocol].trained_as, one.source or one.dataset
    path = Evaluation(
        one.protocol, one.dataset, Training(trained_as, source, one.method, one.shots, one.seed)
    ).path
    path.parent.mkdir(parents=True, exist_ok=True)
    write_record(one, path)
    return path


def report():
    """The command, in the folder: what it says on stderr, and averages.json."""
    result = CliRunner().invoke(app, ["report"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stderr, json.loads(Path("reports/averages.json").read_text())


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
        ("base_to_novel", {"method": "zero_shot", "seed": 3}),
        ("few_shot", {"shots": 8}),
        ("few_shot", {"shots": 4, "seed": 2}),
    ],
)
def test_a_record_of_another_params_file_is_left_out_and_named(evaluated, protocol, other):
    n = 2 if protocol == "base_to_novel" else 1
    params = load_params()
    wanted = {evaluation.path for evaluation in evaluations(params)}
    before, none = selection.select(params)
    assert (len(before), none) == (8, [])
    usual = {"method": "heba", "dataset": "dtd", "seed": 1, "accuracies": (1.0,) * n, "protocol": protocol}
    path = put(record(**usual | other))
    after, left_out = selection.select(params)
    assert left_out == [path]
    assert len(after) == (7 if path in wanted else 8)
    assert all(kept in before for kept in after)
    assert (
        selection.left_out_text(left_out)
        == f"left out, since params.yaml does not ask for it: 1 evaluation, {path}"
    )


def test_a_record_that_lacks_a_group_is_named(evaluated):
    path = put(record("heba", "dtd", 1, (70.0,)))
    with pytest.raises(ValueError, match=rf"{path}: groups\.novel is missing; evaluate this data set again"):
        selection.select(load_params())


def backbone():
    return load_params().backbone.model_dump()


def test_records_left_over_from_the_demo_do_not_stop_the_report_of_the_real_suite(evaluated):
    presets.write("paper")
    said, averages = report()
    assert averages == {}
    assert "8 evaluations" in said
    assert said.strip().endswith(" and 5 more")
    for one in pair("dtd", 1, (50.0, 60.0), (71.0, 60.0), suite="real", backbone=backbone()):
        put(one)
    said, averages = report()
    assert "6 evaluations" in said
    assert averages["base_to_novel"]["average"]["heba"]["base"] == 71
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
    for one in pair("dtd", 1, (50.0, 60.0), (71.0, 60.0), suite="real", backbone=backbone()):
        put(one)
    report()
    assert "my_weights/100%<a>.pt" in (evaluated / "reports" / "base_to_novel.md").read_text()
    assert "my_weights/100%&lt;a&gt;.pt" in (evaluated / "reports" / "index.html").read_text()
    assert r"my\_weights/100\%" in (evaluated / "reports" / "base_to_novel.tex").read_text()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex (Debian: texlive-latex-extra)")
def test_the_latex_compiles_as_it_is_pasted(tmp_path):
    records = [*RECORDS, *few_shot_records()]
    records += [r for seed in (1, 2) for r in pair("my_set", seed, (10.0, 10.0), (20.0, 10.0))]
    wide = [dataset for dataset in PROTOCOLS["cross_dataset"].complete if dataset not in ("dtd", "eurosat")]
    for seed, dataset in enumerate([*wide, *wide]):
        records += pair(dataset, seed, (50.0,), (60.0 + seed,), "cross_dataset")
        records += pair(dataset, seed, (50.0, 60.0), (60.0 + seed, 70.0))
    made = {"few_shot": ["50 % of a_b & c#"]}
    render.render_report(records, METHODS, tmp_path, published=True, made=made)
    pasted = "\n".join(path.read_text(encoding="utf-8") for path in sorted(tmp_path.glob("*.tex")))
    text = (
        f"\\documentclass{{article}}\n\\usepackage{{booktabs}}\n\\begin{{document}}\n{pasted}\n\\end{{document}}\n"
    )
    (tmp_path / "page.tex").write_text(text, encoding="utf-8")
    command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "page.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    too_wide = [float(points) for points in re.findall(r"Overfull \\hbox \((\S+)pt too wide", done.stdout)]
    assert max(too_wide, default=0.0) < 1, too_wide
