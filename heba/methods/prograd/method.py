"""ProGrad (Zhu et al. 2023): CoOp's words, trained by steps that do not work against what CLIP knows, as the
official code has them.

With e the token embeddings of "... <words> <name>.", P the context [M, width], T the frozen text tower, and z_k
the normalised feature of class k's own prompt, by T too,

    t_k = T([e_0, P, e_{1+M}, ...]),    p = exp(logit_scale) cos(x, t_k),    q = exp(logit_scale) cos(x, z_k)

for the feature x of an image. With a the gradient of the cross-entropy of p, and b that of
-T^2 sum_k softmax(q/T)_k log softmax(p/T)_k, both means over the batch, SGD takes

    a                             where a . b >= 0
    a - share (a . b) b / |b|^2   elsewhere

of the whole context. P begins with zeros and ends with the embeddings of `words`, or is N(0, 0.02^2). The code
counts words by spaces, so with a comma among them, which is a token of its own, the last of their tokens stays
fixed behind the context. Its templates begin with the kind, as in "a type of food, a photo of {}."; here `words`
do so, and the teacher reads the data set's template. New classes take the same context.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heba.clip.context import Texts
from heba.clip.features import Classes
from heba.data.images import Images, LabelledImages
from heba.fit.batches import Training, frozen_features, train_batches
from heba.fit.loop import dassl_schedule, make_optimizer
from heba.fit.prompts import Learner, begin_with, build_learner, class_texts, feature_logits, teachers
from heba.fit.run import Progress, Run, silent
from heba.fit.work import steps_per_epoch
from heba.methods.prograd.settings import Settings, epochs_of, share_of


def texts_of(model: Learner, classes: Classes, settings: Settings) -> Texts:
    return class_texts(model.clip, classes.names, classes.tokenizer, settings.words, settings.context)


def build(clip: Any, n_classes: int, settings: Settings, seed: int) -> Learner:
    """The context as it is before the training, at random; `fit` puts `words` into its place."""
    return build_learner(clip, "prograd", (settings.context,), seed)


def trained(model: Learner) -> nn.Module:
    return model.learned


def fit(
    model: Learner, train: LabelledImages, val: LabelledImages, classes: Classes, settings: Settings, run: Run
) -> dict[str, float]:
    if settings.words:
        begin_with(model, classes.tokenizer, settings.words)
    source = frozen_features(model.clip, train, settings.batch_size, settings.views, run)
    train_batches(training_of(model, len(train.labels), classes, settings, run), source, run)
    return {}


def training_of(model: Learner, n_images: int, classes: Classes, settings: Settings, run: Run) -> Training:
    """Its loss is the cross-entropy."""
    optimizer = make_optimizer(model.learned, settings.lr, settings.momentum, settings.weight_decay)
    steps = steps_per_epoch(n_images, settings.batch_size)
    schedule = dassl_schedule(settings.lr, epochs_of(settings, run.shots), steps)
    losses, share = losses_of(model, classes, settings), share_of(settings, run.shots)

    def take(features: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(features.device.type, torch.bfloat16, enabled=run.bf16):
            own, general = losses(features, labels)
        model.learned["ctx"].grad = gradient(model.learned["ctx"], own, general, share)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return own.detach()

    return Training(model.learned, optimizer, schedule, take)


def losses_of(
    model: Learner, classes: Classes, settings: Settings
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The cross-entropy with the labels [n] and that with the teacher, of image features [n, E]."""
    texts, known, t = texts_of(model, classes, settings), teachers(model.clip, classes), settings.temperature

    def losses(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        p = feature_logits(model.clip, features, model.encode(texts))
        q = feature_logits(model.clip, features, known)
        return F.cross_entropy(p, labels), t**2 * F.cross_entropy(p / t, (q / t).softmax(dim=-1))

    return losses


def gradient(ctx: Tensor, own: Tensor, general: Tensor, share: float) -> Tensor:
    """Of the loss `own` to `ctx`, without a `share` of what goes against the gradient of the loss `general`."""
    (b,) = torch.autograd.grad(general, ctx, retain_graph=True)
    (a,) = torch.autograd.grad(own, ctx)
    along = (a * b).sum()
    # No branch on the sign, which would wait for the device.
    return torch.where(along < 0, a - share * along * b / (b * b).sum(), a)


@torch.no_grad()
def classifier(
    model: Learner, classes: Classes, settings: Settings, trained: bool, progress: Progress = silent
) -> dict[str, Tensor]:
    """weights [n_classes, E], normalised."""
    return {"weights": model.encode(texts_of(model, classes, settings))}


@torch.no_grad()
def logits(model: Learner, classifier: dict[str, Tensor], images: Images) -> Tensor:
    return feature_logits(model.clip, images.features, classifier["weights"])


def detach(model: Learner) -> None:
    """Nothing is attached."""
