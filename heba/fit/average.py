"""The mean of what parameters were at the ends of epochs."""

import torch
from torch import nn


class Average(nn.Module):
    """Parameters in training, `now`, and the weighted sum of what they were at the ends of epochs, in buffers: a
    checkpoint of this module has both.

    Args:
        weights: of the epochs.
    """

    def __init__(self, now: nn.Module, weights: list[float]) -> None:
        super().__init__()
        self.now, self.weights = now, weights
        for i, parameter in enumerate(now.parameters()):
            self.register_buffer(f"sum{i}", torch.zeros_like(parameter))

    @torch.no_grad()
    def add(self, epoch: int) -> None:
        """Add the parameters at the end of `epoch` (0-based)."""
        for parameter, total in zip(self.now.parameters(), self.buffers(), strict=True):
            total += self.weights[epoch] * parameter

    @torch.no_grad()
    def settle(self) -> None:
        """Put the sum into the place of the parameters."""
        for parameter, total in zip(self.now.parameters(), self.buffers(), strict=True):
            parameter.copy_(total)


def gaussian(epochs: int, mean: float, std: float) -> list[float]:
    """The weights of epochs 1, 2, ..., which sum to 1."""
    distance = (torch.arange(1, epochs + 1, dtype=torch.float64) - mean) / std
    return torch.softmax(-(distance**2) / 2, dim=0).tolist()
