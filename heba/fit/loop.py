"""SGD epoch by epoch, with a checkpoint after each, for every method that is trained so."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from heba.fit.run import Run

History = list[dict[str, float]]


def make_optimizer(parameters: nn.Module, lr: float, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """SGD over all `parameters` in one group (weight decay on the norms too)."""
    return torch.optim.SGD(
        parameters.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay, fused=True
    )


def update(parameters: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step of SGD down the gradient of `loss`."""
    loss.backward()
    for parameter in parameters.parameters():
        # What no loss depends on gets a gradient of zero instead of none, so that it decays as it does officially.
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def cosine(lr: float, epoch: int, epochs: int) -> float:
    """The learning rate of an epoch (0-based), without warm-up: lr/2 * (1 + cos(pi * epoch / epochs))."""
    return lr / 2 * (1 + math.cos(math.pi * epoch / epochs))


def finite(losses: list[Tensor]) -> list[float]:
    """The losses of an epoch's steps as numbers, fetched from the device at once; FloatingPointError when one is
    not finite."""
    values = torch.stack(losses).tolist()
    for i, value in enumerate(values):
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss of step {i + 1} of {len(values)} is {value}")
    return values


@dataclass(frozen=True)
class Schedule:
    """How long to train: `epochs` of so many `steps`, the last one perhaps cut short by `most`, the steps of all;
    `lr` is an epoch's learning rate (epochs count from 0)."""

    epochs: int
    steps: int
    lr: Callable[[int], float]
    most: int | None = None

    def total(self) -> int:
        """The steps of all epochs."""
        return self.epochs * self.steps if self.most is None else self.most


def dassl_lr(lr: float, epoch: int, epochs: int) -> float:
    """The learning rate of an epoch (0-based) in Dassl: 1e-5 in the first, then a cosine that begins one epoch
    late and so does not reach 0."""
    return 1e-5 if epoch == 0 else cosine(lr, epoch - 1, epochs)


def dassl_schedule(lr: float, epochs: int, steps: int) -> Schedule:
    """`epochs` of so many `steps` with the learning rates of Dassl."""
    return Schedule(epochs, steps, lambda epoch: dassl_lr(lr, epoch, epochs))


def train_epochs(
    parameters: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    run_epoch: Callable[[int, torch.Generator, Callable[[int], object]], list[float]],
    run: Run,
    remedy: str,
) -> History:
    """Train for the epochs of `schedule`, or for what a checkpoint has left of them.

    Args:
        parameters: the module that `optimizer` trains.
        run_epoch: makes the steps of an epoch (0-based), with all its draws from the generator, counts them by the
            function that it gets, and returns their losses.
        remedy: what to do about a loss that is not finite.
    Returns:
        One {"epoch", "loss", "lr"} per epoch, which count from 1; loss is the mean over the steps.
    Raises:
        FloatingPointError: a loss that is not finite. ValueError: a damaged checkpoint.
    """
    generator = torch.Generator().manual_seed(run.seed)
    history: History = []
    if run.checkpoint is not None and run.checkpoint.exists():
        history = load_checkpoint(run.checkpoint, parameters, optimizer, generator)
    with run.progress(schedule.total(), "train") as done:
        done(min(len(history) * schedule.steps, schedule.total()))
        for record in history:
            run.on_epoch(record)
        for epoch in range(len(history), schedule.epochs):
            lr = schedule.lr(epoch)
            for group in optimizer.param_groups:
                group["lr"] = lr
            try:
                losses = run_epoch(epoch, generator, done)
            except FloatingPointError as error:
                raise FloatingPointError(f"epoch {epoch + 1}: {error}; {remedy}") from None
            history.append({"epoch": epoch + 1, "loss": sum(losses) / len(losses), "lr": lr})
            if run.checkpoint is not None:
                save_checkpoint(run.checkpoint, parameters, optimizer, generator, history)
            run.on_epoch(history[-1])
    return history


def save_checkpoint(
    path: Path,
    parameters: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    history: History,
) -> None:
    """Write parameters, buffers, the optimizer's and the generator's state atomically; `history` tells the epochs
    done."""
    tensors = {"generator": generator.get_state()}
    tensors |= {f"module.{name}": tensor.detach().cpu() for name, tensor in parameters.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{name}": tensor.cpu() for name, tensor in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of this process: another experiment may run the same training.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # `save_file` would write to a name of its own, which is left when the process is killed.
        temporary.write_bytes(save(tensors, {"history": json.dumps(history)}))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(
    path: Path, parameters: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator
) -> History:
    """Restore what `save_checkpoint` wrote; returns the history. ValueError names a damaged file."""
    try:
        with safe_open(path, "pt") as file:
            history = json.loads(file.metadata()["history"])
            parts: dict[str, dict[str, Tensor]] = {"module": {}, "optimizer": {}, "generator": {}}
            for key in file.keys():  # noqa: SIM118  (it has no iterator)
                part, _, name = key.partition(".")
                parts[part][name] = file.get_tensor(key)
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in parts["optimizer"].items():
            i, _, name = key.partition(".")
            state.setdefault(int(i), {})[name] = tensor
        if len(state) != sum(len(group["params"]) for group in optimizer.param_groups):
            raise ValueError("the optimizer's state is not that of these parameters")
        parameters.load_state_dict(parts["module"])
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
        generator.set_state(parts["generator"][""])
    except Exception as error:
        raise ValueError(f"{path}: damaged checkpoint ({error}); delete it to train from the start") from error
    return history
