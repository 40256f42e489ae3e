"""The oracle of prompt learners: its CLIP, its cases, and the comparison that all of them have in common.

Uses every case in $HEBA_SHARED/oracle/methods (default ../shared), which is not in this repository.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from heba.clip import backbone
from heba.clip.architecture import read_architecture
from heba.clip.features import Classes
from heba.clip.openai import clip_from_openai_weights
from heba.fit.batches import train_batches
from heba.fit.run import Run
from pipeline.commands.cost import trained_parameters
from pipeline.commands.presets import FOLDER
from pipeline.core.params import load_params
from tests.oracle.features import SHARED, read, relative

# The tolerances of the oracle's README.
FEATURES, PARAMETERS, LOGITS, LOSSES, GRADIENTS, FINAL_LOGITS = 1e-5, 1e-5, 1e-4, 1e-4, 1e-4, 5e-4
FEW_SHOTS = 16


@cache
def clip_of(path):
    """The CLIP of a file, whose token table has the rows in use alone."""
    state = load_file(path)
    table = torch.zeros(49408, state["token_rows"].shape[1])
    table[state.pop("token_ids").long()] = state.pop("token_rows")
    return clip_from_openai_weights(state | {"token_embedding.weight": table}).requires_grad_(False)


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
    absent = pytest.mark.skip(reason=f"the oracle is not in {SHARED}; HEBA_SHARED names the folder above it")
    return pytest.mark.parametrize("case", found or [pytest.param(None, marks=absent)])


differences = defaultdict(float)


def close(method, kind, found, expected, tolerance, scaled=False):
    """Assert it, and keep the largest difference for `pytest -s`."""
    found, expected = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
    assert found.shape == expected.shape, (method, kind, found.shape, expected.shape)
    far = relative(found, expected) if scaled else (found - expected).abs().max().item()
    differences[method, kind] = max(differences[method, kind], far)
    print(f"{method} {kind}: {far:.1e}, at most {differences[method, kind]:.1e}")
    assert far < tolerance, (method, kind, far)


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


def check_training(method, case, training, source, rename=lambda name: name, last="final"):
    """Take the recorded steps and compare losses, learning rates and the parameters after them, below `last`."""
    losses, lrs, take = [], [], training.take

    def recorded(x, labels):
        lrs.append(training.optimizer.param_groups[0]["lr"])
        losses.append(take(x, labels).item())
        return torch.tensor(losses[-1])

    object.__setattr__(training, "take", recorded)
    train_batches(training, source, Run(seed=1, shots=FEW_SHOTS))
    assert lrs == pytest.approx([step["lr"] for step in case.variant["steps"]], rel=1e-12, abs=0)
    close(method, "losses of steps", losses, case.steps(), LOSSES)
    final = {rename(name): tensor for name, tensor in case.part(last).items()}
    for name, parameter in training.module.named_parameters():
        close(method, "trained parameters", parameter.detach(), final[name], PARAMETERS)


def check_parameters(method, case, protocols):
    """The counts at ViT-B/16 with the paper preset in these `protocols`, which are in the oracle's order."""
    params = load_params(FOLDER / "paper.yaml")
    with torch.device("meta"):
        clip = backbone.build(read_architecture(params.backbone.name, Path()))
        found = [trained_parameters(params, method, protocol, clip) for protocol in protocols]
    assert found == [counts["trainable"] for counts in case.about["parameters_at_vit_b16"].values()]
