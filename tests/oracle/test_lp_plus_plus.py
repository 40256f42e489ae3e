"""LP++ against the official code."""

import pytest
import torch
import torch.nn.functional as F

from heba.clip.features import class_features
from heba.fit.run import Run
from heba.methods.lp_plus_plus import method, settings
from tests.oracle import features

CASES = pytest.mark.parametrize("folder", features.cases("lp_plus_plus"), ids=lambda path: path.name)


def of(case, epochs):
    about = case.about
    momentum = about["results"]["optimizer"]["momentum"]
    return settings.Settings(epochs=epochs, momentum=momentum)


def built(case, chosen):
    t = case.tensors
    classes = features.classes(t["text.raw"])
    model = method.build(case.clip, len(classes.names), chosen, case.about["settings"]["torch_seed_before"])
    return model, classes


@CASES
def test_the_start_and_the_first_gradient(folder):
    case = features.load(folder)
    t = case.tensors
    model, classes = built(case, of(case, 1))
    f, labels = F.normalize(t["train.views"][0], dim=-1), t["train.labels"]
    texts = class_features(classes.features, classes.index, len(classes.names))
    assert features.relative(texts.T, t["text.weights"]) < 5e-6
    assert method.steps(f, texts) == pytest.approx((t["lr_weight"].item(), t["lr_alpha"].item()), rel=5e-6)
    method.start(model, f, labels, texts, 250.0)
    assert torch.equal(model.bias, t["init.bias"])
    assert features.relative(model.weight, t["init.weight"]) < 5e-6
    assert features.relative(model.alpha, t["init.alpha"][0]) < 5e-6
    found = method.classifier(model, classes, of(case, 1), True)
    logits = method.logits(model, found, features.images(t["test.features"]))
    assert features.relative(logits, t["init.test_logits"]) < 5e-6
    logits = model(f, texts)
    assert features.relative(logits, t["step1.logits"]) < 5e-6
    F.cross_entropy(logits, labels).backward()
    assert features.relative(model.weight.grad, t["step1.grad_weight"]) < 1e-5
    assert features.relative(model.bias.grad, t["step1.grad_bias"]) < 1e-5


@CASES
def test_the_trajectory(folder):
    case = features.load(folder)
    t = case.tensors
    for name in [name for name in t if name.startswith("step") and name.endswith(".weight")]:
        epochs = int(name.removeprefix("step").removesuffix(".weight"))
        model, classes = built(case, of(case, epochs))
        train, no_val = features.train_images(case), features.labelled(t["val.features"][:0][None], torch.zeros(0))
        assert method.fit(model, train, no_val, classes, of(case, epochs), Run(seed=0)) == {"epoch": epochs}
        assert features.relative(model.weight, t[name]) < 3e-5
        assert features.relative(model.bias, t[f"step{epochs}.bias"]) < 3e-5
        assert features.relative(model.alpha, t[f"step{epochs}.alpha"][0]) < 3e-5


@CASES
def test_the_epoch_that_is_chosen(folder):
    case = features.load(folder)
    t, expected = case.tensors, case.about["results"]["long"]
    chosen = of(case, expected["epochs"])
    model, classes = built(case, chosen)
    records = []
    run = Run(seed=0, on_epoch=records.append)
    found = method.fit(model, features.train_images(case), features.val_images(case), classes, chosen, run)
    assert found == {"epoch": expected["chosen_epoch_from_0"] + 1}
    for name in ("weight", "bias", "alpha"):
        expected_value = t[f"long.{name}"].squeeze(0) if name == "alpha" else t[f"long.{name}"]
        assert features.relative(getattr(model, name), expected_value) < 3e-5
    kept = method.classifier(model, classes, chosen, True)
    logits = method.logits(model, kept, features.images(t["test.features"]))
    assert features.relative(logits, t["long.test_logits"]) < 3e-5
    right = (logits.argmax(dim=1) == t["test.labels"]).double().mean().item()
    assert 100 * right == pytest.approx(expected["test_acc_percent"])
    means = torch.tensor(expected["losses"]).split(10)
    assert [r["loss"] for r in records] == pytest.approx([m.mean().item() for m in means], abs=1e-4)
