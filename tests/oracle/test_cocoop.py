"""CoCoOp: parity with the official implementation."""

import open_clip
import pytest
import torch
import torch.nn.functional as F

from heba.data.images import Images
from heba.fit.prompts import begin_with
from heba.methods.cocoop import method, settings
from tests.oracle import prompts
from tests.oracle.features import normalised


def settings_of(case):
    """The settings that the oracle's configuration is."""
    config = {key.rpartition(".")[2]: value for key, value in case.config.items()}
    return settings.Settings(
        words=config.get("CTX_INIT", "a photo of a") or None,
        context=config.get("N_CTX", 4),
        epochs=case.about["epochs"],
        batch_size=case.variant["traj_batch"],
        lr=case.variant["base_lr"],
        momentum=case.variant["momentum"],
        weight_decay=case.variant["weight_decay"],
    )


def model_of(case, ours):
    """The model at the initial parameters."""
    model = method.build(case.clip, len(case.about["base_classes"]), ours, seed=0)
    if ours.words:  # the official start, from the words themselves
        begin_with(model, prompts.tokenizer, ours.words)
        prompts.close("cocoop", "start", model.learned["ctx"].detach(), case.own["init.ctx"], 1e-7)
    prompts.load(model.learned, case.part("init"))
    return model


def images_of(features):
    return Images.of_features(features, features[:, :0])


@prompts.variants("cocoop")
def test_cocoop(case):
    ours, classes = settings_of(case), case.classes()
    model = model_of(case, ours)
    with torch.no_grad():
        features = case.clip.encode_image(case.shared["images"])
    labels, images = case.shared["labels"].long(), images_of(features)
    prompts.close("cocoop", "features", features, case.own["image_features"], prompts.FEATURES)
    texts = method.texts_of(model, classes, ours).times(len(features))
    found, expected = model.encode_shifted(texts, normalised(features)), normalised(case.own["text_features"])
    prompts.close("cocoop", "features", found.detach(), expected, prompts.FEATURES)
    found = model.logits(texts, features)
    prompts.close("cocoop", "logits", found.detach(), case.own["logits"], prompts.LOGITS)
    if "grad_loss" in case.variant:
        prompts.check_gradients("cocoop", case, model.learned, F.cross_entropy(found, labels))
    if "steps" in case.variant:
        n_images = case.about["batches_per_epoch"] * ours.batch_size
        run = prompts.Run(seed=1, shots=prompts.FEW_SHOTS)
        training = method.training_of(model, n_images, classes, ours, run)
        prompts.check_training("cocoop", case, training, case.source(case.clip.encode_image))
        found = method.logits(model, method.classifier(model, classes, ours, True), images)
        prompts.close("cocoop", "logits after training", found, case.own["final_logits"], prompts.FINAL_LOGITS)
    if "novel.logits" in case.own:
        found = method.logits(model, method.classifier(model, case.classes(novel=True), ours, False), images)
        prompts.close("cocoop", "logits of new classes", found, case.own["novel.logits"], prompts.FINAL_LOGITS)


@pytest.mark.parametrize("at_once", [1, 2, 5, 11])
@prompts.variants("cocoop")
def test_few_texts_at_once(case, at_once, monkeypatch):
    """Fewer than there are classes, or those of some of the images."""
    model, encode, sizes = model_of(case, settings_of(case)), method.Model.encode_shifted, []
    classifier = method.classifier(model, case.classes(), settings_of(case), True)

    def counted(model, texts, features):
        sizes.append(len(texts.tokens))
        return encode(model, texts, features)

    monkeypatch.setattr(method.Model, "encode_shifted", counted)
    monkeypatch.setattr(method, "AT_ONCE", {"cpu": at_once})
    found = method.logits(model, classifier, images_of(case.own["image_features"]))
    prompts.close("cocoop", "logits", found, case.own["logits"], prompts.LOGITS)
    assert max(sizes) <= at_once
    assert sum(sizes) == found.numel()


@prompts.variants("cocoop")
def test_the_model_at_vit_b16(case):
    with torch.device("meta"):  # it has no values
        clip = open_clip.model.CLIP(**open_clip.get_model_config("ViT-B-16-quickgelu"))
        model = method.build(clip, 10, settings.Settings(), seed=1)
    shapes = {name: list(p.shape) for name, p in method.trained(model).named_parameters()}
    for official in case.about["parameters_at_vit_b16"].values():
        assert shapes == {name: group["shape"] for name, group in official["first_groups"].items()}
        assert sum(p.numel() for p in method.trained(model).parameters()) == official["trainable"]


@prompts.variants("cocoop")
def test_the_start_at_random(case):
    learned = method.build(case.clip, 2, settings.Settings(words=None, context=64), seed=1).learned
    assert learned["ctx"].std().item() == pytest.approx(0.02, rel=0.1)
    for layer in (learned.meta_net.linear1, learned.meta_net.linear2):
        bound = layer.in_features**-0.5
        assert bound / 2 < layer.weight.abs().max() <= bound
        assert layer.bias.abs().max() <= bound


def test_a_bottleneck_without_width_is_refused():
    clip = open_clip.model.CLIP(
        embed_dim=8,
        vision_cfg={"image_size": 8, "patch_size": 4, "width": 16, "head_width": 8, "layers": 1},
        text_cfg={"context_length": 16, "vocab_size": 100, "width": 16, "heads": 2, "layers": 1},
    )
    with pytest.raises(ValueError, match=r"cocoop\.reduction: 16 leaves nothing of features of width 8"):
        method.build(clip, 2, settings.Settings(), seed=1)
