"""The regularised linear adapter against the official code."""

import pytest
import torch

from heba.fit import features as loop
from heba.fit.run import Run
from heba.methods.reg_linear_adapter import method, settings
from tests.oracle import features


def classes_of(weights):
    """Classes of one prompt each, whose features are the columns of `weights`."""
    return features.classes(weights.T.unsqueeze(1).contiguous())


def settings_of(case, **more):
    return settings.Settings(lr=case.about["settings"]["lr"], steps=case.about["settings"]["epochs"], **more)


def parts(case):
    """The training images, those of val, and the classes."""
    hidden = False
    return (
        features.train_images(case, hidden),
        features.val_images(case, hidden),
        classes_of(case.tensors["text.weights"]),
    )


def logits_of(model, case, which, weights):
    found = method.classifier(model, classes_of(case.tensors[weights]), settings.Settings(), True)
    return method.logits(model, found, features.images(case.tensors[which], False))


@pytest.fixture(params=features.cases("reg_linear_adapter"), ids=lambda path: path.name)
def case(request):
    return features.load(request.param)


@pytest.fixture
def steps(monkeypatch):
    """By number, from 1, what the matrix was after each step; and the gradients that the optimiser got."""
    kept, gradients = {}, {}

    def update(module, optimizer, loss):
        gradients[len(kept) + 1] = torch.autograd.grad(loss, [module.matrix], retain_graph=True)[0]
        original(module, optimizer, loss)
        kept[len(kept) + 1] = module.matrix.detach().clone()

    original = loop.update
    monkeypatch.setattr(loop, "update", update)
    return kept, gradients


def test_training(case, steps):
    t, results = case.tensors, case.about["results"]
    prefix, chosen = "", settings_of(case)
    train, val, classes = parts(case)
    model = method.build(case.clip, len(classes.names), chosen, seed=1)
    assert features.relative(logits_of(model, case, "test.features", "text.weights"), t["init.test_logits"]) < 5e-6
    views = t["train.views"]
    problem = loop.Problem(model, model.factor, t["text.weights"].T, views, t["train.labels"])
    assert features.relative(problem.logits(views[1 % len(views)]), t[f"{prefix}step1.logits"]) < 5e-6
    records = []
    run = Run(seed=1, shots=case.about["settings"]["shots"], on_epoch=records.append)
    found = method.fit(model, train, val, classes, chosen, run)
    assert found == {"lr": results["lr"], "penalty": results["lambda"]}
    kept, gradients = steps
    assert len(kept) == chosen.steps
    apart = {}
    for key in t:
        step, _, name = key.removeprefix(f"{prefix}step").partition(".")
        if key.startswith(f"{prefix}step") and name == "grad":
            assert features.relative(gradients[int(step)], t[key]) < 1e-5, key
        elif key.startswith(f"{prefix}step") and name != "logits":
            apart[key] = features.relative(kept[int(step)], t[key])
    assert apart
    assert max(apart.values()) < 3e-5, apart
    assert records[-1]["lr"] == pytest.approx(results["lrs"][-1], rel=1e-9)
    for which, weights, expected in (
        ("test.features", "text.weights", "final.test_logits"),
        ("new.features", "new.text.weights", "final.new_logits"),
    ):
        assert features.relative(logits_of(model, case, which, weights), t[expected]) < 5e-6, which
    # The records have the penalty too.
    start = torch.eye(len(t["step1.matrix"]))
    before = [start, *kept.values()][:-1]
    losses = [
        loss + found["penalty"] * ((matrix - start) ** 2).sum().item()
        for loss, matrix in zip(results["ce_losses"], before, strict=True)
    ]
    last = len(losses) % loop.RECORDS or loop.RECORDS
    assert records[-1]["loss"] == pytest.approx(sum(losses[-last:]) / last, abs=4e-5)
