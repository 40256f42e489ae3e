"""Tip-Adapter, without training and with (Tip-Adapter-F), against the official code."""

import pytest
import torch

from heba.fit.cache import places, right
from heba.fit.run import Run, silent
from heba.methods.tip_adapter import method, settings
from heba.methods.tip_adapter_f import method as method_f
from heba.methods.tip_adapter_f import settings as settings_f
from tests.oracle import features

ids = {"argvalues": features.cases("tip_adapter"), "ids": lambda path: path.name}


def grid_settings(about):
    return {
        "alpha": float(about["init_alpha"]),
        "beta": float(about["init_beta"]),
        "alpha_scale": float(about["search_scale"][1]),
        "alpha_steps": about["search_step"][1],
        "beta_scale": float(about["search_scale"][0]),
        "beta_steps": about["search_step"][0],
    }


def by_row(keys, labels):
    """The keys of a cache [S, classes, dim] in the order of the training images."""
    rows = places(labels, keys.shape[1])
    found = keys.new_empty(len(labels), keys.shape[2])
    found[rows[rows >= 0]] = keys[rows >= 0]
    return found


def check_search(keys, values, about, expected, case):
    """The number of right val images at every point of the grid."""
    t, labels = case.tensors, case.tensors["val.labels"]
    val = features.normalised(t["val.features"])
    plain = case.clip.logit_scale.exp() * val @ t["text.weights"]
    grid = method.grid(settings.Settings(**grid_settings(about)))
    found = right(keys, plain, val, labels, lambda _: values, grid, silent)[:, :, 0]
    assert (torch.tensor(found) == (expected * len(labels) / 100).round()).all()


@pytest.mark.parametrize("folder", **ids)
def test_without_training(folder):
    case = features.load(folder)
    t, about, results = case.tensors, case.about["settings"], case.about["results"]["training_free"]
    used, classes = settings.Settings(**grid_settings(about)), features.classes(t["text.raw"])
    model = method.build(case.clip, len(classes.names), used, seed=0)
    train, val = features.train_images(case), features.val_images(case)
    chosen = method.fit(model, train, val, classes, used, Run(seed=0))
    assert chosen == {"alpha": results["alpha"], "beta": results["beta"]}
    assert features.relative(by_row(model.keys, t["train.labels"]), t["cache.keys"].T) < 5e-6
    check_search(model.keys, model.values, about, t["free.search_acc"], case)
    kept, test = method.classifier(model, classes, used, True), features.images(t["test.features"])
    assert features.relative(method.logits(model, kept, test), t["free.test_logits_searched"]) < 5e-6
    val = features.labelled(t["val.features"][None, :0], t["val.labels"][:0])
    chosen = method.fit(model, train, val, classes, used, Run(seed=0))
    assert chosen == {"alpha": used.alpha, "beta": used.beta}
    assert features.relative(method.logits(model, kept, test), t["free.test_logits_initial"]) < 5e-6


@pytest.mark.parametrize("folder", **ids)
def test_trained_keys(folder, monkeypatch):
    case = features.load(folder)
    t, about, results = case.tensors, case.about["settings"], case.about["results"]["F"]
    more = {"epochs": about["train_epoch"], "batch_size": about["batch"], "lr": about["lr"]}
    used = settings_f.Settings(**grid_settings(about), **more)
    classes, labels = features.classes(t["text.raw"]), t["train.labels"]
    model = method_f.build(case.clip, len(classes.names), used, seed=0)
    given, records, keys = iter(results["batches"]), [], []

    def batches(n, size, generator):
        assert n == len(labels)
        for _ in range(-(-n // size)):
            keys.append(model.keys.detach().clone())
            yield torch.tensor(next(given))

    monkeypatch.setattr(method_f, "shuffled", batches)
    run = Run(seed=0, on_epoch=records.append)
    chosen = method_f.fit(model, features.train_images(case), features.val_images(case), classes, used, run)
    keys.append(model.keys)
    assert chosen == {"alpha": results["last_epoch_alpha"], "beta": results["last_epoch_beta"]}
    for step in [int(name[6:-5]) for name in t if name.startswith("F.step") and name.endswith(".keys")]:
        assert features.relative(by_row(keys[step], labels), t[f"F.step{step}.keys"]) < 3e-5, step
    losses = torch.tensor(results["losses"]).split(results["batches_per_epoch"])
    assert [record["loss"] for record in records] == pytest.approx(
        [part.mean().item() for part in losses], abs=4e-5
    )
    assert [r["lr"] for r in records] == pytest.approx(results["lrs"][:: results["batches_per_epoch"]])
    tested = (results["official_epoch_chosen_on_TEST"] + 1) * results[
        "batches_per_epoch"
    ]  # the epoch searched there
    check_search(keys[tested], model.values, about, t["F.search_acc"], case)
    kept, test = method_f.classifier(model, classes, used, True), features.images(t["test.features"])
    found = method_f.logits(model, kept, test)
    assert features.relative(found, t["F.test_logits_last_epoch_searched"]) < 5e-6
    model.alpha.fill_(used.alpha)
    model.beta.fill_(used.beta)
    found = method_f.logits(model, kept, test)
    assert features.relative(found, t["F.test_logits_last_epoch_initial"]) < 5e-6


@pytest.mark.parametrize("folder", **ids)
def test_gradient_of_the_keys(folder):
    case = features.load(folder)
    t, about, results = case.tensors, case.about["settings"], case.about["results"]["F"]
    classes, used = features.classes(t["text.raw"]), settings.Settings(**grid_settings(about))
    model = method.build(case.clip, len(classes.names), used, seed=0)
    val = features.labelled(t["val.features"][None, :0], t["val.labels"][:0])
    method.fit(model, features.train_images(case), val, classes, used, Run(seed=0))
    model.keys.requires_grad_()
    rows, kept = torch.tensor(results["batches"][0]), method.classifier(model, classes, used, True)
    batch = features.images(t["train.views"][results["views"][0], rows])
    logits = method_f.logits(model, kept, batch)
    assert features.relative(logits.detach(), t["F.step1.logits"]) < 5e-6
    torch.nn.functional.cross_entropy(logits, t["train.labels"][rows]).backward()
    assert features.relative(by_row(model.keys.grad, t["train.labels"]), t["F.step1.grad"]) < 1e-5
