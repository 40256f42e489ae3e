"""CLIP with the adapters of HeBA (`heba.clip.hooks`)."""

from typing import Any

from heba.clip.hooks import HookedCLIP
from heba.clip.towers import image_blocks, text_blocks
from heba.methods.heba.adapters import HEBA, Adapters, Variant


class AdaptedCLIP(HookedCLIP):
    """A frozen open_clip model with HeBA's adapters in blocks `start` to `end` of both towers.

    Args:
        clip, start, end: as in `HookedCLIP`.
        scale: s of the base classes, used when a call gives no scales.
        ratio: D / hidden width of the bottlenecks.
        variant: of the adapters, for ablations.
    """

    def __init__(
        self, clip: Any, start: int, end: int, scale: float, ratio: int = 4, *, variant: Variant = HEBA
    ) -> None:
        adapters = Adapters(
            text_widths=text_blocks(clip).widths,
            visual_widths=image_blocks(clip).widths,
            start=start,
            end=end,
            ratio=ratio,
            variant=variant,
        )
        mixes = variant.text_block == "conv1d" and len(adapters.text_adapter) > 0
        super().__init__(clip, adapters, start, end, scale, mixes=mixes)
        self.ratio, self.variant = ratio, variant
