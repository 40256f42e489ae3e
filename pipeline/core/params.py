"""params.yaml: its schema, and one message with everything that is wrong with it."""

import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from heba.clip.architecture import depth, read_config, width
from heba.data.prompts import TEMPLATE, TEMPLATE_PATTERN
from heba.data.strict_yaml import read_yaml
from pipeline.core.paths import main_root

PARAMS_FILE = Path("params.yaml")

BENCHMARKS = (
    "imagenet",
    "caltech101",
    "oxford_pets",
    "stanford_cars",
    "oxford_flowers",
    "food101",
    "fgvc_aircraft",
    "sun397",
    "dtd",
    "eurosat",
    "ucf101",
)
VARIANTS = ("imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r")

# Beyond all that makes sense, and within what torch, the threads of a machine and the names of files take.
MOST = 1_000_000
MOST_SEED = 2**32 - 1
MOST_THREADS = 1024
MOST_EXPANSION = 64
LEAST = 1e-9
LONGEST_TEXT = 4096
LONGEST_NAME = 64
SHOWN = 50  # problems of a message, and LONGEST_LINE of its letters in each
LONGEST_LINE = 400

Positive = Annotated[float, Field(ge=LEAST, le=MOST)]
NotNegative = Annotated[float, Field(ge=0, le=MOST)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=MOST)]
Seeds = list[Annotated[int, Field(ge=0, le=MOST_SEED)]]
Text = Annotated[str, Field(min_length=1, max_length=LONGEST_TEXT, pattern="^[^\0]*$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Backbone(_Strict):
    name: Text
    pretrained: Text


class Adapter(_Strict):
    start: Count
    end: Count
    ratio: Count
    scale: Positive
    scale_novel: NotNegative | None
    scale_factor: Positive
    slow_ratio: Fraction
    init: Literal["kaiming", "zero"]
    visual_block: Literal["conv", "linear"]
    text_block: Literal["linear", "conv1d"]
    expansion: Annotated[int, Field(ge=1, le=MOST_EXPANSION)]
    gradient_scale: bool
    towers: Literal["both", "image", "text"]


class Train(_Strict):
    epochs: Count
    batch_size: Count
    lr: Positive
    momentum: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: NotNegative
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    neg_ratio: Annotated[int, Field(ge=0, le=MOST)]


class Transfer(_Strict):
    source: str
    targets: list[str]
    variants: list[str]
    seeds: Seeds
    adapter: Adapter
    train: Train


class FewShot(_Strict):
    datasets: list[str]
    seeds: Seeds
    shots: list[Count]


class Data(_Strict):
    root: Text
    mirror: Text | None
    catalog: Text | None


class Own(_Strict):
    """A user's own data set; `path` is the folder of its images, in which `file` and `descriptions` are."""

    kind: Literal["folder", "csv", "coop"]
    path: Text
    file: Text | None = None
    template: Annotated[str, Field(pattern=TEMPLATE_PATTERN)] = TEMPLATE
    descriptions: Annotated[str, Field(pattern="^[^/]+$")] | None = None
    allow_leaks: bool = False


class Params(_Strict):
    suite: Literal["embedded", "real"]
    data: Data
    datasets: list[str]
    seeds: Seeds
    shots: Count
    own: dict[str, Own]
    backbone: Backbone
    precision: Literal["auto", "fp32", "bf16"]
    device: Literal["auto", "cpu", "cuda"]
    threads: Annotated[int, Field(ge=1, le=MOST_THREADS)] | None
    cuda_graphs: bool
    deterministic: bool
    adapter_dtype: Literal["fp16", "fp32"]
    adapter: Adapter
    train: Train
    transfer: Transfer
    few_shot: FewShot


def stage_of(stage: str, dataset: str) -> str:
    """What DVC calls the `stage` of a data set, such as split-own@flowers."""
    kind = "" if dataset in BENCHMARKS else "-variant" if dataset in VARIANTS else "-own"
    return f"{stage}{kind}@{dataset}"


class ParamsError(ValueError):
    """Everything that is wrong with a params.yaml, one problem a line."""


def load_params(path: Path = PARAMS_FILE) -> Params:
    """Read and validate `path`; ParamsError lists all problems at once."""
    if not path.exists():
        raise ParamsError(
            f"{path} is not here: run from the repository's root, or restore it with "
            "`python -m pipeline preset demo`"
        )
    try:
        raw = read_yaml(path)
    except ValueError as error:
        raise ParamsError(str(error)) from None
    if not isinstance(raw, dict):
        raise ParamsError(f"{path} must map names to values; restore it with `python -m pipeline preset demo`")
    problems: list[str] = []
    params = None
    try:
        params = Params.model_validate(raw)
    except ValidationError as error:
        problems += [_describe(dict(e)) for e in error.errors()]
    problems += _impossible(raw)
    if problems or params is None:
        listed = "\n".join(f"  {_shortened(p)}" for p in problems[:SHOWN])
        listed += f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ParamsError(f"{path} has {len(problems)} problem{'s'[: len(problems) > 1]}:\n{listed}")
    return params


def _shortened(line: str) -> str:
    return line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]} ..."


def _describe(error: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key"
    if error["type"] == "missing":
        return f"{key}: missing"
    hint = ""
    if error["type"] == "float_type" and isinstance(error["input"], str):
        hint = " (YAML reads 1e-3 as text: write 0.001 or 1.0e-3)"
    return f"{key}: {error['msg']}, got {error['input']!r}{hint}"


def _impossible(raw: dict[str, Any]) -> list[str]:
    """Problems between values, of whatever part of `raw` has the right form."""

    def get(*keys: str) -> Any:
        value: Any = raw
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    own = get("own") if isinstance(get("own"), dict) else {}
    problems = _impossible_own(own)
    for keys, known in (
        (("datasets",), BENCHMARKS),
        (("transfer", "targets"), BENCHMARKS),
        (("few_shot", "datasets"), (*BENCHMARKS, *map(str, own))),
        (("transfer", "variants"), VARIANTS),
        (("seeds",), None),
        (("transfer", "seeds"), None),
        (("few_shot", "seeds"), None),
        (("few_shot", "shots"), None),
    ):
        values, key = get(*keys), ".".join(keys)
        if not isinstance(values, list):
            continue
        names = [value for value in values if isinstance(value, str | int)]
        problems += [f"{key}: {value!r} is listed twice" for value, n in Counter(names).items() if n > 1]
        if known:
            problems += [
                f"{key}: there is no data set {value!r}; known are {', '.join(known)}"
                for value in names
                if isinstance(value, str) and value not in known
            ]
    datasets, source, targets = get("datasets"), get("transfer", "source"), get("transfer", "targets")
    if isinstance(datasets, list):
        if not datasets and not own:
            problems.append("datasets: empty, and so is own, so that there is no data")
        transfer = get("transfer", "seeds") != []
        if transfer and isinstance(source, str) and source not in datasets:
            problems.append(f"transfer.source: {source!r} must be one of datasets")
        if transfer and isinstance(targets, list):
            absent = [t for t in targets if t not in datasets]
            problems += [f"transfer.targets: {t!r} must be one of datasets" for t in absent]
        few = get("few_shot", "datasets")
        absent = [d for d in few if d not in [*datasets, *own]] if isinstance(few, list) else []
        problems += [f"few_shot.datasets: {d!r} must be one of datasets or own" for d in absent]
    if [get("seeds"), get("transfer", "seeds"), get("few_shot", "seeds")] == [[], [], []]:
        problems.append("seeds, transfer.seeds, few_shot.seeds: all empty, so that no protocol is left")
    if isinstance(targets, list) and source in targets:
        problems.append(f"transfer.targets: {source!r} is the source")
    if get("transfer", "adapter", "scale_novel") is not None:
        problems.append(
            "transfer.adapter.scale_novel: must be null, the transfer protocols use transfer.adapter.scale"
        )
    name, suite, pretrained = get("backbone", "name"), get("suite"), get("backbone", "pretrained")
    if isinstance(name, str):
        if (suite == "embedded") != (name == "tiny") and suite in ("embedded", "real"):
            problems.append(
                f"backbone.name: suite {suite} needs "
                f"{'the backbone tiny' if suite == 'embedded' else 'a model of open_clip, not ' + name}"
            )
        elif name == "tiny" and pretrained != "embedded":
            problems.append(
                f"backbone.pretrained: the tiny backbone has the weights 'embedded', not {pretrained!r}"
            )
        deepest = narrowest = None
        try:
            config = read_config(name, main_root())
            deepest, narrowest = depth(config), width(config)
        except ValueError as error:
            problems.append(f"backbone.name: {error}")
        for section in ((), ("transfer",)):
            start, end, ratio, expansion = (
                get(*section, "adapter", part) for part in ("start", "end", "ratio", "expansion")
            )
            key = ".".join((*section, "adapter"))
            if deepest and isinstance(end, int) and end > deepest:
                problems.append(f"{key}.end: {end} is beyond the last layer, {deepest}, of {name}")
            if isinstance(start, int) and isinstance(end, int) and start > end:
                problems.append(f"{key}.start: {start} is above {key}.end {end}")
            if (
                narrowest
                and isinstance(ratio, int)
                and isinstance(expansion, int)
                and ratio > narrowest * expansion
            ):
                problems.append(f"{key}.ratio: {ratio} leaves nothing of the width {narrowest} of {name}")
    if isinstance(name, str) and pretrained == "openai" and not name.endswith(("-quickgelu", ".json")):
        problems.append(f"backbone.name: OpenAI's weights were trained with QuickGELU: use {name}-quickgelu")
    return problems


def _impossible_own(own: dict[Any, Any]) -> list[str]:
    """Names and paths of own data sets that cannot be."""
    problems = []
    for name, entry in own.items():
        if not re.fullmatch(rf"[A-Za-z0-9][A-Za-z0-9_-]{{,{LONGEST_NAME - 1}}}", str(name)):
            problems.append(
                f"own: {name!r} must be letters, digits, _ and - only, at most {LONGEST_NAME}: it names files and "
                "stages"
            )
        if name in (*BENCHMARKS, *VARIANTS, "average"):
            problems.append(f"own: the name {name!r} is taken, choose another")
        path = entry.get("path") if isinstance(entry, dict) else None
        if not isinstance(path, str) or "\0" in path:
            continue
        if "://" in path:  # DVC would ask that host
            problems.append(f"own.{name}.path: {path!r} is an address; put the images into a folder")
        elif (main_root() / path).resolve().is_relative_to(main_root() / "data"):
            problems.append(
                f"own.{name}.path: {path!r} lies in data/, where DVC looks at nothing (.dvcignore); "
                "put the images elsewhere"
            )
    return problems
