"""A depthwise convolution over the tokens of texts that lie end to end."""

import torch
from torch import Tensor


def over_tokens(x: Tensor, weight: Tensor, positions: Tensor | None = None, ahead: int = 0) -> Tensor:
    """Depthwise convolution over each token of `x` [..., T, C] and its neighbours in its own text, with zeros
    beyond both ends.

    Args:
        weight: [C, 1, kernel], the last `ahead` of the kernel for the tokens that follow, the one before these for
            the token itself.
        positions: [T], of each token in its text, where texts lie end to end; None: `x` has one text a row.
    """
    if positions is None:
        positions = torch.arange(x.shape[-2], device=x.device)
    taps = weight[:, 0].to(x.dtype).unbind(dim=1)
    own = len(taps) - 1 - ahead
    out = x * taps[own]
    for offset in [*range(-1, -own - 1, -1), *range(1, ahead + 1)]:
        # The neighbour of a token at an end is another text's.
        inside = positions.roll(-offset) == positions + offset
        out = out + x.roll(-offset, dims=-2) * inside.unsqueeze(-1) * taps[own + offset]
    return out
