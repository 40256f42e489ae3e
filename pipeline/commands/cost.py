"""`python -m pipeline cost`: an estimate of the compute, GPU memory and disk that params.yaml needs on the real
benchmarks; own data is not counted.

The operations of one image and of one prompt, forward and in training, and the bytes that the backward needs are
counted by torch while the model of a method runs on one of each, without weights. Everything else is products of
counts in params.yaml and the catalogue:

    step      = (images per step * image_train + prompts per step * text_train) / throughput + overhead
    training  = steps * step
    test pass = (test images * image + 20 prompts per class * text) / throughput, once per training and test set;
                a method on frozen features needs those alone, which are computed once per data set, and the
                texts that it has for each image
    memory    = CLIP's weights + 4 * trained parameters (themselves, gradients, two numbers of the optimiser)
                + images per step * image_kept + prompts per step * text_kept, of the largest data set, in fp32
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
from pydantic import BaseModel, ConfigDict, Field
from tqdm import tqdm

from heba import methods
from heba.clip.architecture import read_architecture
from heba.clip.backbone import build
from heba.data.protocols import PROTOCOLS
from heba.data.splits import base_labels
from heba.sources.catalog import Benchmark, load_catalog
from pipeline.core.params import Params, ParamsError, settings_of
from pipeline.core.paths import main_root
from pipeline.core.trainings import Training, evaluations, trainings
from pipeline.stages.cost import Counts, count

PROMPTS_PER_CLASS = 20
FROZEN = "frozen features"
FP32 = 4  # bytes
TRAINED = 4  # numbers per trained one: itself, its gradient, at most two of the optimiser


@cache
def without_weights(name: str, root: Path) -> Any:
    """The backbone `name`, whose tensors have shapes and nothing else."""
    with torch.device("meta"):
        return build(read_architecture(name, root))


@contextmanager
def built(params: Params, method: str, protocol: str) -> Iterator[Any]:
    """The model of a method for two classes, without weights."""
    part = methods.part(method, "method")
    clip = without_weights(params.backbone.name, main_root())
    with torch.device("meta"):
        model = part.build(clip, 2, settings_of(params, method, protocol), seed=0)
    try:
        yield model
    finally:
        part.detach(model)


def trained_shapes(method: str, model: Any) -> dict[str, torch.Size]:
    """The shapes of the tensors that a training of a method leaves."""
    return {n: tensor.shape for n, tensor in methods.part(method, "method").trained(model).state_dict().items()}


def _numbers(shapes: Mapping[str, torch.Size]) -> int:
    return sum(shape.numel() for shape in shapes.values())


def left_numbers(params: Params, method: str, protocol: str) -> int:
    """How many numbers a training of a method leaves."""
    with built(params, method, protocol) as model:
        return _numbers(trained_shapes(method, model))


def adapter_bytes(params: Params, training: Training) -> int:
    """What a training leaves on the disk."""
    return left_numbers(params, training.method, training.protocol) * bytes_per_number(params)


def bytes_per_number(params: Params) -> int:
    return 2 if params.adapter_dtype == "fp16" else FP32


def table(params: Params, tflops: float, overhead_ms: float, text_length: int) -> pd.DataFrame:
    """A row per protocol and method, and one of the frozen features that all share: trainings, steps, hours of
    training and of test passes, GB of adapters, GB on the GPU."""
    if params.suite != "real" or params.backbone.name == "tiny":
        raise ParamsError("suite: cost is for the real benchmarks; try it after `python -m pipeline preset paper`")
    catalog = load_catalog()
    clip = without_weights(params.backbone.name, main_root())
    per_second = tflops * 1e12
    weights = FP32 * sum(tensor.numel() for tensor in clip.parameters())

    def hours(tests: list[Benchmark], counts: Counts) -> float:
        """Of one test pass over each of `tests`."""
        tested = sum(
            b.counts.test * counts.image.test + PROMPTS_PER_CLASS * b.classes * counts.text.test for b in tests
        )
        return tested / per_second / 3600

    def text_hours(tests: list[Benchmark], counts: Counts, about: Any, settings: Any) -> float:
        """Of the texts that a method has for each test image."""
        texts = sum(b.counts.test * about.work(settings, b.classes, b.classes).tested for b in tests)
        return texts * counts.text.test / per_second / 3600

    rows: dict[tuple[str, str], dict[str, float]] = {}
    tests = dict.fromkeys([*params.datasets, *params.transfer.variants])
    frozen = count(clip, None, text_length)
    # By method and what it trains: other settings, such as the epochs, do not change a pass.
    counted: dict[tuple[str, str], Counts] = {}
    of_method: dict[tuple[str, str], list[Training]] = {}
    tested_on: dict[Training, list[Benchmark]] = {}
    for training in trainings(params):
        if training.dataset in catalog:
            of_method.setdefault((training.method, training.protocol), []).append(training)
    for evaluation in evaluations(params):
        if evaluation.dataset in catalog:
            tested_on.setdefault(evaluation.training, []).append(catalog[evaluation.dataset])
    protocols = dict.fromkeys(p.trained_as for p in PROTOCOLS.values())
    listed = [(m, p) for m in params.methods for p in protocols if (m, p) in of_method]
    for method, protocol in tqdm(listed, desc="cost", delay=2, leave=False):
        about, own = methods.part(method, "settings"), of_method[method, protocol]
        settings = settings_of(params, method, protocol)
        with built(params, method, protocol) as model:
            shapes = trained_shapes(method, model)
            numbers, same = _numbers(shapes), (method, str(shapes))
            if same not in counted:
                towers = hasattr(model, "encode_image") or hasattr(model, "encode_text")
                counted[same] = count(clip, model, text_length, frozen) if towers else frozen
        counts = counted[same]
        steps, seconds, kept = 0, 0.0, 0
        for training in own:
            classes = catalog[training.dataset].classes
            if protocol == "base_to_novel":
                classes = len(base_labels(classes))
            work = about.work(settings, classes * training.shots, classes)
            operations = work.images * counts.image.train + work.prompts * counts.text.train
            steps += work.steps
            seconds += work.steps * (operations / per_second + overhead_ms / 1e3)
            kept = max(kept, work.images * counts.image.kept + work.prompts * counts.text.kept)
        tested = [benchmark for training in own for benchmark in tested_on.get(training, [])]
        titles = " and ".join(name for name, p in PROTOCOLS.items() if p.trained_as == protocol)
        rows[titles, about.TITLE] = {
            "Trainings": len(own),
            "Steps": steps,
            "Training, h": seconds / 3600,
            "Test passes, h": (
                hours(tested, counts) if about.READS == "pixels" else text_hours(tested, counts, about, settings)
            ),
            "Adapters, GB": len(own) * numbers * bytes_per_number(params) / 1e9,
            "GPU, GB": (weights + TRAINED * FP32 * numbers + kept) / 1e9,
        }
    rows[FROZEN, "all"] = {
        "Trainings": 0,
        "Steps": 0,
        "Training, h": 0.0,
        "Test passes, h": hours([catalog[name] for name in tests], frozen),
        "Adapters, GB": 0.0,
        "GPU, GB": weights / 1e9,
    }
    frame = pd.DataFrame.from_dict(rows, orient="index")
    frame.loc[("total", ""), :] = {**frame.sum(), "GPU, GB": frame["GPU, GB"].max()}
    frame.index = pd.MultiIndex.from_tuples(list(frame.index), names=["Protocol", "Method"])
    return frame.astype({"Trainings": int, "Steps": int})


def disk(params: Params) -> dict[str, float]:
    """GB of what is fetched (unpacked it is about the same again) and of the packed test images."""
    catalog = load_catalog()
    names = dict.fromkeys([*params.datasets, *params.transfer.variants])
    size = read_architecture(params.backbone.name, main_root())["vision_cfg"].get("image_size", 224)
    return {
        "archives": sum(file.size for n in names for file in catalog[n].sources[0]) / 1e9,
        "packed test images": sum(catalog[n].counts.test for n in names) * 3 * size**2 / 1e9,
    }


class Speed(BaseModel):
    """A least-squares fit of measured step times over `sizes` step sizes: `tflops` and a fixed `overhead_ms`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: Annotated[str, Field(min_length=1)]
    tflops: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    overhead_ms: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    sizes: Annotated[int, Field(ge=2)]


def read_speed(path: Path) -> Speed:
    """The speed.json that `benchmarks.gpu` writes; ParamsError names the file and the remedy."""
    try:
        return Speed.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ParamsError(f"{path}: {reason}; `python -m benchmarks.gpu --out FOLDER` writes it") from None


def markdown(
    params: Params, tflops: float, overhead_ms: float, text_length: int, device: str | None = None
) -> str:
    """The estimate as Markdown, with its assumptions; `device`: where the first two were measured."""
    frame = table(params, tflops, overhead_ms, text_length)
    sizes = disk(params)
    return (
        f"An estimate, not a measurement: {tflops:.3g} TFLOP/s, {overhead_ms:.3g} ms overhead a step"
        f"{f', as measured on {device}' if device else ''}, {text_length} tokens a prompt.\n\n"
        + frame.reset_index().astype(object).to_markdown(floatfmt=".1f", index=False)
        + f"\n\nDisk besides the adapters: archives {sizes['archives']:.0f} GB and about as much again unpacked, "
        f"packed test images {sizes['packed test images']:.0f} GB.\n\n"
        "GPU, GB: of the training on the largest data set, in fp32 and without fused attention; bf16 keeps less. "
        "CUDA itself takes about 0.5 more."
    )
