"""`python -m benchmarks.kernels`: the kernels of HeBA's step and evaluation on a GPU, counted without one."""

from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
import typer
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import Backbone, Classes, make_model, prompt_tokens
from benchmarks.fake import FakeGPU, fake_gpu, move
from heba.clip.device import in_bf16
from heba.clip.preprocess import normalise, preprocess_of
from heba.clip.towers import text_lengths
from heba.fit.adapters import eager_step
from heba.fit.draws import TextBank, plan_epoch
from heba.fit.loop import make_optimizer
from heba.fit.static import StaticStep
from heba.methods.heba.settings import Settings
from heba.methods.heba.training import recipe


def counted(gpu: FakeGPU, work: Callable[[], object]) -> dict[str, Any]:
    """What `work` does on the GPU."""
    gpu.clear()
    with FlopCounterMode(display=False) as flops:
        work()
    kinds = gpu.kernels
    return {
        "kernels": sum(kinds.values()),
        "casts and copies": kinds["_to_copy"] + kinds["clone"] + kinds["copy_"],
        "zeros": kinds["zero_"] + kinds["zeros"] + kinds["zeros_like"] + kinds["new_zeros"] + kinds["fill_"],
        "adds": kinds["add_"] + kinds["add"],
        "divisions": kinds["div"] + kinds["div_"],
        "index_put": kinds["index_put"] + kinds["_index_put_impl_"],
        "waits": len(gpu.waits),
        "GB moved": gpu.moved / 1e9,
        "TFLOP": flops.get_total_flops() / 1e12,
    }


def count_all(backbone: str, images: int, classes: int, test: int, bf16: bool = True) -> dict[str, dict[str, Any]]:
    """The counts of a step, eager and in static shapes, and of a batch of test images."""
    model = make_model(backbone, "cpu")
    preprocess = preprocess_of(model.clip)
    generator = torch.Generator().manual_seed(1)
    tokens = prompt_tokens(model, classes, generator)
    lengths = text_lengths(model.clip, tokens)
    settings = Settings(batch_size=images, neg_ratio=0)
    with fake_gpu() as gpu:
        move(model)
        if bf16:
            in_bf16(model.clip)
        bank = TextBank(tokens[:, : max(lengths)].to("cuda"), lengths, list(range(classes + 1)), None)
        labels = [i % classes for i in range(images)]
        sizes = [(375, 500)] * images
        step = plan_epoch(labels, sizes, bank, model, recipe(settings), generator)[0]
        pixels = torch.zeros(images, 3, preprocess.size, preprocess.size, device="cuda")
        optimizer = make_optimizer(model.adapters, 0.0075, 0.9, 5e-4)
        take = eager_step(model, optimizer, bank, 0.1, bf16)
        take(pixels, step)
        found = {"step": counted(gpu, lambda: take(pixels, step))}
        static = StaticStep(model, bank, images, preprocess.size, recipe(settings), bf16)

        def static_step() -> None:
            static.compute(static.fill(pixels, step))
            optimizer.step()

        found["step in static shapes"] = counted(gpu, static_step)
        raw = torch.zeros(test, 3, preprocess.size, preprocess.size, device="cuda", dtype=torch.uint8)

        def evaluate() -> None:
            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=bf16):
                model.encode_image(normalise(raw, preprocess))

        evaluate()
        found[f"{test} test images"] = counted(gpu, evaluate)
    return found


def main(
    backbone: Backbone = "ViT-B-16-quickgelu",
    images: int = typer.Option(16, min=1, help="Images of a step."),
    classes: Classes = 50,
    test: int = typer.Option(256, min=1, help="Test images of a batch."),
    fp32: bool = typer.Option(False, "--fp32", help="In fp32; else in bf16."),
) -> None:
    """Count what a GPU would run for a training step and an evaluation."""
    found = count_all(backbone, images, classes, test, not fp32)
    frame = pd.DataFrame.from_dict(found, orient="index").map(
        lambda x: f"{x:,}" if isinstance(x, int) else f"{x:.2f}"
    )
    print(
        f"{backbone}, {images} images x {classes} classes, {'fp32' if fp32 else 'bf16'}; counted, not measured\n"
    )
    print(frame.to_markdown())


if __name__ == "__main__":
    typer.run(main)
