"""The training of HeBA (paper section 3)."""

from collections.abc import Sequence

from torch import Tensor

from heba.fit import adapters
from heba.fit.draws import Recipe, TextBank
from heba.fit.loop import History
from heba.fit.run import Run
from heba.methods.heba.model import AdaptedCLIP
from heba.methods.heba.settings import Settings, negatives


def recipe(settings: Settings) -> Recipe:
    return Recipe(
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        label_smoothing=settings.label_smoothing,
        scale_factor=settings.scale_factor,
        slow_ratio=settings.slow_ratio,
        neg_ratio=negatives(settings),
    )


def train(
    model: AdaptedCLIP, images: Sequence[Tensor], labels: list[int], bank: TextBank, settings: Settings, run: Run
) -> History:
    """Train the adapters of `model` in place (`heba.fit.adapters.train`)."""
    return adapters.train(model, images, labels, bank, recipe(settings), run)
