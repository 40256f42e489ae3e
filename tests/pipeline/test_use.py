"""A trained adapter in use: `heba predict`, `heba info`, `heba.load`, and as an MLflow model behind HTTP."""

import base64
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

import heba
from benchmarks import adapter_dtype
from heba import artifact
from heba.clip import backbone
from heba.clip.tiny import load_tiny_clip
from heba.clip.towers import text_tower
from heba.data.datasets import template
from heba.data.prompts import read_descriptions
from heba.data.splits import read_split
from heba.evaluation.record import read_record
from heba.fit import official
from heba.methods.coop import method as coop_method
from heba.methods.coop import settings as coop
from heba.methods.heba.model import AdaptedCLIP
from pipeline.commands import convert, use
from pipeline.commands.common import predict_command
from pipeline.core.params import load_params
from pipeline.core.trainings import Training
from pipeline.stages.backbone import load_backbone
from pipeline.tracking import models
from tests.heba import artifacts, checkpoints
from tests.heba.test_backbones import SMALL, TEXT
from tests.pipeline.repository import ROOT, call, stage
from tests.pipeline.serving import serving

TRAINED = "out/train/dtd/heba/base_to_novel-2-1"
PLAIN = "out/train/dtd/zero_shot/base_to_novel-2-1"
CLASSES = ["striped", "dotted", "chequered", "zigzag", "bubbly"]


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    """A folder in which dtd was trained and evaluated for base_to_novel, stage by stage."""
    folder = tmp_path_factory.mktemp("use")
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params |= {"datasets": ["dtd"], "methods": ["zero_shot", "heba"], "seeds": [1], "shots": 2}
    params["heba"] |= {"epochs": 2, "batch_size": 4, "scale_novel": 0.02}
    params["few_shot"]["seeds"] = params["few_shot"]["datasets"] = []
    params["transfer"] |= {"source": "dtd", "targets": [], "variants": [], "protocols": []}
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    trains = [f"train --method {method}" for method in params["methods"]]
    for command in ("backbone", "download", "split", "precompute", *trains, "evaluate"):
        name, *options = command.split()
        dataset = [] if name == "backbone" else ["--dataset", "dtd"]
        done = stage(folder, name, *dataset, *options, PYTHONPATH=str(ROOT))
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def run_heba(monkeypatch, capfd):
    """`heba ...` in a folder, in this process: its exit code, output and errors."""

    def run(folder, *args):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["heba", *args])
        capfd.readouterr()
        code = 0
        try:
            use.main()
        except SystemExit as end:
            code = end.code or 0
        printed = capfd.readouterr()
        return subprocess.CompletedProcess(args, code, printed.out, printed.err)

    return run


@pytest.fixture(scope="module")
def test_images(repo):
    """(path, class) of the test images of the base classes."""
    data = repo / "data" / "embedded" / "dtd"
    items = read_split(data / "split.json")["test"]
    return [(data / "images" / file, name) for file, label, name in items if label < len(CLASSES)]


def record(repo, method="heba"):
    return read_record(repo / "out" / "evaluate" / "dtd" / method / "base_to_novel-2-1.json")


@pytest.mark.parametrize(("method", "folder"), [("heba", TRAINED), ("zero_shot", PLAIN)])
def test_predictions_are_those_of_the_evaluation(repo, test_images, method, folder):
    classifier = heba.load(repo / folder)
    found = list(classifier.predict([path for path, _ in test_images], top=5))
    correct = sum(p.classes[0] == name for p, (_, name) in zip(found, test_images, strict=True))
    assert 100 * correct / len(found) == record(repo, method).groups["base"].accuracy
    assert classifier.config.method == method
    assert all(sum(p.probabilities) == pytest.approx(1, abs=1e-5) for p in found)
    assert sorted(found[0].classes) == sorted(CLASSES)
    opened = next(classifier.predict([Image.open(test_images[0][0])]))
    assert opened.classes == found[0].classes
    assert opened.probabilities == pytest.approx(found[0].probabilities, abs=1e-5)


def test_one_image_or_any_iterable_of_them(repo, test_images):
    classifier = heba.load(repo / TRAINED)
    paths = [path for path, _ in test_images[:3]]
    first, *_ = expected = list(classifier.predict(paths))
    for one in (str(paths[0]), paths[0]):
        (found,) = classifier.predict(one)
        assert (found.image, found.classes, found.error) == (str(paths[0]), first.classes, None)
    (found,) = classifier.predict(Image.open(paths[0]))
    assert (found.image, found.classes) == ("image 1", first.classes)
    assert [p.image for p in classifier.predict(path for path in paths)] == [p.image for p in expected]


def test_bad_arguments_of_the_library_are_refused(repo, test_images):
    classifier = heba.load(repo / TRAINED)
    for top in (0, -1, 2.5):
        with pytest.raises(ValueError, match="top must be a whole number from 1 on"):
            classifier.predict([test_images[0][0]], top=top)  # at once, not at the first prediction
    with pytest.raises(TypeError, match="file names or Pillow's images are needed, not int"):
        list(classifier.predict([1]))
    for load in (
        lambda classes: heba.load(repo / TRAINED, classes=classes),
        lambda classes: heba.zero_shot("tiny", "embedded", classes),
    ):
        with pytest.raises(ValueError, match="a list of names is needed, not the text 'striped,dotted'"):
            load("striped,dotted")
        with pytest.raises(ValueError, match="two or more different names are needed, got 'striped', 1"):
            load(["striped", 1])
    settings = {"scale_novel": 0.1}
    for ignored in ({"template": "a {}."}, {"settings": settings}, {"descriptions": {"striped": ["x"]}}):
        with pytest.raises(ValueError, match="go with classes"):
            heba.load(repo / TRAINED, **ignored)
    for folder, settings, message in (
        (TRAINED, {"scale_novel": -1}, "settings: scale_novel: .*greater than or equal to 0"),
        (
            TRAINED,
            {"scale": 0.2, "lr": 1.0},
            "lr, scale cannot be changed .*; these can: scale_novel",
        ),
        (PLAIN, {"scale_novel": 0.2}, "scale_novel cannot be changed after the training; these can: none"),
    ):
        with pytest.raises(ValueError, match=message):
            heba.load(repo / folder, classes=["striped", "dotted"], settings=settings)


def test_the_library_and_the_command_name_as_many_classes(repo, test_images, run_heba):
    path = str(test_images[0][0])
    printed = json.loads(run_heba(repo, "predict", path, "--adapter", TRAINED, "--json").stdout)["classes"]
    assert len(printed) == len(next(heba.load(repo / TRAINED).predict(path)).classes) == heba.TOP


def test_predict_takes_files_and_folders_and_goes_on_after_a_bad_one(repo, test_images, tmp_path, run_heba):
    folder = tmp_path / "my photos"
    (folder / "deeper").mkdir(parents=True)
    path = test_images[0][0]
    (folder / "deeper" / "ä.PNG").write_bytes(path.read_bytes())
    (folder / "broken.png").write_bytes(path.read_bytes()[:60])
    (folder / "notes.txt").write_text("no image")
    for hidden in ("._broken.png", ".thumbnails/x.png", "__MACOSX/y.png"):
        (folder / hidden).parent.mkdir(exist_ok=True)
        (folder / hidden).write_bytes(b"no image")
    done = run_heba(repo, "predict", str(folder), str(path), "--adapter", TRAINED, "--json", "--top", "2")
    assert done.returncode == 1
    assert "1 of 3 images could not be read" in done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [Path(line["image"]).name for line in lines] == ["broken.png", "ä.PNG", path.name]
    assert "broken.png" in lines[0]["error"]
    assert lines[1]["classes"] == lines[2]["classes"]
    assert len(lines[1]["classes"]) == 2
    table = run_heba(repo, "predict", str(path), "--adapter", TRAINED)
    assert table.returncode == 0
    assert lines[2]["classes"][0]["class"] in table.stdout.split(str(path))[1]


def test_an_image_of_16_bits_is_named(repo, tmp_path, run_heba):
    deep = Image.new("I;16", (8, 8), 900)
    deep.save(tmp_path / "deep.png")
    done = run_heba(repo, "predict", str(tmp_path / "deep.png"), "--adapter", TRAINED)
    assert done.returncode == 1
    assert "deep.png: an image of 16 or more bits a channel" in done.stderr
    assert "convert it to 8 bit" in next(heba.load(repo / TRAINED).predict([deep])).error


def test_new_classes_at_the_novel_scale(repo, test_images, run_heba):
    """At the novel scale of the training's settings, unless another one is given."""
    # An image of none of the names: the scale decides.
    image = next(str(path) for path, _ in test_images if path.match("bubbly/0036.png"))
    names = ["chequered", "striped", "cracked"]
    arguments = ["predict", image, "--adapter", TRAINED, "--classes", ", ".join(names), "--json"]

    def printed(*more):
        done = run_heba(repo, *arguments, *more)
        assert done.returncode == 0, done.stderr
        return {c["class"]: c["probability"] for c in json.loads(done.stdout)["classes"]}

    def loaded(**settings):
        found = next(heba.load(repo / TRAINED, classes=names, settings=settings).predict([image], top=3))
        return dict(zip(found.classes, found.probabilities, strict=True))

    assert record(repo).settings == {"scale_novel": 0.02}
    assert loaded(scale_novel=0.02) != pytest.approx(loaded(scale_novel=0.1), abs=0.01)
    assert printed() == pytest.approx(loaded(scale_novel=0.02), abs=2e-6)
    assert loaded() == loaded(scale_novel=0.02)
    assert loaded(scale_novel=None) == loaded(scale_novel=0.1)  # the training's scale
    assert printed("--set", "scale_novel=0.1") == pytest.approx(loaded(scale_novel=0.1), abs=2e-6)
    assert printed("--set", "scale_novel=null") == pytest.approx(loaded(scale_novel=0.1), abs=2e-6)
    plain = next(heba.zero_shot("tiny", "embedded", names).predict([image], top=3))
    plain = dict(zip(plain.classes, plain.probabilities, strict=True))
    assert loaded(scale_novel=0.0) == pytest.approx(plain, abs=1e-5)
    frozen = next(heba.load(repo / PLAIN, classes=names).predict([image], top=3))
    assert dict(zip(frozen.classes, frozen.probabilities, strict=True)) == pytest.approx(plain, abs=1e-6)


def test_new_classes_are_classified_as_the_evaluation_does(repo):
    """The novel classes of the data set, by their names and descriptions, at the settings of params.yaml."""
    data = repo / "data" / "embedded" / "dtd"
    names = json.loads((repo / "out" / "precompute" / "dtd" / "prompts.json").read_text())["class_names"]
    novel = names[len(CLASSES) :]
    items = [(data / "images" / file, name) for file, _, name in read_split(data / "split.json")["test"]]
    items = [item for item in items if item[1] in novel]
    descriptions = read_descriptions(data / "descriptions.json")
    for method, folder in (("heba", TRAINED), ("zero_shot", PLAIN)):
        classifier = heba.load(repo / folder, novel, descriptions, template("dtd", embedded=True))
        found = classifier.predict([path for path, _ in items], top=1)
        correct = sum(p.classes[0] == name for p, (_, name) in zip(found, items, strict=True))
        assert 100 * correct / len(items) == record(repo, method).groups["novel"].accuracy


def test_zero_shot_takes_the_backbone_of_params(repo, test_images, run_heba):
    done = run_heba(repo, "zero-shot", str(test_images[0][0]), "--classes", "striped,dotted", "--json")
    found = json.loads(done.stdout)["classes"]
    assert found[0]["class"] == test_images[0][1]


def run_of(repo, method):
    """The MLflow run of a method's training."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{repo / 'mlflow.db'}")
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    (run,) = client.search_runs(ids, f"params.method = '{method}'")
    return run


def test_info_by_folder_run_and_registered_model(repo, run_heba):
    done = run_heba(repo, "info", TRAINED, "--json")
    assert done.returncode == 0, done.stderr
    about = json.loads(done.stdout)
    assert about["classes"] == CLASSES
    assert about["backbone"] == "tiny, embedded"
    assert about["backbone sha256"] == json.loads((repo / "out" / "backbone.json").read_text())["sha256"]
    assert (about["shots"], about["seed"]) == (2, 1)
    assert about["method"] == "heba"
    assert about["trained on"] == "dtd (embedded), base_to_novel"
    assert "scale_novel 0.02" in about["settings"]
    evaluated = {f"{group}, %": value for group, value in record(repo).accuracies().items()}
    assert {key: about[key] for key in evaluated} == pytest.approx(evaluated, abs=0.005)
    run = run_of(repo, "heba")
    registered = stage(repo, "register", TRAINED, "--name", "textures", PYTHONPATH=str(ROOT))
    assert registered.stdout.strip() == "models:/textures/1", registered.stderr
    for name in (run.info.run_id, f"runs:/{run.info.run_id}", "models:/textures/1"):
        same = json.loads(run_heba(repo, "info", name, "--json").stdout)
        assert same["sha256"] == about["sha256"]
    shown = run_heba(repo, "info", TRAINED).stdout.splitlines()
    rows = dict(line.split(":", 1) for line in shown)
    assert rows["classes"].strip() == "striped, dotted, chequered, zigzag, bubbly"
    assert rows["sha256"].strip() == about["sha256"]
    assert rows["backbone sha256"].strip() == about["backbone sha256"]
    assert float(rows["base, %"]) == about["base, %"]
    assert len({len(line) - len(line.split(":", 1)[1].lstrip()) for line in shown}) == 1  # aligned
    assert "git commit" not in rows  # no git here
    plain = json.loads(run_heba(repo, "info", PLAIN, "--json").stdout)
    assert (plain["method"], plain["classes"]) == ("zero_shot", CLASSES)
    assert plain["settings"] == ["prompts descriptions"]
    assert plain["base, %"] == round(record(repo, "zero_shot").groups["base"].accuracy, 2)


@pytest.mark.parametrize("text", ["{}", "[]", '{"adapter_sha256": "SHA", "groups": {"all": {}}}', "no JSON"])
def test_a_damaged_evaluation_is_named_and_left_out(repo, run_heba, text):
    path = repo / "out" / "evaluate" / "caltech101" / "heba" / "base_to_novel-2-1.json"  # before dtd's
    path.parent.mkdir(parents=True, exist_ok=True)
    sha = json.loads(run_heba(repo, "info", TRAINED, "--json").stdout)["sha256"]
    path.write_text(text.replace("SHA", sha))
    try:
        done = run_heba(repo, "info", TRAINED, "--json")
    finally:
        path.unlink()
    assert done.returncode == 0, done.stderr
    assert f"note: {path.relative_to(repo)}: not a record of an evaluation" in done.stderr
    assert "evaluate this data set again" in done.stderr
    assert json.loads(done.stdout)["base, %"] == round(record(repo).groups["base"].accuracy, 2)


def test_the_benchmark_of_rounding_compares_base_and_novel(repo, monkeypatch):
    """The adapter is in fp16 already, so that rounding it changes nothing."""
    monkeypatch.chdir(repo)
    params = load_params()
    for method in params.methods:
        training = Training("base_to_novel", "dtd", method, 2, 1)
        base, novel = adapter_dtype.full_and_rounded(*load_backbone(params), params, training)
        evaluated = record(repo, method).groups
        assert base == (evaluated["base"].model_dump(exclude={"predicted"}),) * 2
        assert novel == (evaluated["novel"].model_dump(exclude={"predicted"}),) * 2
    refused = call(repo, sys.executable, "-m", "benchmarks.adapter_dtype", PYTHONPATH=str(ROOT))
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: adapter_dtype: run `dvc repro` with fp32 first")


def test_an_official_checkpoint_and_back(repo, test_images, tmp_path, run_heba):
    """Our adapter as an official checkpoint, and that as ours, names images as before, at its own scale, whatever
    params.yaml has by then."""
    done = stage(repo, "convert", TRAINED, str(tmp_path / "official"), PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    checkpoint = tmp_path / "official" / "adapter_learner" / "model.pth.tar-2"
    assert done.stdout.strip() == str(checkpoint)
    arguments = ["convert", str(checkpoint), str(tmp_path / "ours"), "--dataset", "dtd"]
    params = (repo / "params.yaml").read_text()
    assert "  scale: 0.1\n" in params
    (repo / "params.yaml").write_text(params.replace("  scale: 0.1\n", "  scale: 0.7\n"))
    done = stage(repo, *arguments, PYTHONPATH=str(ROOT))
    (repo / "params.yaml").write_text(params)
    assert done.returncode == 0, done.stderr
    images = [path for path, _ in test_images[:8]]
    before, after = (list(heba.load(f).predict(images)) for f in (repo / TRAINED, tmp_path / "ours"))
    assert [p.classes for p in before] == [p.classes for p in after]
    for old, new in zip(before, after, strict=True):
        assert old.probabilities == pytest.approx(new.probabilities, abs=1e-6)
    about = json.loads(run_heba(repo, "info", str(tmp_path / "ours"), "--json").stdout)
    assert about["classes"] == CLASSES
    again = stage(repo, *arguments, PYTHONPATH=str(ROOT))
    assert "exists already" in again.stderr
    content = torch.load(checkpoint, weights_only=True)
    del content["scale"]
    torch.save(content, checkpoint)
    untold = stage(repo, *arguments[:2], str(tmp_path / "new"), *arguments[3:], PYTHONPATH=str(ROOT))
    assert untold.returncode == 1
    assert "does not tell its scale" in untold.stderr
    assert not (tmp_path / "new").exists()


@pytest.fixture
def of_coop(tmp_path):
    """A checkpoint of CoOp, or of KgCoOp or ProGrad, whose tensors are the same, and the model that it is of."""
    clip, tokenizer = load_tiny_clip()
    settings = coop.Settings(context=4, position="front", epochs=5)
    model = coop_method.build(clip, len(CLASSES), settings, seed=3)
    texts = coop_method.texts_of(clip, CLASSES, tokenizer, settings)
    suffix = torch.zeros(len(CLASSES), text_tower(clip).context_length - 5, texts.embeddings.shape[2])
    suffix[:, : texts.embeddings.shape[1] - 5] = texts.embeddings[:, 5:]
    path = tmp_path / "model.pth.tar-5"
    checkpoints.save(path, {"ctx": model.learned["ctx"].detach(), "token_suffix": suffix}, epoch=5)
    return path, settings, model, texts


def test_a_checkpoint_whose_method_is_named(repo, of_coop, tmp_path):
    path, settings, model, texts = of_coop
    options = ["--dataset", "dtd", "--method", "coop", "--set", "position=front"]
    done = stage(repo, "convert", str(path), str(tmp_path / "ours"), *options, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    config = artifact.read_config(tmp_path / "ours")
    assert (config.method, config.method_settings(), config.class_names) == ("coop", settings, CLASSES)
    with torch.no_grad():
        expected = model.encode(texts)
    found = artifact.read_classifier(tmp_path / "ours", len(CLASSES))["weights"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    done = stage(repo, "convert", str(tmp_path / "ours"), str(tmp_path / "back"), PYTHONPATH=str(ROOT))
    assert done.stdout.strip() == str(tmp_path / "back" / "prompt_learner" / "model.pth.tar-5")
    assert torch.equal(official.read(Path(done.stdout.strip())).tensors["ctx"], model.learned["ctx"])


@pytest.mark.parametrize(
    ("method", "all_classes", "given", "message"),
    [
        (None, False, {}, "its tensors fit coop, kgcoop, prograd, which share them; name one: --method coop"),
        ("zero_shot", False, {}, "--method zero_shot: has no checkpoints to convert; these have: cocoop, coop"),
        ("heba", False, {}, "it has no adapters"),
        ("coop", True, {}, "was trained on 5 classes, and these are 10; see --dataset"),
        ("coop", False, {"words": "a photo"}, "ctx has shape (4, 128), the model needs (2, 128)"),
        ("coop", False, {"place": 1}, "settings: place: Extra inputs are not permitted"),
        ("coop", False, {"scale": 0.1}, "settings: scale: Extra inputs are not permitted"),
    ],
)
def test_a_checkpoint_of_another_kind_is_refused(
    method, all_classes, given, message, repo, of_coop, tmp_path, monkeypatch
):
    monkeypatch.chdir(repo)
    with pytest.raises(ValueError, match=re.escape(message)):
        convert.run(load_params(), of_coop[0], tmp_path / "ours", "dtd", all_classes, method, given)
    assert not (tmp_path / "ours").exists()


def test_a_checkpoint_of_no_method_is_refused(tmp_path):
    checkpoints.save(tmp_path / "c", {"other": torch.ones(1)}, epoch=5)
    message = r"c: its tensors \(other\) are not those of a method here; known are cocoop, coop, heba, kgcoop, "
    with pytest.raises(ValueError, match=message):
        convert.method_of(official.read(tmp_path / "c"), None)


def test_what_can_not_be_converted_is_named(repo, tmp_path):
    def error(source, *options):
        done = stage(repo, "convert", str(source), str(tmp_path / "new"), *options, PYTHONPATH=str(ROOT))
        assert done.returncode == 1
        assert not (tmp_path / "new").exists()
        return done.stderr

    readme = error(ROOT / "README.md", "--dataset", "dtd")
    assert "README.md: not a checkpoint of tensors and numbers alone" in readme
    assert "weights_only" not in readme
    assert "--scale inf: must be finite" in error(ROOT / "README.md", "--dataset", "dtd", "--scale", "inf")
    for option in (["--scale", "0.1"], ["--method", "heba"], ["--set", "lr=1"]):
        assert "are for a checkpoint" in error(TRAINED, *option)
    assert "the method zero_shot has no convert" in error(PLAIN)
    prompts = repo / "out" / "precompute" / "dtd" / "prompts.json"
    done = stage(repo, "convert", TRAINED, str(tmp_path / "official"), PYTHONPATH=str(ROOT))
    checkpoint = done.stdout.strip()
    whole = prompts.read_text()
    prompts.write_text("{")
    damaged = error(checkpoint, "--dataset", "dtd")
    prompts.unlink()
    missing = error(checkpoint, "--dataset", "dtd")
    prompts.write_text(whole)
    assert "prompts.json is damaged" in damaged
    assert "prompts.json is not there" in missing
    assert "dvc repro precompute@dtd" in damaged
    assert "dvc repro precompute@dtd" in missing


PREDICT = ("predict", "IMAGE", "--adapter")
NEW = (*PREDICT, TRAINED, "--classes", "a,b")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*PREDICT, "nowhere"), "neither a folder nor a run"),
        ((*PREDICT, "out"), "no adapter; name the folder"),
        (("predict", "out", "--adapter", TRAINED), "no images in this folder"),
        ((*PREDICT, TRAINED, "--classes", "striped"), "two or more different names"),
        ((*PREDICT, TRAINED, "--classes", "striped,blotchy"), "does not know blotchy"),
        ((*PREDICT, TRAINED, "--template", "{}"), "go with classes"),
        ((*PREDICT, TRAINED, "--set", "scale_novel=0.1"), "go with classes"),
        ((*NEW, "--template", "a {} of {x}"), "one {} for the class name, and no other brace, got 'a {} of {x}'"),
        ((*NEW, "--set", "scale_novel"), "--set scale_novel: write name=value"),
        ((*NEW, "--set", "scale_novel=[1"), "--set scale_novel=[1: write name=value"),
        ((*NEW, "--set", "scale=0.2"), "scale cannot be changed after the training; these can: scale_novel"),
        ((*NEW, "--set", "scale_novel=-1"), "scale_novel: Input should be greater than or equal to 0"),
        ((*NEW, "--set", "scale_novel=.nan"), "scale_novel: Input should be a finite number"),
        ((*NEW, "--set", "scale_novel=much"), "scale_novel: Input should be a valid number"),
        ((*PREDICT, TRAINED, "--device", "tpu"), "take cpu or cuda"),
        (("zero-shot", "IMAGE", "--classes", "a,b", "--backbone", "ViT-B-32"), "go together"),
    ],
)
def test_errors_are_messages(repo, test_images, arguments, message, run_heba):
    done = run_heba(repo, *[str(test_images[0][0]) if a == "IMAGE" else a for a in arguments])
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_top_has_a_bound(repo, test_images, run_heba):
    done = run_heba(repo, "predict", str(test_images[0][0]), "--adapter", TRAINED, "--top", "0")
    assert done.returncode == 2
    assert "--top" in done.stderr


def test_a_config_that_lacks_what_info_shows(repo, tmp_path, run_heba):
    config = json.loads((repo / TRAINED / "config.json").read_text())
    del config["settings"]["end"], config["suite"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "adapter.safetensors").write_bytes((repo / TRAINED / "adapter.safetensors").read_bytes())
    done = run_heba(repo, "info", str(tmp_path))
    assert done.returncode == 1
    assert "config.json: damaged (suite: Field required)" in done.stderr
    config["suite"] = "embedded"
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = run_heba(repo, "info", str(tmp_path))
    assert done.returncode == 1
    assert "config.json: damaged (settings: end missing)" in done.stderr


def test_an_adapter_on_a_local_backbone_from_elsewhere(test_images, tmp_path, run_heba):
    """Its files are relative to the repository of the training."""
    root, adapter = tmp_path / "repository", tmp_path / "adapter"
    (root / "models").mkdir(parents=True)
    config = SMALL | {"text_cfg": TEXT | {"vocab_size": 49408}}
    (root / "models" / "small.json").write_text(json.dumps(config))
    clip = backbone.build(config)
    save_file(clip.state_dict(), root / "models" / "w.safetensors")
    named = artifact.Backbone(
        name="models/small.json",
        pretrained="models/w.safetensors",
        sha256=backbone.sha256(root / "models" / "w.safetensors"),
        config_sha256=backbone.sha256(root / "models" / "small.json"),
    )
    artifacts.save(AdaptedCLIP(clip, 1, 2, 0.1), adapter, class_names=["a", "b"], backbone=named)
    artifacts.save_classifier(torch.ones(2, 32), adapter, scale=0.1)
    image = str(test_images[0][0])
    for more in ([], ["--classes", "cat,dog"]):
        lost = run_heba(tmp_path, "predict", image, "--adapter", str(adapter), *more)
        assert lost.returncode == 1
        assert "models/small.json" in lost.stderr
        assert "`root` (--root) names the folder" in lost.stderr
        found = run_heba(tmp_path, "predict", image, "--adapter", str(adapter), "--root", "repository", *more)
        assert found.returncode == 0, found.stderr
    files = "models/small.json", "models/w.safetensors"
    for where in ((*files, Path("repository")), tuple(str(root / file) for file in files)):
        words = shlex.split(predict_command(adapter, *where))
        command = [image if word == "NEW_IMAGES" else word for word in words]
        assert run_heba(tmp_path, *command[1:]).returncode == 0, command
    assert len(next(heba.load(adapter, root=str(root)).predict(image)).classes) == 2
    (root / "models" / "w.safetensors").unlink()
    with pytest.raises(ValueError, match=r"'models/w\.safetensors' is neither a file under .*--root"):
        heba.load(adapter, root=root)
    options = ["--classes", "cat,dog", "--backbone", "models/small.json", "--pretrained", "models/w.safetensors"]
    save_file(clip.state_dict(), root / "models" / "w.safetensors")
    assert run_heba(tmp_path, "zero-shot", image, *options).returncode == 1
    assert run_heba(tmp_path, "zero-shot", image, *options, "--root", str(root)).returncode == 0


def test_damaged_files_are_named(repo, tmp_path):
    for file in ("config.json", "classifier.safetensors", "adapter.safetensors"):
        folder = tmp_path / file
        folder.mkdir()
        for path in (repo / TRAINED).iterdir():
            content = path.read_bytes()
            (folder / path.name).write_bytes(content[: len(content) // 2] if path.name == file else content)
        with pytest.raises(ValueError, match=file):
            heba.load(folder)
    config = json.loads((repo / TRAINED / "config.json").read_text())
    config["backbone"]["sha256"] = "0" * 64
    (tmp_path / "config.json" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"trained on tiny, embedded: .*model\.safetensors is another file by its sha256"
    ):
        heba.load(tmp_path / "config.json")


@pytest.mark.parametrize(("name", "weights"), [("tiny", ["model.safetensors"]), ("ViT-B-16-quickgelu", [])])
def test_a_model_brings_the_tiny_clip_only_where_it_is_on_it(repo, tmp_path, name, weights):
    adapter = shutil.copytree(repo / PLAIN, tmp_path / "adapter")
    config = json.loads((adapter / "config.json").read_text())
    config["backbone"]["name"] = name
    (adapter / "config.json").write_text(json.dumps(config))
    models.save_model(adapter, tmp_path / "model", run_id="1", model_id="2")
    code = tmp_path / "model" / "code" / "heba"
    assert (code / "predict.py").is_file()
    assert [path.name for path in code.rglob("*.safetensors")] == weights
    assert not list(code.rglob("__pycache__"))


@pytest.mark.parametrize(("method", "folder"), [("heba", TRAINED), ("zero_shot", PLAIN)])
def test_mlflow_serves_the_adapter(repo, test_images, method, folder):
    """The logged model behind HTTP on the loopback address: images in base64, and no files."""
    model = f"models:/{run_of(repo, method).outputs.model_outputs[0].model_id}"
    # Elsewhere than in the repository: the model brings heba's code with it.
    with serving(model, repo.parent, MLFLOW_TRACKING_URI=f"sqlite:///{repo / 'mlflow.db'}") as server:
        path = test_images[0][0]
        answer = server.ask([base64.b64encode(path.read_bytes()).decode()], top=2)
        assert answer.ok, answer.text
        (found,) = answer.json()["predictions"]
        expected = next(heba.load(repo / folder).predict([path]))
        assert found["label"] == found["labels"][0] == expected.classes[0]
        assert found["probabilities"] == pytest.approx(expected.probabilities[:2], abs=1e-5)
        assert len(found["labels"]) == 2
        assert "this server has no folder of images (HEBA_SERVE_IMAGES)" in server.ask([str(path)]).text
