"""A training's run in words: its name, params and tags, and its description with the results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from heba import methods
from heba.data.datasets import title
from heba.data.protocols import PROTOCOLS
from heba.evaluation.record import Record, read_record
from pipeline.core.trainings import Evaluation, Training
from pipeline.tracking.origin import EXPERIMENT_TAG
from pipeline.tracking.store import INPUTS_TAG

ACCURACY = "accuracy"  # of all classes: for few_shot, and the mean over the data sets of cross_dataset
VARIANTS = "accuracy_variants"  # the mean over those of domain_generalization
FIRST = ("base", "novel", "h", ACCURACY, VARIANTS)  # in the first line of a description
DECIMALS = 4  # as in the report's CSVs
MEANS = {"cross_dataset": ACCURACY, "domain_generalization": VARIANTS}
UNITS = (
    "The metrics `base`, `novel`, `h`, `accuracy` and those of data sets are in percent. `seconds` are of "
    "an epoch, `training_seconds` of the whole training."
)
ROWS = {"base": "base classes", "novel": "novel classes", "h": "harmonic mean, h", "all": "all classes"}


class Result(NamedTuple):
    """What a run shows of an evaluation: accuracies in percent and numbers of test images, by group."""

    protocol: str
    dataset: str
    inputs_sha256: str
    accuracies: dict[str, float]
    images: dict[str, int]


def result_of(record: Record) -> Result:
    images = {name: group.n for name, group in record.groups.items()}
    return Result(record.protocol, record.dataset, record.inputs_sha256, record.accuracies(), images)


def results_of(training: Training, inputs_sha256: str, known: Mapping[Path, Result]) -> list[Result]:
    """All evaluations of a training with these inputs: those `known`, by their paths, and else what is on disk."""
    found = []
    for protocol, about in PROTOCOLS.items():
        if about.trained_as == training.protocol:
            pattern = Evaluation(protocol, "*" if about.transfer else training.dataset, training).path
            paths = {*Path().glob(str(pattern)), *(path for path in known if path.match(str(pattern)))}
            for path in sorted(paths):
                try:
                    result = known.get(path) or result_of(read_record(path))
                except ValueError:  # damaged; the stage makes it again
                    continue
                if result.inputs_sha256 == inputs_sha256:
                    found.append(result)
    return found


def metrics(results: Sequence[Result]) -> dict[str, float]:
    """The metrics of a training's evaluations: base, novel and h; ACCURACY; a data set's name and the means of a
    protocol where the model was not trained on them. The names are the same for all methods."""
    found: dict[str, float] = {}
    for result in results:
        if PROTOCOLS[result.protocol].transfer:
            found[result.dataset] = result.accuracies["all"]
        else:
            found |= {ACCURACY if name == "all" else name: value for name, value in result.accuracies.items()}
    for protocol, name in MEANS.items():
        values = [result.accuracies["all"] for result in results if result.protocol == protocol]
        found |= {name: mean(values)} if values else {}
    return {name: round(value, DECIMALS) for name, value in found.items()}


def name(config: Mapping[str, Any]) -> str:
    """A training, as its model is named."""
    return f"{config['dataset']}-{config['method']}-{config['shots']}shot-seed{config['seed']}"


def run_name(config: Mapping[str, Any], origin: Mapping[str, str]) -> str:
    """A training and what tells it from others of that name: its DVC experiment, or the hash of its inputs."""
    return f"{name(config)}-{origin.get(EXPERIMENT_TAG) or str(config['inputs_sha256'])[:6]}"


def flat_params(config: Mapping[str, Any]) -> dict[str, str]:
    """A config's values as MLflow's params, without hashes; settings by the name of their method, as in
    params.yaml."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            section = config["method"] if key == "settings" else key
            flat |= {f"{section}.{k}": str(v) for k, v in value.items() if not k.endswith("sha256")}
        elif key not in ("class_names", "inputs_sha256"):
            flat[key] = str(value)
    return flat


def tags(config: Mapping[str, Any]) -> dict[str, str]:
    """A config's hashes, and what kind of method it is of."""
    method = config["method"]
    hashes = {f"backbone.{k}": v for k, v in config["backbone"].items() if k.endswith("sha256") and v}
    family = methods.part(method, "settings").FAMILY
    return {INPUTS_TAG: config["inputs_sha256"], "method": method, "family": family} | hashes


def note(config: Mapping[str, Any], results: Sequence[Result] = ()) -> str:
    """The description of a training's run, in Markdown, with a table of its `results`."""
    about = methods.part(config["method"], "settings")
    shots = "1 shot" if config["shots"] == 1 else f"{config['shots']} shots"
    found = metrics(results)
    first = [f"{name} {found[name]:.2f} %" for name in FIRST if name in found]
    trained = f"**{about.TITLE}** on {title(config['dataset'])}, {shots}, seed {config['seed']}"
    lines = [f"{trained}: {', '.join(first)}" if first else trained, ""]
    rows = []
    for result in results:
        transfer = PROTOCOLS[result.protocol].transfer
        for group, accuracy in result.accuracies.items():
            what = title(result.dataset) if transfer else ROWS[group]
            rows.append(f"| {what} | {result.images.get(group, '')} | {accuracy:.2f} |")
    rows += [
        f"| {PROTOCOLS[protocol].title}, mean | | {found[name]:.2f} |"
        for protocol, name in MEANS.items()
        if config["protocol"] == PROTOCOLS[protocol].trained_as and name in found
    ]
    if rows:
        lines += ["| test images of | number | accuracy, % |", "| :-- | --: | --: |", *rows, ""]
    kind = f"For {config['protocol']}. Family {about.FAMILY}: {methods.FAMILIES[about.FAMILY]}."
    return "\n".join([*lines, kind, "", UNITS])
