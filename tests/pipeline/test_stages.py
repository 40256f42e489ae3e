"""Stages as a user runs them, in a small repository of their own, with real DVC and MLflow."""

import json
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import pytest
import yaml
from PIL import Image

from pipeline.core.params import ParamsError
from tests.pipeline.repository import ROOT, call, copy_code, initialise, stage


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    """A clone with one data set, one variant, one seed and two epochs, reproduced once."""
    folder = tmp_path_factory.mktemp("clone with space")
    copy_code(folder)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params |= {"datasets": ["imagenet", "dtd"], "seeds": [1], "shots": 2}
    params["train"] |= {"epochs": 2, "batch_size": 4}
    params["few_shot"] |= {"datasets": ["dtd"], "shots": [1]}
    params["transfer"] |= {"targets": ["dtd"], "variants": ["imagenet_a"]}
    params["transfer"]["train"] |= {"epochs": 1, "batch_size": 4}
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    initialise(folder)
    done = stage(folder, "repro", "--jobs", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_repro_makes_the_report_and_does_nothing_the_second_time(repo):
    metrics = json.loads((repo / "reports" / "metrics.json").read_text())
    assert set(metrics) == {"base_to_novel", "cross_dataset", "domain_generalization", "few_shot"}
    again = call(repo, "dvc", "repro")
    assert "up to date" in again.stdout
    assert "Running stage" not in again.stdout


def test_every_training_is_a_run_with_its_evaluation(repo):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{repo / 'mlflow.db'}")
    experiments = {e.name: e.experiment_id for e in client.search_experiments()}
    runs = client.search_runs([experiments["base_to_novel"]])
    assert {r.info.run_name for r in runs} == {"dtd-2shot-seed1", "imagenet-2shot-seed1"}
    for run in runs:
        assert run.info.status == "FINISHED"
        assert {"heba_base", "heba_novel", "heba_h", "zero_shot_h", "loss", "lr", "seconds"} <= set(
            run.data.metrics
        )
        assert run.data.tags["dvc.stage"].startswith("train@")
        assert run.data.tags["mlflow.source.git.commit"]
        model = client.get_logged_model(run.outputs.model_outputs[0].model_id)
        artifacts = Path(url2pathname(urlparse(model.artifact_location).path))
        adapter = artifacts / "artifacts" / "base_to_novel-1" / "adapter.safetensors"
        out = repo / "out" / "train" / run.data.params["dataset"] / "base_to_novel-1" / "adapter.safetensors"
        assert adapter.read_bytes() == out.read_bytes()
        assert adapter.stat().st_nlink > 1  # it takes no space of its own
        names = {f.path for f in client.list_artifacts(run.info.run_id, "evaluation")}
        assert any(n.endswith(".png") for n in names)
    (source,) = client.search_runs([experiments["transfer"]])
    assert {"dtd_heba_all", "imagenet_a_heba_all"} <= set(source.data.metrics)


def test_training_again_gives_the_same_bytes_and_tracking_may_fail(repo):
    adapter = repo / "out" / "train" / "dtd" / "base_to_novel-1" / "adapter.safetensors"
    before = adapter.read_bytes()
    done = stage(repo, "train", "--dataset", "dtd", "--seed", "1", MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("MLflow tracking failed") == 1
    assert adapter.read_bytes() == before


def test_late_tracking_fills_an_empty_store(repo, tmp_path):
    uri = f"sqlite:///{tmp_path / 'late.db'}"
    done = stage(repo, "track", MLFLOW_TRACKING_URI=uri)
    assert done.returncode == 0, done.stderr
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert len(runs) == 4
    assert all("loss" in r.data.metrics for r in runs)


def test_what_a_killed_stage_leaves_changes_nothing_and_goes_with_the_next_run(repo):
    left = repo / "out" / "train" / "dtd" / ".base_to_novel-1.123.tmp"
    left.mkdir()
    (left / "adapter.safetensors").write_bytes(b"half")
    assert json.loads(call(repo, "dvc", "status", "--json").stdout) == {}
    assert stage(repo, "train", "--dataset", "dtd", "--seed", "1").returncode == 0
    assert not left.exists()


def test_changing_shots_leaves_download_and_precompute_alone(repo):
    done = call(repo, "dvc", "status", "--json")
    assert json.loads(done.stdout) == {}
    params = (repo / "params.yaml").read_text()
    (repo / "params.yaml").write_text(params.replace("shots: 2", "shots: 4"))
    changed = json.loads(call(repo, "dvc", "status", "--json").stdout)
    (repo / "params.yaml").write_text(params)
    kinds = {name.split("@")[0] for name in changed}
    assert {"split", "train"} <= kinds
    assert not kinds & {"download", "download-variant", "precompute", "precompute-variant"}


def test_a_failed_stage_stops_what_depends_on_it_and_nothing_else(repo):
    """Side by side: all of precompute runs again, and fails for dtd, one of whose images is damaged."""
    code = repo / "pipeline" / "stages" / "precompute.py"
    image = next((repo / "data" / "embedded" / "dtd" / "images").rglob("*.png"))
    kept = image.read_bytes()
    code.write_text(code.read_text() + "# changed\n")
    image.write_bytes(kept[:40])
    done = stage(repo, "repro", "--jobs", "2")
    image.write_bytes(kept)
    assert done.returncode == 1
    assert "failed: precompute@dtd; not reached:" in done.stderr
    assert "download@dtd" in done.stderr  # the remedy, from the stage's own output
    assert "train@dtd-1" in done.stderr.split("not reached:")[1]
    assert "imagenet_a" not in done.stderr.split("not reached:")[1]
    again = stage(repo, "repro", "--jobs", "2")
    assert again.returncode == 0, again.stderr
    assert "precompute-variant@imagenet_a" not in again.stdout
    assert json.loads(call(repo, "dvc", "status", "--json").stdout) == {}


def test_errors_are_messages(repo, tmp_path):
    for options, message in (
        (["--dataset", "dtd", "--seed", "5"], "--seed 5: not in seeds of params.yaml"),
        (["--dataset", "dtd", "--seed", "1", "--source"], "--source: transfer.source of params.yaml is imagenet"),
        (["--dataset", "dtd", "--seed", "1", "--shots", "7"], "--shots 7: few_shot of params.yaml has no"),
    ):
        refused = stage(repo, "train", *options)
        assert refused.returncode == 1
        assert message in refused.stderr
    wrong = stage(repo, "train", "--dataset", "mnist", "--seed", "1")
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("error: --dataset mnist")
    image = next((repo / "data" / "embedded" / "dtd" / "images").rglob("*.png"))
    kept = image.read_bytes()
    image.unlink()
    missing = stage(repo, "precompute", "--dataset", "dtd")
    image.write_bytes(kept)
    assert missing.returncode == 1
    assert "download@dtd" in missing.stderr
    assert "Traceback" not in missing.stderr


def test_the_novel_scale_takes_effect(repo):
    record = repo / "out" / "evaluate" / "dtd" / "base_to_novel-1.json"
    before = json.loads(record.read_text())
    params = (repo / "params.yaml").read_text()
    (repo / "params.yaml").write_text(params.replace("scale_novel: null", "scale_novel: 0.0", 1))
    done = stage(repo, "evaluate", "--dataset", "dtd")
    (repo / "params.yaml").write_text(params)
    after = json.loads(record.read_text())
    record.write_text(json.dumps(before, ensure_ascii=False, indent=1) + "\n")
    assert done.returncode == 0, done.stderr
    assert after["groups"]["base"] == before["groups"]["base"]
    # Scale 0 is zero-shot CLIP.
    assert after["groups"]["novel"]["heba"] == after["groups"]["novel"]["zero_shot"]


def test_help_teaches():
    shown = stage(ROOT, "--help").stdout
    for name in (
        "download",
        "split",
        "precompute",
        "train",
        "evaluate",
        "report",
        "preset",
        "track",
        "repro",
        "ablate",
        "waves",
        "doctor",
    ):
        assert name in shown


def test_training_images_that_do_not_fit_into_memory_are_refused_before_they_are_read(tmp_path):
    from pipeline.stages.train import refuse_too_large

    path = tmp_path / "a.png"
    Image.new("1", (9000, 9000)).save(path)
    refuse_too_large([path])
    with pytest.raises(ParamsError, match=r"10000 training images take 2430\.0 GB of memory"):
        refuse_too_large([path] * 10_000)
