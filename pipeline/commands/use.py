"""The command `heba`: adapt CLIP to a folder of images, classify images with an adapter or with CLIP alone, tell
what an adapter is, and write it as an ONNX file."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

import heba
from heba import artifact
from heba.data.prompts import TEMPLATE, read_descriptions
from heba.evaluation.record import read_record
from heba.fit.bounds import MOST_SEED
from heba.sources.own import IMAGE_SUFFIXES, is_hidden
from pipeline.commands import version
from pipeline.commands.common import read_settings, run_app, shown, weights_of
from pipeline.core.params import PARAMS_FILE, load_params
from pipeline.core.paths import OUT

app = typer.Typer(
    help="Adapt CLIP to your images, and classify with it: `heba adapt photos/` trains on a folder per class, and "
    "`heba predict photo.jpg --adapter adapter/` classifies; so it does with what `dvc repro` trained, such as "
    "out/train/eurosat/heba/base_to_novel-16-1.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # with it, the help of a flag says <bool>
    context_settings={"max_content_width": 115},
)


@app.callback()
def _options(show_version: version.Option = False) -> None:
    pass


Images = Annotated[list[Path], typer.Argument(help="Image files, or folders, which are searched.")]
Adapter = Annotated[
    str,
    typer.Option(help="Folder that a training wrote, id of an MLflow run, or a model of MLflow (models:/name/1)."),
]
Classes = Annotated[
    str | None, typer.Option(help="Names to choose from, with commas between. Default: those of the training.")
]
Descriptions = Annotated[
    Path | None, typer.Option(help="JSON file: for each of --classes, a list of descriptions for its prompts.")
]
Template = Annotated[
    str, typer.Option(help="Prompt of those of --classes that have no description, with {} for the class.")
]
Top = Annotated[int | None, typer.Option(min=1, help="How many classes to print for an image. Default: 5.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one line an image.")]
Root = Annotated[
    Path, typer.Option(help="Folder that a backbone's own files (weights, JSON config) are relative to.")
]
Backbone = Annotated[
    str | None, typer.Option(help="JSON config of the backbone, if it lies elsewhere than in the training.")
]
Pretrained = Annotated[
    str | None, typer.Option(help="File of the backbone's weights, if it lies elsewhere than in the training.")
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda where there is one.")]


@app.command()
def adapt(
    folder: Annotated[Path, typer.Argument(help="A folder per class, or these below train/, val/ and test/.")],
    method: Annotated[str, typer.Option(help="One of those of docs/methods.md, such as gda.")] = "heba",
    shots: Annotated[int, typer.Option(min=1, help="Training images per class.")] = 16,
    seed: Annotated[
        int,
        typer.Option(
            min=0, max=MOST_SEED, help="Random seed, for the choice of training images and for the training."
        ),
    ] = 1,
    backbone: Annotated[
        str, typer.Option(help="tiny, or a model of open_clip such as ViT-B-16-quickgelu.")
    ] = "tiny",
    pretrained: Annotated[
        str | None, typer.Option(help="A tag of open_clip such as openai, or a file of weights.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of the method, such as scale=0.05. May be repeated."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to write the adapter into.")] = Path("adapter"),
    device: Device = None,
    root: Root = Path(),
) -> None:
    """Train a classifier on a folder of images per class, and test it."""
    from pipeline.commands import adapt

    weights, settings = weights_of(backbone, pretrained), read_settings(setting)
    adapt.run(folder, method, shots, seed, backbone, weights, settings, out, device, root)


@app.command()
def export(
    adapter: Annotated[str, typer.Argument(help="As --adapter of predict.")],
    onnx: Annotated[Path, typer.Option(help="The file to write, such as model.onnx.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the file where it exists.")] = False,
    root: Root = Path(),
    backbone: Backbone = None,
    pretrained: Pretrained = None,
) -> None:
    """Write an adapter as one ONNX file, with its preprocessing, for use without torch."""
    folder = adapter_folder(adapter)
    typer.echo("export: about a minute ...", err=True)
    written = heba.export_onnx(folder, onnx, force, root, backbone, pretrained)
    print(f"{written.path}: {written.bytes / 1e6:.1f} MB, {told(written.difference)}")


def told(difference: float | None) -> str:
    if difference is None:
        return "not checked against torch: pip install onnxruntime for that"
    return f"checked with onnxruntime: logits within {difference:.0e} of torch's"


@app.command()
def predict(
    images: Images,
    adapter: Adapter,
    classes: Classes = None,
    descriptions: Descriptions = None,
    template: Template = TEMPLATE,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="A setting of the method for --classes, such as scale_novel=0.05. May be repeated."
        ),
    ] = None,
    top: Top = None,
    as_json: AsJson = False,
    device: Device = None,
    root: Root = Path(),
    backbone: Backbone = None,
    pretrained: Pretrained = None,
) -> None:
    """Classify images with a trained adapter."""
    files = find_images(images)
    names = split_names(classes)
    classifier = heba.load(
        adapter_folder(adapter),
        names,
        read(descriptions),
        template,
        read_settings(setting),
        device,
        root,
        backbone,
        pretrained,
    )
    show(classifier, files, top, as_json)


@app.command()
def zero_shot(
    images: Images,
    classes: Annotated[str, typer.Option(help="Names to choose from, with commas between.")],
    descriptions: Descriptions = None,
    template: Template = TEMPLATE,
    backbone: Annotated[
        str | None, typer.Option(help="tiny, or a model of open_clip. Default: that of params.yaml.")
    ] = None,
    pretrained: Annotated[
        str | None, typer.Option(help="A tag of open_clip or a file of weights. Default: that of params.yaml.")
    ] = None,
    top: Top = None,
    as_json: AsJson = False,
    device: Device = None,
    root: Root = Path(),
) -> None:
    """Classify images with CLIP alone."""
    files = find_images(images)
    if (backbone is None) != (pretrained is None) and backbone != "tiny":
        raise ValueError(
            "--backbone and --pretrained go together, such as --backbone ViT-B-16-quickgelu --pretrained openai"
        )
    if backbone is None:
        if not PARAMS_FILE.exists():
            raise ValueError(f"there is no {PARAMS_FILE} here: give --backbone and --pretrained")
        backbone, pretrained = load_params().backbone.name, load_params().backbone.pretrained
    names = split_names(classes) or []
    classifier = heba.zero_shot(
        backbone, pretrained or "embedded", names, read(descriptions), template, device, root
    )
    show(classifier, files, top, as_json)


@app.command()
def info(
    adapter: Annotated[str, typer.Argument(help="As --adapter of predict.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show an adapter's backbone, classes, shots, seed, accuracy and commit."""
    found = about(adapter_folder(adapter))
    if as_json:
        print(json.dumps(found, ensure_ascii=False, indent=1))
        return
    width = max(map(len, found)) + 1
    for key, value in found.items():
        if value is not None:
            print(shown(f"{key + ':':<{width}} {', '.join(value) if isinstance(value, list) else value}"))


def about(folder: Path) -> dict[str, Any]:
    """What is known of the adapter in `folder`, from its config, its evaluation under out/ and MLflow."""
    from pipeline.tracking.models import commit_of

    config, sha = artifact.read_config(folder), artifact.sha256(folder)
    return {
        "adapter": str(folder),
        "method": config.method,
        "sha256": sha,
        "backbone": f"{config.backbone.name}, {config.backbone.pretrained}",
        "backbone sha256": config.backbone.sha256,
        "trained on": f"{config.dataset} ({config.suite}), {config.protocol}",
        "classes": config.class_names,
        "shots": config.shots,
        "seed": config.seed,
        "settings": [f"{name} {value}" for name, value in config.settings.items()] or None,
        **accuracy_of(sha, config.inputs_sha256),
        "git commit": commit_of(folder),
    }


def adapter_folder(adapter: str) -> Path:
    """The local folder of an adapter that the command line names."""
    if Path(adapter).exists():
        return Path(adapter)
    if find_spec("mlflow") is None:
        raise ValueError(
            f"{adapter}: there is no such folder; for a run or a model of MLflow, pip install '.[pipeline]' in "
            "the repository"
        )
    from pipeline.tracking.models import fetch_adapter

    return fetch_adapter(adapter)


def accuracy_of(sha256: str, inputs_sha256: str | None) -> dict[str, float]:
    """Accuracies, in %, of the evaluation for base_to_novel or few_shot under out/ of the training with these
    hashes; an evaluation that is damaged is named and left out."""
    for path in sorted(OUT.glob("evaluate/*/*/*.json")):
        try:
            record = read_record(path)
        except ValueError as error:
            print(f"note: {error}", file=sys.stderr)
            continue
        if (record.adapter_sha256, record.inputs_sha256) == (sha256, inputs_sha256):
            return {f"{group}, %": round(value, 2) for group, value in record.accuracies().items()}
    return {}


def find_images(paths: list[Path]) -> list[Path]:
    """The files among `paths`, and the images that are not hidden in the folders among them, by name."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = [p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()]
            found = sorted(p for p in found if not any(map(is_hidden, p.relative_to(path).parts)))
            if not found:
                known = ", ".join(sorted(IMAGE_SUFFIXES))
                raise ValueError(f"{path}: no images in this folder; known are {known}")
            files += found
        else:
            files.append(path)
    return files


def split_names(classes: str | None) -> list[str] | None:
    return None if classes is None else [name.strip() for name in classes.split(",")]


def read(descriptions: Path | None) -> dict[str, list[str]] | None:
    return None if descriptions is None else read_descriptions(descriptions)


def show(classifier: Any, files: list[Path], top: int | None, as_json: bool) -> None:
    """Print the predictions; exit code 1 when a file could not be read."""
    from tqdm import tqdm

    failed = 0
    width = max(len(str(file)) for file in files)
    # On a terminal the lines themselves show how far it is.
    with tqdm(total=len(files), desc="predict", delay=2, unit="image", disable=sys.stdout.isatty()) as bar:
        for prediction in classifier.predict(files, top or heba.TOP, bar.update):
            failed += prediction.error is not None
            _print(prediction, width, as_json)
    if failed:
        raise ValueError(f"{failed} of {len(files)} images could not be read")


def _print(prediction: Any, width: int, as_json: bool) -> None:
    pairs = list(zip(prediction.classes, prediction.probabilities, strict=True))
    if as_json:
        found: dict[str, Any] = {"image": prediction.image}
        if prediction.error:
            found["error"] = prediction.error
        else:
            found["classes"] = [{"class": name, "probability": round(p, 6)} for name, p in pairs]
        print(json.dumps(found, ensure_ascii=False))
    elif prediction.error:
        typer.echo(shown(f"error: {prediction.error}"), err=True)
    else:
        classes = "   ".join(f"{name} {100 * p:.1f} %" for name, p in pairs)
        print(shown(f"{prediction.image:<{width}}   {classes}"))


def main() -> None:
    run_app(app)


if __name__ == "__main__":
    main()
