"""Adapt CLIP to a folder of images: the pipeline's few-shot training of one method, in one function.

The same images, settings and seed give what the stages split, precompute, views, train and evaluate give.
"""

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from pydantic import ValidationError

from heba import artifact, methods
from heba.clip import architecture
from heba.clip import backbone as backbones
from heba.clip.device import in_bf16
from heba.data import datasets
from heba.data.frozen import classes_of, encode_texts, encode_views
from heba.data.images import LabelledImages
from heba.data.prompts import PARTS, TEMPLATE, all_prompts, tokenize
from heba.data.splits import Item, Split, class_names, sample_few_shot
from heba.data.validation import keys_and_reasons
from heba.evaluation.metrics import wilson
from heba.evaluation.report import classification_report
from heba.files import new_folder
from heba.fit.bounds import MOST_SEED
from heba.fit.run import Progress, Run, silent
from heba.predict import Classifier, find_device, logits_of
from heba.sources.duplicates import same_pictures
from heba.sources.look import Look, look_at
from heba.sources.own import read_own

# For methods on frozen features: random crops of each image, and the smallest area of one.
PASSES, CROP = {"train": 4, "val": 0}, 0.5
SHOWN = 10  # files that an error names


@dataclass(frozen=True)
class Adaptation:
    """What `adapt` made.

    Attributes:
        method: its name. classes: by label. shots, seed: of the sample.
        n_train, n_val, n_test: images that it was trained on, chose values on, and was tested on.
        accuracy: on the test images, in percent. interval: Wilson's, of 95 %, both ends in percent.
        confusion: counts of test images, a row per true class and a column per predicted one.
        seconds: of the training alone.
        path: the artifact, for `heba.load` and `heba predict`; None where nothing was to be written.
        classifier: it, ready to classify images.
    """

    method: str
    classes: list[str]
    shots: int
    seed: int
    n_train: int
    n_val: int
    n_test: int
    accuracy: float
    interval: tuple[float, float]
    confusion: list[list[int]]
    seconds: float
    path: Path | None
    classifier: Classifier


def adapt(
    folder: Path | str,
    method: str = "heba",
    shots: int = 16,
    seed: int = 1,
    backbone: str = "tiny",
    pretrained: str = "embedded",
    settings: Mapping[str, Any] | None = None,
    out: Path | str | None = None,
    device: str | None = None,
    root: Path | str = Path(),
    progress: Progress = silent,
) -> Adaptation:
    """Train one method on a few images per class of `folder`, and test it once on the test images there.

    Args:
        folder: a folder per class, or these below train/, val/ and test/. Without these the images of a class are
            split in the same way every time: half to train, a fifth to val, the rest to test.
        method: one of `heba.methods.names()`.
        shots: training images per class, 1 or more, drawn by `seed` as CoOp draws them.
        seed: 0 to MOST_SEED; of the training's draws too.
        backbone, pretrained: as in `heba.clip.backbone.load`; the tiny CLIP sees little and knows few words.
        settings: those of the method that are not to be the paper's. Layers that the backbone does not have become
            its last ones where `settings` does not name them.
        out: the folder of the artifact; it may hold another artifact, and nothing else. None: write none.
        device: cpu or cuda; None: cuda where there is one.
        root: the folder that files of the backbone are relative to.
        progress: `with progress(total, what) as done:`, where `done(n)` counts n more of the `total`.
    Raises:
        ValueError: a number out of its bounds; a folder that cannot be split or has an image that cannot be read;
            a method, setting or backbone that does not exist; a class name that the tiny CLIP does not know; an
            `out` that holds something else or lies in `folder`.
        FloatingPointError: a loss that is not finite.
    """
    if shots < 1 or not 0 <= seed <= MOST_SEED:
        raise ValueError(f"shots must be from 1 on and seed from 0 to {MOST_SEED}, not {shots} and {seed}")
    folder, root, target = Path(folder), Path(root), None if out is None else Path(out)
    if target is not None:
        check_out(target, folder)
    where = find_device(device)
    chosen = choose_settings(method, settings or {}, architecture.read_architecture(backbone, root))
    split = sample_few_shot(read_folder(folder, progress), shots, seed)
    names, embedded, bf16 = class_names(split), backbone == "tiny", where.type == "cuda"
    part, about = methods.part(method, "method"), methods.part(method, "settings")
    clip, tokenizer, preprocess = backbones.load(backbone, pretrained, root)
    clip = (in_bf16(clip) if bf16 else clip).to(where)
    history: list[dict[str, float]] = []
    run = Run(seed, shots, bf16, on_epoch=history.append, progress=progress)
    prompts = all_prompts(names, {}, TEMPLATE, datasets.ensemble(TEMPLATE, embedded))
    tokens, _ = tokenize([text for kind in PARTS for text in prompts[kind].texts], tokenizer)
    with run.autocast(where):
        classes = classes_of(names, encode_texts(clip, prompts, tokens), chosen.prompts, tokenizer)
    with torch.no_grad(), run.autocast(where):
        encoder = clip if about.READS == "features" and about.DRAWS else None
        parts = [labelled(split[name], folder, encoder, run, passes) for name, passes in PASSES.items()]
    began = time.perf_counter()
    model = part.build(clip, len(names), chosen, seed)
    values = part.fit(model, *parts, classes, chosen, run)
    seconds = time.perf_counter() - began
    config = artifact.Config(
        method=method,
        settings=chosen.model_dump(),
        class_names=names,
        backbone=backbone_record(backbone, pretrained, root),
        protocol="few_shot",
        dataset=folder.resolve().name,
        suite="embedded" if embedded else "real",
        bf16=bf16,
        seed=seed,
        shots=shots,
        threads=torch.get_num_threads(),
        chosen=values,
    )
    with TemporaryDirectory() if target is None else new_folder(target) as written:
        files_of = Path(written)
        artifact.write_config(config, files_of)
        artifact.write_history(history, files_of)
        trained = part.trained(model)
        dtype = torch.float16 if about.READS == "pixels" else torch.float32
        artifact.write_tensors(trained.state_dict(), files_of, dtype)
        # From what is on disk, so that a loaded adapter is what is tested here.
        artifact.load_tensors(trained, artifact.read_tensors(files_of), str(files_of))
        with torch.no_grad(), run.autocast(where):
            tensors = part.classifier(model, classes, chosen, True, progress)
        artifact.write_classifier(tensors, files_of)
        if target is not None:
            check_out(target, folder)  # again: somebody may have put something there meanwhile
    model.requires_grad_(False)
    logits = logits_of(method, model, clip, tensors, bf16)
    classifier = Classifier(names, logits, preprocess, where, config)
    report = test(classifier, split["test"], folder, progress)
    low, high = wilson(report["accuracy"] / 100, report["n"])
    return Adaptation(
        method=method,
        classes=names,
        shots=shots,
        seed=seed,
        n_train=len(split["train"]),
        n_val=len(split["val"]),
        n_test=report["n"],
        accuracy=report["accuracy"],
        interval=(100 * low, 100 * high),
        confusion=report["confusion"],
        seconds=seconds,
        path=target,
        classifier=classifier,
    )


def check_out(folder: Path, images: Path) -> None:
    """Raise ValueError where an artifact cannot be written into `folder`: it holds something else, or lies among
    the `images`, where it would be a class."""
    if folder.resolve().is_relative_to(images.resolve()):
        raise ValueError(f"{folder}: lies in the folder of the images; name another place (`out`, --out)")
    if folder.resolve() == Path.cwd() or os.path.ismount(folder):
        raise ValueError(f"{folder}: cannot be replaced as a whole; name a folder in it (`out`, --out)")
    if not folder.exists():
        return
    ours = {*artifact.FILES, artifact.HISTORY_FILE}
    if not folder.is_dir() or not {path.name for path in folder.iterdir()} <= ours:
        raise ValueError(
            f"{folder}: holds something else than an adapter; name another folder for it (`out`, --out)"
        )


def choose_settings(method: str, given: Mapping[str, Any], config: Mapping[str, Any]) -> Any:
    """The Settings of a method for a backbone of this `config` (`heba.clip.architecture`), with those that are
    `given`; ValueError names what is wrong with these."""
    about = methods.part(method, "settings")
    depth, width = architecture.depth(dict(config)), architecture.width(dict(config))
    values = dict(given)
    known = about.Settings.model_fields
    if unknown := [key for key in values if key not in known]:
        raise ValueError(f"{method} has no setting {', '.join(unknown)}; it has {', '.join(known)}")
    try:
        settings = about.Settings.model_validate(values)
        for _ in range(2):  # the first layer may lie behind the last one, when that is lower
            for key in set(about.problems(settings, depth, width)) - set(given):
                lower = [about.Settings.model_validate(values | {key: layer}) for layer in range(depth, 0, -1)]
                fitting = [s for s in lower if key not in about.problems(s, depth, width)]
                if fitting:
                    settings = fitting[0]
                    values[key] = getattr(settings, key)
    except ValidationError as error:
        raise ValueError(f"settings of {method}: {keys_and_reasons(error)}") from None
    problems = about.problems(settings, depth, width)
    if problems:
        raise ValueError(f"settings of {method}: {'; '.join(f'{key}: {text}' for key, text in problems.items())}")
    return settings


def backbone_record(name: str, pretrained: str, root: Path) -> artifact.Backbone:
    """The backbone as an artifact names it, with the hashes of its files."""
    file, own = backbones.weights_file(name, pretrained, root), root / name
    config = backbones.sha256(own) if own.is_file() else None
    return artifact.Backbone(name=name, pretrained=pretrained, sha256=backbones.sha256(file), config_sha256=config)


def read_folder(folder: Path, progress: Progress) -> Split:
    """The split of a folder, each of whose images is opened once.

    Images that show the same picture are on one side of it, but where the folder has a test part: then a warning
    names them. ValueError names images that cannot be read, are in two classes or, byte for byte, in training and
    test, and what there are no images for.
    """
    looks: dict[str, Look] = {}
    same: list[list[str]] = []

    def look(files: list[str]) -> tuple[list[str], list[list[str]]]:
        with progress(len(files), "read images") as done:
            looks.update(look_at(folder, files, done))
        same.extend(same_pictures(looks))
        return [], same

    split = read_own(folder, "folder", look_at=look).split
    names = class_names(split)
    if len(names) < 2:
        raise ValueError(f"{folder}: one class, {', '.join(names)}; two or more are needed, a folder each")
    for part in ("train", "test"):
        missing = sorted(set(names) - {name for _, _, name in split[part]})
        if missing:
            raise ValueError(f"{folder}: classes without {part} images: {_some(missing)}")
    broken = [file for file, found in looks.items() if found.problem]
    if broken:
        raise ValueError(
            f"{folder}: images that cannot be read, or have 16 bits of an unknown range: {_some(broken)}"
        )
    tested = {file for file, _, _ in split["test"]}
    by_bytes: dict[str, list[str]] = {}
    for file, found in looks.items():
        by_bytes.setdefault(found.digest, []).append(file)
    label = {file: label for items in split.values() for file, label, _ in items}
    conflicts = [" = ".join(files) for files in by_bytes.values() if len({label[file] for file in files}) > 1]
    if conflicts:
        raise ValueError(f"{folder}: the same image, byte for byte, in different classes: {_some(conflicts)}")
    leaks = [" = ".join(files) for files in by_bytes.values() if len({file in tested for file in files}) > 1]
    if leaks:
        raise ValueError(f"{folder}: test images that training has too, byte for byte; remove one: {_some(leaks)}")
    near = [" = ".join(files) for files in same if len({file in tested for file in files}) > 1]
    if near:
        logging.getLogger("heba").warning(
            "%s: test images that show the same picture as one that is trained on: %s", folder, _some(near)
        )
    return split


def _some(items: list[str]) -> str:
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(items[:SHOWN]) + more


def labelled(items: list[Item], folder: Path, clip: Any | None, run: Run, passes: int) -> LabelledImages:
    """The images `items` below `folder`; with `clip`, what its image tower makes of them and of `passes` crops."""
    files, labels = [file for file, _, _ in items], [label for _, label, _ in items]
    views = None
    if clip is not None:
        with run.progress(len(files), "views of few-shot images") as done:
            views = encode_views(clip, folder, files, run.seed, passes, CROP, True, done)
    return LabelledImages([folder / file for file in files], labels, views, as_seen=True)


def test(classifier: Classifier, items: list[Item], folder: Path, progress: Progress) -> dict[str, Any]:
    """The `classification_report` of a classifier on the images `items` below `folder`."""
    label = {name: i for i, name in enumerate(classifier.classes)}
    with progress(len(items), "test images") as done:
        found = list(classifier.predict([folder / file for file, _, _ in items], top=1, progress=done))
    broken = [prediction.error for prediction in found if prediction.error]
    if broken:
        raise ValueError(f"a test image changed during the training: {broken[0]}")
    predicted = torch.tensor([label[prediction.classes[0]] for prediction in found])
    return classification_report(predicted, torch.tensor([i for _, i, _ in items]), classifier.classes)
