"""The training loop of HeBA (paper section 3; order of random draws as in the official code).

All random choices of an epoch are drawn ahead as a list of `Step`s, so that a recorded plan can be replayed
and nothing waits for the GPU inside an epoch.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from heba.clip.preprocess import preprocess_of
from heba.clip.towers import Packing, embed_tokens
from heba.data.images import crop_batch, sample_crop
from heba.methods.heba.model import AdaptedCLIP


@dataclass(frozen=True)
class Settings:
    """What a training needs to know besides its data.

    Attributes:
        epochs, batch_size, lr, momentum, weight_decay: of SGD, with a cosine per epoch and drop_last.
        label_smoothing: of the cross-entropy.
        scale_factor: s is multiplied by it with probability 1 - slow_ratio, per block and step.
        neg_ratio: classes drawn besides the batch's own, as a multiple of their number; 0 uses all classes.
        seed: of the initialisation and of all draws.
    """

    epochs: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    label_smoothing: float
    scale_factor: float
    slow_ratio: float
    neg_ratio: int
    seed: int


@dataclass(frozen=True)
class TextBank:
    """The prompts of the training classes.

    Attributes:
        tokens: [n_prompts, length].
        lengths: per prompt, tokens up to and with the one that is read (`towers.text_lengths`).
        offsets: first prompt of every class, and n_prompts at the end; prompts are ordered by class.
        hidden: frozen states [n_prompts, length, width] below adapter.start, or None to compute them.
    """

    tokens: Tensor
    lengths: list[int]
    offsets: list[int]
    hidden: Tensor | None

    @property
    def n_classes(self) -> int:
        return len(self.offsets) - 1


@dataclass(frozen=True)
class Step:
    """The random choices of one step.

    Attributes:
        images: rows of the training set. boxes, flips: their augmentation.
        targets: [batch], the column of each image's class among `prompts`.
        prompts: [n_selected], one prompt per selected class: sorted classes of the batch, then negatives.
        packing: of these prompts.
        text_scales, visual_scales: [n_adapted_blocks].
    """

    images: list[int]
    boxes: list[tuple[int, int, int, int]]
    flips: list[bool]
    targets: Tensor
    prompts: Tensor
    packing: Packing
    text_scales: Tensor
    visual_scales: Tensor


def select_classes(
    labels: list[int], n_classes: int, neg_ratio: int, generator: torch.Generator
) -> tuple[list[int], list[int]]:
    """The classes of a step in the order of the logit columns, and each label's column.

    The sorted classes of the batch come first; when there are more classes than images, min(#others,
    neg_ratio * #positives) random others follow, in the order drawn. With neg_ratio 0 all classes are used.
    """
    positives = sorted(set(labels))
    if n_classes <= len(labels) or neg_ratio == 0:
        selected = list(range(n_classes))
    else:
        others = sorted(set(range(n_classes)) - set(positives))
        order = torch.randperm(len(others), generator=generator)
        selected = positives + [others[i] for i in order[: neg_ratio * len(positives)].tolist()]
    column = {c: i for i, c in enumerate(selected)}
    return selected, [column[label] for label in labels]


def draw_scales(n_blocks: int, scale: float, settings: Settings, generator: torch.Generator) -> Tensor:
    """Slow-fast scales [n_blocks]: s * scale_factor where a uniform draw exceeds slow_ratio, else s."""
    fast = torch.rand(n_blocks, generator=generator) > settings.slow_ratio
    return torch.where(fast, scale * settings.scale_factor, scale)


def steps_per_epoch(n_images: int, settings: Settings) -> int:
    """Complete batches in an epoch; fewer images than a batch make one batch of all, as in CoOp's loader."""
    return max(1, n_images // settings.batch_size)


def plan_epoch(
    labels: list[int],
    sizes: Sequence[tuple[int, int]],
    bank: TextBank,
    model: AdaptedCLIP,
    settings: Settings,
    generator: torch.Generator,
) -> list[Step]:
    """Draw one epoch: a permutation of the images cut into batches (drop_last), then per step the
    augmentation, the negative classes, one prompt per class, the text scales and the image scales.

    Args:
        labels: of the training images. sizes: their (height, width).
    """
    device = model.logit_factor().device
    order = torch.randperm(len(labels), generator=generator).tolist()
    n_blocks = model.end - model.start + 1
    steps = []
    batch_size = min(settings.batch_size, len(order))
    for step in range(steps_per_epoch(len(order), settings)):
        images = order[step * batch_size : (step + 1) * batch_size]
        boxes = [sample_crop(sizes[j][0], sizes[j][1], generator) for j in images]
        flips = (torch.rand(len(images), generator=generator) < 0.5).tolist()
        selected, targets = select_classes(
            [labels[j] for j in images], bank.n_classes, settings.neg_ratio, generator
        )
        draws = torch.rand(len(selected), generator=generator).tolist()
        prompts = [
            bank.offsets[c] + int(u * (bank.offsets[c + 1] - bank.offsets[c]))
            for c, u in zip(selected, draws, strict=True)
        ]
        steps.append(
            Step(
                images=images,
                boxes=boxes,
                flips=flips,
                targets=torch.tensor(targets, device=device),
                prompts=torch.tensor(prompts, device=device),
                packing=model.pack([bank.lengths[p] for p in prompts]),
                text_scales=draw_scales(n_blocks, model.scale, settings, generator).to(device),
                visual_scales=draw_scales(n_blocks, model.scale, settings, generator).to(device),
            )
        )
    return steps


def step_loss(
    model: AdaptedCLIP, images: Tensor, bank: TextBank, step: Step, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Label-smoothed cross-entropy over exp(logit_scale) * cos(image, text) of the selected classes. SigLIP's
    logit_bias is the same for all of them and has no effect in a softmax.

    Args:
        images: [batch, 3, size, size], preprocessed.
    Returns:
        The loss (0-dim) and the logits [batch, n_selected], in fp32.
    """
    length = step.packing.length
    if bank.hidden is None:
        with torch.no_grad():
            hidden = embed_tokens(model.clip, bank.tokens[step.prompts, :length], model.start - 1)
    else:
        hidden = bank.hidden[step.prompts, :length]
    image = F.normalize(model.encode_image(images, step.visual_scales).float(), dim=-1)
    text = F.normalize(model.encode_text_from(hidden, step.packing, step.text_scales).float(), dim=-1)
    logits = model.logit_factor() * image @ text.T
    return F.cross_entropy(logits, step.targets, label_smoothing=label_smoothing), logits


def make_optimizer(model: AdaptedCLIP, settings: Settings) -> torch.optim.SGD:
    """SGD over all adapter parameters in one group (weight decay on the LayerNorms too)."""
    return torch.optim.SGD(
        model.adapters.parameters(),
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def update(model: AdaptedCLIP, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step of SGD down the gradient of `loss`."""
    loss.backward()
    for parameter in model.adapters.parameters():
        # The MLP adapter of the last image block is never evaluated, since only CLS is read there. With a
        # gradient of zero instead of none it decays, as in the official code.
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def learning_rate(settings: Settings, epoch: int) -> float:
    """Cosine per epoch (0-based), without warm-up: lr/2 * (1 + cos(pi * epoch / epochs))."""
    return settings.lr / 2 * (1 + math.cos(math.pi * epoch / settings.epochs))


def train_epoch(
    model: AdaptedCLIP,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[tuple[Callable[[], Tensor], Step]],
    bank: TextBank,
    label_smoothing: float,
    bf16: bool,
    progress: Callable[[int], object] = lambda n: None,
    static: Callable[[Tensor, Step], Tensor] | None = None,
) -> list[float]:
    """Run the steps of one epoch; `batches` pairs a function that gives the images with each step.

    `static`, a `heba.methods.heba.static.StaticStep`, computes losses and gradients in its own way.
    Returns the losses. Raises FloatingPointError when one is not finite.
    """
    losses = []
    for images, step in batches:
        if static is None:
            with torch.autocast(model.logit_factor().device.type, torch.bfloat16, enabled=bf16):
                loss, _ = step_loss(model, images(), bank, step, label_smoothing)
            update(model, optimizer, loss)
        else:
            loss = static(images(), step)
            optimizer.step()
        losses.append(loss.detach())
        progress(1)
    values = torch.stack(losses).tolist()
    for i, value in enumerate(values):
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss of step {i + 1} of {len(values)} is {value}")
    return values


def save_checkpoint(
    path: Path,
    model: AdaptedCLIP,
    optimizer: torch.optim.SGD,
    generator: torch.Generator,
    history: list[dict[str, float]],
) -> None:
    """Write adapter, momentum and generator state atomically; `history` tells the epochs done."""
    tensors = {"generator": generator.get_state()}
    for name, parameter in model.adapters.named_parameters():
        tensors[f"adapter.{name}"] = parameter.detach().cpu()
        tensors[f"momentum.{name}"] = optimizer.state[parameter]["momentum_buffer"].cpu()
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of this process: another experiment may run the same training.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata={"history": json.dumps(history)})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(
    path: Path, model: AdaptedCLIP, optimizer: torch.optim.SGD, generator: torch.Generator
) -> list[dict[str, float]]:
    """Restore what `save_checkpoint` wrote; returns the history."""
    try:
        with safe_open(path, "pt") as file:
            history = json.loads(file.metadata()["history"])
            with torch.no_grad():
                for name, parameter in model.adapters.named_parameters():
                    parameter.copy_(file.get_tensor(f"adapter.{name}"))
                    momentum = file.get_tensor(f"momentum.{name}").to(parameter.device)
                    optimizer.state[parameter]["momentum_buffer"] = momentum
            generator.set_state(file.get_tensor("generator"))
    except Exception as error:
        raise ValueError(f"{path}: damaged checkpoint ({error}); delete it to train from the start") from error
    return history


def train(
    model: AdaptedCLIP,
    images: Sequence[Tensor],
    labels: list[int],
    bank: TextBank,
    settings: Settings,
    bf16: bool = False,
    cuda_graphs: bool = False,
    checkpoint: Path | None = None,
    on_epoch: Callable[[dict[str, float]], object] = lambda record: None,
    progress: Callable[[int], object] = lambda n: None,
) -> list[dict[str, float]]:
    """Train the adapters of `model` in place.

    Args:
        images: uint8 [3, height, width] each, of any size. labels: 0..n_classes-1.
        cuda_graphs: each step as one CUDA graph (`heba.methods.heba.static`), on a GPU.
        checkpoint: written after every epoch and resumed from when it exists; the caller removes it.
        on_epoch: called with {"epoch", "loss", "lr"} after every epoch, the resumed ones too.
        progress: called with the number of steps done.
    Returns:
        One {"epoch", "loss", "lr"} per epoch; loss is the mean over the steps.
    Raises:
        FloatingPointError: a loss that is not finite. ValueError: a damaged checkpoint.
    """
    device = model.logit_factor().device
    preprocess = preprocess_of(model.clip)
    data = [image.to(device) for image in images]
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    optimizer = make_optimizer(model, settings)
    generator = torch.Generator().manual_seed(settings.seed)
    history: list[dict[str, float]] = []
    if checkpoint is not None and checkpoint.exists():
        history = load_checkpoint(checkpoint, model, optimizer, generator)
        progress(len(history) * steps_per_epoch(len(images), settings))
        for record in history:
            on_epoch(record)
    static = None
    if cuda_graphs:
        from heba.methods.heba.static import StaticStep

        static = StaticStep(model, bank, min(settings.batch_size, len(images)), preprocess.size, settings, bf16)
    for epoch in range(len(history), settings.epochs):
        lr = learning_rate(settings, epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr
        steps = plan_epoch(labels, sizes, bank, model, settings, generator)
        batches = [
            (lambda s=s: crop_batch([data[j] for j in s.images], s.boxes, s.flips, preprocess), s) for s in steps
        ]
        try:
            losses = train_epoch(model, optimizer, batches, bank, settings.label_smoothing, bf16, progress, static)
        except FloatingPointError as error:
            raise FloatingPointError(
                f"epoch {epoch + 1}: {error}; lower train.lr or adapter.scale, or set precision to fp32"
            ) from None
        history.append({"epoch": epoch + 1, "loss": sum(losses) / len(losses), "lr": lr})
        if checkpoint is not None:
            save_checkpoint(checkpoint, model, optimizer, generator, history)
        on_epoch(history[-1])
    return history
