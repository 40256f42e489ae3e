"""`python -m pipeline convert`: official checkpoints to adapter folders that this project uses, and back."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from heba import artifact, methods
from heba.clip.towers import text_tower
from heba.fit import official
from pipeline.core.params import Params
from pipeline.core.paths import new_folder
from pipeline.stages.backbone import computing, load_backbone, read_record, use_bf16
from pipeline.stages.precompute import read_classes
from pipeline.stages.train import labels_of, progress


def run(
    params: Params,
    source: Path,
    target: Path,
    dataset: str | None,
    all_classes: bool,
    method: str | None,
    given: Mapping[str, Any],
) -> Path:
    """Convert `source`, an official checkpoint or an adapter's folder, into the other; returns what was written.

    Args:
        dataset: that the official checkpoint was trained on, whose names the classifier is made of.
        all_classes: it was trained on all its classes, not on the base classes alone.
        method: that the checkpoint is of; None: that whose tensors it has.
        given: settings of the official training that the checkpoint does not tell.
    """
    if not source.exists():
        raise ValueError(f"{source} does not exist; give an official model.pth.tar-N, or an adapter's folder")
    if source.is_dir():
        if dataset is not None or all_classes or method is not None or given:
            raise ValueError(
                "--dataset, --all-classes, --method, --set, --scale: are for a checkpoint; an adapter's folder "
                "tells them"
            )
        config = artifact.read_config(source)
        converter = methods.part(config.method, "convert")
        tensors = artifact.read_tensors(source)
        return converter.to_official(tensors, config.method_settings(), config.shots, target, source)
    if target.exists():
        raise ValueError(f"{target} exists already; name a new folder")
    if dataset is None:
        raise ValueError("--dataset: name the data set that the official adapter was trained on")
    if not math.isfinite(given.get("scale", 0.0)):
        raise ValueError(f"--scale {given['scale']}: must be finite")
    checkpoint = official.read(source)
    method = method_of(checkpoint, method)
    tensors, settings = methods.part(method, "convert").from_official(checkpoint, given)
    write(params, target, checkpoint, method, tensors, settings, dataset, all_classes)
    return target


def method_of(checkpoint: official.Checkpoint, named: str | None) -> str:
    """The method of a checkpoint: the `named` one, or the one that its tensors fit; ValueError lists several."""
    known = [name for name in methods.names() if methods.has_part(name, "convert")]
    if named is not None:
        if named not in known:
            raise ValueError(f"--method {named}: has no checkpoints to convert; these have: {', '.join(known)}")
        return named
    fitting = [name for name in known if methods.part(name, "convert").fits(checkpoint.tensors)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise ValueError(
            f"{checkpoint.path}: its tensors fit {', '.join(fitting)}, which share them; name one: --method "
            f"{fitting[0]}"
        )
    found = ", ".join(sorted(checkpoint.tensors)[:5]) or "none"
    raise ValueError(
        f"{checkpoint.path}: its tensors ({found}) are not those of a method here; known are {', '.join(known)}"
    )


def write(
    params: Params,
    target: Path,
    checkpoint: official.Checkpoint,
    method: str,
    tensors: dict[str, torch.Tensor],
    settings: dict[str, Any],
    dataset: str,
    all_classes: bool,
) -> None:
    """Write the folder of a method that was trained elsewhere, with the classifier of the data set's classes."""
    protocol = "few_shot" if all_classes else "base_to_novel"
    part, converter = methods.part(method, "method"), methods.part(method, "convert")
    own = methods.part(method, "settings").Settings.model_validate(settings)
    clip, tokenizer = load_backbone(params)
    classes = read_classes(dataset, own.prompts, tokenizer)
    classes = classes.select(labels_of(protocol, len(classes.names)))
    model = part.build(clip, len(classes.names), own, seed=0)
    artifact.load_tensors(part.trained(model), tensors, str(checkpoint.path))
    texts = converter.texts_of(model, classes, own)
    if texts is not None:
        official.check_texts(checkpoint, texts, text_tower(clip).context_length)
    config = artifact.Config(
        method=method,
        settings=settings,
        class_names=classes.names,
        backbone=artifact.Backbone(**read_record()),
        protocol=protocol,
        dataset=dataset,
        suite=params.suite,
        bf16=use_bf16(params),
    )
    with new_folder(target) as out:
        artifact.write_tensors(tensors, out, torch.float32)
        artifact.write_config(config, out)
        with computing(params):
            classifier = part.classifier(model, classes, own, True, progress)
        artifact.write_classifier(classifier, out)
