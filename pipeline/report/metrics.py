"""The numbers for `dvc metrics`: a few for all experiments side by side, and the averages of all methods."""

from typing import Any

import pandas as pd

from pipeline.report.tables import AVERAGE, groups_of, own_data

SHORT = {"cross_dataset": "cross", "domain_generalization": "domain"}  # other protocols have their own names


def headline(found: dict[str, pd.DataFrame], reference: str) -> dict[str, dict[str, float]]:
    """About ten numbers, however many methods there are, under names so short that `dvc exp show` has them side by
    side: the averages of the reference, and the highest score of any method. Of own data, these scores alone.

    Args:
        found: by protocol, its tidy table, of which the most shots count.
        reference: the method that the others are compared with.
    """
    shown: dict[str, dict[str, float]] = {reference: {}, "best": {}}
    for protocol, table in found.items():
        most = table[table["shots"] == table["shots"].max()].dropna(subset="accuracy")
        score = groups_of(protocol)[-1]
        for dataset in [AVERAGE, *own_data(table)]:
            there = most[most["dataset"] == dataset]
            best = there.loc[there["group"] == score, "accuracy"].max()
            numbers = {("best", score): best} if pd.notna(best) else {}
            for _, method, _, group, accuracy, *_ in there.itertuples(index=False):
                if method == reference and (group == score or dataset == AVERAGE):
                    numbers[reference, group] = accuracy
            for (name, group), accuracy in numbers.items():
                key = group if group != "all" else SHORT.get(protocol, protocol)
                block, key = (name, key) if dataset == AVERAGE else (dataset, f"{name}_{key}")
                shown.setdefault(block, {})[key] = round(float(accuracy), 2)
    return {block: numbers for block, numbers in shown.items() if numbers}


def averages(found: dict[str, pd.DataFrame]) -> dict[str, Any]:
    """By protocol, for the average and for own data, the accuracies of each method, with the fewest and the most
    shots."""
    shown: dict[str, Any] = {}
    for protocol, whole in found.items():
        table = whole[whole["shots"].isin([whole["shots"].min(), whole["shots"].max()])]
        for dataset in [AVERAGE, *own_data(table)]:
            there = table[table["dataset"] == dataset].dropna(subset="accuracy")
            for _, method, shots, group, accuracy, *_ in there.itertuples(index=False):
                of = shown.setdefault(protocol, {}).setdefault(dataset, {}).setdefault(method, {})
                of[str(shots) if protocol == "few_shot" else group] = round(accuracy, 2)
    return shown
