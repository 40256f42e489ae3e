"""Same in, same out: whatever the number of jobs and workers, and the order of files on disk."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from pipeline.runner.warm import SERVER, stage_server
from pipeline.stages.download import describe_folder
from tests.pipeline import breakable
from tests.pipeline.breakable import TRAINED, alone, small_params, write_params
from tests.pipeline.repository import ROOT, call, stage, wait_for
from tests.pipeline.test_real import repository

RECORD = "base_to_novel-2-1.json"
STAGES = ("backbone", "download", "split", "precompute", "train", "evaluate")


def run(repo, stages=STAGES, **env):
    for name in stages:
        options = [] if name == "backbone" else ["--dataset", "dtd"]
        for method in [("--method", "zero_shot"), ("--method", "heba")] if name == "train" else [()]:
            done = stage(repo, name, *options, *method, PYTHONPATH=str(ROOT), **env)
            assert done.returncode == 0, done.stderr
    return files(repo)


def files(repo):
    return {p.relative_to(repo): p.read_bytes() for p in sorted((repo / "out").rglob("*")) if p.is_file()}


def folder(path, **changes):
    """A folder with params.yaml, in which stages run one by one."""
    path.mkdir(parents=True)
    params = alone(small_params()) | changes
    params["heba"] |= {"epochs": 3}
    write_params(path, params)
    return path


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    repo = folder(tmp_path_factory.mktemp("same") / "first")
    return repo, run(repo)


def test_neither_the_order_of_files_nor_the_number_of_workers_matters(first, tmp_path, monkeypatch):
    """The same data set, its files made in another order, on another number of threads, with other hashes."""
    repo, expected = first
    other = folder(tmp_path / "other")
    images = repo / "data" / "embedded" / "dtd" / "images"
    for path in sorted((p for p in images.rglob("*") if p.is_file()), reverse=True):
        target = other / path.relative_to(repo)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    for name in ("split.json", "descriptions.json"):
        shutil.copy(images.with_name(name), other / "data" / "embedded" / "dtd" / name)
    shutil.copytree(repo / "out" / "download", other / "out" / "download")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv("PYTHONHASHSEED", "5")
    server = stage_server(other)  # not that of the tests, which has their environment
    if server:
        wait_for(Path(server[SERVER]).exists)
    assert run(other, [s for s in STAGES if s != "download"], **server) == expected


def test_deterministic_has_no_effect_on_a_cpu(first, tmp_path):
    repo, expected = first
    other = folder(tmp_path / "other", deterministic=True)
    found = run(other)
    differing = {path.name for path in expected if found[path] != expected[path]}
    assert differing == {"config.json", RECORD}  # which say so
    config = json.loads((other / TRAINED / "config.json").read_text())
    before = json.loads((repo / TRAINED / "config.json").read_text())
    assert {key for key in config if config[key] != before[key]} == {"deterministic", "inputs_sha256"}
    records = [next((root / "out" / "evaluate").glob(f"dtd/heba/{RECORD}")) for root in (repo, other)]
    before, after = (json.loads(path.read_text()) for path in records)
    assert {key for key in after if after[key] != before[key]} == {"inputs_sha256", "evaluated_sha256"}


def test_names_that_are_not_ascii(tmp_path):
    """Spaces and many scripts in paths and classes; the last stage where the locale knows ASCII alone."""
    repo = repository(tmp_path / "ein Ordner für Bilder", ["eurosat", "dtd"], [])

    def run_stage(*args, **env):
        done = stage(repo, *args, **env)
        assert done.returncode == 0, done.stderr

    run_stage("backbone")
    run_stage("download", "--dataset", "eurosat")
    data = repo / "data" / "real" / "eurosat"
    split = json.loads((data / "split.json").read_text(encoding="utf-8"))
    names = sorted({name for part in split.values() for _, _, name in part})
    new = dict(zip(names, ["gestreift, weiß", "точечный", "格子", "zig 'n' \"zag\"", *names[4:]], strict=True))
    for part in split.values():
        for item in part:
            renamed = item[0].replace("/", "/ñ ", 1)
            (data / "images" / item[0]).rename(data / "images" / renamed)
            item[0], item[2] = renamed, new[item[2]]
    texts = {name: [f"{name}, même ici"] for name in new.values()}
    (data / "split.json").write_text(json.dumps(split, ensure_ascii=False), encoding="utf-8")
    (data / "descriptions.json").write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")
    manifest = repo / "out" / "download" / "eurosat.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | describe_folder(data, own=False)))
    run_stage("split", "--dataset", "eurosat")
    run_stage("precompute", "--dataset", "eurosat")
    run_stage("train", "--dataset", "eurosat", "--method", "heba", "--protocol", "base_to_novel")
    ascii_alone = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", SERVER: ""}
    run_stage("evaluate", "--dataset", "eurosat", **ascii_alone)
    record = json.loads((repo / "out/evaluate/eurosat/heba" / RECORD).read_text(encoding="utf-8"))
    classes = [name for group in record["groups"].values() for name in group["class_names"]]
    assert sorted(classes) == sorted(new.values())


@pytest.mark.slow
def test_the_whole_embedded_pipeline_twice(tmp_path):
    """Once as `dvc repro` runs it, once side by side: every out is the same."""
    found = []
    for name, command in (
        ("one by one", ["dvc", "repro"]),
        ("side by side", [sys.executable, "-m", "pipeline", "repro", "--jobs", "2"]),
    ):
        repo = breakable.make(tmp_path / name, breakable.read_params())
        done = call(repo, *command)
        assert done.returncode == 0, done.stdout + done.stderr
        found.append(breakable.outs(repo))
        shutil.rmtree(repo / "data")
    assert found[0] == found[1]
    assert len([name for name in found[0] if name.endswith("adapter.safetensors")]) == 2 * 26
