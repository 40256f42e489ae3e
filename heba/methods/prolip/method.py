"""ProLIP (Fahes et al. 2024): the last projection of the image tower, kept near its start.

With z what the image tower gives to its projection P [width, E], and w_k the normalised mean of the normalised
prompts of class k:

    logits = exp(logit_scale) cos(z P, w_k),    loss = cross-entropy + lambda sum (P - P0)^2

P starts at P0, CLIP's own, and serves new classes too. The official run on a GPU trains P in fp16, in which steps
of 1e-5 do not move its larger entries; here it is fp32. The official search has `shots` val images per class, ours
the few-shot val images that all methods have.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heba.clip.features import Classes, class_features, cosine_logits
from heba.data.images import Images, LabelledImages
from heba.fit.features import Problem, fit_full_batch, passes
from heba.fit.run import Progress, Run, silent
from heba.methods.prolip.settings import Settings, grid_of, penalty_of


class Projection(nn.Module):
    """P [width, E], on features before the projection."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.factor = clip.logit_scale.detach().exp()
        self.matrix = nn.Parameter(clip.visual.proj.detach().float().clone())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


def build(clip: Any, n_classes: int, settings: Settings, seed: int) -> Projection:
    """P as CLIP has it; ValueError where the image tower has no projection of its own."""
    if getattr(clip.visual, "proj", None) is None:
        raise ValueError(
            "prolip trains the projection at the end of the image tower, and that of this backbone has none of "
            "its own: take a vision transformer that open_clip builds itself, such as ViT-B-16-quickgelu, or "
            "leave prolip out of methods"
        )
    return Projection(clip)


def trained(model: Projection) -> nn.Module:
    return model


def fit(
    model: Projection,
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
        passes(train.views.augmented_hidden, train.views.plain_hidden).to(where),
        torch.tensor(train.labels, device=where),
    )
    pairs = val.views.plain_hidden.to(where), torch.tensor(val.labels, device=where)
    penalty = penalty_of(settings, run.shots)
    return fit_full_batch(problem, pairs, settings.lr, penalty, grid_of(settings), settings.steps, run)


def classifier(
    model: Projection, classes: Classes, settings: Settings, trained: bool, progress: Progress = silent
) -> dict[str, Tensor]:
    """weights [n_classes, E], normalised."""
    return {"weights": class_features(classes.features, classes.index, len(classes.names))}


@torch.no_grad()
def logits(model: Projection, classifier: dict[str, Tensor], images: Images) -> Tensor:
    with torch.autocast(images.hidden.device.type, enabled=False):
        features = F.normalize(model(images.hidden.float()), dim=-1)
    return cosine_logits(model.factor, features, classifier["weights"])


def detach(model: Projection) -> None:
    """Nothing is attached."""
