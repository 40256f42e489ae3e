"""GDA against the official code: few shots, the variants of ImageNet, and base to novel."""

import pytest
import torch

from heba.methods.gda import method, settings
from tests.oracle import features

ids = {"argvalues": features.cases("gda"), "ids": lambda path: path.name}


def fitted(folder, covariance):
    """A case, its settings, and the model of its training images."""
    case = features.load(folder)
    about = case.about["settings"]
    used = settings.Settings(
        covariance=covariance,
        alphas=case.about["grid"],
        neighbours=about["k"],
        text_copies=about["text_copies"],
    )
    classes = features.classes(case.tensors["text.raw"])
    model = method.build(case.clip, len(classes.names), used, seed=0)
    run = method.Run(seed=0)
    chosen = method.fit(model, features.train_images(case), features.val_images(case), classes, used, run)
    return case, used, model, chosen


def logits(model, used, raw, test, trained):
    return method.logits(
        model, method.classifier(model, features.classes(raw), used, trained), features.images(test)
    )


@pytest.mark.parametrize("folder", **ids)
def test_few_shot(folder):
    case, used, model, chosen = fitted(folder, "pooled")
    t = case.tensors
    assert chosen == {"alpha": case.about["results"]["few_shot"]["alpha"]}
    assert features.relative(model.weights.T, t["few_shot.W"]) < 5e-6
    assert features.relative(model.bias, t["few_shot.b"]) < 5e-6
    found = logits(model, used, t["text.raw"], t["test.features"], True)
    assert features.relative(found, t["few_shot.test_logits"]) < 5e-6
    columns = t["robust.label_mapping"].argmax(dim=0)
    assert features.relative(found[:, columns], t["robust.test_logits"]) < 5e-6


@pytest.mark.parametrize("folder", **ids)
def test_base_to_novel(folder):
    case, used, model, chosen = fitted(folder, "mean")
    t = case.tensors
    assert chosen == {"alpha": case.about["results"]["base_to_novel"]["alpha"]}
    assert features.relative(model.weights.T, t["base.W"]) < 5e-6
    assert features.relative(model.bias, t["base.b"]) < 5e-6
    found = logits(model, used, t["text.raw"], t["test.features"], True)
    assert features.relative(found, t["base.test_logits"]) < 5e-6
    means, precision = method.new_gaussians(model.samples, t["new.text.weights"].T, used)
    assert features.relative(means, t["novel.means"]) < 5e-6
    assert features.relative(precision, t["novel.precision"]) < 5e-6
    weights, bias = method.discriminants(means, precision)
    assert features.relative(weights.T, t["novel.W"]) < 5e-6
    assert features.relative(bias, t["novel.b"]) < 5e-6
    found = logits(model, used, t["new.text.raw"], t["new.features"], False)
    assert features.relative(found, t["novel.test_logits"]) < 5e-6


@pytest.mark.parametrize("folder", **ids)
def test_the_alpha_of_the_settings_without_val_images(folder):
    case = features.load(folder)
    case.tensors["val.features"], case.tensors["val.labels"] = case.tensors["val.features"][:0], torch.zeros(0)
    classes, used = features.classes(case.tensors["text.raw"]), settings.Settings(alpha=0.3)
    model = method.build(case.clip, len(classes.names), used, seed=0)
    train, val = features.train_images(case), features.val_images(case)
    assert method.fit(model, train, val, classes, used, method.Run(seed=0)) == {"alpha": 0.3}
    assert model.alpha.item() == pytest.approx(0.3)
