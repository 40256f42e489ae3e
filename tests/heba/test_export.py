"""An adapter as an ONNX file: the same logits as torch's, from images of any size, and what is refused."""

import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import heba
from heba import artifact, methods
from heba.clip.preprocess import Preprocess, resize_and_crop
from heba.clip.tiny import load_tiny_clip
from heba.export import TOLERANCE, largest_difference, resize, write_onnx
from heba.methods.heba.model import AdaptedCLIP
from heba.predict import Classifier, logits_of
from pipeline.commands import use
from tests.heba import artifacts
from tests.heba.test_methods import N_CLASSES, SIZE, Data, classifier_of, fitted, settings_of
from tests.test_rooms import ROOT

onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
pytest.importorskip("onnxscript", reason="the extra onnx is not installed")


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


SIZES = [(224, 224), (300, 400), (872, 402), (402, 872), (37, 53), (300, 20), (20, 300), (231, 229)]


@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_images_are_resized_as_pillow_does_it_level_for_level(interpolation, mode):
    for preprocess in (Preprocess(s, interpolation=interpolation, resize_mode=mode) for s in (224, 64)):
        for size in SIZES:
            image = noise(*size)
            found = resize(torch.from_numpy(image)[None], preprocess)[0].numpy()
            assert np.array_equal(found, resize_and_crop(Image.fromarray(image), preprocess)), size


def trained(name, folder):
    """A classifier of a method that was trained on small random images."""
    data = Data(folder)
    model = fitted(name, data).requires_grad_(False)
    classifier = classifier_of(name, data, model)
    config = artifact.Config(
        method=name,
        settings=settings_of(name).model_dump(),
        class_names=data.classes.names,
        backbone=artifacts.TINY,
        protocol="few_shot",
        dataset="own",
        suite="embedded",
        bf16=False,
    )
    logits = logits_of(name, model, data.clip, classifier, False)
    return Classifier(data.classes.names, logits, Preprocess(SIZE), torch.device("cpu"), config)


def check_file(classifier, path):
    """The file gives what `classifier` gives, for one image and several, wide and tall ones."""
    session = onnxruntime.InferenceSession(path)
    for n, height, width in ((1, SIZE, SIZE), (5, 40, 30), (1, 20, 90), (2, 90, 20)):
        images = np.stack([noise(height, width, seed) for seed in range(n)])
        logits, probabilities = session.run(["logits", "probabilities"], {"images": images})
        expected = list(classifier.predict(map(Image.fromarray, images), top=N_CLASSES))
        for found, prediction in zip(probabilities, expected, strict=True):
            by_name = dict(zip(prediction.classes, prediction.probabilities, strict=True))
            assert found == pytest.approx([by_name[name] for name in classifier.classes], abs=1e-4)
        assert torch.from_numpy(logits).softmax(dim=-1).numpy() == pytest.approx(probabilities, abs=1e-6)


def run_the_snippet(path, classifier, folder, monkeypatch, capsys):
    """That of the documentation, on a photo."""
    monkeypatch.chdir(folder)
    shutil.copy(path, "model.onnx")
    Image.fromarray(noise(50, 70)).save("photo.jpg")
    blocks = (ROOT / "docs" / "export.md").read_text(encoding="utf-8").split("```python\n")
    (snippet,) = (block.split("```")[0] for block in blocks if "onnxruntime.InferenceSession" in block)
    Path("snippet.py").write_text(snippet, encoding="utf-8")
    runpy.run_path("snippet.py")
    (expected,) = classifier.predict("photo.jpg")
    named = [f"{n} {p:.1%}" for n, p in zip(expected.classes, expected.probabilities, strict=True)]
    assert capsys.readouterr().out.splitlines() == named


def test_a_file_gives_what_torch_gives_and_says_what_it_is(tmp_path, monkeypatch, capsys):
    classifier, path = trained("tip_adapter", tmp_path), tmp_path / "onnx" / "model.onnx"
    written = write_onnx(classifier, path, adapter_sha256="abc")
    assert written.difference <= TOLERANCE
    assert written.bytes == path.stat().st_size
    assert os.listdir(path.parent) == ["model.onnx"]
    check_file(classifier, path)
    session = onnxruntime.InferenceSession(path)
    (images,) = session.get_inputs()
    assert (images.name, images.type, images.shape) == ("images", "tensor(uint8)", ["n", "height", "width", 3])
    assert {o.name: o.shape for o in session.get_outputs()} == {
        "logits": ["n", N_CLASSES],
        "probabilities": ["n", N_CLASSES],
    }
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == classifier.classes
    assert json.loads(about["preprocess"])["size"] == SIZE
    assert (about["method"], about["adapter_sha256"]) == ("tip_adapter", "abc")
    run_the_snippet(path, classifier, tmp_path, monkeypatch, capsys)
    # Another classifier is told from this one.
    other = trained("zero_shot", tmp_path)
    assert largest_difference(other, path) > TOLERANCE
    with pytest.raises(ValueError, match=r"model\.onnx exists already; .* `force`"):
        write_onnx(other, path)
    with pytest.raises(ValueError, match="is a folder; name a file in it"):
        write_onnx(other, tmp_path, force=True)


def test_a_method_with_texts_of_its_own_for_each_image_is_refused(tmp_path):
    with pytest.raises(ValueError, match="CoCoOp makes texts of its own for each image"):
        write_onnx(trained("cocoop", tmp_path), tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_a_file_whose_logits_are_others_is_not_written(tmp_path):
    """As torch.export makes one of a model whose result depends on how often it was called."""
    calls = []

    def logits(pixels):
        calls.append(1)
        return pixels.mean(dim=(2, 3)) * len(calls)

    classifier = Classifier(["a", "b", "c"], logits, Preprocess(SIZE), torch.device("cpu"), None)
    with pytest.raises(ValueError, match=r"model\.onnx: not written, since its logits differ"):
        write_onnx(classifier, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def adapter(tmp_path):
    """The folder of an adapter of HeBA, with hooks in the towers."""
    model = AdaptedCLIP(load_tiny_clip()[0], 1, 4, 0.3)
    artifacts.save(model, tmp_path / "adapter", backbone=artifacts.TINY)
    weights = torch.randn(2, model.clip.text_projection.shape[1], generator=torch.Generator().manual_seed(0))
    artifacts.save_classifier(weights, tmp_path / "adapter", scale=0.3)
    return tmp_path / "adapter"


def export(monkeypatch, *arguments):
    """`heba export ...` in this process: its exit code."""
    monkeypatch.setattr(sys, "argv", ["heba", "export", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        use.main()
    return end.value.code


def test_the_command_replaces_no_file_unasked(adapter, tmp_path, monkeypatch, capsys):
    (tmp_path / "model.onnx").write_text("mine")
    assert export(monkeypatch, adapter, "--onnx", tmp_path / "model.onnx") == 1
    assert "model.onnx exists already; name another file, or replace it with" in capsys.readouterr().err
    assert (tmp_path / "model.onnx").read_text() == "mine"


@pytest.mark.slow
def test_the_command_exports_an_adapter_with_hooks_in_the_towers(adapter, tmp_path, monkeypatch, capsys):
    assert export(monkeypatch, adapter, "--onnx", tmp_path / "model.onnx") == 0
    assert "checked with onnxruntime: logits within" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    image = noise(60, 40)
    (found,) = session.run(["probabilities"], {"images": image[None]})[0]
    (expected,) = heba.load(tmp_path / "adapter", device="cpu").predict(Image.fromarray(image))
    assert sorted(found, reverse=True) == pytest.approx(expected.probabilities, abs=1e-4)
    sha = session.get_modelmeta().custom_metadata_map["adapter_sha256"]
    assert sha == artifact.sha256(tmp_path / "adapter")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in methods.names() if name != "cocoop"])
def test_every_other_method_is_exported(name, tmp_path):
    classifier = trained(name, tmp_path)
    written = write_onnx(classifier, tmp_path / "model.onnx")
    assert written.difference <= TOLERANCE
    check_file(classifier, written.path)
