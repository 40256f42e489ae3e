"""Zero-shot CLIP (Radford et al. 2021), by a template, an ensemble of templates, descriptions (CuPL) or both.

With f the normalised feature of an image, and w_k the normalised mean of the normalised features of the prompts of
class k, the logits are exp(logit_scale) f . w_k. Nothing is trained.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from heba.clip.features import Classes, class_features, cosine_logits
from heba.data.images import Images, LabelledImages
from heba.fit.run import Progress, Run, silent
from heba.methods.zero_shot.settings import Settings


class FrozenCLIP(nn.Module):
    """CLIP as it is; it has no parameters of its own."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.factor = clip.logit_scale.detach().exp()


def build(clip: Any, n_classes: int, settings: Settings, seed: int) -> FrozenCLIP:
    return FrozenCLIP(clip)


def trained(model: FrozenCLIP) -> nn.Module:
    return model


def fit(
    model: FrozenCLIP,
    train: LabelledImages,
    val: LabelledImages,
    classes: Classes,
    settings: Settings,
    run: Run,
) -> dict[str, float]:
    """Nothing is trained."""
    return {}


def classifier(
    model: FrozenCLIP, classes: Classes, settings: Settings, trained: bool, progress: Progress = silent
) -> dict[str, Tensor]:
    """weights [n_classes, E], normalised."""
    return {"weights": class_features(classes.features, classes.index, len(classes.names))}


def logits(model: FrozenCLIP, classifier: dict[str, Tensor], images: Images) -> Tensor:
    features = F.normalize(images.features.float(), dim=-1)
    return cosine_logits(model.factor, features, classifier["weights"])


def detach(model: FrozenCLIP) -> None:
    """Nothing is attached."""
