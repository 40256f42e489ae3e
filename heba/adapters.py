"""The bottleneck block of HeBA (arXiv 2603.16653, section 3) and its initialisation.

With D the width of the stream and r the reduction ratio, the adapted stream is

    h + s * A(h),    A(h) = LayerNorm(h + up(GELU(mid(down(h)))))

where `down` is D -> D/r, `up` is D/r -> D and `mid` is a 3x3 depthwise convolution on the grid of image
patches; text has no `mid`. Nothing but the LayerNorm has a bias.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (factor,) = ctx.saved_tensors
        return grad * factor, None


def scale_gradient(x: Tensor, factor: Tensor) -> Tensor:
    """Return `x` unchanged; its gradient is multiplied by the 0-dim tensor `factor`."""
    return _ScaleGradient.apply(x, factor)


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
        self.up: nn.Conv2d | nn.Linear
        if visual:
            self.down = nn.Conv2d(width, hidden, 1, bias=False)
            self.mid = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False)
            self.up = nn.Conv2d(hidden, width, 1, bias=False)
        else:
            self.down = nn.Linear(width, hidden, bias=False)
            self.up = nn.Linear(hidden, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.visual = visual
        # "Active" initialisation: the branch contributes from the first step on.
        nn.init.kaiming_normal_(self.up.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, h: Tensor, scale: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Return h + s * A(h) for every token of `h`.

        In training the adapter's own parameters receive the gradient of A's output undivided by s (the
        true gradient times 1/s), the stream below the true one, as the official code does it.

        Args:
            h: [batch, tokens, D]; for images CLS, which the adapter leaves as it is, and the patches row by row.
            scale: s, a 0-dim tensor.
            grid: (rows, columns) of the patches, for images.
        """
        training = torch.is_grad_enabled()

        def weight(parameter: Tensor) -> Tensor:
            return scale_gradient(parameter, 1 / scale) if training else parameter

        def scaled(parameter: Tensor) -> Tensor:
            # s * LayerNorm(x) is the LayerNorm with s times its weight and bias. Their gradient undivided by s
            # is that of the product.
            return scale * scale_gradient(parameter, 1 / scale) if training else scale * parameter

        y = F.linear(h, weight(self.down.weight).flatten(1))
        if self.visual:
            assert grid is not None
            y = y[:, 1:].unflatten(1, grid).permute(0, 3, 1, 2)
            y = F.conv2d(y, weight(self.mid.weight), padding=1, groups=y.shape[1])
            y = F.pad(y.flatten(2).transpose(1, 2), (0, 0, 1, 0))
        y = F.linear(F.gelu(y), weight(self.up.weight).flatten(1))
        shape, eps = self.norm.normalized_shape, self.norm.eps
        a = F.layer_norm(h + y, shape, scaled(self.norm.weight), scaled(self.norm.bias), eps).to(h.dtype)
        if not self.visual:
            return h + a
        # Cheaper than cutting CLS off and putting it back, forth and back again.
        patches = torch.ones(h.shape[1], 1, dtype=h.dtype, device=h.device)
        patches[0] = 0
        return torch.addcmul(h, a, patches)


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
