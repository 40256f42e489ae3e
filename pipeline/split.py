"""Stages `split`, `split-source` and `split-few`: CoOp's few-shot sample of one data set and seed."""

from pathlib import Path

from heba.splits import read_split, sample_few_shot, write_split
from pipeline.download import verified_folder
from pipeline.params import Params
from pipeline.paths import OUT, new_file


def split_path(dataset: str, seed: int, source: bool, shots: int | None = None) -> Path:
    if shots is not None:
        return OUT / "split-few" / f"{dataset}-{shots}-{seed}.json"
    return OUT / "split-source" / f"{seed}.json" if source else OUT / "split" / f"{dataset}-{seed}.json"


def run(params: Params, dataset: str, seed: int, source: bool, shots: int | None = None) -> None:
    """Write the sample of `shots`, or params.shots, images per class, all classes, in CoOp's JSON format."""
    split = read_split(verified_folder(params, dataset) / "split.json")
    with new_file(split_path(dataset, seed, source, shots)) as path:
        write_split(sample_few_shot(split, shots or params.shots, seed), path)
