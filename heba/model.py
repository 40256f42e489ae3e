"""CLIP with adapters: a model made by open_clip, its weights frozen and untouched, plus `Adapters`.

The adapters are attached with forward hooks on `ln_1` and `mlp.c_fc` of the chosen blocks, so open_clip's
code is neither edited nor copied, and removing the hooks gives the plain model back.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from heba.adapters import Adapters

ADAPTER_FILE = "adapter.safetensors"
CONFIG_FILE = "config.json"


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


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), OpenAI's activation, as silu(1.702 x) / 1.702: one pass over memory in the backward
    instead of five, which is a fifth of a training step on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return _QuickGELU.apply(x)


class AdaptedCLIP(nn.Module):
    """A frozen open_clip model with adapters in blocks `start` to `end` of both towers.

    Args:
        clip: open_clip.CLIP or open_clip.CustomTextCLIP with transformer towers.
        start, end: first and last adapted block, 1-based and inclusive.
        scale: s of the base classes, used when a call gives no scales.
        ratio: D / hidden width of the bottlenecks.
    """

    def __init__(self, clip: Any, start: int, end: int, scale: float, ratio: int = 4) -> None:
        super().__init__()
        import open_clip

        self.clip: Any = clip.requires_grad_(False).eval()
        check_towers(clip)
        text_blocks = text_tower(clip).transformer.resblocks
        visual_blocks = clip.visual.transformer.resblocks
        deepest = min(len(text_blocks), len(visual_blocks))
        if not 1 <= start <= end <= deepest:
            raise ValueError(
                f"adapter.start {start} and adapter.end {end} must satisfy 1 <= start <= end <= {deepest}, "
                f"the depth of the shallower tower (text {len(text_blocks)}, image {len(visual_blocks)})"
            )
        self.start, self.end, self.scale, self.ratio = start, end, scale, ratio
        self.grid = tuple(clip.visual.grid_size)
        self.adapters = Adapters(
            text_width=text_blocks[0].mlp.c_fc.in_features,
            visual_width=visual_blocks[0].mlp.c_fc.in_features,
            start=start,
            end=end,
            ratio=ratio,
        )
        self._scales: dict[str, Sequence[Tensor] | Tensor | None] = {"text": None, "visual": None}
        for block in (*text_blocks, *visual_blocks):
            if type(block.mlp.gelu) is open_clip.transformer.QuickGELU:
                block.mlp.gelu = QuickGELU()
        self._attach("text", text_blocks)
        self._attach("visual", visual_blocks)

    def _attach(self, tower: str, blocks: Any) -> None:
        for layer, parts in getattr(self.adapters, f"{tower}_adapter").items():
            block = blocks[int(layer) - 1]
            block.ln_1.register_forward_hook(self._hook(tower, int(layer), parts["att_conv"]))
            block.mlp.c_fc.register_forward_hook(self._hook(tower, int(layer), parts["mlp_conv"]))

    def _hook(self, tower: str, layer: int, adapter: nn.Module) -> Any:
        def hook(module: nn.Module, inputs: Any, h: Tensor) -> Tensor | None:
            scales = self._scales[tower]
            if scales is None:
                return None
            s = scales[layer - self.start]
            if tower == "text":
                return adapter(h, s)
            if h.shape[1] == 1:  # the MLP of the last block, which runs for CLS alone
                return None
            return adapter(h, s, self.grid)

        return hook

    def _fixed_scales(self, scale: float | None) -> Tensor:
        value = self.scale if scale is None else scale
        device = self.clip.logit_scale.device
        return torch.full((self.end - self.start + 1,), value, device=device)

    def encode_image(self, images: Tensor, scales: Sequence[Tensor] | Tensor | float | None = None) -> Tensor:
        """Image features [batch, E], not normalised, of preprocessed `images` [batch, 3, height, width].

        `scales`: one s per adapted block, or one number for all, or None for the model's own scale.
        """
        if scales is None or isinstance(scales, (int, float)):
            scales = self._fixed_scales(scales)
        self._scales["visual"] = scales
        try:
            return run_image_blocks(self.clip, images)
        finally:
            self._scales["visual"] = None

    def encode_text(self, tokens: Tensor, scales: Sequence[Tensor] | Tensor | float | None = None) -> Tensor:
        """Text features [n, E], not normalised, of `tokens` [n, context]; `scales` as in `encode_image`."""
        tokens = cut_after_eot(tokens)
        return self.encode_text_from(embed_tokens(self.clip, tokens, self.start - 1), tokens, scales)

    def encode_text_from(
        self, hidden: Tensor, tokens: Tensor, scales: Sequence[Tensor] | Tensor | float | None = None
    ) -> Tensor:
        """Text features from the frozen hidden states [n, length, width] below block `start`
        (`embed_tokens(clip, tokens, start - 1)`); `tokens` [n, length] locates the EOT."""
        if scales is None or isinstance(scales, (int, float)):
            scales = self._fixed_scales(scales)
        self._scales["text"] = scales
        try:
            return run_text_blocks(self.clip, hidden, tokens, self.start - 1)
        finally:
            self._scales["text"] = None

    def logit_factor(self) -> Tensor:
        """exp(logit_scale), the inverse temperature of CLIP."""
        return self.clip.logit_scale.exp()


def text_tower(clip: Any) -> Any:
    """The module that holds the text transformer: open_clip.CustomTextCLIP keeps it in `text`,
    open_clip.CLIP is its own text tower."""
    return getattr(clip, "text", clip)


def check_towers(clip: Any) -> None:
    """Raise ValueError where the adapters, or cutting texts after EOT, would not fit the model."""
    text = text_tower(clip)
    blocks = getattr(getattr(clip.visual, "transformer", None), "resblocks", None)
    if blocks is None or not hasattr(clip.visual, "class_embedding"):
        raise ValueError(
            "HeBA needs an image tower that is open_clip's vision transformer with a CLS token; "
            f"this model has {type(clip.visual).__name__}"
        )
    if clip.visual.attn_pool is not None or clip.visual.pool_type != "tok":
        raise ValueError("HeBA needs an image tower that is read at its CLS token, not by a pooling over patches")
    if not hasattr(text, "transformer") or not hasattr(text.transformer, "resblocks"):
        raise ValueError(f"HeBA needs open_clip's own text transformer, not {type(text).__name__}")
    if getattr(text, "attn_mask", None) is None or getattr(text, "cls_emb", None) is not None:
        raise ValueError("HeBA needs a text tower with a causal mask and without a class token")
    pool = getattr(text, "text_pool_type", None) or getattr(text, "pool_type", "argmax")
    if pool != "argmax":
        raise ValueError(f"HeBA needs a text tower that pools at EOT (pool type argmax), not {pool!r}")


def cut_after_eot(tokens: Tensor) -> Tensor:
    """Cut `tokens` [n, context] after the last EOT of the batch. The mask is causal and only EOT is read,
    so features do not change. EOT is the largest id of a row in CLIP's vocabulary."""
    return tokens[:, : int(tokens.argmax(dim=-1).max()) + 1]


def embed_tokens(clip: Any, tokens: Tensor, n_blocks: int) -> Tensor:
    """Hidden states [n, length, width] of `tokens` [n, length] after the first `n_blocks` blocks."""
    tower = text_tower(clip)
    dtype = tower.transformer.get_cast_dtype()
    length = tokens.shape[1]
    x = tower.token_embedding(tokens).to(dtype) + tower.positional_embedding[:length].to(dtype)
    for block in tower.transformer.resblocks[:n_blocks]:
        x = block(x, attn_mask=tower.attn_mask[:length, :length])
    return x


def run_text_blocks(clip: Any, x: Tensor, tokens: Tensor, first: int) -> Tensor:
    """Text features [n, E] from hidden states `x` [n, length, width] that enter block `first` (0-based)."""
    tower = text_tower(clip)
    length = tokens.shape[1]
    mask = tower.attn_mask[:length, :length]
    for block in tower.transformer.resblocks[first:-1]:
        x = block(x, attn_mask=mask)
    x = run_last_block(tower.transformer.resblocks[-1], x, tokens.argmax(dim=-1), mask)
    x = tower.ln_final(x)
    projection = tower.text_projection
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Linear) else x @ projection


def run_image_blocks(clip: Any, images: Tensor) -> Tensor:
    """Image features [n, E] of preprocessed `images` [n, 3, height, width]."""
    visual = clip.visual
    x = visual._embeds(images)
    for block in visual.transformer.resblocks[:-1]:
        x = block(x)
    cls = torch.zeros(len(x), dtype=torch.long, device=x.device)
    x = visual.ln_post(run_last_block(visual.transformer.resblocks[-1], x, cls, None))
    return x if visual.proj is None else x @ visual.proj


def run_last_block(block: Any, x: Tensor, read: Tensor, mask: Tensor | None) -> Tensor:
    """The last block of a tower for the token of each row that is read after it, the same as the whole
    block's: the other tokens only give keys and values.

    Args:
        x: [n, length, width]. read: [n], the token of each row. mask: additive, [length, length].
    Returns:
        [n, width].
    """
    from open_clip.transformer import ResidualAttentionBlock

    rows = torch.arange(len(x), device=x.device)
    if type(block) is not ResidualAttentionBlock:
        return block(x, attn_mask=mask)[rows, read]
    h = block.ln_1(x)
    if mask is not None:
        mask = mask.to(h.dtype)[read].repeat_interleave(block.attn.num_heads, dim=0).unsqueeze(1)
    query = h[rows, read].unsqueeze(1)
    y = x[rows, read].unsqueeze(1) + block.ls_1(block.attn(query, h, h, need_weights=False, attn_mask=mask)[0])
    return (y + block.ls_2(block.mlp(block.ln_2(y)))).squeeze(1)


@torch.no_grad()
def encode_text_plain(clip: Any, tokens: Tensor) -> Tensor:
    """Text features [n, E] of the frozen model without adapters."""
    tokens = cut_after_eot(tokens)
    return run_text_blocks(clip, embed_tokens(clip, tokens, 0), tokens, 0)


def class_features(features: Tensor, class_index: Tensor, n_classes: int) -> Tensor:
    """The classifier [n_classes, E]: per class the mean of its normalised prompt features, normalised again.

    Args:
        features: [n_prompts, E], as the text tower gives them.
        class_index: [n_prompts], the class of every prompt; every class needs at least one.
    """
    features = F.normalize(features.float(), dim=-1)
    total = torch.zeros(n_classes, features.shape[1], device=features.device)
    total.index_add_(0, class_index, features)
    count = torch.bincount(class_index, minlength=n_classes).unsqueeze(1)
    if (count == 0).any():
        missing = (count[:, 0] == 0).nonzero().flatten().tolist()
        raise ValueError(f"classes {missing} have no prompt")
    return F.normalize(total / count, dim=-1)


def clip_from_openai_weights(state: dict[str, Tensor]) -> Any:
    """Build open_clip's model for the weights of an original OpenAI CLIP checkpoint (a ViT).

    The architecture is read from the shapes. OpenAI's models use QuickGELU; weights are loaded in fp32.
    Raises ValueError when tensors are missing, extra or misshapen.
    """
    import open_clip

    state = {
        k: v.float() for k, v in state.items() if k not in ("input_resolution", "context_length", "vocab_size")
    }
    try:
        width, _, patch, _ = state["visual.conv1.weight"].shape
        grid = round((state["visual.positional_embedding"].shape[0] - 1) ** 0.5)
        text_width = state["ln_final.weight"].shape[0]
        embed_dim = state["text_projection"].shape[1]
        context_length = state["positional_embedding"].shape[0]
        vocab_size = state["token_embedding.weight"].shape[0]
    except KeyError as error:
        raise ValueError(f"not the weights of an OpenAI CLIP with a ViT: tensor {error} is missing") from None

    def depth(prefix: str) -> int:
        return len({k.split(".resblocks.")[1].split(".")[0] for k in state if k.startswith(prefix)})

    model = open_clip.CLIP(
        embed_dim=embed_dim,
        vision_cfg=open_clip.CLIPVisionCfg(
            layers=depth("visual.transformer.resblocks."),
            width=width,
            head_width=64,
            patch_size=patch,
            image_size=patch * grid,
        ),
        text_cfg=open_clip.CLIPTextCfg(
            context_length=context_length,
            vocab_size=vocab_size,
            width=text_width,
            heads=text_width // 64,
            layers=depth("transformer.resblocks."),
        ),
        quick_gelu=True,
    )
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"the weights do not fit the architecture that their shapes name: {error}") from None
    return model.eval()


def load_adapter_tensors(model: AdaptedCLIP, tensors: dict[str, Tensor], source: str) -> None:
    """Copy `tensors` into the model's adapters; a missing, extra or misshapen tensor is a ValueError that
    lists them all and names `source`."""
    own = model.adapters.state_dict()
    problems = [f"missing {name}" for name in own if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in own]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)}, the model needs {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if problems:
        raise ValueError(f"{source} does not fit the model:\n  " + "\n  ".join(problems))
    model.adapters.load_state_dict(tensors)


def save_adapter(
    model: AdaptedCLIP, folder: Path, config: dict[str, Any], dtype: torch.dtype = torch.float32
) -> None:
    """Write the adapters (safetensors in `dtype`, official parameter names) and `config` (JSON) into `folder`.

    ValueError when a value does not fit into `dtype`; nothing is written then.
    """
    tensors = {k: v.detach().cpu().to(dtype).contiguous() for k, v in model.adapters.state_dict().items()}
    overflowed = [k for k, v in tensors.items() if not v.isfinite().all()]
    if overflowed:
        raise ValueError(f"{', '.join(overflowed)}: not finite as {dtype}; save the adapters in fp32")
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "start": model.start,
        "end": model.end,
        "ratio": model.ratio,
        "scale": model.scale,
    } | config
    for name, write in (
        (ADAPTER_FILE, lambda path: save_file(tensors, path)),
        (CONFIG_FILE, lambda path: path.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")),
    ):
        temporary = folder / f".{name}.tmp"
        write(temporary)
        os.replace(temporary, folder / name)


def load_adapter(clip: Any, folder: Path) -> tuple[AdaptedCLIP, dict[str, Any]]:
    """Attach the adapters saved in `folder` to `clip`; returns the model and the saved config."""
    config = json.loads((folder / CONFIG_FILE).read_text())
    model = AdaptedCLIP(clip, config["start"], config["end"], config["scale"], config["ratio"])
    tensors = {k: v.float() for k, v in load_file(folder / ADAPTER_FILE).items()}
    load_adapter_tensors(model, tensors, str(folder / ADAPTER_FILE))
    return model, config
