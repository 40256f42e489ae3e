"""Adapters inside the blocks of a frozen CLIP: a model made by open_clip, its weights untouched.

Adapters are attached with forward hooks on layers of the chosen blocks (`heba.clip.towers`), so the code of
open_clip and timm is neither edited nor copied, and `detach` gives the plain model back. The hooks belong to the
CLIP, which many threads and other adapters may use; what a call needs belongs to the call (`Call`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from heba.clip.blocks import Packing, pack
from heba.clip.towers import (
    Tower,
    embed_images,
    embed_tokens,
    image_blocks,
    run_image_blocks,
    run_text_blocks,
    text_blocks,
    text_lengths,
    text_tower,
    whole_context,
)

Scales = Sequence[Tensor] | Tensor


@dataclass(frozen=True)
class Call:
    """A call of `encode_image` or `encode_text` that is going on.

    Attributes:
        model: that was called. tower: text or visual.
        scales: one s per adapted block.
        packing: of texts.
    """

    model: "HookedCLIP"
    tower: str
    scales: Scales
    packing: Packing | None = None


# Each thread has its own value, and so has a call within a call.
_CALL: ContextVar[Call | None] = ContextVar("call", default=None)


@contextmanager
def going_on(call: Call) -> Iterator[None]:
    token = _CALL.set(call)
    try:
        yield
    finally:
        _CALL.reset(token)


def at_places(widths: tuple[int, int], start: int, end: int, make: Callable[[int], nn.Module]) -> nn.ModuleDict:
    """The adapters of a tower, `<1-based layer>.{att_conv,mlp_conv}` as official checkpoints name them.

    `make`: a width to an adapter; `widths` has those of the two places (`Tower.widths`).
    """
    return nn.ModuleDict(
        {
            str(layer): nn.ModuleDict({"att_conv": make(widths[0]), "mlp_conv": make(widths[1])})
            for layer in range(start, end + 1)
        }
    )


class HookedCLIP(nn.Module):
    """A frozen open_clip model with adapters in blocks `start` to `end` of both towers: on the output of the norm
    before the attention, and on that of the first linear layer of the MLP.

    Many threads may call `encode_image` and `encode_text` at once, and one CLIP may carry the adapters of several
    models: a call runs those of the model that was called. Attach and detach while no call is going on.

    Args:
        clip: open_clip.CLIP or open_clip.CustomTextCLIP with transformer towers.
        adapters: with `text_adapter` and `visual_adapter` (`at_places`). An adapter gets what it adapts,
            [..., width], and s, a 0-dim tensor; of images also `grid`, the rows and columns of the patches, which
            are the last tokens; of texts that lie end to end, [tokens, width], their `packing`.
        start, end: first and last adapted block, 1-based and inclusive.
        scale: s, used when a call gives no scales.
        mixes: whether the adapters of texts mix tokens.
        reach: how many tokens behind the one that is read it depends on, under a causal mask.
    """

    def __init__(
        self,
        clip: Any,
        adapters: nn.Module,
        start: int,
        end: int,
        scale: float,
        *,
        mixes: bool = False,
        reach: int = 0,
    ) -> None:
        super().__init__()
        self.clip: Any = clip.requires_grad_(False).eval()
        text, visual = text_blocks(clip), image_blocks(clip)
        deepest = min(len(text.blocks), len(visual.blocks))
        if not 1 <= start <= end <= deepest:
            raise ValueError(
                f"start {start} and end {end} must satisfy 1 <= start <= end <= {deepest}, "
                f"the depth of the shallower tower (text {len(text.blocks)}, image {len(visual.blocks)})"
            )
        self.start, self.end, self.scale = start, end, scale
        self.grid, self.context = visual.grid, whole_context(clip)
        self.mixes, self.reach = mixes, reach
        self.adapters: Any = adapters
        self._handles: list[Any] = []
        self._attach("text", text)
        self._attach("visual", visual)

    def _attach(self, name: str, tower: Tower) -> None:
        for layer, parts in getattr(self.adapters, f"{name}_adapter").items():
            i = int(layer) - 1
            last = i == len(tower.blocks) - 1
            for module, part in ((tower.norms[i], "att_conv"), (tower.linears[i], "mlp_conv")):
                if part == "mlp_conv" and last and tower.reads_cls:
                    continue
                self._handles.append(module.register_forward_hook(self._hook(name, int(layer), parts[part])))

    def detach(self) -> None:
        """Take the adapters off the CLIP, which without those of other models is as it was before, frozen and in
        eval mode."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook(self, tower: str, layer: int, adapter: nn.Module) -> Any:
        def hook(module: nn.Module, inputs: Any, h: Tensor) -> Tensor | None:
            call = _CALL.get()
            if call is None or call.model is not self or call.tower != tower:
                return None
            s = call.scales[layer - self.start]
            if tower == "text":  # a block that runs as a whole has each text in a row
                return adapter(h, s, packing=call.packing if h.dim() == 2 else None)
            return adapter(h, s, self.grid)

        return hook

    def fixed_scales(self, scale: float | None = None) -> Tensor:
        """[n_adapted_blocks], all of them `scale`; None: the model's own."""
        value = self.scale if scale is None else scale
        device = self.clip.logit_scale.device
        return torch.full((self.end - self.start + 1,), value, device=device)

    def encode_image(self, images: Tensor, scales: Scales | float | None = None) -> Tensor:
        """Image features [batch, E], not normalised, of preprocessed `images` [batch, 3, height, width].

        `scales`: one s per adapted block, or one number for all, or None for the model's own scale.
        """
        return self.encode_image_from(embed_images(self.clip, images, self.start - 1), scales)

    def encode_image_from(self, hidden: Tensor, scales: Scales | float | None = None) -> Tensor:
        """Image features [batch, E] from what enters block `start` (`embed_images(clip, images, start - 1)`)."""
        if scales is None or isinstance(scales, (int, float)):
            scales = self.fixed_scales(scales)
        with going_on(Call(self, "visual", scales)):
            return run_image_blocks(self.clip, hidden, self.start - 1)

    def encode_text(self, tokens: Tensor, scales: Scales | float | None = None) -> Tensor:
        """Text features [n, E], not normalised, of `tokens` [n, context]; `scales` as in `encode_image`.

        The tokens may be cut `reach` behind the last one that is read; ValueError where they are shorter.
        """
        packing = self.pack(text_lengths(self.clip, tokens))
        if tokens.shape[1] < packing.length:
            raise ValueError(
                f"the features of these texts depend on {packing.length} tokens, not {tokens.shape[1]}"
            )
        hidden = embed_tokens(self.clip, tokens[:, : packing.length], self.start - 1)
        return self.encode_text_from(hidden, packing, scales)

    def pack(self, lengths: Sequence[int], where: torch.device | None = None) -> Packing:
        """The packing of texts of `lengths` (`towers.text_lengths`) as the text tower needs them, on its device or
        on another one, `where`."""
        context = self.context
        if (
            context is None and self.reach
        ):  # all equally long, as adapters that mix tokens take them without copies
            context = min(max(lengths) + self.reach, text_tower(self.clip).context_length)
        return pack(lengths, where or self.clip.logit_scale.device, context)

    def encode_text_from(self, hidden: Tensor, packing: Packing, scales: Scales | float | None = None) -> Tensor:
        """Text features [n, E] from the frozen hidden states [n, length, width] below block `start`
        (`embed_tokens(clip, tokens, start - 1)`)."""
        if scales is None or isinstance(scales, (int, float)):
            scales = self.fixed_scales(scales)
        with going_on(Call(self, "text", scales, packing)):
            # In the last block EOT's own MLP is not enough for an adapter that reads other tokens.
            return run_text_blocks(self.clip, hidden, packing, self.start - 1, whole=self.mixes)

    def logit_factor(self) -> Tensor:
        """exp(logit_scale), the inverse temperature of CLIP. SigLIP adds a logit_bias to all logits alike, which
        changes neither a softmax nor a prediction."""
        return self.clip.logit_scale.exp()
