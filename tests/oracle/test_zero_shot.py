"""Zero-shot CLIP against the official codes: CoOp, Tip-Adapter, CuPL."""

import pytest
import torch

from heba.clip.features import Classes, raw_class_features
from heba.methods.zero_shot import method, settings
from tests.oracle import features


@pytest.mark.parametrize("folder", features.cases("zero_shot"), ids=lambda path: path.name)
def test_weights_and_logits(folder):
    case = features.load(folder)
    t, counts = case.tensors, torch.tensor(case.about["results"]["descriptions_per_class"])
    templates = features.classes(t["text.raw"])
    described = torch.arange(len(counts)).repeat_interleave(counts)
    index = torch.cat([templates.index, described])
    order = index.argsort(stable=True)
    both = torch.cat([templates.features, t["descriptions.raw"]])
    kinds = {
        "single": features.classes(t["text.raw"][:, :1]),
        "ensemble": templates,
        "cupl": Classes(templates.names, both[:0], described, t["descriptions.raw"], features.no_tokenizer),
        "cupl_and_templates": Classes(templates.names, both[:0], index[order], both[order], features.no_tokenizer),
    }
    for kind, classes in kinds.items():
        model = method.build(case.clip, len(classes.names), settings.Settings(), seed=0)
        found = method.classifier(model, classes, settings.Settings(), True)
        assert features.relative(found["weights"], t[f"{kind}.weights"]) < 5e-6, kind
        logits = method.logits(model, found, features.images(t["test.features"]))
        assert features.relative(logits, t[f"{kind}.test_logits"]) < 5e-6, kind
    raw = raw_class_features(templates.features, templates.index, len(counts))
    assert features.relative(features.normalised(raw), t["raw_mean.weights_normalised"]) < 5e-6
