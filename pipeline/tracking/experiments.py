"""MLflow's experiments: one per protocol that is trained for, and one of summaries (summary.py).

MLflow keeps how its pages look in tags of the experiment. No tag changes the columns of the table of runs that
opens first, which has neither metrics nor params; but one may hold a saved view, which the page's menu of views
and the link in the experiment's description open. In MLflow 3.17 the browser's own switch, GenAI or Model
training, comes before KIND_TAG; the link sets it too.
"""

import json
import os
from typing import Any
from urllib.parse import quote, urlencode

from heba.data.protocols import PROTOCOLS
from pipeline.tracking.store import artifacts_of

SUMMARY = "summary"
VIEW = "accuracy"  # the saved view
KIND_TAG, NOTE_TAG, VIEW_TAG = "mlflow.experimentKind", "mlflow.note.content", f"mlflow.sharedViewState.{VIEW}"
KIND = "custom_model_development"  # opens on the table of runs; without it, on an empty page about traces
RUN_NAME = "attributes.`Run Name`"
METRICS = {
    "base_to_novel": ("base", "novel", "h"),
    "cross_dataset": ("accuracy", "accuracy_variants"),
    "few_shot": ("accuracy",),
}


def experiment_id(store: Any, name: str) -> str:
    """The id of an experiment, which is made if need be, with its tags."""
    from mlflow.exceptions import MlflowException

    found = store.get_experiment_by_name(name)
    if found is None:
        try:
            own = not os.environ.get("MLFLOW_TRACKING_URI")
            store.create_experiment(name, artifact_location=artifacts_of(name) if own else None)
        except MlflowException:
            found = store.get_experiment_by_name(name)  # another writer may have made it just now
            if found is None:
                raise
        found = store.get_experiment_by_name(name)
    return dressed(store, found)


def dressed(store: Any, experiment: Any) -> str:
    """Give an experiment of ours the tags that it lacks; returns its id."""
    wanted = {KIND_TAG: KIND, NOTE_TAG: note(experiment)}
    if experiment.name in METRICS:
        columns = [f"metrics.`{metric}`" for metric in METRICS[experiment.name]]
        columns += ["params.`method`", "params.`dataset`", "params.`shots`", "params.`seed`"]
        wanted[VIEW_TAG] = view([*columns, "tags.`dvc.experiment`"])
    for key, value in wanted.items():
        if key not in experiment.tags:  # what a user has written there stays
            store.set_experiment_tag(experiment.experiment_id, key, value)
    return experiment.experiment_id


def dress_all(store: Any) -> None:
    """The same for all experiments of ours that there are."""
    for name in (*METRICS, SUMMARY):
        found = store.get_experiment_by_name(name)
        if found is not None:
            dressed(store, found)


def note(experiment: Any) -> str:
    """The description of an experiment, in Markdown, with a link to its view."""
    if experiment.name == SUMMARY:
        what = "A run per report: the averages of all methods, the report itself, and the list of its trainings."
    else:
        titles = [p.title for p in PROTOCOLS.values() if p.trained_as == experiment.name]
        what = f"{' and '.join(titles)}: a run per training."
    return f"{what} [The runs with their accuracy]({table(experiment.experiment_id, viewStateShareKey=VIEW)})"


def table(experiment: str, **shown: str) -> str:
    """The address, on MLflow's server, of an experiment's table of runs: viewStateShareKey, a saved view, or
    searchFilter, what the runs must have."""
    query = urlencode({"workflowType": "machine_learning"} | shown, quote_via=quote)
    return f"#/experiments/{experiment}/runs?{query}"


def view(columns: list[str]) -> str:
    """A saved view of MLflow's table of runs, with these columns, as the tag VIEW_TAG has it.

    A column is named by its kind and name, as in metrics.`h`.
    """
    state = {
        "selectedColumns": columns,
        "columnOrder": [RUN_NAME, *columns],
        "columnWidths": {RUN_NAME: 320} | {name: 8 * len(name) for name in columns},  # pixels
        "runsExpanded": {},
        "runsPinned": [],
        "runsHidden": [],
        "runsVisibilityMap": {},
        "runsHiddenMode": "FIRST_10_RUNS",
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": False,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupBy": None,
        "groupsExpanded": {},
        "autoRefreshEnabled": True,
    }
    return json.dumps({"name": "Accuracy", "createdAt": 0, "state": json.dumps(state)})
