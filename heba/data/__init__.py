"""The real benchmarks: where they come from, and how their archives become images and a split."""
