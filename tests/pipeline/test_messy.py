"""Folders as people have them, before `check-data` and the stage that reads own data."""

import json

import numpy as np
import pytest
import yaml
from PIL import Image, ImageEnhance
from sklearn.datasets import load_sample_images
from typer.testing import CliRunner

from heba.data.splits import read_split
from pipeline.commands.cli import app
from tests.heba.test_own import folder_of_classes, image
from tests.pipeline.repository import ROOT

REAL = {"suite": "real", "backbone": {"name": "ViT-B-16-quickgelu", "pretrained": "openai"}}
TINY = {"suite": "embedded"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A command of the pipeline in a folder with `photos`, an own data set of that name: exit code and output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)

    def invoke(*command, params=REAL, **entry):
        raw = yaml.safe_load((ROOT / "params.yaml").read_text()) | {"datasets": [], **params}
        raw["transfer"] |= {"protocols": [], "variants": []}
        raw["few_shot"]["datasets"] = []
        raw["own"] = {"photos": {"kind": "folder", "path": "photos"} | entry}
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
        result = CliRunner().invoke(app, [*command])
        assert result.exception is None or isinstance(result.exception, SystemExit | ValueError)
        return result.exit_code, f"{result.output}\n{result.exception}"

    return invoke


CHECK = ("check-data", "photos")
DOWNLOAD = ("download", "--dataset", "photos")


def photographs():
    """24 cuttings of two photographs, none of which shows what another does."""
    for pixels in load_sample_images().images:
        photograph = Image.fromarray(pixels)
        for i in range(12):
            left, top = 160 * (i % 4), 140 * (i // 4)
            yield photograph.crop((left, top, left + 150, top + 140))


def save(picture, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        ({}, "own.photos: {photos} holds no folders; each class needs one for its images"),
        (
            {"a.png": 1, "b.png": 2},
            "{photos}: images in no class's folder: a.png, b.png; put each into its class's",
        ),
        ({"a.txt": 0, "b.txt": 0}, "{photos} holds no folders; each class needs one for its images"),
        ({"cat/a.txt": 0, "dog/b.png": 1}, "{photos}/cat holds no images; fill the folder, or remove it"),
        ({"cat/in/a.png": 1, "dog/b.png": 2}, "{photos}/cat holds folders: in. The folder of a class holds its"),
        (
            {"cat/a.png": 1, "dog/b.png": 2, "dog/c.png": 3},
            "a class needs an image to train and one to test; fewer",
        ),
        (
            {"cat/a.png": 1, "cat/b.png": 2, "cat/c.png": 3},
            "problem: fewer than two classes, so that there is nothing to tell apart:\n  cat",
        ),
    ],
)
def test_a_wrong_folder_is_told_in_a_sentence(tmp_path, run, make, message):
    (tmp_path / "photos").mkdir()
    for file, value in make.items():
        path = tmp_path / "photos" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        image(path, value) if value else path.write_text("text")
    code, text = run(*CHECK)
    assert code == 1
    assert message.format(photos=tmp_path / "photos") in text


def test_a_file_or_nothing_in_place_of_the_folder(tmp_path, run):
    assert "photos: there is no such folder" in run(*CHECK)[1]
    (tmp_path / "photos").write_text("")
    assert "photos is a file; name the folder that holds the images" in run(*CHECK)[1]


def test_images_of_all_kinds_are_taken_and_the_odd_ones_noted(tmp_path, run):
    photos, pictures = tmp_path / "photos", list(photographs())
    options = {"gif": {"save_all": True, "append_images": pictures[1:3]}, "jpg": {"quality": 95}}
    for i, (name, mode, suffix) in enumerate(
        [("cmyk", "CMYK", "jpg"), ("moving", "P", "gif"), ("palette", "P", "png"), ("still", "RGB", "webp")]
    ):
        save(pictures[4 + i].convert(mode), photos / "odd" / f"{name}.{suffix}", **options.get(suffix, {}))
    for name, mode in (("glass", "RGBA"), ("grey glass", "LA")):
        picture = pictures[9 if mode == "LA" else 8].convert(mode)
        picture.putalpha(120)
        save(picture, photos / "odd" / f"{name}.png")
    deep = np.asarray(pictures[10].convert("L")).astype(np.uint16) * 257
    save(Image.fromarray(deep), photos / "odd" / "deep.png")
    for i, picture in enumerate(pictures[12:16]):
        save(picture, photos / "plain" / f"{i}.png")
    code, text = run(*CHECK)
    assert code == 0, text
    assert "note: images of several frames, of which the first is taken:\n  odd/moving.gif\n" in text
    assert "note: CMYK images, whose colours are converted without a profile:\n  odd/cmyk.jpg\n" in text
    assert "note: images of 16 bits a channel, scaled to 8:\n  odd/deep.png\n" in text
    transparent = text.split("note: images with transparent parts, which are taken as white:\n")[1]
    assert {line.strip() for line in transparent.splitlines()[:2]} == {"odd/glass.png", "odd/grey glass.png"}


def test_unreadable_images_are_listed_and_skipped_where_that_is_asked_for(tmp_path, run):
    photos = folder_of_classes(tmp_path / "photos", {"cat": 6, "dog": 6})
    (photos / "cat" / "0.png").write_bytes(b"no image")
    (photos / "dog" / "3.png").write_bytes((photos / "dog" / "3.png").read_bytes()[:40])
    Image.fromarray(np.ones((8, 8), dtype=np.float32)).save(photos / "dog" / "deep.tif")
    code, text = run(*CHECK)
    assert code == 1
    assert "problem: images that are missing or cannot be decoded:\n" in text
    assert "\n  cat/0.png\n" in text
    assert "or set own.photos.skip_unreadable: true" in text
    code, text = run(*DOWNLOAD)
    assert code == 1
    assert "or set own.photos.skip_unreadable: true" in text
    code, text = run(*CHECK, skip_unreadable=True)
    assert code == 0, text
    assert "note: images that cannot be read, skipped:\n  cat/0.png\n  dog/3.png\n  dog/deep.tif\n" in text
    assert text.startswith("2 classes, 10 images: ")
    assert run(*DOWNLOAD, skip_unreadable=True)[0] == 0
    split = read_split(tmp_path / "data" / "own" / "photos" / "split.json")
    assert len({file for part in split.values() for file, _, _ in part}) == 10
    for i in range(6):
        (photos / "dog" / f"{i}.png").write_bytes(b"no image")
    code, text = run(*CHECK, skip_unreadable=True)
    assert code == 1
    assert "own.photos: not one image can be read of: dog" in text


@pytest.mark.parametrize("kind", ["csv", "coop"])
def test_unreadable_images_of_a_list_are_skipped_too(tmp_path, run, kind):
    photos = folder_of_classes(tmp_path / "photos", {"cat": 6, "dog": 6})
    files = [(path.relative_to(photos).as_posix(), path.parent.name) for path in sorted(photos.rglob("*.png"))]
    files.append(("cat/gone.png", "cat"))
    if kind == "csv":
        rows = "".join(f"{file},{name}\n".replace("/", "\\") for file, name in files)  # from Windows
        (photos / "list.csv").write_text(f"path,label\n{rows}")
    else:
        items = [(file, ["dog", "cat"].index(name), name) for file, name in files]
        split = {"train": items[:4] + items[6:9], "val": [], "test": items[4:6] + items[9:]}
        (photos / "split.json").write_text(json.dumps(split))
    code, text = run(*CHECK, kind=kind)
    assert code == 1
    assert "problem: images that are missing or cannot be decoded:\n  cat/gone.png\n" in text
    code, text = run(*CHECK, kind=kind, skip_unreadable=True)
    assert code == 0, text
    assert text.startswith("2 classes, 12 images: ")


def test_names_in_any_script_and_twins(tmp_path, run):
    names = ["猫", "قطة", "🐶 собака", "Café", "Cafe\u0301", "cat", "cat ", "cat."]
    photos = folder_of_classes(tmp_path / "photos", dict.fromkeys(names, 2))
    image(photos / "猫" / "A.PNG", 900)
    image(photos / "猫" / "a.png", 901)
    for junk in ("Thumbs.db", "猫/desktop.ini", "猫/.DS_Store"):
        (photos / junk).write_bytes(b"")
    code, text = run(*CHECK)
    assert code == 0, text
    assert text.startswith("8 classes, 18 images: ")
    assert all(name in text for name in names)
    twins = text.split("note: classes whose names are the same in a prompt:\n")[1]
    assert twins.splitlines()[:2] == ["  'Cafe\u0301' = 'Café'", "  'cat' = 'cat ' = 'cat.'"]
    assert "left out" not in text


def test_a_thousand_classes_of_two_images(tmp_path, run):
    folder_of_classes(tmp_path / "photos", {f"class {i:03}": 2 for i in range(1000)})
    code, text = run(*CHECK)
    assert code == 0
    assert "1000 classes, 2000 images: 1000 train, 0 val, 1000 test\n" in text  # after the progress


def test_the_same_picture_is_noted_and_on_one_side_of_the_split(tmp_path, run):
    photos = tmp_path / "photos"
    for i, picture in enumerate(photographs()):
        name = "garden" if i < 12 else "temple"
        save(picture, photos / name / f"{i:02}.png")
        if i % 12 > 7:
            save(ImageEnhance.Brightness(picture).enhance(0.9), photos / name / f"{i:02}-darker.jpg", quality=70)
    code, text = run(*CHECK)
    assert code == 0, text
    assert "in more than one of train, val and test" not in text
    assert text.count(" = ") == 8
    assert "note: the same picture, not byte for byte, more than once in a part:\n" in text
    assert run(*DOWNLOAD)[0] == 0
    split = read_split(tmp_path / "data" / "own" / "photos" / "split.json")
    part_of = {file: part for part, items in split.items() for file, _, _ in items}
    darker = [file for file in part_of if "darker" in file]
    assert len(darker) == 8
    assert all(part_of[file] == part_of[file.replace("-darker.jpg", ".png")] for file in darker)
    # Where the folder brings its split, it stays, and the picture is named.
    for file, part in part_of.items():
        target = photos / ("test" if "darker" in file else part) / file
        target.parent.mkdir(parents=True, exist_ok=True)
        (photos / file).rename(target)
    for name in ("garden", "temple"):
        (photos / name).rmdir()
    (photos / "test" / "temple" / "00.png").write_bytes(
        (photos / "test" / "temple" / "21-darker.jpg").read_bytes()
    )
    save(next(photographs()), photos / "test" / "temple" / "13.webp", quality=80)
    code, text = run(*CHECK)
    assert "note: the same picture, not byte for byte, in more than one of train, val and test:\n" in text
    assert "note: the same picture, not byte for byte, in different classes:\n" in text


def test_words_that_the_tiny_clip_does_not_know_are_told_first(tmp_path, run):
    folder_of_classes(tmp_path / "photos", {"flowr": 3, "star": 3})
    (tmp_path / "photos" / "texts.json").write_text(json.dumps({"star": ["a zebra"]}))
    for command in (CHECK, DOWNLOAD):
        code, text = run(*command, params=TINY, descriptions="texts.json")
        assert code == 1
        assert "words that the tiny CLIP does not know; take others for classes, template and descriptions" in text
        assert "\n  flowr; near is flower" in text
        assert "\n  zebra" in text
    code, text = run(*CHECK, params=TINY, descriptions="texts.json")
    assert "note: all words that the tiny CLIP knows:\n" in text
    assert ", flower, " in text.replace("\n", " ")
    assert run(*CHECK, params=REAL, descriptions="texts.json")[0] == 0


def test_the_same_bytes_on_both_sides_of_a_given_split_stop_the_stage_unless_that_is_allowed(tmp_path, run):
    photos = folder_of_classes(tmp_path / "photos" / "train", {"cat": 4, "dog": 4}).parent
    folder_of_classes(photos / "test", {"cat": 2, "dog": 2}, 100)
    (photos / "test" / "cat" / "0.png").write_bytes((photos / "train" / "cat" / "0.png").read_bytes())
    leak = "the same bytes in more than one of train, val and test:\n  train/cat/0.png ("
    code, text = run(*CHECK)
    assert code == 1
    assert f"problem: {leak}" in text
    code, text = run(*DOWNLOAD)
    assert code == 1
    assert leak in text
    assert "Mend these, or set own.photos.allow_leaks: true for the same bytes. `python" in text
    code, text = run(*CHECK, allow_leaks=True)
    assert code == 0
    assert f"note: {leak}" in text
    assert run(*DOWNLOAD, allow_leaks=True)[0] == 0
