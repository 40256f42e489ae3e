"""The epochs of the trainings, for the figure of their losses."""

import pandas as pd

from heba import artifact
from pipeline.core.params import Params
from pipeline.core.trainings import trainings


def read(params: Params) -> pd.DataFrame:
    """The losses of the base_to_novel trainings that are there: a frame of method, dataset, epoch and loss."""
    rows = [
        (training.method, training.dataset, int(record["epoch"]), record["loss"])
        for training in trainings(params)
        if training.protocol == "base_to_novel" and (training.folder / artifact.HISTORY_FILE).is_file()
        for record in artifact.read_history(training.folder)
    ]
    return pd.DataFrame(rows, columns=["method", "dataset", "epoch", "loss"])
