"""Stage `cost`: the operations of a method, counted by torch, without weights.

out/cost/<method>.json   `Cost`
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
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


class Tower(NamedTuple):
    """Of one image or prompt in a tower: the operations of a test pass, those of a training step with the
    backward, and the bytes that autograd keeps for it, in fp32, without the weights and with the matrices
    of attention."""

    test: int
    train: int
    kept: int


class Counts(NamedTuple):
    image: Tower
    text: Tower


def count(clip: Any, model: Any, text_length: int, frozen: Counts | None = None) -> Counts:
    """Run one image and one prompt of `text_length` tokens through the towers of a method's `model`, where it has
    its own, else through the frozen ones, and count.

    Args:
        frozen: what was counted of the frozen towers, so that they need not run again.
    """
    clip.requires_grad_(False)
    modules = [clip] if model is None else [clip, model]
    weights = {_storage(t) for module in modules for t in (*module.parameters(), *module.buffers())}
    own_image, own_text = getattr(model, "encode_image", None), getattr(model, "encode_text", None)
    if frozen and not own_image:
        image = frozen.image
    else:
        size = preprocess_of(clip).size
        pixels = torch.zeros(1, 3, size, size, device=clip.logit_scale.device)
        image = _count(own_image or clip.encode_image, pixels, weights)
    if frozen and not own_text:
        return Counts(image, frozen.text)
    text = text_tower(clip)
    tokens = torch.zeros(1, text.context_length, dtype=torch.long)
    last = text.token_embedding.num_embeddings - 1
    tokens[0, text_length - 1] = eos_id(text) if pool_type(text) == "eos" else last
    encode_text = own_text or (lambda tokens: encode_text_plain(clip, tokens))
    return Counts(image, _count(encode_text, tokens, weights))


def _count(encode: Callable[[Tensor], Tensor], value: Tensor, weights: set[int]) -> Tower:
    kept: list[Tensor] = []  # all of them until the end, or two would be in one place, one after the other

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    saved = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with FlopCounterMode(display=False) as counter, saved:
        features = encode(value)
        test = counter.get_total_flops()
        if features.requires_grad:  # not where a tower is left plain
            features.sum().backward()
    sizes = {_storage(tensor): tensor.untyped_storage().nbytes() for tensor in kept}
    of_graph = sum(size for storage, size in sizes.items() if storage not in weights)
    return Tower(test, counter.get_total_flops(), of_graph)


def _storage(tensor: Tensor) -> int:
    """What two tensors have in common that share their memory, on the device meta too, where it has no address."""
    return tensor.untyped_storage()._cdata


def run(params: Params, method: str) -> str:
    """Count, with the settings of the first protocol that the method is trained for; returns a line about it."""
    protocol = next(name for name, p in PROTOCOLS.items() if p.trained_as == name and trains(method, name))
    settings = settings_of(params, method, protocol)
    about, part = methods.part(method, "settings"), methods.part(method, "method")
    with torch.device("meta"):  # shapes are enough
        clip = build(read_architecture(params.backbone.name, main_root()))
        model = part.build(clip, CLASSES, settings, seed=0)
    counts = count(clip, model, TEXT_LENGTH)
    part.detach(model)
    work = about.work(settings, CLASSES * IMAGES, CLASSES)
    found = Cost(
        image=counts.image.test + work.tested * counts.text.test,
        step=work.images * counts.image.train + work.prompts * counts.text.train,
        steps=work.steps,
    )
    with new_file(cost_path(method)) as path:
        write_cost(found, path)
    return f"{found.image / 1e9:.2f} GFLOP an image, {found.step / 1e9:.2f} a step"
