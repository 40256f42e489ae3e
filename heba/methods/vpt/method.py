"""VPT (Jia et al. 2022): learned tokens in the image tower, as the code of MaPLe has them for its baseline.

With Q_j a context [M, width] for each of the blocks j = 0..J-1,

    an image enters as [CLS, patches, Q_0]; before block j > 0, Q_j takes the place of these M tokens;
    from block J on they run through;
    logits = exp(logit_scale) cos(I(x), t_k)

for the feature I(x) of an image and t_k of the text "<words> <name>." by the frozen tower. Q_j begin as
N(0, 0.02^2). The loss is the cross-entropy.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heba.clip.context import check_image_context, encode_embedded, encode_images, image_width
from heba.clip.features import Classes
from heba.clip.towers import encode_text_plain
from heba.data.images import Images, LabelledImages
from heba.data.prompts import spoken_class_name
from heba.fit.batches import Training, crops, descend, train_batches
from heba.fit.loop import dassl_schedule, make_optimizer
from heba.fit.prompts import draw_prompts, feature_logits
from heba.fit.run import Progress, Run, silent
from heba.fit.work import steps_per_epoch
from heba.methods.vpt.settings import Settings


class Model(nn.Module):
    """A frozen CLIP and the contexts Q_j that are learned."""

    def __init__(self, clip: Any, depth: int, tokens: int) -> None:
        super().__init__()
        check_image_context(clip, "vpt", depth)
        self.clip = clip.requires_grad_(False).eval()
        self.learned = nn.ModuleDict({"image": draw_prompts(depth, tokens, image_width(clip))})

    def prompts(self) -> list[Tensor]:
        """Q_j [M, width]."""
        return list(self.learned["image"].parameters())

    def encode_image(self, images: Tensor) -> Tensor:
        """Features [n, E], not normalised, of preprocessed `images` [n, 3, size, size]."""
        return encode_images(self.clip, images, self.prompts())


def weights_of(model: Model, classes: Classes, settings: Settings) -> Tensor:
    """t [n_classes, E], normalised."""
    names = [spoken_class_name(name) for name in classes.names]
    tokens = classes.tokenizer([f"{settings.words} {name}." for name in names])
    return F.normalize(encode_text_plain(model.clip, tokens.to(model.clip.logit_scale.device)).float(), dim=-1)


def build(clip: Any, n_classes: int, settings: Settings, seed: int) -> Model:
    """The contexts as they are before the training; the draws are those of `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Model(clip, settings.depth, settings.context)
    return model.to(clip.logit_scale.device)


def trained(model: Model) -> nn.Module:
    return model.learned


def fit(
    model: Model, train: LabelledImages, val: LabelledImages, classes: Classes, settings: Settings, run: Run
) -> dict[str, float]:
    source = crops(model.clip, train, settings.batch_size, run)
    train_batches(training_of(model, len(train.labels), classes, settings, run), source, run)
    return {}


def training_of(model: Model, n_images: int, classes: Classes, settings: Settings, run: Run) -> Training:
    with run.autocast(model.clip.logit_scale.device):
        weights = weights_of(model, classes, settings)
    optimizer = make_optimizer(model.learned, settings.lr, settings.momentum, settings.weight_decay)
    steps = steps_per_epoch(n_images, settings.batch_size)
    schedule = dassl_schedule(settings.lr, settings.epochs, steps)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(feature_logits(model.clip, model.encode_image(images), weights), labels)

    return Training(model.learned, optimizer, schedule, descend(model.learned, optimizer, loss, run.bf16))


@torch.no_grad()
def classifier(
    model: Model, classes: Classes, settings: Settings, trained: bool, progress: Progress = silent
) -> dict[str, Tensor]:
    """weights [n_classes, E], normalised."""
    return {"weights": weights_of(model, classes, settings)}


@torch.no_grad()
def logits(model: Model, classifier: dict[str, Tensor], images: Images) -> Tensor:
    features = encode_embedded(model.clip, images.after_blocks(model.clip, 0), model.prompts())
    return feature_logits(model.clip, features, classifier["weights"])


def detach(model: Model) -> None:
    """Nothing is attached."""
