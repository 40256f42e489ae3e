"""HeBA: heterogeneous bottleneck adapters for CLIP (arXiv 2603.16653).

`heba.load(folder)` gives the classifier that a training wrote, `heba.zero_shot(...)` plain CLIP.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from heba.predict import TOP, load, zero_shot

__version__ = "0.1.0"
__all__ = ["TOP", "load", "zero_shot"]


def __getattr__(name: str) -> Any:
    # Not at import: they need torch, which the light stages do without.
    if name in __all__:
        from heba import predict

        return getattr(predict, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
