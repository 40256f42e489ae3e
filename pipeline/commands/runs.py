"""The commands that run many stages, and compare what came of them."""

import os
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from heba.data.prompts import TEMPLATE
from pipeline.commands.common import MOST_JOBS, listed_names, read_params, refuse_lost_folders
from pipeline.core.params import MOST, ParamsError


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
        int, typer.Option(min=1, max=100, help="Random splits; of a folder with a test part, few-shot samples.")
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
    docs/pipeline.md. --json is for revisions, all other options are for folders.
    """
    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    of_images = [name for name in given if name not in ("what", "other", "as_json")]
    path = Path(what)
    if other is None and (of_images or what.endswith("/") or path.is_absolute() or path.exists()):
        if as_json:
            raise ParamsError("--json: is of two revisions, not of a folder of images")
        from pipeline.commands.photos import project, run

        counts = listed_names(shots)
        if not counts or not all(count.isdecimal() and 0 < int(count) <= MOST for count in counts):
            raise ParamsError(f"--shots {shots}: write numbers from 1 on, with commas between")
        options = run.Options(
            methods=listed_names(methods),
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
    params = read_params()
    refuse_lost_folders(params)
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


def dvc(arguments: Annotated[list[str], typer.Argument(help="A command of DVC and its options.")]) -> None:
    """DVC itself, with dvc.lock written faster and as a whole: `python -m pipeline dvc exp run -S shots=4`."""
    from pipeline.runner import processes

    os.execv(sys.executable, [*processes.DVC, *arguments])


def waves() -> None:
    """Print the stages that are to run, in waves: those of a line need only those of the lines above."""
    read_params()
    from pipeline.core.paths import main_root
    from pipeline.runner import dvc_inside, repro

    for wave in repro.waves(dvc_inside.make_plan(main_root())):
        print(*wave)


def dag() -> None:
    """Print the DAG as a Mermaid flow chart, with one node for the stages of a matrix."""
    read_params()
    from pipeline.commands import dag
    from pipeline.core.paths import main_root

    print(dag.mermaid(main_root()))


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

    params = read_params()
    if table and (run or dry_run):
        raise ParamsError("--table: does not go with --run or --dry-run")
    wanted, ablations = listed_names(datasets), listed_names(only)
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
