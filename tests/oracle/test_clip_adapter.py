"""CLIP-Adapter against the official code."""

import pytest
import torch
import torch.nn.functional as F

from heba.clip.features import class_features
from heba.fit.loop import Schedule, dassl_lr
from heba.fit.run import Run
from heba.methods.clip_adapter import method, settings
from tests.oracle import features, steps


@pytest.mark.parametrize("folder", features.cases("clip_adapter"), ids=lambda path: path.name)
def test_training(folder):
    case = features.load(folder)
    t, official, results = case.tensors, case.about["settings"], case.about["results"]
    chosen = settings.Settings(lr=official["lr"], batch_size=official["batch"])
    classes, test = features.classes(t["text.raw"]), features.images(t["test.features"])
    model = method.build(case.clip, len(classes.names), chosen, seed=official["torch_seed_before"])
    assert torch.equal(model.down.weight, t["init.down"])
    assert torch.equal(model.up.weight, t["init.up"])
    found = method.classifier(model, classes, chosen, True)
    assert features.relative(method.logits(model, found, test), t["init.test_logits"]) < 5e-6

    weights = class_features(classes.features, classes.index, len(classes.names))
    rows = torch.tensor(results["batches"][0])
    x, y = t["train.views"][results["views"][0]][rows], t["train.labels"][rows]
    logits = method.cosine_logits(model.factor, model(x), weights)
    assert features.relative(logits, t["step1.logits"]) < 5e-6
    gradients = torch.autograd.grad(F.cross_entropy(logits, y), [model.down.weight, model.up.weight])
    for gradient, name in zip(gradients, ("down", "up"), strict=True):
        assert features.relative(gradient, t[f"step1.grad_{name}"]) < 1e-5

    per_epoch, epochs = results["batches_per_epoch"], official["max_epoch"]
    drawn = [torch.tensor(b) for b in results["batches"]]
    batches = steps.Batches(model, [drawn[i : i + per_epoch] for i in range(0, len(drawn), per_epoch)])
    schedule = Schedule(epochs, per_epoch, lambda epoch: dassl_lr(chosen.lr, epoch, epochs))
    records = []
    run = Run(seed=1, on_epoch=records.append)
    method.train_adapter(model, t["train.views"], t["train.labels"], weights, chosen, schedule, batches, run)
    assert [r["lr"] for r in records] == pytest.approx(results["lrs"][::per_epoch], rel=1e-12)
    losses = torch.tensor(results["losses"]).view(epochs, per_epoch).mean(1).tolist()
    assert [r["loss"] for r in records] == pytest.approx(losses, abs=4e-5)
    apart = steps.differences(batches.kept, t, "", {"down": "down.weight", "up": "up.weight"})
    assert apart
    assert max(apart.values()) < 3e-5, apart
    assert features.relative(method.logits(model, found, test), t["final.test_logits"]) < 5e-6
    new = method.classifier(model, features.classes(t["new.text.raw"]), chosen, False)
    logits = method.logits(model, new, features.images(t["new.features"]))
    assert features.relative(logits, t["final.new_logits"]) < 5e-6


def test_epochs_follow_the_shots():
    found = [settings.epochs_of(settings.Settings(), shots) for shots in (1, 2, 4, 8, 16)]
    assert found == [50, 100, 100, 200, 200]
