"""Accuracy, per-class accuracy and confusion of a classifier; encoding of test images."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from heba.images import normalise


def harmonic_mean(base: float, novel: float) -> float:
    """2 b n / (b + n), and 0 when both are 0; any unit, the same for both."""
    return 2 * base * novel / (base + novel) if base + novel > 0 else 0.0


@torch.no_grad()
def encode_images(
    images: np.ndarray,
    encode: Callable[[Tensor], Tensor],
    device: torch.device,
    batch_size: int = 256,
    progress: Callable[[int], object] = lambda n: None,
) -> Tensor:
    """Normalised features [n, E] (fp32, on the CPU) of packed uint8 `images` [n, 3, size, size]."""
    features = []
    for start in range(0, len(images), batch_size):
        batch = torch.from_numpy(np.array(images[start : start + batch_size])).to(device)
        features.append(F.normalize(encode(normalise(batch)).float(), dim=-1).cpu())
        progress(len(batch))
    return torch.cat(features)


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
