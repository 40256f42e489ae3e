"""The frozen CLIP that params.yaml names, its tokenizer, device and precision."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pipeline.params import Params


def load_backbone(params: Params) -> tuple[Any, Callable[[list[str]], Tensor]]:
    """The model (fp32, eval mode, on the device of params) and its tokenizer."""
    if params.backbone.name == "tiny":
        from heba.embedded.model import load_tiny_clip

        clip, tokenizer = load_tiny_clip()
    else:
        import open_clip

        clip = open_clip.create_model(params.backbone.name, pretrained=params.backbone.pretrained)
        tokenizer = open_clip.get_tokenizer(params.backbone.name)
    return clip.to(device(params)).eval(), tokenizer


def device(params: Params) -> torch.device:
    """`device` of params; auto takes the GPU when there is one."""
    if params.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda, but torch finds no GPU; set device: auto or cpu in params.yaml")
    if params.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(params.device)


def use_bf16(params: Params) -> bool:
    """bf16 autocast where params say so; auto means on a GPU."""
    return params.precision == "bf16" or (params.precision == "auto" and device(params).type == "cuda")
