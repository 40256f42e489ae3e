"""Stages as a user runs them, with real DVC and MLflow."""

import csv
import getpass
import json
import os
import re
import shutil
import sys
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import pytest
from PIL import Image

from heba.data.images import decode_all
from tests.pipeline import breakable
from tests.pipeline.breakable import ONE, TRAINED, changed_params
from tests.pipeline.repository import ROOT, call, stage

ADAPTER = f"{TRAINED}/adapter.safetensors"
CROSS = "out/evaluate-transfer/cross_dataset"
OWN_CODE = {"HEBA_STAGE_SERVER": ""}  # a fork of the tests' server has the code of the tests


@pytest.fixture
def repo(finished, tmp_path):
    """A copy of the finished repository, to be changed."""
    return breakable.copy(finished, tmp_path / "clone with space")


def dvc(repo, *args, **env):
    done = call(repo, "dvc", *args, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def stale(repo):
    return set(json.loads(dvc(repo, "status", "--json")))


def kinds(stages):
    return {stage.split("@")[0] for stage in stages}


def states(repo, folder):
    """Of each file under `folder`: what a new one of that name would not have."""
    files = [path for path in sorted((repo / folder).rglob("*")) if path.is_file()]
    return {p.relative_to(repo).as_posix(): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


def tensors(repo):
    """What was trained, by its file."""
    return {path: content for path, (_, content) in states(repo, "out/train").items() if "config.json" not in path}


def new_in(repo, folder, before):
    """The files that are new under `folder` or were written anew, and those that are gone."""
    now = states(repo, folder)
    return {path for path, state in now.items() if before.get(path) != state}, set(before) - set(now)


def records(*names):
    return {f"out/evaluate/{name}.json" for name in names}


def trained_in(output):
    """What `train` stages that made something said: data set, method, how many of how many."""
    return re.findall(r"^train (.*: [1-9]\d* of \d+) trainings.*, \d+\.\d s$", output, re.MULTILINE)


def test_repro_makes_the_report_and_does_nothing_the_second_time(repo):
    averages = json.loads((repo / "reports" / "averages.json").read_text())
    assert set(averages) == {"base_to_novel", "cross_dataset", "domain_generalization", "few_shot"}
    again = dvc(repo, "repro")
    assert "up to date" in again
    assert "Running stage" not in again


def inputs(run):
    """(name, digest, context) of the data sets of a run."""
    return {
        (found.dataset.name, found.dataset.digest, tag.value)
        for found in run.inputs.dataset_inputs
        for tag in found.tags
    }


def assert_origin(run, repo, command):
    """A run tells who made it, with which command, from which code."""
    commit = call(repo, "git", "rev-parse", "HEAD").stdout.strip()
    wanted = {
        "mlflow.user": getpass.getuser(),
        "mlflow.source.name": command,
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": commit,
        "mlflow.source.git.branch": call(repo, "git", "symbolic-ref", "--short", "HEAD").stdout.strip(),
        "git.dirty": "false",
    }
    assert wanted.items() <= run.data.tags.items()


def test_dvc_shows_the_figures_without_a_network(repo):
    dvc(repo, "plots", "show", "-o", "shown")
    page = (repo / "shown" / "index.html").read_text()
    assert "script" not in page
    figures = {path.name: path.read_bytes() for path in (repo / "reports" / "figures").iterdir()}
    assert "losses.svg" in figures
    for name, content in figures.items():
        [source] = re.findall(rf'src="(static/[^"]*_{name})"', page)
        assert (repo / "shown" / source).read_bytes() == content


def test_every_training_is_a_run_with_its_evaluation(finished):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{finished / 'mlflow.db'}")
    experiments = {e.name: e.experiment_id for e in client.search_experiments()}

    def runs(protocol):
        found = client.search_runs([experiments[protocol]])
        for run in found:
            assert run.info.run_name.endswith(f"-{run.data.tags['heba.inputs_sha256'][:6]}")
        return {run.info.run_name[:-7]: run for run in found}

    both = [f"{name}-{method}-2shot-seed1" for name in ("dtd", "imagenet") for method in ("heba", "zero_shot")]
    assert set(runs("base_to_novel")) == set(both)
    for name, run in runs("base_to_novel").items():
        assert run.info.status == "FINISHED"
        epochs = set() if "zero_shot" in name else {"loss", "lr", "seconds"}
        logged = {metric for metric in run.data.metrics if not metric.startswith("system/")}
        assert logged == {"base", "novel", "h", "training_seconds"} | epochs
        assert ("system/cpu_utilization_percentage" in run.data.metrics) == bool(epochs)
        dataset, method = run.data.params["dataset"], run.data.params["method"]
        assert run.data.tags["dvc.stage"] == f"train@{dataset}-{method}"
        assert not [key for key in run.data.params if "sha256" in key]
        assert_origin(run, finished, f"dvc repro train@{dataset}-{method}")
        assert run.data.tags["family"] == {"heba": "tower", "zero_shot": "frozen"}[method]
        digest = json.loads((finished / "out" / "download" / f"{dataset}.json").read_text())["images_sha256"][:12]
        assert inputs(run) == {(dataset, digest, "train"), (f"{dataset}-test", digest, "test")}
        assert f"| base classes | 100 | {run.data.metrics['base']:.2f} |" in run.data.tags["mlflow.note.content"]
        model = client.get_logged_model(run.outputs.model_outputs[0].model_id)
        artifacts = Path(url2pathname(urlparse(model.artifact_location).path))
        adapter = artifacts / "artifacts" / "base_to_novel-2-1" / "adapter.safetensors"
        out = finished / "out" / "train" / dataset / method / "base_to_novel-2-1" / "adapter.safetensors"
        assert adapter.read_bytes() == out.read_bytes()
        assert adapter.stat().st_nlink > 1  # it takes no space of its own
        names = {Path(f.path).name for f in client.list_artifacts(run.info.run_id, "evaluation")}
        pictures = {f"confusion-{dataset}-{group}.png" for group in ("base", "novel")}
        assert names == {f"base_to_novel-{dataset}.json"} | pictures
    heba = runs("base_to_novel")["dtd-heba-2shot-seed1"]
    assert {key: heba.data.params[key] for key in ("heba.scale", "backbone.name")} == {
        "heba.scale": "0.1",
        "backbone.name": "tiny",
    }
    assert json.loads(heba.data.tags["heba.evaluation"]) == {"scale_novel": None}
    for run in runs("cross_dataset").values():
        metrics = run.data.metrics
        assert metrics["accuracy"] == metrics["dtd"]
        assert metrics["accuracy_variants"] == metrics["imagenet_a"]
        assert {name for name, _, context in inputs(run) if context == "test"} == {"dtd-test", "imagenet_a-test"}
        assert "| DTD | 200 |" in run.data.tags["mlflow.note.content"]
    assert set(runs("few_shot")) == {"dtd-heba-1shot-seed1", "dtd-zero_shot-1shot-seed1"}
    assert all("accuracy" in run.data.metrics for run in runs("few_shot").values())


def summaries(client):
    return client.search_runs([client.get_experiment_by_name("summary").experiment_id])


def test_the_report_is_a_run_with_all_trainings_below_it(finished):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{finished / 'mlflow.db'}")
    (summary,) = summaries(client)
    with (finished / "reports" / "overview.csv").open(newline="") as file:
        averages = {row["method"]: float(row["base_to_novel_h"]) for row in csv.DictReader(file)}
    for method, h in averages.items():
        assert summary.data.metrics[f"base_to_novel.{method}.h"] == pytest.approx(h, abs=0.01)
    wanted = {"methods": "heba, zero_shot", "shots": "2", "seeds": "1", "few_shot.shots": "1", "heba.ratio": "4"}
    assert wanted.items() <= summary.data.params.items()
    assert_origin(summary, finished, "dvc repro report")
    ids = [e.experiment_id for e in client.search_experiments() if e.name != "summary"]
    trainings = client.search_runs(ids)
    assert {run.data.tags["mlflow.parentRunId"] for run in trainings} == {summary.info.run_id}
    shown = {path.relative_to(finished).as_posix() for path in (finished / "reports").iterdir()}
    assert {file.path for file in client.list_artifacts(summary.info.run_id, "reports")} == shown
    assert "reports/index.html" in shown
    listed = client.download_artifacts(summary.info.run_id, "trainings.csv")
    with open(listed, newline="") as file:
        assert {row["run_id"] for row in csv.DictReader(file)} == {run.info.run_id for run in trainings}


def test_training_again_gives_the_same_bytes_and_tracking_may_fail(repo):
    before = (repo / ADAPTER).read_bytes()
    shutil.rmtree(repo / TRAINED)
    done = stage(repo, "train", *ONE, MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    assert trained_in(done.stdout) == ["dtd heba: 1 of 1"]
    assert done.stderr.count("MLflow tracking failed") == 1
    assert (repo / ADAPTER).read_bytes() == before


def test_late_tracking_fills_an_empty_store(finished, tmp_path):
    uri = f"sqlite:///{tmp_path / 'late.db'}"
    shutil.copytree(finished / "out", tmp_path / "out")
    shutil.copytree(finished / "reports", tmp_path / "reports")
    shutil.copy(finished / "params.yaml", tmp_path)
    for experiment in ("first", "second"):  # the second finds all of it there
        env = {"MLFLOW_TRACKING_URI": uri, "PYTHONPATH": str(ROOT), "DVC_EXP_NAME": experiment}
        done = stage(tmp_path, "track", **env)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("10 evaluations")
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    (made,) = summaries(client)
    runs = client.search_runs([e.experiment_id for e in client.search_experiments() if e.name != "summary"])
    assert len(runs) == 8
    assert {run.data.tags["mlflow.parentRunId"] for run in runs} == {made.info.run_id}
    assert made.info.run_name.startswith("first-2shot-")
    (before,) = summaries(MlflowClient(f"sqlite:///{finished / 'mlflow.db'}"))
    assert made.data.metrics == before.data.metrics
    assert made.data.params == before.data.params
    assert all(("loss" in run.data.metrics) == (run.data.params["method"] == "heba") for run in runs)
    assert all({"accuracy", "h"} & set(run.data.metrics) for run in runs)


def test_another_seed_trains_and_evaluates_that_one_alone(repo):
    trained, evaluated = states(repo, "out/train"), states(repo, "out/evaluate")
    with changed_params(repo) as params:
        params["seeds"] = [1, 2]
    output = dvc(repo, "repro", "evaluate@dtd")
    assert sorted(trained_in(output)) == [f"dtd {n}: 1 of 3" for n in ("heba", "zero_shot")]
    new, gone = new_in(repo, "out/train", trained)
    assert {Path(path).parent.name for path in new} == {"base_to_novel-2-2"}
    assert not gone
    new, gone = new_in(repo, "out/evaluate", evaluated)
    assert new == records("dtd/heba/base_to_novel-2-2", "dtd/zero_shot/base_to_novel-2-2")
    assert not gone
    assert breakable.runs(repo) == ["FINISHED"] * 2  # the other ones are in the store that was not copied

    # And back: what the earlier params.yaml asked for is gone.
    with changed_params(repo) as params:
        params["seeds"] = [1]
    assert trained_in(dvc(repo, "repro", "evaluate@dtd")) == []
    assert states(repo, "out/train") == trained
    assert states(repo, "out/evaluate") == evaluated


def test_another_seed_of_the_source_evaluates_that_one_alone_and_several_at_once_give_the_same(repo):
    evaluated = states(repo, CROSS)
    with changed_params(repo) as params:
        params["transfer"]["seeds"] = [1, 2, 3]
    target = "evaluate-transfer@cross_dataset"
    dvc(repo, "repro", target)
    new, gone = new_in(repo, CROSS, evaluated)
    methods = ("heba", "zero_shot")
    assert new == {f"{CROSS}/dtd/{name}/cross_dataset-2-{seed}.json" for name in methods for seed in (2, 3)}
    assert not gone
    # Before, seed 1 was evaluated by itself.
    apart = {path: content for path, (_, content) in states(repo, CROSS).items()}
    shutil.rmtree(repo / CROSS)
    done = stage(repo, "evaluate-transfer", "--protocol", "cross_dataset")
    assert done.returncode == 0, done.stderr
    assert {path: content for path, (_, content) in states(repo, CROSS).items()} == apart


def test_a_setting_of_a_method_makes_its_own_stages_stale(repo):
    def change(**settings):
        with changed_params(repo) as params:
            params["heba"]["overrides"]["cross_dataset"] |= settings

    before = states(repo, "out/train/imagenet")
    change(lr=0.001)
    assert stale(repo) == {"train@dtd-heba", "train@imagenet-heba", "cost@heba"}
    output = dvc(repo, "repro", "train@dtd-heba", "train@imagenet-heba")
    assert trained_in(output) == ["imagenet heba: 1 of 2"]
    new, gone = new_in(repo, "out/train/imagenet", before)
    assert {Path(path).parent.name for path in new} == {"cross_dataset-2-1"}
    assert not gone


def test_an_edit_of_a_methods_code_trains_that_method_again_and_no_other(repo):
    trained, evaluated = states(repo, "out/train/dtd"), states(repo, "out/evaluate/dtd")
    with (repo / "heba" / "methods" / "heba" / "method.py").open("a") as file:
        file.write("# changed\n")
    assert {n for n in stale(repo) if n.startswith("train")} == {"train@dtd-heba", "train@imagenet-heba"}
    output = dvc(repo, "repro", "evaluate@dtd", **OWN_CODE)
    assert "Running stage 'train@dtd-zero_shot'" not in output
    assert trained_in(output) == ["dtd heba: 2 of 2"]
    new, gone = new_in(repo, "out/train/dtd", trained)
    assert {path for path in new if path.endswith("adapter.safetensors")}
    assert not [path for path in new if "/zero_shot/" in path]
    assert not gone
    adapters = [path for path in trained if path.endswith("adapter.safetensors")]
    assert all((repo / path).read_bytes() == trained[path][1] for path in adapters)
    new, gone = new_in(repo, "out/evaluate/dtd", evaluated)
    assert new == records("dtd/heba/base_to_novel-2-1", "dtd/heba/few_shot-1-1")
    assert not gone


def test_a_setting_of_the_evaluation_trains_nothing(repo):
    path, plain = (repo / "out/evaluate/dtd" / name / "base_to_novel-2-1.json" for name in ("heba", "zero_shot"))
    before, evaluated, trained = json.loads(path.read_text()), states(repo, "out/evaluate"), tensors(repo)
    with changed_params(repo) as params:
        params["heba"]["scale_novel"] = 0.0
    output = dvc(repo, "repro", "evaluate@dtd")
    assert trained_in(output) == []
    assert tensors(repo) == trained
    new, _ = new_in(repo, "out/evaluate", evaluated)
    assert new == records("dtd/heba/base_to_novel-2-1", "dtd/heba/few_shot-1-1")
    after = json.loads(path.read_text())
    assert after["settings"] == {"scale_novel": 0.0}
    assert after["groups"]["base"] == before["groups"]["base"]
    # Scale 0 is zero-shot CLIP.
    assert after["groups"]["novel"] == json.loads(plain.read_text())["groups"]["novel"]


def test_a_method_that_is_listed_no_more_is_not_evaluated(repo):
    with changed_params(repo) as params:
        params["methods"] = ["heba"]
    evaluated = states(repo, "out/evaluate/dtd")
    dvc(repo, "repro", "evaluate@dtd", "evaluate-transfer@cross_dataset")
    new, gone = new_in(repo, "out/evaluate/dtd", evaluated)
    assert not new
    assert gone == records("dtd/zero_shot/base_to_novel-2-1", "dtd/zero_shot/few_shot-1-1")
    assert [path.name for path in (repo / CROSS / "dtd").iterdir()] == ["heba"]
    assert (repo / "out" / "train" / "dtd" / "zero_shot").is_dir()  # for when it is listed again


def test_train_makes_the_chosen_trainings(repo):
    with changed_params(repo) as params:
        params["seeds"] = [1, 2]
    dvc(repo, "repro", "split@dtd")
    shutil.rmtree(repo / TRAINED)
    done = stage(repo, "train", "--dataset", "dtd", "--method", "heba", "--seed", "2")
    assert done.returncode == 0, done.stderr
    assert trained_in(done.stdout) == ["dtd heba: 1 of 1"]
    names = {path.name for path in (repo / "out" / "train" / "dtd" / "heba").iterdir()}
    assert names == {"base_to_novel-2-2", "few_shot-1-1"}
    done = stage(repo, "train", "--dataset", "dtd", "--method", "heba")
    assert trained_in(done.stdout) == ["dtd heba: 1 of 3"]


def test_a_damaged_training_is_made_again(repo):
    for name in ("adapter.safetensors", "classifier.safetensors", "config.json", "history.csv"):
        path = repo / TRAINED / name
        kept = path.read_bytes()
        path.unlink()  # the cache may share its bytes
        path.write_bytes(b"nonsense")
        done = stage(repo, "train", *ONE)
        assert done.returncode == 0, done.stderr
        assert trained_in(done.stdout) == ["dtd heba: 1 of 1"], name
        assert path.read_bytes() == kept


def test_what_a_killed_stage_leaves_changes_nothing_and_goes_with_the_next_run(repo):
    ended = breakable.start(repo, "true")
    ended.communicate()
    folders = repo / "out" / "train" / "dtd" / "heba", repo / "out" / "evaluate" / "dtd" / "heba"
    left = [folder / f".{name}.{ended.pid}.tmp" for folder in folders for name in ("base_to_novel-2-1", "of old")]
    alive = [folder / f".base_to_novel-2-1.{os.getpid()}.tmp" for folder in folders]
    for folder in left + alive:
        folder.mkdir()
        (folder / "adapter.safetensors").write_bytes(b"half")
    assert stale(repo) == set()
    for command in (["train", *ONE], ["evaluate", "--dataset", "dtd"]):
        done = stage(repo, *command)
        assert done.returncode == 0, done.stderr
    assert not [path for path in left if path.exists()]
    assert all(path.exists() for path in alive)  # another command may be at work


def test_an_evaluation_that_fails_keeps_and_logs_what_is_done(repo):
    shutil.rmtree(repo / "out" / "evaluate" / "dtd")
    last = repo / "out" / "train" / "dtd" / "zero_shot" / "few_shot-1-1" / "classifier.safetensors"
    last.unlink()
    done = stage(repo, "evaluate", "--dataset", "dtd")
    assert done.returncode == 1
    assert str(last.relative_to(repo)) in done.stderr
    assert len(list((repo / "out" / "evaluate" / "dtd").rglob("*.json"))) == 3
    assert breakable.runs(repo) == ["FINISHED"] * 3


def test_changing_shots_leaves_download_and_precompute_alone(repo):
    assert stale(repo) == set()
    with changed_params(repo) as params:
        params["shots"] = 4
    changed = kinds(stale(repo))
    assert "split" in changed
    assert not changed & {"download", "download-variant", "precompute", "precompute-variant"}


def test_an_import_leaves_no_stage_stale(repo):
    """Python writes __pycache__ into the folders that stages depend on."""
    env = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": ""}
    modules = "heba.clip.features, heba.data.splits, heba.methods.heba.method, heba.evaluation.record"
    done = call(repo, sys.executable, "-c", f"import {modules}, pipeline.core.params", **env)
    assert done.returncode == 0, done.stderr
    for folder in ("heba/clip", "heba/methods/heba", "pipeline/core"):
        assert list((repo / folder / "__pycache__").glob("*.pyc"))
    assert stale(repo) == set()


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
    not_reached = done.stderr.split("not reached:")[1]
    assert "train@dtd-heba" in not_reached
    assert "imagenet_a" not in not_reached
    again = stage(repo, "repro", "--jobs", "2")
    assert again.returncode == 0, again.stderr
    assert "precompute-variant@imagenet_a" not in again.stdout
    assert stale(repo) == set()


def test_errors_are_messages(repo):
    listed = "params.yaml has no such training of heba on dtd; it has base_to_novel-2-1, few_shot-1-1"
    for options, message in (
        (["--dataset", "dtd", "--method", "heba", "--seed", "5"], listed),
        (["--dataset", "dtd", "--method", "heba", "--shots", "7"], listed),
        (["--dataset", "dtd", "--method", "heba", "--protocol", "cross_dataset"], listed),
        (["--dataset", "dtd", "--method", "x"], "--method x: not in params.yaml, which has zero_shot, heba"),
        (["--dataset", "x", "--method", "heba"], "--dataset x: not in params.yaml, which has imagenet, dtd"),
    ):
        refused = stage(repo, "train", *options)
        assert refused.returncode == 1
        assert refused.stderr.startswith(f"error: {message}")
    shutil.move(repo / "out" / "train" / "dtd" / "heba", repo / "away")
    untrained = stage(repo, "evaluate", "--dataset", "dtd")
    assert untrained.returncode == 0
    assert (
        "note: out/train/dtd/heba is not there, and heba is left out; `dvc repro train@dtd-heba`"
        in untrained.stderr
    )
    image = next((repo / "data" / "embedded" / "dtd" / "images").rglob("*.png"))
    image.unlink()
    missing = stage(repo, "precompute", "--dataset", "dtd")
    assert missing.returncode == 1
    assert "download@dtd" in missing.stderr
    assert "Traceback" not in missing.stderr


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
    path = tmp_path / "a.png"
    Image.new("1", (3000, 3000)).save(path)
    (image,) = decode_all([path], lambda n: None)
    assert image.shape == (3, 3000, 3000)
    with pytest.raises(ValueError, match=r"100000 training images take 2700\.0 GB of memory"):
        decode_all([path] * 100_000, lambda n: None)
