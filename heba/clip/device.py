"""Weights and data on a GPU, so that neither waits for the other."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def in_bf16(clip: Any) -> Any:
    """`clip` with the weights of its linear layers and convolutions in bf16, in place.

    Under autocast to bf16 it computes the same, bit for bit: autocast casts these at every use. It needs autocast
    then. All other weights stay in fp32, as autocast leaves them.
    """
    for module in clip.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.MultiheadAttention):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.bfloat16()
    return clip


def send(x: Tensor, where: torch.device) -> Tensor:
    """`x` on its way to `where`. The CPU does not wait until a GPU has it."""
    if where.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(where, non_blocking=True)
    return x.to(where)


def send_parts(parts: Sequence[Tensor], where: torch.device) -> tuple[Tensor, ...]:
    """`parts`, of one type and [n, ...] each, on their way to `where` in one copy."""
    if where.type != "cuda":
        return tuple(part.to(where) for part in parts)
    return send(torch.cat(list(parts)), where).split([len(part) for part in parts])


def sent(batches: Iterable[Tensor], where: torch.device) -> Iterator[Tensor]:
    """Each of `batches` on `where`; the next one is read and on its way when one is worked on."""
    ahead: Tensor | None = None
    for batch in batches:
        coming = send(batch, where)
        if ahead is not None:
            yield ahead
        ahead = coming
    if ahead is not None:
        yield ahead
