"""Accuracy, per-class accuracy and confusion of a classifier; encoding of test images."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from heba.images import Preprocess, normalise
from heba.towers import cut_texts, text_lengths

# A CPU gains nothing from larger batches, which leave its cache.
BATCH_SIZE = {"cpu": 64}


@torch.no_grad()
def encode_images(
    images: np.ndarray,
    preprocess: Preprocess,
    encode: Callable[[Tensor], Tensor],
    device: torch.device,
    rows: np.ndarray | None = None,
    batch_size: int | None = None,
    progress: Callable[[int], object] = lambda n: None,
) -> Tensor:
    """Normalised features [n, E] (fp32, on the CPU) of packed uint8 `images` [n, 3, size, size], or of `rows`.

    An array from `heba.images.open_packed` is read without a copy.
    """
    features = []
    batch_size = batch_size or BATCH_SIZE.get(device.type, 256)
    n = len(images) if rows is None else len(rows)
    for start in range(0, n, batch_size):
        part = slice(start, start + batch_size)
        batch = torch.from_numpy(images[part] if rows is None else images[rows[part]]).to(device)
        features.append(F.normalize(encode(normalise(batch, preprocess)).float(), dim=-1))
        progress(len(batch))
    return torch.cat(features).cpu() if features else torch.zeros(0, 1)


@torch.no_grad()
def encode_prompts(
    clip: Any,
    tokens: Tensor,
    encode: Callable[[Tensor], Tensor],
    device: torch.device,
    batch_size: int | None = None,
    progress: Callable[[int], object] = lambda n: None,
) -> Tensor:
    """Text features [n, E] (fp32, on the CPU, not normalised) of `tokens` [n, context].

    Equal prompts are encoded once, and prompts of like length together, cut after the longest, where the tower
    of `clip` allows it.
    """
    different, which = torch.unique(tokens, dim=0, return_inverse=True)
    lengths = torch.tensor(text_lengths(clip, different))
    order = lengths.argsort(stable=True)
    features = []
    for part in order.split(batch_size or BATCH_SIZE.get(device.type, 256)):
        batch = cut_texts(clip, different[part]).to(device)
        features.append(encode(batch).float())
        progress(len(part))
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    return torch.cat(features).cpu()[back][which]


def classification_report(
    image_features: Tensor, classifier: Tensor, labels: Tensor, class_names: list[str]
) -> dict[str, Any]:
    """Accuracy in percent, per class too by label, and the confusion matrix (rows are the true classes).

    Args:
        image_features: [n, E], normalised.
        classifier: [n_classes, E], normalised.
        labels: [n], 0..n_classes-1.
        class_names: by label. A class without images has accuracy None and does not count.
    """
    if len(labels) == 0:
        raise ValueError("no test images for these classes: " + ", ".join(class_names))
    predicted = (image_features @ classifier.T).argmax(dim=-1)
    # scikit-learn's confusion_matrix is this line and a second of import, which every evaluation would wait for.
    n = len(class_names)
    confusion = torch.bincount(labels * n + predicted, minlength=n * n).view(n, n).numpy()
    # A list, since two of ImageNet's classes share a name, twice.
    per_class = [100 * float(row[i]) / int(row.sum()) if row.sum() else None for i, row in enumerate(confusion)]
    return {
        "accuracy": 100 * float(np.trace(confusion)) / len(labels),
        "per_class": per_class,
        "confusion": confusion.tolist(),
    }
