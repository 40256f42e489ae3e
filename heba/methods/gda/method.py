"""GDA (Wang et al. 2024, "A hard-to-beat baseline for training-free CLIP-based adaptation").

A sample f is the normalised feature of an augmented view of an image; there are N of them, of E channels.
With T_k the zero-shot classifier, m_k the mean of the samples of class k and K classes:

    logits = exp(logit_scale) f . T_k + alpha (m_k Q f - m_k Q m_k / 2 - log K)

    pooled    Q = E inverse((N - 1) S + trace(S) I), S the samples' scatter around their means over N - 1
    mean      Q = pseudo-inverse(mean over k of the covariance of class k), for the base classes of base_to_novel

alpha is the first best on the val images. A class that it was not trained on, with the text feature u, has as
samples the n training samples that are nearest to u (64, or all where there are fewer), and c copies of u
(16) in its mean:

    m = (their sum + c u) / (n + c)        C = sum (f - u)(f - u)' / (n - 1)
    Q = mean over the new classes of E inverse((n - 1) C + trace(C) I)

with the same alpha. The official code does so for the novel classes of base_to_novel; it has no
cross_dataset, where the same rule is used here. That is why the training samples are kept.

The official code chooses alpha on the test images of ImageNet, and on the whole val split of the other data
sets; here it sees the few-shot val images alone. Sums and inverses are in float64, and the pseudo-inverse
drops what it drops in the official fp32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heba.clip.features import Classes, class_features, cosine_logits
from heba.clip.towers import feature_width
from heba.data.images import Images, LabelledImages
from heba.fit.features import passes
from heba.fit.run import Progress, Run, silent
from heba.fit.search import accuracy, first_best
from heba.methods.gda.settings import Settings


class GDA(nn.Module):
    """samples [N, E]; weights [n_classes, E] (m_k Q) and bias [n_classes] of the training's classes; alpha."""

    samples: Tensor
    weights: Tensor
    bias: Tensor
    alpha: Tensor

    def __init__(self, clip: Any, n_classes: int, alpha: float) -> None:
        super().__init__()
        self.factor = clip.logit_scale.detach().exp()
        self.register_buffer("samples", torch.empty(0, feature_width(clip)))
        self.register_buffer("weights", torch.zeros(n_classes, feature_width(clip)))
        self.register_buffer("bias", torch.zeros(n_classes))
        self.register_buffer("alpha", torch.tensor(alpha))


def build(clip: Any, n_classes: int, settings: Settings, seed: int) -> GDA:
    return GDA(clip, n_classes, settings.alpha).to(clip.logit_scale.device)


def trained(model: GDA) -> nn.Module:
    return model


@torch.no_grad()
def fit(
    model: GDA, train: LabelledImages, val: LabelledImages, classes: Classes, settings: Settings, run: Run
) -> dict[str, float]:
    assert train.views is not None
    assert val.views is not None
    where = model.factor.device
    views = passes(train.views.augmented, train.views.plain).to(where)
    labels = torch.tensor(train.labels, device=where).repeat(len(views))
    model.samples = F.normalize(views.flatten(0, 1), dim=-1)
    means, precision = gaussians(model.samples, labels, len(classes.names), settings.covariance)
    weights, bias = discriminants(means, precision)
    model.weights.copy_(weights)
    model.bias.copy_(bias)
    images, targets = Images.of_features(val.views.plain.to(where), torch.empty(0)), torch.tensor(val.labels)

    def score(alpha: float) -> float:
        model.alpha.fill_(alpha)
        found = logits(model, classifier(model, classes, settings, True), images)
        return accuracy(found, targets.to(where))

    best = first_best(settings.alphas, score)
    chosen = best if score(best) else settings.alpha
    model.alpha.fill_(chosen)
    return {"alpha": chosen}


def gaussians(samples: Tensor, labels: Tensor, n_classes: int, covariance: str) -> tuple[Tensor, Tensor]:
    """The means [n_classes, E] of the classes of `samples` [N, E] and their common Q [E, E], in float64."""
    n, width = samples.shape
    means = samples.new_zeros(n_classes, width, dtype=torch.float64)
    scatter = samples.new_zeros(width, width, dtype=torch.float64)
    for k in range(n_classes):
        own = samples[labels == k].double()
        means[k] = own.mean(dim=0)
        own -= means[k]
        scatter += own.T @ own / (max(1, len(own) - 1) * n_classes if covariance == "mean" else 1)
    if covariance == "mean":
        return means, torch.linalg.pinv(scatter, rtol=width * torch.finfo(torch.float32).eps, hermitian=True)
    return means, ridge_inverse(scatter, n)


def ridge_inverse(scatter: Tensor, n: int) -> Tensor:
    """E inverse((n - 1) S + trace(S) I), of (n - 1) S = `scatter` [E, E], a sum over n samples; 0 for a sum of 0,
    as its pseudo-inverse is."""
    width, trace = len(scatter), scatter.trace() / max(1, n - 1)
    if trace == 0:
        return scatter
    return width * torch.linalg.inv(scatter + trace * torch.eye(width, dtype=scatter.dtype, device=scatter.device))


def discriminants(means: Tensor, precision: Tensor) -> tuple[Tensor, Tensor]:
    """m_k Q [n_classes, E], and -m_k Q m_k / 2 - log K [n_classes]."""
    weights = means @ precision
    return weights, -(weights * means).sum(dim=1) / 2 - torch.tensor(len(means), dtype=means.dtype).log()


def new_gaussians(samples: Tensor, texts: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """The means [n_classes, E] and the common Q [E, E], in float64, of classes that there are no images of, by the
    training's `samples` [N, E] and the `texts` [n_classes, E] that name them, all normalised."""
    n, width = min(settings.neighbours, len(samples)), samples.shape[1]
    means, precision = texts.double(), samples.new_zeros(width, width, dtype=torch.float64)
    for k, text in enumerate(texts):
        similarity = cosine_logits(torch.ones_like(text[0]), text[None], samples)[0]
        nearest = samples[similarity.topk(n).indices].double()
        means[k] = (nearest.sum(dim=0) + settings.text_copies * means[k]) / (n + settings.text_copies)
        nearest -= text.double()
        precision += ridge_inverse(nearest.T @ nearest, n) / len(texts)
    return means, precision


@torch.no_grad()
def classifier(
    model: GDA, classes: Classes, settings: Settings, trained: bool, progress: Progress = silent
) -> dict[str, Tensor]:
    """weights [n_classes, E], normalised; gaussian [n_classes, E] and bias [n_classes], times alpha."""
    texts = class_features(classes.features, classes.index, len(classes.names)).to(model.samples.device)
    weights, bias = model.weights, model.bias
    if not trained:
        weights, bias = discriminants(*new_gaussians(model.samples, texts, settings))
    return {"weights": texts, "gaussian": (model.alpha * weights).float(), "bias": (model.alpha * bias).float()}


def logits(model: GDA, classifier: dict[str, Tensor], images: Images) -> Tensor:
    features = F.normalize(images.features.float(), dim=-1)
    one = torch.ones_like(model.factor)
    gaussian = cosine_logits(one, features, classifier["gaussian"]) + classifier["bias"]
    return cosine_logits(model.factor, features, classifier["weights"]) + gaussian


def detach(model: GDA) -> None:
    """Nothing is attached."""
