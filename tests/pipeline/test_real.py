"""The paper's DAG over replicas of all fifteen real data sets: `pytest -m slow tests/pipeline/test_real.py`."""

import hashlib
import json

import open_clip
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import save_file

from heba.evaluation.record import read_record
from tests import replicas
from tests.pipeline.repository import ROOT, call, copy_code, initialise, stage
from tests.server import serve

CONFIG = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def repository(folder, datasets, variants):
    """A repository with the paper's preset, cut to a small backbone with random weights and one epoch."""
    copy_code(folder)
    replicas.build_all(folder / "mirror", [*datasets, *variants])
    (folder / "small.json").write_text(json.dumps(CONFIG))
    state = open_clip.CLIP(**CONFIG).state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "small.safetensors")
    params = yaml.safe_load((ROOT / "pipeline" / "presets" / "paper.yaml").read_text())
    params |= {"datasets": datasets, "seeds": [1], "shots": 2}
    params["data"] |= {"mirror": "mirror", "catalog": "mirror/catalog.yaml"}
    params["backbone"] = {"name": "small.json", "pretrained": "small.safetensors"}
    params["methods"] = ["zero_shot", "heba"]
    params["heba"] |= {"start": 1, "end": 2, "epochs": 1, "batch_size": 16}
    params["heba"]["overrides"]["cross_dataset"] |= {"start": 1, "epochs": 1, "batch_size": 16}
    params["transfer"] |= {"source": datasets[0], "targets": datasets[1:], "variants": variants, "seeds": [1]}
    params["few_shot"] = {"datasets": datasets[1:3], "seeds": [1], "shots": [1, 2]}
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    initialise(folder)
    return folder


def test_real_data_sets_go_through_the_stages(tmp_path):
    repo = repository(tmp_path, ["eurosat", "dtd"], [])
    done = call(repo, "dvc", "repro", "-q", "precompute@eurosat")
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = json.loads((repo / "out" / "download" / "eurosat.json").read_text())
    assert manifest["images"] == 40
    prompts = json.loads((repo / "out" / "precompute" / "eurosat" / "prompts.json").read_text())
    assert len(prompts["prompts"]["descriptions"]) == 20
    (repo / "small.safetensors").write_bytes((repo / "small.safetensors").read_bytes()[:-1] + b"x")
    changed = stage(repo, "precompute", "--dataset", "eurosat")
    assert changed.returncode == 1
    assert "small.safetensors is not that of out/backbone.json" in changed.stderr
    assert stage(repo, "backbone").returncode == 0
    (repo / "small.json").write_text(json.dumps(CONFIG | {"preprocess_cfg": {"resize_mode": "squash"}}))
    changed = stage(repo, "precompute", "--dataset", "eurosat")
    assert changed.returncode == 1
    assert "small.json is not that of out/backbone.json" in changed.stderr


def change(repo, file, edit):
    raw = yaml.safe_load((repo / file).read_text())
    edit(raw)
    (repo / file).write_text(yaml.safe_dump(raw))


def test_what_needs_an_account_says_what_is_missing_where_to_get_it_and_where_to_put_it(tmp_path):
    repo = repository(tmp_path, ["eurosat", "dtd"], [])
    train, val, devkit = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
    entry = yaml.safe_load((ROOT / "heba" / "sources" / "catalog.yaml").read_text())["imagenet"]
    archives = repo / "data" / "archives" / "imagenet"
    archives.mkdir(parents=True)
    entry["descriptions"] = replicas.publish(archives, "imagenet.py", b'prompts = {"tench": ["which swims."]}')
    for file in entry["sources"][0]:
        file["size"] = 1000
    change(repo, "mirror/catalog.yaml", lambda catalog: catalog.update(imagenet=entry))
    change(repo, "params.yaml", lambda params: params["datasets"].append("imagenet"))

    done = stage(repo, "download", "--dataset", "imagenet")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    message = done.stderr[done.stderr.index("error:") :]
    for part in (train, val, devkit, "https://image-net.org/challenges", "register", str(archives)):
        assert part in message
    assert not (repo / "data" / "real" / "imagenet").exists()

    # With the devkit there, and a validation tar that is not whole, only what is wanting is named.
    (archives / val).write_bytes(b"half")
    entry["sources"][0][2] |= replicas.publish(archives, devkit, b"as published")
    entry["sources"][0][2].pop("md5")
    change(repo, "mirror/catalog.yaml", lambda catalog: catalog.update(imagenet=entry))
    done = stage(repo, "download", "--dataset", "imagenet")
    message = done.stderr[done.stderr.index("error:") :]
    assert f"Put {train}, {val} into {archives}" in message
    assert devkit not in message
    assert f"{archives / val}: wrong checksum" in message
    assert (archives / val).read_bytes() == b"half"

    split = yaml.safe_load((repo / "mirror" / "catalog.yaml").read_text())["eurosat"]["split"]["file"]
    (repo / "mirror" / "eurosat" / split).unlink()
    done = stage(repo, "download", "--dataset", "eurosat")
    assert f"its split file cannot be had, for want of {split}. Put {split} into" in done.stderr


def test_a_download_over_a_bad_network_ends_right_and_is_recorded(tmp_path):
    repo = repository(tmp_path, ["eurosat", "dtd"], [])
    with serve() as server:
        for path in (repo / "mirror" / "dtd").iterdir():
            server.files[f"official/{path.name}"] = path.read_bytes()
        archive = "dtd-r1.0.1.tar.gz"
        content = server.files[f"official/{archive}"]
        server.files[f"institute/dtd/{archive}"] = content
        server.faults |= {f"institute/dtd/{archive}": "404", f"official/{archive}": "cut"}

        def official(catalog):
            for file in (catalog["dtd"]["sources"][0][0], catalog["dtd"]["split"], catalog["dtd"]["descriptions"]):
                file["url"] = f"{server.url}/official/{file['file']}"

        change(repo, "mirror/catalog.yaml", official)
        change(repo, "params.yaml", lambda params: params["data"].update(mirror=f"{server.url}/institute"))
        done = stage(repo, "download", "--dataset", "dtd")
        assert done.returncode == 0, done.stderr
        asked = [name for name, _ in server.requests if name.endswith(archive)]
    assert asked == [f"institute/dtd/{archive}", *2 * [f"official/{archive}"]]
    assert "404" in done.stderr
    manifest = json.loads((repo / "out" / "download" / "dtd.json").read_text())
    assert manifest["archives"] == [
        {"file": archive, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    ]
    assert "127.0.0.1" not in json.dumps(manifest)
    split = json.loads((repo / "data" / "real" / "dtd" / "split.json").read_text())
    assert manifest["images"] == sum(map(len, split.values())) == 4 * 47
    names = [path.name for path in (repo / "data" / "archives" / "dtd").iterdir()]
    assert sorted(names) == sorted([archive, "dtd.py", "split_zhou_DescribableTextures.json"])

    lost = repo / "data" / "real" / "dtd" / "images" / split["test"][0][0]
    lost.unlink()
    done = stage(repo, "backbone")
    assert done.returncode == 0, done.stderr
    done = stage(repo, "precompute", "--dataset", "dtd")
    assert done.returncode == 1
    assert f"1 of the split are missing: {split['test'][0][0]}" in done.stderr


def test_weights_trained_with_quickgelu_are_refused_in_a_plain_gelu_model(tmp_path):
    repo = repository(tmp_path, ["eurosat", "dtd"], [])
    # As OpenAI's checkpoints, which name these besides the weights.
    numbers = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(77)}
    torch.save(open_clip.CLIP(**CONFIG).state_dict() | numbers, repo / "openai.pt")
    change(repo, "params.yaml", lambda params: params["backbone"].update(pretrained="openai.pt"))
    done = stage(repo, "backbone")
    assert done.returncode == 0, done.stderr
    (repo / "small.json").write_text(json.dumps(CONFIG | {"quick_gelu": False}))
    done = stage(repo, "backbone")
    assert done.returncode == 1
    assert 'QuickGELU: set "quick_gelu": true in small.json' in done.stderr

    change(repo, "params.yaml", lambda params: params.update(backbone={"name": "ViT-B-16", "pretrained": "dfn2b"}))
    done = stage(repo, "backbone", HTTPS_PROXY="http://127.0.0.1:9")
    assert done.returncode == 1
    assert "the weights 'dfn2b' were trained with QuickGELU: use ViT-B-16-quickgelu" in done.stderr


@pytest.mark.slow
def test_the_whole_paper_dag(tmp_path):
    datasets = [d for d in replicas.load_names() if not d.startswith("imagenet_") and d != "imagenetv2"]
    variants = [d for d in replicas.load_names() if d not in datasets]
    repo = repository(tmp_path, datasets, variants)
    done = call(repo, "dvc", "repro", "-q")
    assert done.returncode == 0, done.stdout + done.stderr
    wanted = {
        "base_to_novel": datasets,
        "cross_dataset": datasets[1:],
        "domain_generalization": variants,
        "few_shot": datasets[1:3],
    }
    for protocol, there in wanted.items():
        table = pd.read_csv(repo / "reports" / f"{protocol}.csv")
        assert set(table["dataset"]) == {*there, "average"}
        assert set(table["method"]) == {"zero_shot", "heba"}
        assert table["accuracy"].between(0, 100).all()
    catalog = yaml.safe_load((repo / "mirror" / "catalog.yaml").read_text())
    records = [read_record(path) for path in (repo / "out").glob("evaluate*/**/*.json")]
    for record in records:
        images = sum(group.n for group in record.groups.values())
        assert images == catalog[record.dataset]["counts"]["test"] > 0
    found = {(r.protocol, r.dataset, r.shots, r.method) for r in records}
    assert len(found) == len(records)
    evaluated = [
        *(("base_to_novel", name, 2) for name in datasets),
        *(("cross_dataset", name, 2) for name in datasets[1:]),
        *(("domain_generalization", name, 2) for name in variants),
        *(("few_shot", name, shots) for name in datasets[1:3] for shots in (1, 2)),
    ]
    assert found == {(*about, method) for about in evaluated for method in ("zero_shot", "heba")}
    classes = [100, 37, 196, 102, 101, 100, 397, 47, 10, 101, 1000]
    names = {}
    for path in (repo / "out" / "precompute").glob("*/prompts.json"):
        names[path.parent.name] = len(json.loads(path.read_text(encoding="utf-8"))["class_names"])
    assert [names[d] for d in (*datasets[1:], "imagenet")] == classes
    assert [names[v] for v in variants] == [1000, 1000, 200, 200]
    page = (repo / "reports" / "index.html").read_text()
    assert "published" in page
    assert "no paper result" not in page
