"""TCP: parity with the official implementation."""

import pytest

from heba.fit.prompts import teachers
from heba.methods.tcp import method, settings
from tests.oracle import prompts


def settings_of(case):
    """The settings that the oracle's configuration is; the context replaces the first words of its template."""
    context = case.config["TRAINER.COOP.N_CTX"]
    return settings.Settings(
        text=case.about["tcp_prompt_template"].split(" ", context)[-1],
        context=context,
        after=case.about["tcp_layer_index"],
        epochs=case.about["epochs"],
        batch_size=case.variant["traj_batch"],
        lr=case.variant["base_lr"],
        weight_decay=case.variant["weight_decay"],
        eps=case.variant["adam_eps"],
    )


@prompts.variants("tcp")
def test_tcp(case):
    ours, template = settings_of(case), case.about["zero_shot_template"]
    classes, novel = case.classes_of(template), case.classes_of(template, novel=True)
    known, expected = teachers(case.clip, classes), case.own["zero_shot_text_features_normalized"]
    prompts.close("tcp", "features", known, expected, prompts.FEATURES)
    model = method.build(case.clip, len(classes.names), ours, seed=0)
    prompts.load(model.learned, case.part("init"))
    tokens = model.learned.class_tokens(known).detach()
    prompts.close("tcp", "features", tokens, case.own["class_prompts"], prompts.FEATURES)
    if "grad_loss" in case.variant:
        features = case.clip.encode_image(case.shared["images"])
        value = method.loss_of(model, classes, ours)(features, case.shared["labels"].long())
        prompts.check_gradients("tcp", case, model.learned, value)
    prompts.check_on_features("tcp", case, method, ours, model, classes, novel)


@prompts.cases("tcp")
def test_the_parameters_at_vit_b16(about):
    prompts.check_parameters(about, method, settings.Settings())


@prompts.variants("tcp")
def test_a_tower_without_such_a_block_is_refused(case):
    depth = case.about["clip"]["text"]["layers"]
    ours = settings_of(case).model_copy(update={"after": depth})
    with pytest.raises(ValueError, match=rf"tcp\.after: no block of the text tower's {depth} comes after"):
        method.build(case.clip, 2, ours, seed=0)
    assert list(settings.problems(ours, depth, None)) == ["after"]
    assert not settings.problems(ours, depth + 1, None)
    assert not settings.problems(ours, None, None)
