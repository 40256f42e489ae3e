"""`python -m benchmarks.prompt_step`: one training step of prompt learners, plain and ours."""

from collections.abc import Callable
from typing import Annotated, Any

import open_clip
import torch
import typer
from torch import Tensor
from torchvision.models import ViT_B_16_Weights

from benchmarks import prompt_plain
from benchmarks.common import (
    Backbone,
    Classes,
    Device,
    Precision,
    Rounds,
    autocast,
    check,
    in_turn,
    make_clip,
    relative,
    table,
    tiny_clip,
    way,
)
from heba import methods
from heba.clip.features import Classes as ClassFeatures
from heba.clip.features import image_features
from heba.clip.towers import encode_text_plain
from heba.fit.average import Average, gaussian
from heba.fit.batches import Training
from heba.fit.loop import update
from heba.fit.run import Run

Step = Callable[[], Tensor]


def classes_of(clip: Any, n: int) -> ClassFeatures:
    """`n` of ImageNet's classes, each with one prompt."""
    known = ViT_B_16_Weights.IMAGENET1K_V1.meta["categories"]
    names = known[:: len(known) // n][:n]
    tokenizer = open_clip.SimpleTokenizer(context_length=clip.context_length)
    tokens = tokenizer([f"a photo of a {name}." for name in names]).to(clip.logit_scale.device)
    return ClassFeatures(names, tokens.cpu(), torch.arange(n), encode_text_plain(clip, tokens).cpu(), tokenizer)


def gradient(training: Training, step: Step) -> tuple[float, Tensor]:
    """The loss of a step, and the gradient that it goes down."""
    found: list[Tensor] = []

    def keep(*_: object) -> None:
        found.extend(p.grad.flatten().clone() for p in training.module.parameters() if p.grad is not None)

    hook = training.optimizer.register_step_pre_hook(keep)
    loss = step().item()
    hook.remove()
    return loss, torch.cat(found)


def check_ways(name: str, training: Training, ways: dict[str, Step], limit: float) -> None:
    """Stop when two ways differ at the same parameters by more than `limit`."""
    start = {key: tensor.clone() for key, tensor in training.module.state_dict().items()}
    found = {}
    for what, step in ways.items():
        training.module.load_state_dict(start)
        found[what] = gradient(training, step)
    loss, wanted = found.pop("plain")
    for what, (value, given) in found.items():
        check(f"{name}, {what}: loss", abs(value - loss) / abs(loss), limit)
        check(f"{name}, {what}: gradient", relative(given, wanted), limit)


def training_of(name: str, model: Any, n: int, classes: ClassFeatures, settings: Any, run: Run) -> Training:
    """Of a method, for `n` images."""
    method = methods.part(name, "method")
    if name != "promptsrc":
        return method.training_of(model, n, classes, settings, run)
    average = Average(model.learned, gaussian(settings.epochs, settings.gpa_mean, settings.gpa_std))
    return method.training_of(model, average, n, classes, settings, run)


def ways_of(
    name: str, clip: Any, classes: ClassFeatures, pixels: Tensor, labels: Tensor, precision: str
) -> tuple[Training, dict[str, Step]]:
    """The training of a method, and the ways to take a step of it."""
    method, about = methods.part(name, "method"), methods.part(name, "settings")
    settings = about.Settings()
    n, device = min(len(pixels), settings.batch_size), pixels.device.type
    pixels, labels = pixels[:n], labels[:n]
    model = method.build(clip, len(classes.names), settings, seed=1)
    run = Run(seed=1, bf16=precision == "bf16")
    training = training_of(name, model, n, classes, settings, run)
    learned = method.trained(model)
    loss = prompt_plain.LOSSES[name](clip, learned, classes, settings)

    def plain_step() -> Tensor:
        with autocast(device, precision):
            value = loss(pixels, labels)
        update(learned, training.optimizer, value)
        return value.detach()

    @torch.no_grad()
    def features() -> Tensor:
        with autocast(device, precision):
            return image_features(clip, pixels)[0].float()

    if about.READS == "pixels":
        return training, {"plain": plain_step, "ours": lambda: training.take(pixels, labels)}
    known = features()
    return training, {
        "plain": plain_step,
        "ours": lambda: training.take(features(), labels),
        "ours, on views": lambda: training.take(known, labels),
    }


def main(
    device: Device = "cpu",
    precision: Precision = "fp32",
    backbone: Backbone = "ViT-B-16-quickgelu",
    method: Annotated[list[str] | None, typer.Option(help="Only this one; may be given again.")] = None,
    images: Annotated[int, typer.Option(min=1, help="Of a batch, or the method's own size if smaller.")] = 16,
    classes: Classes = 50,
    rounds: Rounds = 3,
    tiny: Annotated[bool, typer.Option("--tiny", help="A narrow CLIP: are the ways the same?")] = False,
) -> None:
    """Time one training step of prompt learners (forward, backward, SGD) with their default settings, plain and
    ours, in turn."""
    if precision == "fp16":
        raise typer.BadParameter("ours trains in fp32 or bf16")
    clip = tiny_clip().to(device) if tiny else make_clip(backbone, device)
    clip.requires_grad_(False)
    known = classes_of(clip, classes)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(images, 3, *clip.visual.image_size, generator=generator).to(device)
    labels = (torch.arange(images) % classes).to(device)
    results: dict[str, dict[str, Any]] = {}
    for name in method or prompt_plain.LOSSES:
        training, ways = ways_of(name, clip, known, pixels, labels, precision)
        check_ways(name, training, ways, 1e-4 if precision == "fp32" else 3e-2)
        # Each way runs with the allocator as it would be on its own (see heba.fit.memory).
        timed = {f"{name}, {what}": way(step, keep=what != "plain") for what, step in ways.items()}
        results |= in_turn(timed, rounds, device)
    size = "a tiny CLIP" if tiny else backbone
    title = f"training step, at most {images} images x {classes} classes, {size}, {precision}"
    print(table(results, 1, "steps", device, title))


if __name__ == "__main__":
    typer.run(main)
