"""The estimate of what the paper preset needs."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from typer.testing import CliRunner

from benchmarks import gpu
from heba import methods
from heba.clip.tiny import load_tiny_clip
from heba.evaluation.cost import Cost
from heba.methods.heba.model import AdaptedCLIP
from heba.sources.catalog import load_catalog
from pipeline.commands.cli import app
from pipeline.commands.cost import FROZEN, adapter_bytes, built, table, without_weights
from pipeline.commands.presets import FOLDER
from pipeline.core.params import ParamsError, load_params
from pipeline.core.trainings import trainings
from pipeline.report import cost, render
from pipeline.stages.cost import count
from tests.heba import third
from tests.pipeline.records import record

PAPER, DEMO = FOLDER / "paper.yaml", FOLDER / "demo.yaml"


FEW = ["zero_shot", "gda", "tcp", "mma", "heba"]


@pytest.mark.parametrize("listed", [FEW, pytest.param(None, id="all", marks=pytest.mark.slow)])
def test_the_paper_preset(tmp_path, monkeypatch, listed):
    monkeypatch.chdir(tmp_path)
    raw = yaml.safe_load(PAPER.read_text())
    Path("params.yaml").write_text(yaml.safe_dump(raw | ({"methods": listed} if listed else {})))
    result = CliRunner().invoke(app, ["cost"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    lines = [line.split("|")[1:-1] for line in result.stdout.splitlines() if "|" in line]
    _, _, *rows = [[cell.strip() for cell in line] for line in lines]
    rows = {(protocol, method): [float(value) for value in values] for protocol, method, *values in rows}
    trainings, steps, _, _, gigabytes, _ = rows["base_to_novel", "HeBA"]
    assert (trainings, steps) == (33, 98820)
    assert gigabytes == pytest.approx(33 * 87_158_016 * 2 / 1e9, abs=0.05)
    weights = 0.6  # GB of a ViT-B/16 with its text tower: 150 M parameters, in fp32
    assert rows["base_to_novel", "CLIP"] == [33, 0, 0, 0, 0, weights]
    *total, most = rows.pop(("total", ""))
    *columns, memory = zip(*rows.values(), strict=True)
    assert most == max(memory)
    # Whose texts or images go through a tower with a backward, keeps what that needs of all classes or images.
    params = load_params()
    about = [methods.part(method, "settings") for method in params.methods]
    keeping = {a.TITLE for m, a in zip(params.methods, about, strict=True) if a.FAMILY in ("prompt", "tower")}
    assert {title for (_, title), gb in zip(rows, memory, strict=True) if gb > weights} == keeping
    assert total[:2] == [201 * len(params.methods), sum(values[1] for values in rows.values())]
    assert total == pytest.approx([sum(column) for column in columns], abs=0.3)


def test_a_measured_speed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw = yaml.safe_load(PAPER.read_text()) | {"methods": ["coop"]}
    Path("params.yaml").write_text(yaml.safe_dump(raw))
    rows = [
        {"backbone": gpu.B16, "way": way, "images": n, "classes": 50, "tflop": tflop, "ms": ms}
        for way, n, tflop, ms in [("plain", 16, 2.0, 90), ("ours", 16, 2.0, 24), ("ours", 4, 1.0, 14)]
    ]
    found = gpu.speed([*rows, {"backbone": gpu.B16, "ok": True}], "a GPU")
    assert found == {"device": "a GPU", "tflops": pytest.approx(100), "overhead_ms": pytest.approx(4), "sizes": 2}
    Path("speed.json").write_text(json.dumps(found))
    result = CliRunner().invoke(app, ["cost", "--speed", "speed.json"], catch_exceptions=False)
    assert "100 TFLOP/s, 4 ms overhead a step, as measured on a GPU, 32 tokens" in result.output
    given = ["cost", "--tflops", "100", "--overhead-ms", "4"]
    other = CliRunner().invoke(app, given, catch_exceptions=False).output
    assert other.splitlines()[1:] == result.output.splitlines()[1:]
    Path("speed.json").write_text('{"tflops": 0}')
    with pytest.raises(ParamsError, match=r"speed\.json: .*benchmarks\.gpu --out"):
        CliRunner().invoke(app, ["cost", "--speed", "speed.json"], catch_exceptions=False)


def test_frozen_features_pass_once_over_every_data_set_and_variant():
    params, tflops = load_params(PAPER).model_copy(update={"methods": ["zero_shot", "heba"]}), 0.001
    rows = table(params, tflops, 20, 32)
    flops = rows.loc[(FROZEN, "all"), "Test passes, h"] * 3600 * tflops * 1e12
    catalog = load_catalog()
    images = sum(catalog[name].counts.test for name in [*params.datasets, *params.transfer.variants])
    # 17.6 G multiply-adds of a ViT-B/16 without adapters, and the few of the prompts.
    assert flops / images == pytest.approx(2 * 17.6e9, rel=0.1)
    assert rows.loc[("total", ""), "Test passes, h"] == pytest.approx(rows["Test passes, h"].iloc[:-1].sum())
    # A method on these features takes none of its own.
    assert (rows.xs("CLIP", level="Method")["Test passes, h"] == 0).all()
    assert (rows.xs("HeBA", level="Method")["Test passes, h"] > 0).all()


def test_a_listed_method_alone_has_rows(tmp_path, monkeypatch):
    """Also one that cannot do a protocol, and then has no row of it."""
    raw = yaml.safe_load(PAPER.read_text()) | {"methods": ["probe"], "probe": {}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    with third.installed(tmp_path / "methods"):
        params = load_params(tmp_path / "params.yaml")
        rows = table(params, 60, 20, 32)
        assert bytes_of(params, "probe") == 2 * 512 * 2  # of two classes, in half precision
    protocols = [protocol for protocol, _ in rows.index]
    assert protocols == ["base_to_novel", "cross_dataset and domain_generalization", "few_shot", FROZEN, "total"]
    assert rows.loc[("few_shot", "Probe"), "Trainings"] == 165


def bytes_of(params, method="heba"):
    listed = trainings(params)
    return adapter_bytes(params, next(t for t in listed if (t.method, t.protocol) == (method, "base_to_novel")))


def test_the_size_of_the_adapters_needs_no_weights(tmp_path):
    assert bytes_of(load_params(PAPER)) == 2 * 87_158_016
    model = AdaptedCLIP(load_tiny_clip()[0], 1, 4, 0.1)
    half = bytes_of(load_params(DEMO))
    assert half == 2 * sum(p.numel() for p in model.adapters.parameters())
    raw = yaml.safe_load(DEMO.read_text()) | {"adapter_dtype": "fp32"}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    assert bytes_of(load_params(tmp_path / "params.yaml")) == 2 * half


def test_what_autograd_keeps_is_what_it_really_keeps():
    """Counted without weights, and measured on a real model: all that the graph holds, but for the parameters. The
    real one has a fused attention, which does not keep its weights."""
    params = load_params(DEMO)
    with built(params, "heba", "base_to_novel") as model:
        counted = count(without_weights("tiny", Path()), model, 32)
    clip = load_tiny_clip()[0].requires_grad_(False)
    model = AdaptedCLIP(clip, 1, 4, 0.1)
    weights = {p.untyped_storage().data_ptr() for p in [*clip.parameters(), *clip.buffers(), *model.parameters()]}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.encode_image(torch.zeros(1, 3, 32, 32))
    real = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in weights)
    assert 1.2 * real > counted.image.kept >= real > 1_000_000


def test_the_embedded_suite_is_refused():
    with pytest.raises(ParamsError, match="preset paper"):
        CliRunner().invoke(app, ["cost"], catch_exceptions=False)


def test_what_a_method_costs_stands_beside_its_accuracy(tmp_path):
    about = {"trained_parameters": 1_500_000, "adapter_bytes": 3_000_000}
    records = [
        record("zero_shot", "dtd", 1, (50.0, 60.0)),
        record("heba", "dtd", 1, (70.0, 60.0), **about),
        record("heba", "eurosat", 1, (70.0, 60.0), **about | {"trained_parameters": 500_000}),
    ]
    costs = {
        "zero_shot": Cost(image=10**9, step=0, steps=0),
        "heba": Cost(image=2 * 10**9, step=345 * 10**9, steps=9),
    }
    lines = [("embedded", "tiny", "CPU", "heba", 2, 3.5, 12.345), ("real", "tiny", "CPU", "heba", 2, 9.0, 9.0)]
    pd.DataFrame(lines, columns=list(cost.COLUMNS)).to_csv(tmp_path / "timings.csv", index=False)
    timings = cost.read(tmp_path / "timings.csv", "embedded", "tiny")
    render.render_report(records, ["zero_shot", "heba"], tmp_path, False, costs=costs, timings=timings)
    text = (tmp_path / "cost.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    assert rows[0][:7] == [
        *("Method", "Trained parameters", "Adapter, MB", "GFLOP a step", "GFLOP an image", "ms a step"),
        "s a training",
    ]
    assert rows[2][:7] == ["CLIP", "0", "<0.001", "–", "1", "–", "–"]
    assert rows[3][:7] == ["HeBA", "1,000,000", "3", "345", "2", "12.3", "3.5"]
    assert rows[0][7:10] == ["Base", "Novel", "H"]
    assert "runs on CPU" in text
    (tmp_path / "timings.csv").write_text("method\n")
    with pytest.raises(ValueError, match=r"timings\.csv: has the columns method; .*cost --measured"):
        cost.read(tmp_path / "timings.csv", "embedded", "tiny")
