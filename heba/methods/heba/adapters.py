"""The bottleneck block of HeBA (arXiv 2603.16653, section 3) and its initialisation.

With D the width of the stream and r the reduction ratio, the adapted stream is

    h + s * A(h),    A(h) = LayerNorm(h + up(GELU(mid(down(h)))))

where `down` is D -> D/r, `up` is D/r -> D and `mid` is a 3x3 depthwise convolution on the grid of image
patches; text has no `mid`. Nothing but the LayerNorm has a bias. `Variant` names what ablations change.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from heba.clip.blocks import Packing
from heba.clip.hooks import at_places
from heba.fit.gradient import scale_gradient

aten = torch.ops.aten


@dataclass(frozen=True)
class Variant:
    """Variants of the adapters, for ablations. The defaults are HeBA.

    Attributes:
        init: "kaiming": `up` is Kaiming-normal, so the branch is active from the first step. "zero": the model
            starts exactly as the plain one. `up` at zero alone would leave s * LayerNorm(h), so the LayerNorm's
            weight starts at zero too. It learns from the first step, `up` from the second, the others after that.
        visual_block: "conv", or "linear", which has no `mid`: nothing mixes the patches.
        text_block: "linear", or "conv1d": `mid` is a depthwise convolution over a token and the two before it, in
            its own text. It does not look ahead, for the tower is causal and texts are cut after EOT.
        expansion: the hidden width is D * expansion / ratio; above the ratio it makes an inverted bottleneck.
        gradient_scale: whether the gradients of the adapter's parameters are the true ones times 1/s.
        towers: "both", "image" or "text"; the other one stays plain.
    """

    init: str = "kaiming"
    visual_block: str = "conv"
    text_block: str = "linear"
    expansion: int = 1
    gradient_scale: bool = True
    towers: str = "both"

    def __post_init__(self) -> None:
        for name, known in (
            ("init", ("kaiming", "zero")),
            ("visual_block", ("conv", "linear")),
            ("text_block", ("linear", "conv1d")),
            ("towers", ("both", "image", "text")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not one of {', '.join(known)}")
        if type(self.expansion) is not int or self.expansion < 1:
            raise ValueError(f"expansion: {self.expansion!r} must be a whole number of at least 1")
        if type(self.gradient_scale) is not bool:
            raise ValueError(f"gradient_scale: {self.gradient_scale!r} must be true or false")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Variant":
        """The variant that `config` names among other things; ValueError names a key that is missing or wrong."""
        missing = [field.name for field in fields(cls) if field.name not in config]
        if missing:
            raise ValueError(f"{', '.join(missing)}: missing")
        return cls(**{field.name: config[field.name] for field in fields(cls)})


HEBA = Variant()


class _Adapt(torch.autograd.Function):
    """h + s * A(h), with a backward of its own: it adds into what autograd would allocate anew, and leaves out
    CLS and registers without cutting them off and putting them back. On a CPU that is a tenth of a training step.

    The gradients of the adapter's parameters are the true ones times 1/s (see `BottleneckAdapter.forward`).
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        h: Tensor,
        down: Tensor,
        mid: Tensor | None,
        up: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        scale: Tensor,
        grid: tuple[int, int] | None,
    ) -> Tensor:
        kind = "cpu" if h.is_meta else h.device.type  # operations are counted on tensors without values
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else h.dtype
        with torch.autocast(kind, enabled=False):
            x = h.to(dtype).flatten(0, -2)  # [tokens, D]
            down, up = down.to(dtype), up.to(dtype)
            hidden = mixed = x @ down.T  # [tokens, D/r]
            if mid is not None and grid is not None:
                mid = mid.to(dtype)
                hidden = _patches(hidden, h.shape[0], grid)
                mixed = F.conv2d(hidden, mid, padding=1, groups=len(mid))
            active = F.gelu(mixed)
            if grid is not None:
                active = _tokens(active, h.shape[1])
            z = torch.addmm(x, active, up.T)
            # s * LayerNorm(z) is the LayerNorm with s times its weight and bias.
            weight, bias = scale * weight, scale * bias
            a, mean, rstd = torch.native_layer_norm(z.to(weight.dtype), weight.shape, weight, bias, eps)
            out = a.to(h.dtype).view_as(h).add_(h)
            if grid is not None:
                before = slice(h.shape[1] - grid[0] * grid[1])
                out[:, before] = h[:, before]
        ctx.save_for_backward(x, down, mid, up, weight, bias, scale, hidden, mixed, active, z, mean, rstd)
        ctx.grid = grid
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        x, down, mid, up, weight, bias, scale, hidden, mixed, active, z, mean, rstd = ctx.saved_tensors
        dtype = x.dtype
        grad_a = grad.flatten(0, -2).to(weight.dtype)
        dz, dweight, dbias = aten.native_layer_norm_backward(
            grad_a, z.to(weight.dtype), weight.shape, mean, rstd, weight, bias, [True, True, True]
        )
        before = 0 if ctx.grid is None else grad.shape[1] - ctx.grid[0] * ctx.grid[1]
        if before:  # CLS and registers have no part in A
            n = grad.shape[0]
            part = [t.unflatten(0, (n, -1))[:, :before].flatten(0, 1) for t in (grad_a, z, mean, rstd)]
            dweight -= (part[0] * (part[1] - part[2]) * part[3]).sum(0)
            dbias -= part[0].sum(0)
            dz.unflatten(0, (n, -1))[:, :before] = 0
        dz = dz.to(dtype)
        dactive, dup = dz @ up, dz.T @ active
        if ctx.grid is not None:
            dactive = _patches(dactive, grad.shape[0], ctx.grid)
        dhidden, dmid = aten.gelu_backward(dactive, mixed), None
        if ctx.grid is not None:
            dhidden, dmid, _ = aten.convolution_backward(
                dhidden, hidden, mid, None, [1, 1], [1, 1], [1, 1], False, [0, 0], len(mid), [True, True, False]
            )
            dhidden = _tokens(dhidden, grad.shape[1])
            dmid = _over(dmid, scale)
        ddown = dhidden.T @ x
        dh = None
        if ctx.needs_input_grad[0]:
            dh = dz.add_(grad.flatten(0, -2)).addmm_(dhidden, down).view_as(grad).to(grad.dtype)
        return (
            dh,
            _over(ddown, scale),
            dmid,
            _over(dup, scale),
            dweight,
            dbias,
            None,
            None,
            None,
        )


def _over(grad: Tensor, scale: Tensor) -> Tensor:
    """`grad` / `scale`, 0-dim, in the type of `scale`, without a pass for the cast; `grad` may be written."""
    return grad.div_(scale) if grad.dtype == scale.dtype else grad / scale.reshape(1, 1)


def _patches(x: Tensor, n: int, grid: tuple[int, int]) -> Tensor:
    """Tokens [n * length, C], the patches last, as images [n, C, rows, columns], channels last."""
    x = x.unflatten(0, (n, -1))[:, -grid[0] * grid[1] :].unflatten(1, grid).permute(0, 3, 1, 2)
    return x.contiguous(memory_format=torch.channels_last)


def _tokens(x: Tensor, length: int) -> Tensor:
    """The inverse of `_patches`, with zeros for the tokens before the patches."""
    n, channels, rows, columns = x.shape
    out = x.new_zeros(n, length, channels)
    out[:, -rows * columns :] = x.permute(0, 2, 3, 1).flatten(1, 2)
    return out.flatten(0, 1)


def _causal_conv(x: Tensor, weight: Tensor, positions: Tensor) -> Tensor:
    """Depthwise convolution over each token of `x` [..., T, C] and those before it, in its own text.

    Args:
        weight: [C, 1, kernel], the last of the kernel for the token itself.
        positions: [T], of each token in its text. Texts lie end to end, so the first tokens of a text are the only
            ones whose predecessors are another text's; they get zeros instead.
    """
    taps = weight[:, 0].to(x.dtype).unbind(dim=1)[::-1]
    out = x * taps[0]
    for back, tap in enumerate(taps[1:], start=1):
        out = out + x.roll(back, dims=-2) * (positions >= back).unsqueeze(-1) * tap
    return out


class BottleneckAdapter(nn.Module):
    """One adapter, for the image tower (`visual=True`) or the text tower.

    The 1x1 convolutions of the image adapter are stored as convolutions, as official checkpoints have
    them, and computed as matrix products on the tokens, which is the same and faster.

    Args:
        width: D, the number of channels of the stream.
        visual: image tokens (convolutions on the patch grid) or text tokens (linear layers).
        ratio: D * variant.expansion / hidden width, rounded down to a whole width.
    """

    def __init__(self, width: int, visual: bool, ratio: int = 4, variant: Variant = HEBA) -> None:
        super().__init__()
        hidden = width * variant.expansion // ratio
        if hidden < 1:
            raise ValueError(
                f"adapter ratio {ratio} is more than width times expansion, {width} x {variant.expansion}"
            )
        block = variant.visual_block if visual else variant.text_block
        # `_Adapt` is fast for HeBA's own blocks and knows no others.
        self.fused = variant.gradient_scale and block == (HEBA.visual_block if visual else HEBA.text_block)
        self.gradient_scale = variant.gradient_scale
        self.down: nn.Conv2d | nn.Linear
        self.mid: nn.Conv2d | nn.Conv1d | None = None
        self.up: nn.Conv2d | nn.Linear
        if block == "conv":
            self.down = nn.Conv2d(width, hidden, 1, bias=False)
            self.mid = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False)
            self.up = nn.Conv2d(hidden, width, 1, bias=False)
        else:
            self.down = nn.Linear(width, hidden, bias=False)
            self.up = nn.Linear(hidden, width, bias=False)
            if block == "conv1d":
                self.mid = nn.Conv1d(hidden, hidden, 3, groups=hidden, bias=False)
        self.norm = nn.LayerNorm(width)
        if variant.init == "zero":
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.norm.weight)
        else:
            nn.init.kaiming_normal_(self.up.weight, mode="fan_out", nonlinearity="relu")

    def forward(
        self,
        h: Tensor,
        scale: Tensor,
        grid: tuple[int, int] | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """Return h + s * A(h) for every token of `h`.

        In training the adapter's own parameters receive the gradient of A's output undivided by s (the
        true gradient times 1/s), the stream below the true one, as the official code does it. Without
        `Variant.gradient_scale` all gradients are the true ones.

        Args:
            h: [..., D] text tokens, or [batch, tokens, D] of images: CLS and registers, if any, which the
                adapter leaves as they are, and the patches row by row.
            scale: s, a 0-dim tensor.
            grid: (rows, columns) of the patches, for images.
            packing: of texts that lie end to end. None: each row is a text.
        """
        if not self.fused:
            return self._plain(h, scale, grid, packing)
        mid = None if self.mid is None else self.mid.weight
        down, up, norm = self.down.weight.flatten(1), self.up.weight.flatten(1), self.norm
        return _Adapt.apply(h, down, mid, up, norm.weight, norm.bias, norm.eps, scale, grid)

    def _plain(self, h: Tensor, scale: Tensor, grid: tuple[int, int] | None, packing: Packing | None) -> Tensor:
        """`forward` with autograd's own backward, for every variant."""
        skipped = 0 if grid is None else h.shape[1] - grid[0] * grid[1]  # CLS
        x = h if grid is None else h[:, skipped:]
        if self.gradient_scale:
            x = scale_gradient(x, scale)
        hidden = F.linear(x, self.down.weight.flatten(1))
        if isinstance(self.mid, nn.Conv2d) and grid is not None:
            image = self.mid(hidden.unflatten(1, grid).permute(0, 3, 1, 2))
            hidden = image.flatten(2).transpose(1, 2)
        elif isinstance(self.mid, nn.Conv1d):
            positions = torch.arange(h.shape[-2], device=h.device) if packing is None else packing.positions()
            hidden = _causal_conv(hidden, self.mid.weight, positions)
        a = scale * self.norm(x + F.linear(F.gelu(hidden), self.up.weight.flatten(1)))
        if self.gradient_scale:
            a = scale_gradient(a, 1 / scale)
        # In mixed precision the LayerNorm is in fp32; the stream keeps its type, as the other blocks expect it.
        return h + F.pad(a.to(h.dtype), (0, 0, skipped, 0))


class Adapters(nn.Module):
    """All adapters of a model, under the parameter names of the official checkpoints:
    `{text,visual}_adapter.<1-based layer>.{att_conv,mlp_conv}.{down,mid,up,norm}.*`.

    Args:
        text_widths: D of the text tower's two adapters, on the attention's input and within the MLP.
        visual_widths: the same for the image tower.
        start, end: first and last adapted block, 1-based and inclusive.
        ratio: D * variant.expansion / hidden width.
        variant: of the adapters; a tower that it leaves plain has no parameters.
    """

    def __init__(
        self,
        text_widths: tuple[int, int],
        visual_widths: tuple[int, int],
        start: int,
        end: int,
        ratio: int = 4,
        variant: Variant = HEBA,
    ) -> None:
        super().__init__()

        def tower(widths: tuple[int, int], visual: bool) -> nn.ModuleDict:
            if variant.towers not in ("both", "image" if visual else "text"):
                return nn.ModuleDict()
            return at_places(widths, start, end, lambda width: BottleneckAdapter(width, visual, ratio, variant))

        self.text_adapter = tower(text_widths, visual=False)
        self.visual_adapter = tower(visual_widths, visual=True)
