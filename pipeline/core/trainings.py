"""The one list of the trainings and evaluations that params.yaml asks for. All other code takes it from here."""

from dataclasses import dataclass
from pathlib import Path

from heba import methods
from heba.data.protocols import PROTOCOLS
from pipeline.core.params import Params
from pipeline.core.paths import OUT, new_file

Sample = tuple[str, int, int]  # protocol, shots, seed


@dataclass(frozen=True, order=True)
class Training:
    """A training of `method` on `dataset`, for a protocol that trains (`Protocol.trained_as`)."""

    protocol: str
    dataset: str
    method: str
    shots: int
    seed: int

    @property
    def folder(self) -> Path:
        """What it leaves."""
        return train_folder(self.dataset) / self.method / f"{self.protocol}-{self.shots}-{self.seed}"

    @classmethod
    def of_folder(cls, folder: Path) -> "Training":
        """The training that left `folder`."""
        protocol, shots, seed = folder.name.rsplit("-", 2)
        return cls(protocol, folder.parent.parent.name, folder.parent.name, int(shots), int(seed))


@dataclass(frozen=True, order=True)
class Evaluation:
    """A training, evaluated by `protocol` on the test images of `dataset`."""

    protocol: str
    dataset: str
    training: Training

    @property
    def path(self) -> Path:
        """Its record."""
        training = self.training
        name = f"{self.protocol}-{training.shots}-{training.seed}.json"
        return stage_folder(self.protocol) / self.dataset / training.method / name


def train_folder(dataset: str) -> Path:
    """All trainings on a data set."""
    return OUT / "train" / dataset


def cost_path(method: str) -> Path:
    """What a method's operations are counted in."""
    return OUT / "cost" / f"{method}.json"


def stage_folder(protocol: str) -> Path:
    """What the evaluation stages of a protocol write, for all data sets and seeds."""
    return OUT / "evaluate-transfer" / protocol if PROTOCOLS[protocol].transfer else OUT / "evaluate"


def samples(params: Params, dataset: str) -> list[Sample]:
    """The few-shot samples of a data set that are trained on, whatever the method."""
    found = []
    own, few = params.own.get(dataset), params.few_shot
    if dataset in params.datasets or (own and own.base_to_novel):
        found += [("base_to_novel", params.shots, seed) for seed in params.seeds]
    if dataset == params.transfer.source and params.transfer.protocols:
        found += [("cross_dataset", params.shots, seed) for seed in params.transfer.seeds]
    if dataset in few.datasets:
        found += [("few_shot", shots, seed) for shots in few.shots for seed in few.seeds]
    elif own:
        found += [("few_shot", params.shots, seed) for seed in params.seeds]
    return found


def trainings(params: Params) -> list[Training]:
    """Every training."""
    return [
        Training(protocol, dataset, method, shots, seed)
        for dataset in dict.fromkeys([*params.datasets, *params.own])
        for method in params.methods
        for protocol, shots, seed in samples(params, dataset)
        if trains(method, protocol)
    ]


def can(method: str, protocol: str, group: str) -> bool:
    """Whether a method can be tested on a group of a protocol, which may be of classes that are new to it."""
    new = PROTOCOLS[protocol].new_classes or group == "novel"
    return not new or methods.part(method, "settings").NEW_CLASSES


def trains(method: str, protocol: str) -> bool:
    """Whether a method is trained for a protocol: not when no protocol that tests the model can test it."""
    return any(tests(method, name) for name, about in PROTOCOLS.items() if about.trained_as == protocol)


def tests(method: str, protocol: str) -> bool:
    """Whether a method can be tested by a protocol, be it on one of its groups."""
    return any(can(method, protocol, group) for group in PROTOCOLS[protocol].groups)


def tested_on(params: Params, protocol: str, trained_on: str) -> list[str]:
    """The data sets on whose test images a training on `trained_on` is evaluated by `protocol`."""
    if not PROTOCOLS[protocol].transfer:
        return [trained_on]
    if protocol not in params.transfer.protocols:
        return []
    return params.transfer.targets if protocol == "cross_dataset" else params.transfer.variants


def evaluations(params: Params) -> list[Evaluation]:
    """Every evaluation."""
    return [
        Evaluation(protocol, dataset, training)
        for training in trainings(params)
        for protocol, about in PROTOCOLS.items()
        if about.trained_as == training.protocol and tests(training.method, protocol)
        for dataset in tested_on(params, protocol, training.dataset)
    ]


def counted(made: list[str], n: int, what: str) -> str:
    """What was made of `n`: names where others were there already."""
    names = f" ({', '.join(made)})" if 0 < len(made) < n else ""
    return f"{len(made)} of {n} {what}{names}"


def mark_protocols(params: Params) -> None:
    """Write .protocols, the names of those that are on, into the folders of the evaluation stages.

    The report depends on all these folders, and DVC refuses a dependency that does not exist.
    """
    on = {evaluation.protocol for evaluation in evaluations(params)}
    for folder, transfer in (("evaluate", False), ("evaluate-transfer", True)):
        names = [name for name, about in PROTOCOLS.items() if name in on and about.transfer == transfer]
        with new_file(OUT / folder / ".protocols") as path:
            path.write_text("".join(f"{name}\n" for name in names))
