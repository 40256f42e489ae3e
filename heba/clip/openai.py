"""OpenAI's CLIP checkpoints as models of open_clip."""

from typing import Any

from torch import Tensor


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
