"""The random draws of a training with adapters in both towers, in the order of the official code.

All random choices of an epoch are drawn ahead as a list of `Step`s, so that a recorded plan can be replayed and
nothing waits for the GPU inside an epoch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from heba.clip.blocks import Packing
from heba.clip.device import send_parts
from heba.clip.features import Classes
from heba.clip.hooks import HookedCLIP
from heba.clip.towers import embed_tokens, padded_texts, text_lengths
from heba.data.images import CPU, sample_crop
from heba.fit.work import steps_per_epoch

TEXT_BATCH = 256


@dataclass(frozen=True)
class Recipe:
    """How adapters in both towers are trained.

    Attributes:
        epochs, batch_size, lr, momentum, weight_decay: of SGD, with a cosine per epoch and drop_last.
        label_smoothing: of the cross-entropy.
        scale_factor, slow_ratio: slow-fast; s times the factor, with probability 1 - slow_ratio, per block and
            step.
        neg_ratio: classes drawn besides the batch's own, as a multiple of their number; None: all classes.
    """

    epochs: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    label_smoothing: float
    scale_factor: float
    slow_ratio: float
    neg_ratio: int | None


@dataclass(frozen=True)
class TextBank:
    """The prompts of the training classes.

    Attributes:
        tokens: [n_prompts, length].
        lengths: per prompt, tokens up to and with the one that is read (`towers.text_lengths`).
        offsets: first prompt of every class, and n_prompts at the end; prompts are ordered by class.
        hidden: frozen states [n_prompts, length, width] below block `start`, or None to compute them.
    """

    tokens: Tensor
    lengths: list[int]
    offsets: list[int]
    hidden: Tensor | None

    @property
    def n_classes(self) -> int:
        return len(self.offsets) - 1


def text_bank(model: HookedCLIP, classes: Classes) -> TextBank:
    """The prompts of `classes` on the model's device, with their frozen states below its first adapted block."""
    clip, where = model.clip, model.logit_factor().device
    tokens = padded_texts(clip, classes.tokens, model.reach, classes.tokenizer)
    hidden = None
    if model.start > 1:
        with torch.no_grad():
            batches = tokens.split(TEXT_BATCH)
            hidden = torch.cat([embed_tokens(clip, b.to(where), model.start - 1).float() for b in batches])
    counts = torch.bincount(classes.index, minlength=len(classes.names))
    return TextBank(
        tokens=tokens.to(where),
        lengths=text_lengths(clip, tokens),
        offsets=[0, *counts.cumsum(0).tolist()],
        hidden=hidden,
    )


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


def step_classes(
    labels: list[int], n_classes: int, neg_ratio: int | None, generator: torch.Generator
) -> tuple[list[int], list[int]]:
    """The classes of a step in the order of the logit columns, and each label's column.

    The sorted classes of the batch come first; when there are more classes than images, min(#others,
    neg_ratio * #positives) random others follow, in the order drawn. With neg_ratio None all classes are used.
    """
    positives = sorted(set(labels))
    if n_classes <= len(labels) or neg_ratio is None:
        selected = list(range(n_classes))
    else:
        others = sorted(set(range(n_classes)) - set(positives))
        order = torch.randperm(len(others), generator=generator)
        selected = positives + [others[i] for i in order[: neg_ratio * len(positives)].tolist()]
    column = {c: i for i, c in enumerate(selected)}
    return selected, [column[label] for label in labels]


def draw_scales(n_blocks: int, scale: float, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Slow-fast scales [n_blocks]: s * scale_factor where a uniform draw exceeds slow_ratio, else s."""
    fast = torch.rand(n_blocks, generator=generator) > recipe.slow_ratio
    return torch.where(fast, scale * recipe.scale_factor, scale)


def plan_epoch(
    labels: list[int],
    sizes: Sequence[tuple[int, int]],
    bank: TextBank,
    model: HookedCLIP,
    recipe: Recipe,
    generator: torch.Generator,
) -> list[Step]:
    """Draw one epoch: a permutation of the images cut into batches (drop_last), then per step the
    augmentation, the negative classes, one prompt per class, the text scales and the image scales.

    Args:
        labels: of the training images. sizes: their (height, width).
    """
    order = torch.randperm(len(labels), generator=generator).tolist()
    n_blocks = model.end - model.start + 1
    steps = []
    batch_size = min(recipe.batch_size, len(order))
    for step in range(steps_per_epoch(len(order), recipe.batch_size)):
        images = order[step * batch_size : (step + 1) * batch_size]
        boxes = [sample_crop(sizes[j][0], sizes[j][1], generator) for j in images]
        flips = (torch.rand(len(images), generator=generator) < 0.5).tolist()
        selected, targets = step_classes([labels[j] for j in images], bank.n_classes, recipe.neg_ratio, generator)
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
                targets=torch.tensor(targets),
                prompts=torch.tensor(prompts),
                packing=model.pack([bank.lengths[p] for p in prompts], CPU),
                text_scales=draw_scales(n_blocks, model.scale, recipe, generator),
                visual_scales=draw_scales(n_blocks, model.scale, recipe, generator),
            )
        )
    return send_steps(steps, model.clip.logit_scale.device)


def send_steps(steps: list[Step], where: torch.device) -> list[Step]:
    """`steps` with their tensors on their way to `where`, those of one type in one copy."""
    whole = [(s.targets, s.prompts, s.packing.eot, s.packing.read) for s in steps]
    rows = [s.packing.rows for s in steps if s.packing.rows is not None]
    numbers = iter(send_parts([*(part for parts in whole for part in parts), *rows], where))
    scales = iter(send_parts([part for s in steps for part in (s.text_scales, s.visual_scales)], where))
    moved = []
    for step in steps:
        targets, prompts, eot, read = islice(numbers, 4)
        text, visual = islice(scales, 2)
        packing = replace(step.packing, eot=eot, read=read)
        moved.append(
            replace(
                step, targets=targets, prompts=prompts, packing=packing, text_scales=text, visual_scales=visual
            )
        )
    # The rows come last, for a packing may have none.
    return [
        s if s.packing.rows is None else replace(s, packing=replace(s.packing, rows=next(numbers))) for s in moved
    ]
