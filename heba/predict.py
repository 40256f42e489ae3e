"""Naming images: with a trained adapter, or with CLIP alone."""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from heba import TOP
from heba.clip import architecture, backbone
from heba.clip.features import BATCH_SIZE, class_features, encode_prompts
from heba.clip.preprocess import UNREADABLE, Preprocess, decode, normalise, resize_and_crop, to_rgb
from heba.clip.towers import encode_text_plain
from heba.data.images import for_each_image
from heba.data.prompts import TEMPLATE, Prompts, build_prompts, tokenize
from heba.methods.heba.model import ADAPTER_FILE, CONFIG_FILE, REMEDY, load_adapter

ImageLike = str | os.PathLike | Image.Image
CLASSIFIER_FILE = "classifier.safetensors"
# Pillow reads an image from its file when it is first used, which two threads cannot do at once. By its id an
# image always gets the same lock; that others get it too costs a little time.
READING = tuple(Lock() for _ in range(61))
# What naming images needs of a training's config, and its types.
CONFIG: dict[str, tuple[type, ...]] = {
    "class_names": (list,),
    "bf16": (bool,),
    "scale": (int, float),
    "backbone.name": (str,),
    "backbone.pretrained": (str,),
    "backbone.sha256": (str,),
}


@dataclass(frozen=True)
class Prediction:
    """What an image shows.

    Attributes:
        image: its path, or its place in what was given.
        classes: the likeliest, best first. probabilities: theirs, 0 to 1, a softmax over all classes.
        error: why the image could not be read; there are no classes then.
    """

    image: str
    classes: list[str]
    probabilities: list[float]
    error: str | None = None


@dataclass(frozen=True)
class Classifier:
    """Names images; made by `load` or `zero_shot`. Threads may share one, and the Pillow images that they give it.

    Attributes:
        classes: the names to choose from, in the order of `weights`.
        weights: the classifier [n_classes, E], normalised.
        encode: preprocessed images [n, 3, size, size] to features [n, E].
        preprocess: how the model wants its images.
        temperature: exp(logit_scale), which cosines are multiplied by.
        device: what it runs on.
        config: of the training, as in its config.json; empty for CLIP alone.
    """

    classes: list[str]
    weights: Tensor
    encode: Callable[[Tensor], Tensor]
    preprocess: Preprocess
    temperature: float
    device: torch.device
    config: Mapping[str, Any]

    def predict(
        self,
        images: ImageLike | Iterable[ImageLike],
        top: int = TOP,
        progress: Callable[[int], object] = lambda n: None,
    ) -> Iterator[Prediction]:
        """A prediction for each of `images`, files or Pillow's images, or for the one, with the `top` likeliest
        classes.

        A file that cannot be read is a prediction with an `error`. Raises ValueError for a `top` below 1, and
        TypeError for what is neither a file's name nor an image.
        """
        if not isinstance(top, int) or top < 1:
            raise ValueError(f"top must be a whole number from 1 on, not {top!r}")
        return self._predict([images] if isinstance(images, ImageLike) else images, top, progress)

    def _predict(
        self, images: Iterable[ImageLike], top: int, progress: Callable[[int], object]
    ) -> Iterator[Prediction]:
        size = BATCH_SIZE.get(self.device.type, 256)
        pixels: list[Tensor] = []
        waiting: list[Prediction] = []
        for i, (file, found) in enumerate(for_each_image(self._pixels, images)):
            error = found if isinstance(found, str) else None
            waiting.append(Prediction(file or f"image {i + 1}", [], [], error))
            if error is None:
                pixels.append(found)
            if len(waiting) == size:
                yield from self._name(waiting, pixels, top)
                progress(len(waiting))
                waiting, pixels = [], []
        yield from self._name(waiting, pixels, top)
        progress(len(waiting))

    def _pixels(self, image: ImageLike) -> tuple[str, Tensor | str]:
        """The name of a file, and the image as the model takes it up to uint8, or why it cannot be read."""
        if not isinstance(image, ImageLike):
            raise TypeError(f"images: file names or Pillow's images are needed, not {type(image).__name__}")
        file = "" if isinstance(image, Image.Image) else str(image)
        try:
            if isinstance(image, Image.Image):
                with READING[id(image) % len(READING)]:
                    opened = to_rgb(image)
            else:
                opened = decode(Path(image))
            return file, torch.from_numpy(resize_and_crop(opened, self.preprocess).copy())
        except UNREADABLE as error:
            return file, str(error)

    @torch.no_grad()
    def _name(self, waiting: list[Prediction], pixels: list[Tensor], top: int) -> Iterator[Prediction]:
        best: Iterator[tuple[list[float], list[int]]] = iter(())
        if pixels:
            batch = normalise(torch.stack(pixels).to(self.device), self.preprocess)
            features = F.normalize(self.encode(batch).float(), dim=-1)
            logits = self.temperature * features @ self.weights.to(self.device).T
            values, which = logits.softmax(dim=-1).topk(min(top, len(self.classes)))
            best = zip(values.tolist(), which.tolist(), strict=True)
        for prediction in waiting:
            if prediction.error is None:
                values_of, which_of = next(best)
                prediction = Prediction(prediction.image, [self.classes[c] for c in which_of], values_of)
            yield prediction


def load(
    folder: Path | str,
    classes: Sequence[str] | None = None,
    descriptions: Mapping[str, list[str]] | None = None,
    template: str = TEMPLATE,
    scale: float | None = None,
    device: str | None = None,
    root: Path | str = Path(),
    name: str | None = None,
    pretrained: str | None = None,
) -> Classifier:
    """The classifier that a training wrote into `folder`, which may come from anybody.

    Args:
        classes: other classes than those of the training.
        descriptions, template: for the prompts of `classes`, as in `heba.data.prompts.build_prompts`.
        scale: s for `classes`, the novel scale; None: that of the training.
        device: cpu or cuda; None: cuda where there is one.
        root: the folder that files of the backbone (weights, JSON config) are relative to, as the training names
            them; those that it names must lie in it.
        name, pretrained: the backbone as in `heba.clip.backbone.load`, where its files are not those that the training
            names; they may lie anywhere.
    Raises:
        ValueError: no adapter there, a damaged one, or one that was trained on other weights than those found, or
            that names files outside `root`; fewer than two classes, or what goes with `classes` alone.
    """
    new = None if classes is None else _prompts(classes, descriptions, template)
    if new is None and (descriptions is not None or scale is not None or template != TEMPLATE):
        raise ValueError("descriptions, template and scale go with classes; those of the training have their own")
    if scale is not None and not 0 <= scale < math.inf:
        raise ValueError(f"scale must be a number from 0 on, not {scale}")
    folder = Path(folder)
    config = read_config(folder)
    where = _device(device)
    clip, tokenizer, preprocess = _load_backbone(folder, config["backbone"], Path(root), name, pretrained)
    model, _ = load_adapter(clip.to(where), folder)
    model.to(where).eval()
    bf16 = bool(config["bf16"]) and where.type == "cuda"
    scale = config["scale"] if scale is None else scale

    def encode_text(tokens: Tensor) -> Tensor:
        with torch.autocast(where.type, torch.bfloat16, enabled=bf16):
            return model.encode_text(tokens, scale)

    if new is None:
        names = config["class_names"]
        classifier = _read_classifier(folder / CLASSIFIER_FILE, len(names))
    else:
        names, prompts = new
        classifier = _classifier(clip, prompts, len(names), tokenizer, encode_text, where)

    def encode_image(images: Tensor) -> Tensor:
        with torch.autocast(where.type, torch.bfloat16, enabled=bf16):
            return model.encode_image(images, scale)

    return Classifier(names, classifier, encode_image, preprocess, model.logit_factor().item(), where, config)


def _load_backbone(
    folder: Path, record: dict[str, Any], root: Path, name: str | None, pretrained: str | None
) -> backbone.Backbone:
    """The backbone that the config of the adapter in `folder` records, or `name` and `pretrained` in its place.

    No file is opened before its hash is that of the record, nor one outside `root` that only the record names.
    """
    remedy = "or name the file yourself (`name` or --backbone for a JSON config, `pretrained` or --pretrained)"
    for key, given in (("name", name), ("pretrained", pretrained)):
        if given is None and not (root / record[key]).resolve().is_relative_to(root.resolve()):
            raise ValueError(
                f"{folder / CONFIG_FILE}: backbone.{key}: {record[key]} lies outside {root.resolve()}, where an "
                f"adapter may name no file; set `root` (--root) to a folder that it lies in, {remedy}"
            )
    name, pretrained = name or record["name"], pretrained or record["pretrained"]
    try:
        if name.endswith(".json"):
            _check_hash(root / name, record.get("config_sha256"))
        architecture.read_config(name, root)
        weights = backbone.weights_file(name, pretrained, root)
        _check_hash(weights, record["sha256"])
    except ValueError as error:
        raise ValueError(
            f"{folder} was trained on {record['name']}, {record['pretrained']}: {error}; `root` (--root) names "
            f"the folder that files are relative to, the repository of the training; {remedy}"
        ) from None
    return backbone.load(name, pretrained, root)


def _check_hash(file: Path, wanted: str | None) -> None:
    if not file.is_file():
        raise ValueError(f"there is no file {file}")
    if backbone.sha256(file) != wanted:
        raise ValueError(f"{file} is another file by its sha256")


def zero_shot(
    name: str,
    pretrained: str,
    classes: Sequence[str],
    descriptions: Mapping[str, list[str]] | None = None,
    template: str = TEMPLATE,
    device: str | None = None,
    root: Path | str = Path(),
) -> Classifier:
    """CLIP alone, with the backbone `name` and `pretrained` of `heba.clip.backbone.load`, over `classes`; the other
    arguments are those of `load`."""
    names, prompts = _prompts(classes, descriptions, template)
    where = _device(device)
    clip, tokenizer, preprocess = backbone.load(name, pretrained, Path(root))
    clip.to(where)
    classifier = _classifier(
        clip, prompts, len(names), tokenizer, lambda tokens: encode_text_plain(clip, tokens), where
    )
    temperature = clip.logit_scale.exp().item()
    return Classifier(names, classifier, clip.encode_image, preprocess, temperature, where, {})


def read_config(folder: Path) -> dict[str, Any]:
    """The config of the training that wrote `folder`; ValueError when there is none, or it is not whole."""
    path = folder / CONFIG_FILE
    if not path.is_file() or not (folder / ADAPTER_FILE).is_file():
        raise ValueError(
            f"{folder}: no adapter; name the folder that a training wrote, with {ADAPTER_FILE} and {CONFIG_FILE} "
            "in it, such as out/train/eurosat/base_to_novel-1"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict) or not isinstance(config.get("backbone"), dict):
            raise ValueError("backbone: missing")
        values = config | {f"backbone.{key}": value for key, value in config["backbone"].items()}
        for key, kind in CONFIG.items():
            if type(values.get(key)) not in kind:
                raise ValueError(f"{key}: {'missing' if key not in values else 'not of the right type'}")
        names = config["class_names"]
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError("class_names: must be a list of names")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged ({error}); {REMEDY}") from None
    return config


def save_classifier(classifier: Tensor, folder: Path) -> None:
    """Write the classifier [n_classes, E] of a training's own classes beside its adapter."""
    save_file({"classifier": classifier.contiguous()}, folder / CLASSIFIER_FILE)


def _read_classifier(path: Path, n_classes: int) -> Tensor:
    try:
        classifier = load_file(path)["classifier"]
        if classifier.ndim != 2 or len(classifier) != n_classes:
            raise ValueError(f"shape {tuple(classifier.shape)} for {n_classes} classes")
    except Exception as error:  # whatever is wrong with the file
        raise ValueError(f"{path}: no classifier of this training ({error}); {REMEDY}") from None
    return classifier


def _prompts(
    classes: Sequence[str], descriptions: Mapping[str, list[str]] | None, template: str
) -> tuple[list[str], Prompts]:
    """The names of new classes, and their prompts."""
    if isinstance(classes, str):
        raise ValueError(f"classes: a list of names is needed, not the text {classes!r}")
    names = list(classes)
    if not all(isinstance(name, str) and name.strip() for name in names) or len(set(names)) < max(2, len(names)):
        raise ValueError(f"classes: two or more different names are needed, got {', '.join(map(repr, names))}")
    return names, build_prompts(names, dict(descriptions or {}), template)


def _classifier(
    clip: Any,
    prompts: Prompts,
    n_classes: int,
    tokenizer: Callable[[list[str]], Tensor],
    encode: Callable[[Tensor], Tensor],
    where: torch.device,
) -> Tensor:
    tokens, _ = tokenize(prompts.texts, tokenizer)
    features = encode_prompts(clip, tokens, encode, where)
    return class_features(features, torch.tensor(prompts.class_index), n_classes)


def _device(name: str | None) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: torch finds no GPU; leave it out, or take cpu")
    if name not in (None, "cpu", "cuda"):
        raise ValueError(f"device {name!r}: take cpu or cuda")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
