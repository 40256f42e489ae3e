"""The regularised linear adapter of ProLIP's paper (Fahes et al. 2024): a linear map of the image feature, kept
near the identity.

With f the feature of an image, A [E, E], and w_k the normalised mean of the normalised prompts of class k:

    logits = exp(logit_scale) cos(f A', w_k),    loss = cross-entropy + lambda sum (A - I)^2

A starts at the identity I, and serves new classes too. The official run on a GPU trains A in fp16, in which steps
of 1e-4 do not move its diagonal; here it is fp32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heba.clip.features import Classes, class_features, cosine_logits
from heba.clip.towers import feature_width
from heba.data.images import Images, LabelledImages
from heba.fit.features import Problem, fit_full_batch, passes
from heba.fit.run import Progress, Run, silent
from heba.methods.reg_linear_adapter.settings import Settings, grid_of, penalty_of


class Adapter(nn.Module):
    """A [E, E]."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.factor = clip.logit_scale.detach().exp()
        self.matrix = nn.Parameter(torch.eye(feature_width(clip)))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix.T


def build(clip: Any, n_classes: int, settings: Settings, seed: int) -> Adapter:
    return Adapter(clip).to(clip.logit_scale.device)


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
    """Gives lr and penalty, chosen on `val` or not."""
    assert train.views is not None
    assert val.views is not None
    where = model.factor.device
    problem = Problem(
        model,
        model.factor,
        classifier(model, classes, settings, True)["weights"].to(where),
        passes(train.views.augmented, train.views.plain).to(where),
        torch.tensor(train.labels, device=where),
    )
    pairs = val.views.plain.to(where), torch.tensor(val.labels, device=where)
    penalty = penalty_of(settings, run.shots)
    return fit_full_batch(problem, pairs, settings.lr, penalty, grid_of(settings), settings.steps, run)


def classifier(
    model: Adapter, classes: Classes, settings: Settings, trained: bool, progress: Progress = silent
) -> dict[str, Tensor]:
    """weights [n_classes, E], normalised."""
    return {"weights": class_features(classes.features, classes.index, len(classes.names))}


@torch.no_grad()
def logits(model: Adapter, classifier: dict[str, Tensor], images: Images) -> Tensor:
    with torch.autocast(images.features.device.type, enabled=False):
        features = F.normalize(model(images.features.float()), dim=-1)
    return cosine_logits(model.factor, features, classifier["weights"])


def detach(model: Adapter) -> None:
    """Nothing is attached."""
