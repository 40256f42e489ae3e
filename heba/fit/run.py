"""How and where a training runs: all that is not a setting of its method."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

Progress = Callable[[int, str], AbstractContextManager[Callable[[int], object]]]


def silent(total: int, what: str) -> AbstractContextManager[Callable[[int], object]]:
    """Show no progress."""
    return nullcontext(lambda n: None)


@dataclass(frozen=True)
class Run:
    """How and where a training runs.

    Attributes:
        seed: of all draws of the training. shots: training images per class, as the split was drawn.
        bf16: autocast to bfloat16.
        cuda_graphs: each step as one CUDA graph, on a GPU, where a method can.
        checkpoint: written after every epoch and resumed from when it exists; the caller removes it.
        on_epoch: called with {"epoch", "loss", "lr"} after every epoch, the resumed ones too.
        progress: `with progress(total, what) as done:`, where `done(n)` counts n more of the `total`.
    """

    seed: int
    shots: int = 16
    bf16: bool = False
    cuda_graphs: bool = False
    checkpoint: Path | None = None
    on_epoch: Callable[[dict[str, float]], object] = lambda record: None
    progress: Progress = silent

    def autocast(self, where: torch.device) -> torch.autocast:
        """The precision of all that goes through the towers on the device `where`."""
        return torch.autocast(where.type, torch.bfloat16, enabled=self.bf16)
