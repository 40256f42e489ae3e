"""Stage `train`: all trainings of one method on one data set; those whose inputs are unchanged stay.

out/train/<dataset>/<method>/<protocol>-<shots>-<seed>/   as `heba.artifact` describes it
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from heba import artifact, methods
from heba.data.datasets import as_seen
from heba.data.images import LabelledImages, Views
from heba.data.splits import Split, base_labels, class_names, select_classes
from heba.files import remove_left
from heba.fit.run import Run
from pipeline.core import code
from pipeline.core.params import Params, ParamsError, settings_of
from pipeline.core.paths import keep_only, main_root, new_folder, writable
from pipeline.core.trainings import Training, counted, train_folder, trains
from pipeline.stages.backbone import (
    Tokenizer,
    be_deterministic,
    computing,
    device,
    device_name,
    load_backbone,
    read_record,
    use_bf16,
)
from pipeline.stages.download import manifest_path, verified_folder
from pipeline.stages.precompute import precompute_folder, read_classes
from pipeline.stages.split import read_sample, read_trainings, sample_path
from pipeline.stages.views import needs_views, read_views, views_sha256
from pipeline.tracking import log


def run(
    params: Params,
    dataset: str,
    method: str,
    protocol: str | None = None,
    shots: int | None = None,
    seed: int | None = None,
) -> str:
    """Train what the stage `split` lists for `dataset`, or of it what has this `protocol`, `shots` and `seed`;
    returns a line about it."""
    listed = [
        Training(protocol, dataset, method, shots, seed)
        for protocol, shots, seed in read_trainings(dataset)
        if trains(method, protocol)
    ]
    wanted = [
        t
        for t in listed
        if (protocol or t.protocol, shots or t.shots, t.seed if seed is None else seed)
        == (t.protocol, t.shots, t.seed)
    ]
    if not wanted and len(wanted) < len(listed):
        known = ", ".join(t.folder.name for t in listed)
        raise ParamsError(f"params.yaml has no such training of {method} on {dataset}; it has {known}")
    own = train_folder(dataset) / method
    with writable(own):
        own.mkdir(parents=True, exist_ok=True)
        keep_only(own, [t.folder for t in listed])
    backbone, tracker, losses = None, log.StageLog(), dict[Training, float | None]()
    try:
        for training in wanted:
            config = config_of(params, training)
            if not keep(config, training.folder):
                backbone = backbone or load(params)
                losses[training] = train(params, *backbone, training, config, tracker)
    finally:
        tracker.finish()
    last = [loss for loss in losses.values() if loss is not None]
    mean = f", loss {sum(last) / len(last):.3f}" if last else ""
    return counted([t.folder.name for t in losses], len(wanted), "trainings") + mean


def load(params: Params) -> tuple[Any, Tokenizer]:
    if params.cuda_graphs and device(params).type != "cuda":
        raise ParamsError("cuda_graphs: needs a GPU, and this training runs on a CPU; set it to false")
    if params.deterministic:
        be_deterministic()
    return load_backbone(params)


def labels_of(protocol: str, n_classes: int) -> range:
    """The labels of the classes that a protocol trains on."""
    return base_labels(n_classes) if protocol == "base_to_novel" else range(n_classes)


def config_of(params: Params, training: Training) -> artifact.Config:
    """The config of a training, with the hash of all its inputs."""
    dataset, method = training.dataset, training.method
    split = read_sample(dataset, training.shots, training.seed)
    names = class_names(split)
    settings = settings_of(params, method, training.protocol, dataset).model_dump()
    config = artifact.Config(
        method=method,
        settings=settings,
        class_names=[names[label] for label in labels_of(training.protocol, len(names))],
        backbone=artifact.Backbone(**read_record()),
        protocol=training.protocol,
        dataset=dataset,
        suite=params.suite,
        bf16=use_bf16(params),
        seed=training.seed,
        shots=training.shots,
        threads=params.threads,
        cuda_graphs=params.cuda_graphs,
        deterministic=params.deterministic,
    )
    evaluation = methods.part(method, "settings").EVALUATION
    inputs = config.model_dump() | {
        "settings": {key: value for key, value in settings.items() if key not in evaluation},
        "adapter_dtype": params.adapter_dtype,
        "code": code.sha256(*code.TRAIN, code.of_method(method)),
        "views": views_sha256(dataset, training.shots, training.seed) if needs_views(method) else None,
    }
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode())
    sample = sample_path(dataset, training.shots, training.seed)
    files = [manifest_path(dataset), sample, precompute_folder(dataset) / "text.safetensors"]
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return config.model_copy(update={"inputs_sha256": digest.hexdigest()[:32]})


def keep(config: artifact.Config, folder: Path) -> bool:
    """Whether `folder` has this training. Settings that only an evaluation reads are brought up to date."""
    try:
        found = artifact.read_config(folder)
        if found.inputs_sha256 != config.inputs_sha256:
            return False
        artifact.read_tensors(folder)
        artifact.read_classifier(folder, len(config.class_names))
        artifact.read_history(folder)
    except ValueError:
        return False
    config = config.model_copy(update={"chosen": found.chosen})
    if found != config:
        with new_folder(folder) as out:
            shutil.copytree(folder, out, dirs_exist_ok=True)
            (out / artifact.CONFIG_FILE).unlink()  # it may be a link to DVC's cache
            artifact.write_config(config, out)
    return True


def checkpoint_path(config: artifact.Config) -> Path:
    """Where the epochs of a training are kept: under the main repository, by the hash of all its inputs.

    An experiment in a workspace of its own, which DVC removes, can then resume too.
    """
    return main_root() / ".heba" / "checkpoints" / f"{config.inputs_sha256}.safetensors"


@contextmanager
def progress(total: int, what: str) -> Iterator[Callable[[int], object]]:
    """A bar, shown when it takes over two seconds (`heba.fit.run.Run.progress`)."""
    with tqdm(total=total, desc=what, delay=2, mininterval=2) as bar:
        yield bar.update


def train(
    params: Params,
    clip: Any,
    tokenizer: Tokenizer,
    training: Training,
    config: artifact.Config,
    tracker: log.StageLog,
) -> float | None:
    """Train, and write the training's folder; returns the last loss, where there is one."""
    dataset = training.dataset
    about, method = methods.part(training.method, "settings"), methods.part(training.method, "method")
    settings = config.method_settings()
    split = read_sample(dataset, training.shots, training.seed)
    labels = labels_of(training.protocol, len(class_names(split)))
    images = verified_folder(params, dataset) / "images"
    classes = read_classes(dataset, settings.prompts, tokenizer).select(labels)
    views = read_views(dataset, training.shots, training.seed) if needs_views(training.method) else {}
    seen = as_seen(training.dataset)
    parts = [labelled(split, part, images, labels, views.get(part), seen) for part in ("train", "val")]
    checkpoint = checkpoint_path(config)
    remove_left(checkpoint)  # those of a killed training
    if checkpoint.exists():
        print(f"resuming from {checkpoint}", file=sys.stderr)
    history: list[dict[str, float]] = []
    tracker.begin(config, device_name(params))

    def on_epoch(record: dict[str, float]) -> None:
        history.append(record)
        tracker.epoch(record)

    bf16 = config.bf16
    run = Run(training.seed, training.shots, bf16, params.cuda_graphs, checkpoint, on_epoch, progress)
    model = None
    try:
        with writable(checkpoint):
            model = method.build(clip, len(labels), settings, training.seed)
            chosen = method.fit(model, *parts, classes, settings, run)
        config = config.model_copy(update={"chosen": chosen})
        with new_folder(training.folder) as out:
            dtype = torch.float16 if params.adapter_dtype == "fp16" and about.READS == "pixels" else torch.float32
            trained = method.trained(model)
            artifact.write_tensors(trained.state_dict(), out, dtype)
            # From what is on disk, so that a loaded model names images as it was evaluated.
            artifact.load_tensors(trained, artifact.read_tensors(out), str(out))
            with computing(params):
                artifact.write_classifier(method.classifier(model, classes, settings, True, progress), out)
            artifact.write_config(config, out)
            artifact.write_history(history, out)
    finally:
        if model is not None:
            method.detach(model)
    checkpoint.unlink(missing_ok=True)
    tracker.outs(training.folder)
    return history[-1]["loss"] if history else None


def labelled(
    split: Split, part: str, images: Path, labels: range, views: Views | None, seen: bool
) -> LabelledImages:
    """The images of a part of a sample that are of the classes `labels`, with their `views`, opened as seen or
    not."""
    chosen = select_classes(split, labels)[part]
    rows = torch.tensor([row for row, item in enumerate(split[part]) if item[1] in labels], dtype=torch.long)
    files, targets = [images / file for file, _, _ in chosen], [label for _, label, _ in chosen]
    return LabelledImages(files, targets, views.select(rows) if views else None, seen)
