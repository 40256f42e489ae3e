"""HeBA: heterogeneous bottleneck adapters for CLIP (arXiv 2603.16653)."""

__version__ = "0.1.0"
