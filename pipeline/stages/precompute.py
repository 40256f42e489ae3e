"""Stage `precompute`: what the frozen CLIP makes of a data set, once for all seeds, shots and ablations.

out/precompute/<dataset>/
    prompts.json       class names, prompts, classes without descriptions, prompts that had to be cut
    text.safetensors   tokens, index, part and features of all prompts; part counts `PARTS`
    images.npy         [n, 3, size, size] uint8: test images, decoded, resized and cropped
    test.safetensors   labels of the test images, their features and what these are before the projection
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from heba.clip.features import Classes, encode_images, image_features
from heba.clip.preprocess import Preprocess, preprocess_of
from heba.clip.towers import feature_width
from heba.data import datasets
from heba.data.datasets import TABLE, as_seen
from heba.data.frozen import classes_of, encode_texts
from heba.data.images import open_packed, pack_images
from heba.data.prompts import PARTS, Kind, all_prompts, read_descriptions, tokenize
from heba.data.splits import Item, class_names, read_split
from pipeline.core.params import Params, stage_of
from pipeline.core.paths import OUT, new_folder, reading
from pipeline.stages.backbone import Tokenizer, computing, device, load_backbone
from pipeline.stages.download import template_of, verified_folder


@dataclass(frozen=True)
class TestImages:
    """The test images of a data set.

    Attributes:
        packed: [n, 3, size, size] uint8, on disk.
        features: [n, E], of the frozen image tower, not normalised. labels: [n].
        hidden: [n, width], the same before the projection; [n, 0] where the tower has none.
        preprocess: how the model wants them.
    """

    packed: np.ndarray
    features: Tensor
    hidden: Tensor
    labels: Tensor
    preprocess: Preprocess


def precompute_folder(dataset: str) -> Path:
    """Own data lies apart: what depends on all benchmarks does not depend on it."""
    return OUT / ("precompute" if dataset in TABLE else "precompute-own") / dataset


def read_names(dataset: str) -> list[str]:
    """The names of all classes."""
    path = precompute_folder(dataset) / "prompts.json"
    with reading(path, stage_of("precompute", dataset)):
        names = json.loads(path.read_text(encoding="utf-8"))["class_names"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("class_names must be a list of names")
    return names


def read_classes(dataset: str, prompts: Kind, tokenizer: Tokenizer) -> Classes:
    """All classes, with what frozen CLIP makes of their prompts of one kind; `tokenizer` is the backbone's."""
    names = read_names(dataset)
    path = precompute_folder(dataset) / "text.safetensors"
    with reading(path, stage_of("precompute", dataset)):
        tensors = load_file(path)
        if len({len(tensors[key]) for key in ("tokens", "index", "part", "features")}) > 1:
            raise ValueError("tokens, index, part and features have different lengths")
    return classes_of(names, tensors, prompts, tokenizer)


def read_test(dataset: str, preprocess: Preprocess) -> TestImages:
    """The test images as `preprocess` wants them."""
    packed, path = precompute_folder(dataset) / "images.npy", precompute_folder(dataset) / "test.safetensors"
    with reading(path, stage_of("precompute", dataset)):
        test = load_file(path)
        n = len(test["labels"])
        if len(test["features"]) != n or len(test["hidden"]) != n:
            raise ValueError("labels, features and hidden have different lengths")
    with reading(packed, stage_of("precompute", dataset)):
        images, size = open_packed(packed), preprocess.size
        if images.shape != (n, 3, size, size) or images.dtype != np.uint8:
            raise ValueError(f"{images.dtype} {images.shape}, for {n} images of {size} x {size} pixels")
    return TestImages(images, test["features"], test["hidden"], test["labels"], preprocess)


def run(params: Params, dataset: str) -> str:
    """Write out/precompute/<dataset> (see the module's docstring); returns a line about it."""
    data = verified_folder(params, dataset, images=True)
    split = read_split(data / "split.json")
    names = class_names(split)
    template = template_of(params, dataset)
    ensemble = datasets.ensemble(template, params.suite == "embedded")
    prompts = all_prompts(names, read_descriptions(data / "descriptions.json"), template, ensemble)
    fallback = prompts["descriptions"].fallback
    if fallback:
        print(f"{dataset}: no description, template used: {', '.join(fallback)}", file=sys.stderr)
    clip, tokenizer = load_backbone(params)
    tokens, cut = tokenize([text for part in PARTS for text in prompts[part].texts], tokenizer)
    for text in cut:
        print(f"{dataset}: longer than {tokens.shape[1]} tokens, cut: {text!r}", file=sys.stderr)
    with new_folder(precompute_folder(dataset)) as out:
        texts = {part: prompts[part].texts for part in PARTS}
        info = {"class_names": names, "prompts": texts, "fallback": fallback, "cut": cut}
        text = json.dumps(info, ensure_ascii=False, indent=1)
        (out / "prompts.json").write_text(text + "\n", encoding="utf-8")
        with tqdm(total=len(tokens), desc="prompts", delay=2, unit="prompt") as bar, computing(params):
            save_file(encode_texts(clip, prompts, tokens, bar.update), out / "text.safetensors")
        _images(params, split["test"], data / "images", as_seen(dataset), clip, out)
    return f"{len(tokens)} prompts of {len(names)} classes, {len(split['test'])} test images"


def _images(params: Params, test: list[Item], folder: Path, seen: bool, clip: Any, out: Path) -> None:
    preprocess = preprocess_of(clip)
    packed = out / "images.npy"
    with tqdm(total=len(test), desc="pack test images", delay=2, unit="image") as bar:
        pack_images([folder / file for file, _, _ in test], preprocess, packed, bar.update, seen)

    def encode(images: Tensor) -> Tensor:
        return torch.cat(image_features(clip, images), dim=-1)

    with tqdm(total=len(test), desc="frozen image features", delay=2, unit="image") as bar, computing(params):
        found = encode_images(open_packed(packed), preprocess, encode, device(params), progress=bar.update)
    features, hidden = found.tensor_split([feature_width(clip)], dim=-1)
    features, hidden = features.contiguous(), hidden.contiguous()
    labels = torch.tensor([label for _, label, _ in test])
    save_file({"labels": labels, "features": features, "hidden": hidden}, out / "test.safetensors")
