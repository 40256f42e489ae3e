"""ProGrad: parity with the official implementation."""

import pytest
import torch

from heba.fit.prompts import feature_logits, teachers
from heba.methods.prograd import method, settings
from tests.oracle import prompts


def settings_of(case):
    """The settings that the oracle's configuration is; any true CTX_INIT means the words of the template."""
    config = {key.rpartition(".")[2]: value for key, value in case.config.items()}
    return settings.Settings(
        words=case.about["prograd_template"].removesuffix(" {}.") if config["CTX_INIT"] else None,
        context=config["N_CTX"],
        share=config["LAMBDA"],
        temperature=config.get("T", 1.0),
        epochs=case.about["epochs"],
        batch_size=case.variant["traj_batch"],
        lr=case.variant["base_lr"],
        momentum=case.variant["momentum"],
        weight_decay=case.variant["weight_decay"],
    )


@prompts.variants("prograd")
def test_prograd(case):
    ours, template = settings_of(case), case.about["zero_shot_template"]
    classes, novel = case.classes_of(template), case.classes_of(template, novel=True)
    model = method.build(case.clip, len(classes.names), ours, seed=0)
    if ours.words:  # the official start, from the words themselves
        method.begin_with(model, classes.tokenizer, ours.words)
        prompts.close("prograd", "start", model.learned["ctx"].detach(), case.own["init.ctx"], 1e-7)
    prompts.load(model.learned, case.part("init"))
    features, labels = case.clip.encode_image(case.shared["images"]), case.shared["labels"].long()
    known = feature_logits(case.clip, features, teachers(case.clip, classes))
    prompts.close("prograd", "logits", known, case.own["zero_shot_logits"], prompts.LOGITS)
    if "grad_loss" in case.variant:
        own, general = method.losses_of(model, classes, ours)(features, labels)
        for found, kind in ((own, "ce"), (general, "kl")):
            prompts.close("prograd", "loss", found.detach(), case.variant["grad_loss"][kind], prompts.LOSSES)
        found = method.gradient(model.learned["ctx"], own, general, ours.share)
        prompts.close("prograd", "gradient", found, case.own["grad.ctx"], prompts.GRADIENTS, scaled=True)
    prompts.check_on_features("prograd", case, method, ours, model, classes, novel, kind="ce")


@prompts.variants("prograd")
def test_a_step_gives_way_where_it_did_officially(case):
    """Which steps are projected, and the loss against the teacher before each."""
    if "steps" not in case.variant:
        pytest.skip("no training is recorded")
    ours, classes = settings_of(case), case.classes_of(case.about["zero_shot_template"])
    model = method.build(case.clip, len(classes.names), ours, seed=0)
    prompts.load(model.learned, case.part("init"))
    ctx, losses = model.learned["ctx"], method.losses_of(model, classes, ours)
    run = prompts.Run(seed=1, shots=prompts.FEW_SHOTS)
    n_images = case.about["batches_per_epoch"] * ours.batch_size
    training = method.training_of(model, n_images, classes, ours, run)
    take, projected, general = training.take, [], []

    def recorded(features, labels):
        own, other = losses(features, labels)
        (a,) = torch.autograd.grad(own, ctx, retain_graph=True)
        projected.append(not torch.equal(a, method.gradient(ctx, own, other, ours.share)))
        general.append(other.item())
        return take(features, labels)

    object.__setattr__(training, "take", recorded)
    prompts.train_batches(training, case.source(case.clip.encode_image), run)
    assert projected == [step["projected"] for step in case.variant["steps"]]
    prompts.close("prograd", "losses of steps", general, case.steps("kl"), prompts.LOSSES)


@prompts.cases("prograd")
def test_the_parameters_at_vit_b16(about):
    prompts.check_parameters(about, method, settings.Settings())


def test_words_that_do_not_fit_into_the_context_are_refused():
    ours = settings.Settings(words="a type of food, a photo of", context=6)
    assert settings.problems(ours, None, None) == {"words": "7 words do not fit into a context of 6"}
    assert not settings.problems(ours.model_copy(update={"context": 7}), None, None)
