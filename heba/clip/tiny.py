"""The tiny CLIP: open_clip's architecture and tokenizer, weights from this repository."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parent / "tiny_clip"
TOKEN_TABLE = "token_embedding.weight"


def new_tiny_clip() -> tuple[Any, Callable[[list[str]], Tensor]]:
    """The tiny architecture with random weights, and open_clip's tokenizer."""
    import open_clip

    config = json.loads((FOLDER / "config.json").read_text())
    tokenizer = open_clip.SimpleTokenizer(context_length=config["text_cfg"]["context_length"])
    return open_clip.CLIP(**config), tokenizer


def known_tokens() -> set[int]:
    """The tokens that pretraining saw; no others have an embedding."""
    return set(load_file(FOLDER / "model.safetensors")["token_ids"].tolist())


def words_of(texts: Iterable[str]) -> set[str]:
    """The words of some texts."""
    return {word.strip(".,") for text in texts for word in text.split()}


class KnownWords:
    """The tokenizer of the pretrained tiny CLIP, which refuses words without an embedding."""

    def __init__(self, tokenizer: Any) -> None:
        self.plain, self.known = tokenizer, known_tokens() | {0}

    def encode(self, text: str) -> list[int]:
        return self.plain.encode(text)

    def unknown(self, texts: list[str]) -> list[str]:
        """The words of `texts`, as far as they are read, that pretraining did not see."""
        tokens = set(self.plain(texts).flatten().tolist()) - self.known
        return sorted(word for word in words_of(texts) if tokens & set(self.encode(word))) if tokens else []

    def __call__(self, texts: list[str]) -> Tensor:
        """Tokens [n, context]; ValueError names the words that pretraining did not see."""
        if words := self.unknown(texts):
            raise ValueError(
                f"the tiny CLIP does not know {', '.join(words)}; take other words or a real backbone"
            )
        return self.plain(texts)


def load_tiny_clip() -> tuple[Any, Callable[[list[str]], Tensor]]:
    """The pretrained tiny CLIP (fp32, eval mode) and its tokenizer.

    The file has the rows of the token table that are in use; all others are zero here.
    """
    model, tokenizer = new_tiny_clip()
    state = {
        k: v.float() if v.is_floating_point() else v for k, v in load_file(FOLDER / "model.safetensors").items()
    }
    table = torch.zeros_like(model.token_embedding.weight)
    table[state.pop("token_ids")] = state[TOKEN_TABLE]
    model.load_state_dict(state | {TOKEN_TABLE: table})
    return model.eval(), KnownWords(tokenizer)
