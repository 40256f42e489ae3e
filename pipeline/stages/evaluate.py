"""The stages `evaluate*`: HeBA against zero-shot CLIP on the test images.

Each writes a folder with a record per training and data set, as `pipeline.report` reads them.
"""

import json
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from heba.clip.features import class_features, encode_images, encode_prompts
from heba.clip.preprocess import preprocess_of
from heba.data.splits import base_labels
from heba.evaluation.metrics import harmonic_mean
from heba.evaluation.report import classification_report
from heba.methods.heba.model import AdaptedCLIP, load_adapter
from pipeline.core.params import Params
from pipeline.core.paths import OUT, TRANSFER_STAGES, evaluate_path, new_folder, train_folder
from pipeline.stages.backbone import device, load_backbone, use_bf16
from pipeline.stages.precompute import read_names, read_test, read_texts
from pipeline.stages.split import read_trainings
from pipeline.tracking import log as tracking
from pipeline.tracking.store import adapter_sha256


def run(params: Params, dataset: str) -> None:
    """Evaluate all trainings on `dataset`, for base_to_novel and few_shot, on its own test images."""
    jobs = [(protocol, dataset, seed, shots) for protocol, seed, shots in read_trainings(dataset)]
    _evaluate_all(params, jobs, OUT / "evaluate" / dataset)


def run_transfer(params: Params, protocol: str, seed: int) -> None:
    """Evaluate the source's training of `seed` on the test images of all targets or variants."""
    tests = params.transfer.targets if protocol == "cross_dataset" else params.transfer.variants
    jobs = [(protocol, dataset, seed, params.shots) for dataset in tests]
    _evaluate_all(params, jobs, OUT / TRANSFER_STAGES[protocol] / str(seed))


def _evaluate_all(params: Params, jobs: list[tuple[str, str, int, int]], folder: Path) -> None:
    clip = load_backbone(params)[0] if jobs else None
    records = [(evaluate(params, clip, *job), train_folder(*job)) for job in jobs]
    with new_folder(folder) as out:
        for job, (record, _) in zip(jobs, records, strict=True):
            text = json.dumps(record, ensure_ascii=False, indent=1) + "\n"
            (out / evaluate_path(*job).name).write_text(text, encoding="utf-8")
    if records:
        tracking.log_evaluations(records)


def evaluate(params: Params, clip: Any, protocol: str, dataset: str, seed: int, shots: int) -> dict[str, Any]:
    """The record of one training on the test images of `dataset`."""
    source = protocol in TRANSFER_STAGES
    adapter = params.transfer.adapter if source else params.adapter
    trained = train_folder(protocol, dataset, seed, shots)
    names = read_names(dataset)
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
    model, config = load_adapter(clip, trained)
    try:
        model.to(device(params)).eval()
        results = compare(model, dataset, names, groups, device(params), use_bf16(params))
    finally:
        model.detach()
    record: dict[str, Any] = {
        "protocol": protocol,
        "suite": params.suite,
        "dataset": dataset,
        "source": params.transfer.source if source else None,
        "seed": seed,
        "shots": config["shots"],
        "backbone": params.backbone.model_dump(),
        "adapter_sha256": adapter_sha256(trained),
        "scale_novel": novel_scale if protocol == "base_to_novel" else None,
        "groups": results,
    }
    if protocol == "base_to_novel":
        for method in ("zero_shot", "heba"):
            accuracy = {g: results[g][method]["accuracy"] for g in ("base", "novel")}
            record[f"{method}_harmonic_mean"] = harmonic_mean(accuracy["base"], accuracy["novel"])
    return record


def compare(
    model: AdaptedCLIP,
    dataset: str,
    names: list[str],
    groups: dict[str, tuple[range, float]],
    where: torch.device,
    bf16: bool,
) -> dict[str, Any]:
    """Zero-shot CLIP and the adapted model on the test images of each group of classes, among these classes.

    Args:
        names: of all the classes of `dataset`.
        groups: labels of the classes, and s, of each group; groups of equal s are encoded in one pass.
    """
    preprocess = preprocess_of(model.clip)
    texts, (packed, test) = read_texts(dataset), read_test(dataset, preprocess.size)
    images, prompts = torch.empty_like(test["features"]), torch.empty_like(texts["features"])
    image_label, prompt_label = test["labels"], texts["class_index"]
    for scale in sorted({scale for _, scale in groups.values()}):

        def image(batch: torch.Tensor, s: float = scale) -> torch.Tensor:
            with torch.autocast(where.type, torch.bfloat16, enabled=bf16):
                return model.encode_image(batch, s)

        def text(batch: torch.Tensor, s: float = scale) -> torch.Tensor:
            with torch.autocast(where.type, torch.bfloat16, enabled=bf16):
                return model.encode_text(batch, s)

        wanted = torch.tensor([label for labels, s in groups.values() if s == scale for label in labels])
        rows, which = torch.isin(image_label, wanted), torch.isin(prompt_label, wanted)
        some = None if rows.all() else rows.nonzero().flatten().numpy()
        with tqdm(total=int(rows.sum()), desc=f"test images of {dataset}", delay=2, unit="image") as bar:
            images[rows] = encode_images(packed, preprocess, image, where, some, progress=bar.update)
        with tqdm(total=int(which.sum()), desc=f"prompts of {dataset}", delay=2, unit="prompt") as bar:
            prompts[which] = encode_prompts(model.clip, texts["tokens"][which], text, where, progress=bar.update)
    results = {}
    for group, (labels, _) in groups.items():
        first, last = labels.start, labels.stop - 1
        rows, which = (
            (image_label >= first) & (image_label <= last),
            (prompt_label >= first) & (prompt_label <= last),
        )
        classifier = class_features(prompts[which], prompt_label[which] - first, len(labels))
        chosen, targets = names[first : last + 1], image_label[rows] - first
        zero_shot = texts["classifier"][first : last + 1]
        results[group] = {
            "n_images": len(targets),
            "classnames": chosen,
            "zero_shot": classification_report(test["features"][rows], zero_shot, targets, chosen),
            "heba": classification_report(images[rows], classifier, targets, chosen),
        }
    return results
