"""Stages `train`, `train-source` and `train-few`: the adapters of one data set and seed.

out/train/<dataset>/<protocol>-<seed>/   adapter.safetensors, classifier.safetensors, config.json,
                                         history.csv (epoch, loss, lr)
"""

import csv
import hashlib
import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from safetensors.torch import load_file
from tqdm import tqdm

from heba.clip.features import class_features, encode_prompts
from heba.clip.preprocess import decode
from heba.clip.towers import text_lengths
from heba.data.images import for_each_image
from heba.data.splits import base_labels, class_names, read_split, select_classes
from heba.methods.heba.adapters import Variant
from heba.methods.heba.model import ADAPTER_FILE, AdaptedCLIP, load_adapter_tensors, save_adapter
from heba.methods.heba.training import Settings, TextBank, steps_per_epoch, train
from heba.predict import save_classifier
from pipeline.core.params import Params, ParamsError, stage_of
from pipeline.core.paths import main_root, new_folder, reading, temporary_name, train_folder, writable
from pipeline.stages.backbone import be_deterministic, device, load_backbone, read_record, use_bf16
from pipeline.stages.download import manifest_path, verified_folder
from pipeline.stages.precompute import folder_of, read_texts
from pipeline.stages.split import split_path
from pipeline.tracking import log as tracking


def text_bank(clip: Any, dataset: str, n_classes: int, start: int, where: torch.device) -> TextBank:
    """The prompts of the first `n_classes` classes, with their precomputed states below `start`."""
    tensors = read_texts(dataset)
    counts = torch.bincount(tensors["class_index"])[:n_classes]
    n = int(counts.sum())
    tokens = tensors["tokens"][:n]
    return TextBank(
        tokens=tokens.to(where),
        lengths=text_lengths(clip, tokens),
        offsets=[0, *counts.cumsum(0).tolist()],
        hidden=tensors[f"hidden.{start}"][:n].to(where) if start > 1 else None,
    )


def classifier(model: AdaptedCLIP, bank: TextBank, bf16: bool) -> torch.Tensor:
    """The classifier [n_classes, E] of the training's own classes, from all their prompts."""
    where = bank.tokens.device

    def encode(tokens: torch.Tensor) -> torch.Tensor:
        with torch.autocast(where.type, torch.bfloat16, enabled=bf16):
            return model.encode_text(tokens)

    with tqdm(total=len(bank.tokens), desc="classifier", delay=2, unit="prompt") as bar:
        features = encode_prompts(model.clip, bank.tokens.cpu(), encode, where, progress=bar.update)
    counts = torch.tensor(bank.offsets).diff()
    return class_features(features, torch.arange(bank.n_classes).repeat_interleave(counts), bank.n_classes)


def checkpoint_path(inputs: dict[str, Any], files: list[Path]) -> Path:
    """Where the epochs of this training are kept: under the main repository, by a hash of all its inputs.

    DVC deletes a stage's outs before it runs, so a killed training can only resume from elsewhere.
    """
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode())
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return main_root() / ".heba" / "checkpoints" / f"{digest.hexdigest()[:32]}.safetensors"


def refuse_too_large(files: list[Path]) -> None:
    """ParamsError where the training images do not fit into the memory that is free: they are held as they are,
    for the crops of all epochs."""
    needed = 0
    for file in files:
        with suppress(OSError), Image.open(file) as image:  # reads its head only; a damaged one is named later
            needed += 3 * image.width * image.height
    free = psutil.virtual_memory().available
    if needed > free:
        raise ParamsError(
            f"{len(files)} training images take {needed / 1e9:.1f} GB of memory, of which {free / 1e9:.1f} GB are "
            "free: scale them down, to a shorter side of some 500 pixels, or take fewer shots"
        )


def refuse_others(params: Params, dataset: str, seed: int, source: bool, shots: int | None) -> None:
    """ParamsError for a training that params.yaml does not have: no stage would evaluate it as what it is."""
    few = params.few_shot
    seeds = params.transfer.seeds if source else few.seeds if shots else params.seeds
    if source and dataset != params.transfer.source:
        raise ParamsError(f"--source: transfer.source of params.yaml is {params.transfer.source}, not {dataset}")
    if shots and (dataset not in few.datasets or shots not in few.shots):
        raise ParamsError(f"--shots {shots}: few_shot of params.yaml has no training on {dataset} with so many")
    if seed not in seeds:
        section = "transfer.seeds" if source else "few_shot.seeds" if shots else "seeds"
        raise ParamsError(f"--seed {seed}: not in {section} of params.yaml, which are {seeds}")


def run(params: Params, dataset: str, seed: int, source: bool, shots: int | None = None) -> None:
    """Train on the base classes of `dataset`; with `source` on all classes for the transfer protocols, with
    `shots` on all classes for few_shot."""
    adapter, settings = (
        (params.transfer.adapter, params.transfer.train) if source else (params.adapter, params.train)
    )
    refuse_others(params, dataset, seed, source, shots)
    images_folder = verified_folder(params, dataset) / "images"
    sample = split_path(dataset, shots or params.shots, seed)
    with reading(sample, stage_of("split", dataset)):
        split = read_split(sample)
    names = class_names(split)
    labels = range(len(names)) if source or shots else base_labels(len(names))
    train_items = select_classes(split, labels)["train"]
    where = device(params)
    if params.cuda_graphs and where.type != "cuda":
        raise ParamsError(f"cuda_graphs: needs a GPU, and this training runs on {where.type}; set it to false")
    if params.deterministic:
        be_deterministic()
    clip, _ = load_backbone(params)
    # The initialisation must not depend on what drew random numbers before.
    torch.manual_seed(seed)
    variant = Variant.of(adapter.model_dump())
    model = AdaptedCLIP(clip, adapter.start, adapter.end, adapter.scale, adapter.ratio, variant=variant).to(where)
    bank = text_bank(clip, dataset, len(labels), adapter.start, where)
    refuse_too_large([images_folder / file for file, _, _ in train_items])
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
        "backbone": read_record(),
        "adapter": adapter.model_dump(exclude={"scale_novel"}),
        "train": settings.model_dump(),
        "bf16": use_bf16(params),
        "threads": params.threads,
        "cuda_graphs": params.cuda_graphs,
        "deterministic": params.deterministic,
    }
    checkpoint = checkpoint_path(inputs, [manifest_path(dataset), sample, folder_of(dataset) / "text.safetensors"])
    inputs["inputs_sha256"] = checkpoint.stem
    protocol = "cross_dataset" if source else "few_shot" if shots else "base_to_novel"
    out_folder = train_folder(protocol, dataset, seed, shots or params.shots)
    if len(images) < settings.batch_size:
        print(f"{dataset}: {len(images)} images, less than train.batch_size: one batch of all", file=sys.stderr)
    temporary_name(checkpoint)  # removes what a killed training has left of one
    if checkpoint.exists():
        print(f"resuming from {checkpoint}", file=sys.stderr)
    tracker = tracking.start_training(inputs)
    schedule = Settings(
        **settings.model_dump(), scale_factor=adapter.scale_factor, slow_ratio=adapter.slow_ratio, seed=seed
    )
    steps = settings.epochs * steps_per_epoch(len(images), schedule)
    try:
        with (
            tqdm(total=steps, desc=f"train {dataset} seed {seed}", delay=2, mininterval=2, unit="step") as bar,
            writable(checkpoint),
        ):
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
            # From the adapter as it is on disk, so that a loaded one names images as it was evaluated.
            load_adapter_tensors(model, {k: v.float() for k, v in load_file(out / ADAPTER_FILE).items()}, "")
            save_classifier(classifier(model, bank, use_bf16(params)), out)
            with (out / "history.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, history[0], lineterminator="\n")
                writer.writeheader()
                writer.writerows(history)
    except BaseException:
        tracker.fail()
        raise
    checkpoint.unlink(missing_ok=True)
    tracker.finish(out_folder)
