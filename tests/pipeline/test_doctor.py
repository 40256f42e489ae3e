"""`python -m pipeline doctor`, with each thing really broken."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import yaml

from pipeline.commands import doctor as doctor_module
from tests.pipeline import small
from tests.pipeline.repository import ROOT, noted, noting


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    """A repository with one data set of the embedded suite, all committed."""
    folder = small.make(tmp_path_factory.mktemp("doctor") / "repo")
    raw = yaml.safe_load((folder / "params.yaml").read_text())
    raw |= {"datasets": ["dtd"], "few_shot": {"datasets": [], "seeds": [], "shots": []}}
    raw["transfer"] |= {"source": "dtd", "targets": [], "variants": [], "protocols": []}
    (folder / "params.yaml").write_text(yaml.safe_dump(raw))
    (folder / ".gitignore").write_text("/data/\n/out/\n")
    for command in (
        [sys.executable, "-m", "pipeline", "download", "--dataset", "dtd"],
        ["git", "add", "-A"],
        ["git", "commit", "-qm", "start"],
    ):
        subprocess.run(command, cwd=folder, env=small.environment(), check=True)
    return folder


def doctor(folder, **env):
    """The rows by name, each its line, and the exit code."""
    done = small.stage(folder, "doctor", **env)
    assert "Traceback" not in done.stderr
    return {line[6:].split(":")[0]: line for line in done.stdout.splitlines()}, done.returncode


def test_a_sound_repository_has_no_failed_row(repo):
    rows, code = doctor(repo)
    assert code == 0, rows
    assert list(rows) == ["packages", "params.yaml", "GPU", "disk", "cache", "data", "MLflow", "git", "DVC"]
    assert not [row for row in rows.values() if row.startswith("fail")]
    assert "torch" in rows["packages"]
    assert rows["data"] == "ok    data: 1 data sets present and whole"
    assert "nothing changed" in rows["git"]


def test_another_folder_is_no_place_to_start_a_repository_in(tmp_path):
    rows, code = doctor(tmp_path)
    assert code == 1
    assert list(rows) == ["folder"]
    assert "cd to the folder that you cloned" in rows["folder"]


def test_broken_things_have_a_row_and_a_remedy(repo, tmp_path):
    broken = tmp_path / "repo"
    shutil.copytree(repo, broken)
    image = next((broken / "data" / "embedded" / "dtd" / "images").rglob("*.png"))
    image.unlink()
    (broken / "work.py").write_text("# changed\n")
    (broken / "dvc.lock").write_text("half: [\n")
    rows, code = doctor(broken, MLFLOW_TRACKING_URI="http://someone:secret@127.0.0.1:9")
    assert code == 1
    assert rows["data"].startswith("fail")
    assert "dtd/images has" in rows["data"]
    assert rows["data"].endswith("->  dvc repro --force --single-item download@dtd")
    assert rows["MLflow"].startswith("fail  MLflow: http://127.0.0.1:9: ")
    assert "secret" not in rows["MLflow"]
    assert "unset MLFLOW_TRACKING_URI" in rows["MLflow"]
    assert rows["git"].startswith("warn")
    assert "work.py" in rows["git"]
    assert rows["DVC"].startswith("fail")
    assert "dvc.lock cannot be read" in rows["DVC"]
    assert rows["DVC"].endswith("->  python -m pipeline mend, and then the same command again")

    shutil.rmtree(broken / "data")
    shutil.rmtree(broken / ".git")
    shutil.rmtree(broken / ".dvc")
    raw = yaml.safe_load((broken / "params.yaml").read_text()) | {"device": "cuda"}
    (broken / "params.yaml").write_text(yaml.safe_dump(raw))
    rows, code = doctor(broken, CUDA_VISIBLE_DEVICES="", GIT_CEILING_DIRECTORIES=str(tmp_path))
    assert code == 1
    assert "split.json is missing" in rows["data"]
    assert rows["data"].endswith("->  dvc repro --force --single-item download@dtd")
    assert rows["GPU"].endswith("->  set device: auto or cpu in params.yaml")
    assert rows["git"].startswith("fail")
    assert rows["DVC"].startswith("fail")


def test_what_looks_whole_and_is_not(repo, tmp_path):
    broken = tmp_path / "repo"
    shutil.copytree(repo, broken)
    (broken / ".dvc" / "tmp" / "rwlock").write_text('{"write": {')
    raw = yaml.safe_load((broken / "params.yaml").read_text())
    raw["own"] = {"mine": {"kind": "folder", "path": "photos/nowhere"}}
    (broken / "params.yaml").write_text(yaml.safe_dump(raw))
    rows, code = doctor(broken, PATH=os.defpath)
    assert code == 1
    assert "own.mine.path: there is no folder" in rows["data"]
    assert rows["DVC"].startswith("fail")
    assert "rwlock cannot be read" in rows["DVC"]
    assert rows["DVC"].endswith("->  python -m pipeline mend, and then the same command again")
    assert rows["packages"].startswith("warn")
    assert "activate the environment" in rows["packages"]
    (broken / "photos" / "nowhere").mkdir(parents=True)
    (broken / "out" / "download" / "dtd.json").write_text("[]")
    rows, _ = doctor(broken)
    assert "out/download/dtd.json is damaged" in rows["data"]
    assert rows["data"].endswith("->  dvc repro --force --single-item download@dtd")
    mended = small.stage(broken, "mend")
    assert mended.returncode == 0, mended.stderr
    assert "rwlock cannot be read: DVC was killed while it wrote it" in mended.stderr
    assert "rwlock" not in doctor(broken)[0]["DVC"]


def test_a_store_named_as_the_readme_does(repo):
    uri = "sqlite:///mlflow.db"
    assert doctor(repo, MLFLOW_TRACKING_URI=uri)[0]["MLflow"].startswith("ok")
    tracked = small.stage(repo, "track", MLFLOW_TRACKING_URI=uri)
    assert tracked.returncode == 0, tracked.stderr
    try:
        assert doctor(repo, MLFLOW_TRACKING_URI=uri)[0]["MLflow"] == f"ok    MLflow: {uri}"
        (repo / "mlflow.db").write_bytes(b"no database" * 100)
        row = doctor(repo, MLFLOW_TRACKING_URI=uri)[0]["MLflow"]
        assert row.startswith("fail")
        assert "move it away" in row
    finally:
        (repo / "mlflow.db").unlink()


KILLED = """
import os, signal, sqlite3
database = sqlite3.connect("mlflow.db")
database.execute("CREATE TABLE experiments (name)")
database.commit()
database.execute("PRAGMA cache_size = 1")  # so that a part of what follows is in the file
for _ in range(1000):
    database.execute("INSERT INTO experiments VALUES (?)", ("name" * 100,))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_store_whose_writer_was_killed_is_sound(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    subprocess.run([sys.executable, "-c", KILLED], check=False)
    assert (tmp_path / "mlflow.db-journal").stat().st_size > 0
    assert doctor_module.store(None).state == "ok"


def test_dvc_status_is_never_killed(repo, tmp_path, monkeypatch):
    """Neither when it takes too long nor at ctrl-C: it would leave its files as they are at that moment."""
    slow, notes = tmp_path / "repo", tmp_path / "notes"
    shutil.copytree(repo, slow)
    with (slow / "big").open("wb") as file:
        file.truncate(200 << 30)  # sparse; it takes minutes to hash
    (slow / "dvc.yaml").write_text("stages: {slow: {cmd: python work.py, deps: [big]}}\n")
    dep = {"path": "big", "hash": "md5", "md5": "0" * 32, "size": 200 << 30}
    lock = {"schema": "2.0", "stages": {"slow": {"cmd": "python work.py", "deps": [dep]}}}
    (slow / "dvc.lock").write_text(json.dumps(lock))
    env = small.environment(**noting(notes))
    monkeypatch.setattr(doctor_module, "DVC_PATIENCE", 10.0)
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    monkeypatch.chdir(slow)
    row = doctor_module.dvc(None)
    assert (row.state, row.found) == ("warn", "dvc status takes more than 10 s")
    assert noted(notes, "status", "--json") == [True]

    run = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "doctor"], cwd=slow, env=env, stderr=subprocess.PIPE, text=True
    )
    assert "waiting for `dvc status`" in run.stderr.readline()
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=doctor_module.DVC_PATIENCE * 6) == 130
    assert noted(notes, "status", "--json") == [True, True]


def test_it_runs_without_params_and_without_a_package(repo, tmp_path):
    bare = tmp_path / "repo"
    bare.mkdir()
    shutil.copy(ROOT / "dvc.yaml", bare)
    rows, code = doctor(bare)
    assert code == 1
    assert rows["params.yaml"].startswith("fail")
    assert "pipeline preset demo" in rows["params.yaml"]
    assert rows["packages"].startswith("ok")
    for name in ("torch", "typer"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('no', name='{name}')\n")
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    done = small.stage(repo, "doctor", PYTHONPATH=path)
    assert done.returncode == 1
    assert done.stderr == "error: the package typer is missing; pip install -c constraints.txt -e '.[pipeline]'\n"
    (tmp_path / "typer.py").unlink()
    rows, code = doctor(repo, PYTHONPATH=path)
    assert code == 1
    assert "the package torch is missing  ->  pip install" in rows["gpu"]


def test_the_disk_that_the_paper_preset_needs(repo, tmp_path):
    paper = tmp_path / "repo"
    shutil.copytree(repo, paper)
    raw = yaml.safe_load((ROOT / "pipeline" / "presets" / "paper.yaml").read_text())
    (paper / "params.yaml").write_text(yaml.safe_dump(raw))
    rows, _ = doctor(paper)
    # Twice the 217 GB of the archives, packed images and adapters, as `python -m pipeline cost` has them.
    needed = float(rows["disk"].split(" GB still needed")[0].split()[-1])
    assert 480 < needed < 520
    manifest = json.loads((paper / "out" / "download" / "dtd.json").read_text())
    assert manifest["suite"] == "embedded"
    assert "15 not fetched yet" in rows["data"]
