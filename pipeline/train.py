"""Stages `train`, `train-source` and `train-few`: the adapters of one data set and seed.

out/train/<dataset>/<protocol>-<seed>/   adapter.safetensors, config.json, history.csv (epoch, loss, lr)
"""

import csv
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tqdm import tqdm

from heba.images import decode, for_each_image
from heba.model import AdaptedCLIP, save_adapter
from heba.splits import base_labels, class_names, read_split, select_classes
from heba.training import Settings, TextBank, steps_per_epoch, train
from pipeline import tracking
from pipeline.backbone import device, load_backbone, use_bf16
from pipeline.download import verified_folder
from pipeline.params import Params, ParamsError
from pipeline.paths import main_root, new_folder, train_folder
from pipeline.precompute import folder_of
from pipeline.split import split_path


def text_bank(dataset: str, n_classes: int, start: int, where: torch.device) -> TextBank:
    """The prompts of the first `n_classes` classes, with their precomputed states below `start`."""
    tensors = load_file(folder_of(dataset) / "text.safetensors")
    counts = torch.bincount(tensors["class_index"])[:n_classes]
    n = int(counts.sum())
    tokens = tensors["tokens"][:n]
    return TextBank(
        tokens=tokens.to(where),
        lengths=(tokens.argmax(dim=-1) + 1).tolist(),
        offsets=[0, *counts.cumsum(0).tolist()],
        hidden=tensors[f"hidden.{start}"][:n].to(where) if start > 1 else None,
    )


def checkpoint_path(inputs: dict[str, Any], files: list[Path]) -> Path:
    """Where the epochs of this training are kept: under the main repository, by a hash of all its inputs.

    DVC deletes a stage's outs before it runs, so a killed training can only resume from elsewhere.
    """
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode())
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return main_root() / ".heba" / "checkpoints" / f"{digest.hexdigest()[:32]}.safetensors"


def run(params: Params, dataset: str, seed: int, source: bool, shots: int | None = None) -> None:
    """Train on the base classes of `dataset`; with `source` on all classes for the transfer protocols, with
    `shots` on all classes for few_shot."""
    adapter, settings = (
        (params.transfer.adapter, params.transfer.train) if source else (params.adapter, params.train)
    )
    images_folder = verified_folder(params, dataset) / "images"
    sample = split_path(dataset, shots or params.shots, seed)
    split = read_split(sample)
    names = class_names(split)
    labels = range(len(names)) if source or shots else base_labels(len(names))
    train_items = select_classes(split, labels)["train"]
    where = device(params)
    if params.cuda_graphs and where.type != "cuda":
        raise ParamsError(f"cuda_graphs: needs a GPU, and this training runs on {where.type}; set it to false")
    clip, _ = load_backbone(params)
    # The initialisation must not depend on what drew random numbers before.
    torch.manual_seed(seed)
    model = AdaptedCLIP(clip, adapter.start, adapter.end, adapter.scale, adapter.ratio).to(where)
    bank = text_bank(dataset, len(labels), adapter.start, where)
    pixels = for_each_image(
        lambda path: torch.from_numpy(np.array(decode(path)).transpose(2, 0, 1)),
        [images_folder / file for file, _, _ in train_items],
    )
    images = list(tqdm(pixels, total=len(train_items), desc="decode training images", delay=2, unit="image"))
    inputs = {
        "dataset": dataset,
        "seed": seed,
        "shots": shots or params.shots,
        "suite": params.suite,
        "protocol": "transfer" if source else "few_shot" if shots else "base_to_novel",
        "backbone": params.backbone.model_dump(),
        "adapter": adapter.model_dump(exclude={"scale_novel"}),
        "train": settings.model_dump(),
        "bf16": use_bf16(params),
        "threads": params.threads,
        "cuda_graphs": params.cuda_graphs,
    }
    checkpoint = checkpoint_path(inputs, [sample, folder_of(dataset) / "text.safetensors"])
    protocol = "cross_dataset" if source else "few_shot" if shots else "base_to_novel"
    out_folder = train_folder(protocol, dataset, seed, shots or params.shots)
    if len(images) < settings.batch_size:
        print(f"{dataset}: {len(images)} images, less than train.batch_size: one batch of all", file=sys.stderr)
    if checkpoint.exists():
        print(f"resuming from {checkpoint}", file=sys.stderr)
    tracker = tracking.start_training(inputs)
    schedule = Settings(
        **settings.model_dump(), scale_factor=adapter.scale_factor, slow_ratio=adapter.slow_ratio, seed=seed
    )
    steps = settings.epochs * steps_per_epoch(len(images), schedule)
    try:
        with tqdm(total=steps, desc=f"train {dataset} seed {seed}", delay=2, mininterval=2, unit="step") as bar:
            history = train(
                model,
                images,
                [label for _, label, _ in train_items],
                bank,
                schedule,
                bf16=use_bf16(params),
                cuda_graphs=params.cuda_graphs,
                checkpoint=checkpoint,
                on_epoch=tracker.epoch,
                progress=bar.update,
            )
        config = inputs | {"class_names": [names[i] for i in labels]}
        with new_folder(out_folder) as out:
            dtype = torch.float16 if params.adapter_dtype == "fp16" else torch.float32
            save_adapter(model, out, config, dtype)
            with (out / "history.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, history[0], lineterminator="\n")
                writer.writeheader()
                writer.writerows(history)
    except BaseException:
        tracker.fail()
        raise
    checkpoint.unlink(missing_ok=True)
    tracker.finish(out_folder)
