"""Stage `split`: CoOp's few-shot samples of a data set, one file per number of shots and seed, for all protocols.

out/split/<dataset>/<shots>-<seed>.json   a sample
out/split/<dataset>/trainings.json        (protocol, shots, seed) of the trainings on it, for the stage `train`
"""

import json
from pathlib import Path

from heba.data.splits import Split, read_split, sample_few_shot, write_split
from pipeline.core.params import Params, stage_of
from pipeline.core.paths import OUT, new_folder, reading
from pipeline.core.trainings import Sample, samples
from pipeline.stages.download import verified_folder

TRAININGS = "trainings.json"


def split_folder(dataset: str) -> Path:
    return OUT / "split" / dataset


def sample_path(dataset: str, shots: int, seed: int) -> Path:
    return split_folder(dataset) / f"{shots}-{seed}.json"


def read_sample(dataset: str, shots: int, seed: int) -> Split:
    path = sample_path(dataset, shots, seed)
    with reading(path, stage_of("split", dataset)):
        return read_split(path)


def read_trainings(dataset: str) -> list[Sample]:
    """(protocol, shots, seed) of the trainings on `dataset`."""
    path = split_folder(dataset) / TRAININGS
    with reading(path, stage_of("split", dataset)):
        return [(str(protocol), int(shots), int(seed)) for protocol, shots, seed in json.loads(path.read_text())]


def run(params: Params, dataset: str) -> str:
    """Write CoOp's sample of the data set's split for each number of shots and seed, and the list of trainings;
    returns a line about it."""
    split = read_split(verified_folder(params, dataset) / "split.json")
    wanted = samples(params, dataset)
    with new_folder(split_folder(dataset)) as out:
        drawn = sorted({(shots, seed) for _, shots, seed in wanted})
        for shots, seed in drawn:
            write_split(sample_few_shot(split, shots, seed), out / sample_path(dataset, shots, seed).name)
        (out / TRAININGS).write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
    return f"{len(drawn)} samples for {len(wanted)} trainings of each method"
