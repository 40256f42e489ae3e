"""`python -m pipeline COMMAND ...`: the list of all commands, in the order of `--help`."""

from collections.abc import Callable

import typer

from pipeline.commands import runs, stages, tools, version
from pipeline.commands.common import run_app
from pipeline.runner import lockfile

app = typer.Typer(
    help="`python -m pipeline compare photos/` says which method suits a folder of images best. The other "
    "commands read params.yaml in the repository's root. Those from check-params on are the stages of the HeBA "
    "pipeline: `dvc repro` runs them in order, and each runs alone too.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # with it, the help of a flag says <bool>
    context_settings={"max_content_width": 115},
)
SHOWN: tuple[Callable[..., None], ...] = (
    runs.compare,
    tools.check_data,
    runs.repro,
    runs.dvc,
    runs.waves,
    runs.dag,
    runs.ablate,
    tools.doctor,
    tools.cost,
    tools.preset,
    tools.track,
    tools.convert,
    tools.mend,
    tools.register,
    stages.check_params,
    stages.download,
    stages.split,
    stages.backbone,
    stages.precompute,
    stages.views,
    stages.train,
    stages.evaluate,
    stages.evaluate_transfer,
    stages.protocols,
    stages.report,
)
OF_DVC = {"ignore_unknown_options": True, "help_option_names": []}  # all options are DVC's, --help too
HIDDEN: tuple[Callable[..., None], ...] = (stages.download_own, stages.count, tools.log)  # what stages start


@app.callback()
def _options(show_version: version.Option = False) -> None:
    pass


for _command in SHOWN:
    app.command(context_settings=OF_DVC if _command is runs.dvc else None)(_command)
for _command in HIDDEN:
    app.command(hidden=True)(_command)


def main() -> None:
    with lockfile.kept():
        run_app(app)
