"""CLAP and ZS-LP against the official code."""

import importlib

import pytest
import torch

from heba.clip.features import raw_class_features
from heba.fit.loop import Schedule, dassl_lr, make_optimizer
from heba.fit.prototypes import Pool, batches_per_epoch, multipliers, train_prototypes
from heba.fit.run import Run
from tests.oracle import features, steps


@pytest.mark.parametrize("name", ["clap", "zs_lp"])
@pytest.mark.parametrize("folder", features.cases("clap"), ids=lambda path: path.name)
def test_training(folder, name):
    method = importlib.import_module(f"heba.methods.{name}.method")
    chosen = importlib.import_module(f"heba.methods.{name}.settings").Settings()
    case = features.load(folder)
    t, official, results = case.tensors, case.about["settings"], case.about["results"]
    classes, test = features.classes(t["text.raw"]), features.images(t["test.features"])
    model = method.build(case.clip, len(classes.names), chosen, seed=1)

    def test_logits():
        return method.logits(model, method.classifier(model, classes, chosen, True), test)

    base = raw_class_features(classes.features, classes.index, len(classes.names))
    assert features.relative(base, t["base_text_features"]) < 5e-6
    model.prototypes.data.copy_(base)
    assert features.relative(test_logits(), t["init.test_logits"]) < 5e-6

    orders = [torch.tensor(order) for order in results["extraction_order"]]
    views = [view[order] for view, order in zip(t["train.views"], orders, strict=True)]
    pool = Pool(
        torch.cat(views), torch.cat([t["train.labels"][order] for order in orders]), len(t["train.labels"])
    )
    weights = multipliers(model, pool)
    assert features.relative(weights, t["multipliers"]) < 5e-6

    expected, per_epoch = results[name], results["clap"]["batches_per_epoch"]
    size, epochs, lr = official["batch"], official["max_epoch"], official["lr"]
    assert batches_per_epoch(pool.n, size) == per_epoch
    drawn = [list(torch.tensor(order).split(size)) for order in expected["epoch_order"]]
    batches = steps.Batches(model, drawn)
    momentum = expected["optimizer"]["momentum"]
    optimizer = make_optimizer(model, lr, momentum, weight_decay=0.0)
    gradients = []
    optimizer.register_step_pre_hook(lambda *_: gradients.append(model.prototypes.grad.clone()))
    records = []
    run = Run(seed=1, on_epoch=records.append)
    schedule = Schedule(epochs, per_epoch, lambda epoch: dassl_lr(lr, epoch, epochs))
    penalty = weights if name == "clap" else None
    train_prototypes(model, base, pool, penalty, optimizer, schedule, batches, run)
    assert features.relative(gradients[0], t[f"{name}.step1.grad"]) < 1e-5
    assert [r["lr"] for r in records] == pytest.approx(expected["lrs"][::per_epoch], rel=1e-12)
    losses = torch.tensor(expected["ce_losses"])
    losses += torch.tensor(expected["penalties"] or [0.0] * len(losses))
    assert [r["loss"] for r in records] == pytest.approx(losses.view(epochs, -1).mean(1).tolist(), abs=4e-5)
    apart = steps.differences(batches.kept, t, f"{name}.", {"prototypes": "prototypes"})
    assert len(apart) > 1
    assert max(apart.values()) < 3e-5, apart
    assert features.relative(test_logits(), t[f"{name}.test_logits"]) < 5e-6


@pytest.mark.parametrize("name", ["clap", "zs_lp"])
def test_the_method_trains_so(name):
    """fit, with batches of the whole pool, whose order makes no difference."""
    method = importlib.import_module(f"heba.methods.{name}.method")
    about = importlib.import_module(f"heba.methods.{name}.settings")
    case = features.load(features.cases("clap")[0])
    t = case.tensors
    pool = Pool.of(t["train.views"], t["train.labels"])
    classes = features.classes(t["text.raw"])
    base = raw_class_features(classes.features, classes.index, len(classes.names))
    chosen = about.Settings(epochs=4, batch_size=len(pool.labels))
    model = method.build(case.clip, len(classes.names), chosen, seed=1)
    train, val = features.train_images(case), features.val_images(case)
    assert method.fit(model, train, val, classes, chosen, Run(seed=1)) == {}
    other = method.build(case.clip, len(classes.names), chosen, seed=1)
    other.prototypes.data.copy_(base)
    weights = multipliers(other, pool) if name == "clap" else None
    optimizer = make_optimizer(other, chosen.lr, chosen.momentum, weight_decay=0.0)
    schedule = Schedule(4, 1, lambda epoch: dassl_lr(chosen.lr, epoch, 4))
    everything = [torch.arange(len(pool.labels))]
    train_prototypes(other, base, pool, weights, optimizer, schedule, lambda generator: everything, Run(seed=1))
    assert features.relative(model.prototypes, other.prototypes) < 1e-6
