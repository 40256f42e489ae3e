"""Stage `cost`: the operations of a method, counted by torch, with random weights.

out/cost/<method>.json   `Cost`
"""

from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from heba import methods
from heba.clip.architecture import read_architecture
from heba.clip.backbone import build
from heba.clip.preprocess import preprocess_of
from heba.clip.towers import encode_text_plain, eos_id, pool_type, text_tower
from heba.data.protocols import PROTOCOLS
from heba.evaluation.cost import CLASSES, IMAGES, Cost, write_cost
from pipeline.core.params import Params, settings_of
from pipeline.core.paths import main_root, new_file
from pipeline.core.trainings import cost_path, trains

TEXT_LENGTH = 32  # tokens of a prompt


class Flops(NamedTuple):
    """Operations of one image and one prompt: in a test pass, and with the backward in a training step."""

    image: int
    text: int
    image_train: int
    text_train: int


def count_flops(clip: Any, model: Any, text_length: int) -> Flops:
    """Run one image and one prompt of `text_length` tokens through the towers of a method's `model`, where it has
    its own, else through the frozen ones, and count."""
    text = text_tower(clip)
    size = preprocess_of(clip).size
    tokens = torch.zeros(1, text.context_length, dtype=torch.long)
    last = text.token_embedding.num_embeddings - 1
    tokens[0, text_length - 1] = eos_id(text) if pool_type(text) == "eos" else last
    image = torch.zeros(1, 3, size, size)
    clip.requires_grad_(False)

    def count(encode: Any, value: torch.Tensor, train: bool) -> int:
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(train):
            features = encode(value)
            if train and features.requires_grad:  # not where a tower is left plain
                features.sum().backward()
        return int(counter.get_total_flops())

    encode_image = getattr(model, "encode_image", clip.encode_image)
    encode_text = getattr(model, "encode_text", lambda tokens: encode_text_plain(clip, tokens))
    return Flops(
        count(encode_image, image, False),
        count(encode_text, tokens, False),
        count(encode_image, image, True),
        count(encode_text, tokens, True),
    )


def run(params: Params, method: str) -> str:
    """Count, with the settings of the first protocol that the method is trained for; returns a line about it."""
    protocol = next(name for name, p in PROTOCOLS.items() if p.trained_as == name and trains(method, name))
    settings = settings_of(params, method, protocol)
    about, part = methods.part(method, "settings"), methods.part(method, "method")
    clip = build(read_architecture(params.backbone.name, main_root()))
    model = part.build(clip, CLASSES, settings, seed=0)
    flops = count_flops(clip, model, TEXT_LENGTH)
    part.detach(model)
    work = about.work(settings, CLASSES * IMAGES, CLASSES)
    found = Cost(
        image=flops.image + work.tested * flops.text,
        step=work.images * flops.image_train + work.prompts * flops.text_train,
        steps=work.steps,
    )
    with new_file(cost_path(method)) as path:
        write_cost(found, path)
    return f"{found.image / 1e9:.2f} GFLOP an image, {found.step / 1e9:.2f} a step"
