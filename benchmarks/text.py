"""`python -m benchmarks.text`: the classifier from all prompts of some classes, plain and ours."""

from typing import Any

import torch
import typer

from benchmarks import plain
from benchmarks.common import (
    Backbone,
    Classes,
    Device,
    Precision,
    Rounds,
    autocast,
    check,
    in_turn,
    make_model,
    prompt_tokens,
    relative,
    table,
    way,
)
from heba.clip.device import in_bf16
from heba.clip.features import class_features, encode_prompts


def measure(
    device: str, precision: str, backbone: str, classes: int, prompts: int, rounds: int
) -> dict[str, dict[str, Any]]:
    """What `in_turn` gives for the text side of an evaluation."""
    model = make_model(backbone, device)
    if precision == "bf16":
        in_bf16(model.clip)
    tokens = prompt_tokens(model, classes * prompts, torch.Generator().manual_seed(1)).cpu()
    index = torch.arange(classes).repeat_interleave(prompts)
    scales = torch.full((model.end - model.start + 1,), model.scale, device=device)
    by_class = tokens.unflatten(0, (classes, prompts)).to(device)

    def run_plain() -> torch.Tensor:
        with autocast(device, precision):
            return plain.classifier(model, by_class, scales)

    def encode(batch: torch.Tensor) -> torch.Tensor:
        with autocast(device, precision):
            return model.encode_text(batch)

    def run_ours() -> torch.Tensor:
        return class_features(encode_prompts(model.clip, tokens, encode, torch.device(device)), index, classes)

    check("classifier", relative(run_ours(), run_plain()), 1e-4 if precision == "fp32" else 3e-2)
    return in_turn({"plain": way(run_plain, keep=False), "ours": way(run_ours)}, rounds, device)


def main(
    device: Device = "cpu",
    precision: Precision = "fp32",
    backbone: Backbone = "ViT-B-16-quickgelu",
    classes: Classes = 10,
    prompts: int = typer.Option(20, min=1, help="Prompts per class."),
    rounds: Rounds = 3,
) -> None:
    """Time the text side of an evaluation, plain and ours, in turn."""
    results = measure(device, precision, backbone, classes, prompts, rounds)
    title = f"classifier of {classes} classes x {prompts} prompts, {backbone}, {precision}"
    print(table(results, classes * prompts, "prompts", device, title))


if __name__ == "__main__":
    typer.run(main)
