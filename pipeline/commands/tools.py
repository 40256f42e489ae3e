"""The commands beside the DAG: data, settings, costs, adapters, MLflow, and what mends a repository."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.common import read_params, read_settings, shown


def check_data(
    name: Annotated[
        str, typer.Argument(help="An own data set of params.yaml, or a benchmark that is downloaded.")
    ],
) -> None:
    """Read a data set and report its classes, its counts, and what is wrong with it (exit code 1)."""
    params = read_params(name, "NAME")
    from pipeline.stages import own

    report = own.check(params, name, own.most_shots(params, name))
    print(shown(report.text()))
    if report.errors and name in params.own:
        print(own.remedy(name, report))
    if report.errors:
        raise typer.Exit(1)


def doctor() -> None:
    """Check packages, params.yaml, GPU, disk, data, MLflow, git and DVC; each failed row has its remedy."""
    from pipeline.commands import doctor

    rows = doctor.examine()
    doctor.show(rows)
    if any(row.state == "fail" for row in rows):
        raise typer.Exit(1)


def cost(
    tflops: Annotated[float, typer.Option(min=0.001, help="Sustained arithmetic of the device, TFLOP/s.")] = 60.0,
    overhead_ms: Annotated[float, typer.Option(min=0, help="Launches and Python of one training step.")] = 20.0,
    text_length: Annotated[int, typer.Option(min=2, max=77, help="Tokens of a prompt.")] = 32,
    measured: Annotated[
        bool, typer.Option("--measured", help="Write the seconds of the trainings in MLflow to timings.csv.")
    ] = False,
    speed: Annotated[
        Path | None,
        typer.Option(help="speed.json of `python -m benchmarks.gpu`, in place of --tflops and --overhead-ms."),
    ] = None,
) -> None:
    """Estimate compute and disk of params.yaml on the real benchmarks; nothing is run or fetched.

    With --measured, take the seconds that its trainings took from MLflow, for the report.
    """
    params = read_params()
    if measured:
        from pipeline.commands import timings

        lines = timings.collect(params)
        timings.write(lines)
        print(f"{lines.to_string(index=False)}\n\nThey are in timings.csv; `dvc repro report` shows them.")
        return
    from pipeline.commands import cost

    if speed is not None:
        found = cost.read_speed(speed)
        print(cost.markdown(params, found.tflops, found.overhead_ms, text_length, found.device))
        return
    print(cost.markdown(params, tflops, overhead_ms, text_length))


def preset(
    name: Annotated[
        str, typer.Argument(help="demo (embedded data, the committed one), paper, or own: without the benchmarks.")
    ],
) -> None:
    """Write params.yaml from a named preset, with its entries of own, and show what changes."""
    from pipeline.commands import presets

    print(presets.write(name))


def track(
    out: Annotated[Path, typer.Option(help="Folder of the stages' outs.")] = Path("out"),
) -> None:
    """Log to MLflow every training and evaluation that its store lacks (after an outage, or after
    `dvc repro` took results from its cache)."""
    read_params()
    from pipeline.tracking import log as tracking
    from pipeline.tracking import store

    with store.answering():
        print(f"{tracking.track(out)} evaluations are in {store.shown_uri()}")


def log() -> None:
    """What a stage starts to log to MLflow: does the calls that standard input has."""
    from pipeline.tracking import log as tracking

    tracking.serve()


def convert(
    source: Annotated[Path, typer.Argument(help="An official model.pth.tar-N, or the folder of an adapter.")],
    target: Annotated[Path, typer.Argument(help="The adapter's folder, or the official run's folder, to write.")],
    dataset: Annotated[
        str | None, typer.Option(help="For a checkpoint: the data set it was trained on, precomputed here.")
    ] = None,
    all_classes: Annotated[
        bool, typer.Option("--all-classes", help="It was trained on all classes, not on the base classes.")
    ] = False,
    method: Annotated[
        str | None,
        typer.Option(help="Whose checkpoint it is, such as kgcoop, where its tensors fit several methods."),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="A setting of the method that the checkpoint does not tell, such as position=middle of coop. May "
            "be repeated.",
        ),
    ] = None,
    scale: Annotated[
        float | None,
        typer.Option(
            min=0, help="Of heba: ADAPTER_SCALE_BASE of its config; a checkpoint that `convert` wrote tells it."
        ),
    ] = None,
) -> None:
    """Turn an official checkpoint into an adapter's folder, or an adapter into an official checkpoint.

    Of heba, coop, cocoop, kgcoop, maple, promptsrc, prograd, tcp and vpt; docs/methods.md says more.
    """
    params = read_params(dataset)
    from pipeline.commands import convert

    given = read_settings(setting) | ({} if scale is None else {"scale": scale})
    print(convert.run(params, source, target, dataset, all_classes, method, given))


def mend() -> None:
    """Repair dvc.lock after a kill; remove what is damaged of DVC's cache and of the outs, which `dvc repro` makes
    again."""
    from pipeline.commands import mend
    from pipeline.core.paths import main_root

    removed = mend.run(main_root())
    last = (
        f"{len(removed)} damaged files are removed; `dvc repro` makes them again"
        if removed
        else "nothing is damaged"
    )
    print("\n".join([*map(str, removed), last]))


def register(
    adapter: Annotated[str, typer.Argument(help="Folder of a training, or id of its MLflow run.")],
    name: Annotated[str, typer.Option(help="The name in MLflow's registry; versions count up.")],
) -> None:
    """Register a training's MLflow model under a name, to be served as models:/NAME/VERSION."""
    from pipeline.tracking import models

    print(models.register(adapter, name))
