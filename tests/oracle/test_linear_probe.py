"""The linear probe against CoOp's lpclip, solved to the minimum."""

import pytest
import torch
import torch.nn.functional as F

from heba.fit.run import Run
from heba.methods.linear_probe import method, settings
from tests.oracle import features

CASES = pytest.mark.parametrize("folder", features.cases("linear_probe"), ids=lambda path: path.name)


def centred(x):
    """Without what is the same for all classes, which no softmax sees."""
    return x - x.mean(dim=-1, keepdim=True)


def sampled(case, part, rows):
    return features.labelled(case.tensors[f"{part}.features"][rows][None], case.tensors[f"{part}.labels"][rows])


@CASES
def test_the_minimum(folder):
    case = features.load(folder)
    t, fits = case.tensors, [name for name in case.tensors if name.endswith(".exact_coef")]
    assert fits
    for name in fits:
        shots, c = name.removesuffix(".exact_coef").split(".C", 1)
        rows = case.about["results"][f"shots_{shots.removeprefix('shots')}"]["seed_1"]["train_rows"]
        x, labels = t["train.features"][rows].double(), t["train.labels"][rows]
        weight, bias = method.solve(x, labels, float(c))
        assert features.relative(weight, t[name]) < 1e-6
        assert features.relative(bias - bias.mean(), t[f"{shots}.C{c}.exact_intercept"]) < 1e-6


@CASES
def test_the_search(folder):
    case = features.load(folder)
    t, chosen = case.tensors, settings.Settings(steps=case.about["settings"]["num_step"])
    nothing = features.classes(torch.zeros(len(t["test.labels"].unique()), 1, 1))
    for shots, seeds in case.about["results"].items():
        for seed, expected in seeds.items():
            tight = expected["tight"]
            train = sampled(case, "train", expected["train_rows"])
            val = sampled(case, "val", expected["val_rows"])
            model = method.build(case.clip, len(nothing.names), chosen, 0)
            found = method.fit(model, train, val, nothing, chosen, Run(seed=0))
            assert found["c"] == pytest.approx(tight["c_final"], rel=1e-12), (shots, seed)
            kept = method.classifier(model, nothing, chosen, True)
            logits = method.logits(model, kept, features.images(t["test.features"]))
            right = (logits.argmax(dim=1) == t["test.labels"]).double().mean().item()
            assert 100 * right == pytest.approx(tight["test_acc_percent"]), (shots, seed)
            name = f"{shots.replace('_', '')}.tight_test_logits"
            if seed == "seed_1" and name in t:
                assert features.relative(centred(logits), centred(t[name])) < 5e-6


@CASES
def test_every_value_of_the_search(folder):
    case = features.load(folder)
    for seeds in case.about["results"].values():
        for expected in seeds.values():
            tight, tried = expected["tight"], []
            train = sampled(case, "train", expected["train_rows"])
            val = sampled(case, "val", expected["val_rows"])

            def score(exponent, train=train, val=val, tried=tried):
                weight, bias = method.solve(train.views.plain.double(), torch.tensor(train.labels), 10.0**exponent)
                logits = val.views.plain.double() @ weight.T + bias
                tried.append((logits.argmax(dim=1) == torch.tensor(val.labels)).double().mean().item())
                return tried[-1]

            method.search(score, case.about["settings"]["num_step"])
            pairs = [(right, left) for left, right in zip(*[iter(tight["val_acc_left_right"])] * 2, strict=True)]
            assert tried == pytest.approx([*tight["coarse_val_acc"], *(value for pair in pairs for value in pair)])


@pytest.mark.parametrize("n_classes", [2, 3])
def test_the_minimum_is_that_of_the_equation(n_classes):
    """With two classes too, of which scikit-learn's logistic regression has another form."""
    draws = torch.Generator().manual_seed(0)
    labels, c = torch.arange(12) % n_classes, 0.5
    x = torch.randn(12, 4, generator=draws, dtype=torch.float64) + labels[:, None]
    weight, bias = (tensor.requires_grad_() for tensor in method.solve(x, labels, c))
    assert weight.shape == (n_classes, 4)
    assert bias.shape == (n_classes,)
    loss = c * F.cross_entropy(x @ weight.T + bias, labels, reduction="sum") + weight.square().sum() / 2
    gradients = torch.autograd.grad(loss, [weight, bias])
    assert max(gradient.abs().max() for gradient in gradients) < 1e-8
