"""LwEIB: parity with the official implementation."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from heba.artifact import load_tensors
from heba.clip import backbone
from heba.clip.architecture import read_architecture
from heba.data.images import Images
from heba.data.prompts import build_prompts, tokenize
from heba.fit.adapters import eager_step, graph_step, step_loss
from heba.fit.draws import Step, draw_scales, step_classes, text_bank
from heba.fit.loop import cosine, make_optimizer
from heba.fit.static import StaticStep
from heba.methods.lweib import method
from heba.methods.lweib.settings import Settings
from tests.oracle import towers
from tests.oracle.device import DEVICE
from tests.oracle.prompts import close

every_case = towers.cases("lweib", "LwEIB")


def settings_of(case, **changed):
    about = case.about["case"]
    known = {
        "start": about["start"],
        "end": about["end"],
        "scale": about["scale"],
        "scale_factor": about["factor"],
        "slow_ratio": about["ratio"],
        "epochs": about["epochs"],
        "batch_size": about["batch"],
        "lr": about["lr"],
        "neg_ratio": about["neg"],
    }
    return Settings(**known | changed)


def build(case, settings, parameters):
    model = method.build(case.clip, len(case.about["classes"]["base"]), settings, seed=0)
    load_tensors(model.adapters, case.part(parameters), "oracle")
    return model


def recorded(case, model, settings, bank, record):
    """A step with the recorded draws, which obey the rules of ours."""
    labels, order = record["labels"], record["class_order"]
    negatives = method.recipe(settings).neg_ratio
    selected, targets = step_classes(labels, bank.n_classes, negatives, torch.Generator().manual_seed(0))
    n = len(order) if negatives is None or bank.n_classes <= len(labels) else len(set(labels))
    assert (len(selected), selected[:n]) == (len(order), order[:n])
    assert targets == record.get("relabelled", targets) == [order.index(label) for label in labels]
    others = [c for c in range(bank.n_classes) if c not in labels]
    assert order[n:] == [others[i] for i in record.get("negative_pick", [])[: len(order) - n]]
    blocks = slice(settings.start - 1, settings.end)
    scales = {}
    for tower in ("text", "visual"):
        drawn, scale = torch.tensor(record[f"{tower}_uniform"][blocks]), record[f"{tower}_scale"][blocks]
        fast, slow = settings.scale * settings.scale_factor, settings.scale
        assert scale == pytest.approx(torch.where(drawn > settings.slow_ratio, fast, slow).tolist(), rel=1e-6)
        scales[f"{tower}_scales"] = torch.tensor(scale, device=DEVICE)
    prompts = [bank.offsets[c] + t for c, t in zip(order, record["template"], strict=True)]
    packing = model.pack([bank.lengths[p] for p in prompts])
    targets, prompts = torch.tensor(targets, device=DEVICE), torch.tensor(prompts, device=DEVICE)
    return Step([], [], [], targets, prompts, packing, **scales)


def evaluation(case, model, settings, kind):
    """The class features of some names, and the logits of all images."""
    found = method.classifier(model, case.classes(kind), settings, kind == "base")
    return found["weights"], method.logits(model, found, Images.of_pixels(case.tensors["images"]))


@every_case
@pytest.mark.parametrize("kind", ["base", "novel"])
def test_prompts(case, kind):
    """Descriptions behind the names, cut to the context."""
    classes = case.about["classes"][kind]
    tokens, _ = tokenize(build_prompts(list(classes), classes, "{}").texts, towers.tokenizer)
    assert torch.equal(tokens, case.tensors[f"{kind}.tokens"].long().flatten(0, 1))


@every_case
@torch.no_grad()
def test_evaluation(case):
    settings = settings_of(case)
    model, expected = build(case, settings, "pert"), case.part("fwd")
    weights, logits = evaluation(case, model, settings, "base")
    n = len(expected["logits"])
    images, first = case.tensors["images"][:n], case.tensors["base.tokens"][:, 0].long()
    found = {
        "image_features": model.encode_image(images),
        "text_features": weights,
        "text_features_prompt0": model.encode_text(first),
        "image_features_frozen": case.clip.encode_image(images),
        "text_features_frozen_prompt0": case.clip.encode_text(first),
    }
    assert set(expected) == {"logits", *found}
    for name, features in found.items():
        close("lweib", "features", F.normalize(features, dim=-1), expected[name], towers.FEATURES)
    close("lweib", "logits", logits[:n], expected["logits"], towers.LOGITS)
    method.detach(model)


@every_case
def test_gradients(case):
    for name, record in case.about["grad"].items():
        settings = settings_of(case, neg_ratio=record["neg_ratio"])
        model, expected = build(case, settings, "pert"), case.part(f"grad.{name}")
        bank = text_bank(model, case.classes())
        step = recorded(case, model, settings, bank, record)
        loss, logits = step_loss(model, case.batch(record)[0], bank, step, 0.0)
        close("lweib", "logits of a step", logits.detach(), expected.pop("logits"), towers.LOGITS)
        close("lweib", "loss", loss.detach(), record["loss"], towers.LOSSES)
        loss.backward()
        without = {key for key, p in model.adapters.named_parameters() if p.grad is None}
        assert without == set(case.about["parameters_without_gradient"])
        assert set(expected) == set(model.adapters.state_dict())
        for key, parameter in model.adapters.named_parameters():
            if key in without:
                assert not expected[key].any()
            else:
                close("lweib", "gradient", parameter.grad, expected[key], towers.GRADIENTS, scaled=True)
        method.detach(model)


@every_case
@pytest.mark.parametrize("static", [False, True])
def test_training(case, static):
    """Also in the static shapes of CUDA graphs."""
    settings = settings_of(case)
    model, images = build(case, settings, "init"), case.tensors["images"]
    bank, recipe = text_bank(model, case.classes()), method.recipe(settings)
    optimizer = make_optimizer(model.adapters, recipe.lr, recipe.momentum, recipe.weight_decay)
    if static:
        gradients = StaticStep(model, bank, recipe.batch_size, images.shape[-1], recipe, bf16=False)
        take = graph_step(optimizer, gradients)
    else:
        take = eager_step(model, optimizer, bank, recipe.label_smoothing, bf16=False)
    losses = []
    for i, record in enumerate(case.steps):
        lr = cosine(recipe.lr, i // case.about["case"]["per_epoch"], recipe.epochs)
        assert lr == pytest.approx(record["lr"], rel=1e-9)
        for group in optimizer.param_groups:
            group["lr"] = lr
        step = recorded(case, model, settings, bank, record)
        losses.append(take(case.batch(record)[0], step).item())
    close("lweib", "losses of steps", losses, [record["loss"] for record in case.steps], towers.LOSSES)
    final = case.part("final")
    for key, parameter in model.adapters.named_parameters():
        close("lweib", "trained parameters", parameter.detach(), final[key], towers.PARAMETERS)
    # What gets no gradient decays.
    for key in case.about["parameters_without_gradient"]:
        assert final[key].norm() < case.tensors[f"init.{key}"].norm()
    for kind in ("base", "novel"):
        expected = case.part(f"final_{kind}")
        weights, logits = evaluation(case, model, settings, kind)
        close("lweib", "features after training", weights, expected["text_features"], towers.FEATURES)
        close("lweib", "logits after training", logits, expected["logits"], towers.LOGITS)
    method.detach(model)


@every_case
def test_one_single_negative_class(case):
    images, columns = case.about["one_negative_class"]["logits_shape"]
    selected, targets = step_classes(list(range(images)), columns, 1, torch.Generator())
    assert (len(selected), targets) == (columns, list(range(images)))


@every_case
def test_the_size_and_the_start_on_vit_b16(case):
    expected = case.about["vit_b16"]
    with torch.device("meta"):
        clip = backbone.build(read_architecture("ViT-B-16-quickgelu", Path()))
    torch.manual_seed(0)
    found = dict(method.Adapters(clip, 1, 12).named_parameters())
    assert len(found) == expected["tensors"]
    sizes = dict.fromkeys(("text", "visual"), 0)
    for key, weight in found.items():
        sizes[key.partition("_")[0]] += weight.numel()
    assert sizes == {"text": expected["text"], "visual": expected["visual"]}
    assert sum(sizes.values()) == expected["trainable"]
    assert found["visual_adapter.12.mlp_conv.conv.weight"].numel() == expected["never_gets_a_gradient"]
    for key, numbers in expected["initial_statistics_of_layer_1"].items():
        weight = found[key.removeprefix("adapter_learner.")].detach()
        bound = weight[0].numel() ** -0.5
        assert list(weight.shape) == numbers["shape"]
        assert weight.abs().max().item() == pytest.approx(bound, rel=0.01)
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(numbers["std"], rel=0.05)


def test_slow_and_fast_scales():
    recipe = method.recipe(Settings(scale=0.1, scale_factor=3.0, slow_ratio=0.8))
    drawn = draw_scales(10_000, 0.1, recipe, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == set(torch.tensor([0.1, 0.1 * 3.0]).tolist())
    assert (drawn > 0.2).float().mean().item() == pytest.approx(0.2, abs=0.02)
