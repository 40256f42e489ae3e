"""Prompts, metrics and image handling at their boundaries."""

import json
import unicodedata

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from open_clip.transform import image_transform_v2
from PIL import ExifTags, Image, ImageOps, features

from heba.clip.preprocess import DeepImage, LongImage, Preprocess, decode, normalise, resize_and_crop, to_rgb
from heba.data.datasets import as_seen
from heba.data.images import crop_batch, decode_all, make_views, open_packed, pack_images, sample_crop
from heba.data.prompts import build_prompts, read_descriptions, tokenize
from heba.evaluation.report import classification_report
from heba.predict import Classifier
from heba.sources.look import look_at_one


def test_descriptions_are_found_whatever_the_spelling_of_the_class():
    prompts = build_prompts(["Sea_Lion", "cat"], {"sea lion": ["wet.", "grey."]}, "a photo of a {}.")
    assert prompts.texts == ["a photo of a Sea Lion, wet.", "a photo of a Sea Lion, grey.", "a photo of a cat."]
    assert prompts.class_index == [0, 0, 1]
    assert prompts.fallback == ["cat"]


def test_a_name_with_its_accents_apart_is_the_same_name():
    """As macOS may have it in a folder's name."""
    apart, whole = (unicodedata.normalize(form, "Käse") for form in ("NFD", "NFC"))
    assert apart != whole
    for name, key in ((apart, whole), (whole, apart)):
        prompts = build_prompts([name, "cat"], {key: ["yellow."]}, "a photo of a {}.")
        assert prompts.texts[0] == f"a photo of a {whole}, yellow."
    assert build_prompts([apart, "cat"], {}, "a {}.").texts[0] == f"a {whole}."


def test_descriptions_that_fit_no_class_are_an_error_not_silence():
    with pytest.raises(ValueError, match="none of the 2 classes"):
        build_prompts(["a", "b"], {"x": ["y"]}, "a {}.")


@pytest.mark.parametrize("template", ["a photo", "a {} of {x}", "a {x}", "a {} {}", "a {}}", "a {0}", "a {:>9}"])
def test_a_template_has_one_place_for_the_class_and_no_other_brace(template):
    with pytest.raises(ValueError, match=r"a template needs one \{\}"):
        build_prompts(["a", "b"], {}, template)


def test_a_bad_descriptions_file_is_named(tmp_path):
    path = tmp_path / "d.json"
    path.write_text(json.dumps({"cat": "not a list"}))
    with pytest.raises(ValueError, match=r"d\.json: class 'cat'"):
        read_descriptions(path)


def test_texts_over_the_context_length_are_reported():
    tokenizer = open_clip.SimpleTokenizer(context_length=8)
    exact, over = "a b c d e f", "a b c d e f g"
    tokens, cut = tokenize([exact, over, "a"], tokenizer)
    assert cut == [over]
    assert tokens.shape == (3, 8)
    assert (tokens.argmax(-1) == torch.tensor([7, 7, 2])).all()


SIGLIP = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "resize_mode": "squash"}


@pytest.mark.parametrize("size", [(50, 31), (31, 50), (32, 32), (33, 80), (7, 9)])
@pytest.mark.parametrize("changes", [{}, SIGLIP, {"interpolation": "bilinear"}])
def test_the_test_transform_is_open_clips_to_the_pixel(size, changes):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    theirs = image_transform_v2(open_clip.transform.PreprocessCfg(size=32, **changes), is_train=False)(picture)
    preprocess = Preprocess(32, **changes)
    ours = normalise(torch.from_numpy(resize_and_crop(picture, preprocess).copy())[None], preprocess)[0]
    assert torch.allclose(ours, theirs, atol=1e-6)


@given(st.integers(1, 90), st.integers(1, 90), st.integers(0, 9))
def test_crops_lie_inside_the_image(height, width, seed):
    top, left, h, w = sample_crop(height, width, torch.Generator().manual_seed(seed))
    assert 0 <= top <= top + h <= height
    assert 0 <= left <= left + w <= width
    assert h >= 1
    assert w >= 1


def test_packed_images_are_in_order_and_a_damaged_one_is_named(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(30)]
    for i, path in enumerate(paths):
        Image.new("RGB", (9, 7), (i, 2 * i, 3 * i)).save(path)
    done = []
    pack_images(paths, Preprocess(4), tmp_path / "images.npy", done.append)
    packed = open_packed(tmp_path / "images.npy")
    assert packed.shape == (30, 3, 4, 4)
    assert packed[:, :, 0, 0].tolist() == [[i, 2 * i, 3 * i] for i in range(30)]
    assert sum(done) == 30
    paths[17].write_bytes(paths[17].read_bytes()[:30])
    with pytest.raises(ValueError, match=r"17\.png"):
        pack_images(paths, Preprocess(4), tmp_path / "images.npy", done.append)


def test_flips_mirror():
    image = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    plain, flipped = crop_batch([image, image], [(0, 0, 8, 8)] * 2, [False, True], Preprocess(8))
    assert torch.equal(plain, flipped.flip(-1))
    assert torch.allclose(plain, normalise(image[None], Preprocess())[0])


def test_a_truncated_image_is_named(tmp_path):
    path = tmp_path / "x.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(ValueError, match=r"x\.png: not a readable image"):
        decode(path)
    Image.new("1", (20_000, 10_000)).save(path)  # more than PIL decodes
    with pytest.raises(ValueError, match=r"x\.png: not a readable image"):
        decode(path)


@pytest.mark.parametrize("kind", ["16.png", "16.tif", "16.pgm"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path, kind):
    """Pillow's RGB of them is white wherever a value is above 255."""
    path, values = tmp_path / kind, np.arange(0, 65536, 1024).reshape(8, 8)
    Image.fromarray(values.astype(np.uint16)).save(path)
    assert np.array_equal(np.asarray(decode(path)), np.repeat(values[:, :, None] // 256, 3, axis=2))


@pytest.mark.parametrize("kind", ["12.png", "32.tif", "float.tif", "12.pgm"])
def test_more_than_eight_bits_of_an_unknown_range_are_refused_and_not_white_or_black(tmp_path, kind):
    dtype = {"32": np.int32, "float": np.float32}.get(kind.split(".")[0], np.uint16)
    path = tmp_path / kind
    Image.fromarray(np.arange(0, 4096, 64).reshape(8, 8).astype(dtype)).save(path)
    message = rf"{kind}: an image of 16 or more bits a channel .* convert it to 8 bit"
    with pytest.raises(DeepImage, match=message):
        decode(path)
    with pytest.raises(DeepImage, match=message):
        pack_images([path], Preprocess(4), tmp_path / "images.npy", lambda n: None)
    with Image.open(path) as image, pytest.raises(DeepImage, match="convert it to 8 bit"):
        to_rgb(image)


@pytest.mark.parametrize("size", [(1, 65500), (5000, 49)])
def test_a_line_is_no_picture(tmp_path, size):
    """Resized to its shorter side, the first would be of 14 million rows."""
    path = tmp_path / "line.png"
    Image.new("L", size).save(path)
    message = f"line.png: {size[0]} x {size[1]} pixels, one side more than 100 times the other; crop it"
    with pytest.raises(LongImage, match=message):
        decode(path)
    Image.new("L", (5000, 50)).save(path)
    assert decode(path).size == (5000, 50)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_other_modes_of_eight_bits_are_taken(tmp_path, mode):
    path = tmp_path / "x.tif"
    Image.new(mode, (8, 8), 0).save(path)
    assert decode(path).mode == "RGB"


def test_classification_report_by_hand():
    predicted = torch.tensor([0, 0, 1, 1, 1])
    report = classification_report(predicted, torch.tensor([0, 1, 1, 1, 0]), ["a", "b", "c"])
    assert report["n"] == 5
    assert report["confusion"] == [[1, 1, 0], [1, 2, 0], [0, 0, 0]]
    assert report["accuracy"] == 60
    assert report["per_class"] == [50, pytest.approx(200 / 3), None]


@pytest.fixture
def held_sideways(tmp_path):
    """An image, and the same as a camera that is held sideways saves it, with the tag that says so."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 36, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    paths = [tmp_path / "upright.png", tmp_path / "sideways.png"]
    picture.save(paths[0])
    picture.transpose(Image.Transpose.ROTATE_90).save(paths[1], exif=exif)
    return paths


def test_own_images_are_upright_wherever_they_are_opened_and_benchmarks_as_they_are(tmp_path, held_sideways):
    preprocess = Preprocess(8)

    def packed(paths, seen):
        pack_images(paths, preprocess, tmp_path / "images.npy", lambda n: None, seen)
        return torch.from_numpy(open_packed(tmp_path / "images.npy").copy())

    def viewed(paths, seen):
        return [make_views(tmp_path, path.name, preprocess, 1, 0, 0.5, as_seen=seen) for path in paths]

    for opened in (packed, viewed, lambda paths, seen: decode_all(paths, lambda n: None, seen)):
        upright, sideways = opened(held_sideways, True)
        assert torch.equal(upright, sideways)
        upright, sideways = opened(held_sideways, False)
        assert not torch.equal(upright, sideways)
    assert [as_seen(name) for name in ("dtd", "imagenet_a", "flowers")] == [False, False, True]


def test_a_prediction_is_of_the_upright_image(held_sideways):
    def logits(pixels):
        return pixels.flatten(1)[:, :3]

    classifier = Classifier(["a", "b", "c"], logits, Preprocess(8), torch.device("cpu"), None)
    with Image.open(held_sideways[1]) as sideways:
        found = [p.probabilities for p in classifier.predict([*held_sideways, sideways])]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_as_pillow_turns_it(orientation):
    picture = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6))
    picture.getexif()[ExifTags.Base.Orientation] = orientation
    wanted = ImageOps.exif_transpose(picture)
    assert np.array_equal(np.asarray(to_rgb(picture, as_seen=True)), np.asarray(wanted.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_are_white_to_a_viewer(mode):
    picture = Image.new("RGBA", (8, 8), (255, 0, 0, 0)).convert(mode)
    if mode == "P":
        picture = Image.new("P", (8, 8), 5)
        picture.info["transparency"] = 5
    assert np.asarray(to_rgb(picture, as_seen=True)).min() == 255
    assert np.asarray(to_rgb(picture)).min() < 255


def test_damaged_tags_do_not_make_an_image_unreadable(tmp_path):
    path = tmp_path / "x.jpg"
    Image.new("RGB", (8, 8), "red").save(path, exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01")
    assert decode(path, as_seen=True).size == (8, 8)


def gif_without_its_second_frame(path):
    frames = [Image.new("RGB", (12, 12), color) for color in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex(b"!\xf9") + 1])


def avif_without_its_picture(path):
    Image.new("RGB", (32, 32), "red").save(path)
    content = path.read_bytes()
    start = content.index(b"mdat") + 4
    path.write_bytes(content[:start] + bytes(len(content) - start))


def test_the_first_frame_of_an_animation_is_read_though_the_second_is_damaged(tmp_path):
    path = tmp_path / "x.gif"
    gif_without_its_second_frame(path)
    with Image.open(path) as image, pytest.raises(IndexError):
        _ = image.is_animated  # what Pillow makes of it
    assert decode(path).size == (12, 12)
    look = look_at_one(path)
    assert (look.problem, look.odd) == ("", ("animated",))


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_a_damaged_avif_is_named(tmp_path):
    path = tmp_path / "x.avif"
    avif_without_its_picture(path)
    with pytest.raises(ValueError, match=r"x\.avif: not a readable image"):
        decode(path)
    assert look_at_one(path).problem == "broken"
