"""Weights from others: adapters and TorchScript with code in them, and a hub that cannot be reached."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import heba
from heba import artifact
from heba.clip import backbone
from heba.methods.heba.model import AdaptedCLIP
from tests.heba import artifacts
from tests.heba.test_backbones import SMALL, TEXT
from tests.pipeline.repository import ROOT, call, stage
from tests.server import serve

CONFIG = SMALL | {"text_cfg": TEXT | {"vocab_size": 49408}}
ALONE = {"PYTHONPATH": str(ROOT), "HEBA_STAGE_SERVER": ""}  # the hub's client reads its environment once


class Attack(nn.Module):
    """Writes a file when torch.jit.load opens it."""

    def __init__(self, path: str):
        super().__init__()
        self.path = path
        self.training = False

    @torch.jit.export
    def __getstate__(self):
        return (self.path, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]):
        self.path = state[0]
        self.training = state[1]
        torch.save(torch.ones(1), self.path)

    def forward(self, x):
        return x


def adapter(folder, files, **record):
    """The folder of an adapter on a small backbone; beside it, in `files`, the backbone's own files."""
    files.mkdir(parents=True, exist_ok=True)
    (files / "small.json").write_text(json.dumps(CONFIG))
    clip = backbone.build(CONFIG)
    save_file(clip.state_dict(), files / "w.safetensors")
    named = {"name": "small.json", "pretrained": "w.safetensors"} | record
    for key, name in (("config_sha256", "small.json"), ("sha256", "w.safetensors")):
        named.setdefault(key, backbone.sha256(files / name))
    artifacts.save(
        AdaptedCLIP(clip, 1, 2, 0.1), folder, class_names=["a", "b"], backbone=artifact.Backbone(**named)
    )
    artifacts.save_classifier(torch.ones(2, 32), folder, scale=0.1)
    return folder


def params(folder, name, pretrained):
    """Write params.yaml for the backbone stage."""
    raw = yaml.safe_load((ROOT / "pipeline" / "presets" / "paper.yaml").read_text())
    raw |= {"backbone": {"name": name, "pretrained": pretrained}, "methods": ["zero_shot", "heba"]}
    if name == "small.json":
        raw["heba"] |= {"start": 1, "end": 2}
        raw["heba"]["overrides"]["cross_dataset"]["start"] = 1
    (folder / "params.yaml").write_text(yaml.safe_dump(raw))


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated
def test_the_code_in_torchscript_never_runs(tmp_path):
    """The archive lies where an adapter may name files, and has the hash that the adapter tells."""
    from pipeline.tracking.models import save_model

    mark, image = tmp_path / "mark", tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(image)
    torch.jit.script(Attack(str(mark))).save(tmp_path / "evil.pt")
    torch.jit.load(tmp_path / "evil.pt")
    assert mark.exists()  # the attack works
    mark.unlink()

    sha256 = backbone.sha256(tmp_path / "evil.pt")
    evil = adapter(tmp_path / "evil", tmp_path, pretrained="evil.pt", sha256=sha256)
    named = [
        call(
            tmp_path,
            sys.executable,
            "-m",
            "pipeline.commands.use",
            "predict",
            "a.png",
            "--adapter",
            "evil",
            **ALONE,
        )
    ]
    params(tmp_path, "small.json", "evil.pt")
    named.append(stage(tmp_path, "backbone", **ALONE))
    for done in named:
        assert done.returncode == 1
        assert "evil.pt: is TorchScript, a program that runs when it is opened" in done.stderr
        assert "Traceback" not in done.stderr
    with pytest.raises(ValueError, match="is TorchScript"):
        heba.load(evil, root=tmp_path)
    with pytest.raises(ValueError, match="is TorchScript"):
        heba.zero_shot("small.json", "evil.pt", ["cat", "dog"], root=tmp_path)
    save_model(evil, tmp_path / "model", run_id="", model_id="")
    served = call(tmp_path, sys.executable, "-c", "import mlflow; mlflow.pyfunc.load_model('model')", **ALONE)
    assert "is TorchScript" in served.stderr
    assert not mark.exists()


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_taken_by_its_hash_or_converted(tmp_path, monkeypatch):
    """As OpenAI's files would be; what the message says to do with others gives the same model."""
    config = CONFIG | {"quick_gelu": True}
    (tmp_path / "small.json").write_text(json.dumps(config))
    clip = backbone.build(config).eval()
    weights = {key: value.clone() for key, value in clip.state_dict().items()}
    clip.attn_mask = clip._buffers.pop("attn_mask")  # which tracing would save
    path = tmp_path / "own file.pt"
    example = torch.zeros(1, 3, 32, 32), torch.zeros(1, 12, dtype=torch.long)
    torch.jit.trace(clip, example, check_trace=False).save(path)
    with pytest.raises(ValueError, match="convert it: ") as refused:
        backbone.load("small.json", path.name, tmp_path)
    command = shlex.split(str(refused.value).partition("convert it: ")[2])
    subprocess.run([sys.executable, *command[1:]], check=True)
    monkeypatch.setattr(backbone, "OPENAI_FILES", {backbone.sha256(path)})
    for name in (path.name, f"{path.name}.safetensors"):
        loaded = backbone.load("small.json", name, tmp_path).clip.state_dict()
        assert all(torch.equal(v, loaded[k]) for k, v in weights.items())


@pytest.mark.parametrize("key", ["name", "pretrained"])
@pytest.mark.parametrize("how", ["above", "absolute", "link"])
def test_an_adapter_names_no_file_outside_its_root(tmp_path, key, how):
    root, outside = tmp_path / "root", tmp_path / "outside"
    adapter(root / "whole", root)
    file = outside / {"name": "small.json", "pretrained": "w.safetensors"}[key]
    outside.mkdir()
    file.write_bytes((root / file.name).read_bytes())
    (root / "link").symlink_to(outside)
    named = {"above": f"../outside/{file.name}", "absolute": str(file), "link": f"link/{file.name}"}[how]
    folder = root / "adapter"
    folder.mkdir()
    for path in (root / "whole").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["backbone"][key] = named
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=rf"backbone\.{key}: .* lies outside .*root, where an adapter may name no"
    ):
        heba.load(folder, root=root)
    assert heba.load(folder, root=root, **{key: named}).classes == ["a", "b"]
    if how == "absolute":
        # Only where the user says so: these hold the other file too.
        (outside / "small.json").write_bytes((root / "small.json").read_bytes())
        (outside / "w.safetensors").write_bytes((root / "w.safetensors").read_bytes())
        assert heba.load(folder, root=outside).classes == ["a", "b"]


def test_predict_takes_the_files_that_the_command_line_names(tmp_path):
    adapter(tmp_path / "adapter", tmp_path / "far", name="../far/small.json", pretrained="/nowhere/w.safetensors")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    command = [sys.executable, "-m", "pipeline.commands.use", "predict", "a.png", "--adapter", "adapter"]
    refused = call(tmp_path, *command, **ALONE)
    assert refused.returncode == 1
    assert "--backbone for a JSON config" in refused.stderr
    options = ["--backbone", "far/small.json", "--pretrained", "far/w.safetensors"]
    found = call(tmp_path, *command, *options, **ALONE)
    assert found.returncode == 0, found.stderr


def test_a_config_or_weights_that_changed_are_refused_before_they_are_read(tmp_path):
    folder = adapter(tmp_path / "adapter", tmp_path)
    for name in ("small.json", "w.safetensors"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(b"{")
        with pytest.raises(ValueError, match=f"{name} is another file by its sha256"):
            heba.load(folder, root=tmp_path)
        (tmp_path / name).write_bytes(whole)


def test_a_tokenizer_brings_no_code(tmp_path, monkeypatch):
    """Neither does its config get it run by the options that open_clip hands on."""
    asked = []
    tokenizers = SimpleNamespace(from_pretrained=lambda name, **options: asked.append(options))
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(AutoTokenizer=tokenizers))
    text = TEXT | {"hf_tokenizer_name": str(tmp_path), "tokenizer_kwargs": {"trust_remote_code": True}}
    (tmp_path / "asking.json").write_text(json.dumps(CONFIG | {"text_cfg": text}))
    backbone.load_tokenizer("asking.json", tmp_path)
    assert [options["trust_remote_code"] for options in asked] == [False]


@pytest.fixture
def silent():
    """The address of a server that accepts and says nothing."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(50)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.parametrize(
    ("name", "pretrained", "repo", "hub_is"),
    [
        ("ViT-B-16-quickgelu", "openai", "timm/vit_base_patch16_clip_224.openai", "away"),
        ("ViT-B-32", "laion2b_s34b_b79k", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "silent"),
    ],
)
def test_a_hub_that_cannot_be_reached_is_one_message(tmp_path, silent, name, pretrained, repo, hub_is):
    params(tmp_path, name, pretrained)
    endpoint = silent if hub_is == "silent" else "http://127.0.0.1:9"
    before = time.monotonic()
    done = stage(tmp_path, "backbone", HF_ENDPOINT=endpoint, HF_HOME=str(tmp_path / "cache"), **ALONE)
    assert time.monotonic() - before < 60
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert f"{endpoint}/{repo}/resolve/main/open_clip_model.safetensors" in done.stderr
    assert ("no answer within 10 s" in done.stderr) == (hub_is == "silent")
    assert f"save it as models/open_clip_model.safetensors under {tmp_path}, and give" in done.stderr
    assert "(in params.yaml: backbone.pretrained)" in done.stderr


def test_a_tokenizer_of_a_hub_that_is_silent(tmp_path, silent):
    (tmp_path / "transformers.py").write_text("")
    code = "from heba.clip import backbone; backbone.load_tokenizer('ViT-B-16-SigLIP')"
    env = ALONE | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    before = time.monotonic()
    done = call(tmp_path, sys.executable, "-c", code, HF_ENDPOINT=silent, HF_HOME=str(tmp_path / "cache"), **env)
    assert time.monotonic() - before < 60
    assert "the tokenizer of ViT-B-16-SigLIP cannot be loaded: not in the cache" in done.stderr
    assert "no answer within 10 s" in done.stderr


FETCH = "from heba.clip import hub; print(hub.fetch('a/b', ['w.safetensors', 'w.bin']).read_text())"


def test_a_file_of_the_hub_comes_once(tmp_path):
    """The one that is named first where the hub has it; then from the cache, without a network."""

    def fetched(folder, url):
        done = call(tmp_path, sys.executable, "-c", FETCH, HF_HOME=str(folder), HF_ENDPOINT=url, **ALONE)
        return done.stdout.strip(), done.stderr

    with serve() as server:
        server.files["a/b/resolve/main/w.bin"] = b"pickled"
        assert fetched(tmp_path / "1", server.url)[0] == "pickled"
        server.files["a/b/resolve/main/w.safetensors"] = b"safe"
        assert fetched(tmp_path / "2", server.url)[0] == "safe"
        server.faults["a/b/resolve/main/w.safetensors"] = "slow"
        assert "nor to be had from" in fetched(tmp_path / "3", server.url)[1]
    assert [fetched(tmp_path / n, "http://127.0.0.1:9")[0] for n in "12"] == ["pickled", "safe"]


def test_what_a_repository_of_the_hub_lacks(tmp_path):
    with serve() as server:
        done = call(tmp_path, sys.executable, "-c", FETCH, HF_HOME=str(tmp_path), HF_ENDPOINT=server.url, **ALONE)
    last = done.stderr.strip().splitlines()[-1]
    assert re.search(
        r"HubError: not in the cache, .*w\.safetensors, or w\.bin there \(a/b has none of these\)", last
    )
