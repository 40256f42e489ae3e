"""APE, without training, against the official code."""

import pytest
import torch

from heba.data.images import LabelledImages
from heba.fit.cache import cache_keys, places
from heba.fit.run import Run
from heba.methods.ape import method, settings
from tests.oracle import features


@pytest.mark.parametrize("folder", features.cases("ape"), ids=lambda path: path.name)
def test_channels_search_and_logits(folder):
    case = features.load(folder)
    t, about, results = case.tensors, case.about["settings"], case.about["results"]
    names = ("beta", "alpha", "gamma")
    used = settings.Settings(
        channels=about["feat_num"] / about["dim"],
        similarity=float(about["w"][0]),
        variance=float(about["w"][1]),
        **{name: float(about[f"init_{name}"]) for name in names},
        **{f"{name}_scale": float(scale) for name, scale in zip(names, about["search_scale"], strict=True)},
        **{f"{name}_steps": number for name, number in zip(names, about["search_step"], strict=True)},
    )
    classes, labels = features.classes(t["text.raw"]), t["train.labels"]
    model = method.build(case.clip, len(classes.names), used, seed=0)
    train, val = features.train_images(case), features.val_images(case)
    chosen = method.fit(model, train, val, classes, used, Run(seed=0))
    assert chosen == {name: results[name] for name in names}
    keys, present = cache_keys(t["train.views"], places(labels, len(classes.names)))
    scores = method.scores(keys, present, t["text.weights"].T, used)
    assert features.relative(scores, t["criterion"]) < 5e-6
    assert model.channels.tolist() == t["indices"].tolist()
    kept, test = method.classifier(model, classes, used, True), features.images(t["test.features"])
    found = method.logits(model, kept, test)
    assert features.relative(found, t["test_logits_searched"]) < 5e-6

    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    shuffled = LabelledImages([], labels[order].tolist(), train.views.select(order))
    again = method.build(case.clip, len(classes.names), used, seed=0)
    assert method.fit(again, shuffled, val, classes, used, Run(seed=0)) == chosen
    assert features.relative(method.logits(again, kept, test), found) < 5e-6

    none = features.labelled(t["val.features"][None, :0], t["val.labels"][:0])
    chosen = method.fit(model, train, none, classes, used, Run(seed=0))
    assert chosen == {name: about[f"init_{name}"] for name in names}
    assert features.relative(method.logits(model, kept, test), t["test_logits_initial"]) < 5e-6
