"""`python -m pipeline cost`: an estimate of the compute and disk that params.yaml needs on the real benchmarks;
own data is not counted.

The operations of one image and of one prompt, forward and in training, are counted by torch while our own model
runs on one of each. Everything else is products of counts in params.yaml and the catalogue:

    step      = (batch * image_train + prompts per step * text_train) / throughput + overhead
    training  = epochs * steps per epoch * step
    test pass = (test images * image + 20 prompts per class * text) / throughput, once per training and test set,
                and without adapters once per data set for zero-shot CLIP
"""

from typing import Any, NamedTuple

import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from heba.clip.architecture import read_config
from heba.clip.backbone import build
from heba.clip.preprocess import preprocess_of
from heba.clip.towers import eos_id, pool_type, text_tower
from heba.data.splits import base_labels
from heba.methods.heba.adapters import Variant
from heba.methods.heba.model import AdaptedCLIP
from heba.sources.catalog import Benchmark, load_catalog
from pipeline.core.params import Adapter, Params, ParamsError, Train
from pipeline.core.paths import main_root

PROMPTS_PER_CLASS = 20


class Flops(NamedTuple):
    """Operations of one image and one prompt: in a test pass, and with the backward in a training step."""

    image: int
    text: int
    image_train: int
    text_train: int


def count_flops(model: AdaptedCLIP, text_length: int) -> Flops:
    """Run `model` on one image and one prompt of `text_length` tokens and count."""
    text = text_tower(model.clip)
    size = preprocess_of(model.clip).size
    tokens = torch.zeros(1, text.context_length, dtype=torch.long)
    last = text.token_embedding.num_embeddings - 1
    tokens[0, text_length - 1] = eos_id(text) if pool_type(text) == "eos" else last
    image = torch.zeros(1, 3, size, size)

    def count(encode: Any, value: torch.Tensor, train: bool) -> int:
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(train):
            features = encode(value, model.scale)
            if train and features.requires_grad:  # not where adapter.towers leaves this tower plain
                features.sum().backward()
        return int(counter.get_total_flops())

    return Flops(
        count(model.encode_image, image, False),
        count(model.encode_text, tokens, False),
        count(model.encode_image, image, True),
        count(model.encode_text, tokens, True),
    )


def training_steps(n_images: int, train: Train) -> int:
    return train.epochs * max(1, n_images // train.batch_size)


def prompts_per_step(n_classes: int, train: Train) -> int:
    """At most: each image of a batch may be of another class."""
    return n_classes if train.neg_ratio == 0 else min(n_classes, train.batch_size * (1 + train.neg_ratio))


def table(params: Params, tflops: float, overhead_ms: float, text_length: int) -> pd.DataFrame:
    """A row per protocol, and one of what they share, zero-shot CLIP: trainings, hours of training and of test
    passes, GB of adapters."""
    if params.suite != "real" or params.backbone.name == "tiny":
        raise ParamsError("suite: cost is for the real benchmarks; try it after `python -m pipeline preset paper`")
    catalog = load_catalog()
    clip = build(read_config(params.backbone.name, main_root()))
    rows: dict[str, dict[str, float]] = {}
    counted: dict[str, tuple[Flops, int]] = {}  # by adapter: operations, and the adapters' parameters
    per_second = tflops * 1e12

    def hours(tests: list[Benchmark], flops: Flops) -> float:
        """Of one test pass over each of `tests`."""
        tested = sum(b.counts.test * flops.image + PROMPTS_PER_CLASS * b.classes * flops.text for b in tests)
        return tested / per_second / 3600

    def add(
        protocol: str,
        adapter: Adapter,
        train: Train,
        trainings: list[tuple[int, int]],
        tests: list[Benchmark],
    ) -> None:
        """`trainings`: (classes, shots) of each; `tests`: the data set of each test pass."""
        key = adapter.model_dump_json()
        if key not in counted:
            variant = Variant.of(adapter.model_dump())
            model = AdaptedCLIP(clip, adapter.start, adapter.end, adapter.scale, adapter.ratio, variant=variant)
            counted[key] = count_flops(model, text_length), sum(p.numel() for p in model.adapters.parameters())
            model.detach()
        flops, parameters = counted[key]
        seconds = sum(
            training_steps(classes * shots, train)
            * (
                (train.batch_size * flops.image_train + prompts_per_step(classes, train) * flops.text_train)
                / per_second
                + overhead_ms / 1e3
            )
            for classes, shots in trainings
        )
        size = 2 if params.adapter_dtype == "fp16" else 4
        rows[protocol] = {
            "Trainings": len(trainings),
            "Steps": sum(training_steps(c * s, train) for c, s in trainings),
            "Training, h": seconds / 3600,
            "Test passes, h": hours(tests, flops),
            "Adapters, GB": len(trainings) * parameters * size / 1e9,
        }

    sets = [catalog[name] for name in params.datasets]
    few = [catalog[name] for name in params.few_shot.datasets if name in catalog]
    if params.seeds:
        add(
            "base_to_novel",
            params.adapter,
            params.train,
            [(len(base_labels(b.classes)), params.shots) for b in sets for _ in params.seeds],
            [b for b in sets for _ in params.seeds],
        )
    if params.transfer.seeds:
        targets = [catalog[name] for name in [*params.transfer.targets, *params.transfer.variants]]
        add(
            "cross_dataset and domain_generalization",
            params.transfer.adapter,
            params.transfer.train,
            [(catalog[params.transfer.source].classes, params.shots) for _ in params.transfer.seeds],
            [b for b in targets for _ in params.transfer.seeds],
        )
    if params.few_shot.seeds and few and params.few_shot.shots:
        runs = [(b, shots) for b in few for shots in params.few_shot.shots for _ in params.few_shot.seeds]
        add("few_shot", params.adapter, params.train, [(b.classes, s) for b, s in runs], [b for b, _ in runs])
    plain = AdaptedCLIP(clip, params.adapter.start, params.adapter.end, params.adapter.scale)
    plain.detach()
    tests = [*sets, *(catalog[name] for name in params.transfer.variants)]
    rows["zero-shot CLIP"] = {
        "Trainings": 0,
        "Steps": 0,
        "Training, h": 0.0,
        "Test passes, h": hours(tests, count_flops(plain, text_length)),
        "Adapters, GB": 0.0,
    }
    frame = pd.DataFrame.from_dict(rows, orient="index").rename_axis("Protocol")
    frame.loc["total"] = frame.sum()
    return frame.astype({"Trainings": int, "Steps": int})


def adapter_parameters(backbone: str, adapter: Adapter) -> int:
    """Parameters of one training's adapters; the model is made without its weights."""
    with torch.device("meta"):
        clip = build(read_config(backbone, main_root()))
        variant = Variant.of(adapter.model_dump())
        model = AdaptedCLIP(clip, adapter.start, adapter.end, adapter.scale, adapter.ratio, variant=variant)
    return sum(p.numel() for p in model.adapters.parameters())


def disk(params: Params) -> dict[str, float]:
    """GB of what is fetched (unpacked it is about the same again) and of the packed test images."""
    catalog = load_catalog()
    names = dict.fromkeys([*params.datasets, *params.transfer.variants])
    size = read_config(params.backbone.name, main_root())["vision_cfg"].get("image_size", 224)
    return {
        "archives": sum(file.size for n in names for file in catalog[n].sources[0]) / 1e9,
        "packed test images": sum(catalog[n].counts.test for n in names) * 3 * size**2 / 1e9,
    }


def markdown(params: Params, tflops: float, overhead_ms: float, text_length: int) -> str:
    """The estimate as Markdown, with its assumptions."""
    frame = table(params, tflops, overhead_ms, text_length)
    sizes = disk(params)
    return (
        f"An estimate, not a measurement: {tflops:g} TFLOP/s, {overhead_ms:g} ms overhead a step, "
        f"{text_length} tokens a prompt.\n\n"
        + frame.astype(object).to_markdown(floatfmt=".1f")
        + f"\n\nDisk besides the adapters: archives {sizes['archives']:.0f} GB and about as much again unpacked, "
        f"packed test images {sizes['packed test images']:.0f} GB."
    )
