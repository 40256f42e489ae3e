"""CLIP with adapters: a model made by open_clip, its weights frozen and untouched, plus `Adapters`.

The adapters are attached with forward hooks on `ln_1` and `mlp.c_fc` of the chosen blocks, so open_clip's
code is neither edited nor copied, and removing the hooks gives the plain model back.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
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
        self._handles: list[Any] = []
        for block in (*text_blocks, *visual_blocks):
            if type(block.mlp.gelu) is open_clip.transformer.QuickGELU:
                block.mlp.gelu = QuickGELU()
        self._attach("text", text_blocks)
        self._attach("visual", visual_blocks)

    def _attach(self, tower: str, blocks: Any) -> None:
        for layer, parts in getattr(self.adapters, f"{tower}_adapter").items():
            block = blocks[int(layer) - 1]
            for module, part in ((block.ln_1, "att_conv"), (block.mlp.c_fc, "mlp_conv")):
                self._handles.append(module.register_forward_hook(self._hook(tower, int(layer), parts[part])))

    def detach(self) -> None:
        """Take the adapters off the model, so that others can be attached to it."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, tower: str, layer: int, adapter: nn.Module) -> Any:
        def hook(module: nn.Module, inputs: Any, h: Tensor) -> Tensor | None:
            scales = self._scales[tower]
            if scales is None:
                return None
            s = scales[layer - self.start]
            if tower == "text":
                return adapter(h, s)
            if h.dim() == 2:  # the MLP of the last block, which runs for CLS alone
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
        packing = pack(text_lengths(tokens), tokens.device)
        hidden = embed_tokens(self.clip, tokens[:, : packing.length], self.start - 1)
        return self.encode_text_from(hidden, packing, scales)

    def encode_text_from(
        self, hidden: Tensor, packing: "Packing", scales: Sequence[Tensor] | Tensor | float | None = None
    ) -> Tensor:
        """Text features [n, E] from the frozen hidden states [n, length, width] below block `start`
        (`embed_tokens(clip, tokens, start - 1)`)."""
        if scales is None or isinstance(scales, (int, float)):
            scales = self._fixed_scales(scales)
        self._scales["text"] = scales
        try:
            return run_text_blocks(self.clip, hidden, packing, self.start - 1)
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


@dataclass(frozen=True)
class Packing:
    """Texts of different lengths laid end to end, so that nothing is computed for the padding after EOT. Attention
    alone needs them side by side.

    Attributes:
        rows: [T], where each of the T tokens stands in the padded [n * length]; None when it is all of them.
        eot: [n], the position of EOT in each text. read: [n], where it stands among the T tokens.
        length: of the longest text.
    """

    rows: Tensor | None
    eot: Tensor
    read: Tensor
    length: int

    def pack(self, x: Tensor) -> Tensor:
        """[n, length, width] to [T, width]."""
        x = x.flatten(0, 1)
        return x if self.rows is None else x[self.rows]

    def unpack(self, x: Tensor) -> Tensor:
        """[T, width] to [n, length, width], zeros for the padding."""
        if self.rows is not None:
            x = x.new_zeros(len(self.eot) * self.length, x.shape[1]).index_copy(0, self.rows, x)
        return x.unflatten(0, (len(self.eot), self.length))


def text_lengths(tokens: Tensor) -> list[int]:
    """Tokens up to and with EOT, the largest id of a row in CLIP's vocabulary, of `tokens` [n, context]."""
    return (tokens.argmax(dim=-1) + 1).tolist()


def pack(lengths: Sequence[int], device: torch.device) -> Packing:
    """The packing of texts of `lengths` tokens each, EOT included."""
    n = torch.tensor(lengths)
    length = int(n.max())
    rows = None
    if int(n.min()) < length:
        rows = (torch.arange(length) < n[:, None]).flatten().nonzero().flatten().to(device)
    return Packing(rows, (n - 1).to(device), (n.cumsum(0) - 1).to(device), length)


def embed_tokens(clip: Any, tokens: Tensor, n_blocks: int) -> Tensor:
    """Hidden states [n, length, width] of `tokens` [n, length] after the first `n_blocks` blocks."""
    tower = text_tower(clip)
    dtype = tower.transformer.get_cast_dtype()
    length = tokens.shape[1]
    x = tower.token_embedding(tokens).to(dtype) + tower.positional_embedding[:length].to(dtype)
    for block in tower.transformer.resblocks[:n_blocks]:
        x = block(x, attn_mask=tower.attn_mask[:length, :length])
    return x


def run_text_blocks(clip: Any, hidden: Tensor, packing: Packing, first: int) -> Tensor:
    """Text features [n, E] from hidden states [n, length, width] that enter block `first` (0-based)."""
    tower = text_tower(clip)
    mask = tower.attn_mask[: packing.length, : packing.length]
    x = packing.pack(hidden)
    for block in tower.transformer.resblocks[first:-1]:
        x = run_block(block, x, packing, mask)
    # The last block's EOT sees what is not after it.
    seen = torch.arange(packing.length, device=x.device) <= packing.eot.unsqueeze(1)
    x = tower.ln_final(run_last_block(tower.transformer.resblocks[-1], x, packing, mask, packing.read, seen))
    projection = tower.text_projection
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Linear) else x @ projection


def run_image_blocks(clip: Any, images: Tensor) -> Tensor:
    """Image features [n, E] of preprocessed `images` [n, 3, height, width]."""
    visual = clip.visual
    x = visual._embeds(images)
    for block in visual.transformer.resblocks[:-1]:
        x = run_block(block, x)
    x = visual.ln_post(run_last_block(visual.transformer.resblocks[-1], x))
    return x if visual.proj is None else x @ visual.proj


def run_block(block: Any, x: Tensor, packing: Packing | None = None, mask: Tensor | None = None) -> Tensor:
    """One block, of images for `x` [n, length, width], of texts for packed [T, width] under a causal `mask`."""
    from open_clip.transformer import ResidualAttentionBlock

    if type(block) is not ResidualAttentionBlock:
        return block(x) if packing is None else packing.pack(block(packing.unpack(x), attn_mask=mask))
    attn: nn.MultiheadAttention = block.attn
    qkv = F.linear(block.ln_1(x), attn.in_proj_weight, attn.in_proj_bias)
    if packing is not None:
        qkv = packing.unpack(qkv)
    q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [n, heads, length, head width]
    y = F.scaled_dot_product_attention(q, k, v, is_causal=packing is not None).transpose(1, 2).flatten(2)
    if packing is not None:
        y = packing.pack(y)
    x = x + block.ls_1(attn.out_proj(y))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def run_last_block(
    block: Any,
    x: Tensor,
    packing: Packing | None = None,
    mask: Tensor | None = None,
    read: Tensor | None = None,
    seen: Tensor | None = None,
) -> Tensor:
    """The last block of a tower for the token that is read after it, the same as the whole block's: the other
    tokens only give keys and values.

    Args:
        x, packing, mask: as in `run_block`.
        read: for texts, [n], the rows of `x` that are read, which attend where `seen` [n, length] is true; of
            images CLS is read, which attends everywhere.
    Returns:
        [n, width].
    """
    from open_clip.transformer import ResidualAttentionBlock

    if type(block) is not ResidualAttentionBlock:
        x = run_block(block, x, packing, mask)
        return x[:, 0] if read is None else x[read]
    attn: nn.MultiheadAttention = block.attn
    width, weight, bias = x.shape[-1], attn.in_proj_weight, attn.in_proj_bias
    h = block.ln_1(x)
    kv = F.linear(h, weight[width:], bias[width:])
    if packing is not None:
        kv = packing.unpack(kv)
    k, v = kv.unflatten(-1, (2, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [n, heads, length, head width]
    h, x = (h[:, 0], x[:, 0]) if read is None else (h[read], x[read])
    q = F.linear(h, weight[:width], bias[:width]).unflatten(-1, (attn.num_heads, 1, -1))
    allowed = None if seen is None else seen[:, None, None]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).flatten(1)
    x = x + block.ls_1(attn.out_proj(y))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


@torch.no_grad()
def encode_text_plain(clip: Any, tokens: Tensor) -> Tensor:
    """Text features [n, E] of the frozen model without adapters."""
    packing = pack(text_lengths(tokens), tokens.device)
    return run_text_blocks(clip, embed_tokens(clip, tokens[:, : packing.length], 0), packing, 0)


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
