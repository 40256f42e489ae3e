"""CLIP-LoRA (Zanella and Ben Ayed 2024): changes of low rank in the attentions of both towers, as the official
code has them.

The projections of an attention to queries, keys and values, and if asked for the one after it, become

    W z + b + s B A drop(z),    s = alpha / sqrt(r)

with A [r, width] and B [width, r], which begins at 0; each projection has dropout of its own. The logits of an
image are 100 cos(image, w_k), whatever the temperature of the backbone, with w_k the feature of "a photo of a
{name}." for every data set. The loss is the cross-entropy over all classes. The shots fix the number of steps:
an epoch goes through all images, and the last one is cut.

The official code merges s B A into W for tests; here it stays beside W, which is never written, at r / width of
the work. Its gradients without dropout lack B A; ours are the true ones. Its few-shot samples, which repeat
images of a class that has too few, are not taken.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heba.clip.blocks import Change, Packing
from heba.clip.features import Classes, cosine_logits, encode_prompts
from heba.clip.towers import (
    check_inside,
    embed_images,
    frozen_texts,
    image_blocks,
    run_image_blocks,
    run_text_blocks,
    text_blocks,
)
from heba.data.images import Images, LabelledImages
from heba.data.prompts import TEMPLATE, template_prompts
from heba.fit.batches import Source, Training, crops, descend, train_batches
from heba.fit.loop import Schedule
from heba.fit.run import Progress, Run, silent
from heba.methods.clip_lora.settings import Settings

FACTOR = 100.0  # of the cosines
LAST_LR = 1e-6

Drop = Callable[[Tensor], Tensor]


def whole(z: Tensor) -> Tensor:
    """No dropout."""
    return z


def dropout(rate: float, seed: int, device: torch.device) -> Drop:
    """Dropout whose masks are those of `seed`, one after the other."""
    if not rate:
        return whole
    generator = torch.Generator(device).manual_seed(seed)
    # Twice as fast on a CPU as torch's own dropout.
    return lambda z: z * torch.rand(z.shape, generator=generator, device=device).ge_(rate).div_(1 - rate)


class Lora(nn.Module):
    """s B A."""

    def __init__(self, width: int, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.A, self.B = nn.Parameter(torch.empty(rank, width)), nn.Parameter(torch.zeros(width, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # within 1 / sqrt(width)

    def forward(self, drop: Drop, z: Tensor) -> Tensor:
        return F.linear(self.scale * F.linear(drop(z), self.A), self.B)


class Model(nn.Module):
    """A frozen CLIP and its changes, `lora[tower][layer][projection]`, layers from 1."""

    def __init__(self, clip: Any, settings: Settings) -> None:
        super().__init__()
        check_inside(clip, "clip_lora")
        self.clip = clip.requires_grad_(False).eval()
        self.lora, self.first = nn.ModuleDict(), {}
        scale = settings.alpha / math.sqrt(settings.rank)
        for name, tower in (("text", text_blocks(clip)), ("image", image_blocks(clip))):
            depth = len(tower.blocks)
            end = settings.end or depth
            if not settings.start <= end <= depth:
                raise ValueError(f"clip_lora: layers {settings.start} to {end}, and the {name} tower has {depth}")
            layers = range(settings.start, end + 1) if settings.towers in ("both", name) else range(0)
            self.lora[name] = nn.ModuleDict(
                {
                    str(layer): nn.ModuleDict(
                        {p: Lora(tower.widths[0], settings.rank, scale) for p in settings.projections}
                    )
                    for layer in layers
                }
            )
            self.first[name] = (layers[0] if layers else depth) - 1  # what is below stays as it is

    def changes(self, name: str, drop: Drop) -> dict[int, Change]:
        """Of a tower, by block (0-based)."""
        tower: Any = self.lora[name]
        return {
            int(layer) - 1: Change(**{p: partial(lora, drop) for p, lora in parts.items()})
            for layer, parts in tower.items()
        }

    def encode_image(self, images: Tensor, drop: Drop = whole) -> Tensor:
        """Features [n, E], not normalised, of preprocessed images [n, 3, size, size]."""
        return self.encode_image_from(embed_images(self.clip, images, self.first["image"]), drop)

    def encode_image_from(self, hidden: Tensor, drop: Drop = whole) -> Tensor:
        """The same from what enters the first changed block."""
        return run_image_blocks(self.clip, hidden, self.first["image"], self.changes("image", drop))

    def encode_text(self, tokens: Tensor, drop: Drop = whole) -> Tensor:
        """Features [n, E], not normalised, of tokens [n, context]."""
        return self.encode_text_from(*frozen_texts(self.clip, tokens, self.first["text"]), drop)

    def encode_text_from(self, hidden: Tensor, packing: Packing, drop: Drop = whole) -> Tensor:
        """The same from what enters the first changed block."""
        changes = self.changes("text", drop)
        return run_text_blocks(self.clip, hidden, packing, self.first["text"], changes=changes)


def cosines(images: Tensor, texts: Tensor) -> Tensor:
    """The logits [n, n_classes], of features [n, E] and [n_classes, E]."""
    return cosine_logits(FACTOR, F.normalize(images.float(), dim=-1), F.normalize(texts.float(), dim=-1))


def tokens_of(classes: Classes) -> Tensor:
    """[n_classes, context], a prompt of each class."""
    return classes.tokenizer(template_prompts(classes.names, [TEMPLATE]).texts)


def build(clip: Any, n_classes: int, settings: Settings, seed: int) -> Model:
    """The changes as they are before the training; the draws are those of `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Model(clip, settings)
    return model.to(clip.logit_scale.device)


def trained(model: Model) -> nn.Module:
    return model.lora


def fit(
    model: Model, train: LabelledImages, val: LabelledImages, classes: Classes, settings: Settings, run: Run
) -> dict[str, float]:
    training = training_of(model, len(train.labels), classes, settings, run)
    source = crops(model.clip, train, settings.batch_size, run, keep_last=True)
    train_batches(training, with_seeds(source), run)
    return {}


def with_seeds(source: Source) -> Source:
    """With each batch of images the seed of its dropout, from the generator, which a checkpoint restores."""

    def epoch(number: int, generator: torch.Generator) -> Iterator[tuple[tuple[Tensor, int], Tensor]]:
        for images, labels in source(number, generator):
            yield (images, int(torch.randint(2**62, (), generator=generator))), labels

    return epoch


def loss_of(model: Model, classes: Classes) -> Callable[[Tensor, Tensor, Drop], Tensor]:
    """The loss of a batch of images and its labels. What is frozen of the texts is computed once, here."""
    texts = frozen_texts(model.clip, tokens_of(classes), model.first["text"])

    def loss(images: Tensor, labels: Tensor, drop: Drop) -> Tensor:
        features = model.encode_text_from(*texts, drop)
        return F.cross_entropy(cosines(model.encode_image(images, drop), features), labels)

    return loss


def training_of(model: Model, n_images: int, classes: Classes, settings: Settings, run: Run) -> Training:
    rate, parameters = settings.dropout, model.lora.parameters()
    optimizer = torch.optim.AdamW(parameters, settings.lr, weight_decay=settings.weight_decay, fused=True)
    with run.autocast(model.clip.logit_scale.device):
        loss = loss_of(model, classes)

    def dropped(batch: tuple[Tensor, int], labels: Tensor) -> Tensor:
        images, seed = batch
        return loss(images, labels, dropout(rate, seed, labels.device))

    total, steps = settings.steps_per_shot * run.shots, math.ceil(n_images / settings.batch_size)

    def step_lr(step: int) -> float:
        return LAST_LR + (settings.lr - LAST_LR) / 2 * (1 + math.cos(math.pi * step / total))

    schedule = Schedule(math.ceil(total / steps), steps, lambda epoch: step_lr(epoch * steps), total)
    return Training(model.lora, optimizer, schedule, descend(model.lora, optimizer, dropped, run.bf16), step_lr)


@torch.no_grad()
def classifier(
    model: Model, classes: Classes, settings: Settings, trained: bool, progress: Progress = silent
) -> dict[str, Tensor]:
    """weights [n_classes, E], normalised."""
    tokens = tokens_of(classes)
    with progress(len(tokens), "prompts") as done:
        where = model.clip.logit_scale.device
        features = encode_prompts(model.clip, tokens, model.encode_text, where, progress=done)
    return {"weights": F.normalize(features, dim=-1)}


@torch.no_grad()
def logits(model: Model, classifier: dict[str, Tensor], images: Images) -> Tensor:
    hidden = images.after_blocks(model.clip, model.first["image"])
    return cosines(model.encode_image_from(hidden), classifier["weights"])


def detach(model: Model) -> None:
    """Nothing is attached."""
