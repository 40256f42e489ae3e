"""CoOp (Zhou et al. 2022): the words before a class name are learned, as the official code has them.

With e the token embeddings of "<words> <name>.", P the context [M, width], and T the frozen text tower,

    t_k = T([e_0, P, e_{1+M}, ...]),    logits = exp(logit_scale) cos(x, t_k)

for the feature x of an image. P begins as the embeddings of `words`, or as N(0, 0.02^2). The loss is the
cross-entropy. With the class name in the middle, floor(M/2) vectors come before it and the rest behind; in front,
all come behind it; the full stop stays last. New classes take the same context.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heba.clip.context import (
    Texts,
    Tokenizer,
    check_text_context,
    embed_texts,
    embed_words,
    encode_texts,
    text_lengths,
    text_width,
    tokens_with_room,
    with_context,
)
from heba.clip.features import Classes, cosine_logits
from heba.data.images import Images, LabelledImages
from heba.data.prompts import spoken_class_name
from heba.fit.batches import Training, descend, frozen_features, train_batches
from heba.fit.loop import Schedule, dassl_lr, make_optimizer
from heba.fit.run import Progress, Run, silent
from heba.fit.work import steps_per_epoch
from heba.methods.coop.settings import Settings, epochs_of

STD = 0.02  # of the random vectors


class Model(nn.Module):
    """A frozen CLIP and the learned context, `learned["ctx"]` [M, width], or [n_classes, M, width]."""

    def __init__(self, clip: Any, shape: tuple[int, ...]) -> None:
        super().__init__()
        check_text_context(clip, "coop")
        self.clip = clip.requires_grad_(False).eval()
        self.learned = nn.ParameterDict({"ctx": torch.empty(*shape, text_width(clip)).normal_(std=STD)})

    def encode(self, texts: Texts, order: Tensor | None) -> Tensor:
        """The normalised features [n, E] of `texts`, their tokens in the `order` [n, length] if there is one."""
        embedded = with_context(texts, self.learned["ctx"])
        if order is not None:
            embedded = embedded.take_along_dim(order.unsqueeze(-1), dim=1)
        return F.normalize(encode_texts(self.clip, texts, embedded).float(), dim=-1)

    def logits(self, features: Tensor, texts: Texts, order: Tensor | None) -> Tensor:
        """[n, n_classes], of image `features` [n, E]."""
        features = F.normalize(features.float(), dim=-1)
        return cosine_logits(self.clip.logit_scale.exp(), features, self.encode(texts, order))


def room(settings: Settings) -> int:
    """M, the tokens of a context. Words are counted by the spaces between them."""
    return len(settings.words.split()) if settings.words else settings.context


def texts_of(clip: Any, names: list[str], tokenizer: Tokenizer, settings: Settings) -> tuple[Texts, Tensor | None]:
    """The texts of classes, and the order of their tokens where the name does not come last."""
    m, names = room(settings), [spoken_class_name(name) for name in names]
    if settings.words:
        tokens = tokenizer([f"{settings.words} {name}." for name in names])
    else:
        tokens = tokens_with_room(tokenizer, [f"{name}." for name in names], m)
    texts = embed_texts(clip, tokens)
    if settings.position == "end":
        return texts, None
    before = m // 2 if settings.position == "middle" else 0
    length, orders = texts.packing.length, []
    for n in (n - 2 for n in text_lengths(clip, tokenizer(names))):  # the tokens of a name
        places = list(range(length))
        name = places[1 + m : 1 + m + n]
        orders.append([*places[: 1 + before], *name, *places[1 + before : 1 + m], *places[1 + m + len(name) :]])
    return texts, torch.tensor(orders, device=texts.tokens.device)


def build(clip: Any, n_classes: int, settings: Settings, seed: int) -> Model:
    """The context as it is before the training, at random; `fit` puts `words` into its place."""
    shape = (n_classes, room(settings)) if settings.per_class else (room(settings),)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Model(clip, shape)
    return model.to(clip.logit_scale.device)


def trained(model: Model) -> nn.Module:
    return model.learned


def fit(
    model: Model, train: LabelledImages, val: LabelledImages, classes: Classes, settings: Settings, run: Run
) -> dict[str, float]:
    if settings.words:
        begin_with(model, classes.tokenizer, settings.words)
    source = frozen_features(model.clip, train, settings.batch_size, settings.views, run)
    training = training_of(model, len(train.labels), classes, settings, run)
    train_batches(training, source, run)
    return {}


@torch.no_grad()
def begin_with(model: Model, tokenizer: Tokenizer, words: str) -> None:
    """Let the context begin as the embeddings of `words`."""
    ctx = model.learned["ctx"]
    ctx.copy_(embed_words(model.clip, tokenizer, words)[: ctx.shape[-2]])


def training_of(model: Model, n_images: int, classes: Classes, settings: Settings, run: Run) -> Training:
    texts, order = texts_of(model.clip, classes.names, classes.tokenizer, settings)
    optimizer = make_optimizer(model.learned, settings.lr, settings.momentum, settings.weight_decay)
    epochs = epochs_of(settings, run.shots)
    steps = steps_per_epoch(n_images, settings.batch_size)
    schedule = Schedule(epochs, steps, lambda epoch: dassl_lr(settings.lr, epoch, epochs))

    def loss(features: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model.logits(features, texts, order), labels)

    return Training(model.learned, optimizer, schedule, descend(model.learned, optimizer, loss, run.bf16))


@torch.no_grad()
def classifier(
    model: Model, classes: Classes, settings: Settings, trained: bool, progress: Progress = silent
) -> dict[str, Tensor]:
    """weights [n_classes, E], normalised. ValueError for new classes of a context per class."""
    if settings.per_class and not trained:
        raise ValueError("coop.per_class: new classes have no context; set it to false")
    texts, order = texts_of(model.clip, classes.names, classes.tokenizer, settings)
    return {"weights": model.encode(texts, order)}


@torch.no_grad()
def logits(model: Model, classifier: dict[str, Tensor], images: Images) -> Tensor:
    features = F.normalize(images.features.float(), dim=-1)
    return cosine_logits(model.clip.logit_scale.exp(), features, classifier["weights"])


def detach(model: Model) -> None:
    """Nothing is attached."""
