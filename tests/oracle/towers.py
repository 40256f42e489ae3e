"""The oracle of methods inside the towers: their cases, each with a CLIP of its own, and the comparisons.

Uses every case in $HEBA_SHARED/oracle/methods (default ../shared), which is not in this repository.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from heba.clip.features import Classes
from heba.clip.openai import clip_from_openai_weights
from heba.fit.batches import train_batches
from tests.oracle.device import DEVICE
from tests.oracle.features import SHARED, read
from tests.oracle.prompts import close

# The tolerances of the oracle's README.
FEATURES, LOGITS, GRADIENTS, LOSSES, PARAMETERS = 5e-6, 1e-4, 5e-5, 3e-5, 2e-5

tokenizer = open_clip.SimpleTokenizer(context_length=77)


@dataclass
class Case:
    """What oracle.json says of a case, and its tensors."""

    about: dict
    tensors: dict

    @cached_property
    def clip(self):
        """Its weights are in half precision, and its table of tokens has the rows in use alone."""
        state = {key: tensor.float() for key, tensor in self.part("clip").items()}
        rows, ids = state.pop("token_embedding.rows"), state.pop("token_embedding.ids")
        table = torch.zeros(49408, rows.shape[1]).index_copy(0, ids.long(), rows)
        clip = clip_from_openai_weights(state | {"token_embedding.weight": table}).requires_grad_(False)
        return clip.to(DEVICE)

    def part(self, prefix):
        """The tensors below `prefix`."""
        return {k.removeprefix(f"{prefix}."): v for k, v in self.tensors.items() if k.startswith(f"{prefix}.")}

    def classes(self, kind="base"):
        """The classes of the training, or the "novel" ones, with the prompts of the oracle."""
        tokens, names = self.tensors[f"{kind}.tokens"].long(), list(self.about["classes"][kind])
        index = torch.arange(len(names)).repeat_interleave(tokens[..., 0].numel() // len(names))
        tokens = tokens.flatten(0, -2)
        with torch.no_grad():
            return Classes(names, tokens, index, self.clip.encode_text(tokens), tokenizer)

    def batch(self, step):
        """The images and the labels of a recorded step."""
        return self.tensors["images"][step["images"]], torch.tensor(step["labels"])

    @property
    def steps(self):
        return self.about["trajectory"]["steps"]

    def source(self, per_epoch):
        """The batches of the training, `per_epoch` in each epoch; after the last one they begin again."""

        def epoch(number, generator):
            for step in range(number * per_epoch, (number + 1) * per_epoch):
                yield self.batch(self.steps[step % len(self.steps)])

        return epoch


def cases(folder, method):
    """All cases of a method in folders that begin with `folder`, as parameters of a test; skipped where the oracle
    is not there."""
    found = [
        pytest.param(Case(about, load_file(path.parent / "oracle.safetensors")), id=path.parent.name)
        for path in sorted(SHARED.glob(f"{folder}*/oracle.json"))
        if (about := read(path.parent))["method"] == method
    ]
    absent = pytest.mark.skip(reason=f"the oracle is not in {SHARED}; HEBA_SHARED names the folder above it")
    return pytest.mark.parametrize("case", found or [pytest.param(None, marks=absent)])


def check_gradients(method, module, loss, expected, tensors):
    """Compare a loss, and the gradients of all parameters with `tensors` by name."""
    close(method, "loss", loss.detach(), expected, LOSSES)
    module.zero_grad()
    loss.backward()
    assert {name for name, _ in module.named_parameters()} <= set(tensors)
    for name, parameter in module.named_parameters():
        close(method, "gradient", parameter.grad, tensors[name], GRADIENTS, scaled=True)
    module.zero_grad()


def check_training(method, case, training, source, final, run):
    """Take the recorded steps and compare their losses, learning rates and the parameters that they end with."""
    losses, lrs, take = [], [], training.take

    def recorded(x, labels):
        lrs.append(training.optimizer.param_groups[0]["lr"])
        losses.append(take(x, labels).item())
        return torch.tensor(losses[-1])

    train_batches(replace(training, take=recorded), source, run)
    close(method, "learning rate", lrs, [step["lr"] for step in case.steps], 1e-9)
    close(method, "losses of steps", losses, [step["loss"] for step in case.steps], LOSSES)
    assert set(training.module.state_dict()) == set(final)
    for name, parameter in training.module.named_parameters():
        close(method, "trained parameters", parameter.detach(), final[name], PARAMETERS)
