"""PromptSRC: parity with the official implementation."""

import re

import torch
import torch.nn.functional as F

from heba.data.images import Images
from heba.fit.average import Average, gaussian
from heba.methods.promptsrc import method, settings
from tests.oracle import prompts

RUN = prompts.Run(seed=1)


def settings_of(case):
    """The settings that the oracle's configuration is; officially, a context of more than 4 is random."""
    config = {key.rpartition(".")[2]: value for key, value in case.config.items()}
    return settings.Settings(
        words=(config["CTX_INIT"] or None) if config["N_CTX_TEXT"] <= 4 else None,
        text_context=config["N_CTX_TEXT"],
        image_context=config["N_CTX_VISION"],
        text_depth=config["PROMPT_DEPTH_TEXT"],
        image_depth=config["PROMPT_DEPTH_VISION"],
        gpa_mean=config["GPA_MEAN"],
        gpa_std=config["GPA_STD"],
        epochs=case.about["epochs"],
        batch_size=case.variant["traj_batch"],
        lr=case.variant["base_lr"],
        weight_decay=case.variant["weight_decay"],
    )


def renamed(name):
    """Our name of a parameter."""
    name = name.replace("prompt_learner.ctx", "text.0").replace("image_encoder.VPT", "image.0")
    return re.sub(r"(\w+)_encoder\.transformer\.resblocks\.(\d+)\.VPT_shallow", r"\1.\2", name)


@prompts.variants("promptsrc")
def test_promptsrc(case):
    ours, classes, clip = settings_of(case), case.classes(), case.clip
    model = method.build(clip, len(classes.names), ours, seed=0)
    initial = {renamed(name): tensor for name, tensor in case.part("init").items()}
    if ours.words:  # the official start, from the words themselves
        start = model.learned.text[0]
        method.begin_with_first(start, clip, classes.tokenizer, ours.words)
        prompts.close("promptsrc", "start", start.detach(), initial["text.0"], 1e-7)
    prompts.load(model.learned, initial)
    texts, teacher = method.texts_of(clip, classes, ours), method.teacher_of(clip, classes, ours, RUN)
    pixels, labels = case.shared["images"], case.shared["labels"].long()
    expected = F.normalize(case.own["fixed_embeddings"], dim=-1)
    prompts.close("promptsrc", "features", teacher, expected, prompts.FEATURES)
    found = model.encode_image(pixels).detach()
    prompts.close("promptsrc", "features", found, case.own["image_features"], prompts.FEATURES)
    found = model.encode_text(texts.tokens).detach()
    prompts.close("promptsrc", "features", found, case.own["text_features"], prompts.FEATURES)

    def logits_of(classes, trained):
        return method.logits(model, method.classifier(model, classes, ours, trained), Images.of_pixels(pixels))

    prompts.close("promptsrc", "logits", logits_of(classes, True), case.own["logits"], prompts.LOGITS)
    if "grad_loss" in case.variant:
        value = method.loss_of(model, texts, teacher, ours, pixels, labels)
        prompts.check_gradients("promptsrc", case, model.learned, value, renamed)
    if "steps" in case.variant:
        weights = gaussian(ours.epochs, ours.gpa_mean, ours.gpa_std)
        prompts.close("promptsrc", "weights of epochs", weights, case.variant["gpa_weights"], 1e-12)
        average, n_images = Average(model.learned, weights), case.about["batches_per_epoch"] * ours.batch_size
        training = method.training_of(model, average, n_images, classes, ours, RUN)
        last = f"epoch{ours.epochs - 1}"
        prompts.check_training(
            "promptsrc", case, training, case.source(), lambda name: f"now.{renamed(name)}", last=last
        )
        average.settle()
        final = {renamed(name): tensor for name, tensor in case.part("final").items()}
        for name, parameter in model.learned.named_parameters():
            prompts.close("promptsrc", "mean prompts", parameter.detach(), final[name], prompts.PARAMETERS)
        found, expected = logits_of(classes, True), case.own["final_logits"]
        prompts.close("promptsrc", "logits after training", found, expected, prompts.FINAL_LOGITS)
    if "novel.logits" in case.own:
        novel = case.classes(novel=True)
        found, expected = method.classifier(model, novel, ours, False)["weights"], case.own["novel.text_features"]
        prompts.close(
            "promptsrc", "features of new classes", found, F.normalize(expected, dim=-1), prompts.FEATURES
        )
        found, expected = logits_of(novel, False), case.own["novel.logits"]
        prompts.close("promptsrc", "logits of new classes", found, expected, prompts.FINAL_LOGITS)


@prompts.variants("promptsrc")
def test_the_teacher(case):
    """Its texts, and what it makes of images."""
    n = len(case.about["base_classes"])
    tokens = prompts.tokenizer(method.openai_texts(case.about["base_classes"])).unflatten(0, (n, -1))
    official = case.own["template_tokens"].transpose(0, 1)
    order = torch.tensor(case.about["promptsrc_template_indices_in_openai_80"])
    assert torch.equal(tokens[:, order, : official.shape[-1]], official.long())
    assert not tokens[..., official.shape[-1] :].any()
    with torch.no_grad():
        found = case.clip.encode_image(case.shared["images"])
    expected = case.own["zero_shot_image_features"]
    prompts.close("promptsrc", "features", found, expected, prompts.FEATURES)


@prompts.cases("promptsrc")
def test_the_parameters_of_vit_b16(about):
    prompts.check_counts(about, "promptsrc", ["base_to_novel", "cross_dataset"])
