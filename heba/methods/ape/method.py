"""APE (Zhu et al. 2023, "Not all features matter"), without training.

A cache as in Tip-Adapter: K_i is the normalised mean of the raw features of the augmented views of an image
i. With T the zero-shot classifier, a channel's score is

    -similarity mean(a b) + variance var(T)

where a and b run over the texts and keys of two different classes, all pairs, and var is over classes. The
channels with the highest scores are kept; g, K', U are the features of an image, the keys and T on those,
normalised again. The logit of class k, with sums over its training images i, is

    exp(logit_scale) f . T_k + alpha sum of exp(gamma D_i) exp(-beta (1 - g . K'_i))
    D_i = log2((1 + 1e-6) / (p_i + 1e-6)),   p_i the probability of k in softmax(K'_i . U), without a factor

beta, alpha and gamma are the first best of a grid on the val images, in this order of loops. The official
code wants its training images sorted by class, as many of each; any order and numbers do here. It counts the
channels to keep for a width of 1024; here they are a share of the width. It searches on the test images of
ImageNet, and on the whole val split of other data sets; here the search sees the few-shot val images alone.
Without any, or where none is right at any point, the initial values of the settings stand.
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
from heba.methods.ape.settings import Settings


class APE(nn.Module):
    """The cache on the channels [q] that are kept."""

    channels: Tensor

    def __init__(self, clip: Any, n_classes: int, share: float) -> None:
        super().__init__()
        self.factor = clip.logit_scale.detach().exp()
        kept = max(1, round(share * feature_width(clip)))
        self.register_buffer("channels", torch.zeros(kept, dtype=torch.long))
        self.cache = Cache(clip, n_classes, kept)


def build(clip: Any, n_classes: int, settings: Settings, seed: int) -> APE:
    return APE(clip, n_classes, settings.channels).to(clip.logit_scale.device)


def trained(model: APE) -> nn.Module:
    return model


@torch.no_grad()
def fit(
    model: APE, train: LabelledImages, val: LabelledImages, classes: Classes, settings: Settings, run: Run
) -> dict[str, float]:
    assert train.views is not None
    assert val.views is not None
    where, cache = model.factor.device, model.cache
    views = passes(train.views.augmented, train.views.plain).to(where)
    rows = places(torch.tensor(train.labels, device=where), len(classes.names))
    keys, present = cache_keys(views, rows)
    texts = classifier(model, classes, settings, True)["weights"]
    model.channels = scores(keys, present, texts, settings).topk(len(model.channels)).indices
    cache.keys = F.normalize(keys[..., model.channels], dim=-1)
    missed = divergence(cache.keys, F.normalize(texts[:, model.channels], dim=-1))

    def values(gamma: float) -> Tensor:
        return present * torch.exp(gamma * missed)

    features = F.normalize(val.views.plain.to(where), dim=-1)
    labels = torch.tensor(val.labels, device=where, dtype=torch.long)
    plain, kept = cosine_logits(model.factor, features, texts), F.normalize(features[:, model.channels], dim=-1)
    initial = {"alpha": settings.alpha, "beta": settings.beta, "gamma": settings.gamma}
    chosen = search(cache, plain, kept, labels, values, grid(settings), initial, run.progress)
    cache.values = values(chosen["gamma"])
    return chosen


def scores(keys: Tensor, present: Tensor, texts: Tensor, settings: Settings) -> Tensor:
    """The score of every channel [E], of `keys` [S, n_classes, E] where `present` [S, n_classes] is 1."""
    sums = (texts + keys.sum(dim=0)).double()
    numbers = 1 + present.double().sum(dim=0)
    pairs = numbers.sum() ** 2 - (numbers**2).sum()
    similarity = (sums.sum(dim=0) ** 2 - (sums**2).sum(dim=0)) / pairs
    return settings.variance * texts.double().var(dim=0) - settings.similarity * similarity


def divergence(keys: Tensor, texts: Tensor) -> Tensor:
    """D [S, n_classes] of `keys` [S, n_classes, q], by `texts` [n_classes, q]."""
    one = torch.ones((), device=keys.device)
    probabilities = cosine_logits(one, keys, texts).softmax(dim=-1).diagonal(dim1=1, dim2=2)
    return torch.log2((1 + 1e-6) / (probabilities + 1e-6))


def grid(settings: Settings) -> Grid:
    return Grid(
        steps(0.1, settings.alpha_scale, settings.alpha_steps),
        steps(0.1, settings.beta_scale, settings.beta_steps),
        steps(0.0, settings.gamma_scale, settings.gamma_steps),
    )


def classifier(
    model: APE, classes: Classes, settings: Settings, trained: bool, progress: Progress = silent
) -> dict[str, Tensor]:
    """weights [n_classes, E], normalised."""
    weights = class_features(classes.features, classes.index, len(classes.names))
    return {"weights": weights.to(model.factor.device)}


def logits(model: APE, classifier: dict[str, Tensor], images: Images) -> Tensor:
    features = F.normalize(images.features.float(), dim=-1)
    kept = F.normalize(features[:, model.channels], dim=-1)
    return cosine_logits(model.factor, features, classifier["weights"]) + model.cache(kept)


def detach(model: APE) -> None:
    """Nothing is attached."""
