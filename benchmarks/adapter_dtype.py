"""`python -m benchmarks.adapter_dtype`: are the predictions of adapters that were rounded to fp16 the same?

Reads params.yaml and out/, so run it after `dvc repro` with `adapter_dtype: fp32`; compares the confusion matrices
of base_to_novel with and without rounding. (After a repro with fp16 both are the rounded ones.)
"""

from typing import Any

import torch
import typer

from heba.data.splits import base_labels
from heba.methods.heba.model import load_adapter
from pipeline.commands.cli import run_app
from pipeline.core.params import Params, ParamsError, load_params
from pipeline.core.paths import train_folder
from pipeline.stages.backbone import device, load_backbone, use_bf16
from pipeline.stages.evaluate import compare
from pipeline.stages.precompute import read_names

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def full_and_rounded(clip: Any, params: Params, dataset: str, seed: int) -> list[tuple[dict, dict]]:
    """What the adapter of a base_to_novel training predicts, as it is on disk and rounded to fp16: the reports of
    heba.evaluation.report.classification_report for base and for novel classes."""
    names = read_names(dataset)
    n_base = len(base_labels(len(names)))
    scale, where, bf16 = params.adapter.scale, device(params), use_bf16(params)
    groups = {"base": (range(n_base), scale), "novel": (range(n_base, len(names)), scale)}
    model, _ = load_adapter(clip, train_folder("base_to_novel", dataset, seed, params.shots))
    try:
        model.to(where).eval()
        full = compare(model, dataset, names, groups, where, bf16)
        with torch.no_grad():
            for parameter in model.adapters.parameters():
                parameter.copy_(parameter.half())
        rounded = compare(model, dataset, names, groups, where, bf16)
    finally:
        model.detach()
    return [(full[group]["heba"], rounded[group]["heba"]) for group in groups]


@app.command()
def main() -> None:
    """Compare the predictions of all adapters of base_to_novel with those of the same in fp16."""
    params = load_params()
    if params.adapter_dtype != "fp32":
        raise ParamsError("adapter_dtype: run `dvc repro` with fp32 first, else both sides are rounded")
    clip, _ = load_backbone(params)
    pairs = [
        pair
        for dataset in params.datasets
        for seed in params.seeds
        for pair in full_and_rounded(clip, params, dataset, seed)
    ]
    differ = sum(full["confusion"] != rounded["confusion"] for full, rounded in pairs)
    worst = max((abs(full["accuracy"] - rounded["accuracy"]) for full, rounded in pairs), default=0.0)
    print(
        f"{len(pairs)} test sets; {differ} with another confusion matrix; "
        f"accuracy differs by at most {worst:.2f} points"
    )


if __name__ == "__main__":
    run_app(app)
