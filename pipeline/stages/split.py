"""Stage `split`: CoOp's few-shot samples of a data set, one file per number of shots and seed, for all protocols.

out/split/<dataset>/<shots>-<seed>.json
out/train/<dataset>/trainings.json       the trainings for base_to_novel and few_shot, which evaluate goes by
"""

import json
from pathlib import Path

from heba.data.splits import read_split, sample_few_shot, write_split
from pipeline.core.params import Params, stage_of
from pipeline.core.paths import OUT, new_file, new_folder, reading
from pipeline.stages.download import verified_folder


def split_path(dataset: str, shots: int, seed: int) -> Path:
    return OUT / "split" / dataset / f"{shots}-{seed}.json"


def trainings_path(dataset: str) -> Path:
    return OUT / "train" / dataset / "trainings.json"


def trainings(params: Params, dataset: str) -> list[tuple[str, int, int]]:
    """(protocol, seed, shots) of the trainings on `dataset` whose test images are of the same."""
    found = [("base_to_novel", seed, params.shots) for seed in params.seeds]
    if dataset in params.few_shot.datasets:
        few = params.few_shot
        found += [("few_shot", seed, shots) for shots in few.shots for seed in few.seeds]
    return found


def read_trainings(dataset: str) -> list[tuple[str, int, int]]:
    """What `trainings` gave for `dataset`."""
    path = trainings_path(dataset)
    with reading(path, stage_of("split", dataset)):
        return [(str(protocol), int(seed), int(shots)) for protocol, seed, shots in json.loads(path.read_text())]


def run(params: Params, dataset: str) -> None:
    """Write CoOp's sample of the data set's split for each number of shots and seed, and the list of trainings."""
    split = read_split(verified_folder(params, dataset) / "split.json")
    own = trainings(params, dataset)
    wanted = {(shots, seed) for _, seed, shots in own}
    if dataset == params.transfer.source:
        wanted |= {(params.shots, seed) for seed in params.transfer.seeds}
    with new_folder(OUT / "split" / dataset) as out:
        for shots, seed in sorted(wanted):
            write_split(sample_few_shot(split, shots, seed), out / split_path(dataset, shots, seed).name)
    with new_file(trainings_path(dataset)) as path:
        path.write_text(json.dumps(own, indent=1) + "\n", encoding="utf-8")
