"""The oracle of prompt learners: its CLIP, its cases, and the comparison that all of them have in common.

Uses every case in $HEBA_SHARED/oracle/methods (default ../shared), which is not in this repository.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import cache

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from heba.clip.features import Classes
from heba.clip.openai import clip_from_openai_weights
from heba.data.images import Images
from heba.fit.batches import train_batches
from heba.fit.run import Run
from pipeline.commands.cost import left_numbers
from pipeline.commands.presets import FOLDER
from pipeline.core.params import load_params
from tests.oracle import device
from tests.oracle.device import DEVICE
from tests.oracle.features import SHARED, normalised, read, relative

# The tolerances of the oracle's README.
FEATURES, PARAMETERS, LOGITS, LOSSES, GRADIENTS, FINAL_LOGITS = 1e-5, 1e-5, 1e-4, 1e-4, 1e-4, 5e-4
FINAL_FEATURES = 5e-5  # of texts after training, normalised; it names none
FEW_SHOTS = 16


@cache
def clip_of(path):
    """The CLIP of a file, whose token table has the rows in use alone."""
    state = load_file(path)
    table = torch.zeros(49408, state["token_rows"].shape[1])
    table[state.pop("token_ids").long()] = state.pop("token_rows")
    return clip_from_openai_weights(state | {"token_embedding.weight": table}).requires_grad_(False).to(DEVICE)


@dataclass
class Case:
    """A variant of a case: what oracle.json says of the case and of it, the tensors of the case and its own."""

    about: dict
    variant: dict
    shared: dict
    own: dict
    name: str

    @property
    def clip(self):
        return clip_of(SHARED / self.about["clip"]["file"])

    @property
    def config(self):
        return self.variant["config"]

    def classes(self, novel=False, texts=None):
        """The classes of the training, or the new ones; `texts` are their prompts, if a method reads any."""
        names = self.about["novel_classes" if novel else "base_classes"]
        texts = texts or [f"a photo of a {name}." for name in names]
        tokens = tokenizer(texts)
        with torch.no_grad():
            features = self.clip.encode_text(tokens)
        index = torch.arange(len(names)).repeat_interleave(len(texts) // len(names))
        return Classes(names, tokens, index, features, tokenizer)

    def classes_of(self, template, novel=False):
        """The same, with the prompts of a template."""
        names = self.about["novel_classes" if novel else "base_classes"]
        return self.classes(novel, [template.format(name.replace("_", " ")) for name in names])

    def part(self, prefix):
        """The tensors of this variant below `prefix`."""
        return {k.removeprefix(f"{prefix}."): v for k, v in self.own.items() if k.startswith(f"{prefix}.")}

    def steps(self, kind=None):
        """The recorded values of the steps, the total loss where no part of it is named."""
        steps = self.variant["steps"]
        return [step["summary"]["loss"] if kind is None else step[kind] for step in steps]

    def source(self, of=lambda images: images):
        """The batches of the training, the same in each epoch, with `of` its images."""
        n = self.variant["traj_batch"]
        batches = [
            (of(images[:n]), labels[:n].long())
            for images, labels in zip(self.shared["traj.images"], self.shared["traj.labels"], strict=True)
        ]
        return lambda epoch, generator: iter(batches)


tokenizer = open_clip.SimpleTokenizer(context_length=77)


ABSENT = pytest.mark.skip(reason=f"the oracle is not in {SHARED}; HEBA_SHARED names the folder above it")


def variants(method):
    """All variants of all cases of a method, as parameters of a test; skipped where the oracle is not there."""
    found = []
    for folder in sorted(path.parent for path in SHARED.glob(f"{method}*/oracle.json")):
        about, tensors = read(folder), load_file(folder / "oracle.safetensors")
        shared = {k: v for k, v in tensors.items() if k.split(".")[0] not in about["variants"]}
        if not about["what"].startswith(f"{method}:"):
            continue
        for name, variant in about["variants"].items():
            own = {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith(f"{name}.")}
            found.append(pytest.param(Case(about, variant, shared, own, name), id=f"{folder.name}-{name}"))
    return pytest.mark.parametrize("case", found or [pytest.param(None, marks=ABSENT)])


def cases(method):
    """What oracle.json of each case of a method says, as parameters of a test; skipped as above."""
    found = [(path.parent.name, read(path.parent)) for path in sorted(SHARED.glob(f"{method}*/oracle.json"))]
    found = [pytest.param(about, id=name) for name, about in found if about["what"].startswith(f"{method}:")]
    return pytest.mark.parametrize("about", found or [pytest.param(None, marks=ABSENT)])


differences = defaultdict(float)


def close(method, kind, found, expected, tolerance, scaled=False):
    """Assert it, and keep the largest difference for `pytest -s`."""
    found, expected = torch.as_tensor(found).double().cpu(), torch.as_tensor(expected).double().cpu()
    assert found.shape == expected.shape, (method, kind, found.shape, expected.shape)
    far = relative(found, expected) if scaled else (found - expected).abs().max().item()
    differences[method, kind] = max(differences[method, kind], far)
    print(f"{method} {kind}: {far:.1e}, at most {differences[method, kind]:.1e}")
    assert far < device.tolerance(tolerance), (method, kind, far)


def load(module, tensors):
    """Put the oracle's parameters into a trained module, all of them."""
    assert set(tensors) == set(dict(module.named_parameters())), "names of the parameters"
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(tensors[name])


def check_gradients(method, case, module, value, rename=lambda name: name):
    """`value`: the loss of `images` and `labels` at the initial parameters."""
    close(method, "loss", value.detach(), case.variant["grad_loss"]["summary"]["loss"], LOSSES)
    module.zero_grad()
    value.backward()
    expected = {rename(name): tensor for name, tensor in case.part("grad").items()}
    for name, parameter in module.named_parameters():
        if name in expected:
            close(method, "gradient", parameter.grad, expected[name], GRADIENTS, scaled=True)
        else:
            assert parameter.grad is None or not parameter.grad.any(), name
    module.zero_grad()


def check_training(method, case, training, source, rename=lambda name: name, kind=None, last="final"):
    """Take the recorded steps and compare losses, of a `kind`, learning rates and the parameters after them, which
    are those below `last`."""
    losses, lrs, take = [], [], training.take

    def recorded(x, labels):
        lrs.append(training.optimizer.param_groups[0]["lr"])
        losses.append(take(x, labels).item())
        return torch.tensor(losses[-1])

    object.__setattr__(training, "take", recorded)
    train_batches(training, source, Run(seed=1, shots=FEW_SHOTS))
    assert lrs == pytest.approx([step["lr"] for step in case.variant["steps"]], rel=1e-12, abs=0)
    close(method, "losses of steps", losses, case.steps(kind), LOSSES)
    final = {rename(name): tensor for name, tensor in case.part(last).items()}
    for name, parameter in training.module.named_parameters():
        close(method, "trained parameters", parameter.detach(), final[name], PARAMETERS)


def check_on_features(name, case, method, ours, model, classes, novel, kind=None):
    """Compare a learner that reads frozen features, from its initial parameters on: text features, logits, the
    training whose steps record the loss `kind`, and what it makes of new classes."""
    with torch.no_grad():
        features = case.clip.encode_image(case.shared["images"])
    close(name, "features", features, case.own["image_features"], FEATURES)
    images = Images.of_features(features, features[:, :0])
    classifier = method.classifier(model, classes, ours, True)
    close(name, "features", classifier["weights"], normalised(case.own["text_features"]), FEATURES)
    close(name, "logits", method.logits(model, classifier, images), case.own["logits"], LOGITS)
    if "steps" in case.variant:
        n_images = case.about["batches_per_epoch"] * case.variant["traj_batch"]
        training = method.training_of(model, n_images, classes, ours, Run(seed=1, shots=FEW_SHOTS))
        check_training(name, case, training, case.source(case.clip.encode_image), kind=kind)
        found = method.logits(model, method.classifier(model, classes, ours, True), images)
        close(name, "logits after training", found, case.own["final_logits"], FINAL_LOGITS)
    if "novel.logits" in case.own:
        classifier = method.classifier(model, novel, ours, False)
        expected = normalised(case.own["novel.text_features"])
        close(name, "features after training", classifier["weights"], expected, FINAL_FEATURES)
        found = method.logits(model, classifier, images)
        close(name, "logits of new classes", found, case.own["novel.logits"], FINAL_LOGITS)


def check_parameters(about, method, settings):
    """Compare the trained tensors of a model on a CLIP of the size of ViT-B/16, which has no values."""
    with torch.device("meta"):
        clip = open_clip.model.CLIP(**open_clip.get_model_config("ViT-B-16-quickgelu"))
    model = method.build(clip, 10, settings, seed=1)
    shapes = {name: list(p.shape) for name, p in method.trained(model).named_parameters()}
    for official in about["parameters_at_vit_b16"].values():
        assert shapes == {name: group["shape"] for name, group in official["first_groups"].items()}
        assert sum(map(math.prod, shapes.values())) == official["trainable"]


def check_counts(about, method, protocols):
    """Compare how many numbers are trained at that size, with the paper preset in `protocols`, in the oracle's
    order."""
    params = load_params(FOLDER / "paper.yaml")
    found = [left_numbers(params, method, protocol) for protocol in protocols]
    assert found == [official["trainable"] for official in about["parameters_at_vit_b16"].values()]
