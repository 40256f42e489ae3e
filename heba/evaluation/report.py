"""Accuracy, per-class accuracy and confusion of predictions."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def classification_report(predicted: Tensor, labels: Tensor, class_names: list[str]) -> dict[str, Any]:
    """n, accuracy in percent, per class too by label, and the confusion matrix (rows are the true classes).

    Args:
        predicted, labels: [n], 0..n_classes-1.
        class_names: by label. A class without images has accuracy None and does not count.
    """
    if len(labels) == 0:
        raise ValueError("no test images for these classes: " + ", ".join(class_names))
    # scikit-learn's confusion_matrix is this line and a second of import, which every evaluation would wait for.
    n = len(class_names)
    confusion = torch.bincount(labels * n + predicted, minlength=n * n).view(n, n).numpy()
    # A list, since two of ImageNet's classes share a name, twice.
    per_class = [100 * float(row[i]) / int(row.sum()) if row.sum() else None for i, row in enumerate(confusion)]
    return {
        "n": len(labels),
        "accuracy": 100 * float(np.trace(confusion)) / len(labels),
        "class_names": class_names,
        "per_class": per_class,
        "confusion": confusion.tolist(),
    }
