"""From a folder of images to an answer."""

import contextlib
import platform
import shutil
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from tqdm import tqdm

import heba
from heba import methods
from heba.clip.architecture import depth, read_architecture, width
from heba.data.splits import class_names
from heba.sources.check import Finding
from heba.sources.duplicates import same_pictures
from heba.sources.look import Look, look_at
from heba.sources.own import read_own
from pipeline.commands.common import predict_command, shown, weights_of
from pipeline.commands.photos import choose, page, project, results
from pipeline.commands.photos.choose import Choice
from pipeline.commands.photos.results import Results
from pipeline.commands.photos.splits import Plan, make_plan
from pipeline.core.params import PARAMS_FILE, Params, ParamsError, load_params
from pipeline.core.paths import new_file, new_folder
from pipeline.runner import repro
from pipeline.stages import own
from pipeline.stages.own import Checked

DEFAULTS = Path(__file__).with_name("defaults.yaml")
REPORT, BEST = "report.html", Path("best")
REAL = "--backbone ViT-B-16-quickgelu --pretrained openai"
TINY = (
    f"The backbone is the tiny CLIP, which sees little and knows few words: its numbers say little about these "
    f"images. Give a real one: {REAL}"
)
SHOWN, LISTED = 10, 200  # items of a finding in the terminal and in the report


class Options(NamedTuple):
    """What the command line asks for.

    Attributes:
        methods: none: the default choice. budget: seconds after which no other method begins.
        shots: training images per class; the table is of the most. repeats: of splits, or of few-shot samples.
        backbone, pretrained: as in params.yaml; files are relative to the current folder.
        template: the prompt of a class. jobs: stages at a time.
    """

    methods: list[str]
    budget: float | None
    shots: list[int]
    repeats: int
    backbone: str
    pretrained: str | None
    template: str
    skip_unreadable: bool
    jobs: int | None


class Ran(NamedTuple):
    """What came of the methods: those that are done, those that were not begun, those that failed; and what was
    chosen on validation images, by method and split."""

    done: list[str]
    left: list[str]
    failed: list[str]
    choices: dict[str, dict[str, Choice]]


def run(images: Path, out: Path | None, options: Options) -> None:
    """Compare methods on the images of a folder; the project is in `out`. ValueError says what is to be mended."""
    folder, images = out or project.default_folder(images), images.resolve()
    backbone = backbone_of(options)
    suite = "embedded" if backbone["name"] == "tiny" else "real"
    raw = project.preset(suite)
    listed, notes = chosen_methods(options.methods, raw, backbone)
    warning = TINY if suite == "embedded" else ""
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    data = read(images, options.skip_unreadable)
    plan = make_plan(data.split, data.same, options.repeats)
    project.make(folder, images)
    with contextlib.chdir(folder):
        root = Path.cwd()
        project.lay_out(root)
        files = project.write_splits(root, plan)
        entry = {"kind": "coop", "path": str(images), "template": options.template}
        raw |= {
            "suite": suite,
            "datasets": [],
            "seeds": [],
            "shots": max(options.shots),
            "own": {name: entry | {"split": file} for name, file in files.items()},
            "backbone": backbone,
            "transfer": {"protocols": [], "source": "", "targets": [], "variants": [], "seeds": []},
            "few_shot": {"datasets": list(files), "seeds": plan.seeds, "shots": sorted(options.shots)},
        }
        before = project.methods_done(root, raw)
        project.write_params(root, raw | {"methods": listed[:1]})
        findings = check(load_params(), next(iter(files)), data, plan)
        print(f"{len(class_names(data.split))} classes; {plan.text()}")
        project.commit(root, "compare: before the first training")
        ran = train(root, raw, listed, before, plan, options)
        params = load_params()
        tests = results.read_tests(params)
        try:
            seconds = results.training_seconds(params, params.shots)
        except ValueError as error:  # the store does not answer; all else is here
            seconds = {}
            print(f"warning: without the seconds of trainings: {error}", file=sys.stderr)
        found = results.summarise(params, plan, tests, seconds)
        notes += notes_of(plan, params, ran)
        with new_folder(root / BEST) as best:
            source = results.artifact_folder(params, plan, found.advice.method, found.shots)
            shutil.copytree(source, best, dirs_exist_ok=True)
        commit = project.commit(root, f"compare: {', '.join(ran.done)}")
        titled = {methods.part(name, "settings").TITLE: choice for name, choice in ran.choices.items()}
        chosen = choose.sentences(titled)
        settings = chosen + results.chosen_by_methods(params, found.shots)
        about = versions(commit)
        html = page.render(found, params, images, plan.text(), notes, findings, settings, about, warning)
        with new_file(root / REPORT) as path:
            path.write_text(html, encoding="utf-8")
    print(f"\n{results.table(found)}\n\n{found.advice.text}\n")
    for line in [*chosen, *notes]:
        print(f"note: {line}")
    tell(folder, options, plan, found, warning)
    if ran.failed:
        raise ValueError(f"failed: {', '.join(ran.failed)}; the output of each stands above")


def backbone_of(options: Options) -> dict[str, str]:
    """The backbone as in params.yaml; files by their absolute paths, since the project lies elsewhere."""
    found = {"name": options.backbone, "pretrained": weights_of(options.backbone, options.pretrained)}
    return {key: str(Path(value).resolve()) if Path(value).is_file() else value for key, value in found.items()}


def chosen_methods(asked: list[str], raw: dict[str, Any], backbone: dict[str, str]) -> tuple[list[str], list[str]]:
    """The methods, the fast ones first, and sentences about those of the default choice that the backbone cannot
    have. The first of the default choice always runs."""
    default = yaml.safe_load(DEFAULTS.read_text(encoding="utf-8"))["methods"]
    unknown = [name for name in asked if name not in methods.names()]
    if unknown:
        raise ParamsError(f"--methods: there is no {', '.join(unknown)}; known are {', '.join(methods.names())}")
    notes, listed = [], []
    architecture = read_architecture(backbone["name"], Path.cwd())
    for name in dict.fromkeys([default[0], *(asked or default)]):
        about = methods.part(name, "settings")
        block = {key: value for key, value in raw.get(name, {}).items() if key != "overrides"}
        problems = about.problems(about.Settings.model_validate(block), depth(architecture), width(architecture))
        if problems and name not in asked:
            told = "; ".join(f"{key}: {text}" for key, text in problems.items())
            notes.append(f"Without {about.TITLE}, which {backbone['name']} cannot have: {told}.")
        else:
            listed.append(name)
    return sorted(listed, key=lambda name: effort(name, raw)), notes


def effort(name: str, raw: dict[str, Any]) -> tuple[bool, int]:
    """Sort key: methods on frozen features, then those through the towers by what their steps take."""
    about = methods.part(name, "settings")
    block = {key: value for key, value in raw.get(name, {}).items() if key != "overrides"}
    work = about.work(about.Settings.model_validate(block), 160, 10)
    return about.READS == "pixels", work.steps * (work.images + work.prompts)


def read(images: Path, skip_unreadable: bool) -> Checked:
    """The images of a folder, as own data of the kind `folder` has them, each opened once."""
    looks: dict[str, Look] = {}
    skipped: list[str] = []

    def look(files: list[str]) -> tuple[list[str], list[list[str]]]:
        with tqdm(total=len(files), desc="look at the images", delay=2, unit="image") as bar:
            looks.update(look_at(images, files, bar.update))
        if skip_unreadable:
            skipped.extend(file for file in looks if looks[file].problem)
        return skipped, []

    data = read_own(images, "folder", look_at=look)
    if len(class_names(data.split)) < 2:
        raise ValueError(f"{images}: one class alone; to tell classes apart there must be two folders or more")
    return Checked(data.split, data.left_out, {}, looks, same_pictures(looks), skipped)


def check(params: Params, name: str, data: Checked, plan: Plan) -> list[str]:
    """What `check-data` finds of the split `name`, as text, on the terminal too; ParamsError where something must
    be mended."""
    report = own.check_own(params, name, replace(data, split=plan.splits[name]), params.shots)
    if report.errors:
        found = shown("\n".join(finding.shown(SHOWN) for finding in report.errors))
        unread = any(look.problem for look in data.looks.values()) and not data.skipped
        remedy = ", or set --skip-unreadable to go on without what cannot be read" if unread else ""
        raise ParamsError(f"{found}\nMend these{remedy}, and run the same again.")
    notes = [finding for finding in report.notes if finding.kind != "undescribed"]  # no folder has descriptions
    if plan.left_out:
        notes.append(Finding("the same picture as an image of another part, left out", plan.left_out))
    for finding in notes:
        print(f"note: {shown(finding.shown(SHOWN))}", file=sys.stderr)
    return [finding.shown(LISTED) for finding in notes]


def train(
    root: Path, raw: dict[str, Any], listed: list[str], before: list[str], plan: Plan, options: Options
) -> Ran:
    """Train and evaluate the methods, group after group; params.yaml has those that are done. Those that an
    earlier call has done come `before` the others: all that is theirs is there."""
    began = time.monotonic()
    before = [name for name in listed if name in before]
    left = [name for name in listed if name not in before]
    frozen = [name for name in left if methods.part(name, "settings").READS == "features"]
    others = [[name] for name in left if name not in frozen]
    groups = [before, *([[name] for name in left] if options.budget else [frozen, *others])]
    waiting = [group for group in groups if group]
    grids = yaml.safe_load(DEFAULTS.read_text(encoding="utf-8"))["search"][raw["suite"]]
    done: list[str] = []
    failed: list[str] = []
    choices: dict[str, dict[str, Choice]] = {}
    while waiting and not (done and options.budget and time.monotonic() - began > options.budget):
        group = waiting.pop(0)
        raw["methods"] = [*done, *group]
        project.write_params(root, raw)
        params = load_params()
        try:
            for name in group:
                if name in grids and (done or name in before):
                    searched = choose.search(
                        params, name, list(plan.splits), params.shots, plan.seeds[0], grids[name]
                    )
                    choices |= {name: searched} if searched else {}
                    best = {split: choice.best for split, choice in searched.items()}
                    raw[name] = raw[name] | {"overrides": raw[name].get("overrides", {}) | best}
            project.write_params(root, raw)
            slots = repro.local_slots(load_params(), options.jobs, [])
            repro.run(root, slots, partial(repro.start_local, root))
        except KeyboardInterrupt:
            print(
                f"\nstopped; {', '.join(done) or 'nothing'} done. The same command goes on from here.",
                file=sys.stderr,
            )
            raise
        except (repro.StageError, FloatingPointError, RuntimeError) as error:  # out of memory, say
            if len(group) > 1:
                waiting = [[name] for name in group] + waiting
                continue
            if not done:
                raise
            failed += group
            print(f"{group[0]} failed and is left out: {error}", file=sys.stderr)
            continue
        done += group
        shares = results.shares_at(results.read_tests(load_params()), params.shots)
        for name in group:
            print(f"{methods.part(name, 'settings').TITLE}: {100 * shares[name]:.1f} %", flush=True)
    done.sort(key=listed.index)
    raw["methods"] = done
    project.write_params(root, raw)
    return Ran(done, [name for group in waiting for name in group], failed, choices)


def notes_of(plan: Plan, params: Params, ran: Ran) -> list[str]:
    """Sentences under the table."""
    about = f"{params.shots} training images per class at most, backbone {params.backbone.name}"
    about += f" ({params.backbone.pretrained})"
    if plan.kind == "given":
        how = f"95 % intervals: Wilson's, of the test images and of the {len(plan.seeds)} samples"
    else:
        how = f"95 % intervals: the corrected resampled t over {len(plan.splits)} splits, or Wilson's if wider"
    notes = [f"{about}.", f"{how}. Seconds: of one training, the mean of the splits or samples."]
    if ran.left:
        notes.append(f"Not begun within the budget: {', '.join(ran.left)}.")
    if ran.failed:
        notes.append(f"Failed: {', '.join(ran.failed)}.")
    return notes


def versions(commit: str) -> str:
    return (
        f"heba {heba.__version__}, torch {torch.__version__}, Python {platform.python_version()}; "
        f"commit {commit} of this project; params in {PARAMS_FILE}."
    )


def tell(folder: Path, options: Options, plan: Plan, found: Results, warning: str) -> None:
    """Where the report and the adapter are, and what to do with it."""
    line = next(line for line in found.lines if line.method == found.advice.method)
    print(f"report: {folder / REPORT}")
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    first = "with the first sample" if plan.kind == "given" else "on the first split"
    print(f"{line.title}, trained {first}, is in {folder / BEST}. Classify other images with:")
    backbone = backbone_of(options)
    print(f"  {predict_command(folder / BEST, backbone['name'], backbone['pretrained'])}")
