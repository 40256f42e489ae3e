"""CLIP-LoRA: parity with the official implementation."""

import math

import numpy as np
import open_clip
import pytest
import torch

from heba.clip.towers import frozen_texts
from heba.data.images import Images
from heba.fit.run import Run
from heba.methods.clip_lora import method, settings
from tests.oracle import towers
from tests.oracle.features import normalised
from tests.oracle.prompts import close

PER_EPOCH = 4  # batches, so that the last epoch of a case is cut
LOGITS = 2 * towers.LOGITS  # 100 times a cosine
# The official names of parts of the towers, and their blocks, from 0.
TOWERS = {"both": "both", "text": "text", "vision": "image"}
POSITIONS = {
    "all": (0, None),
    "bottom": (0, 3),
    "mid": (4, 7),
    "up": (8, 11),
    "half-up": (6, 11),
    "half-bottom": (0, 5),
    "top": (11, 11),
    "top3": (9, 11),
}


def settings_of(case, dropout=0.0):
    """The settings of a case; its training is without dropout."""
    args = case.about["case"]["args"]
    first, last = POSITIONS[args["position"]]
    deepest = max(case.about["case"]["clip"][depth] for depth in ("vlayers", "tlayers"))
    return settings.Settings(
        towers=TOWERS[args["encoder"]],
        start=first + 1,
        end=None if last is None or last + 1 >= deepest else last + 1,
        projections=["out" if name == "o" else name for name in args["params"]],
        rank=args["r"],
        alpha=float(args["alpha"]),
        dropout=dropout,
        steps_per_shot=args["n_iters"],
        batch_size=case.about["case"]["batch"],
        lr=args["lr"],
    )


def ours(tensors):
    """Tensors by our names, of <block>.attn.<projection>.w_lora_{A,B}; the others are left out."""
    found = {}
    for name, tensor in tensors.items():
        block, _, rest = name.partition(".attn.")
        if rest and "w_lora" in rest:
            projection, _, matrix = rest.partition(".w_lora_")
            projection = {"proj": "out", "out_proj": "out"}.get(projection, projection.removesuffix("_proj"))
            tower = "image" if block.startswith("visual.") else "text"
            found[f"{tower}.{int(block.rpartition('.')[2]) + 1}.{projection}.{matrix}"] = tensor
    return found


def compared(kind, found, expected, tolerance):
    close("clip_lora", kind, found, expected, tolerance)


class Masks:
    """Dropout by the masks of a case, in the order in which our blocks ask for them."""

    def __init__(self, case, model, packing):
        self.p, self.masks = case.about["grad"]["dropout"]["p"], []
        for tower, block in (("text", "transformer"), ("image", "visual.transformer")):
            depth = len(
                model.clip.transformer.resblocks if tower == "text" else model.clip.visual.transformer.resblocks
            )
            for layer, parts in model.lora[tower].items():
                last = int(layer) == depth
                for projection in ("k", "v", "q", "out") if last else ("q", "k", "v", "out"):
                    if projection not in parts:
                        continue
                    official = "proj" if projection == "out" else f"{projection}_proj"
                    mask = self.unpack(case.tensors[f"mask.{block}.resblocks.{int(layer) - 1}.attn.{official}"])
                    alone = last and projection in ("q", "out")  # for the tokens that are read
                    if tower == "text":
                        mask = packing.pack(mask[:, : packing.length])
                        mask = mask[packing.read] if alone else mask
                    elif alone:
                        mask = mask[:, 0]
                    self.masks.append(mask)

    @staticmethod
    def unpack(packed):
        """[length, n, width / 8] bytes to [n, length, width]."""
        bits = np.unpackbits(packed.numpy(), axis=-1, bitorder="little")
        return torch.from_numpy(bits).float().transpose(0, 1)

    def __call__(self, z):
        mask = self.masks.pop(0)
        assert mask.shape == z.shape
        return z * mask / (1 - self.p)


@towers.cases("cliplora", "CLIP-LoRA")
def test_clip_lora(case):
    chosen, tensors, classes = settings_of(case), case.tensors, case.classes()
    model = method.build(case.clip, len(classes.names), chosen, seed=0)
    start = {name: tensor.clone() for name, tensor in model.lora.state_dict().items()}
    model.lora.load_state_dict(ours(case.part("pert")))
    assert torch.equal(method.tokens_of(classes), classes.tokens)
    with torch.no_grad():
        images, texts = model.encode_image(tensors["images"][:8]), model.encode_text(classes.tokens)
    compared("features", normalised(images), tensors["fwd.image_features"], towers.FEATURES)
    compared("features", normalised(texts), tensors["fwd.text_features"], towers.FEATURES)
    compared("logits", method.cosines(images, texts), tensors["fwd.logits"], LOGITS)
    frozen, packing = frozen_texts(model.clip, classes.tokens, model.first["text"])
    loss = method.loss_of(model, classes)
    for name, drop in (("p0", lambda: method.whole), ("dropout", lambda: Masks(case, model, packing))):
        batch, expected = case.about["grad"][name], case.part(f"grad.{name}")
        x, labels = case.batch(batch)
        masks = drop()
        with torch.no_grad():
            texts = model.encode_text_from(frozen, packing, masks)
            found = method.cosines(model.encode_image(x, masks), texts)
        compared("logits", found, expected["logits"], LOGITS)
        value = loss(x, labels, drop())
        towers.check_gradients("clip_lora", model.lora, value, batch["loss"], ours(expected))
        assert name == "p0" or not masks.masks
    check_start(start, ours(case.part("init")))
    model.lora.load_state_dict(ours(case.part("init")))
    args = case.about["case"]["args"]
    run = Run(seed=1, shots=args["shots"])
    training = method.training_of(model, PER_EPOCH * chosen.batch_size, classes, chosen, run)
    assert training.step_lr(len(case.steps)) == pytest.approx(case.about["trajectory"]["lr_after_the_last_step"])
    source = method.with_seeds(case.source(PER_EPOCH))
    towers.check_training("clip_lora", case, training, source, ours(case.part("final")), run)
    for kind in ("base", "novel"):
        kept = method.classifier(model, case.classes(kind), chosen, kind == "base")
        expected = tensors[f"final_{kind}.text_features"]
        compared("features after training", kept["weights"], expected, towers.FEATURES)
        found = method.logits(model, kept, Images.of_pixels(tensors["images"]))
        compared("logits after training", found, tensors[f"final_{kind}.logits"], LOGITS)


def check_start(found, official):
    """B is zero, and A uniform within 1 / sqrt(width)."""
    assert set(found) == set(official)
    for name, tensor in found.items():
        bound = 1 / math.sqrt(max(tensor.shape))
        for values in (tensor, official[name]):
            if name.endswith(".B"):
                assert not values.any()
            else:
                assert 0.8 * bound < values.abs().max() <= bound


def vit_b16():
    """The architecture alone, without weights."""
    with torch.device("meta"):
        return open_clip.CLIP(**open_clip.get_model_config("ViT-B-16-quickgelu"))


@towers.cases("cliplora", "CLIP-LoRA")
def test_sizes_and_initial_values_at_vit_b16(case):
    about, chosen = case.about["vit_b16"], settings.Settings()
    clip = vit_b16()
    with torch.device("meta"):
        lora = method.build(clip, 2, chosen, seed=0).lora
    sizes = {name: parameter.numel() for name, parameter in lora.named_parameters()}
    assert (len(sizes), sum(sizes.values())) == (about["tensors"], about["trainable"])
    for part, key in (("text", "text"), ("image", "visual")):
        assert sum(size for name, size in sizes.items() if name.startswith(part)) == about[key]
    for name, expected in about["initial_statistics_of_layer_0"].items():
        width = max(expected["shape"])
        made = dict(method.Lora(width, chosen.rank, 1.0).named_parameters())[name[-1]].detach()
        assert list(made.shape) == expected["shape"]
        assert made.std().item() == pytest.approx(expected["std"], rel=0.1)
        assert made.abs().max().item() == pytest.approx(expected["max"], rel=0.02)
