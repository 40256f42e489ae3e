"""HeBA: heterogeneous bottleneck adapters for CLIP (arXiv 2603.16653).

`heba.load(folder)` gives the classifier that a training wrote, `heba.zero_shot(...)` plain CLIP,
`heba.adapt(photos)` a new one for a folder of images per class, and `heba.export_onnx(folder, file)` an ONNX file.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from heba.adaptation import adapt
    from heba.export import export_onnx
    from heba.predict import TOP, load, zero_shot

__version__ = "0.1.0"
__all__ = ["TOP", "adapt", "export_onnx", "load", "zero_shot"]
_PLACES = {
    "TOP": "heba.predict",
    "adapt": "heba.adaptation",
    "export_onnx": "heba.export",
    "load": "heba.predict",
    "zero_shot": "heba.predict",
}


def __getattr__(name: str) -> Any:
    # Not at import: they need torch, which the light stages do without.
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
