"""The stages `evaluate*`: HeBA against zero-shot CLIP on the test images.

Writes out/<stage>/<dataset>-<seed>.json, one record as `pipeline.report` reads it.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from heba.evaluation import classification_report, encode_images, harmonic_mean
from heba.model import AdaptedCLIP, class_features, load_adapter
from heba.splits import base_labels
from pipeline import tracking
from pipeline.backbone import device, load_backbone, use_bf16
from pipeline.params import Params
from pipeline.paths import evaluate_path, new_file
from pipeline.precompute import folder_of
from pipeline.train import adapter_sha256, train_folder


def run(params: Params, dataset: str, seed: int, protocol: str, shots: int | None = None) -> None:
    """Evaluate the training of `dataset`, or of the source in transfer, on `dataset`'s test images."""
    source = protocol in ("cross_dataset", "domain_generalization")
    adapter = params.transfer.adapter if source else params.adapter
    trained = train_folder(dataset, seed, source, shots)
    data = folder_of(dataset)
    names = json.loads((data / "prompts.json").read_text(encoding="utf-8"))["class_names"]
    clip, _ = load_backbone(params)
    model, config = load_adapter(clip, trained)
    model.to(device(params)).eval()
    novel_scale = adapter.scale if adapter.scale_novel is None else adapter.scale_novel
    if protocol != "base_to_novel":
        # In transfer the target's classes are new to the model, but the protocol has no scale of its own for them.
        groups = {"all": (range(len(names)), adapter.scale)}
    else:
        n_base = len(base_labels(len(names)))
        groups = {
            "base": (range(n_base), adapter.scale),
            "novel": (range(n_base, len(names)), novel_scale),
        }
    record: dict[str, Any] = {
        "protocol": protocol,
        "suite": params.suite,
        "dataset": dataset,
        "source": params.transfer.source if source else None,
        "seed": seed,
        "shots": config["shots"],
        "adapter_sha256": adapter_sha256(trained),
        "scale_novel": novel_scale if protocol == "base_to_novel" else None,
        "groups": {
            group: compare(params, model, data, list(labels), names, scale)
            for group, (labels, scale) in groups.items()
        },
    }
    if protocol == "base_to_novel":
        for method in ("zero_shot", "heba"):
            accuracy = {g: record["groups"][g][method]["accuracy"] for g in ("base", "novel")}
            record[f"{method}_harmonic_mean"] = harmonic_mean(accuracy["base"], accuracy["novel"])
    out = evaluate_path(protocol, dataset, seed, shots)
    with new_file(out) as path:
        path.write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    tracking.log_evaluation(record, trained)


@torch.no_grad()
def compare(
    params: Params, model: AdaptedCLIP, data: Path, labels: list[int], names: list[str], scale: float
) -> dict[str, Any]:
    """Zero-shot CLIP and the adapted model on the test images of the classes `labels`, among these classes."""
    texts = load_file(data / "text.safetensors")
    test = load_file(data / "test.safetensors")
    where = device(params)
    new_label = torch.full((len(names),), -1)
    new_label[labels] = torch.arange(len(labels))
    rows = (new_label[test["labels"]] >= 0).nonzero().flatten()
    prompts = (new_label[texts["class_index"]] >= 0).nonzero().flatten()
    packed = np.load(data / "images.npy", mmap_mode="r")[rows.numpy()]

    def encode(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(where.type, torch.bfloat16, enabled=use_bf16(params)):
            return model.encode_image(images, scale)

    features = []
    for chunk in prompts.split(256):
        with torch.autocast(where.type, torch.bfloat16, enabled=use_bf16(params)):
            features.append(model.encode_text(texts["tokens"][chunk].to(where), scale).float().cpu())
    classifier = class_features(torch.cat(features), new_label[texts["class_index"][prompts]], len(labels))
    chosen = [names[i] for i in labels]
    targets = new_label[test["labels"][rows]]
    return {
        "n_images": len(rows),
        "classnames": chosen,
        "zero_shot": classification_report(test["features"][rows], texts["classifier"][labels], targets, chosen),
        "heba": classification_report(encode_images(packed, encode, where), classifier, targets, chosen),
    }
