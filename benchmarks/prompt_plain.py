"""The plain path of prompt learners: their losses the way the official codes compute them, on the frozen CLIP and
the trained tensors of ours.

Tokens first ([length, batch, width]), all 77 tokens of a text, every block whole, and the images of each step
through the tower. Where the texts alone are learned, no graph is kept of the images: no weight of CLIP is
trained.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import plain
from heba.clip.towers import text_tower

Tokenizer = Callable[[list[str]], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]  # of preprocessed images [n, 3, size, size] and their labels [n]


def run_blocks(blocks: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    """All blocks, for `x` [length, batch, width]."""
    for block in blocks:
        x = plain.run_block(block, x, None, None, mask, None)
    return x


def encode_text(clip: Any, tokens: Tensor, embedded: Tensor) -> Tensor:
    """Text features [n, E] of `tokens` [n, 77] with the embeddings [n, 77, width] for theirs."""
    text = text_tower(clip)
    x = (embedded + text.positional_embedding).permute(1, 0, 2)
    x = text.ln_final(run_blocks(text.transformer.resblocks, x, text.attn_mask).permute(1, 0, 2))
    return x[torch.arange(len(tokens), device=x.device), tokens.argmax(dim=-1)] @ text.text_projection


def encode_image(clip: Any, images: Tensor) -> Tensor:
    """Image features [n, E] of preprocessed `images` [n, 3, size, size]."""
    visual = clip.visual
    x = run_blocks(visual.transformer.resblocks, visual._embeds(images).permute(1, 0, 2), None)
    return visual.ln_post(x[0]) @ visual.proj


def logits(clip: Any, images: Tensor, texts: Tensor) -> Tensor:
    """exp(logit_scale) cos(x, t) [n, n_classes], of features [n, E] and [n_classes, E]."""
    return clip.logit_scale.exp() * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T


@torch.no_grad()
def embed(clip: Any, tokenizer: Tokenizer, names: list[str], settings: Any) -> tuple[Tensor, Tensor]:
    """The tokens [n, 77] of "<words> <name>.", or of an X for each vector, and their embeddings [n, 77, width]."""
    words = settings.words or " ".join("X" * settings.context)
    tokens = tokenizer([f"{words} {name}." for name in names]).to(clip.logit_scale.device)
    return tokens, text_tower(clip).token_embedding(tokens)


def with_context(embedded: Tensor, context: Tensor) -> Tensor:
    """The embeddings [n, 77, width] with `context` [M, width] at positions 1 to M."""
    context = context.expand(len(embedded), -1, -1)
    return torch.cat([embedded[:, :1], context, embedded[:, 1 + context.shape[1] :]], dim=1)


def coop(clip: Any, learned: Any, names: list[str], tokenizer: Tokenizer, settings: Any) -> Loss:
    tokens, embedded = embed(clip, tokenizer, names, settings)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        texts = encode_text(clip, tokens, with_context(embedded, learned["ctx"]))
        return F.cross_entropy(logits(clip, encode_image(clip, images), texts), labels)

    return loss


def cocoop(clip: Any, learned: Any, names: list[str], tokenizer: Tokenizer, settings: Any) -> Loss:
    tokens, embedded = embed(clip, tokenizer, names, settings)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        found = []
        for x in F.normalize(encode_image(clip, images), dim=-1).split(1):
            context = learned["ctx"] + learned.meta_net(x)
            found.append(logits(clip, x, encode_text(clip, tokens, with_context(embedded, context))))
        return F.cross_entropy(torch.cat(found), labels)

    return loss


# By the name of a method, from its frozen CLIP, its trained module, and the names of the classes.
LOSSES: dict[str, Callable[[Any, Any, list[str], Tokenizer, Any], Loss]] = {"coop": coop, "cocoop": cocoop}
