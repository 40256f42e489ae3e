"""`python -m pipeline STAGE ...`: the stages of dvc.yaml, presets, and late tracking."""

import logging
import os
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import psutil
import typer
import yaml

from heba.data.prompts import TEMPLATE
from heba.data.protocols import PROTOCOLS
from pipeline.commands import version
from pipeline.core.params import MOST, MOST_SEED, Params, ParamsError, load_params
from pipeline.core.paths import new_folder
from pipeline.runner import lockfile

app = typer.Typer(
    help="`python -m pipeline compare photos/` says which method suits a folder of images best. The other "
    "commands are the stages of the HeBA pipeline: `dvc repro` runs them in order; each runs alone too, from the "
    "repository's root, and reads params.yaml there.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # with it, the help of a flag says <bool>
    context_settings={"max_content_width": 115},
)
MOST_JOBS = 1024


@app.callback()
def _options(show_version: version.Option = False) -> None:
    pass


Dataset = Annotated[str, typer.Option(help="A data set of params.yaml, such as eurosat.")]


def _params(dataset: str | None = None, argument: str = "--dataset") -> Params:
    params = load_params()
    known = [*params.datasets, *params.transfer.variants, *params.own]
    if dataset is not None and dataset not in known:
        raise ParamsError(f"{argument} {dataset}: not in params.yaml, which has {', '.join(known)}")
    return params


def _say(stage: str, text: str) -> None:
    """What a stage says at its end: one line, with the seconds since the process, or its fork, began."""
    print(f"{stage}: {text}, {time.time() - psutil.Process().create_time():.1f} s")


def _names(listed: str) -> list[str]:
    """Names between commas, each once."""
    return list(dict.fromkeys(name.strip() for name in listed.split(",") if name.strip()))


def read_settings(pairs: list[str] | None) -> dict[str, Any]:
    """name=value pairs, with values as in YAML."""
    found = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        try:
            found[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            equals = ""
        if not equals:
            raise ValueError(f"--set {pair}: write name=value")
    return found


@app.command()
def compare(
    context: typer.Context,
    what: Annotated[
        str,
        typer.Argument(help="A folder of images, in a folder per class; or an experiment, branch, tag or commit."),
    ],
    other: Annotated[
        str | None,
        typer.Argument(
            help="Of a revision: what it is compared with. Default: workspace, the reports as they are."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Of revisions: print JSON.")] = False,
    methods: Annotated[
        str, typer.Option(help="Methods, such as gda,heba. Default: zero_shot and a choice, the fast ones first.")
    ] = "",
    budget: Annotated[
        str, typer.Option(help="Time after which no other method begins, such as 90s, 10m or 2h.")
    ] = "",
    shots: Annotated[
        str, typer.Option(help="Training images per class; several, such as 1,2,4,8, also make a curve.")
    ] = "16",
    seeds: Annotated[
        int, typer.Option(min=1, max=100, help="Splits; of a folder with a test part, few-shot samples.")
    ] = 5,
    backbone: Annotated[str, typer.Option(help="tiny, a model of open_clip, or its JSON config.")] = "tiny",
    pretrained: Annotated[
        str | None, typer.Option(help="A tag of open_clip such as openai, or a file of weights.")
    ] = None,
    template: Annotated[str, typer.Option(help="Prompt of a class, with {} for its name.")] = TEMPLATE,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the project that is made. Default: compare/NAME here.")
    ] = None,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Leave files out that are no readable images.")
    ] = False,
    jobs: Annotated[
        int | None, typer.Option(min=1, max=MOST_JOBS, help="Stages at a time. Default: CPUs, at most 4.")
    ] = None,
) -> None:
    """Say which method suits a folder of images best; or compare the results of two revisions.

    `compare photos/` says how good each method is, and how sure that is: docs/own-images.md. `compare A B`
    compares the accuracies of two DVC experiments or git revisions, and says which differences are not noise:
    docs/pipeline.md. All options but --json are of the first.
    """
    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    of_images = [name for name in given if name not in ("what", "other", "as_json")]
    path = Path(what)
    if other is None and (of_images or what.endswith("/") or path.is_absolute() or path.exists()):
        if as_json:
            raise ParamsError("--json: is of two revisions, not of a folder of images")
        from pipeline.commands.photos import project, run

        counts = _names(shots)
        if not counts or not all(count.isdecimal() and 0 < int(count) <= MOST for count in counts):
            raise ParamsError(f"--shots {shots}: write numbers from 1 on, with commas between")
        options = run.Options(
            methods=_names(methods),
            budget=project.seconds_of(budget) if budget else None,
            shots=sorted(map(int, counts)),
            repeats=seeds,
            backbone=backbone,
            pretrained=pretrained,
            template=template,
            skip_unreadable=skip_unreadable,
            jobs=jobs,
        )
        run.run(path, out, options)
        return
    if of_images:
        raise ParamsError(f"--{of_images[0].replace('_', '-')}: is of a folder of images, not of revisions")
    from pipeline.commands import revisions

    print(revisions.text(what, other or revisions.WORKSPACE, as_json))


@app.command()
def check_params() -> None:
    """Read params.yaml and list all that is wrong with it; a stage, so that DVC writes nothing before."""
    from pipeline.core import paths

    _params()
    paths.mark_params()
    _say("params", "all of params.yaml is possible")


@app.command()
def download(dataset: Dataset) -> None:
    """Provide a data set's images under data.root and write its manifest."""
    from pipeline.stages import download

    _say(f"download {dataset}", download.run(_params(dataset), dataset))


@app.command(hidden=True)
def download_own() -> None:
    """`download` of the own data set whose stage DVC runs: by DVC_STAGE, since DVC does not quote a key."""
    download(os.environ.get("DVC_STAGE", "").rpartition("@")[2])


@app.command()
def check_data(
    name: Annotated[
        str, typer.Argument(help="An own data set of params.yaml, or a benchmark that is downloaded.")
    ],
) -> None:
    """Read a data set and report its classes, its counts, and what is wrong with it (exit code 1)."""
    params = _params(name, "NAME")
    from pipeline.stages import own

    report = own.check(params, name, own.most_shots(params, name))
    print(report.text())
    if report.errors and name in params.own:
        print(own.remedy(name, report))
    if report.errors:
        raise typer.Exit(1)


@app.command()
def split(dataset: Dataset) -> None:
    """Draw CoOp's few-shot samples of a data set, for every number of shots and seed of params.yaml."""
    from pipeline.stages import split

    _say(f"split {dataset}", split.run(_params(dataset), dataset))


@app.command()
def backbone() -> None:
    """Fetch and check the frozen CLIP's weights and record their hash."""
    params = _params()
    from pipeline.stages import backbone

    _say("backbone", backbone.run(params))


@app.command()
def precompute(dataset: Dataset) -> None:
    """Encode all prompts and pack the test images with the frozen CLIP, once per data set."""
    params = _params(dataset)
    from pipeline.stages import precompute

    _say(f"precompute {dataset}", precompute.run(params, dataset))


@app.command(hidden=True)
def count(method: Annotated[str, typer.Option(help="A method of params.yaml.")]) -> None:
    """Count the operations of a method's training step and test image; the command `cost` shows them."""
    params = _params()
    from pipeline.stages import cost

    _say(f"cost {method}", cost.run(params, method))


@app.command()
def views(dataset: Dataset) -> None:
    """Encode the few-shot images of a data set, and random crops of them, for the methods on frozen features."""
    params = _params(dataset)
    from pipeline.stages import views

    _say(f"views {dataset}", views.run(params, dataset))


@app.command()
def train(
    dataset: Dataset,
    method: Annotated[str, typer.Option(help="A method of params.yaml, such as heba.")],
    protocol: Annotated[
        str | None, typer.Option(help="Of this protocol alone: base_to_novel, cross_dataset or few_shot.")
    ] = None,
    shots: Annotated[int | None, typer.Option(min=1, max=MOST, help="With this many shots alone.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=MOST_SEED, help="Of this seed alone.")] = None,
) -> None:
    """Train a method on a data set, for all protocols, shots and seeds of params.yaml or for chosen ones.

    A training that is there, with the same inputs, stays.
    """
    params = _params(dataset)
    if method not in params.methods:
        raise ParamsError(f"--method {method}: not in params.yaml, which has {', '.join(params.methods)}")
    from pipeline.stages import train

    _say(f"train {dataset} {method}", train.run(params, dataset, method, protocol, shots, seed))


@app.command()
def evaluate(dataset: Dataset) -> None:
    """Measure all trainings on a data set on its test images."""
    params = _params(dataset)
    from pipeline.stages import evaluate

    _say(f"evaluate {dataset}", evaluate.run(params, dataset))


@app.command()
def evaluate_transfer(
    protocol: Annotated[str, typer.Option(help="cross_dataset or domain_generalization.")],
) -> None:
    """Measure the source's trainings on the test images of all targets or variants."""
    params = _params()
    known = [name for name, about in PROTOCOLS.items() if about.transfer]
    if protocol not in known:
        raise ParamsError(f"--protocol {protocol}: not one of {', '.join(known)}")
    from pipeline.stages import evaluate

    _say(f"evaluate {protocol}", evaluate.run_transfer(params, protocol))


@app.command()
def protocols() -> None:
    """Make the folders of all protocols' results, also of those that are turned off."""
    from pipeline.core import trainings

    trainings.mark_protocols(_params())
    _say("protocols", "folders of all results")


def _epochs(params: Params) -> Any:
    """The losses of the base_to_novel trainings that are there: a frame of method, dataset, epoch and loss."""
    import pandas as pd

    from heba import artifact
    from pipeline.core.trainings import trainings

    rows = [
        (training.method, training.dataset, int(record["epoch"]), record["loss"])
        for training in trainings(params)
        if training.protocol == "base_to_novel" and (training.folder / artifact.HISTORY_FILE).is_file()
        for record in artifact.read_history(training.folder)
    ]
    return pd.DataFrame(rows, columns=["method", "dataset", "epoch", "loss"])


@app.command()
def report() -> None:
    """Render reports/ from the evaluations that params.yaml asks for and print the summary."""
    from heba.evaluation.cost import read_cost
    from pipeline.core.trainings import cost_path
    from pipeline.report import ablation, cost, provenance, render, selection

    params = _params()
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
            epochs=_epochs(params),
        )
    if records:
        from pipeline.tracking import log as tracking

        tracking.log_report(Path("reports"))
    print(render.summary_text(records, params.methods))
    _say("report", f"{len(records)} evaluations in reports/")


@app.command()
def repro(
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_JOBS,
            help="Stages at a time. Default: one per GPU of --gpus, else CPUs / threads, at most 4.",
        ),
    ] = None,
    gpus: Annotated[str, typer.Option(help="GPUs for the jobs, such as 0,1: each job sees one of them.")] = "",
    executor: Annotated[
        Literal["local", "ray"], typer.Option(help="Where stages run: this machine, or a Ray cluster.")
    ] = "local",
    address: Annotated[
        str, typer.Option(help="With --executor ray: of the cluster, such as 10.0.0.1:6379.")
    ] = "auto",
    gpu_share: Annotated[
        float, typer.Option(min=0.01, help="With --executor ray: GPUs per stage; 0.5: two stages share one.")
    ] = 1.0,
) -> None:
    """Run `dvc repro` with independent stages side by side (docs/parallel.md)."""
    params = _params()
    from pipeline.core.paths import main_root
    from pipeline.runner import repro

    root = main_root()
    if executor == "local":
        slots = repro.local_slots(params, jobs, [gpu.strip() for gpu in gpus.split(",") if gpu.strip()])
        repro.run(root, slots, partial(repro.start_local, root))
        return
    if gpus:
        raise ParamsError("--gpus: on a cluster Ray hands out the GPUs; see --gpu-share")
    from pipeline.runner import ray_executor

    with ray_executor.cluster(root, params, address, jobs, gpu_share) as (slots, start):
        repro.run(root, slots, lambda plan: nullcontext(start), longest=1)


@app.command()
def waves() -> None:
    """Print the stages that are to run, in waves: those of a line need only those of the lines above."""
    _params()
    from pipeline.core.paths import main_root
    from pipeline.runner import dvc_inside, repro

    for wave in repro.waves(dvc_inside.make_plan(main_root())):
        print(*wave)


@app.command()
def dag() -> None:
    """Print the DAG as a Mermaid flow chart, with one node for the stages of a matrix."""
    _params()
    from pipeline.commands import dag
    from pipeline.core.paths import main_root

    print(dag.mermaid(main_root()))


@app.command()
def ablate(
    datasets: Annotated[
        str, typer.Option(help="Data sets, such as dtd,eurosat. Default: all of params.yaml.")
    ] = "",
    only: Annotated[str, typer.Option(help="Ablations, such as init,ratio. Default: all.")] = "",
    run: Annotated[bool, typer.Option("--run", help="Start the queue, too, in the background.")] = False,
    jobs: Annotated[int, typer.Option(min=1, max=MOST_JOBS, help="With --run: experiments at a time.")] = 2,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the commands, queue nothing.")] = False,
    table: Annotated[
        bool, typer.Option("--table", help="Read from MLflow what there is and write ablation.csv.")
    ] = False,
) -> None:
    """Queue a DVC experiment per setting that differs from params.yaml; with --table, collect the results."""
    import shlex

    from pipeline.commands import ablate
    from pipeline.report import ablation

    params = _params()
    if table and (run or dry_run):
        raise ParamsError("--table: does not go with --run or --dry-run")
    wanted, ablations = _names(datasets), _names(only)
    names = ablate.chosen(params, wanted)
    rows = ablate.rows(params, ablations)
    given = "".join(f" --{k} {','.join(v)}" for k, v in (("datasets", wanted), ("only", ablations)) if v)
    if table:
        lines, unevaluated, absent = ablate.collect(params, rows, names, f"python -m pipeline ablate{given}")
        ablate.write(lines, ablation.FILE)
        print(ablation.display_ablation(ablation.ablation_table(lines)).cells.to_string(index=False))
        if unevaluated:
            print(ablate.unevaluated_text(unevaluated))
        if absent:
            print(f"not in MLflow: {'; '.join(absent)}")
        print(f"{ablation.FILE} is written; `python -m pipeline report` renders it")
        return
    if dry_run:
        for row in rows:
            print(shlex.join(["dvc", *ablate.command(params, row, names)]))
        return
    ablate.queue(params, rows, names)
    start = ["queue", "start", "-j", str(jobs)]
    if run:
        ablate.dvc(start)
    print(f"{len(rows)} experiments are {'running' if run else 'queued'}. Next:")
    for step in ([] if run else [f"dvc {' '.join(start)}"]) + [
        "dvc queue status",
        f"python -m pipeline ablate --table{given}",
        "python -m pipeline report",
    ]:
        print(f"  {step}")


@app.command()
def doctor() -> None:
    """Check packages, params.yaml, GPU, disk, data, MLflow, git and DVC; each failed row has its remedy."""
    from pipeline.commands import doctor

    rows = doctor.examine()
    doctor.show(rows)
    if any(row.state == "fail" for row in rows):
        raise typer.Exit(1)


@app.command()
def cost(
    tflops: Annotated[float, typer.Option(min=0.001, help="Sustained arithmetic of the device, TFLOP/s.")] = 60.0,
    overhead_ms: Annotated[float, typer.Option(min=0, help="Launches and Python of one training step.")] = 20.0,
    text_length: Annotated[int, typer.Option(min=2, max=77, help="Tokens of a prompt.")] = 32,
    measured: Annotated[
        bool, typer.Option("--measured", help="Write the seconds of the trainings in MLflow to timings.csv.")
    ] = False,
    speed: Annotated[
        Path | None, typer.Option(help="speed.json of `python -m benchmarks.gpu`, in place of the first two.")
    ] = None,
) -> None:
    """Estimate compute and disk of params.yaml on the real benchmarks; nothing is run or fetched.

    With --measured, take the seconds that its trainings took from MLflow, for the report.
    """
    params = _params()
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


@app.command()
def preset(
    name: Annotated[
        str, typer.Argument(help="demo (embedded data, the committed one), paper, or own: without the benchmarks.")
    ],
) -> None:
    """Write params.yaml from a named preset, with its entries of own, and show what changes."""
    from pipeline.commands import presets

    print(presets.write(name))


@app.command()
def track(
    out: Annotated[Path, typer.Option(help="Folder of the stages' outs.")] = Path("out"),
) -> None:
    """Log to MLflow every training and evaluation that its store lacks (after an outage, or after
    `dvc repro` took results from its cache)."""
    _params()
    from pipeline.tracking import log as tracking
    from pipeline.tracking import store

    with store.answering():
        print(f"{tracking.track(out)} evaluations are in {store.shown_uri()}")


@app.command(hidden=True)
def log() -> None:
    """What a stage starts to log to MLflow: does the calls that standard input has."""
    from pipeline.tracking import log as tracking

    tracking.serve()


@app.command()
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
    params = _params(dataset)
    from pipeline.commands import convert

    given = read_settings(setting) | ({} if scale is None else {"scale": scale})
    print(convert.run(params, source, target, dataset, all_classes, method, given))


@app.command()
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


@app.command()
def register(
    adapter: Annotated[str, typer.Argument(help="Folder of a training, or id of its MLflow run.")],
    name: Annotated[str, typer.Option(help="The name in MLflow's registry; versions count up.")],
) -> None:
    """Register a training's MLflow model under a name, to be served as models:/NAME/VERSION."""
    from pipeline.tracking import models

    print(models.register(adapter, name))


def run_app(command: typer.Typer) -> None:
    """Run a typer app; an error that a user can mend is one message and exit code 1."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("huggingface_hub").propagate = False  # it prints its messages itself
    try:
        command()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported for this
            raise
        print(
            f"error: {error}\nLower batch_size in the method's block of params.yaml, set precision: bf16, or run "
            "fewer jobs on a GPU.",
            file=sys.stderr,
        )
        sys.exit(1)


def main() -> None:
    with lockfile.kept():
        run_app(app)
