"""Gradients that are not the true ones, as official codes have them."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(factor)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        (factor,) = ctx.saved_tensors
        return grad * factor, None


def scale_gradient(x: Tensor, factor: Tensor) -> Tensor:
    """`x` as it is, with its gradient times `factor`, a 0-dim tensor."""
    return _ScaleGradient.apply(x, factor)
