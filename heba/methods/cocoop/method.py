"""CoCoOp (Zhou et al. 2022): the words before a class name are learned, and shifted by what the image shows, as
the official code has it.

With x the normalised feature of an image, e the token embeddings of "<words> <name>.", P the context [M, width],
and T the frozen text tower,

    b(x) = up(relu(down(x)))
    t_k(x) = T([e_0, P + b(x), e_{1+M}, ...]),    logit_k = exp(logit_scale) cos(x, t_k(x))

where the same b(x) is added to each of the M vectors. P begins as the embeddings of `words`, or as N(0, 0.02^2);
down and up are linear. The loss is the cross-entropy. Each image has a text of its own for each class; the texts
of a batch go through T together. New classes take the same context and bottleneck.
"""

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heba.clip.context import Texts, check_text_context, embed_texts, encode_texts, text_width, with_context
from heba.clip.features import Classes, cosine_logits
from heba.clip.towers import feature_width
from heba.data.images import Images, LabelledImages
from heba.fit.batches import Training, descend, frozen_features, train_batches
from heba.fit.loop import dassl_schedule, make_optimizer
from heba.fit.prompts import Learner, begin_with, class_texts, count_words
from heba.fit.run import Progress, Run, silent
from heba.fit.work import steps_per_epoch
from heba.methods.cocoop.settings import Settings

# Texts that go through the tower at once when images are classified, which bounds the memory.
AT_ONCE = {"cpu": 1024}


class Model(Learner):
    """A frozen CLIP, the learned context `learned["ctx"]` [M, width], and `learned.meta_net`, the bottleneck."""

    def __init__(self, clip: Any, m: int, reduction: int) -> None:
        super().__init__(clip, (m,))
        dim = feature_width(clip)
        if reduction > dim:
            raise ValueError(f"cocoop.reduction: {reduction} leaves nothing of features of width {dim}")
        down, up = nn.Linear(dim, dim // reduction), nn.Linear(dim // reduction, text_width(clip))
        self.learned.add_module("meta_net", nn.Sequential(OrderedDict(linear1=down, relu=nn.ReLU(), linear2=up)))

    def encode_shifted(self, texts: Texts, features: Tensor) -> Tensor:
        """The text features [n, n_classes, E], normalised, of the images of `features` [n, E], normalised.

        `texts`: those of all classes, n times.
        """
        shape = (len(features), len(texts.tokens) // len(features))
        contexts = self.learned["ctx"] + self.learned.get_submodule("meta_net")(features).unsqueeze(1)
        embedded = with_context(texts, contexts.unsqueeze(1).expand(*shape, -1, -1).flatten(0, 1))
        return F.normalize(encode_texts(self.clip, texts, embedded).float(), dim=-1).unflatten(0, shape)

    def logits(self, texts: Texts, features: Tensor) -> Tensor:
        """[n, n_classes], of image `features` [n, E] and the `texts` of all classes, n times."""
        features = F.normalize(features.float(), dim=-1)
        weights = self.encode_shifted(texts, features)
        return cosine_logits(self.clip.logit_scale.exp(), features.unsqueeze(1), weights).squeeze(1)


def room(settings: Settings) -> int:
    """M, the tokens of the context."""
    return count_words(settings.words) or settings.context


def texts_of(model: Model, classes: Classes, settings: Settings) -> Texts:
    return class_texts(model.clip, classes.names, classes.tokenizer, settings.words, room(settings))


def build(clip: Any, n_classes: int, settings: Settings, seed: int) -> Model:
    """The model as it is before the training, its context at random; `fit` puts `words` into its place."""
    check_text_context(clip, "cocoop", context=room(settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Model(clip, room(settings), settings.reduction)
    return model.to(clip.logit_scale.device)


def trained(model: Model) -> nn.Module:
    return model.learned


def fit(
    model: Model, train: LabelledImages, val: LabelledImages, classes: Classes, settings: Settings, run: Run
) -> dict[str, float]:
    if settings.words:
        begin_with(model, classes.tokenizer, settings.words)
    source = frozen_features(model.clip, train, settings.batch_size, settings.views, run)
    train_batches(training_of(model, len(train.labels), classes, settings, run), source, run)
    return {}


def training_of(model: Model, n_images: int, classes: Classes, settings: Settings, run: Run) -> Training:
    texts = texts_of(model, classes, settings).times(min(n_images, settings.batch_size))
    optimizer = make_optimizer(model.learned, settings.lr, settings.momentum, settings.weight_decay)
    schedule = dassl_schedule(settings.lr, settings.epochs, steps_per_epoch(n_images, settings.batch_size))

    def loss(features: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model.logits(texts, features), labels)

    return Training(model.learned, optimizer, schedule, descend(model.learned, optimizer, loss, run.bf16))


@torch.no_grad()
def classifier(
    model: Model, classes: Classes, settings: Settings, trained: bool, progress: Progress = silent
) -> dict[str, Tensor]:
    """tokens [n_classes, length], from which each image gets its own texts; weights [n_classes, E], normalised,
    those of the context alone."""
    texts = texts_of(model, classes, settings)
    return {"tokens": texts.tokens, "weights": model.encode(texts)}


@torch.no_grad()
def logits(model: Model, classifier: dict[str, Tensor], images: Images) -> Tensor:
    n, columns = AT_ONCE.get(images.features.device.type, 8192), []
    for tokens in classifier["tokens"].split(n):
        texts = embed_texts(model.clip, tokens)
        parts = images.features.split(max(1, n // len(tokens)))
        columns.append(torch.cat([model.logits(texts.times(len(part)), part) for part in parts]))
    return torch.cat(columns, dim=1)


def detach(model: Model) -> None:
    """Nothing is attached."""
