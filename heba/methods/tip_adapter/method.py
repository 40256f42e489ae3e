"""Tip-Adapter (Zhang et al. 2022), without training.

The cache has a key per training image, K_i: the normalised mean of the raw features of its augmented views.
With f the normalised feature of an image and T the zero-shot classifier, the logit of class k is

    exp(logit_scale) f . T_k + alpha sum over the training images i of class k of exp(-beta (1 - f . K_i))

beta and alpha are the first best of a grid on the val images, beta in the outer loop. Paper and code have the
two names swapped; these are the code's. The official code searches on the test images of ImageNet, and on the
whole val split of other data sets; here the search sees the few-shot val images alone. Without any, or where
none is right at any point, the initial values of the settings stand; officially the cache then counts
nothing.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heba.clip.features import Classes, class_features, cosine_logits
from heba.clip.towers import feature_width
from heba.data.images import Images, LabelledImages
from heba.fit.cache import Cache, Grid, cache_keys, places, search, steps
from heba.fit.features import passes
from heba.fit.run import Progress, Run, silent
from heba.methods.tip_adapter.settings import Settings


def build(clip: Any, n_classes: int, settings: Settings, seed: int) -> Cache:
    return Cache(clip, n_classes, feature_width(clip)).to(clip.logit_scale.device)


def trained(model: Cache) -> nn.Module:
    return model


@torch.no_grad()
def fit(
    model: Cache, train: LabelledImages, val: LabelledImages, classes: Classes, settings: Settings, run: Run
) -> dict[str, float]:
    assert train.views is not None
    assert val.views is not None
    where = model.factor.device
    views = passes(train.views.augmented, train.views.plain).to(where)
    rows = places(torch.tensor(train.labels, device=where), len(classes.names))
    model.keys, model.values = cache_keys(views, rows)
    features = F.normalize(val.views.plain.to(where), dim=-1)
    labels = torch.tensor(val.labels, device=where, dtype=torch.long)
    plain = cosine_logits(model.factor, features, classifier(model, classes, settings, True)["weights"])
    initial = {"alpha": settings.alpha, "beta": settings.beta}
    return search(model, plain, features, labels, lambda _: model.values, grid(settings), initial, run.progress)


def grid(settings: Settings) -> Grid:
    alphas = steps(0.1, settings.alpha_scale, settings.alpha_steps)
    return Grid(alphas, steps(0.1, settings.beta_scale, settings.beta_steps), [0.0])


def classifier(
    model: Cache, classes: Classes, settings: Settings, trained: bool, progress: Progress = silent
) -> dict[str, Tensor]:
    """weights [n_classes, E], normalised."""
    weights = class_features(classes.features, classes.index, len(classes.names))
    return {"weights": weights.to(model.factor.device)}


def logits(model: Cache, classifier: dict[str, Tensor], images: Images) -> Tensor:
    features = F.normalize(images.features.float(), dim=-1)
    return cosine_logits(model.factor, features, classifier["weights"]) + model(features)


def detach(model: Cache) -> None:
    """Nothing is attached."""
