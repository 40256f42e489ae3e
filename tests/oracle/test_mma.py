"""MMA: parity with the official implementation."""

import open_clip
import pytest
import torch
from torch import nn

from heba.clip.towers import encode_text_plain
from heba.data.images import Images
from heba.fit.run import Run
from heba.methods.mma import method, settings
from tests.oracle import towers
from tests.oracle.features import normalised
from tests.oracle.prompts import close


def settings_of(case):
    """The settings of a case."""
    of = case.about["case"]
    named = {name: of[name] for name in ("start", "end", "dim", "scale", "epochs", "lr")}
    return settings.Settings(batch_size=of["batch"], **named)


def compared(kind, found, expected, tolerance):
    close("mma", kind, found, expected, tolerance)


@towers.cases("mma", "MMA")
def test_mma(case):
    ours, tensors, per_epoch = settings_of(case), case.tensors, case.about["case"]["per_epoch"]
    classes = case.classes()
    model = method.build(case.clip, len(classes.names), ours, seed=0)
    model.adapters.load_state_dict(case.part("pert"))
    assert torch.equal(method.tokens_of(classes), classes.tokens)
    with torch.no_grad():
        images, texts = model.encode_image(tensors["images"][:8]), model.encode_text(classes.tokens)
    compared("features", normalised(images), tensors["fwd.image_features"], towers.FEATURES)
    compared("features", normalised(texts), tensors["fwd.text_features"], towers.FEATURES)
    compared("logits", model.logits(images, texts), tensors["fwd.logits"], towers.LOGITS)
    loss = method.loss_of(model, classes)
    for name, batch in case.about["grad"].items():
        x, labels = case.batch(batch)
        found = model.logits(model.encode_image(x), texts).detach()
        compared("logits", found, tensors[f"grad.{name}.logits"], towers.LOGITS)
        expected = case.part(f"grad.{name}")
        towers.check_gradients("mma", model.adapters, loss(x, labels), batch["loss"], expected)
    model.adapters.load_state_dict(case.part("init"))
    training = method.training_of(model, ours.batch_size * per_epoch, classes, ours, Run(seed=1))
    towers.check_training("mma", case, training, case.source(per_epoch))
    for kind in ("base", "novel"):
        kept = method.classifier(model, case.classes(kind), ours, kind == "base")
        expected = tensors[f"final_{kind}.text_features"]
        compared("features after training", kept["weights"], expected, towers.FEATURES)
        found = method.logits(model, kept, Images.of_pixels(tensors["images"]))
        compared("logits after training", found, tensors[f"final_{kind}.logits"], towers.LOGITS)


@towers.cases("mma", "MMA")
def test_without_what_they_add_the_towers_are_those_of_clip(case):
    model = method.build(case.clip, 2, settings_of(case), seed=0)
    for name, parameter in model.adapters.named_parameters():
        if ".up." in name:
            nn.init.zeros_(parameter)
    with torch.no_grad():
        images, tokens = case.tensors["images"][:8], case.classes().tokens
        found = normalised(model.encode_image(images)), normalised(model.encode_text(tokens))
    for features, kind in zip(found, ("image", "text"), strict=True):
        compared("features", features, case.tensors[f"fwd.{kind}_features_frozen"], towers.FEATURES)
    compared("features", found[1], normalised(encode_text_plain(case.clip, tokens)), towers.FEATURES)


def clip_of(layers, text_layers, width=32):
    return open_clip.CLIP(
        embed_dim=16,
        vision_cfg={"image_size": 8, "patch_size": 4, "width": width, "head_width": 16, "layers": layers},
        text_cfg={"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": text_layers},
    ).eval()


def test_blocks_that_a_tower_lacks_are_refused_and_fewer_blocks_of_images_are_not():
    clip = clip_of(layers=3, text_layers=4)
    with pytest.raises(ValueError, match=r"mma: start 2 and end 4 .* <= 3, .* \(text 4, image 3\)"):
        method.build(clip, 2, settings.Settings(start=2, end=4), seed=0)
    model = method.build(clip, 2, settings.Settings(start=2, end=3), seed=0)
    found = model.logits(
        model.encode_image(torch.randn(2, 3, 8, 8)), model.encode_text(towers.tokenizer(["a", "b"]))
    )
    found[:, 0].sum().backward()
    assert all(parameter.grad.any() for name, parameter in model.adapters.named_parameters() if "weight" in name)


@towers.cases("mma", "MMA")
def test_sizes_and_initial_values_at_vit_b16(case):
    about = case.about["vit_b16"]
    with torch.device("meta"):
        clip = open_clip.CLIP(**open_clip.get_model_config("ViT-B-16-quickgelu"))
        adapters = method.build(clip, 2, settings.Settings(), seed=0).adapters
    sizes = {name: parameter.numel() for name, parameter in adapters.named_parameters()}
    assert (len(sizes), sum(sizes.values())) == (about["tensors"], about["trainable"])
    for part, key in (("text", "text"), ("visual", "visual"), ("shared", "shared_between_towers")):
        assert sum(size for name, size in sizes.items() if name.startswith(part)) == about[key]
    made = dict(method.Adapters(512, 768, 5, 5, 32).named_parameters())
    for name, expected in about["initial_statistics_of_layer_5"].items():
        found = made[name.removeprefix("adapter_learner.")].detach()
        assert list(found.shape) == expected["shape"]
        assert found.std().item() == pytest.approx(expected["std"], rel=0.15)
        assert found.mean().item() == pytest.approx(0, abs=0.03)
