"""Transformer blocks of open_clip, run here: texts packed without padding, the last block for the token that is
read alone, and what a method changes inside a block."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from heba.clip.activation import quick_gelu
from heba.clip.device import send


@dataclass(frozen=True)
class Change:
    """What a method changes inside a block, whose weights stay as they are; None leaves that part alone.

    A function gets packed [T, width] of texts, or [n, length, width] of images. In the last block `q`, `out` and
    `beside` get the tokens that are read alone, [n, width].

    Attributes:
        tokens: what enters the block, to what enters instead (deep prompts).
        q, k, v: the normed input of the attention, to what is added to its queries, keys or values.
        out: the input of the attention's last projection, to what is added to its output.
        beside: the normed input of the attention, to what is added to the output of the whole block.
    """

    tokens: Callable[[Tensor], Tensor] | None = None
    q: Callable[[Tensor], Tensor] | None = None
    k: Callable[[Tensor], Tensor] | None = None
    v: Callable[[Tensor], Tensor] | None = None
    out: Callable[[Tensor], Tensor] | None = None
    beside: Callable[[Tensor], Tensor] | None = None


PLAIN = Change()


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(rows)
        ctx.n = len(x)
        return x.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        (rows,) = ctx.saved_tensors
        return grad.new_zeros(ctx.n, *grad.shape[1:]).index_copy_(0, rows, grad), None


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows], of rows that are all different: the backward copies them, where autograd's sorts and adds."""
    return _Rows.apply(x, rows)


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
        return x if self.rows is None else take_rows(x, self.rows)

    def unpack(self, x: Tensor) -> Tensor:
        """[T, width] to [n, length, width], zeros for the padding."""
        if self.rows is not None:
            x = x.new_zeros(len(self.eot) * self.length, x.shape[1]).index_copy_(0, self.rows, x)
        return x.unflatten(0, (len(self.eot), self.length))

    def times(self, n: int) -> "Packing":
        """Of all texts `n` times, one whole list after the other."""
        places = len(self.eot) * self.length

        def after(x: Tensor, step: int) -> Tensor:
            return (x + step * torch.arange(n, device=x.device).unsqueeze(1)).flatten()

        if self.rows is None:
            return Packing(None, self.eot.repeat(n), after(self.read, places), self.length)
        return Packing(after(self.rows, places), self.eot.repeat(n), after(self.read, len(self.rows)), self.length)

    def positions(self) -> Tensor:
        """[T], of each token in its text."""
        rows = self.rows
        if rows is None:
            rows = torch.arange(len(self.eot) * self.length, device=self.eot.device)
        return rows % self.length


def pack(lengths: Sequence[int], device: torch.device, context: int | None = None) -> Packing:
    """The packing of texts whose `lengths` end with the token that is read (`text_lengths`).

    `context`: the length of all of them where tokens behind that one count too (`whole_context`).
    """
    n = torch.tensor(lengths)
    if context is not None:
        read = torch.arange(len(n)) * context + n - 1
        return Packing(None, send(n - 1, device), send(read, device), context)
    length = int(n.max())
    rows = None
    if int(n.min()) < length:
        rows = send((torch.arange(length) < n[:, None]).flatten().nonzero().flatten(), device)
    return Packing(rows, send(n - 1, device), send(n.cumsum(0) - 1, device), length)


def is_plain(block: Any) -> bool:
    """Whether a block is one that is run here, part by part; others run as a whole and take no `Change`."""
    from open_clip.transformer import ResidualAttentionBlock

    return type(block) is ResidualAttentionBlock


def _enter(block: Any, x: Tensor, change: Change) -> tuple[Tensor, Tensor]:
    """What goes through the block, and the normed input of its attention."""
    if change.tokens is not None:
        x = change.tokens(x)
    return x, block.ln_1(x)


def _add(x: Tensor, h: Tensor, *functions: Callable[[Tensor], Tensor] | None) -> Tensor:
    """`x`, with what each function makes of `h` added to its own part of the channels."""
    if not any(functions):
        return x
    parts = zip(x.chunk(len(functions), dim=-1), functions, strict=True)
    return torch.cat([part if function is None else part + function(h) for part, function in parts], dim=-1)


def _leave(block: Any, x: Tensor, y: Tensor, h: Tensor, change: Change) -> Tensor:
    """The output of a block from its stream `x`, the attention's values `y` and its normed input `h`, token by
    token."""
    attended = block.attn.out_proj(y)
    if change.out is not None:
        attended = attended + change.out(y)
    x = x + block.ls_1(attended)
    x = x + block.ls_2(_mlp(block.mlp, block.ln_2(x)))
    return x if change.beside is None else x + change.beside(h)


def _mlp(mlp: Any, x: Tensor) -> Tensor:
    """The block's MLP; OpenAI's activation with a faster backward."""
    from open_clip.transformer import QuickGELU

    if type(mlp.gelu) is not QuickGELU:
        return mlp(x)
    return mlp.c_proj(quick_gelu(mlp.c_fc(x)))


def run_block(
    block: Any,
    x: Tensor,
    packing: Packing | None = None,
    mask: Tensor | None = None,
    change: Change = PLAIN,
) -> Tensor:
    """One block, of images for `x` [n, length, width], of texts for packed [T, width], under a causal `mask` or,
    without one, with attention both ways. ValueError for a change of a block that is not `is_plain`."""
    if not is_plain(block):
        _refuse(block, change)
        return block(x) if packing is None else packing.pack(block(packing.unpack(x), attn_mask=mask))
    attn: nn.MultiheadAttention = block.attn
    x, h = _enter(block, x, change)
    qkv = _add(F.linear(h, attn.in_proj_weight, attn.in_proj_bias), h, change.q, change.k, change.v)
    if packing is not None:
        qkv = packing.unpack(qkv)
    q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [n, heads, length, head width]
    y = F.scaled_dot_product_attention(q, k, v, is_causal=mask is not None).transpose(1, 2).flatten(2)
    if packing is not None:
        y = packing.pack(y)
    return _leave(block, x, y, h, change)


def _refuse(block: Any, change: Change) -> None:
    if change != PLAIN:
        raise ValueError(f"a {type(block).__name__} cannot be changed inside; take a backbone of open_clip's own")


def run_last_block(
    block: Any,
    x: Tensor,
    packing: Packing | None = None,
    mask: Tensor | None = None,
    read: Tensor | None = None,
    seen: Tensor | None = None,
    change: Change = PLAIN,
) -> Tensor:
    """The last block of a tower for the token that is read after it, the same as the whole block's: the other
    tokens only give keys and values.

    Args:
        x, packing, mask, change: as in `run_block`.
        read: for texts, [n], the rows of `x` that are read; of images CLS is.
        seen: for texts under a mask, [n, length], true where the token that is read attends; else everywhere.
    Returns:
        [n, width].
    """
    if not is_plain(block):
        x = run_block(block, x, packing, mask, change)
        return x[:, 0] if read is None else take_rows(x, read)
    attn: nn.MultiheadAttention = block.attn
    width, weight, bias = x.shape[-1], attn.in_proj_weight, attn.in_proj_bias
    x, h = _enter(block, x, change)
    kv = _add(F.linear(h, weight[width:], bias[width:]), h, change.k, change.v)
    if packing is not None:
        kv = packing.unpack(kv)
    k, v = kv.unflatten(-1, (2, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [n, heads, length, head width]
    h, x = (h[:, 0], x[:, 0]) if read is None else (take_rows(h, read), take_rows(x, read))
    q = _add(F.linear(h, weight[:width], bias[:width]), h, change.q)
    q = q.unflatten(-1, (attn.num_heads, 1, -1))
    allowed = None if seen is None else seen[:, None, None]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).flatten(1)
    return _leave(block, x, y, h, change)
