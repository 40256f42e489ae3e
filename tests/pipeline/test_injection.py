"""Values of params.yaml that try to be commands, or paths out of `out/`."""

from pathlib import Path

import pytest
import yaml

from tests.pipeline import breakable
from tests.pipeline.repository import call

HOSTILE = {
    "datasets": ["dtd", "dtd; touch PWNED-datasets #"],
    "own": {"mine; touch PWNED-own #": {"kind": "folder", "path": "photos; touch PWNED-path #"}},
    "methods": ["heba", "heba; touch PWNED-methods #"],
    "heba; touch PWNED-methods #": {},
    "seeds": [1, "1; touch PWNED-seeds #"],
    "shots": "2; touch PWNED-shots #",
    "transfer.source": "dtd; touch PWNED-source #",
    "transfer.variants": ["v; touch PWNED-variants #", "v'\ntouch PWNED-lines\n'", "v$(touch PWNED-dollar)"],
    "transfer.protocols": ["cross_dataset; touch PWNED-transfer #"],
    "transfer.seeds": ["1; touch PWNED-transfer-seeds #"],
    "few_shot.datasets": ["dtd; touch PWNED-few-datasets #"],
    "few_shot.shots": ["1; touch PWNED-few-shots #"],
    "few_shot.seeds": ["1; touch PWNED-few-seeds #"],
}

CONSTANT = {"params", "backbone", "protocols", "report"}  # stages without such values


@pytest.fixture
def repo(tmp_path):
    folder = breakable.make(tmp_path / "repo", breakable.alone(breakable.small_params()))
    (folder / "photos").mkdir()
    (folder / "photos" / "notes.json").write_text("mine")
    return folder


def change(repo, **values):
    """Set keys of params.yaml by their dotted names."""
    path = repo / "params.yaml"
    params = yaml.safe_load(path.read_text())
    for name, value in values.items():
        *sections, key = name.split(".")
        place = params
        for section in sections:
            place = place[section]
        place[key] = value
    path.write_text(yaml.safe_dump(params))


def test_no_value_becomes_a_command(repo, monkeypatch):
    """Every stage starts, in spite of the stage `params` and of those before it that fail."""
    from dvc.repo import Repo

    change(repo, **HOSTILE)
    monkeypatch.chdir(repo)
    with Repo(str(repo)) as dvc:
        stages = {stage.addressing: stage for stage in dvc.index.stages}
    commands = [stage.cmd for stage in stages.values()]
    for value in ("datasets", "methods", "variants", "lines", "dollar", "transfer"):
        assert any(f"touch PWNED-{value}" in command for command in commands), value
    # What a stage needs is there, or DVC would not start it. The last come first: a stage that fails has no outs.
    for dep in {dep.fs_path for stage in stages.values() for dep in stage.deps}:
        path = Path(dep)
        if path.suffix:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        else:
            path.mkdir(parents=True, exist_ok=True)
    groups = [name for name in yaml.safe_load((repo / "dvc.yaml").read_text())["stages"] if name not in CONSTANT]
    done = call(repo, "dvc", "repro", "--single-item", "--ignore-errors", *reversed(groups))
    for name in stages:
        if name not in CONSTANT:
            assert f"Running stage '{name}'" in done.stdout, done.stdout + done.stderr
    assert sorted(path.name for path in repo.glob("PWNED*")) == []


def test_dvc_takes_no_mapping_for_a_value(repo):
    """It would paste the keys of a mapping without quotes."""
    change(repo, datasets=[{"dtd; touch PWNED #": 1}])
    done = call(repo, "dvc", "repro")
    assert done.returncode
    assert "Cannot interpolate data of type" in done.stderr
    assert not (repo / "PWNED").exists()


@pytest.mark.parametrize(
    ("key", "target"), [("datasets", "download"), ("transfer.variants", "download-variant"), ("methods", "train")]
)
def test_an_experiment_is_refused_before_anything_runs(repo, key, target):
    done = call(repo, "dvc", "exp", "run", "-S", f"{key}=['dtd; touch PWNED #']", target)
    assert done.returncode
    assert "touch PWNED" in done.stderr
    assert "params.yaml has" in done.stderr
    assert "Running stage 'params'" in done.stdout
    assert done.stdout.count("Running stage") == 1
    assert not (repo / "PWNED").exists()


@pytest.mark.parametrize(
    ("key", "target", "path", "what"),
    [
        ("transfer.variants", "download-variant", "../../photos/notes", "data set"),
        ("methods", "train", "../../../photos", "method"),
    ],
)
def test_a_path_out_of_the_outs_is_refused_before_dvc_removes_what_is_there(repo, key, target, path, what):
    change(repo, **{key: [path]})
    done = call(repo, "dvc", "repro", target)
    assert done.returncode
    assert f"there is no {what} '{path}'" in done.stderr
    assert (repo / "photos" / "notes.json").read_text() == "mine"
