"""The estimate of what the paper preset needs."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from heba.clip.tiny import load_tiny_clip
from heba.methods.heba.model import AdaptedCLIP
from heba.sources.catalog import load_catalog
from pipeline.commands.cli import app
from pipeline.commands.cost import adapter_parameters, table
from pipeline.core.params import ParamsError, load_params

PAPER = Path(__file__).parents[2] / "pipeline" / "presets" / "paper.yaml"


def test_the_paper_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(PAPER.read_text())
    result = CliRunner().invoke(app, ["cost"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    rows = {
        line.split("|")[1].strip(): line.split("|")[2:-1] for line in result.output.splitlines() if "|" in line
    }
    trainings, _, _, _, gigabytes = (float(v) for v in rows["base_to_novel"])
    assert trainings == 33
    assert gigabytes == pytest.approx(33 * 87_158_016 * 2 / 1e9, abs=0.05)
    assert float(rows["total"][0]) == sum(
        float(v[0]) for k, v in rows.items() if k not in ("Protocol", "total") and ":" not in k
    )


def test_zero_shot_clip_passes_once_over_every_data_set_and_variant():
    params, tflops = load_params(PAPER), 0.001
    rows = table(params, tflops, 20, 32)
    flops = rows.loc["zero-shot CLIP", "Test passes, h"] * 3600 * tflops * 1e12
    catalog = load_catalog()
    images = sum(catalog[name].counts.test for name in [*params.datasets, *params.transfer.variants])
    # 17.6 G multiply-adds of a ViT-B/16 without adapters, and the few of the prompts.
    assert flops / images == pytest.approx(2 * 17.6e9, rel=0.1)
    assert rows.loc["total", "Test passes, h"] == pytest.approx(rows["Test passes, h"].iloc[:-1].sum())
    assert rows.loc["zero-shot CLIP", "Trainings"] == 0


def test_the_size_of_the_adapters_needs_no_model():
    adapter = load_params(PAPER).adapter
    assert adapter_parameters("ViT-B-16-quickgelu", adapter) == 87_158_016
    assert adapter_parameters("tiny", adapter.model_copy(update={"end": 4})) == sum(
        p.numel() for p in AdaptedCLIP(load_tiny_clip()[0], 1, 4, 0.1).adapters.parameters()
    )


def test_the_embedded_suite_is_refused():
    with pytest.raises(ParamsError, match="preset paper"):
        CliRunner().invoke(app, ["cost"], catch_exceptions=False)
