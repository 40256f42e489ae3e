"""`python -m benchmarks.adapter_dtype`: are the predictions of adapters that were rounded to fp16 the same?

Reads params.yaml and out/, so run it after `dvc repro` with `adapter_dtype: fp32`; compares the confusion matrices
of base_to_novel with and without rounding. (After a repro with fp16 both are the rounded ones.)
"""

import json

import torch

from heba.model import load_adapter
from heba.splits import base_labels
from pipeline.backbone import device, load_backbone, use_bf16
from pipeline.evaluate import compare
from pipeline.params import ParamsError, load_params
from pipeline.paths import train_folder
from pipeline.precompute import folder_of


def main() -> None:
    params = load_params()
    if params.adapter_dtype != "fp32":
        raise ParamsError("adapter_dtype: run `dvc repro` with fp32 first, else both sides are rounded")
    clip, _ = load_backbone(params)
    differ, worst, n = 0, 0.0, 0
    for dataset in params.datasets:
        for seed in params.seeds:
            data = folder_of(dataset)
            names = json.loads((data / "prompts.json").read_text(encoding="utf-8"))["class_names"]
            n_base = len(base_labels(len(names)))
            scale, where, bf16 = params.adapter.scale, device(params), use_bf16(params)
            groups = {"base": (range(n_base), scale), "novel": (range(n_base, len(names)), scale)}
            folder = train_folder("base_to_novel", dataset, seed, params.shots)
            model = load_adapter(clip, folder)[0].to(where).eval()
            full = compare(model, data, names, groups, where, bf16)
            with torch.no_grad():
                for p in model.adapters.parameters():
                    p.copy_(p.half())
            half = compare(model, data, names, groups, where, bf16)
            model.detach()
            for group in groups:
                a, b = full[group]["heba"], half[group]["heba"]
                n += 1
                differ += a["confusion"] != b["confusion"]
                worst = max(worst, abs(a["accuracy"] - b["accuracy"]))
    print(f"{n} test sets; {differ} with another confusion matrix; accuracy differs by at most {worst:.2f} points")


if __name__ == "__main__":
    main()
