"""CoOp: parity with the official implementation."""

import pytest
import torch
import torch.nn.functional as F

from heba.data.images import Images
from heba.methods.coop import method, settings
from tests.oracle import prompts


def settings_of(case):
    """The settings that the oracle's configuration is."""
    config = {key.rpartition(".")[2]: value for key, value in case.config.items()}
    return settings.Settings(
        words=config["CTX_INIT"] or None if "CTX_INIT" in config else None,
        context=config.get("N_CTX", 16),
        per_class=config.get("CSC", False),
        position=config.get("CLASS_TOKEN_POSITION", "end"),
        epochs=case.about["epochs"],
        batch_size=case.variant["traj_batch"],
        lr=case.variant["base_lr"],
        weight_decay=case.variant["weight_decay"],
    )


@prompts.variants("coop")
def test_coop(case):
    ours, classes, clip = settings_of(case), case.classes(), case.clip
    model = method.build(clip, len(classes.names), ours, seed=0)
    if ours.words:  # the official start, from the words themselves
        method.begin_with(model, classes.tokenizer, ours.words)
        prompts.close("coop", "start", model.learned["ctx"].detach(), case.own["init.ctx"], 1e-7)
    prompts.load(model.learned, case.part("init"))
    texts = method.texts_of(clip, classes.names, classes.tokenizer, ours)
    with torch.no_grad():
        features = clip.encode_image(case.shared["images"])
    labels = case.shared["labels"].long()
    prompts.close("coop", "features", features, case.own["image_features"], prompts.FEATURES)
    expected = F.normalize(case.own["text_features"], dim=-1)
    prompts.close("coop", "features", model.encode(texts).detach(), expected, prompts.FEATURES)
    found = method.feature_logits(clip, features, model.encode(texts))
    prompts.close("coop", "logits", found.detach(), case.own["logits"], prompts.LOGITS)
    if "grad_loss" in case.variant:
        prompts.check_gradients("coop", case, model.learned, F.cross_entropy(found, labels))
    if "steps" in case.variant:
        run = prompts.Run(seed=1, shots=prompts.FEW_SHOTS)
        n_images = case.about["batches_per_epoch"] * ours.batch_size
        training = method.training_of(model, n_images, classes, ours, run)
        prompts.check_training("coop", case, training, case.source(clip.encode_image))
        found = method.logits(model, method.classifier(model, classes, ours, True), images(features))
        prompts.close("coop", "logits after training", found, case.own["final_logits"], prompts.FINAL_LOGITS)
    novel = case.classes(novel=True)
    if "novel.logits" in case.own:
        found = method.logits(model, method.classifier(model, novel, ours, False), images(features))
        prompts.close("coop", "logits of new classes", found, case.own["novel.logits"], prompts.FINAL_LOGITS)
    if ours.per_class:
        with pytest.raises(ValueError, match=r"coop\.per_class: new classes have no context"):
            method.classifier(model, novel, ours, False)


def images(features):
    return Images.of_features(features, features[:, :0])
