"""CLIP-Adapter (Gao et al. 2021): a bottleneck on the image feature, as the official code has it.

With x the feature of an image, r the ratio, and w_k the normalised mean of the normalised prompts of class k:

    g = r relu(up(relu(down(x)))) + (1 - r) x,    logits = exp(logit_scale) cos(g, w_k)

down and up are linear without bias; the loss is the cross-entropy. The last ReLU lets the adapter only add. The
paper has an adapter of texts too, and a ratio per data set; the code has neither. New classes have their own w_k.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heba.clip.features import Classes, class_features, cosine_logits
from heba.clip.towers import feature_width
from heba.data.images import Images, LabelledImages
from heba.fit.features import passes, shuffled, train_views
from heba.fit.loop import Schedule, dassl_lr, make_optimizer
from heba.fit.run import Progress, Run, silent
from heba.methods.clip_adapter.settings import Settings, epochs_of


class Adapter(nn.Module):
    """Features [n, E] to adapted ones, normalised."""

    def __init__(self, clip: Any, ratio: float, reduction: int) -> None:
        super().__init__()
        dim = feature_width(clip)
        if reduction > dim:
            raise ValueError(f"clip_adapter.reduction: {reduction} leaves nothing of features of width {dim}")
        self.factor, self.ratio = clip.logit_scale.detach().exp(), ratio
        self.down = nn.Linear(dim, dim // reduction, bias=False)
        self.up = nn.Linear(dim // reduction, dim, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            x = features.float()
            adapted = self.up(self.down(x).relu()).relu()
            return F.normalize(self.ratio * adapted + (1 - self.ratio) * x, dim=-1)


def build(clip: Any, n_classes: int, settings: Settings, seed: int) -> Adapter:
    """The adapter as it is before the training; the draws are those of `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Adapter(clip, settings.ratio, settings.reduction)
    return model.to(clip.logit_scale.device)


def trained(model: Adapter) -> nn.Module:
    return model


def fit(
    model: Adapter,
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
    weights = classifier(model, classes, settings, True)["weights"].to(where)
    batches = partial(shuffled, n, settings.batch_size)
    epochs = epochs_of(settings, run.shots)
    steps = max(1, n // settings.batch_size)
    schedule = Schedule(epochs, steps, lambda epoch: dassl_lr(settings.lr, epoch, epochs))
    train_adapter(model, views, labels, weights, settings, schedule, batches, run)
    return {}


def train_adapter(
    model: Adapter,
    views: Tensor,
    labels: Tensor,
    weights: Tensor,
    settings: Settings,
    schedule: Schedule,
    batches: Callable[[torch.Generator], Iterable[Tensor]],
    run: Run,
) -> None:
    """Train on `views` [passes, n, E] (`heba.fit.features.train_views`)."""

    def loss(features: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(cosine_logits(model.factor, model(features), weights), labels)

    optimizer = make_optimizer(model, settings.lr, settings.momentum, settings.weight_decay)
    train_views(model, optimizer, schedule, views, labels, batches, loss, run)


def classifier(
    model: Adapter, classes: Classes, settings: Settings, trained: bool, progress: Progress = silent
) -> dict[str, Tensor]:
    """weights [n_classes, E], normalised."""
    return {"weights": class_features(classes.features, classes.index, len(classes.names))}


@torch.no_grad()
def logits(model: Adapter, classifier: dict[str, Tensor], images: Images) -> Tensor:
    return cosine_logits(model.factor, model(images.features), classifier["weights"])


def detach(model: Adapter) -> None:
    """Nothing is attached."""
