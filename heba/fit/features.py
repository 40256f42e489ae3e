"""Training on frozen features."""

from torch import Tensor


def passes(augmented: Tensor, plain: Tensor) -> Tensor:
    """The augmented views [passes, n, E]; where there are no passes, the plain ones [n, E] as the only pass."""
    return augmented if len(augmented) else plain[None]
