"""Where the numbers of a table come from, and from a number to its run in MLflow.

No commit and no version: a report is the same bytes for the same inputs. The runs have these.
"""

import hashlib
import json
from pathlib import Path

import pandas as pd

from heba.data.protocols import PROTOCOLS
from heba.evaluation.record import Record
from pipeline.core.params import Params
from pipeline.core.paths import OUT, reading

BACKBONE = OUT / "backbone.json"
# What the stage reads of params.yaml. Settings of methods reach it through the hashes of the evaluations.
PARAMS = ("suite", "datasets", "methods", "own", "seeds", "shots", "backbone", "transfer", "few_shot")
COLUMNS = (
    *("protocol", "dataset", "method", "shots", "seed", "group", "accuracy", "n"),
    *("adapter_sha256", "inputs_sha256"),
)
SHOWN = 12  # digits of a hash


def lines(params: Params, records: list[Record]) -> dict[str, list[str]]:
    """By protocol, sentences for under its tables: what was trained how often, with which backbone, the hashes of
    all that, and the command that makes the report again."""
    backbone = f"backbone {params.backbone.name} ({params.backbone.pretrained})"
    hashes = [f"params {_sha256(params.model_dump(include=set(PARAMS)))}"]
    weights = weights_sha256(params)
    hashes += [f"weights of the backbone {weights[:SHOWN]}"] if weights else []
    found = {}
    for protocol, about in PROTOCOLS.items():
        of = params.transfer if about.transfer else params.few_shot if protocol == "few_shot" else params
        shots = params.few_shot.shots if protocol == "few_shot" else [params.shots]
        own = [r for r in records if r.protocol == protocol]
        made = sorted([r.dataset, r.method, r.shots, r.seed, r.inputs_sha256, r.evaluated_sha256] for r in own)
        found[protocol] = [
            f"{_listed(shots)} shot{'s' if shots != [1] else ''}, seed{'s' if len(of.seeds) > 1 else ''} "
            f"{_listed(of.seeds)}, {backbone}.",
            f"SHA-256: {', '.join([*hashes, f'evaluations {_sha256(made)}'])}. Made by: dvc repro report. "
            "The MLflow run of each number: evaluations.csv.",
        ]
    return found


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _sha256(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:SHOWN]


def weights_sha256(params: Params, path: Path = BACKBONE) -> str | None:
    """The hash of the backbone's weights; None where the stage `backbone` has not run for this one."""
    if not path.is_file():
        return None
    with reading(path, "backbone"):
        record = json.loads(path.read_text(encoding="utf-8"))
        same = {key: record[key] for key in ("name", "pretrained")} == params.backbone.model_dump()
        return str(record["sha256"]) if same else None


def evaluations(records: list[Record]) -> pd.DataFrame:
    """A row per evaluation and group of test classes: COLUMNS, the hashes as in the tags heba.adapter_sha256 and
    heba.inputs_sha256 of the training's run."""
    rows = [
        r.model_dump(include=set(COLUMNS)) | {"group": name, "accuracy": group.accuracy, "n": group.n}
        for r in records
        for name, group in r.groups.items()
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))
