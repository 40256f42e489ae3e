"""KgCoOp: parity with the official implementation."""

from heba.fit.prompts import teachers
from heba.methods.kgcoop import method, settings
from tests.oracle import prompts


def settings_of(case):
    """The settings that the oracle's configuration is; any true CTX_INIT means "a photo of a"."""
    config = {key.rpartition(".")[2]: value for key, value in case.config.items()}
    return settings.Settings(
        words="a photo of a" if config["CTX_INIT"] else " ".join(["X"] * config["N_CTX"]),
        weight=config["W"],
        epochs=case.about["epochs"],
        batch_size=case.variant["traj_batch"],
        lr=case.variant["base_lr"],
        momentum=case.variant["momentum"],
        weight_decay=case.variant["weight_decay"],
    )


@prompts.variants("kgcoop")
def test_kgcoop(case):
    ours, template = settings_of(case), case.about["zero_shot_template"]
    classes, novel = case.classes_of(template), case.classes_of(template, novel=True)
    expected = case.own["zero_shot_text_features_normalized"]
    prompts.close("kgcoop", "features", teachers(case.clip, classes), expected, prompts.FEATURES)
    model = method.build(case.clip, len(classes.names), ours, seed=0)
    if case.config["TRAINER.COOP.CTX_INIT"]:  # the official start, from the words themselves
        method.begin_with(model, classes.tokenizer, ours.words)
        prompts.close("kgcoop", "start", model.learned["ctx"].detach(), case.own["init.ctx"], 1e-7)
    prompts.load(model.learned, case.part("init"))
    if "grad_loss" in case.variant:
        features = case.clip.encode_image(case.shared["images"])
        value = method.loss_of(model, classes, ours)(features, case.shared["labels"].long())
        prompts.check_gradients("kgcoop", case, model.learned, value)
    prompts.check_on_features("kgcoop", case, method, ours, model, classes, novel)


@prompts.cases("kgcoop")
def test_the_parameters_at_vit_b16(about):
    prompts.check_parameters(about, method, settings.Settings())
