"""CLAP (Silva-Rodriguez et al. 2024): prototypes that are kept near zero-shot CLIP's, as the official code does.

With f the normalised feature of an image, and P_k the prototype of class k, the logits are
exp(logit_scale) f . normalised(P_k). P starts at B, B_k the mean of the prompts of class k, of which nothing is
normalised. The loss is

    CE + mean_k lambda_k |P_k - B_k|^2

with lambda_k the mean probability that zero-shot CLIP gives class k over all views of its images. It stays as it
is: the official code never takes its step. An epoch is as many batches as the images make without their views,
drawn from the views of all: officially 20 of each image, here those of the stage `views`. No validation image is
read: the settings are the same everywhere.
Underscores in class names are spaces here, as in the other methods; the official code keeps them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heba.clip.features import Classes, cosine_logits, raw_class_features
from heba.clip.towers import feature_width
from heba.data.images import Images, LabelledImages
from heba.fit.features import passes
from heba.fit.prototypes import Pool, Prototypes, fit_prototypes
from heba.fit.run import Progress, Run, silent
from heba.methods.clap.settings import Settings


def build(clip: Any, n_classes: int, settings: Settings, seed: int) -> Prototypes:
    return Prototypes(clip.logit_scale.detach().exp(), n_classes, feature_width(clip))


def trained(model: Prototypes) -> nn.Module:
    return model


def fit(
    model: Prototypes,
    train: LabelledImages,
    val: LabelledImages,
    classes: Classes,
    settings: Settings,
    run: Run,
) -> dict[str, float]:
    """Nothing is chosen on `val`."""
    assert train.views is not None
    where = model.factor.device
    pool = Pool.of(
        passes(train.views.augmented, train.views.plain).to(where), torch.tensor(train.labels, device=where)
    )
    fit_prototypes(
        model,
        raw_class_features(classes.features, classes.index, len(classes.names)).to(where),
        pool,
        penalty=True,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        lr=settings.lr,
        momentum=settings.momentum,
        run=run,
    )
    return {}


def classifier(
    model: Prototypes, classes: Classes, settings: Settings, trained: bool, progress: Progress = silent
) -> dict[str, Tensor]:
    """weights [n_classes, E], normalised."""
    return {"weights": F.normalize(model.prototypes.detach(), dim=-1)}


def logits(model: Prototypes, classifier: dict[str, Tensor], images: Images) -> Tensor:
    features = F.normalize(images.features.float(), dim=-1)
    return cosine_logits(model.factor, features, classifier["weights"])


def detach(model: Prototypes) -> None:
    """Nothing is attached."""
