"""Cross-modal adaptation against the official code."""

import pytest
import torch
import torch.nn.functional as F

from heba.data.images import LabelledImages
from heba.fit.run import Run
from heba.methods.cross_modal import method, settings, training
from tests.oracle import features


def settings_of(case, **more):
    official = case.about["settings"]
    assert official["init"] == "zeroshot"
    return settings.Settings(
        lr=[float(lr) for lr in official["lr"]],
        weight_decay=[float(decay) for decay in official["weight_decay"]],
        batch_size=official["batch_sizes"],
        steps=official["iters"],
        warmup=official["warmup_iter"],
        every=official["eval_freq"],
        **more,
    )


def official_rows(case, index):
    """The rows [steps, size] of a grid point's batches."""
    t = case.tensors
    images, texts = t[f"grid{index}.image_batches"].long(), t[f"grid{index}.text_batches"].long()
    assert case.about["settings"]["views_used"] == 2
    return torch.cat([images, texts + 2 * len(t["train.labels"])], dim=1)


@pytest.fixture(params=features.cases("cross_modal"), ids=lambda path: path.name)
def case(request):
    return features.load(request.param)


def searched(case, chosen):
    """The first best of the official batches, each grid point's training, by its index, and the model."""
    grid = case.about["results"]["grid"]
    train, val = features.train_images(case), features.val_images(case)
    classes = features.classes(case.tensors["text.raw"])
    points = list(dict.fromkeys((g["lr"], g["weight_decay"]) for g in grid))
    rows = {
        size: torch.stack([official_rows(case, g["index"]) for g in grid if g["batch_size"] == size], dim=1)
        for size in dict.fromkeys(g["batch_size"] for g in grid)
    }
    model = method.build(case.clip, len(classes.names), chosen, seed=1)
    point, best = method.search(model, train, val, classes, chosen, points, rows, Run(seed=1))
    return model, classes, point, best


def test_search(case, monkeypatch):
    t, results, chosen = case.tensors, case.about["results"], settings_of(case)
    trainings = []

    def keep(*args):
        found = original(*args)
        trainings.append((args, found))
        return found

    original = training.train_side_by_side
    monkeypatch.setattr(method, "train_side_by_side", keep)
    model, classes, point, best = searched(case, chosen)
    grid = results["grid"]
    assert features.relative(method.zero_shot_weights(classes), t["zero_shot_weights"]) < 5e-6
    assert features.relative(method.zero_shot_weights(classes), t["init.weight"]) < 5e-6
    for args, found in trainings:
        size = args[3].shape[-1]
        for g, one in zip([g for g in grid if g["batch_size"] == size], found, strict=True):
            assert (one.step, one.accuracy) == (g["iter"] + 1, pytest.approx(g["val_acc"])), g["index"]
            lrs = [record["lr"] for record in one.history]
            assert lrs == pytest.approx(g["lrs"][:: chosen.every], rel=1e-12)
            losses = torch.tensor(g["losses"]).double()
            means = [losses[:1].mean(), *(part.mean() for part in losses[1:].split(chosen.every))]
            assert [r["loss"] for r in one.history] == pytest.approx(
                [mean.item() for mean in means[: len(one.history)]], abs=4e-5
            )
    expected = grid[results["chosen_index"]]
    assert point == (expected["lr"], expected["weight_decay"], expected["batch_size"])
    with torch.no_grad():
        model.weight.copy_(best.weight)
    test = features.images(t["test.features"])
    for share, name in ((0.0, "chosen"), (0.5, "chosen_wiseft")):
        found = method.classifier(model, classes, settings_of(case, wise_ft=share), True)
        assert features.relative(method.logits(model, found, test), t[f"{name}.test_logits"]) < 5e-6, name


def test_first_step_and_trajectory(case):
    t, first = case.tensors, case.about["results"]["grid"][0]
    chosen, rows = settings_of(case), official_rows(case, first["index"])
    classes = features.classes(t["text.raw"])
    x = features.normalised(torch.cat([*t["train.views"], classes.features]))
    y = torch.cat([t["train.labels"], t["train.labels"], classes.index])
    pool, factor = training.Samples(x, y), case.clip.logit_scale.exp()
    weight = t["init.weight"].clone().requires_grad_()
    logits = method.cosine_logits(factor, x[rows[0]], weight)
    assert features.relative(logits, t["step1.logits"]) < 5e-6
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y[rows[0]]), [weight])
    assert features.relative(gradient, t["step1.grad"]) < 1e-5
    nothing, points = training.Samples(x[:0], y[:0]), [(first["lr"], first["weight_decay"])]
    apart = {}
    for key in [key for key in t if key.startswith("step") and key.endswith(".weight")]:
        steps = int(key.removeprefix("step").removesuffix(".weight"))
        (one,) = training.train_side_by_side(
            t["init.weight"], pool, nothing, rows[:steps, None], points, factor, chosen, lambda n: None
        )
        assert one.step == steps
        apart[key] = features.relative(one.weight, t[key])
    assert apart
    assert max(apart.values()) < 3e-5, apart


def test_without_val_images_the_first_point_trains_to_the_end(case):
    train, val = features.train_images(case), features.val_images(case)
    nothing = LabelledImages([], [], val.views.select(torch.zeros(0, dtype=torch.long)))
    classes, chosen = features.classes(case.tensors["text.raw"]), settings_of(case)
    model = method.build(case.clip, len(classes.names), chosen, seed=1)
    found = method.fit(model, train, nothing, classes, chosen, Run(seed=1))
    assert found == {
        "lr": chosen.lr[0],
        "weight_decay": chosen.weight_decay[0],
        "batch_size": chosen.batch_size[0],
        "step": chosen.steps,
    }


def test_batch_sizes_that_do_not_fit_are_left_out():
    chosen = settings.Settings()
    assert training.sizes_of(chosen, n_images=32, n_texts=17) == [8, 32]
    assert training.sizes_of(chosen, n_images=32, n_texts=16) == [8]
    assert training.sizes_of(chosen, n_images=32, n_texts=3) == [8]
    rows = training.draw(32, 3, 8, 5, torch.Generator().manual_seed(0))
    assert rows.shape == (5, 4 + 3)
    assert sorted(rows[0, 4:].tolist()) == [32, 33, 34]
