"""Features of images and of prompts, and the classifier that prompts make."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from heba.clip.device import sent
from heba.clip.preprocess import Preprocess, normalise
from heba.clip.towers import cut_texts, image_hidden, text_lengths


@dataclass(frozen=True)
class Classes:
    """What frozen CLIP makes of class names.

    Attributes:
        names: by label.
        tokens: [n_prompts, length], of all prompts, class by class.
        index: [n_prompts], the class of every prompt, ascending.
        features: [n_prompts, E], of the frozen text tower, not normalised.
        tokenizer: of the backbone, texts to tokens [n, context], for a method that has prompts of its own.
    """

    names: list[str]
    tokens: Tensor
    index: Tensor
    features: Tensor
    tokenizer: Callable[[list[str]], Tensor]

    def select(self, labels: range) -> "Classes":
        """The classes of `labels` alone, counted from 0."""
        rows = (self.index >= labels.start) & (self.index < labels.stop)
        names = [self.names[label] for label in labels]
        return Classes(
            names, self.tokens[rows], self.index[rows] - labels.start, self.features[rows], self.tokenizer
        )


# A CPU gains nothing from larger batches, which leave its cache.
BATCH_SIZE = {"cpu": 64}


@torch.no_grad()
def encode_images(
    images: np.ndarray,
    preprocess: Preprocess,
    encode: Callable[[Tensor], Tensor],
    device: torch.device,
    batch_size: int | None = None,
    progress: Callable[[int], object] = lambda n: None,
) -> Tensor:
    """What `encode` gives for preprocessed images, [n, width] (fp32, on the CPU), of packed uint8 `images`
    [n, 3, size, size].

    An array from `heba.data.images.open_packed` is read without a copy.
    """
    features = []
    batch_size = batch_size or BATCH_SIZE.get(device.type, 256)
    starts = range(0, len(images), batch_size)
    for batch in sent((torch.from_numpy(images[i : i + batch_size]) for i in starts), device):
        features.append(encode(normalise(batch, preprocess)).float())
        progress(len(batch))
    return torch.cat(features).cpu() if features else torch.zeros(0, 1)


def image_features(clip: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Features [n, E] of preprocessed images by the frozen tower, and the same before the projection [n, width];
    [n, 0] where the tower has no projection of its own."""
    hidden = image_hidden(clip, pixels)
    if hidden is None:
        features = clip.encode_image(pixels)
        return features, features[:, :0]
    return hidden @ clip.visual.proj, hidden


@torch.no_grad()
def encode_prompts(
    clip: Any,
    tokens: Tensor,
    encode: Callable[[Tensor], Tensor],
    device: torch.device,
    batch_size: int | None = None,
    progress: Callable[[int], object] = lambda n: None,
    reach: int = 0,
) -> Tensor:
    """Text features [n, E] (fp32, on the CPU, not normalised) of `tokens` [n, context].

    Equal prompts are encoded once, and prompts of like length together, cut `reach` behind the longest, where the
    tower of `clip` allows it.
    """
    different, which = torch.unique(tokens, dim=0, return_inverse=True)
    lengths = torch.tensor(text_lengths(clip, different))
    order = lengths.argsort(stable=True)
    features = []
    for part in order.split(batch_size or BATCH_SIZE.get(device.type, 256)):
        features.append(encode(cut_texts(clip, different[part], reach)).float())
        progress(len(part))
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    return torch.cat(features).cpu()[back][which]


def class_features(features: Tensor, class_index: Tensor, n_classes: int) -> Tensor:
    """The classifier [n_classes, E]: per class the mean of its normalised prompt features, normalised again.

    Args:
        features: [n_prompts, E], as the text tower gives them.
        class_index: [n_prompts], the class of every prompt; every class needs at least one.
    """
    features = F.normalize(features.float(), dim=-1)
    total = torch.zeros(n_classes, features.shape[1], device=features.device)
    total.index_add_(0, class_index, features)
    count = torch.bincount(class_index, minlength=n_classes).unsqueeze(1)
    if (count == 0).any():
        missing = (count[:, 0] == 0).nonzero().flatten().tolist()
        raise ValueError(f"classes {missing} have no prompt")
    return F.normalize(total / count, dim=-1)


def raw_class_features(features: Tensor, class_index: Tensor, n_classes: int) -> Tensor:
    """[n_classes, E], per class the mean of its prompt features as the text tower gives them, not normalised.

    Args: as `class_features` has them.
    """
    total = torch.zeros(n_classes, features.shape[1], device=features.device)
    total.index_add_(0, class_index, features.float())
    return total / torch.bincount(class_index, minlength=n_classes).unsqueeze(1)


def cosine_logits(factor: Tensor | float, features: Tensor, weights: Tensor) -> Tensor:
    """factor * features @ weights.T [..., n, n_classes] in fp32, also under autocast, of normalised `features`
    [..., n, E] and `weights` [..., n_classes, E]."""
    with torch.autocast(features.device.type, enabled=False):
        return factor * features.float() @ weights.float().mT
