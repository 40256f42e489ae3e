"""What every method that trains on frozen features promises, on small random features."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from heba import artifact, methods
from heba.clip.features import Classes
from heba.data.images import Images, LabelledImages, Views
from heba.fit.run import Run
from tests.test_rooms import ROOT

NAMES = [
    name
    for name in methods.names()
    if methods.part(name, "settings").READS == "features" and methods.part(name, "settings").DRAWS
]
every_method = pytest.mark.parametrize("name", NAMES)

N_CLASSES, SHOTS, PROMPTS, WIDTH, DIM = 3, 4, 2, 24, 16
# In place of the presets' numbers, where a method has a setting of that name.
SHORT = {"epochs": 4, "epochs_few": 4, "epochs_one": 4, "steps": 12, "warmup": 2, "every": 6}


def settings_of(name):
    block = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))[name]
    block.pop("overrides", None)
    return methods.part(name, "settings").Settings(**block | {k: v for k, v in SHORT.items() if k in block})


class Data:
    """Clusters of images around the prompts of their classes, and the CLIP that they are of."""

    def __init__(self, seed=0, passes=3, val=2):
        self.draws = torch.Generator().manual_seed(seed)
        projection = self.randn(WIDTH, DIM) / WIDTH**0.5
        self.clip = SimpleNamespace(
            visual=SimpleNamespace(output_dim=DIM, proj=projection), logit_scale=torch.tensor(100.0).log()
        )
        self.centres = 3 * self.randn(N_CLASSES, WIDTH)
        self.train, self.val = self.images(SHOTS, passes), self.images(val, 0)
        self.classes = self.named(self.centres)

    def randn(self, *shape):
        return torch.randn(*shape, generator=self.draws)

    def named(self, centres):
        n = len(centres)
        texts = centres @ self.clip.visual.proj
        features = texts.repeat_interleave(PROMPTS, dim=0) + self.randn(n * PROMPTS, DIM)
        index = torch.arange(n).repeat_interleave(PROMPTS)
        tokens = torch.zeros(n * PROMPTS, 1, dtype=torch.long)
        return Classes([f"class {k}" for k in range(n)], tokens, index, features)

    def images(self, each, passes):
        labels = torch.arange(N_CLASSES).repeat_interleave(each)
        hidden = self.centres[labels] + self.randn(2 + passes, len(labels), WIDTH)
        out = hidden @ self.clip.visual.proj
        views = Views(out[0], out[1], out[2:], hidden[0], hidden[1], hidden[2:])
        return LabelledImages([Path(f"{i}.jpg") for i in range(len(labels))], labels.tolist(), views)

    def test_images(self):
        hidden = self.centres[torch.arange(30) % N_CLASSES] + self.randn(30, WIDTH)
        return Images.of_features(hidden @ self.clip.visual.proj, hidden)


def fitted(name, data, **run):
    method, settings = methods.part(name, "method"), settings_of(name)
    model = method.build(data.clip, N_CLASSES, settings, seed=1)
    chosen = method.fit(model, data.train, data.val, data.classes, settings, Run(seed=1, shots=SHOTS, **run))
    assert all(isinstance(value, int | float) for value in chosen.values())
    return model


def logits(name, data, model, classifier, images):
    found = methods.part(name, "method").logits(model, classifier, images)
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    return found


def classifier_of(name, data, model):
    found = methods.part(name, "method").classifier(model, data.classes, settings_of(name), True)
    assert found["weights"].shape == (N_CLASSES, DIM)
    return found


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[key], other[key]) for key in one)


@every_method
def test_what_is_saved_predicts_as_what_was_trained(name, tmp_path):
    data = Data()
    model, images = fitted(name, data), data.test_images()
    classifier = classifier_of(name, data, model)
    artifact.write_tensors(methods.part(name, "method").trained(model).state_dict(), tmp_path, torch.float32)
    artifact.write_classifier(classifier, tmp_path)
    backbone = artifact.Backbone(name="tiny", pretrained="embedded", sha256="0" * 64)
    config = artifact.Config(
        method=name,
        settings=settings_of(name).model_dump(),
        class_names=data.classes.names,
        backbone=backbone,
        protocol="few_shot",
        dataset="eurosat",
        suite="embedded",
        bf16=False,
    )
    artifact.write_config(config, tmp_path)
    loaded, _ = artifact.load(data.clip, tmp_path)
    kept = artifact.read_classifier(tmp_path, N_CLASSES)
    found = logits(name, data, loaded, kept, images)
    assert found.shape == (30, N_CLASSES)
    assert torch.equal(found, logits(name, data, model, classifier, images))
    assert same(kept, classifier_of(name, data, loaded))


@every_method
def test_the_seed_decides_all_draws_and_no_other_generator_moves(name):
    torch.manual_seed(1)
    first = fitted(name, Data())
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = fitted(name, Data())
    assert torch.equal(before, torch.get_rng_state())
    assert same(first.state_dict(), second.state_dict())


@every_method
def test_autocast_changes_nothing(name):
    data = Data()
    images = data.test_images()
    model = fitted(name, data)
    classifier = classifier_of(name, data, model)
    with torch.autocast("cpu", torch.bfloat16):
        other = fitted(name, data, bf16=True)
        assert same(model.state_dict(), other.state_dict())
        assert same(classifier, classifier_of(name, data, other))
        found = logits(name, data, other, classifier, images)
    assert torch.equal(found, logits(name, data, model, classifier, images))


@every_method
def test_the_loss_falls(name):
    """From prompts that say nothing about the images, which leave much to learn."""
    data = Data(val=8)
    data.classes = replace(data.classes, features=data.randn(*data.classes.features.shape))
    records = []
    fitted(name, data, on_epoch=records.append)
    assert all(set(record) == {"epoch", "loss", "lr"} for record in records)
    assert len(records) < 2 or records[-1]["loss"] < records[0]["loss"]


@every_method
def test_no_validation_images_and_no_random_views(name):
    data = Data(val=0, passes=0)
    model = fitted(name, data)
    found = logits(name, data, model, classifier_of(name, data, model), data.test_images())
    assert found.shape == (30, N_CLASSES)


@every_method
def test_two_classes(name):
    data, method, settings = Data(), methods.part(name, "method"), settings_of(name)

    def of_two(part):
        rows = (torch.tensor(part.labels) < 2).nonzero().flatten()
        labels = [part.labels[row] for row in rows]
        return LabelledImages([part.files[row] for row in rows], labels, part.views.select(rows))

    classes = data.classes.select(range(2))
    model = method.build(data.clip, 2, settings, seed=1)
    method.fit(model, of_two(data.train), of_two(data.val), classes, settings, Run(seed=1, shots=SHOTS))
    found = method.logits(model, method.classifier(model, classes, settings, True), data.test_images())
    assert found.shape == (30, 2)
    assert found.isfinite().all()


@pytest.mark.parametrize("name", [n for n in NAMES if methods.part(n, "settings").NEW_CLASSES])
def test_new_classes(name):
    data, method = Data(), methods.part(name, "method")
    model = fitted(name, data)
    others = data.named(3 * data.randn(5, WIDTH))
    classifier = method.classifier(model, others, settings_of(name), False)
    assert classifier["weights"].shape == (5, DIM)
    assert logits(name, data, model, classifier, data.test_images()).shape == (30, 5)


@pytest.mark.parametrize("field", ["plain", "flipped", "augmented", "plain_hidden", "augmented_hidden"])
def test_an_image_without_a_finite_feature_is_named(field):
    part = Data().train
    broken = getattr(part.views, field).clone()
    broken[..., 7, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^7\.jpg: the frozen features are not finite; .*precision: fp32"):
        replace(part, views=replace(part.views, **{field: broken}))
    broken[..., 2, 0] = torch.inf
    with pytest.raises(ValueError, match=r"^2\.jpg, and 1 more: "):
        replace(part, views=replace(part.views, **{field: broken}))
