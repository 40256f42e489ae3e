"""MaPLe (Khattak et al. 2023): learned tokens in both towers, coupled, as the official code has them.

With e the token embeddings of "<words> <name>.", and for the blocks j = 0..J-1 of both towers P_j a context
[M, width of texts] and F_j an affine map to the width of images,

    a text enters as [e_0, P_0, e_{1+M}, ...], an image as [CLS, patches, F_0(P_0)];
    before block j > 0, P_j and F_j(P_j) take the places of these M tokens; from block J on they run through;
    logits = exp(logit_scale) cos(I(x), T_k)

for the feature I(x) of an image and T_k of the text of a class. P_0 begins as the first M tokens of `words`, the
others as N(0, 0.02^2); F_1, F_2, ... begin equal. The loss is the cross-entropy, and all P and F are trained.
"""

from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heba.clip.context import (
    Texts,
    check_image_context,
    check_text_context,
    embed_texts,
    encode_deep_texts,
    encode_embedded,
    encode_images,
    image_width,
    text_width,
)
from heba.clip.features import Classes
from heba.data.images import Images, LabelledImages
from heba.fit.batches import Training, crops, descend, train_batches
from heba.fit.loop import dassl_schedule, make_optimizer
from heba.fit.prompts import begin_with_first, class_texts, count_words, draw_prompts, feature_logits
from heba.fit.run import Progress, Run, silent
from heba.fit.work import steps_per_epoch
from heba.methods.maple.settings import Settings


class Prompts(nn.Module):
    """P_j [tokens, text_width], `text`, and F_j, `project`, of the blocks j below `depth`."""

    def __init__(self, depth: int, tokens: int, text_width: int, image_width: int) -> None:
        super().__init__()
        self.text = draw_prompts(depth, tokens, text_width)
        first, later = nn.Linear(text_width, image_width), nn.Linear(text_width, image_width)
        self.project = nn.ModuleList([first, *(deepcopy(later) for _ in range(1, depth))])

    def image(self) -> list[Tensor]:
        """F_j(P_j), [tokens, image_width] each."""
        return [project(vectors) for project, vectors in zip(self.project, self.text, strict=True)]


class Model(nn.Module):
    """A frozen CLIP and the prompts that are learned."""

    def __init__(self, clip: Any, depth: int, tokens: int) -> None:
        super().__init__()
        check_text_context(clip, "maple", depth, tokens)
        check_image_context(clip, "maple", depth)
        self.clip = clip.requires_grad_(False).eval()
        self.learned = Prompts(depth, tokens, text_width(clip), image_width(clip))

    def encode_image(self, images: Tensor) -> Tensor:
        """Features [n, E], not normalised, of preprocessed `images` [n, 3, size, size]."""
        return encode_images(self.clip, images, self.learned.image())

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Features [n, E], not normalised, of `tokens` [n, context], those at 1 to M without effect."""
        return encode_deep_texts(self.clip, embed_texts(self.clip, tokens), list(self.learned.text))

    def weights(self, texts: Texts) -> Tensor:
        """[n, E], the normalised features of `texts`."""
        return F.normalize(encode_deep_texts(self.clip, texts, list(self.learned.text)).float(), dim=-1)


def texts_of(clip: Any, classes: Classes, settings: Settings) -> Texts:
    m = count_words(settings.words) or settings.context
    return class_texts(clip, classes.names, classes.tokenizer, settings.words, m)


def build(clip: Any, n_classes: int, settings: Settings, seed: int) -> Model:
    """The prompts as they are before the training, at random; `fit` puts `words` into their place."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Model(clip, settings.depth, settings.context)
    return model.to(clip.logit_scale.device)


def trained(model: Model) -> nn.Module:
    return model.learned


def fit(
    model: Model, train: LabelledImages, val: LabelledImages, classes: Classes, settings: Settings, run: Run
) -> dict[str, float]:
    if settings.words:
        begin_with_first(model.learned.text[0], model.clip, classes.tokenizer, settings.words)
    source = crops(model.clip, train, settings.batch_size, run)
    train_batches(training_of(model, len(train.labels), classes, settings, run), source, run)
    return {}


def training_of(model: Model, n_images: int, classes: Classes, settings: Settings, run: Run) -> Training:
    texts = texts_of(model.clip, classes, settings)
    optimizer = make_optimizer(model.learned, settings.lr, settings.momentum, settings.weight_decay)
    steps = steps_per_epoch(n_images, settings.batch_size)
    schedule = dassl_schedule(settings.lr, settings.epochs, steps)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        logits = feature_logits(model.clip, model.encode_image(images), model.weights(texts))
        return F.cross_entropy(logits, labels)

    return Training(model.learned, optimizer, schedule, descend(model.learned, optimizer, loss, run.bf16))


@torch.no_grad()
def classifier(
    model: Model, classes: Classes, settings: Settings, trained: bool, progress: Progress = silent
) -> dict[str, Tensor]:
    """weights [n_classes, E], normalised."""
    return {"weights": model.weights(texts_of(model.clip, classes, settings))}


@torch.no_grad()
def logits(model: Model, classifier: dict[str, Tensor], images: Images) -> Tensor:
    features = encode_embedded(model.clip, images.after_blocks(model.clip, 0), model.learned.image())
    return feature_logits(model.clip, features, classifier["weights"])


def detach(model: Model) -> None:
    """Nothing is attached."""
