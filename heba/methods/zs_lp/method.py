"""ZS-LP (Silva-Rodriguez et al. 2024): a linear probe that starts at zero-shot CLIP.

With f the normalised feature of an image, and P_k the prototype of class k, the logits are
exp(logit_scale) f . normalised(P_k). P starts at B, B_k the mean of the prompts of class k, of which nothing is
normalised; the loss is the cross-entropy. This is CLAP without its penalty, and trained as CLAP is.
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
from heba.methods.zs_lp.settings import Settings


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
        penalty=False,
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
