"""Adapters as MLflow models, which `mlflow models serve` and `mlflow models predict` run."""

import base64
import importlib.metadata
import io
import logging
import os
import shutil
import tempfile
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import heba
from heba import artifact
from heba.artifact import ADAPTER_FILE
from heba.files import temporary_name
from pipeline.tracking.origin import COMMIT_TAG, DIRTY_TAG
from pipeline.tracking.store import INPUTS_TAG, SHA_TAG, client, has_store, shown_uri, store_uri

SERVED = Path(__file__).with_name("served.py")
# What heba imports to name images, and what served.py does.
LIBRARIES = (
    "torch",
    "torchvision",
    "open_clip_torch",
    "timm",
    "huggingface_hub",
    "safetensors",
    "numpy",
    "pillow",
    "pydantic",
    "pyyaml",
    "psutil",
    "scikit-learn",
    "pandas",
    "mlflow",
)


def requirements() -> list[str]:
    """The installed versions, which a served model asks for."""
    # A local version such as +cu132 is on no index.
    return [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in LIBRARIES]


def example() -> Any:
    """An input: one grey image in base64."""
    import pandas as pd
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (8, 8), (128, 128, 128)).save(file, "PNG")
    return pd.DataFrame({"image": [base64.b64encode(file.getvalue()).decode()]})


def signature() -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Array, ColSpec, DataType, ParamSchema, ParamSpec, Schema

    outputs: dict[str, DataType | Array] = {
        "label": DataType.string,
        "probability": DataType.double,
        "labels": Array(DataType.string),
        "probabilities": Array(DataType.double),
    }
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "image")]),
        outputs=Schema([ColSpec(kind, name) for name, kind in outputs.items()]),
        params=ParamSchema([ParamSpec("top", DataType.integer, heba.TOP)]),
    )


def save_model(adapter: Path, out: Path, run_id: str, model_id: str) -> None:
    """Write the folder `adapter` of a training as a pyfunc model into the new folder `out`, with heba's code.
    MLflow notes `run_id` and `model_id` in it. The tiny CLIP's weights come with adapters on it alone."""
    import mlflow.pyfunc
    from mlflow.models import Model

    package = Path(heba.__file__).parent
    tiny = artifact.read_config(adapter).backbone.name == "tiny"
    unused = shutil.ignore_patterns("__pycache__", *([] if tiny else ["*.safetensors"]))
    with tempfile.TemporaryDirectory() as temporary:
        code = shutil.copytree(package, Path(temporary) / package.name, ignore=unused)
        mlflow.pyfunc.save_model(
            out,
            python_model=str(SERVED),
            artifacts={"adapter": str(adapter)},
            code_paths=[str(code)],
            signature=signature(),
            input_example=example(),
            pip_requirements=requirements(),
            mlflow_model=Model(run_id=run_id, model_id=model_id),
        )


def log_model(store: Any, run_id: str, folder: Path, name: str) -> None:
    """Log the adapter in `folder` as a model of the run, under `name`."""
    from mlflow.entities import LoggedModelOutput

    experiment = store.get_run(run_id).info.experiment_id
    model = store.create_logged_model(experiment, name, run_id)
    try:
        with tempfile.TemporaryDirectory() as temporary:
            out = Path(temporary) / "model"
            save_model(folder, out, run_id=run_id, model_id=model.model_id)
            store.log_model_artifacts(model.model_id, str(out))
    except BaseException:
        store.finalize_logged_model(model.model_id, "FAILED")
        raise
    store.finalize_logged_model(model.model_id, "READY")
    store.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])


def model_of(store: Any, run_id: str) -> Any:
    """The model that a run has logged, as MLflow's LoggedModel; None without one."""
    experiment = store.get_run(run_id).info.experiment_id
    found = store.search_logged_models([experiment], f"source_run_id = '{run_id}'")
    return next((model for model in found if model.status == "READY"), None)


def share_adapter(store: Any, run_id: str, folder: Path) -> None:
    """Make the model's copy of an adapter a hard link to the out, which nobody changes in place: no space taken.

    Only where both lie on one disk, and not when a training is logged, since DVC replaces its outs after that.
    """
    model = model_of(store, run_id)
    uri = urllib.parse.urlparse(model.artifact_location if model else "")
    copy = Path(urllib.request.url2pathname(uri.path)) / "artifacts" / folder.name / ADAPTER_FILE
    if uri.scheme != "file" or not copy.exists():
        return
    link = temporary_name(copy)  # removes what killed processes have left
    try:
        if not copy.samefile(folder / ADAPTER_FILE):  # else `replace` does nothing, and `link` stays
            os.link((folder / ADAPTER_FILE).resolve(), link)  # which may be a symbolic link to DVC's cache
            os.replace(link, copy)
    except OSError:  # another disk, or one without links: the copy stays
        link.unlink(missing_ok=True)


def find_run(store: Any, folder: Path) -> Any:
    """The newest run of the training in `folder`, by the hashes of adapter and inputs, or None.

    The adapter's alone is not enough: all trainings of zero-shot CLIP have the same.
    """
    inputs = artifact.read_config(folder).inputs_sha256
    same = f"tags.`{SHA_TAG}` = '{artifact.sha256(folder)}' AND tags.`{INPUTS_TAG}` = '{inputs}'"
    experiments = [experiment.experiment_id for experiment in store.search_experiments()]
    found = store.search_runs(experiments, same, max_results=1)
    return found[0] if found else None


def commit_of(folder: Path) -> str | None:
    """The git commit that an adapter was trained at, and what differed from it, as its MLflow run tells; None
    where none does."""
    if not has_store():
        return None
    try:
        run = find_run(client(), folder)
    except Exception as error:  # a store that is down
        logging.getLogger("heba").warning("%s: %s", shown_uri(), (str(error).splitlines() or [""])[0][:300])
        return None
    commit = run.data.tags.get(COMMIT_TAG) if run else None
    dirty = run.data.tags.get(DIRTY_TAG, "false") if run else "false"
    return commit if commit is None or dirty == "false" else f"{commit}, dirty ({dirty})"


def fetch_adapter(name: str) -> Path:
    """The adapter's folder of an MLflow run (its id, or runs:/id) or model (models:/...), fetched where the store
    is not on this machine. ValueError when there is none."""
    if not has_store():
        raise ValueError(
            f"{name}: there is no such folder, and no store of MLflow to find such a run or model in: "
            f"{shown_uri()} does not exist (MLFLOW_TRACKING_URI names another)"
        )
    import mlflow
    from mlflow.exceptions import MlflowException

    store = client()
    mlflow.set_tracking_uri(store_uri())
    uri = name
    try:
        if not name.startswith("models:/"):
            model = model_of(store, name.removeprefix("runs:/"))
            if model is None:
                raise ValueError(f"{name}: this run in {shown_uri()} has logged no model")
            uri = model.model_uri
        folder = Path(mlflow.artifacts.download_artifacts(uri))
    except MlflowException as error:
        raise ValueError(
            f"{name}: neither a folder nor a run or model in {shown_uri()} ({str(error).splitlines()[0]})"
        ) from None
    found = sorted(folder.glob(f"artifacts/*/{ADAPTER_FILE}"))
    if not found:
        raise ValueError(f"{name}: this model is not an adapter's")
    return found[0].parent


def register(adapter: str, name: str) -> str:
    """Register the model of a training (folder, or id of its run) under `name`; returns models:/name/version."""
    import mlflow

    store = client()
    run_id = adapter
    if Path(adapter).exists():
        run = find_run(store, Path(adapter))
        if run is None:
            raise ValueError(f"{adapter}: not in {shown_uri()}; log it with `python -m pipeline track`")
        run_id = run.info.run_id
    mlflow.set_tracking_uri(store_uri())
    try:
        model = model_of(store, run_id.removeprefix("runs:/"))
        if model is None:
            raise ValueError(f"{adapter}: its run has logged no model")
        version = mlflow.register_model(model.model_uri, name)
    except mlflow.MlflowException as error:
        raise ValueError(f"{adapter}: cannot be registered as {name!r}: {str(error).splitlines()[0]}") from None
    return f"models:/{name}/{version.version}"
