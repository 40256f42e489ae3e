"""Learners of the words before a class name, on frozen image features: CoOp, and what came of it; and what they
share with learners of tokens in both towers."""

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
    text_width,
    tokens_with_room,
    with_context,
)
from heba.clip.features import Classes, class_features, cosine_logits
from heba.data.prompts import spoken_class_name

STD = 0.02  # of random vectors


class Learner(nn.Module):
    """A frozen CLIP and the learned context, `learned["ctx"]` [M, width], or [n_classes, M, width]."""

    def __init__(self, clip: Any, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.clip = clip.requires_grad_(False).eval()
        self.learned = nn.ParameterDict({"ctx": torch.empty(*shape, text_width(clip)).normal_(std=STD)})

    def encode(self, texts: Texts) -> Tensor:
        """The normalised features [n, E] of `texts` with the context."""
        embedded = with_context(texts, self.learned["ctx"])
        return F.normalize(encode_texts(self.clip, texts, embedded).float(), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """The same of `tokens` [n, context] that have room for the context."""
        return self.encode(embed_texts(self.clip, tokens))


def build_learner(clip: Any, method: str, shape: tuple[int, ...], seed: int) -> Learner:
    """With a context [*shape, width] at random; `begin_with` puts words into its place.

    Raises ValueError, in the words of `method`, for a backbone whose texts cannot have a context.
    """
    check_text_context(clip, method, context=shape[-1])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Learner(clip, shape)
    return model.to(clip.logit_scale.device)


def count_words(words: str | None) -> int:
    """By the spaces between them, as the official codes count the tokens of a context."""
    return len(words.split()) if words else 0


@torch.no_grad()
def begin_with(model: Learner, tokenizer: Tokenizer, words: str) -> None:
    """Let the context end with the embeddings of `words`; what comes before them is zero."""
    vectors = embed_words(model.clip, tokenizer, words)[: count_words(words)]
    ctx = model.learned["ctx"].zero_()
    ctx[..., ctx.shape[-2] - len(vectors) :, :] = vectors


@torch.no_grad()
def begin_with_first(context: Tensor, clip: Any, tokenizer: Tokenizer, words: str) -> None:
    """Let `context` [M, width] be the embeddings of the first M tokens of `words`; ValueError where these are
    fewer."""
    vectors = embed_words(clip, tokenizer, words)
    if len(vectors) < len(context):
        raise ValueError(f"a context of {len(context)} tokens begins as {words!r}, which has {len(vectors)}")
    context.copy_(vectors[: len(context)])


def draw_prompts(blocks: int, tokens: int, width: int) -> nn.ParameterList:
    """Random vectors [tokens, width] for each of so many blocks."""
    return nn.ParameterList([torch.empty(tokens, width).normal_(std=STD) for _ in range(blocks)])


def class_texts(clip: Any, names: list[str], tokenizer: Tokenizer, words: str | None, m: int) -> Texts:
    """The texts "<words> <name>." of classes, with places before the words for the rest of `m` vectors."""
    spoken = [f"{spoken_class_name(name)}." for name in names]
    texts = [f"{words} {name}" for name in spoken] if words else spoken
    return embed_texts(clip, tokens_with_room(tokenizer, texts, m - count_words(words)))


def feature_logits(clip: Any, features: Tensor, weights: Tensor) -> Tensor:
    """exp(logit_scale) cos(x, t) [n, n_classes], of image features x [n, E] and normalised text features t
    `weights` [n_classes, E]."""
    return cosine_logits(clip.logit_scale.exp(), F.normalize(features.float(), dim=-1), weights)


def teachers(clip: Any, classes: Classes) -> Tensor:
    """What frozen CLIP makes of each class's own prompts, [n_classes, E], normalised."""
    return class_features(classes.features, classes.index, len(classes.names)).to(clip.logit_scale.device)


def forgotten(learned: Tensor, known: Tensor) -> Tensor:
    """1 - mean_k cos(t_k, z_k), 0-dim, of learned text features and their teachers [n_classes, E], normalised."""
    return 1 - (learned * known).sum(dim=-1).mean()
