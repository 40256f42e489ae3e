"""The embedded suite: complete, deterministic, and readable by the tiny CLIP."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from heba.clip.features import class_features, encode_images
from heba.clip.preprocess import preprocess_of
from heba.clip.tiny import FOLDER, known_tokens, load_tiny_clip
from heba.clip.towers import encode_text_plain
from heba.data import datasets
from heba.data.prompts import build_prompts
from heba.data.splits import class_names, read_split
from heba.embedded import canvas, suite


def digest(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.parametrize("key", ["imagenet_a", "fgvc_aircraft"])
def test_generation_is_complete_and_repeats(tmp_path, key):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        suite.generate(key, tmp_path / name)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    split = read_split(tmp_path / "a" / "split.json")
    names = suite.DATASETS[key].class_names
    assert class_names(split) == names
    variant = key in suite.VARIANTS
    for part, n in suite.PER_CLASS.items():
        assert len(split[part]) == (0 if variant and part != "test" else n * len(names))
    files = [file for part in split.values() for file, _, _ in part]
    assert len(set(files)) == len(files)
    assert all((tmp_path / "a" / "images" / file).is_file() for file in files)
    if not variant:
        images = [v for k, v in digest(tmp_path / "a").items() if k.endswith("png")]
        assert len(set(images)) == len(images)


def test_every_class_has_descriptions_but_one():
    missing = [
        (key, name)
        for key, info in suite.DATASETS.items()
        for name in info.class_names
        if not suite.descriptions(key)[name]
    ]
    assert missing == [("dtd", "bubbly")]


def test_the_weights_are_small_and_know_every_prompt():
    assert (FOLDER / "model.safetensors").stat().st_size < 5_000_000
    _, tokenizer = load_tiny_clip()
    texts = [
        text
        for key, info in suite.DATASETS.items()
        for text in build_prompts(info.class_names, suite.descriptions(key), datasets.template(key, True)).texts
    ]
    assert set(tokenizer(texts).flatten().tolist()) <= known_tokens()


def test_the_tiny_clip_knows_clean_drawings():
    clip, tokenizer = load_tiny_clip()
    info = suite.DATASETS["imagenet"]
    prompts = build_prompts(info.class_names, suite.descriptions("imagenet"), datasets.template("imagenet", True))
    classifier = class_features(
        encode_text_plain(clip, tokenizer(prompts.texts)), torch.tensor(prompts.class_index), len(info.class_names)
    )
    pictures = [
        np.asarray(canvas.shrink(draw(np.random.default_rng([77, i])))).transpose(2, 0, 1)
        for draw in info.draw.values()
        for i in range(10)
    ]
    features = encode_images(np.stack(pictures), preprocess_of(clip), clip.encode_image, torch.device("cpu"))
    right = (features @ classifier.T).argmax(-1) == torch.arange(10).repeat_interleave(10)
    assert right.float().mean() > 0.5
