"""Which evaluation records a report is made of: those of params.yaml as it stands.

Others may lie beside them, of an earlier params.yaml or suite; in a mean they would be a wrong number.
"""

from pathlib import Path

from pipeline.core.params import Params
from pipeline.core.paths import OUT, TRANSFER_STAGES, evaluate_path
from pipeline.report.tables import Record, load_record, sorted_records

SHOWN = 3  # paths that the line about those left out names


def wanted(params: Params) -> dict[Path, tuple[str, str, int, int]]:
    """(protocol, data set, seed, shots) of each record that params.yaml asks for, by its path."""
    transfer, few = params.transfer, params.few_shot
    records = [
        *(("base_to_novel", d, s, params.shots) for d in [*params.datasets, *params.own] for s in params.seeds),
        *(("cross_dataset", d, s, params.shots) for d in transfer.targets for s in transfer.seeds),
        *(("domain_generalization", d, s, params.shots) for d in transfer.variants for s in transfer.seeds),
        *(("few_shot", d, s, shots) for d in few.datasets for s in few.seeds for shots in few.shots),
    ]
    return {evaluate_path(*record): record for record in records}


def select(params: Params) -> tuple[list[Record], list[Path]]:
    """The records of params.yaml, and the paths of all others, which are left out."""
    records: list[Record] = []
    left_out = []
    asked = wanted(params)
    for stage in ("evaluate", *TRANSFER_STAGES.values()):
        # Not what a running evaluation has under its temporary name.
        for path in sorted((OUT / stage).glob("[!.]*/*.json")):
            record = load_record(path, params.own) if path in asked else None
            if record is not None and _belongs(record, params, asked[path]):
                records.append(record)
            else:
                left_out.append(path)
    return sorted_records(records), left_out


def _belongs(record: Record, params: Params, asked: tuple[str, str, int, int]) -> bool:
    # A path does not tell all of these.
    source = params.transfer.source if record["protocol"] in TRANSFER_STAGES else None
    found = (record["protocol"], record["dataset"], record["seed"], record["shots"])
    return (
        found == asked
        and record["suite"] == params.suite
        and record["backbone"] == params.backbone.model_dump()
        and record.get("source") == source
    )


def left_out_text(paths: list[Path]) -> str:
    """One line that counts the records left out and names the first ones."""
    named = ", ".join(map(str, paths[:SHOWN]))
    more = f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
    count = "it: 1 evaluation" if len(paths) == 1 else f"them: {len(paths)} evaluations"
    return f"left out, since params.yaml does not ask for {count}, {named}{more}"


def settings(params: Params) -> dict[str, str]:
    """By protocol, a line for under its table that says what the adapters were trained with."""
    backbone = f"backbone {params.backbone.name} ({params.backbone.pretrained})"
    base, transfer = (
        f"{params.shots} shot{'s' if params.shots > 1 else ''}, seed{'s' if len(seeds) > 1 else ''} "
        f"{', '.join(map(str, seeds))}, {backbone}."
        for seeds in (params.seeds, params.transfer.seeds)
    )
    return {"base_to_novel": base} | dict.fromkeys(TRANSFER_STAGES, transfer)
