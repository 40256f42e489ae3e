"""The two towers of a model of open_clip: where their adapters go, and how they are run.

Texts under a causal mask are read at EOT and depend on nothing behind it, so they are cut there and packed without
padding. Where attention goes both ways, as in SigLIP, all of the context counts, and nothing is cut. In both, the
last block runs for the token that is read alone, as it does in an image tower that is read at CLS. The other image
towers run as the model runs them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from heba.clip.architecture import SUPPORTED
from heba.clip.blocks import PLAIN, Change, Packing, is_plain, pack, run_block, run_last_block, take_rows
from heba.clip.device import send


@dataclass(frozen=True)
class Tower:
    """Where the adapters of a tower go.

    Attributes:
        blocks: the transformer's blocks.
        norms: per block, the layer whose output enters the attention.
        linears: per block, the first linear layer of the MLP, whose output enters the activation. In a gated MLP
            (EVA02, ViTamin) it is the gate's, which alone has an activation; the factor beside it stays plain.
        grid: rows and columns of the patches, which are the last tokens of an image; None for texts.
        reads_cls: whether nothing but CLS is read of an image after the last block, so that what an adapter in its
            MLP would make of the patches has no effect.
    """

    blocks: list[Any]
    norms: list[nn.Module]
    linears: list[nn.Linear]
    grid: tuple[int, int] | None = None
    reads_cls: bool = False

    @property
    def widths(self) -> tuple[int, int]:
        """Widths of the two hooked outputs: of the norm, and of the first linear layer."""
        return self.linears[0].in_features, self.linears[0].out_features


def check_towers(clip: Any) -> None:
    """Raise ValueError where the adapters, or the way texts are run here, do not fit a tower of `clip`."""
    image_blocks(clip)
    text_blocks(clip)


def image_blocks(clip: Any) -> Tower:
    """The image tower of `clip`; ValueError where adapters do not fit."""
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    visual = clip.visual
    if type(visual) is VisionTransformer:
        if visual.output_tokens:
            raise ValueError(f"the image tower gives its tokens beside the feature; HeBA takes {SUPPORTED}")
        blocks = list(visual.transformer.resblocks)
        rows, columns = visual.grid_size
        norms, linears = [b.ln_1 for b in blocks], [b.mlp.c_fc for b in blocks]
        return Tower(blocks, norms, linears, (rows, columns), reads_cls=_is_read_at_cls(visual))
    if type(visual) is not TimmModel:
        raise ValueError(f"the image tower is a {type(visual).__name__}; HeBA takes {SUPPORTED}")
    return _timm_blocks(visual.trunk)


def _is_read_at_cls(visual: Any) -> bool:
    return visual.attn_pool is None and visual.pool_type == "tok"


def _timm_blocks(trunk: Any) -> Tower:
    from timm.layers import Mlp, SwiGLU
    from timm.models.eva import EvaBlock
    from timm.models.vision_transformer import Block
    from timm.models.vision_transformer_relpos import RelPosBlock
    from timm.models.vitamin import GeGluMlp

    first = {Mlp: "fc1", SwiGLU: "fc1_g", GeGluMlp: "w0"}
    blocks = list(getattr(trunk, "blocks", []))
    for block in blocks:
        if type(block) not in (Block, EvaBlock, RelPosBlock) or type(block.mlp) not in first:
            mlp = type(getattr(block, "mlp", None)).__name__
            raise ValueError(f"the image tower has a {type(block).__name__} with a {mlp}; HeBA takes {SUPPORTED}")
    if not blocks:
        raise ValueError(f"the image tower is a {type(trunk).__name__} of timm; HeBA takes {SUPPORTED}")
    rows, columns = trunk.patch_embed.grid_size
    linears = [getattr(b.mlp, first[type(b.mlp)]) for b in blocks]
    norms = [b.norm1 for b in blocks]
    return Tower(blocks, norms, linears, (rows, columns), reads_cls=trunk.global_pool == "token")


def text_blocks(clip: Any) -> Tower:
    """The text tower of `clip`; ValueError where adapters, or the way texts are run here, do not fit."""
    text = text_tower(clip)
    if not hasattr(getattr(text, "transformer", None), "resblocks"):
        raise ValueError(f"the text tower is a {type(text).__name__}; HeBA takes {SUPPORTED}")
    if getattr(text, "cls_emb", None) is not None or getattr(text, "use_pad_mask", False):
        raise ValueError(f"the text tower has a class token or masks its padding; HeBA takes {SUPPORTED}")
    if pool_type(text) not in ("argmax", "eos", "last"):
        raise ValueError(f"texts are read by {pool_type(text)!r}, HeBA knows argmax, eos and last")
    blocks = list(text.transformer.resblocks)
    return Tower(blocks, [b.ln_1 for b in blocks], [b.mlp.c_fc for b in blocks])


def text_tower(clip: Any) -> Any:
    """The module that holds the text transformer: open_clip.CustomTextCLIP keeps it in `text`,
    open_clip.CLIP is its own text tower."""
    return getattr(clip, "text", clip)


def feature_width(clip: Any) -> int:
    """E, the width of the features of texts, and so of images."""
    text = text_tower(clip)
    projection = text.text_projection
    if projection is None:
        return text.token_embedding.embedding_dim
    return projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1]


def pool_type(text: Any) -> str:
    """Where a text is read: at the largest id (argmax), at the first `eos_id` (eos), or at its end (last)."""
    return text.text_pool_type if hasattr(text, "text_pool_type") else text.pool_type


def eos_id(text: Any) -> int:
    """The token that ends a text where the pool type is eos."""
    return text.text_eos_id if hasattr(text, "text_eos_id") else text.eos_id


def whole_context(clip: Any) -> int | None:
    """The number of tokens of every text where attention goes both ways; None under a causal mask."""
    text = text_tower(clip)
    return text.context_length if text.attn_mask is None else None


def text_lengths(clip: Any, tokens: Tensor) -> list[int]:
    """Per text of `tokens` [n, context], the number of tokens up to and with the one that is read: EOT, or with
    pool type last the last of the context."""
    text = text_tower(clip)
    kind = pool_type(text)
    if kind == "last":
        return [tokens.shape[1]] * len(tokens)
    if kind == "eos":
        return ((tokens == eos_id(text)).int().argmax(dim=-1) + 1).tolist()
    return (tokens.argmax(dim=-1) + 1).tolist()  # EOT is the largest id of CLIP's vocabulary


def cut_texts(clip: Any, tokens: Tensor, reach: int = 0) -> Tensor:
    """`tokens` [n, context] without those that no feature depends on: under a causal mask, what is `reach` behind
    the last token that is read."""
    return tokens if whole_context(clip) else tokens[:, : max(text_lengths(clip, tokens)) + reach]


def padded_texts(clip: Any, tokens: Tensor, reach: int, tokenizer: Callable[[list[str]], Tensor]) -> Tensor:
    """`tokens` [n, length] of texts that may be cut (`cut_texts`), with as much of the padding of `tokenizer` as
    features depend on that reach so far behind the token that is read, within the context."""
    missing = min(max(text_lengths(clip, tokens)) + reach, text_tower(clip).context_length) - tokens.shape[1]
    if missing <= 0:
        return tokens
    padding = tokenizer([""])[0, -1].to(tokens)  # the last token of an empty text
    return torch.cat([tokens, padding.expand(len(tokens), missing)], dim=1)


def embed_tokens(clip: Any, tokens: Tensor, n_blocks: int) -> Tensor:
    """Hidden states [n, length, width] of `tokens` [n, length] after the first `n_blocks` blocks."""
    text = text_tower(clip)
    length = tokens.shape[1]
    tokens = send(tokens, text.positional_embedding.device)
    x = text.token_embedding(tokens) + text.positional_embedding[:length]
    for block in text.transformer.resblocks[:n_blocks]:
        x = block(x, attn_mask=_mask(text, length))
    return x


TEXT_BATCH = 256


@torch.no_grad()
def frozen_texts(clip: Any, tokens: Tensor, n_blocks: int) -> tuple[Tensor, Packing]:
    """What enters block `n_blocks` (0-based) of the texts of `tokens` [n, context], as `run_text_blocks` takes it:
    hidden states [n, length, width], on the device of `clip`, and their packing."""
    where = clip.logit_scale.device
    packing = pack(text_lengths(clip, tokens), where, whole_context(clip))
    batches = send(tokens[:, : packing.length], where).split(TEXT_BATCH)
    return torch.cat([embed_tokens(clip, batch, n_blocks) for batch in batches]), packing


def _mask(text: Any, length: int) -> Tensor | None:
    return None if text.attn_mask is None else text.attn_mask[:length, :length]


NOTHING: Mapping[int, Change] = {}


def run_text_blocks(
    clip: Any,
    hidden: Tensor,
    packing: Packing,
    first: int,
    whole: bool = False,
    changes: Mapping[int, Change] = NOTHING,
) -> Tensor:
    """Text features [n, E] from hidden states [n, length, width] that enter block `first` (0-based).

    Args:
        whole: run the last block for all tokens, not for the one that is read alone.
        changes: by block, 0-based (`check_inside`).
    """
    text = text_tower(clip)
    mask = _mask(text, packing.length)
    x = packing.pack(hidden)
    end = len(text.transformer.resblocks) - 1
    for i in range(first, end):
        x = run_block(text.transformer.resblocks[i], x, packing, mask, changes.get(i, PLAIN))
    last, change = text.transformer.resblocks[end], changes.get(end, PLAIN)
    if whole:
        x = take_rows(run_block(last, x, packing, mask, change), packing.read)
    else:
        # Under a causal mask, the token that is read sees what is not after it.
        seen = None if mask is None else torch.arange(packing.length, device=x.device) <= packing.eot.unsqueeze(1)
        x = run_last_block(last, x, packing, mask, packing.read, seen, change)
    x = text.ln_final(x)
    projection = text.text_projection
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Linear) else x @ projection


def _runs_by_blocks(visual: Any) -> bool:
    """Whether an image tower is run here, block by block; else as the model runs it."""
    from open_clip.transformer import VisionTransformer

    return type(visual) is VisionTransformer and _is_read_at_cls(visual)


def check_inside(clip: Any, method: str) -> None:
    """Raise ValueError, in the words of `method`, where a `Change` cannot be made in the blocks of both towers."""
    check_text_inside(clip, method)
    visual = clip.visual
    if not _runs_by_blocks(visual) or not all(map(is_plain, visual.transformer.resblocks)):
        raise ValueError(
            f"{method} needs an image tower of open_clip's own that is read at CLS, as OpenAI's ViTs are, not a "
            f"{type(visual).__name__}; take another backbone or method"
        )


def check_text_inside(clip: Any, method: str) -> None:
    """The same of the text tower alone."""
    blocks = text_tower(clip).transformer.resblocks
    if not all(map(is_plain, blocks)):
        raise ValueError(
            f"{method} needs a text tower of open_clip's plain blocks, not of {type(blocks[0]).__name__}; take "
            "another backbone or method"
        )


def embed_images(clip: Any, images: Tensor, n_blocks: int, kept: dict[int, Tensor] | None = None) -> Tensor:
    """Hidden states [n, tokens, width] of preprocessed `images` [n, 3, height, width] after the first `n_blocks`
    blocks; of a tower that runs as a whole, `images` as they are.

    `kept`: the states of these images by number of blocks. It goes on from the last one, and adds the new ones.
    """
    visual = clip.visual
    if not _runs_by_blocks(visual):
        return images
    kept = {} if kept is None else kept
    done = max((n for n in kept if n <= n_blocks), default=0)
    x = kept[done] if done in kept else visual._embeds(images)
    for block in visual.transformer.resblocks[done:n_blocks]:
        x = run_block(block, x)
    kept[n_blocks] = x
    return x


def run_image_blocks(clip: Any, hidden: Tensor, first: int, changes: Mapping[int, Change] = NOTHING) -> Tensor:
    """Image features [n, E] from hidden states that enter block `first` (0-based; `embed_images`), with `changes`
    by block (`check_inside`)."""
    visual = clip.visual
    if not _runs_by_blocks(visual):
        return visual(hidden)
    x = hidden
    end = len(visual.transformer.resblocks) - 1
    for i in range(first, end):
        x = run_block(visual.transformer.resblocks[i], x, change=changes.get(i, PLAIN))
    x = run_last_block(visual.transformer.resblocks[end], x, change=changes.get(end, PLAIN))
    x = visual.ln_post(x)
    return x if visual.proj is None else x @ visual.proj


def image_hidden(clip: Any, images: Tensor) -> Tensor | None:
    """What the plain image tower gives to its projection, [n, width]; None where it has no such projection."""
    from open_clip.transformer import VisionTransformer

    visual = clip.visual
    if type(visual) is not VisionTransformer or visual.proj is None:
        return None
    return visual._pool(visual.transformer(visual._embeds(images)))[0]


@torch.no_grad()
def encode_text_plain(clip: Any, tokens: Tensor) -> Tensor:
    """Text features [n, E] of the frozen model without adapters."""
    return run_text_blocks(clip, *frozen_texts(clip, tokens, 0), 0)
