"""`python -m pipeline STAGE ...`: the stages of dvc.yaml, presets, and late tracking."""

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.params import Params, ParamsError, load_params
from pipeline.paths import TRANSFER_STAGES, evaluate_path, new_folder

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
FewShots = Annotated[int | None, typer.Option("--shots", help="For few_shot: images per class, all classes.")]


def _params(dataset: str | None = None) -> Params:
    params = load_params()
    known = [*params.datasets, *params.transfer.variants]
    if dataset is not None and dataset not in known:
        raise ParamsError(f"--dataset {dataset}: not in params.yaml, which has {', '.join(known)}")
    return params


def _few(source: bool, shots: int | None) -> int | None:
    if shots is not None and (source or shots < 1):
        raise ParamsError(f"--shots {shots}: must be at least 1, and does not go with --source")
    return shots


@app.command()
def download(dataset: Dataset) -> None:
    """Provide a data set's images under data.root and write its manifest."""
    from pipeline import download

    download.run(_params(dataset), dataset)


@app.command()
def split(dataset: Dataset) -> None:
    """Draw CoOp's few-shot samples of a data set, for every number of shots and seed of params.yaml."""
    from pipeline import split

    split.run(_params(dataset), dataset)


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
def train(dataset: Dataset, seed: Seed, source: Source = False, shots: FewShots = None) -> None:
    """Train the adapters: on the base classes; with --source or --shots on all classes."""
    params = _params(dataset)
    from pipeline import train

    train.run(params, dataset, seed, source, _few(source, shots))


@app.command()
def evaluate(dataset: Dataset) -> None:
    """Measure HeBA and zero-shot CLIP on a data set's test images, for all trainings on it."""
    params = _params(dataset)
    from pipeline import evaluate

    evaluate.run(params, dataset)


@app.command()
def evaluate_transfer(
    protocol: Annotated[str, typer.Option(help="cross_dataset or domain_generalization.")], seed: Seed
) -> None:
    """Measure the source's training on the test images of all targets or variants."""
    params = _params()
    if protocol not in TRANSFER_STAGES:
        raise ParamsError(f"--protocol {protocol}: not one of {', '.join(TRANSFER_STAGES)}")
    from pipeline import evaluate

    evaluate.run_transfer(params, protocol, seed)


@app.command()
def protocols() -> None:
    """Make the folders of all protocols' results, also of those that are switched off."""
    from pipeline import paths

    params = _params()
    transfer = params.transfer
    on = {
        "base_to_novel": bool(params.seeds),
        "cross_dataset": bool(transfer.seeds and transfer.targets),
        "domain_generalization": bool(transfer.seeds and transfer.variants),
        "few_shot": bool(params.few_shot.seeds and params.few_shot.datasets and params.few_shot.shots),
    }
    paths.mark_protocols(on)


@app.command()
def report() -> None:
    """Render reports/ from all evaluations and print the summary."""
    from pipeline.report import render, tables

    params = _params()
    # Records of data sets or seeds that params.yaml no longer names may still lie there.
    transfer, few = params.transfer, params.few_shot
    wanted = [
        *(("base_to_novel", d, s, params.shots) for d in params.datasets for s in params.seeds),
        *(("cross_dataset", d, s, params.shots) for d in transfer.targets for s in transfer.seeds),
        *(("domain_generalization", d, s, params.shots) for d in transfer.variants for s in transfer.seeds),
        *(("few_shot", d, s, shots) for d in few.datasets for s in few.seeds for shots in few.shots),
    ]
    paths = [evaluate_path(*record) for record in wanted]
    records = tables.load_records([path for path in paths if path.exists()])
    with new_folder(Path("reports")) as folder:
        render.render_report(records, folder, published=params.suite == "real")
    print(render.summary_text(records))


@app.command()
def repro(
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Stages at a time. Default: CPUs / threads of params.yaml, at most 4."),
    ] = None,
) -> None:
    """What `dvc repro` does, with independent stages side by side."""
    params = _params()
    from pipeline import repro
    from pipeline.paths import main_root

    repro.run(main_root(), jobs or repro.default_jobs(params))


@app.command()
def cost(
    tflops: Annotated[float, typer.Option(min=0.001, help="Sustained arithmetic of the device, TFLOP/s.")] = 60.0,
    overhead_ms: Annotated[float, typer.Option(min=0, help="Launches and Python of one training step.")] = 20.0,
    text_length: Annotated[int, typer.Option(min=2, max=77, help="Tokens of a prompt.")] = 32,
) -> None:
    """Estimate compute and disk of params.yaml on the real benchmarks; nothing is run or fetched."""
    params = _params()
    from pipeline import cost

    print(cost.markdown(params, tflops, overhead_ms, text_length))


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
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
