"""The commands that dvc.yaml runs, a stage each. What they import is imported when they run."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from heba.data.protocols import PROTOCOLS
from heba.fit.bounds import MOST_SEED
from pipeline.commands.common import Dataset, read_params, refuse_lost_folders, say
from pipeline.core.params import MOST, ParamsError
from pipeline.core.paths import new_folder


def check_params() -> None:
    """Read params.yaml and list all that is wrong with it; a stage, so that DVC writes nothing before."""
    from pipeline.core import paths

    refuse_lost_folders(read_params())
    paths.mark_params()
    say("params", "all of params.yaml is possible")


def download(dataset: Dataset) -> None:
    """Provide a data set's images under data.root and write its manifest."""
    from pipeline.stages import download

    say(f"download {dataset}", download.run(read_params(dataset), dataset))


def download_own() -> None:
    """`download` of the own data set whose stage DVC runs: by DVC_STAGE, since DVC does not quote a key."""
    download(os.environ.get("DVC_STAGE", "").rpartition("@")[2])


def split(dataset: Dataset) -> None:
    """Draw CoOp's few-shot samples of a data set, for every number of shots and seed of params.yaml."""
    from pipeline.stages import split

    say(f"split {dataset}", split.run(read_params(dataset), dataset))


def backbone() -> None:
    """Fetch and check the frozen CLIP's weights and record their hash."""
    params = read_params()
    from pipeline.stages import backbone

    say("backbone", backbone.run(params))


def precompute(dataset: Dataset) -> None:
    """Encode all prompts and pack the test images with the frozen CLIP, once per data set."""
    params = read_params(dataset)
    from pipeline.stages import precompute

    say(f"precompute {dataset}", precompute.run(params, dataset))


def count(method: Annotated[str, typer.Option(help="A method of params.yaml.")]) -> None:
    """Count the operations of a method's training step and test image; the command `cost` shows them."""
    params = read_params()
    from pipeline.stages import cost

    say(f"cost {method}", cost.run(params, method))


def views(dataset: Dataset) -> None:
    """Encode the few-shot images of a data set, and random crops of them, for the methods on frozen features."""
    params = read_params(dataset)
    from pipeline.stages import views

    say(f"views {dataset}", views.run(params, dataset))


def train(
    dataset: Dataset,
    method: Annotated[str, typer.Option(help="A method of params.yaml, such as heba.")],
    protocol: Annotated[
        str | None, typer.Option(help="Only this protocol: base_to_novel, cross_dataset or few_shot.")
    ] = None,
    shots: Annotated[int | None, typer.Option(min=1, max=MOST, help="Only this number of shots.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=MOST_SEED, help="Only this seed.")] = None,
) -> None:
    """Train a method on a data set, for all protocols, shots and seeds of params.yaml or for chosen ones.

    A training that is there, with the same inputs, stays.
    """
    params = read_params(dataset)
    if method not in params.methods:
        raise ParamsError(f"--method {method}: not in params.yaml, which has {', '.join(params.methods)}")
    from pipeline.stages import train

    say(f"train {dataset} {method}", train.run(params, dataset, method, protocol, shots, seed))


def evaluate(dataset: Dataset) -> None:
    """Measure all trainings on a data set on its test images."""
    params = read_params(dataset)
    from pipeline.stages import evaluate

    say(f"evaluate {dataset}", evaluate.run(params, dataset))


def evaluate_transfer(
    protocol: Annotated[str, typer.Option(help="cross_dataset or domain_generalization.")],
) -> None:
    """Measure the source's trainings on the test images of all targets or variants."""
    params = read_params()
    known = [name for name, about in PROTOCOLS.items() if about.transfer]
    if protocol not in known:
        raise ParamsError(f"--protocol {protocol}: not one of {', '.join(known)}")
    from pipeline.stages import evaluate

    say(f"evaluate {protocol}", evaluate.run_transfer(params, protocol))


def protocols() -> None:
    """Make the folders of all protocols' results, also of those that are turned off."""
    from pipeline.core import trainings

    trainings.mark_protocols(read_params())
    say("protocols", "folders of all results")


def report() -> None:
    """Render reports/ from the evaluations that params.yaml asks for and print the summary."""
    from heba.evaluation.cost import read_cost
    from pipeline.core.trainings import cost_path
    from pipeline.report import ablation, cost, epochs, provenance, render, selection

    params = read_params()
    records, left_out = selection.select(params)
    if left_out:
        print(selection.left_out_text(left_out), file=sys.stderr)
    with new_folder(Path("reports")) as folder:
        ablations = ablation.read(ablation.FILE, params.suite)
        real, below = params.suite == "real", provenance.lines(params, records)
        # By hand, the report may be made without the stage that counts; it then has no table of costs.
        counted = [method for method in params.methods if cost_path(method).is_file()]
        costs = {method: read_cost(cost_path(method)) for method in counted}
        timings = cost.read(cost.FILE, params.suite, params.backbone.name)
        render.render_report(
            *(records, params.methods, folder, real, ablations, below),
            costs=costs,
            timings=timings,
            epochs=epochs.read(params),
        )
    if records:
        from pipeline.tracking import log as tracking

        tracking.log_report(Path("reports"))
    print(render.summary_text(records, params.methods))
    say("report", f"{len(records)} evaluations in reports/")
