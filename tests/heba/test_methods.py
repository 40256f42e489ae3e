"""What every method that is trained promises, on small random images and features."""

from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
import yaml
from PIL import Image

from heba import artifact, methods
from heba.clip.features import Classes
from heba.data.images import Images, LabelledImages, Views
from heba.fit.run import Run
from tests.test_rooms import ROOT

N_CLASSES, SHOTS, PROMPTS, WIDTH, DIM, SIZE, CONTEXT = 3, 4, 2, 24, 16, 16, 24
# In place of the presets' numbers, where a method has a setting of that name.
SHORT = {"epochs": 4, "epochs_few": 4, "epochs_one": 4, "steps": 12, "warmup": 2, "every": 6, "batch_size": 4}
NAMES = [name for name in methods.names() if methods.part(name, "settings").DRAWS]


def settings_of(name):
    block = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))[name]
    block.pop("overrides", None)
    short = {k: v for k, v in SHORT.items() if isinstance(block.get(k), int)}
    return methods.part(name, "settings").Settings(**block | short)


def in_towers(name):
    """Whether a method's training goes through a tower of CLIP, or is on frozen features alone."""
    work = methods.part(name, "settings").work(settings_of(name), 10, 2)
    return work.images + work.prompts > 0


every_method = pytest.mark.parametrize("name", NAMES)


def make_clip():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return open_clip.CLIP(
            embed_dim=DIM,
            vision_cfg={"image_size": SIZE, "patch_size": 4, "width": WIDTH, "head_width": 12, "layers": 4},
            text_cfg={"context_length": CONTEXT, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 4},
            quick_gelu=True,
        ).eval()


class Data:
    """Clusters of images around the prompts of their classes, and the CLIP that they are of."""

    def __init__(self, folder, seed=0, passes=3, val=2):
        self.draws, self.folder = torch.Generator().manual_seed(seed), folder
        self.clip = make_clip()
        self.tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT)
        self.centres = 3 * self.randn(N_CLASSES, WIDTH)
        self.patterns = 60 * self.randn(N_CLASSES, 3, 2, 2)
        self.train, self.val = self.images(SHOTS, passes), self.images(val, 0)
        self.classes = self.named(self.centres)

    def randn(self, *shape):
        return torch.randn(*shape, generator=self.draws)

    def project(self, hidden):
        return hidden @ self.clip.visual.proj.detach()

    def named(self, centres):
        n = len(centres)
        features = self.project(centres).repeat_interleave(PROMPTS, dim=0) + self.randn(n * PROMPTS, DIM)
        index = torch.arange(n).repeat_interleave(PROMPTS)
        names = [f"class {k}" for k in range(n)]
        tokens = self.tokenizer([f"a {kind} of a {name}." for name in names for kind in ("photo", "drawing")])
        return Classes(names, tokens, index, features, self.tokenizer)

    def pixels(self, labels):
        """Images [n, 3, SIZE, SIZE] in 0..255, each a noisy pattern of its class."""
        patterns = self.patterns[labels].repeat_interleave(SIZE // 2, -1).repeat_interleave(SIZE // 2, -2)
        return (128 + patterns + 20 * self.randn(*patterns.shape)).clamp(0, 255)

    def images(self, each, passes):
        labels = torch.arange(N_CLASSES).repeat_interleave(each)
        hidden = self.centres[labels] + self.randn(2 + passes, len(labels), WIDTH)
        out = self.project(hidden)
        views = Views(out[0], out[1], out[2:], hidden[0], hidden[1], hidden[2:])
        files = [self.folder / f"{passes}-{i}.png" for i in range(len(labels))]
        for file, pixels in zip(files, self.pixels(labels), strict=True):
            Image.fromarray(pixels.permute(1, 2, 0).numpy().astype(np.uint8)).save(file)
        return LabelledImages(files, labels.tolist(), views)

    def test_images(self):
        labels = torch.arange(30) % N_CLASSES
        hidden = self.centres[labels] + self.randn(30, WIDTH)
        return Images(self.project(hidden), hidden, (self.pixels(labels) - 128) / 64)


@pytest.fixture
def make(tmp_path):
    """Makes `Data`."""
    return lambda **kwargs: Data(tmp_path, **kwargs)


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
    assert len(found["weights"]) == N_CLASSES
    return found


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[key], other[key]) for key in one)


@every_method
def test_what_is_saved_predicts_as_what_was_trained(name, make, tmp_path):
    data = make()
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
def test_the_seed_decides_all_draws_and_no_other_generator_moves(name, make):
    torch.manual_seed(1)
    first = fitted(name, make())
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = fitted(name, make())
    assert torch.equal(before, torch.get_rng_state())
    assert same(first.state_dict(), second.state_dict())


@pytest.mark.parametrize("name", [name for name in NAMES if not in_towers(name)])
def test_autocast_changes_nothing(name, make):
    data = make()
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
def test_the_loss_falls(name, make):
    """From prompts that say nothing about the images, which leave much to learn."""
    data = make(val=8)
    data.classes = replace(data.classes, features=data.randn(*data.classes.features.shape))
    records = []
    fitted(name, data, on_epoch=records.append)
    assert all(set(record) == {"epoch", "loss", "lr"} for record in records)
    assert len(records) < 2 or records[-1]["loss"] < records[0]["loss"]


@every_method
def test_no_validation_images_and_no_random_views(name, make):
    data = make(val=0, passes=0)
    model = fitted(name, data)
    found = logits(name, data, model, classifier_of(name, data, model), data.test_images())
    assert found.shape == (30, N_CLASSES)


@every_method
def test_two_classes(name, make):
    data, method, settings = make(), methods.part(name, "method"), settings_of(name)

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
def test_new_classes(name, make):
    data, method = make(), methods.part(name, "method")
    model = fitted(name, data)
    others = data.named(3 * data.randn(5, WIDTH))
    classifier = method.classifier(model, others, settings_of(name), False)
    assert len(classifier["weights"]) == 5
    assert logits(name, data, model, classifier, data.test_images()).shape == (30, 5)


@pytest.mark.parametrize("field", ["plain", "flipped", "augmented", "plain_hidden", "augmented_hidden"])
def test_an_image_without_a_finite_feature_is_named(field, make):
    part = make().train
    broken = getattr(part.views, field).clone()
    broken[..., 7, 0] = torch.nan
    with pytest.raises(ValueError, match=r"3-7\.png: the frozen features are not finite; .*precision: fp32"):
        replace(part, views=replace(part.views, **{field: broken}))
    broken[..., 2, 0] = torch.inf
    with pytest.raises(ValueError, match=r"3-2\.png, and 1 more: "):
        replace(part, views=replace(part.views, **{field: broken}))


@pytest.mark.parametrize("name", [name for name in NAMES if in_towers(name)])
def test_a_training_goes_on_after_a_kill_to_the_same_bytes(name, make, tmp_path):
    data = make()
    whole = methods.part(name, "method").trained(fitted(name, data)).state_dict()
    checkpoint, records = tmp_path / "checkpoint.safetensors", []

    def killed(record):
        records.append(record)
        if len(records) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fitted(name, data, checkpoint=checkpoint, on_epoch=killed)
    again = methods.part(name, "method").trained(
        fitted(name, data, checkpoint=checkpoint, on_epoch=records.append)
    )
    assert len(records) == 2 + 4
    assert same(again.state_dict(), whole)


@pytest.mark.parametrize("name", [name for name in NAMES if in_towers(name)])
def test_the_frozen_weights_stay_and_bf16_trains(name, make):
    data = make()
    before = {key: tensor.clone() for key, tensor in data.clip.state_dict().items()}
    model = fitted(name, data, bf16=True)
    with torch.autocast("cpu", torch.bfloat16):
        logits(name, data, model, classifier_of(name, data, model), data.test_images())
    methods.part(name, "method").detach(model)
    assert same(data.clip.state_dict(), before)
    assert not any(parameter.grad is not None for parameter in data.clip.parameters())
    assert not any(module._forward_hooks for module in data.clip.modules())
