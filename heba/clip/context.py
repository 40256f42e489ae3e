"""Learned vectors in the place of tokens (prompt learning), in the frozen towers.

A text is [e_0, P, e_{1+M}, ...]: M learned vectors P, its context, stand in the place of the tokens behind the
first one, and the positional embedding is added after. An image gets M learned tokens behind its patches, without
positions. Deep prompts put others in the place of these tokens before later blocks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from heba.clip.blocks import Change, Packing, pack
from heba.clip.device import send
from heba.clip.towers import (
    check_inside,
    check_text_inside,
    embed_images,
    pool_type,
    run_image_blocks,
    run_text_blocks,
    text_lengths,
    text_tower,
    whole_context,
)

Tokenizer = Callable[[list[str]], Tensor]
NOTHING: Mapping[int, Tensor] = {}


def text_width(clip: Any) -> int:
    """The width of the text tower, and so of a context."""
    return text_tower(clip).token_embedding.embedding_dim


def image_width(clip: Any) -> int:
    """The width of an image tower that can have learned tokens (`check_image_context`)."""
    return clip.visual.class_embedding.shape[0]


def check_text_context(clip: Any, method: str, blocks: int = 1, context: int = 1) -> None:
    """Raise ValueError, in the words of `method`, where the texts of `clip` cannot have a context, of so many
    tokens, in their first `blocks` blocks."""
    text = text_tower(clip)
    if pool_type(text) == "last":
        raise ValueError(
            f"{method} puts its context behind the token that begins a text, and the texts of this backbone begin "
            "with none; take another backbone or method"
        )
    depth = len(text.transformer.resblocks)
    if blocks > depth:
        raise ValueError(f"{method}: prompts in {blocks} blocks, and the text tower has {depth}")
    if context + 3 > text.context_length:  # the first token, one of a class name, and EOT
        raise ValueError(
            f"{method}: a context of {context} tokens leaves no place for a class name in a text, which has "
            f"{text.context_length}"
        )
    if blocks > 1:
        check_text_inside(clip, method)


def check_image_context(clip: Any, method: str, blocks: int = 1) -> None:
    """Raise ValueError, in the words of `method`, where the images of `clip` cannot have learned tokens in their
    first `blocks` blocks."""
    check_inside(clip, method)
    depth = len(clip.visual.transformer.resblocks)
    if blocks > depth:
        raise ValueError(f"{method}: prompts in {blocks} blocks, and the image tower has {depth}")


@dataclass(frozen=True)
class Texts:
    """Texts that a context goes into.

    Attributes:
        tokens: [n, length], cut behind the last token that is read.
        embeddings: [n, length, width], theirs, without positions.
        packing: of them.
        order: [n, length], of their tokens once the context is in; None: as they are.
    """

    tokens: Tensor
    embeddings: Tensor
    packing: Packing
    order: Tensor | None = None

    def times(self, n: int) -> "Texts":
        """All texts `n` times, one whole list after the other."""
        order = None if self.order is None else self.order.repeat(n, 1)
        return Texts(self.tokens.repeat(n, 1), self.embeddings.repeat(n, 1, 1), self.packing.times(n), order)


@torch.no_grad()
def embed_texts(clip: Any, tokens: Tensor) -> Texts:
    """The texts of `tokens` [n, context], on the device of `clip`."""
    where = clip.logit_scale.device
    text = text_tower(clip)
    packing = pack(text_lengths(clip, tokens), where, whole_context(clip))
    tokens = send(tokens[:, : packing.length], where)
    return Texts(tokens, text.token_embedding(tokens), packing)


def tokens_with_room(tokenizer: Tokenizer, texts: list[str], room: int) -> Tensor:
    """Tokens [n, context] of `texts`, with `room` places behind the first token; a text that is too long is cut,
    and ends as it did. The places hold no word, so a tokenizer that knows few words needs no filler."""
    tokens = tokenizer(texts)
    wide = torch.cat([tokens[:, :1].expand(-1, 1 + room), tokens[:, 1:]], dim=1)[:, : tokens.shape[1]]
    end = tokens.max(dim=1).values
    cut = (wide != end[:, None]).all(dim=1)
    wide[cut, -1] = end[cut]
    return wide


def embed_words(clip: Any, tokenizer: Tokenizer, words: str) -> Tensor:
    """The token embeddings [M, width] of some words, where a context begins."""
    tokens = tokenizer([words])
    m = text_lengths(clip, tokens)[0] - 2
    return embed_texts(clip, tokens).embeddings[0, 1 : 1 + m].clone()


def with_context(texts: Texts, context: Tensor) -> Tensor:
    """[n, length, width], the embeddings with `context` [M, width] or [n, M, width] at positions 1 to M, and then
    in their order."""
    e = texts.embeddings
    context = context.to(e.dtype).expand(len(e), -1, -1)
    e = torch.cat([e[:, :1], context, e[:, 1 + context.shape[1] :]], dim=1)
    return e if texts.order is None else e.take_along_dim(texts.order.unsqueeze(-1), dim=1)


def encode_texts(clip: Any, texts: Texts, embeddings: Tensor, deep: Mapping[int, Tensor] = NOTHING) -> Tensor:
    """Text features [n, E], not normalised, of `texts` with the `embeddings` [n, length, width] for theirs.

    `deep`: by block (0-based), vectors [M, width] or [n, M, width] that take positions 1 to M before it.
    """
    text = text_tower(clip)
    hidden = embeddings + text.positional_embedding[: texts.packing.length].to(embeddings.dtype)
    changes = {
        block: Change(tokens=partial(_into_texts, texts.packing, vectors)) for block, vectors in deep.items()
    }
    return run_text_blocks(clip, hidden, texts.packing, 0, changes=changes)


def encode_deep_texts(clip: Any, texts: Texts, prompts: Sequence[Tensor]) -> Tensor:
    """Text features [n, E], not normalised, of `texts` with a context of its own in each of the first blocks.

    `prompts`: [M, width] each; the first enters with the tokens, the others before blocks 1, 2, ... (0-based)."""
    return encode_texts(clip, texts, with_context(texts, prompts[0]), dict(enumerate(prompts[1:], 1)))


def _into_texts(packing: Packing, vectors: Tensor, x: Tensor) -> Tensor:
    """Packed texts [T, width] with `vectors` [M, width] or [n, M, width] at positions 1 to M of each."""
    n, m = len(packing.eot), vectors.shape[-2]
    first = packing.read - packing.eot
    rows = (first[:, None] + torch.arange(1, 1 + m, device=first.device)).flatten()
    return x.index_copy(0, rows, vectors.to(x.dtype).expand(n, -1, -1).flatten(0, 1))


def encode_images(clip: Any, images: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    """Image features [n, E], not normalised, of preprocessed `images` [n, 3, size, size] with learned tokens.

    `prompts`: [M, width] each; the first enters with the patches, the others before blocks 1, 2, ... (0-based)."""
    return encode_embedded(clip, embed_images(clip, images, 0), prompts)


def encode_embedded(clip: Any, hidden: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    """The same from what enters the first block (`embed_images(clip, images, 0)`)."""
    first = clip.visual.ln_pre(prompts[0]).to(hidden.dtype)
    hidden = torch.cat([hidden, first.expand(hidden.shape[0], -1, -1)], dim=1)
    changes = {
        block: Change(tokens=partial(_into_images, vectors)) for block, vectors in enumerate(prompts[1:], 1)
    }
    return run_image_blocks(clip, hidden, 0, changes)


def _into_images(vectors: Tensor, x: Tensor) -> Tensor:
    """Images [n, length, width] with `vectors` [M, width] as their last tokens."""
    vectors = vectors.to(x.dtype).expand(x.shape[0], -1, -1)
    return torch.cat([x[:, : -vectors.shape[1]], vectors], dim=1)
