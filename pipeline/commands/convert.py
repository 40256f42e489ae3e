"""`python -m pipeline convert`: official checkpoints to adapter folders that this project uses, and back."""

import math
from pathlib import Path
from typing import Any

import torch

from heba import artifact, methods
from heba.clip.features import Classes
from pipeline.core.params import Params
from pipeline.core.paths import new_folder
from pipeline.stages.backbone import computing, load_backbone, read_record, use_bf16
from pipeline.stages.precompute import read_classes
from pipeline.stages.train import labels_of, progress


def run(
    params: Params, source: Path, target: Path, dataset: str | None, all_classes: bool, scale: float | None
) -> Path:
    """Convert `source`, an official checkpoint or an adapter's folder, into the other; returns what was written.

    Args:
        dataset: that the official adapter was trained on, whose prompts the classifier is made of.
        all_classes: it was trained on all its classes, not on the base classes alone.
        scale: the scale of the official config; None: that of the checkpoint, which ours alone have.
    """
    if not source.exists():
        raise ValueError(f"{source} does not exist; give an official model.pth.tar-N, or an adapter's folder")
    if source.is_dir():
        if dataset is not None or all_classes or scale is not None:
            raise ValueError(
                "--dataset, --all-classes, --scale: are for a checkpoint; an adapter's folder tells them"
            )
        config = artifact.read_config(source)
        converter = methods.part(config.method, "convert")
        return converter.to_official(artifact.read_tensors(source), config.settings, target, source)
    if target.exists():
        raise ValueError(f"{target} exists already; name a new folder")
    if dataset is None:
        raise ValueError("--dataset: name the data set that the official adapter was trained on")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"--scale {scale}: must be finite")
    method = converted_method()
    protocol = "few_shot" if all_classes else "base_to_novel"
    tensors, settings = methods.part(method, "convert").from_official(source, scale)
    prompts = methods.part(method, "settings").Settings.model_validate(settings).prompts
    clip, tokenizer = load_backbone(params)
    classes = read_classes(dataset, prompts, tokenizer)
    classes = classes.select(labels_of(protocol, len(classes.names)))
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
    write(params, clip, target, config, classes, tensors)
    return target


def converted_method() -> str:
    """The method that has official checkpoints to convert."""
    return next(name for name in methods.names() if methods.has_part(name, "convert"))


def write(
    params: Params,
    clip: Any,
    target: Path,
    config: artifact.Config,
    classes: Classes,
    tensors: dict[str, torch.Tensor],
) -> None:
    """Write the folder of a method that was trained elsewhere, with the classifier of its classes."""
    part = methods.part(config.method, "method")
    with new_folder(target) as out:
        artifact.write_tensors(tensors, out, torch.float32)
        artifact.write_config(config, out)
        model, _ = artifact.load(clip, out)
        with computing(params):
            classifier = part.classifier(model, classes, config.method_settings(), True, progress)
        artifact.write_classifier(classifier, out)
