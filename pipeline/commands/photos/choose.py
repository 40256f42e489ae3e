"""Settings of a method that reads pixels, chosen on the validation images of a split before it is trained for the
table.

Each combination is trained on the split's few-shot sample. The test images are not looked at.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from heba import methods
from heba.clip.features import BATCH_SIZE
from heba.clip.preprocess import decode, normalise, preprocess_of, resize_and_crop
from heba.data.datasets import as_seen
from heba.data.images import Images, LabelledImages, for_each_image
from heba.data.splits import Split, class_names
from heba.fit.run import Run, silent
from heba.fit.search import accuracy, first_best
from pipeline.core.params import Params
from pipeline.core.paths import new_file
from pipeline.core.trainings import Training
from pipeline.stages.backbone import computing
from pipeline.stages.download import verified_folder
from pipeline.stages.precompute import read_classes
from pipeline.stages.split import read_sample
from pipeline.stages.train import checkpoint_path, config_of, labelled, load, progress

KNOWN = Path("chosen.json")  # of each training that was tried, by the hash of its inputs, the accuracy on val


class Choice(NamedTuple):
    """What was tried on a split: settings and their share of `n` validation images; and which were the best."""

    tried: list[tuple[dict[str, Any], float]]
    best: dict[str, Any]
    n: int


def one_by_one(
    grid: dict[str, list[Any]], score: Callable[[dict[str, Any]], float]
) -> tuple[list[tuple[dict[str, Any], float]], dict[str, Any]]:
    """All settings that were tried, with their scores, and the best: of each setting in turn the first best value,
    the others as they are by then, or their first value."""
    tried: list[tuple[dict[str, Any], float]] = []
    best = {name: values[0] for name, values in grid.items()}
    for name, values in grid.items():
        candidates = [best | {name: value} for value in values]
        for settings in candidates:
            if settings not in [known for known, _ in tried]:
                tried.append((settings, score(settings)))
        best = first_best(candidates, lambda settings: next(s for known, s in tried if known == settings))
    return tried, best


def search(
    params: Params, method: str, datasets: list[str], shots: int, seed: int, grid: dict[str, list[Any]]
) -> dict[str, Choice]:
    """By data set, which of the settings of `grid` are the best on its validation images.

    A data set of which a class has no validation image is left out. What an earlier call tried is not tried again.
    """
    known: dict[str, float] = json.loads(KNOWN.read_text(encoding="utf-8")) if KNOWN.is_file() else {}
    found, backbone = {}, None
    samples = {name: read_sample(name, shots, seed) for name in datasets}
    able = [name for name in datasets if has_val(samples[name])]
    n = 1 + sum(len(values) - 1 for values in grid.values())
    with tqdm(total=len(able) * n, desc=f"settings of {method}", delay=2, unit="training") as bar:
        for dataset in able:

            def score(settings: dict[str, Any], dataset: str = dataset) -> float:
                nonlocal backbone
                trial = with_settings(params, method, {dataset: settings})
                training = Training("few_shot", dataset, method, shots, seed)
                digest = config_of(trial, training).inputs_sha256 or ""
                if digest not in known:
                    backbone = backbone or load(params)
                    known[digest] = share(trial, *backbone, training)
                    with new_file(KNOWN) as path:
                        path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
                bar.update(1)
                return known[digest]

            tried, best = one_by_one(grid, score)
            found[dataset] = Choice(tried, best, len(samples[dataset]["val"]))
    return found


def sentences(choices: dict[str, dict[str, Choice]]) -> list[str]:
    """What was chosen, by the title of the method and split, and among what, on how many validation images."""
    lines = []
    for title, found in choices.items():
        for split, choice in found.items():
            tried = "; ".join(f"{words(s)}: {100 * share:.1f} %" for s, share in choice.tried)
            lines.append(
                f"{title}, {split}: {words(choice.best)}, the best on {choice.n} validation images ({tried})."
            )
    return lines


def words(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def has_val(sample: Split) -> bool:
    """Whether each class has validation images."""
    return {label for _, label, _ in sample["val"]} == set(range(len(class_names(sample))))


def with_settings(params: Params, method: str, settings: dict[str, dict[str, Any]]) -> Params:
    """`params` with `settings` of a method by data set."""
    block = params.blocks[method]
    block = block | {"overrides": block.get("overrides", {}) | settings}
    return params.model_copy(update={"blocks": params.blocks | {method: block}})


def share(params: Params, clip: Any, tokenizer: Any, training: Training) -> float:
    """Train, and give the share of the validation images that are then right."""
    method, config = methods.part(training.method, "method"), config_of(params, training)
    settings, labels = config.method_settings(), range(len(config.class_names))
    sample = read_sample(training.dataset, training.shots, training.seed)
    images = verified_folder(params, training.dataset) / "images"
    seen = as_seen(training.dataset)
    classes = read_classes(training.dataset, settings.prompts, tokenizer)
    train, val = (labelled(sample, part, images, labels, None, seen) for part in ("train", "val"))
    checkpoint = checkpoint_path(config)
    shown = progress if sys.stderr.isatty() else silent  # a line of a log every two seconds is too much
    run = Run(training.seed, training.shots, config.bf16, params.cuda_graphs, checkpoint, progress=shown)
    model = method.build(clip, len(labels), settings, training.seed)
    try:
        method.fit(model, train, val, classes, settings, run)
        with computing(params):
            classifier = method.classifier(model, classes, settings, True)
            found = accuracy(logits_of(training.method, model, clip, classifier, val), torch.tensor(val.labels))
    finally:
        method.detach(model)
    checkpoint.unlink(missing_ok=True)
    return found


def logits_of(method: str, model: Any, clip: Any, classifier: dict[str, torch.Tensor], val: LabelledImages) -> Any:
    """[n, classes], on the CPU."""
    where, preprocess = clip.logit_scale.device, preprocess_of(clip)
    part = methods.part(method, "method")
    classifier = {name: tensor.to(where) for name, tensor in classifier.items()}

    def pixels(path: Path) -> torch.Tensor:
        return torch.from_numpy(resize_and_crop(decode(path, val.as_seen), preprocess).copy())

    found, size = [], BATCH_SIZE.get(where.type, 256)
    for start in range(0, len(val.files), size):
        batch = torch.stack(list(for_each_image(pixels, val.files[start : start + size]))).to(where)
        images = Images.of_pixels(normalise(batch, preprocess))
        found.append(part.logits(model, classifier, images).float().cpu())
    return torch.cat(found)
