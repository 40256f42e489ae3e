"""Classify images, with what a training left or with CLIP alone."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from heba import artifact, methods
from heba.artifact import CONFIG_FILE
from heba.clip import architecture, backbone
from heba.clip.device import in_bf16, send
from heba.clip.features import BATCH_SIZE, Classes, encode_prompts, image_features
from heba.clip.preprocess import UNREADABLE, Preprocess, decode, normalise, resize_and_crop, to_rgb
from heba.clip.towers import encode_text_plain
from heba.data import datasets
from heba.data.images import Images, for_each_image
from heba.data.prompts import TEMPLATE, Prompts, all_prompts, build_prompts, prompts_of, tokenize
from heba.data.validation import keys_and_reasons

Tokenizer = Callable[[list[str]], Tensor]
ImageLike = str | os.PathLike | Image.Image
# Pillow reads an image from its file when it is first used, which two threads cannot do at once. By its id an
# image always gets the same lock; that others get it too costs a little time.
READING = tuple(Lock() for _ in range(61))
PLAIN = "zero_shot"  # the method that needs no training
TOP = 5  # classes of a prediction where no other number is asked for


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
    """Classifies images; made by `load` or `zero_shot`. Threads may share one, and the Pillow images they give it.

    Attributes:
        classes: the names to choose from, in the order of the logits.
        logits: preprocessed images [n, 3, size, size] to logits [n, n_classes].
        preprocess: how the model wants its images.
        device: what it runs on.
        config: of the training; None for CLIP alone.
    """

    classes: list[str]
    logits: Callable[[Tensor], Tensor]
    preprocess: Preprocess
    device: torch.device
    config: artifact.Config | None

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
                yield from self._classify(waiting, pixels, top)
                progress(len(waiting))
                waiting, pixels = [], []
        yield from self._classify(waiting, pixels, top)
        progress(len(waiting))

    def _pixels(self, image: ImageLike) -> tuple[str, Tensor | str]:
        """The name of a file, and the image as the model takes it up to uint8, or why it cannot be read."""
        if not isinstance(image, ImageLike):
            raise TypeError(f"images: file names or Pillow's images are needed, not {type(image).__name__}")
        file = "" if isinstance(image, Image.Image) else str(image)
        try:
            if isinstance(image, Image.Image):
                with READING[id(image) % len(READING)]:
                    opened = to_rgb(image, as_seen=True)
            else:
                opened = decode(Path(image), as_seen=True)
            return file, torch.from_numpy(resize_and_crop(opened, self.preprocess).copy())
        except UNREADABLE as error:
            return file, str(error)

    @torch.no_grad()
    def _classify(self, waiting: list[Prediction], pixels: list[Tensor], top: int) -> Iterator[Prediction]:
        best: Iterator[tuple[list[float], list[int]]] = iter(())
        if pixels:
            batch = normalise(send(torch.stack(pixels), self.device), self.preprocess)
            values, which = self.logits(batch).softmax(dim=-1).topk(min(top, len(self.classes)))
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
    settings: Mapping[str, Any] | None = None,
    device: str | None = None,
    root: Path | str = Path(),
    name: str | None = None,
    pretrained: str | None = None,
) -> Classifier:
    """The classifier that a training wrote into `folder`, which may come from anybody.

    Args:
        classes: other classes than those of the training.
        descriptions, template: for the prompts of `classes`, as in `heba.data.prompts.build_prompts`.
        settings: of the method, where others than the training's are wanted for `classes`; of those that change no
            training (EVALUATION), such as HeBA's scale_novel.
        device: cpu or cuda; None: cuda where there is one.
        root: the folder that files of the backbone (weights, JSON config) are relative to, as the training names
            them; those that it names must lie in it.
        name, pretrained: the backbone as in `heba.clip.backbone.load`, where its files are not those that the
            training names; they may lie anywhere.
    Raises:
        ValueError: no adapter there, a damaged one, or one that was trained on other weights than those found, or
            that names files outside `root`; fewer than two classes, or what goes with `classes` alone; a method
            that cannot classify new classes.
    """
    names = None if classes is None else _names(classes)
    if names is None and (descriptions is not None or settings or template != TEMPLATE):
        raise ValueError(
            "descriptions, template and settings go with classes; those of the training have their own"
        )
    folder = Path(folder)
    config = artifact.read_config(folder)
    where = find_device(device)
    bf16 = config.bf16 and where.type == "cuda"
    record = config.backbone.model_dump()
    clip, tokenizer, preprocess = _load_backbone(folder, record, Path(root), name, pretrained)
    model, _ = artifact.load((in_bf16(clip) if bf16 else clip).to(where), folder)
    model.requires_grad_(False)
    if names is None:
        names = config.class_names
        classifier = artifact.read_classifier(folder, len(names))
    else:
        used = _with_settings(config, settings or {})
        ensemble = datasets.ensemble(template, config.suite == "embedded")
        prompts = prompts_of(used.prompts, all_prompts(names, dict(descriptions or {}), template, ensemble))
        with torch.autocast(where.type, torch.bfloat16, enabled=bf16):
            classifier = _new_classifier(config.method, model, _classes(clip, tokenizer, names, prompts), used)
    return Classifier(names, logits_of(config.method, model, clip, classifier, bf16), preprocess, where, config)


def _with_settings(config: artifact.Config, changed: Mapping[str, Any]) -> Any:
    """The settings of a training, with some that change no training replaced."""
    about = methods.part(config.method, "settings")
    if not about.NEW_CLASSES:
        raise ValueError(f"{about.TITLE} cannot classify classes that it was not trained on")
    wrong = sorted(set(changed) - about.EVALUATION)
    if wrong:
        known = ", ".join(sorted(about.EVALUATION)) or "none"
        raise ValueError(f"settings: {', '.join(wrong)} cannot be changed after the training; these can: {known}")
    try:
        return about.Settings.model_validate(config.settings | dict(changed))
    except ValidationError as error:
        raise ValueError(f"settings: {keys_and_reasons(error)}") from None


def _classes(clip: Any, tokenizer: Tokenizer, names: list[str], prompts: Prompts) -> Classes:
    """What frozen CLIP makes of class names."""
    tokens, _ = tokenize(prompts.texts, tokenizer)
    features = encode_prompts(clip, tokens, partial(encode_text_plain, clip), clip.logit_scale.device)
    return Classes(names, tokens, torch.tensor(prompts.class_index), features, tokenizer)


@torch.no_grad()
def _new_classifier(method: str, model: Any, classes: Classes, settings: Any) -> dict[str, Tensor]:
    """What a method keeps of class names that it was not trained on."""
    return methods.part(method, "method").classifier(model, classes, settings, False)


def logits_of(
    method: str, model: Any, clip: Any, classifier: dict[str, Tensor], bf16: bool
) -> Callable[[Tensor], Tensor]:
    """Preprocessed images to logits, by a method."""
    part, reads = methods.part(method, "method"), methods.part(method, "settings").READS
    where = clip.logit_scale.device
    classifier = {name: tensor.to(where) for name, tensor in classifier.items()}

    def logits(pixels: Tensor) -> Tensor:
        with torch.autocast(where.type, torch.bfloat16, enabled=bf16):
            if reads == "pixels":
                images = Images.of_pixels(pixels)
            else:
                images = Images.of_features(*image_features(clip, pixels))
            return part.logits(model, classifier, images)

    return logits


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
        architecture.read_architecture(name, root)
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
    """CLIP alone, with the backbone `name` and `pretrained` of `heba.clip.backbone.load`, over `classes`; the
    other arguments are those of `load`."""
    names, where = _names(classes), find_device(device)
    prompts = build_prompts(names, dict(descriptions or {}), template)
    clip, tokenizer, preprocess = backbone.load(name, pretrained, Path(root))
    clip.to(where)
    settings = methods.part(PLAIN, "settings").Settings()
    model = methods.part(PLAIN, "method").build(clip, len(names), settings, seed=0)
    classifier = _new_classifier(PLAIN, model, _classes(clip, tokenizer, names, prompts), settings)
    return Classifier(names, logits_of(PLAIN, model, clip, classifier, False), preprocess, where, None)


def _names(classes: Sequence[str]) -> list[str]:
    """The names of new classes."""
    if isinstance(classes, str):
        raise ValueError(f"classes: a list of names is needed, not the text {classes!r}")
    names = list(classes)
    if not all(isinstance(name, str) and name.strip() for name in names) or len(set(names)) < max(2, len(names)):
        raise ValueError(f"classes: two or more different names are needed, got {', '.join(map(repr, names))}")
    return names


def find_device(name: str | None) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: torch finds no GPU; leave it out, or take cpu")
    if name not in (None, "cpu", "cuda"):
        raise ValueError(f"device {name!r}: take cpu or cuda")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
