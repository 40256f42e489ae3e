"""Which evaluation records a report is made of: those of params.yaml as it stands.

Others may lie beside them, of an earlier params.yaml or suite; in a mean they would be a wrong number.
"""

from pathlib import Path

from heba.data.datasets import order
from heba.data.protocols import PROTOCOLS
from heba.evaluation.record import Record, read_record
from pipeline.core.params import Params
from pipeline.core.paths import OUT
from pipeline.core.trainings import Evaluation, can, evaluations

SHOWN = 3  # paths that the line about those left out names


def select(params: Params) -> tuple[list[Record], list[Path]]:
    """The records of params.yaml, and the paths of all others, which are left out."""
    asked = {evaluation.path: evaluation for evaluation in evaluations(params)}
    records: list[Record] = []
    left_out = []
    for path in sorted(OUT.glob("evaluate*/**/[!.]*.json")):
        record = read_record(path) if path in asked else None
        if record is not None and _belongs(record, params, asked[path]):
            missing = [g for g in groups(record.method, record.protocol) if g not in record.groups]
            if missing:
                raise ValueError(f"{path}: groups.{missing[0]} is missing; evaluate this data set again")
            records.append(record)
        else:
            left_out.append(path)
    return sorted(records, key=lambda r: (r.protocol, order(r.dataset), r.method, r.shots, r.seed)), left_out


def groups(method: str, protocol: str) -> list[str]:
    """The groups of a protocol's test classes that a method can classify."""
    return [group for group in PROTOCOLS[protocol].groups if can(method, protocol, group)]


def _belongs(record: Record, params: Params, asked: Evaluation) -> bool:
    # A path does not tell all of these.
    training = asked.training
    found = (record.protocol, record.dataset, record.method, record.shots, record.seed)
    return (
        found == (asked.protocol, asked.dataset, training.method, training.shots, training.seed)
        and record.suite == params.suite
        and record.backbone == params.backbone.model_dump()
        and record.source == (training.dataset if PROTOCOLS[asked.protocol].transfer else None)
    )


def left_out_text(paths: list[Path]) -> str:
    """One line that counts the records left out and names the first ones."""
    named = ", ".join(map(str, paths[:SHOWN]))
    more = f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
    count = "it: 1 evaluation" if len(paths) == 1 else f"them: {len(paths)} evaluations"
    return f"left out, since params.yaml does not ask for {count}, {named}{more}"
