"""MaPLe: parity with the official implementation."""

import re

import torch
import torch.nn.functional as F

from heba.data.images import Images
from heba.methods.maple import method, settings
from tests.oracle import prompts

LEARNER = "prompt_learner"


def settings_of(case):
    """The settings that the oracle's configuration is; officially, a context of more than 4 is random."""
    config = {key.rpartition(".")[2]: value for key, value in case.config.items()}
    return settings.Settings(
        words=(config["CTX_INIT"] or None) if config["N_CTX"] <= 4 else None,
        context=config["N_CTX"],
        depth=config["PROMPT_DEPTH"],
        epochs=case.about["epochs"],
        batch_size=case.variant["traj_batch"],
        lr=case.variant["base_lr"],
        weight_decay=case.variant["weight_decay"],
    )


def renamed(name):
    """Our name of a parameter."""
    name = name.replace(f"{LEARNER}.ctx", "text.0").replace(f"{LEARNER}.proj.", "project.0.")
    deep = {"compound_prompts_text": "text", "compound_prompt_projections": "project"}
    return re.sub(rf"{LEARNER}\.({'|'.join(deep)})\.(\d+)", lambda m: f"{deep[m[1]]}.{int(m[2]) + 1}", name)


@prompts.variants("maple")
def test_maple(case):
    ours, classes, clip = settings_of(case), case.classes(), case.clip
    model = method.build(clip, len(classes.names), ours, seed=0)
    initial = {renamed(name): tensor for name, tensor in case.part("init").items()}
    if ours.words:  # the official start, from the words themselves
        start = model.learned.text[0]
        method.begin_with_first(start, clip, classes.tokenizer, ours.words)
        prompts.close("maple", "start", start.detach(), initial["text.0"], 1e-7)
    prompts.load(model.learned, initial)
    for j, found in enumerate(model.learned.image()):
        prompts.close("maple", "features", found.detach(), case.own[f"visual_prompts.{j}"], prompts.FEATURES)
    texts = method.texts_of(clip, classes, ours)
    pixels, labels = case.shared["images"], case.shared["labels"].long()
    image, text = model.encode_image(pixels), model.encode_text(texts.tokens)
    prompts.close("maple", "features", image.detach(), case.own["image_features"], prompts.FEATURES)
    prompts.close("maple", "features", text.detach(), case.own["text_features"], prompts.FEATURES)
    found = method.feature_logits(clip, image, model.weights(texts))
    prompts.close("maple", "logits", found.detach(), case.own["logits"], prompts.LOGITS)
    if "grad_loss" in case.variant:
        prompts.check_gradients("maple", case, model.learned, F.cross_entropy(found, labels), renamed)

    def logits_of(classes, trained):
        return method.logits(model, method.classifier(model, classes, ours, trained), Images.of_pixels(pixels))

    if "steps" in case.variant:
        n_images = case.about["batches_per_epoch"] * ours.batch_size
        training = method.training_of(model, n_images, classes, ours, prompts.Run(seed=1))
        prompts.check_training("maple", case, training, case.source(), renamed)
        found, expected = logits_of(classes, True), case.own["final_logits"]
        prompts.close("maple", "logits after training", found, expected, prompts.FINAL_LOGITS)
    if "novel.logits" in case.own:
        novel = case.classes(novel=True)
        found, expected = method.classifier(model, novel, ours, False)["weights"], case.own["novel.text_features"]
        prompts.close("maple", "features of new classes", found, F.normalize(expected, dim=-1), prompts.FEATURES)
        found, expected = logits_of(novel, False), case.own["novel.logits"]
        prompts.close("maple", "logits of new classes", found, expected, prompts.FINAL_LOGITS)


@prompts.variants("maple")
def test_the_start(case):
    """The later maps begin equal, and apart from the first one."""
    ours = settings_of(case)
    learned = method.build(case.clip, 2, ours, seed=0).learned
    first, *later = [map_.weight for map_ in learned.project]
    assert all(torch.equal(weight, later[0]) for weight in later)
    assert not any(torch.equal(weight, first) for weight in later)
    vectors = torch.cat([vectors.detach().flatten() for vectors in learned.text])
    assert abs(vectors.std() / 0.02 - 1) < 0.4


@prompts.cases("maple")
def test_the_parameters_of_vit_b16(about):
    prompts.check_counts(about, "maple", ["base_to_novel", "cross_dataset"])
