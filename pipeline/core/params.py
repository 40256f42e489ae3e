"""params.yaml: its schema, and one message with everything that is wrong with it."""

import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from heba import methods
from heba.clip.architecture import depth, read_architecture, width
from heba.data.datasets import BENCHMARKS, VARIANTS
from heba.data.prompts import TEMPLATE, TEMPLATE_PATTERN
from heba.data.protocols import PROTOCOLS
from heba.data.strict_yaml import read_yaml
from heba.fit.bounds import MOST_SEED
from pipeline.core.paths import main_root

PARAMS_FILE = Path("params.yaml")

# Bounds beyond every sensible value, and within what torch, threads and file names accept.
MOST = 1_000_000
MOST_THREADS = 1024
LONGEST_TEXT = 4096
LONGEST_NAME = 64
SHOWN = 50  # problems of a message, and LONGEST_LINE of its letters in each
LONGEST_LINE = 400
LOST = "set it in params.yaml to the folder of the images, absolute or relative to the repository"

Count = Annotated[int, Field(ge=1, le=MOST)]
Seeds = list[Annotated[int, Field(ge=0, le=MOST_SEED)]]
Text = Annotated[str, Field(min_length=1, max_length=LONGEST_TEXT, pattern="^[^\0]*$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Backbone(_Strict):
    name: Text
    pretrained: Text


class Transfer(_Strict):
    protocols: list[Literal["cross_dataset", "domain_generalization"]]
    source: str
    targets: list[str]
    variants: list[str]
    seeds: Seeds


class Views(_Strict):
    passes: Annotated[int, Field(ge=0, le=1000)]
    crop: Annotated[float, Field(gt=0, le=1)]


class FewShot(_Strict):
    datasets: list[str]
    seeds: Seeds
    shots: list[Count]


class Data(_Strict):
    root: Text
    mirror: Text | None
    catalog: Text | None


class Own(_Strict):
    """A user's own data set; `path` is the folder of its images, in which `file` and `descriptions` are. Of the
    kind coop, `split` may name a split file instead, relative to the repository, in which it lies. Methods
    are trained on it for few_shot, and for base_to_novel only with `base_to_novel: true`."""

    kind: Literal["folder", "csv", "coop"]
    path: Text
    file: Text | None = None
    split: Text | None = None
    template: Annotated[str, Field(pattern=TEMPLATE_PATTERN)] = TEMPLATE
    descriptions: Annotated[str, Field(pattern="^[^/]+$")] | None = None
    allow_leaks: bool = False
    skip_unreadable: bool = False
    base_to_novel: bool = False


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
    views: Views
    methods: Annotated[list[str], Field(min_length=1)]
    transfer: Transfer
    few_shot: FewShot
    blocks: dict[str, Any]  # by method, what params.yaml has under its name


def settings_of(params: Params, method: str, protocol: str, dataset: str = "") -> Any:
    """The Settings of a method for the trainings of a protocol on a data set: its block, with what `overrides` has
    for the data set, and then for the protocol."""
    merged = _merged(params.blocks[method], dataset, protocol)
    return methods.part(method, "settings").Settings.model_validate(merged)


def _merged(block: dict[str, Any], *keys: str) -> dict[str, Any]:
    """A method's block, with what its `overrides` have for each of `keys`."""
    merged = {key: value for key, value in block.items() if key != "overrides"}
    for key in keys:
        merged |= block.get("overrides", {}).get(key, {})
    return merged


def stage_of(stage: str, dataset: str) -> str:
    """DVC's name for the `stage` of a data set, such as split-own@flowers."""
    kind = "" if dataset in BENCHMARKS else "-variant" if dataset in VARIANTS else "-own"
    return f"{stage}{kind}@{dataset}"


def lost_folders(params: Params) -> list[str]:
    """The problems of own data whose folder is not there; a relative path is of the main repository."""
    folders = {name: main_root() / entry.path for name, entry in params.own.items()}
    return [
        f"own.{name}.path: there is no folder {folder}" for name, folder in folders.items() if not folder.is_dir()
    ]


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
    # A method's block is there when the method is listed, and may be there when it is not.
    blocks = {name: raw[name] for name in methods.names() if name in raw}
    rest = {key: value for key, value in raw.items() if key not in blocks}
    try:
        params = Params.model_validate(rest | {"blocks": blocks})
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


def _value(raw: Any, *keys: str) -> Any:
    """What lies under `keys`; None where there is no such thing."""
    for key in keys:
        raw = raw.get(key) if isinstance(raw, dict) else None
    return raw


def _impossible(raw: dict[str, Any]) -> list[str]:
    """Problems between values, of whatever part of `raw` has the right form."""
    own = raw["own"] if isinstance(raw.get("own"), dict) else {}
    problems = _impossible_own(own) + _impossible_lists(raw, own) + _impossible_protocols(raw, own)
    if isinstance(_value(raw, "backbone", "name"), str):
        problems += _impossible_backbone(raw)
    return problems


def _impossible_lists(raw: dict[str, Any], own: dict[Any, Any]) -> list[str]:
    """What is listed twice, or is not a data set."""
    problems = []
    for keys, known in (
        (("datasets",), BENCHMARKS),
        (("transfer", "protocols"), None),
        (("transfer", "targets"), BENCHMARKS),
        (("few_shot", "datasets"), (*BENCHMARKS, *map(str, own))),
        (("transfer", "variants"), VARIANTS),
        (("seeds",), None),
        (("transfer", "seeds"), None),
        (("few_shot", "seeds"), None),
        (("few_shot", "shots"), None),
        (("methods",), None),
    ):
        values, key = _value(raw, *keys), ".".join(keys)
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
    return problems


def _impossible_protocols(raw: dict[str, Any], own: dict[Any, Any]) -> list[str]:
    """Data sets of a protocol that are not there, and a params.yaml without data or protocol."""
    problems = []
    datasets, source = _value(raw, "datasets"), _value(raw, "transfer", "source")
    targets, few = _value(raw, "transfer", "targets"), _value(raw, "few_shot", "datasets")
    if isinstance(datasets, list):
        if not datasets and not own:
            problems.append(
                "datasets: empty, and so is own, so that there is no data; docs/tutorial.md has an entry of own"
            )
        transfer = _value(raw, "transfer", "protocols") != []
        if transfer and isinstance(source, str) and source not in datasets:
            problems.append(f"transfer.source: {source!r} must be one of datasets")
        if transfer and isinstance(targets, list):
            absent = [t for t in targets if t not in datasets]
            problems += [f"transfer.targets: {t!r} must be one of datasets" for t in absent]
        absent = [d for d in few if d not in [*datasets, *own]] if isinstance(few, list) else []
        problems += [f"few_shot.datasets: {d!r} must be one of datasets or own" for d in absent]
    if [_value(raw, *keys) for keys in (("seeds",), ("transfer", "protocols"), ("few_shot", "seeds"))] == [[]] * 3:
        problems.append("seeds, transfer.protocols, few_shot.seeds: all empty, so that no protocol is left")
    if isinstance(targets, list) and source in targets:
        problems.append(f"transfer.targets: {source!r} is the source")
    return problems


def _impossible_backbone(raw: dict[str, Any]) -> list[str]:
    """A backbone that does not go with the suite, its weights or the methods' settings."""
    problems = []
    name, pretrained, suite = raw["backbone"]["name"], raw["backbone"].get("pretrained"), raw.get("suite")
    if (suite == "embedded") != (name == "tiny") and suite in ("embedded", "real"):
        needed = "the backbone tiny" if suite == "embedded" else f"a model of open_clip, not {name}"
        problems.append(f"backbone.name: suite {suite} needs {needed}")
    elif name == "tiny" and pretrained != "embedded":
        problems.append(f"backbone.pretrained: the tiny backbone has the weights 'embedded', not {pretrained!r}")
    deepest = narrowest = None
    try:
        config = read_architecture(name, main_root())
        deepest, narrowest = depth(config), width(config)
    except ValueError as error:
        problems.append(f"backbone.name: {error}")
    problems += _impossible_methods(raw, deepest, narrowest)
    if deepest and pretrained == "openai" and not name.endswith(("-quickgelu", ".json")):
        problems.append(f"backbone.name: OpenAI's weights were trained with QuickGELU: use {name}-quickgelu")
    return problems


def _impossible_methods(raw: dict[str, Any], depth: int | None, width: int | None) -> list[str]:
    """What is wrong with the methods and their blocks; `depth` and `width` are the backbone's, where known."""
    problems = []
    listed = raw.get("methods")
    for name in dict.fromkeys([n for n in listed if isinstance(n, str)] if isinstance(listed, list) else []):
        if name not in methods.names():
            problems.append(f"methods: there is no method {name!r}; known are {', '.join(methods.names())}")
        elif name not in raw:
            problems.append(f"{name}: missing; it is listed in methods and needs a block, {{}} for its defaults")
    for name in methods.names():
        block = raw.get(name, {})
        overrides = block.get("overrides", {}) if isinstance(block, dict) else None
        if not isinstance(overrides, dict) or not all(isinstance(o, dict) for o in overrides.values()):
            problems.append(
                f"{name}: must map settings to values, and {name}.overrides protocols or data sets to such"
            )
            continue
        protocols = sorted({protocol.trained_as for protocol in PROTOCOLS.values()})
        own_data = raw["own"] if isinstance(raw.get("own"), dict) else {}
        known = [*protocols, *BENCHMARKS, *map(str, own_data)]
        problems += [
            f"{name}.overrides: {key!r} is neither a protocol, {', '.join(protocols)}, nor a data set"
            for key in overrides
            if key not in known
        ]
        # A method that is not listed does not run on this backbone.
        used = isinstance(listed, list) and name in listed
        size = (depth, width) if used else (None, None)
        own = _settings_problems(name, _merged(block), *size)
        problems += [f"{name}.{setting}" for setting in own]
        for key in [key for key in known if key in overrides]:
            found = _settings_problems(name, _merged(block, key), *size)
            problems += [f"{name}.overrides.{key}.{setting}" for setting in found if setting not in own]
    return problems


def _settings_problems(method: str, settings: dict[str, Any], depth: int | None, width: int | None) -> list[str]:
    """A line, which begins with the setting, for all that is wrong with one method's settings."""
    about = methods.part(method, "settings")
    try:
        found = about.problems(about.Settings.model_validate(settings), depth, width)
    except ValidationError as error:
        return [_describe(dict(e)) for e in error.errors()]
    return [f"{key}: {text}" for key, text in found.items()]


def _impossible_own(own: dict[Any, Any]) -> list[str]:
    """Names and paths of own data sets that are not possible."""
    problems = []
    for name, entry in own.items():
        if not re.fullmatch(rf"[A-Za-z0-9][A-Za-z0-9_-]{{,{LONGEST_NAME - 1}}}", str(name)):
            problems.append(
                f"own: {name!r} must be letters, digits, _ and - only, at most {LONGEST_NAME}: it names files and "
                "stages"
            )
        if name in (*BENCHMARKS, *VARIANTS, "average"):
            problems.append(f"own: the name {name!r} is taken, choose another")
        split = _value(entry, "split")
        if isinstance(split, str) and "\0" not in split:
            if _value(entry, "kind") != "coop":
                problems.append(f"own.{name}.split: goes with kind: coop alone")
            elif not (main_root() / split).resolve().is_relative_to(main_root()):
                problems.append(f"own.{name}.split: {split!r} lies outside the repository")
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
