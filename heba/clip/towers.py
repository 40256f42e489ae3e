"""The two towers of a model of open_clip: where their adapters go, and how they are run.

Texts under a causal mask are read at EOT and depend on nothing behind it, so they are cut there and packed without
padding. Where attention goes both ways, as in SigLIP, all of the context counts, and nothing is cut. In both, the
last block runs for the token that is read alone, as it does in an image tower that is read at CLS. The other image
towers run as the model runs them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heba.clip.architecture import SUPPORTED


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


def cut_texts(clip: Any, tokens: Tensor) -> Tensor:
    """`tokens` [n, context] without those that no feature depends on: under a causal mask, what is behind the last
    token that is read."""
    return tokens if whole_context(clip) else tokens[:, : max(text_lengths(clip, tokens))]


@dataclass(frozen=True)
class Packing:
    """Texts of different lengths laid end to end, so that nothing is computed for the padding after EOT. Attention
    alone needs them side by side.

    Attributes:
        rows: [T], where each of the T tokens stands in the padded [n * length]; None when it is all of them.
        eot: [n], the position of the token that is read in each text. read: [n], where it is among the T tokens.
        length: of the longest text.
    """

    rows: Tensor | None
    eot: Tensor
    read: Tensor
    length: int

    def pack(self, x: Tensor) -> Tensor:
        """[n, length, width] to [T, width]."""
        x = x.flatten(0, 1)
        return x if self.rows is None else x[self.rows]

    def unpack(self, x: Tensor) -> Tensor:
        """[T, width] to [n, length, width], zeros for the padding."""
        if self.rows is not None:
            x = x.new_zeros(len(self.eot) * self.length, x.shape[1]).index_copy(0, self.rows, x)
        return x.unflatten(0, (len(self.eot), self.length))

    def positions(self) -> Tensor:
        """[T], of each token in its text."""
        rows = self.rows
        if rows is None:
            rows = torch.arange(len(self.eot) * self.length, device=self.eot.device)
        return rows % self.length


def pack(lengths: Sequence[int], device: torch.device, context: int | None = None) -> Packing:
    """The packing of texts whose `lengths` end with the token that is read (`text_lengths`).

    `context`: the length of all of them where attention goes both ways (`whole_context`).
    """
    n = torch.tensor(lengths)
    if context is not None:
        return Packing(None, (n - 1).to(device), (torch.arange(len(n)) * context + n - 1).to(device), context)
    length = int(n.max())
    rows = None
    if int(n.min()) < length:
        rows = (torch.arange(length) < n[:, None]).flatten().nonzero().flatten().to(device)
    return Packing(rows, (n - 1).to(device), (n.cumsum(0) - 1).to(device), length)


def embed_tokens(clip: Any, tokens: Tensor, n_blocks: int) -> Tensor:
    """Hidden states [n, length, width] of `tokens` [n, length] after the first `n_blocks` blocks."""
    text = text_tower(clip)
    dtype = text.transformer.get_cast_dtype()
    length = tokens.shape[1]
    x = text.token_embedding(tokens).to(dtype) + text.positional_embedding[:length].to(dtype)
    for block in text.transformer.resblocks[:n_blocks]:
        x = block(x, attn_mask=_mask(text, length))
    return x


def _mask(text: Any, length: int) -> Tensor | None:
    return None if text.attn_mask is None else text.attn_mask[:length, :length]


def run_text_blocks(clip: Any, hidden: Tensor, packing: Packing, first: int, whole: bool = False) -> Tensor:
    """Text features [n, E] from hidden states [n, length, width] that enter block `first` (0-based).

    `whole`: run the last block for all tokens, not for the one that is read alone.
    """
    text = text_tower(clip)
    mask = _mask(text, packing.length)
    x = packing.pack(hidden)
    for block in text.transformer.resblocks[first:-1]:
        x = run_block(block, x, packing, mask)
    last = text.transformer.resblocks[-1]
    if whole:
        x = run_block(last, x, packing, mask)[packing.read]
    else:
        # Under a causal mask, the token that is read sees what is not after it.
        seen = None if mask is None else torch.arange(packing.length, device=x.device) <= packing.eot.unsqueeze(1)
        x = run_last_block(last, x, packing, mask, packing.read, seen)
    x = text.ln_final(x)
    projection = text.text_projection
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Linear) else x @ projection


def _runs_by_blocks(visual: Any) -> bool:
    """Whether an image tower is run here, block by block; else as the model runs it."""
    from open_clip.transformer import VisionTransformer

    return type(visual) is VisionTransformer and _is_read_at_cls(visual)


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


def run_image_blocks(clip: Any, hidden: Tensor, first: int) -> Tensor:
    """Image features [n, E] from hidden states that enter block `first` (0-based; `embed_images`)."""
    visual = clip.visual
    if not _runs_by_blocks(visual):
        return visual(hidden)
    x = hidden
    for block in visual.transformer.resblocks[first:-1]:
        x = run_block(block, x)
    x = visual.ln_post(run_last_block(visual.transformer.resblocks[-1], x))
    return x if visual.proj is None else x @ visual.proj


def image_hidden(clip: Any, images: Tensor) -> Tensor | None:
    """What the plain image tower gives to its projection, [n, width]; None where it has no such projection."""
    from open_clip.transformer import VisionTransformer

    visual = clip.visual
    if type(visual) is not VisionTransformer or visual.proj is None:
        return None
    return visual._pool(visual.transformer(visual._embeds(images)))[0]


def run_block(block: Any, x: Tensor, packing: Packing | None = None, mask: Tensor | None = None) -> Tensor:
    """One block, of images for `x` [n, length, width], of texts for packed [T, width], under a causal `mask` or,
    without one, with attention both ways."""
    from open_clip.transformer import ResidualAttentionBlock

    if type(block) is not ResidualAttentionBlock:
        return block(x) if packing is None else packing.pack(block(packing.unpack(x), attn_mask=mask))
    attn: nn.MultiheadAttention = block.attn
    qkv = F.linear(block.ln_1(x), attn.in_proj_weight, attn.in_proj_bias)
    if packing is not None:
        qkv = packing.unpack(qkv)
    q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [n, heads, length, head width]
    y = F.scaled_dot_product_attention(q, k, v, is_causal=mask is not None).transpose(1, 2).flatten(2)
    if packing is not None:
        y = packing.pack(y)
    x = x + block.ls_1(attn.out_proj(y))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def run_last_block(
    block: Any,
    x: Tensor,
    packing: Packing | None = None,
    mask: Tensor | None = None,
    read: Tensor | None = None,
    seen: Tensor | None = None,
) -> Tensor:
    """The last block of a tower for the token that is read after it, the same as the whole block's: the other
    tokens only give keys and values.

    Args:
        x, packing, mask: as in `run_block`.
        read: for texts, [n], the rows of `x` that are read; of images CLS is.
        seen: for texts under a mask, [n, length], true where the token that is read attends; else everywhere.
    Returns:
        [n, width].
    """
    from open_clip.transformer import ResidualAttentionBlock

    if type(block) is not ResidualAttentionBlock:
        x = run_block(block, x, packing, mask)
        return x[:, 0] if read is None else x[read]
    attn: nn.MultiheadAttention = block.attn
    width, weight, bias = x.shape[-1], attn.in_proj_weight, attn.in_proj_bias
    h = block.ln_1(x)
    kv = F.linear(h, weight[width:], bias[width:])
    if packing is not None:
        kv = packing.unpack(kv)
    k, v = kv.unflatten(-1, (2, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [n, heads, length, head width]
    h, x = (h[:, 0], x[:, 0]) if read is None else (h[read], x[read])
    q = F.linear(h, weight[:width], bias[:width]).unflatten(-1, (attn.num_heads, 1, -1))
    allowed = None if seen is None else seen[:, None, None]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).flatten(1)
    x = x + block.ls_1(attn.out_proj(y))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


@torch.no_grad()
def encode_text_plain(clip: Any, tokens: Tensor) -> Tensor:
    """Text features [n, E] of the frozen model without adapters."""
    packing = pack(text_lengths(clip, tokens), tokens.device, whole_context(clip))
    return run_text_blocks(clip, embed_tokens(clip, tokens[:, : packing.length], 0), packing, 0)
