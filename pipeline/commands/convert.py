"""`python -m pipeline convert`: official checkpoints to adapter folders that this project uses, and back."""

import math
from pathlib import Path

from heba.data.splits import base_labels
from heba.methods.heba.convert import from_official, to_official
from heba.methods.heba.model import load_adapter
from heba.predict import read_config, save_classifier
from pipeline.core.params import Params
from pipeline.core.paths import new_folder
from pipeline.stages.backbone import device, load_backbone, read_record, use_bf16
from pipeline.stages.precompute import read_names
from pipeline.stages.train import classifier, text_bank


def run(
    params: Params, source: Path, target: Path, dataset: str | None, all_classes: bool, scale: float | None
) -> Path:
    """Convert `source`, an official checkpoint or an adapter's folder, into the other; returns what was written.

    Args:
        dataset: that the official adapter was trained on, whose prompts the classifier is made of.
        all_classes: it was trained on all its classes, not on the base classes alone.
        scale: ADAPTER_SCALE_BASE of the official config; None: that of the checkpoint, which ours alone have.
    """
    if not source.exists():
        raise ValueError(f"{source} does not exist; give an official model.pth.tar-N, or an adapter's folder")
    if source.is_dir():
        if dataset is not None or all_classes or scale is not None:
            raise ValueError(
                "--dataset, --all-classes, --scale: are for a checkpoint; an adapter's folder tells them"
            )
        config = read_config(source)
        return to_official(source, target, config.get("epoch") or config["train"]["epochs"], config["scale"])
    if target.exists():
        raise ValueError(f"{target} exists already; name a new folder")
    if dataset is None:
        raise ValueError("--dataset: name the data set that the official adapter was trained on")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"--scale {scale}: must be finite")
    names = read_names(dataset)
    labels = range(len(names)) if all_classes else base_labels(len(names))
    config = {
        "backbone": read_record(),
        "bf16": use_bf16(params),
        "class_names": [names[i] for i in labels],
        "dataset": dataset,
        "protocol": "few_shot" if all_classes else "base_to_novel",
        "suite": params.suite,
    }
    clip, _ = load_backbone(params)
    where = device(params)
    with new_folder(target) as out:
        from_official(source, out, scale, config)
        model, _ = load_adapter(clip, out)
        bank = text_bank(clip, dataset, len(labels), 1, where)
        save_classifier(classifier(model.to(where).eval(), bank, use_bf16(params)), out)
    return target
