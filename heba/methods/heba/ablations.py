"""The ablations of HeBA: settings that differ from those of params.yaml, one change at a time."""

from collections.abc import Iterable
from typing import Any, NamedTuple


class Change(NamedTuple):
    """A row of the ablation table: its name, its label, and the settings that differ."""

    name: str
    label: str
    settings: dict[str, Any]


def _each(name: str, label: str, values: Iterable[Any]) -> list[Change]:
    return [Change(f"{name}-{value}", f"{label}: {value}", {name: value}) for value in values]


ABLATIONS = {
    "init": _each("init", "Initialisation", ("kaiming", "zero")),
    "visual_block": _each("visual_block", "Visual block", ("conv", "linear")),
    "text_block": _each("text_block", "Text block", ("linear", "conv1d")),
    "ratio": _each("ratio", "Ratio", (1, 2, 4, 8)),
    "expansion": [Change("expansion-2", "Inverted bottleneck: twice the width", {"ratio": 1, "expansion": 2})],
    "slow_fast": [Change("slow_fast-off", "Slow-fast: off", {"slow_ratio": 1.0})],
    "label_smoothing": _each("label_smoothing", "Label smoothing", (0.0, 0.1)),
    "negatives": [
        Change("negatives-all", "Negatives: all classes", {"neg_ratio": 0}),
        *(Change(f"negatives-{n}", f"Negatives per class: {n}", {"neg_ratio": n}) for n in (1, 5)),
    ],
    "gradient_scale": [
        Change("gradient_scale-on", "Gradient scale: on", {"gradient_scale": True}),
        Change("gradient_scale-off", "Gradient scale: off", {"gradient_scale": False}),
    ],
    "towers": _each("towers", "Adapted towers", ("both", "image", "text")),
}
