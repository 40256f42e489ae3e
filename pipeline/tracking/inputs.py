"""The data sets of a run, as MLflow lists them: by the manifest of the stage `download`."""

import json
from typing import Any

from pipeline.core.paths import manifest_path

DIGITS = 12  # of a hash


def log_dataset(store: Any, run_id: str, name: str, context: str) -> None:
    """Log a data set, with the hash of its images, to a run, for `context`: train or test. One whose manifest is
    not here is left out. MLflow has a data set once in a run, so that of a test has a name of its own."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    path = manifest_path(name)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        digest = str(manifest["images_sha256"])[:DIGITS]
    except (OSError, ValueError, LookupError, TypeError):
        return
    profile = {key: manifest[key] for key in ("images", "bytes", "split_sha256") if key in manifest}
    source = json.dumps({"manifest": path.as_posix(), "suite": manifest.get("suite")})
    dataset = Dataset(
        name if context == "train" else f"{name}-{context}", digest, "local", source, profile=json.dumps(profile)
    )
    store.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])
