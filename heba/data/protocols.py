"""The protocols, each a table of the papers. Nothing here imports torch."""

from dataclasses import dataclass

from heba.data.datasets import BENCHMARKS, VARIANTS


@dataclass(frozen=True)
class Protocol:
    """How a method is trained and tested.

    Attributes:
        title: of its table.
        groups: the groups of test classes, each with an accuracy of its own among the classes of the group.
        trained_as: whose training is evaluated; domain_generalization tests the model of cross_dataset.
        complete: the data sets that a complete table has; the source of the transfer protocols is ImageNet.
        new_classes: whether all classes of the test are new to the model. Those of ImageNet's variants are not.
    """

    title: str
    groups: tuple[str, ...]
    trained_as: str
    complete: tuple[str, ...]
    new_classes: bool = False

    @property
    def transfer(self) -> bool:
        """Whether a source model is tested on other data sets."""
        return self.trained_as == "cross_dataset"


PROTOCOLS = {
    "base_to_novel": Protocol("Base-to-novel generalisation", ("base", "novel"), "base_to_novel", BENCHMARKS),
    "cross_dataset": Protocol(
        "Cross-data-set transfer", ("all",), "cross_dataset", BENCHMARKS[1:], new_classes=True
    ),
    "domain_generalization": Protocol("Domain generalisation", ("all",), "cross_dataset", VARIANTS),
    "few_shot": Protocol("Few-shot learning, all classes", ("all",), "few_shot", BENCHMARKS),
}
