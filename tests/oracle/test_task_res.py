"""TaskRes against the official code."""

import pytest
import torch
import torch.nn.functional as F

from heba.clip.features import cosine_logits, raw_class_features
from heba.fit.loop import Schedule, dassl_lr
from heba.fit.run import Run
from heba.methods.task_res import method, settings
from tests.oracle import features, steps


@pytest.mark.parametrize("folder", features.cases("task_res"), ids=lambda path: path.name)
def test_training(folder):
    case = features.load(folder)
    t, official, results = case.tensors, case.about["settings"], case.about["results"]
    chosen = settings.Settings(lr=official["lr"], batch_size=official["batch"], alpha=official["alpha"])
    classes, test = features.classes(t["text.raw"]), features.images(t["test.features"])
    model = method.build(case.clip, len(classes.names), chosen, seed=1)

    def test_logits():
        return method.logits(model, method.classifier(model, classes, chosen, True), test)

    base = raw_class_features(classes.features, classes.index, len(classes.names))
    assert features.relative(base, t["base_text_features"]) < 5e-6
    assert features.relative(test_logits(), t["init.test_logits"]) < 5e-6

    rows = torch.tensor(results["batches"][0])
    x, y = features.normalised(t["train.views"][results["views"][0]][rows]), t["train.labels"][rows]
    logits = cosine_logits(model.factor, x, model(base))
    assert features.relative(logits, t["step1.logits"]) < 5e-6
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y), [model.residual])
    assert features.relative(gradient, t["step1.grad"]) < 1e-5

    per_epoch, epochs = results["batches_per_epoch"], official["max_epoch"]
    drawn = [torch.tensor(b) for b in results["batches"]]
    batches = steps.Batches(model, [drawn[i : i + per_epoch] for i in range(0, len(drawn), per_epoch)])
    schedule = Schedule(epochs, per_epoch, lambda epoch: dassl_lr(chosen.lr, epoch, epochs))
    records = []
    run = Run(seed=1, on_epoch=records.append)
    method.train_residual(model, t["train.views"], t["train.labels"], base, chosen, schedule, batches, run)
    assert [r["lr"] for r in records] == pytest.approx(results["lrs"][::per_epoch], rel=1e-12)
    losses = torch.tensor(results["losses"]).view(epochs, per_epoch).mean(1).tolist()
    assert [r["loss"] for r in records] == pytest.approx(losses, abs=4e-5)
    apart = steps.differences(batches.kept, t, "", {"residual": "residual"})
    assert apart
    assert max(apart.values()) < 3e-5, apart
    assert features.relative(test_logits(), t["final.test_logits"]) < 5e-6


def test_epochs_follow_the_shots():
    found = [settings.epochs_of(settings.Settings(), shots) for shots in (1, 2, 4, 8, 16)]
    assert found == [100, 100, 100, 200, 200]
