"""`python -m pipeline convert`: official checkpoints to adapter folders that this project uses, and back."""

import json
from pathlib import Path

from heba.convert import from_official, to_official
from heba.model import load_adapter
from heba.predict import read_config, save_classifier
from heba.splits import base_labels
from pipeline.backbone import RECORD, device, load_backbone, use_bf16
from pipeline.params import Params
from pipeline.paths import new_folder
from pipeline.precompute import folder_of
from pipeline.train import classifier, text_bank


def run(
    params: Params, source: Path, target: Path, dataset: str | None, all_classes: bool, scale: float | None
) -> Path:
    """Convert `source`, an official checkpoint or an adapter's folder, into the other; returns what was written.

    Args:
        dataset: that the official adapter was trained on, whose prompts the classifier is made of.
        all_classes: it was trained on all its classes, not on the base classes alone.
        scale: ADAPTER_SCALE_BASE of the official config; None: adapter.scale of params.yaml.
    """
    if not source.exists():
        raise ValueError(f"{source} does not exist; give an official model.pth.tar-N, or an adapter's folder")
    if source.is_dir():
        config = read_config(source)
        return to_official(source, target, config.get("epoch") or config["train"]["epochs"])
    if target.exists():
        raise ValueError(f"{target} exists already; name a new folder")
    if dataset is None:
        raise ValueError("--dataset: name the data set that the official adapter was trained on")
    prompts = folder_of(dataset) / "prompts.json"
    if not prompts.is_file():
        raise ValueError(f"{prompts} is missing; run `dvc repro precompute@{dataset}` first")
    names = json.loads(prompts.read_text(encoding="utf-8"))["class_names"]
    labels = range(len(names)) if all_classes else base_labels(len(names))
    config = {
        "backbone": json.loads(RECORD.read_text(encoding="utf-8")),
        "bf16": use_bf16(params),
        "class_names": [names[i] for i in labels],
        "dataset": dataset,
        "protocol": "few_shot" if all_classes else "base_to_novel",
        "suite": params.suite,
    }
    clip, _ = load_backbone(params)
    where = device(params)
    with new_folder(target) as out:
        from_official(source, out, params.adapter.scale if scale is None else scale, config)
        model, _ = load_adapter(clip, out)
        bank = text_bank(clip, dataset, len(labels), 1, where)
        save_classifier(classifier(model.to(where).eval(), bank, use_bf16(params)), out)
    return target
