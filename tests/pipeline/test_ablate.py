"""Ablations: what is queued, what is read back from MLflow, and the table."""

import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
import yaml
from dvc.utils.hydra import apply_overrides, get_hydra_sweeps
from typer.testing import CliRunner

from heba import artifact
from heba.clip.tiny import load_tiny_clip
from heba.methods.heba.model import AdaptedCLIP
from pipeline.commands import ablate
from pipeline.commands.cli import app
from pipeline.core.params import ParamsError, load_params, settings_of
from pipeline.report import ablation, render
from pipeline.runner import processes
from pipeline.tracking import describe
from pipeline.tracking import log as tracking
from pipeline.tracking.store import client
from tests.heba import artifacts
from tests.pipeline import small
from tests.pipeline.records import METHODS, RECORDS, record
from tests.pipeline.repository import (
    ROOT,
    call,
    copy_code,
    environment,
    initialise,
    noting,
    stage,
    wait_for,
    working_in,
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the commands run: the committed params.yaml, and a store of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    shutil.copy(ROOT / "params.yaml", tmp_path)
    return tmp_path


def run(*args):
    return CliRunner().invoke(app, ["ablate", *args], catch_exceptions=False)


def test_every_setting_that_differs_is_an_experiment(folder):
    lines = run("--dry-run", "--datasets", "dtd,eurosat").output.splitlines()
    assert all(line.startswith("dvc exp run --queue -n ablate-") for line in lines)
    names = [line.split()[5].removeprefix("ablate-") for line in lines]
    assert names[0] == "baseline"
    assert set(names) == {
        "baseline",
        "init-zero",
        "visual_block-linear",
        "text_block-conv1d",
        *(f"ratio-{r}" for r in (1, 2, 8)),
        "expansion-2",
        "slow_fast-off",
        "label_smoothing-0.0",
        "negatives-all",
        "negatives-1",
        "gradient_scale-off",
        "towers-image",
        "towers-text",
    }
    for line in lines:
        assert "-S 'methods=[heba]' -S 'datasets=[dtd,eurosat]' -S transfer.source=dtd" in line
    assert "-S heba.gradient_scale=false" in lines[names.index("gradient_scale-off")]
    changed = (folder / "params.yaml").read_text().replace("ratio: 4 ", "ratio: 8 ")
    (folder / "params.yaml").write_text(changed)
    shown = run("--dry-run", "--only", "ratio").output
    assert "ablate-ratio-4" in shown
    assert "ablate-ratio-8" not in shown
    assert "init" not in shown
    assert "transfer.source=imagenet" in shown


def test_what_is_queued_makes_a_valid_params_file(folder):
    """DVC applies the overrides to params.yaml; own data is left out, whatever its name."""
    raw = yaml.safe_load(Path("params.yaml").read_text())
    raw["own"] = {name: {"kind": "folder", "path": f"photos/{name}"} for name in ("mine", "3d-set")}
    Path("params.yaml").write_text(yaml.safe_dump(raw))
    params = load_params()
    settings = settings_of(params, "heba", "base_to_novel")
    for row in ablate.rows(params, []):
        args = ablate.command(params, row, ["eurosat"])
        Path("changed.yaml").write_text(yaml.safe_dump(raw))
        (overrides,) = get_hydra_sweeps({"changed.yaml": args[args.index("-S") + 1 :: 2]})
        apply_overrides("changed.yaml", overrides["changed.yaml"])
        changed = load_params(Path("changed.yaml"))
        assert changed.datasets == ["eurosat"]
        assert changed.own == {}
        assert changed.transfer.protocols == changed.few_shot.seeds == []
        assert changed.methods == ["heba"]
        assert (settings_of(changed, "heba", "base_to_novel") == settings) == (row.name == "baseline")


def test_names_are_taken_once_and_without_spaces(folder):
    shown = run("--dry-run", "--datasets", "dtd, eurosat,dtd ,", "--only", "init, init").output.splitlines()
    assert len(shown) == 2
    assert all("'datasets=[dtd,eurosat]' -S transfer.source=dtd" in line for line in shown)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--datasets", "mnist"], "--datasets: mnist not in params.yaml"),
        (["--only", "inits"], "known are init, visual_block"),
        (["--table", "--run"], "does not go with"),
    ],
)
def test_wrong_options_are_messages(folder, args, message):
    with pytest.raises(ParamsError, match=message):
        run(*args)


def log(params, dataset, seed, accuracy, status="FINISHED", scale_novel=None, **changed):
    """A run as the stage `train` makes it, with the metrics of the stage `evaluate`; returns its id."""
    settings = settings_of(params, "heba", "base_to_novel").model_copy(update=changed)
    config = artifact.Config(
        method="heba",
        settings=settings.model_dump(),
        class_names=["a", "b"],
        backbone=artifact.Backbone(**params.backbone.model_dump(), sha256="0" * 64),
        protocol="base_to_novel",
        dataset=dataset,
        suite=params.suite,
        bf16=False,
        seed=seed,
        shots=params.shots,
        threads=1,
        inputs_sha256=str(hash((settings, dataset, seed))),
    )
    training, _ = tracking.begin_run(client(), config.model_dump())
    if accuracy is not None:
        evaluate(training.id, accuracy, scale_novel)
    training.end(status)
    time.sleep(0.002)  # runs are ordered by their start in milliseconds
    return training.id


def evaluate(run_id, accuracy, scale_novel):
    """Log to a run what the stage `evaluate` does."""
    evaluation = record("heba", "dtd", 1, (accuracy,) * 2)
    for key, value in describe.metrics([describe.result_of(evaluation)]).items():
        client().log_metric(run_id, key, value)
    tag = tracking.evaluation_tag({"scale_novel": scale_novel})
    client().set_tag(run_id, tracking.EVALUATION_TAG, tag)
    time.sleep(0.002)


def test_the_table_is_read_from_mlflow(folder):
    with pytest.raises(ValueError, match="no evaluated training of these settings"):
        run("--table")
    params = load_params()
    with pytest.raises(ParamsError, match="none of zero_shot has ablations"):
        ablate.ablated_method(params.model_copy(update={"methods": ["zero_shot"]}))
    for seed in (1, 2):
        log(params, "dtd", seed, 40.0)
        log(params, "dtd", seed, 60.0)
        log(params, "dtd", seed, None)  # trained again to the same bytes: DVC does not evaluate it again
        log(params, "dtd", seed, 90.0, status="FAILED")
        log(params, "dtd", seed, 50.0 + seed, init="zero")
    log(params, "eurosat", 1, 80.0)
    log(params, "dtd", 1, 30.0, ratio=16)  # no row has it
    log(params, "dtd", 7, 30.0, ratio=8)  # nor this seed
    shown = run("--table", "--datasets", "dtd,eurosat", "--only", "init,ratio")
    assert "not in MLflow: Ratio: 1; Ratio: 2; Ratio: 8" in shown.output
    lines = ablation.read(ablation.FILE, "embedded")
    assert list(lines.itertuples(index=False, name=None)) == [
        ("Baseline", "embedded", "dtd", 1, 16, 60.0, 60.0),
        ("Baseline", "embedded", "dtd", 2, 16, 60.0, 60.0),
        ("Baseline", "embedded", "eurosat", 1, 16, 80.0, 80.0),
        ("Initialisation: zero", "embedded", "dtd", 1, 16, 51.0, 51.0),
        ("Initialisation: zero", "embedded", "dtd", 2, 16, 52.0, 52.0),
    ]
    assert ablation.read(ablation.FILE, "real").empty
    before = ablation.FILE.read_bytes()
    assert run("--table", "--datasets", "dtd,eurosat", "--only", "init").exit_code == 0
    assert ablation.FILE.read_bytes() == before


def test_an_evaluation_at_another_novel_scale_is_not_that_of_the_table(folder):
    """Experiments of heba.scale_novel share the training and its run, and the last evaluation wins there."""
    params = load_params()
    options = ("--table", "--datasets", "dtd", "--only", "init")
    run_id = log(params, "dtd", 1, 60.0)
    log(params, "dtd", 2, 50.0)
    evaluate(run_id, 40.0, 0.02)
    log(params, "dtd", 1, None, init="zero")
    shown = run(*options).output
    assert "with the settings of params.yaml, or with others since: 2 (Baseline, dtd, seed 1; " in shown
    assert "Initialisation: zero, dtd, seed 1)" in shown
    assert "not in MLflow" not in shown
    assert list(ablation.read(ablation.FILE, "embedded")["seed"]) == [2]
    text = (folder / "params.yaml").read_text()
    (folder / "params.yaml").write_text(text.replace("scale_novel:", "scale_novel: 0.02", 1))
    run(*options)
    assert list(ablation.read(ablation.FILE, "embedded")["novel"]) == [40.0]
    evaluate(run_id, 60.0, None)
    with pytest.raises(ValueError, match=r"no evaluated training .*\ntrained, but not evaluated .*: 3 \("):
        run(*options)


def test_an_evaluation_goes_to_the_run_with_its_params(folder):
    """Two trainings with the same adapter: with few classes, the number of negatives changes nothing."""
    store, runs = client(), []
    for n in (0, 5):
        out = folder / str(n)
        about = {"dataset": "dtd", "shots": 16, "seed": 1, "protocol": "base_to_novel", "inputs_sha256": f"of {n}"}
        torch.manual_seed(0)
        model = AdaptedCLIP(load_tiny_clip()[0], 1, 4, 0.1)
        settings = artifacts.settings_of(model).model_copy(update={"neg_ratio": n}).model_dump()
        artifacts.save(model, out, settings=settings, **about)
        artifacts.save_classifier(torch.ones(2, 128), out, scale=0.1)
        artifact.write_history([], out)
        run, _ = tracking.begin_run(store, artifact.read_config(out).model_dump())
        tracking.log_outs(store, run.id, out)
        run.end()
        runs.append(run.id)
    assert artifact.sha256(folder / "0") == artifact.sha256(folder / "5")
    assert [tracking.find_or_create_run(store, folder / str(n)) for n in (0, 5)] == runs
    assert [store.get_run(run).data.params["heba.neg_ratio"] for run in runs] == ["0", "5"]
    assert len(store.search_runs([store.get_experiment_by_name("base_to_novel").experiment_id])) == 2


def lines(*rows):
    return pd.DataFrame(
        [(s, "embedded", d, seed, 16, b, n) for s, d, seed, b, n in rows], columns=ablation.COLUMNS
    )


TABLE = lines(
    ("Baseline", "dtd", 1, 60.0, 50.0),
    ("Baseline", "dtd", 2, 70.0, 50.0),
    ("Baseline", "eurosat", 1, 90.0, 70.0),
    ("Ratio: 8", "dtd", 1, 62.0, 40.0),
    ("Ratio: 8", "eurosat", 1, 90.0, 80.0),
    ("Ratio: 1", "ucf101", 1, 10.0, 10.0),
)


def test_the_table_by_hand():
    table = ablation.ablation_table(TABLE)
    assert list(table.index) == ["Baseline", "Ratio: 8", "Ratio: 1"]
    baseline, eight = table.loc["Baseline"], table.loc["Ratio: 8"]
    # A data set counts once, whatever the number of its seeds.
    assert baseline["base"] == (65 + 90) / 2
    assert baseline["h"] == pytest.approx(2 * 77.5 * 60 / (77.5 + 60))
    # Only seed 1 is in both.
    assert eight["difference_base"] == pytest.approx(1)
    assert eight["difference_novel"] == pytest.approx(0)
    assert (eight["datasets"], eight["trainings"]) == (2, 2)
    assert table.loc["Ratio: 1"].filter(like="difference").isna().all()


def test_the_report_has_the_table(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        render.render_report(RECORDS, METHODS, tmp_path / name, False, TABLE)
    for file in render.FILES:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    for file in ("README.md", "index.html", "ablation.md", "ablation.tex"):
        text = (tmp_path / "a" / file).read_text()
        assert "Ratio: 8" in text
        assert "DTD, EuroSAT, UCF101; 16 shots" in text
        assert "no paper result" in text
    assert "Δ" not in (tmp_path / "a" / "ablation.tex").read_text()
    render.render_report(RECORDS, METHODS, tmp_path, False, TABLE.iloc[:0])
    assert "no results" in (tmp_path / "ablation.md").read_text()


def test_a_damaged_or_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"ablation\.csv: .*--table"):
        ablation.read(tmp_path / "ablation.csv", "embedded")
    for text in ("", "a,b\n1,2\n"):
        (tmp_path / "ablation.csv").write_text(text)
        with pytest.raises(ValueError, match=r"ablation\.csv: .*--table"):
            ablation.read(tmp_path / "ablation.csv", "embedded")


def test_the_dag_knows_the_files():
    report = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["report"]
    outs = [next(iter(out)) for kind in ("outs", "metrics") for out in report[kind]]
    assert sorted(outs) == sorted(f"reports/{file}" for file in [*render.FILES, render.FIGURES])
    assert str(ablation.FILE) in report["deps"]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_ctrl_c_gives_the_workspace_back(tmp_path):
    """DVC stashes the user's changes while it queues an experiment; a kill would leave them there."""
    repo, notes = small.make(tmp_path / "repo"), tmp_path / "notes"
    with (repo / "big").open("wb") as file:
        file.truncate(200 << 30)  # sparse; it takes minutes to hash, which DVC does in the stashed workspace
    out = {"path": "big", "hash": "md5", "md5": "0" * 32, "size": 200 << 30}
    (repo / "big.dvc").write_text(yaml.safe_dump({"outs": [out]}))
    (repo / ".gitignore").write_text("/big\n")
    for command in (["git", "add", "-A"], ["git", "commit", "-qm", "big"]):
        assert call(repo, *command).returncode == 0
    with (repo / "params.yaml").open("a") as file:
        file.write("# mine\n")
    run = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "ablate", "--datasets", "dtd", "--only", "init"],
        cwd=repo,
        env=small.environment(**noting(notes)),
    )

    def hashes():
        opened = [psutil.Process(pid).open_files() for pid in working_in(repo) if psutil.pid_exists(pid)]
        return any(Path(file.path).name == "big" for files in opened for file in files)

    wait_for(hashes)
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=processes.ENDING) == 130
    assert all(path.with_suffix(".ended").exists() for path in notes.glob("*.began"))
    assert (repo / "params.yaml").read_text().endswith("# mine\n")
    assert call(repo, "git", "stash", "list").stdout == ""
    assert call(repo, "git", "symbolic-ref", "HEAD").returncode == 0


def test_the_table_needs_no_training_to_be_rendered(tmp_path):
    """In a repository without results, where `dvc repro report` would train everything."""
    copy_code(tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    initialise(tmp_path)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    code = (
        "from tests.pipeline.test_ablate import log; from pipeline.core.params import load_params; "
        "log(load_params(), 'dtd', 1, 60.0)"
    )
    env = {"MLFLOW_TRACKING_URI": uri, "PYTHONPATH": str(ROOT)}
    done = call(tmp_path, sys.executable, "-c", code, **env)
    assert done.returncode == 0, done.stderr
    written = stage(tmp_path, "ablate", "--table", "--datasets", "dtd", **env)
    (command,) = re.findall("`(.*)` renders it", written.stdout)
    subprocess.run(shlex.split(command), cwd=tmp_path, env=environment(**env), timeout=120, check=True)
    assert "Baseline" in (tmp_path / "reports" / "ablation.md").read_text()
    assert not (tmp_path / "out" / "train").exists()
    (tmp_path / "mlflow.db").unlink()
    lacking = stage(tmp_path, "ablate", "--table", "--datasets", "dtd", "--only", "init", **env)
    assert "queue them with `python -m pipeline ablate --datasets dtd --only init`" in lacking.stderr


@pytest.mark.slow
def test_two_experiments_side_by_side_fill_the_table(tmp_path):
    copy_code(tmp_path)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params |= {"datasets": ["imagenet", "dtd"], "methods": ["zero_shot", "heba"], "seeds": [1], "shots": 2}
    params["heba"] |= {"epochs": 1, "batch_size": 4}
    params["transfer"] |= {"targets": ["dtd"]}
    params["few_shot"] |= {"datasets": ["dtd"]}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    options = ("ablate", "--datasets", "dtd", "--only", "init")
    initialise(tmp_path)
    done = stage(tmp_path, *options, "--run")
    assert done.returncode == 0, done.stdout + done.stderr
    status = ""
    for _ in range(300):
        status = call(tmp_path, "dvc", "queue", "status").stdout
        if "Queued" not in status and "Running" not in status:
            break
        time.sleep(2)
    assert status.count("Success") == 2, status
    assert "ablate-baseline" in stage(tmp_path, *options).stderr
    done = stage(tmp_path, *options, "--table")
    assert done.returncode == 0, done.stderr
    assert "not in MLflow" not in done.stdout
    found = ablation.read(tmp_path / ablation.FILE, "embedded")
    assert list(found["setting"]) == ["Baseline", "Initialisation: zero"]
