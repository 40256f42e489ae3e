"""params.yaml: its schema, and one message with everything that is wrong with it."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from heba.architecture import depth, read_config, width
from heba.prompts import TEMPLATE, TEMPLATE_PATTERN
from pipeline.paths import main_root

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

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Seeds = list[Annotated[int, Field(ge=0)]]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Backbone(_Strict):
    name: str
    pretrained: str


class Adapter(_Strict):
    start: Count
    end: Count
    ratio: Count
    scale: Positive
    scale_novel: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None
    scale_factor: Positive
    slow_ratio: Fraction
    init: Literal["kaiming", "zero"]
    visual_block: Literal["conv", "linear"]
    text_block: Literal["linear", "conv1d"]
    expansion: Count
    gradient_scale: bool
    towers: Literal["both", "image", "text"]


class Train(_Strict):
    epochs: Count
    batch_size: Count
    lr: Positive
    momentum: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    neg_ratio: Annotated[int, Field(ge=0)]


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
    root: str
    mirror: str | None
    catalog: str | None


class Own(_Strict):
    """A user's own data set; `path` is the folder of its images, in which `file` and `descriptions` are."""

    kind: Literal["folder", "csv", "coop"]
    path: Annotated[str, Field(min_length=1)]
    file: str | None = None
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
    threads: Count | None
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
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError(
            f"{path} is not here: run from the repository's root, or restore it with "
            "`python -m pipeline preset demo`"
        ) from None
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ParamsError(f"{path} can not be read: {error}") from None
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
        listed = "\n".join(f"  {p}" for p in problems)
        raise ParamsError(f"{path} has {len(problems)} problem{'s'[: len(problems) > 1]}:\n{listed}")
    return params


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
        for value in values:
            if known and isinstance(value, str) and value not in known:
                problems.append(f"{key}: there is no data set {value!r}; known are {', '.join(known)}")
            if values.count(value) > 1 and f"{key}: {value!r} is listed twice" not in problems:
                problems.append(f"{key}: {value!r} is listed twice")
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
    """Names and paths of own data sets that can not be."""
    problems = []
    for name, entry in own.items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", str(name)):
            problems.append(f"own: {name!r} must be letters, digits, _ and - only: it names files and stages")
        if name in (*BENCHMARKS, *VARIANTS, "average"):
            problems.append(f"own: the name {name!r} is taken, choose another")
        path = entry.get("path") if isinstance(entry, dict) else None
        if isinstance(path, str) and (main_root() / path).resolve().is_relative_to(main_root() / "data"):
            problems.append(
                f"own.{name}.path: {path!r} lies in data/, where DVC looks at nothing (.dvcignore); "
                "put the images elsewhere"
            )
    return problems
