"""What the commands have in common: how they read their arguments, speak, and fail."""

import logging
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
import yaml

from pipeline.core.params import LOST, Params, ParamsError, load_params, lost_folders

MOST_JOBS = 1024
Dataset = Annotated[str, typer.Option(help="A data set of params.yaml, such as eurosat.")]


def read_params(dataset: str | None = None, argument: str = "--dataset") -> Params:
    """Read params.yaml; ParamsError: what is wrong with it, or that the `dataset` of `argument` is not in it."""
    params = load_params()
    known = [*params.datasets, *params.transfer.variants, *params.own]
    if dataset is not None and dataset not in known:
        raise ParamsError(f"{argument} {dataset}: not in params.yaml, which has {', '.join(known)}")
    return params


def refuse_lost_folders(params: Params) -> None:
    """ParamsError where the folder of own data is not there, before anything runs."""
    if lost := lost_folders(params):
        raise ParamsError("; ".join([*lost, LOST]))


def say(stage: str, text: str) -> None:
    """What a stage says at its end: one line, with the seconds since the process, or its fork, began."""
    print(f"{stage}: {text}, {time.time() - psutil.Process().create_time():.1f} s")


def listed_names(listed: str) -> list[str]:
    """Names between commas, each once."""
    return list(dict.fromkeys(name.strip() for name in listed.split(",") if name.strip()))


def read_settings(pairs: list[str] | None) -> dict[str, Any]:
    """name=value pairs, with values as in YAML; ValueError names the pair that is none."""
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


def shown(text: str) -> str:
    """Text for a terminal, without control characters: names of classes and files may have any."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)


def weights_of(backbone: str, pretrained: str | None) -> str:
    """The weights that go with --backbone; ParamsError where they must be given. The tiny CLIP has its own."""
    if pretrained is None and backbone != "tiny":
        raise ParamsError(f"--backbone {backbone}: give --pretrained too, a tag such as openai or a file")
    return pretrained or "embedded"


def predict_command(adapter: Path, backbone: str, pretrained: str, root: Path = Path()) -> str:
    """The command that classifies images with an adapter. It names the backbone's own files: an adapter may name
    none that lies outside of the `root` they are relative to."""
    words = ["heba", "predict", "NEW_IMAGES", "--adapter", str(adapter)]
    words += [] if root == Path() else ["--root", str(root)]
    for option, value in (("--backbone", backbone), ("--pretrained", pretrained)):
        words += [option, value] if (root / value).is_file() else []
    return shlex.join(words)


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
