"""The paper's DAG over replicas of all fifteen real data sets: `pytest -m slow tests/pipeline/test_real.py`."""

import json
import shutil

import open_clip
import pytest
import yaml
from safetensors.torch import save_file

from tests import replicas
from tests.pipeline.test_stages import ROOT, pipeline, stage

CONFIG = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def repository(folder, datasets, variants):
    """A repository with the paper's preset, cut to a small backbone with random weights and one epoch."""
    for name in ("heba", "pipeline", "dvc.yaml", ".gitignore", ".dvcignore"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    replicas.build_all(folder / "mirror", [*datasets, *variants])
    (folder / "small.json").write_text(json.dumps(CONFIG))
    state = open_clip.CLIP(**CONFIG).state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "small.safetensors")
    params = yaml.safe_load((ROOT / "pipeline" / "presets" / "paper.yaml").read_text())
    params |= {"datasets": datasets, "seeds": [1], "shots": 2}
    params["data"] |= {"mirror": "mirror", "catalog": "mirror/catalog.yaml"}
    params["backbone"] = {"name": "small.json", "pretrained": "small.safetensors"}
    for section in (params, params["transfer"]):
        section["adapter"] |= {"start": 1, "end": 2}
        section["train"] |= {"epochs": 1, "batch_size": 16}
    params["transfer"] |= {"source": datasets[0], "targets": datasets[1:], "variants": variants, "seeds": [1]}
    params["few_shot"] = {"datasets": datasets[1:2], "seeds": [1], "shots": [1, 2]}
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    for command in (["git", "init", "-q"], ["dvc", "init", "-q"]):
        done = pipeline(folder, *command)
        assert done.returncode == 0, done.stderr
    return folder


def test_real_data_sets_go_through_the_stages(tmp_path):
    repo = repository(tmp_path, ["eurosat", "dtd"], [])
    done = pipeline(repo, "dvc", "repro", "-q", "precompute@eurosat")
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = json.loads((repo / "out" / "download" / "eurosat.json").read_text())
    assert manifest["images"] == 40
    prompts = json.loads((repo / "out" / "precompute" / "eurosat" / "prompts.json").read_text())
    assert len(prompts["prompts"]) == 20
    (repo / "small.safetensors").write_bytes((repo / "small.safetensors").read_bytes()[:-1] + b"x")
    changed = stage(repo, "precompute", "--dataset", "eurosat")
    assert changed.returncode == 1
    assert "small.safetensors is not the file of out/backbone.json" in changed.stderr


def test_what_needs_an_account_says_how_to_get_it(tmp_path):
    repo = repository(tmp_path, ["eurosat", "dtd"], [])
    params = yaml.safe_load((repo / "params.yaml").read_text())
    params["datasets"].append("imagenet")
    params["data"] |= {"catalog": None, "mirror": None}
    (repo / "params.yaml").write_text(yaml.safe_dump(params))
    archives = repo / "data" / "archives"
    archives.mkdir(parents=True)
    done = stage(repo, "download", "--dataset", "imagenet", HTTPS_PROXY="http://127.0.0.1:9")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "GB" in done.stderr
    assert not (repo / "data" / "real" / "imagenet").exists()


@pytest.mark.slow
def test_the_whole_paper_dag(tmp_path):
    datasets = [d for d in replicas.load_names() if not d.startswith("imagenet_") and d != "imagenetv2"]
    variants = [d for d in replicas.load_names() if d not in datasets]
    repo = repository(tmp_path, datasets, variants)
    done = pipeline(repo, "dvc", "repro", "-q")
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = json.loads((repo / "reports" / "metrics.json").read_text())
    assert set(metrics["base_to_novel"]["datasets"]) == set(datasets)
    assert set(metrics["cross_dataset"]["datasets"]) == set(datasets[1:])
    assert set(metrics["domain_generalization"]["datasets"]) == set(variants)
    classes = [100, 37, 196, 102, 101, 100, 397, 47, 10, 101, 1000]
    names = {}
    for path in (repo / "out" / "precompute").glob("*/prompts.json"):
        names[path.parent.name] = len(json.loads(path.read_text(encoding="utf-8"))["class_names"])
    assert [names[d] for d in (*datasets[1:], "imagenet")] == classes
    assert [names[v] for v in variants] == [1000, 1000, 200, 200]
    page = (repo / "reports" / "index.html").read_text()
    assert "published" in page
    assert "no paper result" not in page
