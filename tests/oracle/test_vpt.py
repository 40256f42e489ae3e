"""VPT: parity with the implementation in the repository of MaPLe."""

import re

import torch
import torch.nn.functional as F

from heba.data.images import Images
from heba.methods.vpt import method, settings
from tests.oracle import prompts


def settings_of(case):
    """The settings that the oracle's configuration is, of which CTX_INIT is not read officially."""
    config = {key.rpartition(".")[2]: value for key, value in case.config.items()}
    return settings.Settings(
        context=config["N_CTX_VISION"],
        depth=config["PROMPT_DEPTH_VISION"],
        epochs=case.about["epochs"],
        batch_size=case.variant["traj_batch"],
        lr=case.variant["base_lr"],
        weight_decay=case.variant["weight_decay"],
    )


def renamed(name):
    """Our name of a parameter."""
    name = name.replace("image_encoder.VPT", "image.0")
    return re.sub(r"image_encoder\.transformer\.resblocks\.(\d+)\.VPT_shallow", r"image.\1", name)


@prompts.variants("vpt")
def test_vpt(case):
    ours, classes, clip = settings_of(case), case.classes(), case.clip
    model = method.build(clip, len(classes.names), ours, seed=0)
    assert abs(torch.cat(model.prompts()).detach().std() / 0.02 - 1) < 0.4
    prompts.load(model.learned, {renamed(name): tensor for name, tensor in case.part("init").items()})
    pixels, labels = case.shared["images"], case.shared["labels"].long()
    image, weights = model.encode_image(pixels), method.weights_of(model, classes, ours)
    prompts.close("vpt", "features", image.detach(), case.own["image_features"], prompts.FEATURES)
    expected = F.normalize(case.own["text_features"], dim=-1)
    prompts.close("vpt", "features", weights, expected, prompts.FEATURES)
    found = method.feature_logits(clip, image, weights)
    prompts.close("vpt", "logits", found.detach(), case.own["logits"], prompts.LOGITS)
    if "grad_loss" in case.variant:
        prompts.check_gradients("vpt", case, model.learned, F.cross_entropy(found, labels), renamed)

    def logits_of(classes, trained):
        return method.logits(model, method.classifier(model, classes, ours, trained), Images.of_pixels(pixels))

    if "steps" in case.variant:
        n_images = case.about["batches_per_epoch"] * ours.batch_size
        training = method.training_of(model, n_images, classes, ours, prompts.Run(seed=1))
        prompts.check_training("vpt", case, training, case.source(), renamed)
        found, expected = logits_of(classes, True), case.own["final_logits"]
        prompts.close("vpt", "logits after training", found, expected, prompts.FINAL_LOGITS)
    if "novel.logits" in case.own:
        novel = case.classes(novel=True)
        found, expected = method.weights_of(model, novel, ours), case.own["novel.text_features"]
        prompts.close("vpt", "features of new classes", found, F.normalize(expected, dim=-1), prompts.FEATURES)
        found, expected = logits_of(novel, False), case.own["novel.logits"]
        prompts.close("vpt", "logits of new classes", found, expected, prompts.FINAL_LOGITS)


@prompts.cases("vpt")
def test_the_parameters_of_vit_b16(about):
    prompts.check_counts(about, "vpt", ["base_to_novel"])
