"""Stages `split` and `split-source`: CoOp's few-shot sample of one data set and seed."""

from pathlib import Path

from heba.splits import read_split, sample_few_shot, write_split
from pipeline.download import verified_folder
from pipeline.params import Params
from pipeline.paths import OUT, new_file


def split_path(dataset: str, seed: int, source: bool) -> Path:
    return OUT / "split-source" / f"{seed}.json" if source else OUT / "split" / f"{dataset}-{seed}.json"


def run(params: Params, dataset: str, seed: int, source: bool) -> None:
    """Write the sample of `params.shots` images per class, all classes, in CoOp's JSON format."""
    split = read_split(verified_folder(params, dataset) / "split.json")
    with new_file(split_path(dataset, seed, source)) as path:
        write_split(sample_few_shot(split, params.shots, seed), path)
