"""Mini-batches of few-shot images, epoch by epoch, and the training on them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from heba.clip.device import send_parts
from heba.clip.features import image_features
from heba.clip.preprocess import preprocess_of
from heba.data.images import LabelledImages, crop_batch, decode_all, keep_images, sample_crop
from heba.fit.features import passes, shuffled
from heba.fit.loop import History, Schedule, finite, train_epochs, update
from heba.fit.run import Run

# The batches of an epoch (0-based) with their labels, with all draws from the generator.
Source = Callable[[int, torch.Generator], Iterator[tuple[Any, Tensor]]]


def crops(clip: Any, train: LabelledImages, size: int, run: Run, keep_last: bool = False) -> Source:
    """Batches of preprocessed crops [b, 3, height, width], drawn anew in every epoch: of 0.08 to 1 of the area,
    mirrored half of the time. `keep_last`: also of what is left over, as in `shuffled`."""
    where, preprocess = clip.logit_scale.device, preprocess_of(clip)
    with run.progress(len(train.files), "decode training images") as done:
        images = keep_images(decode_all(train.files, done, train.as_seen), preprocess, where)
    labels = torch.tensor(train.labels)

    def epoch(_: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        batches = shuffled(len(images), size, generator, keep_last)
        for rows, wanted in zip(batches, send_parts([labels[rows] for rows in batches], where), strict=True):
            chosen = [images[row] for row in rows.tolist()]
            boxes = [sample_crop(image.shape[1], image.shape[2], generator) for image in chosen]
            flips = (torch.rand(len(chosen), generator=generator) < 0.5).tolist()
            yield crop_batch(chosen, boxes, flips, preprocess, where), wanted

    return epoch


def frozen_features(clip: Any, train: LabelledImages, size: int, views: bool, run: Run) -> Source:
    """Batches of what the frozen image tower makes of crops, [b, E], not normalised.

    `views`: epoch e takes the pass e modulo their number of the views that are there already; else crops are
    drawn anew and encoded, as the official codes do it.
    """
    where = clip.logit_scale.device
    if views:
        assert train.views is not None
        passes_ = passes(train.views.augmented, train.views.plain).to(where)
        labels = torch.tensor(train.labels, device=where)

        def taken(epoch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
            features = passes_[epoch % len(passes_)]
            for rows in send_parts(shuffled(len(labels), size, generator), where):
                yield features[rows], labels[rows]

        return taken
    pixels = crops(clip, train, size, run)

    def encoded(epoch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in pixels(epoch, generator):
            with torch.no_grad(), torch.autocast(where.type, torch.bfloat16, enabled=run.bf16):
                features = image_features(clip, images)[0].float()
            yield features, labels

    return encoded


def descend(
    module: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[Any, Tensor], Tensor], bf16: bool
) -> Callable[[Any, Tensor], Tensor]:
    """A function of a batch and its labels that takes a step down the gradient of `loss`, 0-dim; returns it."""

    def take(x: Any, labels: Tensor) -> Tensor:
        with torch.autocast(labels.device.type, torch.bfloat16, enabled=bf16):
            value = loss(x, labels)
        update(module, optimizer, value)
        return value.detach()

    return take


@dataclass(frozen=True)
class Training:
    """What `train_batches` does.

    Attributes:
        module: that `optimizer` trains, in place.
        take: a batch and its labels to the loss, 0-dim, of a step that it has taken (`descend`).
        step_lr: the learning rate of a step (0-based, over all epochs), in place of the schedule's by epoch.
        end: called with the epoch (0-based) after its last step.
        remedy: what to do about a loss that is not finite.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    take: Callable[[Any, Tensor], Tensor]
    step_lr: Callable[[int], float] | None = None
    end: Callable[[int], object] = lambda epoch: None
    remedy: str = "lower lr, or set precision to fp32"


def train_batches(training: Training, source: Source, run: Run) -> History:
    """Train on the batches of `source`; the history is that of `heba.fit.loop.train_epochs`, and so are the
    errors."""

    def run_epoch(epoch: int, generator: torch.Generator, done: Callable[[int], object]) -> list[float]:
        losses: list[Tensor] = []
        before = epoch * training.schedule.steps
        for x, labels in islice(source(epoch, generator), training.schedule.total() - before):
            if training.step_lr is not None:
                lr = training.step_lr(before + len(losses))
                for group in training.optimizer.param_groups:
                    group["lr"] = lr
            losses.append(training.take(x, labels))
            done(1)
        training.end(epoch)
        return finite(losses)

    return train_epochs(training.module, training.optimizer, training.schedule, run_epoch, run, training.remedy)
