"""Same in, same out: whatever the number of jobs and workers, and the order of files on disk."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from heba.evaluation.record import read_record
from pipeline.runner.warm import SERVER, stage_server
from pipeline.stages.download import describe_folder
from tests.pipeline import breakable
from tests.pipeline.breakable import ONE, TRAINED
from tests.pipeline.repository import ROOT, call, stage, wait_for
from tests.pipeline.test_real import repository

STAGES = ("backbone", "download", "split", "precompute", "train", "evaluate")


def run(repo, stages=STAGES, **env):
    for name in stages:
        options = {"backbone": (), "train": ONE}.get(name, ("--dataset", "dtd"))
        done = stage(repo, name, *options, **env)
        assert done.returncode == 0, done.stderr
    return files(repo)


def files(repo):
    return {p.relative_to(repo): p.read_bytes() for p in sorted((repo / "out").rglob("*")) if p.is_file()}


def folder(path, **changes):
    """A folder with params.yaml, in which stages run one by one."""
    path.mkdir(parents=True)
    params = breakable.read_params() | {"seeds": [1], "shots": 2} | changes
    params["heba"] |= {"epochs": 3, "batch_size": 4}
    breakable.write_params(path, breakable.alone(params))
    return path


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    repo = folder(tmp_path_factory.mktemp("same") / "first")
    return repo, run(repo, PYTHONPATH=str(ROOT))


def test_neither_the_order_of_files_nor_the_number_of_workers_matters(first, tmp_path, monkeypatch):
    """The same data set, its files made in another order, on another number of threads."""
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
    monkeypatch.setenv("PYTHONHASHSEED", "5")  # a stage has that of the server it is a fork of
    with stage_server(ROOT) as server:
        if server:
            wait_for(Path(server[SERVER]).exists)
        env = server | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
        assert run(other, [s for s in STAGES if s != "download"], **env) == expected


def test_deterministic_has_no_effect_on_a_cpu(first, tmp_path):
    _, expected = first
    other = folder(tmp_path / "other", deterministic=True)
    found = run(other, PYTHONPATH=str(ROOT))
    differing = {path for path in expected if found[path] != expected[path]}
    # The training says so, and its record says by which inputs it was trained.
    config, record = Path(TRAINED, "config.json"), Path("out/evaluate/dtd/heba/base_to_novel-2-1.json")
    assert differing == {config, record}
    for path, keys in (
        (config, {"deterministic", "inputs_sha256"}),
        (record, {"inputs_sha256", "evaluated_sha256"}),
    ):
        before, after = json.loads(expected[path]), json.loads(found[path])
        assert {key for key in after if after[key] != before[key]} == keys


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
    # Python reads these as it starts, so the stage starts by itself.
    ascii_alone = {"HEBA_STAGE_SERVER": "", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    run_stage("evaluate", "--dataset", "eurosat", **ascii_alone)
    record = read_record(repo / "out" / "evaluate" / "eurosat" / "heba" / "base_to_novel-2-1.json")
    classes = [name for group in record.groups.values() for name in group.class_names]
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
