"""The plain path: HeBA computed the way the official code computes it, on the weights of an `AdaptedCLIP`.

Tokens first ([length, batch, D]), all 77 tokens of a text, every block whole, image adapters as convolutions on a
permuted copy of the tokens, gradient scaling as two layers around each adapter. Steps between this and ours can be
taken one at a time: `cut` stops texts at the longest EOT, `last` runs the last block for the token that is read.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from heba.clip.preprocess import CLIP_MEAN, CLIP_STD
from heba.clip.towers import cut_texts, text_tower
from heba.methods.heba.adapters import BottleneckAdapter
from heba.methods.heba.model import AdaptedCLIP

Scales = Sequence[Tensor] | Tensor


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        (factor,) = ctx.saved_tensors
        return grad * factor, None


def scale_gradient(x: Tensor, factor: Tensor) -> Tensor:
    """Return `x` unchanged; its gradient is multiplied by the 0-dim tensor `factor`."""
    return _ScaleGradient.apply(x, factor)


def adapt(adapter: BottleneckAdapter, x: Tensor, scale: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """x + s * LayerNorm(x + up(GELU(mid(down(x))))) for `x` [length, batch, D]; of images the patches alone."""
    y = scale_gradient(x, scale)
    if grid is not None:
        assert adapter.mid is not None  # an ablation's may have none
        z = y.permute(1, 2, 0).reshape(y.shape[1], y.shape[2], *grid)
        z = adapter.up(F.gelu(adapter.mid(adapter.down(z))))
        z = z.flatten(2).permute(2, 0, 1)
    else:
        z = adapter.up(F.gelu(adapter.down(y)))
    return x + scale_gradient(scale * adapter.norm(y + z), 1 / scale)


def adapt_stream(part: Any, x: Tensor, scale: Tensor, grid: tuple[int, int] | None) -> Tensor:
    if grid is None:
        return adapt(part, x, scale, None)
    cls, patches = x[:1], x[1:]
    return torch.cat([cls, adapt(part, patches, scale, grid)])


def attention(block: Any, query: Tensor, h: Tensor, mask: Tensor | None) -> Tensor:
    attn: nn.MultiheadAttention = block.attn
    return F.multi_head_attention_forward(
        query,
        h,
        h,
        attn.embed_dim,
        attn.num_heads,
        attn.in_proj_weight,
        attn.in_proj_bias,
        None,
        None,
        False,
        0.0,
        attn.out_proj.weight,
        attn.out_proj.bias,
        need_weights=False,
        attn_mask=mask,
    )[0]


def mlp(block: Any, x: Tensor, parts: Any, scale: Tensor | None, grid: tuple[int, int] | None) -> Tensor:
    h = block.mlp.c_fc(block.ln_2(x))
    if parts is not None and scale is not None:
        h = adapt_stream(parts["mlp_conv"], h, scale, grid)
    h = F.gelu(h) if isinstance(block.mlp.gelu, nn.GELU) else h * torch.sigmoid(1.702 * h)
    return x + block.mlp.c_proj(h)


def run_block(
    block: Any, x: Tensor, parts: Any, scale: Tensor | None, mask: Tensor | None, grid: tuple[int, int] | None
) -> Tensor:
    """One whole block for `x` [length, batch, width]; `parts` are its two adapters, or None."""
    h = block.ln_1(x)
    if parts is not None and scale is not None:
        h = adapt_stream(parts["att_conv"], h, scale, grid)
    return mlp(block, x + attention(block, h, h, mask), parts, scale, grid)


def run_last_block(
    block: Any,
    x: Tensor,
    read: Tensor,
    parts: Any,
    scale: Tensor,
    mask: Tensor | None,
    grid: tuple[int, int] | None,
) -> Tensor:
    """The last block for the token `read` [batch] of each sequence; returns [batch, width]."""
    rows = torch.arange(x.shape[1], device=x.device)
    h = adapt_stream(parts["att_conv"], block.ln_1(x), scale, grid)
    if mask is not None:
        mask = mask[read].repeat_interleave(block.attn.num_heads, dim=0).unsqueeze(1)
    x = x[read, rows].unsqueeze(0) + attention(block, h[read, rows].unsqueeze(0), h, mask)
    # Of an image only CLS is left, which has no adapter.
    return mlp(block, x, None if grid else parts, scale, None)[0]


def run_blocks(
    model: AdaptedCLIP,
    tower: str,
    blocks: Any,
    x: Tensor,
    scales: Scales,
    mask: Tensor | None,
    read: Tensor | None,
) -> Tensor:
    adapters = getattr(model.adapters, f"{tower}_adapter")
    grid = model.grid if tower == "visual" else None
    for i, block in enumerate(blocks, 1):
        parts = dict(adapters).get(str(i))
        scale = scales[i - model.start] if parts is not None else None
        if read is not None and i == len(blocks) and scale is not None:
            return run_last_block(block, x, read, parts, scale, mask, grid)
        x = run_block(block, x, parts, scale, mask, grid)
    return x


def encode_image(model: AdaptedCLIP, images: Tensor, scales: Scales, last: bool = False) -> Tensor:
    """Image features [batch, E] of preprocessed `images` [batch, 3, size, size]."""
    visual = model.clip.visual
    x = visual._embeds(images).permute(1, 0, 2)
    cls = torch.zeros(len(images), dtype=torch.long, device=images.device)
    x = run_blocks(model, "visual", visual.transformer.resblocks, x, scales, None, cls if last else None)
    return visual.ln_post(x if last else x[0]) @ visual.proj


def encode_text(
    model: AdaptedCLIP, tokens: Tensor, scales: Scales, cut: bool = False, last: bool = False
) -> Tensor:
    """Text features [n, E] of `tokens` [n, 77]."""
    tower = text_tower(model.clip)
    if cut:
        tokens = cut_texts(model.clip, tokens)
    length, eot = tokens.shape[1], tokens.argmax(dim=-1)
    with torch.no_grad():
        x = (tower.token_embedding(tokens) + tower.positional_embedding[:length]).permute(1, 0, 2)
    mask = tower.attn_mask[:length, :length]
    x = run_blocks(model, "text", tower.transformer.resblocks, x, scales, mask, eot if last else None)
    x = tower.ln_final(x)
    if not last:
        x = x[eot, torch.arange(len(tokens), device=tokens.device)]
    return x @ tower.text_projection


def step_loss(
    model: AdaptedCLIP,
    images: Tensor,
    tokens: Tensor,
    targets: Tensor,
    scales: tuple[Scales, Scales],
    label_smoothing: float,
    cut: bool = False,
    last: bool = False,
) -> Tensor:
    """The loss of a training step; `tokens` [n_selected, 77], one prompt a class; `scales` of texts and images."""
    text = F.normalize(encode_text(model, tokens, scales[0], cut, last).float(), dim=-1)
    image = F.normalize(encode_image(model, images, scales[1], last).float(), dim=-1)
    logits = model.logit_factor() * image @ text.T
    return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)


@torch.no_grad()
def classifier(model: AdaptedCLIP, tokens: Tensor, scales: Scales) -> Tensor:
    """The classifier [n_classes, E] of `tokens` [n_classes, n_prompts, 77], one prompt of each class at a time."""
    total = torch.zeros(())
    for i in range(tokens.shape[1]):
        total = total + F.normalize(encode_text(model, tokens[:, i], scales).float(), dim=-1).cpu()
    return F.normalize(total / tokens.shape[1], dim=-1)


class ImageFiles(Dataset):
    """Image files with open_clip's transform, decoded one at a time."""

    def __init__(self, paths: Sequence[Path], labels: Sequence[int], transform: Any) -> None:
        self.paths, self.labels, self.transform = paths, labels, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        with Image.open(self.paths[i]) as image:
            return self.transform(image.convert("RGB")), self.labels[i]


def train_transform(size: int) -> Any:
    """CoOp's augmentation: a random resized crop (bicubic) and a flip."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )


@torch.no_grad()
def image_features(model: AdaptedCLIP, loader: DataLoader, scales: Scales, device: str) -> Tensor:
    """Normalised features [n, E] of the images of `loader`."""
    features = [encode_image(model, batch.to(device), scales).float() for batch, _ in loader]
    return F.normalize(torch.cat(features), dim=-1).cpu()
