"""TaskRes (Yu et al. 2022): a residual on the classifier that prompts make, as the official code has it.

With f the normalised feature of an image, and B_k the mean of the prompts of class k, of which nothing is
normalised:

    logits = exp(logit_scale) f . normalised(B_k + alpha R_k)

R starts at 0; the loss is the cross-entropy. The norm of B_k, near 10, sets how far a step goes. Underscores in
class names are spaces here, as in the other methods; the official code keeps them.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heba.clip.features import Classes, cosine_logits, raw_class_features
from heba.clip.towers import feature_width
from heba.data.images import Images, LabelledImages
from heba.fit.features import passes, shuffled, train_views
from heba.fit.loop import Schedule, dassl_lr
from heba.fit.run import Progress, Run, silent
from heba.methods.task_res.settings import Settings, epochs_of


class Residual(nn.Module):
    """R [n_classes, E], times alpha on the features of classes."""

    def __init__(self, clip: Any, n_classes: int, alpha: float) -> None:
        super().__init__()
        self.factor, self.alpha = clip.logit_scale.detach().exp(), alpha
        self.residual = nn.Parameter(torch.zeros(n_classes, feature_width(clip)))

    def forward(self, base: Tensor) -> Tensor:
        return F.normalize(base + self.alpha * self.residual, dim=-1)


def build(clip: Any, n_classes: int, settings: Settings, seed: int) -> Residual:
    return Residual(clip, n_classes, settings.alpha).to(clip.logit_scale.device)


def trained(model: Residual) -> nn.Module:
    return model


def fit(
    model: Residual,
    train: LabelledImages,
    val: LabelledImages,
    classes: Classes,
    settings: Settings,
    run: Run,
) -> dict[str, float]:
    assert train.views is not None
    where, n = model.factor.device, len(train.labels)
    views = passes(train.views.augmented, train.views.plain).to(where)
    labels = torch.tensor(train.labels, device=where)
    base = raw_class_features(classes.features, classes.index, len(classes.names)).to(where)
    batches = partial(shuffled, n, settings.batch_size)
    epochs = epochs_of(settings, run.shots)
    steps = max(1, n // settings.batch_size)
    schedule = Schedule(epochs, steps, lambda epoch: dassl_lr(settings.lr, epoch, epochs))
    train_residual(model, views, labels, base, settings, schedule, batches, run)
    return {}


def train_residual(
    model: Residual,
    views: Tensor,
    labels: Tensor,
    base: Tensor,
    settings: Settings,
    schedule: Schedule,
    batches: Callable[[torch.Generator], Iterable[Tensor]],
    run: Run,
) -> None:
    """Train on `views` [passes, n, E], with `base` [n_classes, E] (`heba.fit.features.train_views`)."""

    def loss(features: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(cosine_logits(model.factor, F.normalize(features, dim=-1), model(base)), labels)

    optimizer = torch.optim.Adam(model.parameters(), settings.lr, weight_decay=settings.weight_decay, fused=True)
    train_views(model, optimizer, schedule, views, labels, batches, loss, run)


@torch.no_grad()
def classifier(
    model: Residual, classes: Classes, settings: Settings, trained: bool, progress: Progress = silent
) -> dict[str, Tensor]:
    """weights [n_classes, E], normalised."""
    base = raw_class_features(classes.features, classes.index, len(classes.names))
    return {"weights": model(base.to(model.factor.device))}


def logits(model: Residual, classifier: dict[str, Tensor], images: Images) -> Tensor:
    features = F.normalize(images.features.float(), dim=-1)
    return cosine_logits(model.factor, features, classifier["weights"])


def detach(model: Residual) -> None:
    """Nothing is attached."""
