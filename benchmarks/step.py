"""`python -m benchmarks.step`: one training step (forward, backward, SGD), plain and ours."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
import typer
from torch.utils.flop_counter import FlopCounterMode

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
from heba.clip.preprocess import normalise, preprocess_of
from heba.clip.towers import text_lengths
from heba.fit.adapters import eager_step, graph_step, step_loss
from heba.fit.draws import Step, TextBank
from heba.fit.loop import make_optimizer, update
from heba.fit.static import StaticStep
from heba.methods.heba.model import AdaptedCLIP
from heba.methods.heba.settings import Settings
from heba.methods.heba.training import recipe


def prepare(
    device: str, backbone: str, images: int, classes: int
) -> tuple[AdaptedCLIP, torch.Tensor, torch.Tensor, TextBank, Step]:
    """A model, preprocessed images, the tokens of a prompt of each class, these as a bank, and a step with all."""
    model = make_model(backbone, device)
    preprocess = preprocess_of(model.clip)
    size = preprocess.size
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (images, 3, size, size), generator=generator)
    pixels = normalise(pixels, preprocess).to(device)
    tokens = prompt_tokens(model, classes, generator)
    lengths = text_lengths(model.clip, tokens)
    n_blocks = model.end - model.start + 1
    scales = [torch.where(torch.rand(n_blocks, generator=generator) > 0.8, 2.25, 1.0) * 0.025 for _ in range(2)]
    text_scales, visual_scales = (s.to(device) for s in scales)
    targets = (torch.arange(images) % classes).to(device)
    bank = TextBank(tokens[:, : max(lengths)], lengths, list(range(classes + 1)), None)
    step = Step(
        images=list(range(images)),
        boxes=[],
        flips=[],
        targets=targets,
        prompts=torch.arange(classes, device=device),
        packing=model.pack(lengths),
        text_scales=text_scales,
        visual_scales=visual_scales,
    )
    return model, pixels, tokens, bank, step


def ways_of_ours(
    model: AdaptedCLIP, pixels: torch.Tensor, bank: TextBank, step: Step, bf16: bool
) -> dict[str, Callable[[], object]]:
    """Steps of ours as a training takes them, on a GPU the second as a CUDA graph."""
    ours = copy_in_bf16(model) if bf16 else model
    settings = Settings(batch_size=len(pixels), neg_ratio=0)
    optimizer = make_optimizer(ours.adapters, 0.0075, 0.9, 5e-4)
    static = StaticStep(ours, bank, len(pixels), pixels.shape[-1], recipe(settings), bf16)
    eager, graph = eager_step(ours, optimizer, bank, 0.1, bf16), graph_step(optimizer, static)
    return {
        "ours, frozen weights in its precision": lambda: eager(pixels, step),
        "ours, as a CUDA graph": lambda: graph(pixels, step),
    }


def measure(
    device: str,
    precision: str,
    plain_precision: str,
    backbone: str,
    images: int,
    classes: int,
    rounds: int,
    stages: bool = False,
    graphs: bool = False,
) -> tuple[dict[str, dict[str, Any]], int]:
    """What `in_turn` gives for the ways to take a step, and the operations of ours.

    Args:
        stages: also the steps between plain and ours. graphs: also ours in static shapes, a CUDA graph on a GPU.
    """
    bf16 = precision == "bf16"
    model, pixels, tokens, bank, step = prepare(device, backbone, images, classes)
    targets, text_scales, visual_scales = step.targets, step.text_scales, step.visual_scales
    optimizer = make_optimizer(model.adapters, 0.0075, 0.9, 5e-4)
    plain_optimizer = torch.optim.SGD(model.adapters.parameters(), lr=0.0075, momentum=0.9, weight_decay=5e-4)

    def plain_loss(cut: bool = False, last: bool = False) -> torch.Tensor:
        with autocast(device, plain_precision):
            return plain.step_loss(model, pixels, tokens, targets, (text_scales, visual_scales), 0.1, cut, last)

    def our_loss(precision: str = precision) -> torch.Tensor:
        with autocast(device, precision):
            return step_loss(model, pixels, bank, step, 0.1)[0]

    def gradients(loss: torch.Tensor) -> tuple[float, torch.Tensor]:
        model.adapters.zero_grad(set_to_none=False)
        loss.backward()
        return loss.item(), torch.cat(
            [p.grad.flatten() for p in model.adapters.parameters() if p.grad is not None]
        )

    limit = 1e-4 if precision == (plain_precision) == "fp32" else 3e-2
    expected, wanted = gradients(plain_loss())
    found, given = gradients(our_loss())
    check("loss", abs(found - expected) / abs(expected), limit)
    check("gradients", relative(given, wanted), limit)
    del wanted, given

    def plain_step(cut: bool = False, last: bool = False) -> None:
        plain_optimizer.zero_grad(set_to_none=True)
        plain_loss(cut, last).backward()
        plain_optimizer.step()

    def our_step(precision: str = precision) -> None:
        update(model.adapters, optimizer, our_loss(precision))

    # Each way runs with the allocator as it would be on its own (see heba.fit.memory).
    ways = {"plain": way(plain_step, keep=False)}
    if stages:
        ways |= {
            "freed memory kept": way(plain_step),
            "texts cut after EOT": way(lambda: plain_step(cut=True)),
            "last blocks for the token that is read": way(lambda: plain_step(cut=True, last=True)),
        }
    if precision != "fp32" and not graphs:
        ways["ours in fp32"] = way(lambda: our_step("fp32"))
    ways["ours"] = way(our_step)
    with FlopCounterMode(display=False) as counter:
        our_loss().backward()
    model.adapters.zero_grad(set_to_none=True)
    if graphs:
        ways |= {name: way(take) for name, take in ways_of_ours(model, pixels, bank, step, bf16).items()}
    return in_turn(ways, rounds, device), int(counter.get_total_flops())


def copy_in_bf16(model: AdaptedCLIP) -> AdaptedCLIP:
    """The same adapters on a CLIP of its own, with weights in bf16."""
    clip = deepcopy(model.clip)
    for module in clip.modules():
        module._forward_hooks.clear()
    other = AdaptedCLIP(in_bf16(clip), model.start, model.end, model.scale).to(clip.logit_scale.device)
    other.adapters.load_state_dict(model.adapters.state_dict())
    return other.eval()


def main(
    device: Device = "cpu",
    precision: Precision = "fp32",
    plain_precision: Precision = "",
    backbone: Backbone = "ViT-B-16-quickgelu",
    images: int = 16,
    classes: Classes = 50,
    rounds: Rounds = 3,
    stages: bool = typer.Option(
        False, "--stages", help="Also the steps between plain and ours, each with all before it."
    ),
    graphs: bool = typer.Option(False, "--graphs", help="Also ours in static shapes, on a GPU as a CUDA graph."),
) -> None:
    """Time one training step of HeBA, plain and ours, in turn."""
    plain_precision = plain_precision or precision
    results, _ = measure(device, precision, plain_precision, backbone, images, classes, rounds, stages, graphs)
    title = f"training step, {images} images x {classes} classes, {backbone}, {precision}"
    print(table(results, images, "images", device, title))


if __name__ == "__main__":
    typer.run(main)
