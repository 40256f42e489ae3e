"""The embedded suite: a tiny CLIP and small data sets, so that everything runs without a GPU or a network.

It shows that the pipeline works. It is no benchmark, and numbers on it are no paper result.
"""
