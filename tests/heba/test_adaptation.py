"""`heba.adapt` and `heba adapt`: from a folder of images to a tested adapter."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml
from PIL import Image

import heba
from heba import artifact, methods
from heba.adaptation import choose_settings
from heba.clip.architecture import read_architecture
from heba.evaluation.metrics import wilson
from heba.evaluation.record import read_record
from heba.files import new_folder
from heba.fit.run import silent
from pipeline.commands import use
from pipeline.core.params import load_params
from pipeline.stages import backbone, download, evaluate, precompute, split, train, views
from tests.heba.artifacts import photos_of
from tests.test_rooms import ROOT

CLASSES = ("fish", "balloon", "clock")
SHORT = {"epochs": 2, "batch_size": 4, "scale": 0.1}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return photos_of(tmp_path_factory.mktemp("own") / "photos", CLASSES, 10)


@pytest.fixture(scope="module")
def adapted(photos, tmp_path_factory):
    return heba.adapt(photos, "gda", shots=4, out=tmp_path_factory.mktemp("adapted") / "adapter")


def test_wilson_of_known_counts():
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert wilson(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(1, 50) == pytest.approx((0.9287, 1), abs=1e-4)
    with pytest.raises(ValueError, match=r"1\.1 of 10 images"):
        wilson(1.1, 10)


def test_what_is_written_is_what_was_tested(photos, adapted):
    assert adapted.classes == sorted(CLASSES)
    assert (adapted.n_train, adapted.n_val, adapted.n_test) == (12, 6, 9)
    assert sum(map(sum, adapted.confusion)) == 9
    right = sum(row[i] for i, row in enumerate(adapted.confusion))
    assert adapted.accuracy == 100 * right / 9
    assert adapted.interval == pytest.approx([100 * end for end in wilson(right / 9, 9)])
    files = sorted(photos.rglob("*.png"))
    loaded = heba.load(adapted.path)
    assert list(loaded.predict(files)) == list(adapted.classifier.predict(files))
    config = artifact.read_config(adapted.path)
    assert (config.method, config.protocol, config.dataset, config.shots) == ("gda", "few_shot", "photos", 4)
    assert config.chosen == {"alpha": pytest.approx(config.chosen["alpha"])}
    assert heba.adapt(photos, "gda", shots=4).accuracy == adapted.accuracy  # and nothing is written


@pytest.mark.slow
def test_the_numbers_are_those_of_the_pipeline(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.delenv("DVC_ROOT", raising=False)
    raw = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    raw |= {"datasets": [], "seeds": [], "methods": ["zero_shot", "gda", "prolip", "coop", "heba"]}
    raw["own"] = {"photos": {"kind": "folder", "path": "photos"}}
    raw["transfer"] |= {"protocols": [], "targets": [], "variants": []}
    raw["few_shot"] = {"datasets": ["photos"], "seeds": [1], "shots": [4]}
    raw["heba"] |= {"epochs": 2}
    raw["coop"] |= {"epochs_few": 2}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    shutil.copytree(photos, tmp_path / "photos")
    params = load_params()
    backbone.run(params)
    for stage in (download, split, precompute, views):
        stage.run(params, "photos")
    for method in params.methods:
        train.run(params, "photos", method)
    evaluate.run(params, "photos")
    for method in params.methods:
        block = {key: value for key, value in raw[method].items() if key != "overrides"}
        found = heba.adapt(tmp_path / "photos", method, shots=4, settings=block, out=tmp_path / method)
        theirs = tmp_path / "out" / "train" / "photos" / method / "few_shot-4-1"
        for name in (artifact.ADAPTER_FILE, artifact.CLASSIFIER_FILE, artifact.HISTORY_FILE):
            assert (found.path / name).read_bytes() == (theirs / name).read_bytes(), (method, name)
        assert artifact.read_config(theirs).chosen == found.classifier.config.chosen
        record = read_record(tmp_path / "out" / "evaluate" / "photos" / method / "few_shot-4-1.json").groups["all"]
        assert (record.accuracy, record.confusion) == (found.accuracy, found.confusion), method


@pytest.mark.parametrize("method", methods.names())
def test_the_defaults_fit_a_shallow_backbone(method, tmp_path):
    config = read_architecture("tiny", tmp_path)
    settings = choose_settings(method, {}, config)
    assert methods.part(method, "settings").problems(settings, 4, 128) == {}


def test_settings_that_are_wrong_are_named(tmp_path):
    config = read_architecture("tiny", tmp_path)
    assert choose_settings("heba", {}, config).end == 4
    for given, message in (
        ({"end": 5}, "settings of heba: end: 5 is beyond the last layer, 4"),
        ({"scale": "much"}, "settings of heba: scale: Input should be a valid number"),
        ({"place": 1}, "heba has no setting place; it has prompts, "),
    ):
        with pytest.raises(ValueError, match=message):
            choose_settings("heba", given, config)
    with pytest.raises(ValueError, match="there is no method 'hebba'; known are ape, "):
        choose_settings("hebba", {}, config)


def copied(photos, tmp_path):
    return shutil.copytree(photos, tmp_path / "copy")


def test_folders_that_cannot_be_adapted_to(photos, tmp_path):
    (tmp_path / "empty").mkdir()
    one = tmp_path / "one"
    shutil.copytree(photos / "fish", one / "fish")
    strange = copied(photos, tmp_path)
    (strange / "fish").rename(strange / "Blume")
    for folder, message in (
        (tmp_path / "nowhere", "nowhere: there is no such folder"),
        (tmp_path / "empty", "empty holds no folders"),
        (one, "one: one class, fish; two or more are needed"),
        (strange, "does not know Blume"),
    ):
        with pytest.raises(ValueError, match=message):
            heba.adapt(folder, "gda", out=tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_images_that_cannot_be_read_or_are_tested_too_are_named(photos, tmp_path):
    folder = copied(photos, tmp_path)
    for name in ("00.png", "01.png"):
        (folder / "fish" / name).write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"copy: images that cannot be read, .*: fish/00\.png, fish/01\.png"):
        heba.adapt(folder, "gda", out=tmp_path / "adapter")
    picture = (folder / "fish" / "02.png").read_bytes()
    for path in (folder / "fish").iterdir():
        path.write_bytes(picture)
    with pytest.raises(ValueError, match=r"test images that training has too, byte for byte; .*fish/0.\.png"):
        heba.adapt(folder, "gda", out=tmp_path / "adapter")
    shutil.rmtree(folder)
    folder = copied(photos, tmp_path)
    shutil.copy(folder / "fish" / "00.png", folder / "clock" / "00.png")
    with pytest.raises(ValueError, match=r"byte for byte, in different classes: .*clock/00\.png"):
        heba.adapt(folder, "gda", out=tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_test_part_that_training_has_seen_in_another_file_is_told(photos, tmp_path, caplog):
    for name in ("fish", "clock"):
        for i, path in enumerate(sorted((photos / name).iterdir())[:4]):
            for part, suffix in (("train", "png"), ("test", "bmp")):
                out = tmp_path / "again" / part / name / f"{i}.{suffix}"
                out.parent.mkdir(parents=True, exist_ok=True)
                with Image.open(path) as image:
                    image.save(out)
    heba.adapt(tmp_path / "again", "zero_shot")
    assert "test images that show the same picture as one that is trained on: " in caplog.text
    assert "test/clock/0.bmp = train/clock/0.png" in caplog.text


def test_the_folder_in_which_one_is_cannot_be_replaced(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="cannot be replaced as a whole; name a folder in it"):
        heba.adapt(photos, "gda", out=".")


def test_what_is_replaced_stays_where_the_new_cannot_take_its_place(tmp_path):
    old = tmp_path / "adapter"
    old.mkdir()
    (old / "kept").touch()
    with pytest.raises(OSError, match="new"), new_folder(old) as new:
        new.rmdir()  # as if it could not be moved
    assert [path.name for path in old.iterdir()] == ["kept"]
    assert os.listdir(tmp_path) == ["adapter"]


def test_what_a_killed_process_left_goes_with_the_next_folder(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / f".adapter.{ended.pid}.tmp" / "old").mkdir(parents=True)
    alive = tmp_path / ".adapter.1.tmp"  # of a process that is always there
    alive.mkdir()
    with new_folder(tmp_path / "adapter") as new:
        (new / "made").touch()
    assert sorted(tmp_path.rglob("*")) == [alive, tmp_path / "adapter", tmp_path / "adapter" / "made"]


def test_another_folder_is_not_replaced_and_an_adapter_is(photos, adapted, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else than an adapter"):
        heba.adapt(photos, "zero_shot", out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    out = shutil.copytree(adapted.path, tmp_path / "adapter")
    heba.adapt(photos, "zero_shot", shots=1, out=out)
    assert artifact.read_config(out).method == "zero_shot"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "notes.txt"]


def test_what_somebody_puts_there_during_the_training_stays(photos, adapted, tmp_path):
    out = shutil.copytree(adapted.path, tmp_path / "adapter")

    def progress(total, what):
        (out / "thesis.txt").write_text("mine")
        return silent(total, what)

    with pytest.raises(ValueError, match="holds something else than an adapter"):
        heba.adapt(photos, "zero_shot", shots=1, out=out, progress=progress)
    assert (out / "thesis.txt").read_text() == "mine"


def test_an_adapter_is_not_written_among_the_images(photos, monkeypatch):
    monkeypatch.chdir(photos)
    with pytest.raises(ValueError, match="adapter: lies in the folder of the images; name another place"):
        heba.adapt(".", "zero_shot", out="adapter")
    assert not (photos / "adapter").exists()


def test_ctrl_c_leaves_what_was_there(photos, adapted, tmp_path):
    out = shutil.copytree(adapted.path, tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    class Interrupted:
        def __enter__(self):
            return lambda n: None

        def __exit__(self, *about):
            raise KeyboardInterrupt

    for what in ("read images", "prompts"):  # before the training, and while the adapter is written

        def progress(total, shown, what=what):
            return Interrupted() if shown == what else silent(total, shown)

        with pytest.raises(KeyboardInterrupt):
            heba.adapt(photos, "heba", shots=1, settings=SHORT, out=out, progress=progress)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
        assert list(tmp_path.iterdir()) == [out]


def test_the_command_tells_the_result_and_what_to_type_next(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["heba", *arguments])
        with pytest.raises(SystemExit) as end:
            use.main()
        return end.value.code, *capsys.readouterr()

    settings = [f"--set={name}={value}" for name, value in SHORT.items()]
    code, out, err = run("adapt", str(photos), "--shots", "2", *settings)
    assert code == 0
    assert "note: the tiny CLIP sees little" in err
    lines = dict(line.split(":", 1) for line in out.splitlines())
    assert lines["images"].strip() == "6 to train, 6 to choose values, 9 to test"
    assert lines["next"].strip() == "heba predict NEW_IMAGES --adapter adapter"
    code, out, _ = run(*lines["next"].split()[1:2], str(photos / "fish"), "--adapter", "adapter", "--json")
    assert code == 0
    assert len(json.loads(out.splitlines()[0])["classes"]) == 3
    assert run("adapt", str(photos), "--backbone", "ViT-B-32")[0] == 1
    assert run("adapt", str(photos), "--seed", str(2**32))[0] == 2
    code, _, err = run("adapt", str(photos), "--method", "hebba")
    assert code == 1
    assert "there is no method 'hebba'" in err
    assert "heba adapt photos/" in run("--help")[1].split("Commands")[0]
