"""Evaluation records for tests."""

from heba.data.protocols import PROTOCOLS
from heba.evaluation.record import Group, Record


def record(method, dataset, seed, accuracies, protocol="base_to_novel", **about):
    """A record with these accuracies: of base and novel, of base alone, or of all classes."""
    groups = {
        name: Group(
            n=100, accuracy=accuracy, class_names=["a", "b"], per_class=[None, 1.0], confusion=[[0, 0]] * 2
        )
        for name, accuracy in zip(PROTOCOLS[protocol].groups, accuracies, strict=False)
    }
    usual = {
        "source": "imagenet" if PROTOCOLS[protocol].transfer else None,
        "shots": 16,
        "suite": "embedded",
        "backbone": {"name": "tiny", "pretrained": "embedded"},
        "settings": {},
        "trained_parameters": 0,
        "adapter_bytes": 16,
        "adapter_sha256": "0",
        "inputs_sha256": "0",
        "evaluated_sha256": "0",
    }
    return Record(protocol=protocol, dataset=dataset, method=method, seed=seed, groups=groups, **usual | about)


def pair(dataset, seed, zero, heba, protocol="base_to_novel", **about):
    """Those of zero-shot CLIP and of HeBA."""
    values = {"zero_shot": zero, "heba": heba}
    return [record(method, dataset, seed, found, protocol, **about) for method, found in values.items()]


METHODS = ["zero_shot", "heba"]
RECORDS = [
    *pair("dtd", 1, (50.0, 60.0), (70.0, 60.0)),
    *pair("dtd", 2, (50.0, 60.0), (74.0, 64.0)),
    *pair("eurosat", 1, (40.0, 40.0), (90.0, 30.0)),
    *pair("eurosat", 2, (40.0, 40.0), (90.0, 34.0)),
    *pair("dtd", 1, (30.0,), (35.0,), "cross_dataset"),
    *pair("eurosat", 1, (50.0,), (45.0,), "cross_dataset"),
]
