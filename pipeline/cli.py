"""`python -m pipeline STAGE ...`: the stages of dvc.yaml, presets, and late tracking."""

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.params import Params, ParamsError, load_params
from pipeline.paths import EVALUATION_STAGES, evaluate_path, new_folder

app = typer.Typer(
    help="The stages of the HeBA pipeline. `dvc repro` runs them in order; each runs alone too, "
    "from the repository's root, and reads params.yaml there.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Dataset = Annotated[str, typer.Option(help="A data set of params.yaml, such as eurosat.")]
Seed = Annotated[int, typer.Option(help="Seed of the few-shot sample and of the training.")]
Source = Annotated[
    bool, typer.Option("--source", help="For the transfer protocols: all classes of transfer.source.")
]


def _params(dataset: str | None = None) -> Params:
    params = load_params()
    known = [*params.datasets, *params.transfer.variants]
    if dataset is not None and dataset not in known:
        raise ParamsError(f"--dataset {dataset}: not in params.yaml, which has {', '.join(known)}")
    return params


@app.command()
def download(dataset: Dataset) -> None:
    """Provide a data set's images under data.root and write its manifest."""
    from pipeline import download

    download.run(_params(dataset), dataset)


@app.command()
def split(dataset: Dataset, seed: Seed, source: Source = False) -> None:
    """Draw CoOp's few-shot sample of a data set for a seed."""
    from pipeline import split

    split.run(_params(dataset), dataset, seed, source)


@app.command()
def backbone() -> None:
    """Fetch and check the frozen CLIP's weights and record their hash."""
    params = _params()
    from pipeline import backbone

    backbone.run(params)


@app.command()
def precompute(dataset: Dataset) -> None:
    """Encode all prompts and pack the test images with the frozen CLIP, once per data set."""
    params = _params(dataset)
    from pipeline import precompute

    precompute.run(params, dataset)


@app.command()
def train(dataset: Dataset, seed: Seed, source: Source = False) -> None:
    """Train the adapters: on the base classes, or with --source on all classes of the source."""
    params = _params(dataset)
    from pipeline import train

    train.run(params, dataset, seed, source)


@app.command()
def evaluate(
    dataset: Dataset,
    seed: Seed,
    protocol: Annotated[
        str, typer.Option(help="base_to_novel, cross_dataset or domain_generalization.")
    ] = "base_to_novel",
) -> None:
    """Measure HeBA and zero-shot CLIP on a data set's test images."""
    params = _params(dataset)
    from pipeline import evaluate

    if protocol not in EVALUATION_STAGES:
        raise ParamsError(f"--protocol {protocol}: not one of {', '.join(EVALUATION_STAGES)}")
    evaluate.run(params, dataset, seed, protocol)


@app.command()
def report() -> None:
    """Render reports/ from all evaluations and print the summary."""
    from pipeline.report import render, tables

    params = _params()
    # Records of data sets or seeds that params.yaml no longer names may still lie there.
    wanted = [
        *(evaluate_path("base_to_novel", d, s) for d in params.datasets for s in params.seeds),
        *(evaluate_path("cross_dataset", d, s) for d in params.transfer.targets for s in params.transfer.seeds),
        *(
            evaluate_path("domain_generalization", d, s)
            for d in params.transfer.variants
            for s in params.transfer.seeds
        ),
    ]
    records = tables.load_records([path for path in wanted if path.exists()])
    with new_folder(Path("reports")) as folder:
        render.render_report(records, folder, published=params.suite == "real")
    print(render.summary_text(records))


@app.command()
def preset(
    name: Annotated[str, typer.Argument(help="demo (embedded data, the committed one) or paper.")],
) -> None:
    """Write params.yaml from a named preset and show what changes."""
    from pipeline import presets

    print(presets.write(name))


@app.command()
def track(
    out: Annotated[Path, typer.Option(help="Folder of the stages' outs.")] = Path("out"),
) -> None:
    """Log to MLflow every training and evaluation that its store lacks (after an outage, or after
    `dvc repro` took results from its cache)."""
    from pipeline import tracking

    print(f"{tracking.track(out)} evaluations are in {tracking.store_uri()}")


def main() -> None:
    """Run the app; an error that a user can mend is one message and exit code 1."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        app()
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
