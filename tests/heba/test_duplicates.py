"""Which images are the same picture to the eye."""

import random
import shutil

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from sklearn.datasets import load_digits, load_sample_images

from heba.embedded import suite
from heba.sources.duplicates import same_pictures
from heba.sources.look import look_at


def save(image, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def photographs():
    """Two photographs, and cuttings of them, none of which shows what another does."""
    rng = random.Random(0)
    for number, pixels in enumerate(load_sample_images().images):
        image = Image.fromarray(pixels)
        yield f"{number}", image
        for left, top in ((0, 0), (0, 214), (320, 214)):
            side = rng.randint(150, 200)
            yield f"{number}-{left}-{top}", image.crop((left, top, left + side, top + side))


def turned_up(image, orientation):
    """As a camera held otherwise saves it, and the tag that says so."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    turn = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}[orientation]
    return image.transpose(turn), exif


def test_the_same_picture_saved_anew_is_found_and_no_other(tmp_path):
    wanted = []
    for name, image in photographs():
        half = image.resize((image.width // 2, image.height // 2))
        sideways, exif = turned_up(image, 6)
        changed = {
            "a.png": (image, {}),
            "b.jpg": (image, {"quality": 50}),
            "c.webp": (image, {"quality": 60}),
            "d.jpg": (half, {"quality": 80}),
            "e.png": (ImageEnhance.Brightness(image).enhance(0.85), {}),
            "f.jpg": (ImageEnhance.Brightness(image).enhance(1.08), {}),
            "g.png": (image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), {}),
            "h.jpg": (sideways, {"exif": exif, "quality": 90}),
        }
        for file, (picture, options) in changed.items():
            save(picture, tmp_path / name / file, **options)
        wanted.append([f"{name}/{file}" for file in changed])
    files = [file for group in wanted for file in group]
    random.Random(1).shuffle(files)
    counted = []
    assert same_pictures(look_at(tmp_path, files, counted.append)) == sorted(wanted)
    assert sum(counted) == len(files)


@pytest.mark.parametrize("side", [8, 32])
def test_handwritten_digits_are_all_different(tmp_path, side):
    for i, pixels in enumerate(load_digits().images):
        image = Image.fromarray((15.9 * pixels).astype("uint8"))
        save(image.resize((side, side), Image.Resampling.BICUBIC), tmp_path / f"{i}.png")
    (tmp_path / "again.png").write_bytes((tmp_path / "7.png").read_bytes())
    files = [path.name for path in tmp_path.iterdir()]
    assert same_pictures(look_at(tmp_path, files)) == [["7.png", "again.png"]]


@pytest.mark.parametrize("dataset", ["eurosat", "fgvc_aircraft", "imagenet_sketch"])
def test_drawings_are_all_different(tmp_path, dataset):
    suite.generate(dataset, tmp_path)
    files = [path.relative_to(tmp_path).as_posix() for path in (tmp_path / "images").rglob("*.png")]
    assert len(files) >= 200
    assert same_pictures(look_at(tmp_path, files)) == []


def test_plain_images_and_those_that_differ_in_place_or_colour_are_told_apart(tmp_path):
    for value in (0, 3, 128, 252, 255):
        save(Image.new("RGB", (40, 40), (value,) * 3), tmp_path / f"plain-{value}.png")
    save(Image.new("RGB", (40, 40), "white"), tmp_path / "plain-again.png")
    for i in range(3):
        save(Image.new("RGB", (40, 40), (200, i, 90)), tmp_path / f"plain-{i}.png")
    for colour in ("red", "green", "blue"):
        for left in (4, 14):
            image = Image.new("RGB", (40, 40), "white")
            image.paste(colour, (left, 10, left + 16, 26))
            save(image, tmp_path / f"{colour}-{left}.png")
    chequered = np.indices((64, 64)).sum(axis=0) // 2 % 2 * 255
    save(Image.fromarray(chequered.astype("uint8")), tmp_path / "chequered.png")
    image = Image.open(tmp_path / "red-4.png")
    save(image.resize((80, 40)), tmp_path / "wide.png")
    files = [path.name for path in tmp_path.iterdir()]
    assert same_pictures(look_at(tmp_path, files)) == [["plain-255.png", "plain-again.png"]]


def test_of_a_fixed_camera_what_moves_is_another_picture_and_what_flickers_is_not(tmp_path):
    scene = next(photographs())[1].resize((60, 40))
    rng = np.random.default_rng(0)
    names = [f"{i:02}.png" for i in range(40)]
    for name in names:
        noisy = np.asarray(scene) + rng.normal(0, 3, (40, 60, 3))
        save(Image.fromarray(noisy.clip(0, 255).astype("uint8")), tmp_path / name)
    for left in range(0, 48, 6):
        moved = scene.copy()
        moved.paste("black", (left, 2, left + 5, 7))
        save(moved, tmp_path / f"moved-{left}.png")
    files = [path.name for path in tmp_path.iterdir()]
    assert same_pictures(look_at(tmp_path, files)) == [names]


def test_what_cannot_be_read_is_in_no_group(tmp_path):
    assert same_pictures(look_at(tmp_path, [])) == []
    save(Image.new("RGB", (8, 8)), tmp_path / "a.png")
    shutil.copy(tmp_path / "a.png", tmp_path / "b.png")
    for name in ("c.png", "d.png"):
        (tmp_path / name).write_bytes(b"no image")
    assert same_pictures(look_at(tmp_path, ["a.png", "c.png", "gone.png", "d.png", "b.png"])) == [
        ["a.png", "b.png"]
    ]
    assert same_pictures(look_at(tmp_path, ["c.png"])) == []
