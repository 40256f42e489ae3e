"""The bottleneck block of HeBA (arXiv 2603.16653, section 3) and its initialisation.

With D the width of the stream and r the reduction ratio, the adapted stream is

    h + s * A(h),    A(h) = LayerNorm(h + up(GELU(mid(down(h)))))

where `down` is D -> D/r, `up` is D/r -> D and `mid` is a 3x3 depthwise convolution on the grid of image
patches; text has no `mid`. Nothing but the LayerNorm has a bias.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

aten = torch.ops.aten


class _Adapt(torch.autograd.Function):
    """h + s * A(h), with a backward of its own: it adds into what autograd would allocate anew, and leaves out CLS
    without cutting it off and putting it back. On a CPU that is a tenth of a training step.

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
        kind = h.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else h.dtype
        with torch.autocast(kind, enabled=False):
            x = h.to(dtype).flatten(0, -2)  # [tokens, D]
            down, up = down.to(dtype), up.to(dtype)
            hidden = mixed = x @ down.T  # [tokens, D/r]
            if mid is not None and grid is not None:
                mid = mid.to(dtype)
                hidden = _patches(hidden, len(h), grid)
                mixed = F.conv2d(hidden, mid, padding=1, groups=len(mid))
            active = F.gelu(mixed)
            if grid is not None:
                active = _tokens(active)
            z = torch.addmm(x, active, up.T)
            # s * LayerNorm(z) is the LayerNorm with s times its weight and bias.
            weight, bias = scale * weight, scale * bias
            a, mean, rstd = torch.native_layer_norm(z.to(weight.dtype), weight.shape, weight, bias, eps)
            out = a.to(h.dtype).view_as(h).add_(h)
            if grid is not None:
                out[:, 0] = h[:, 0]
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
        if ctx.grid is not None:  # CLS has no part in A
            cls = slice(None, None, grad.shape[1])
            dweight -= (grad_a[cls] * (z[cls] - mean[cls]) * rstd[cls]).sum(0)
            dbias -= grad_a[cls].sum(0)
            dz[cls] = 0
        dz = dz.to(dtype)
        dactive, dup = dz @ up, dz.T @ active
        if ctx.grid is not None:
            dactive = _patches(dactive, grad.shape[0], ctx.grid)
        dhidden, dmid = aten.gelu_backward(dactive, mixed), None
        if ctx.grid is not None:
            dhidden, dmid, _ = aten.convolution_backward(
                dhidden, hidden, mid, None, [1, 1], [1, 1], [1, 1], False, [0, 0], len(mid), [True, True, False]
            )
            dhidden = _tokens(dhidden)
            dmid = dmid.to(weight.dtype).div_(scale)
        ddown = dhidden.T @ x
        dh = None
        if ctx.needs_input_grad[0]:
            dh = dz.add_(grad.flatten(0, -2)).addmm_(dhidden, down).view_as(grad).to(grad.dtype)
        return (
            dh,
            ddown.to(weight.dtype).div_(scale),
            dmid,
            dup.to(weight.dtype).div_(scale),
            dweight,
            dbias,
            None,
            None,
            None,
        )


def _patches(x: Tensor, n: int, grid: tuple[int, int]) -> Tensor:
    """Tokens [n * (1 + rows * columns), C] as images [n, C, rows, columns], channels last, without CLS."""
    x = x.unflatten(0, (n, -1))[:, 1:].unflatten(1, grid).permute(0, 3, 1, 2)
    return x.contiguous(memory_format=torch.channels_last)


def _tokens(x: Tensor) -> Tensor:
    """The inverse of `_patches`, with zeros for CLS."""
    n, channels, rows, columns = x.shape
    out = x.new_zeros(n, 1 + rows * columns, channels)
    out[:, 1:] = x.permute(0, 2, 3, 1).flatten(1, 2)
    return out.flatten(0, 1)


class BottleneckAdapter(nn.Module):
    """One adapter, for the image tower (`visual=True`) or the text tower.

    The 1x1 convolutions of the image adapter are stored as convolutions, as official checkpoints have
    them, and computed as matrix products on the tokens, which is the same and faster.

    Args:
        width: D, the number of channels of the stream.
        visual: image tokens (convolutions on the patch grid) or text tokens (linear layers).
        ratio: D / hidden width.
    """

    def __init__(self, width: int, visual: bool, ratio: int = 4) -> None:
        super().__init__()
        if width % ratio:
            raise ValueError(f"adapter ratio {ratio} does not divide the width {width}")
        hidden = width // ratio
        self.down: nn.Conv2d | nn.Linear
        self.mid: nn.Conv2d | None = None
        self.up: nn.Conv2d | nn.Linear
        if visual:
            self.down = nn.Conv2d(width, hidden, 1, bias=False)
            self.mid = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False)
            self.up = nn.Conv2d(hidden, width, 1, bias=False)
        else:
            self.down = nn.Linear(width, hidden, bias=False)
            self.up = nn.Linear(hidden, width, bias=False)
        self.norm = nn.LayerNorm(width)
        # "Active" initialisation: the branch contributes from the first step on.
        nn.init.kaiming_normal_(self.up.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, h: Tensor, scale: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Return h + s * A(h) for every token of `h`.

        In training the adapter's own parameters receive the gradient of A's output undivided by s (the
        true gradient times 1/s), the stream below the true one, as the official code does it.

        Args:
            h: [..., D] text tokens, or [batch, tokens, D] of images: CLS, which the adapter leaves as it is, and
                the patches row by row.
            scale: s, a 0-dim tensor.
            grid: (rows, columns) of the patches, for images.
        """
        mid = None if self.mid is None else self.mid.weight
        down, up, norm = self.down.weight.flatten(1), self.up.weight.flatten(1), self.norm
        return _Adapt.apply(h, down, mid, up, norm.weight, norm.bias, norm.eps, scale, grid)


class Adapters(nn.Module):
    """All adapters of a model, under the parameter names of the official checkpoints:
    `{text,visual}_adapter.<1-based layer>.{att_conv,mlp_conv}.{down,mid,up,norm}.*`.

    Args:
        text_width: width of the text tower; its MLP is `mlp_ratio` times as wide.
        visual_width: the same for the image tower.
        start, end: first and last adapted block, 1-based and inclusive.
        ratio: D / hidden width.
        mlp_ratio: width of c_fc's output over the width of the tower.
    """

    def __init__(
        self,
        text_width: int,
        visual_width: int,
        start: int,
        end: int,
        ratio: int = 4,
        mlp_ratio: int = 4,
    ) -> None:
        super().__init__()

        def tower(width: int, visual: bool) -> nn.ModuleDict:
            return nn.ModuleDict(
                {
                    str(layer): nn.ModuleDict(
                        {
                            "att_conv": BottleneckAdapter(width, visual, ratio),
                            "mlp_conv": BottleneckAdapter(mlp_ratio * width, visual, ratio),
                        }
                    )
                    for layer in range(start, end + 1)
                }
            )

        self.text_adapter = tower(text_width, visual=False)
        self.visual_adapter = tower(visual_width, visual=True)
