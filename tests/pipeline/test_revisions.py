"""`compare` of experiments and revisions: real ones of DVC, of a stage that writes the evaluations."""

import json
from pathlib import Path

import pandas as pd
import pytest

from pipeline.commands import revisions
from tests.pipeline.repository import ROOT, call, initialise, stage

PARAMS = """suite: embedded
backbone: {name: tiny, pretrained: embedded}
methods: [zero_shot, heba, gda]
shots: 16
noise: 0
"""
# HeBA gains with the shots on all data sets; GDA's noise is up on one half of them and down on the other.
WORK = """
import csv, pathlib, yaml
from heba.data.datasets import BENCHMARKS
from pipeline.report.provenance import COLUMNS
params = yaml.safe_load(open("params.yaml"))
pathlib.Path("reports").mkdir(exist_ok=True)
with open("reports/evaluations.csv", "w", newline="") as file:
    rows = csv.writer(file)
    rows.writerow(COLUMNS)
    for i, dataset in enumerate(BENCHMARKS[:8]):
        for seed in (1, 2):
            gains = {"zero_shot": 0, "heba": params["shots"] + seed, "gda": params["noise"] * (-1) ** i}
            for method, gain in gains.items():
                for group, accuracy in (("base", 50 + i), ("novel", 40)):
                    one = ["base_to_novel", dataset, method, params["shots"], seed, group, accuracy + gain, 100]
                    rows.writerow([*one, "adapter", f"inputs {gain}"])
    for i, dataset in enumerate(BENCHMARKS[1 : 4 if params["noise"] else 3]):
        one = ["cross_dataset", dataset, "heba", 16, 1, "all", 30 + params["shots"], 100]
        rows.writerow([*one, "adapter", params["shots"]])
"""
STAGES = """
stages:
  report:
    cmd: python work.py
    deps: [work.py]
    params: [suite, shots, noise]
    outs:
      - reports/evaluations.csv: {cache: false}
"""


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    """A repository with the experiments few (4 shots), noisy and real (another suite)."""
    folder = tmp_path_factory.mktemp("revisions") / "repo"
    folder.mkdir()
    for name, text in {"params.yaml": PARAMS, "work.py": WORK, "dvc.yaml": STAGES}.items():
        (folder / name).write_text(text)
    initialise(folder)
    for command in (
        "dvc repro -q",
        "git add .",
        "git commit -qm reports",
        "dvc exp run -q -n few -S shots=4",
        "dvc exp run -q -n noisy -S shots=16 -S noise=2",
        "dvc exp run -q -n real -S noise=0 -S suite=real",
        "git checkout -q .",
    ):
        done = call(folder, *command.split(), PYTHONPATH=str(ROOT))
        assert done.returncode == 0, command + done.stdout + done.stderr
    return folder


def test_an_experiment_is_compared_with_the_workspace(repo, monkeypatch):
    done = stage(repo, "compare", "few")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == ["# few and workspace", "", "- shots: 4 and 16"]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    # Of eight data sets with differences of the same sign, p is 2 / 2^8.
    assert [
        "HeBA",
        "Novel",
        "45.50 ± 0.71",
        "57.50 ± 0.71",
        "+12.00",
        "+12.00 to +12.00",
        "0.008",
        "different",
    ] in cells
    assert [row[0] for row in cells if row[1] == "Novel"] == ["HeBA"]
    assert ["DTD", "HeBA"] not in [row[:2] for row in cells]  # not among the eight
    [caltech] = [row for row in cells if row[:2] == ["Caltech101", "HeBA"] and len(row) == 5]
    assert caltech[3] == "45.50 ± 0.71 → 57.50 ± 0.71 (+12.00)"
    assert "Trained and evaluated alike in both: CLIP, GDA." in lines
    # The two data sets of the other protocol are too few for a test.
    assert ["HeBA", "Accuracy", "34.00", "46.00", "+12.00", "", "", "too few data sets to say"] in cells
    monkeypatch.chdir(repo)
    found = json.loads(revisions.text("few", "HEAD", as_json=True))
    assert (found["first"], found["second"], found["params"]) == ("few", "HEAD", {"shots": [4, 16]})
    assert found["unchanged"] == {"base_to_novel": ["zero_shot", "gda"]}
    assert {row["says"] for row in found["averages"] if row["protocol"] == "base_to_novel"} == {"different"}
    assert all(row["difference"] == 12 for row in found["datasets"] if row["group"] != "h")


def test_a_difference_inside_the_noise_is_said_to_be_so_and_what_one_lacks_is_named(repo, monkeypatch):
    monkeypatch.chdir(repo)
    found = json.loads(revisions.text("noisy", as_json=True))
    assert {row["method"]: row["says"] for row in found["averages"]} == {"gda": "within the noise"}
    assert found["notes"] == ["cross_dataset: dataset stanford_cars: in one of the two alone, left out."]
    assert "within the noise" in revisions.text("noisy")


def test_what_cannot_be_compared_is_told_with_the_remedy(repo, monkeypatch):
    monkeypatch.chdir(repo)
    for names, message in (
        (["fews"], "fews: unknown Git revision 'fews'; near it are few"),
        (["no such thing"], "exp list -A"),
        (["HEAD~1"], "HEAD~1: has no reports/evaluations.csv; it was not run to the end"),
        (["HEAD:params.yaml"], "HEAD:params.yaml: is in git, and no commit"),
        (["HEAD^{tree}"], "is in git, and no commit"),
        (["real"], "cannot be compared: suite is real and embedded"),
        (["HEAD", "few", "--methods", "gda"], "--methods: is of a folder of images, not of revisions"),
        (["reports", "--json"], "--json: is of two revisions, not of a folder of images"),
    ):
        done = stage(repo, "compare", *names)
        assert (done.returncode, done.stdout) == (1, ""), names
        assert message in done.stderr
    old = pd.read_csv("reports/evaluations.csv").drop(columns="inputs_sha256")
    old.to_csv("reports/evaluations.csv", index=False)
    with pytest.raises(ValueError, match=r"evaluations\.csv of workspace: has the columns .*dvc repro report"):
        revisions.read("workspace")
    Path("reports/evaluations.csv").unlink()
    with pytest.raises(ValueError, match=r"reports/evaluations\.csv: No such file.*dvc repro"):
        revisions.read("workspace")
    call(repo, "git", "checkout", "-q", ".")


def test_a_repository_without_commits_has_no_revisions(tmp_path):
    call(tmp_path, "git", "init", "-q")
    done = stage(tmp_path, "compare", "one", "other")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: one: ")
