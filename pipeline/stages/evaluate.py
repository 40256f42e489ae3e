"""The stages `evaluate*`: every training on the test images of a data set; records whose inputs are
unchanged stay.

out/evaluate/<dataset>/<method>/<protocol>-<shots>-<seed>.json                 tested on the data set it trained on
out/evaluate-{cross,domain}/<seed>/<dataset>/<method>/<protocol>-<shots>-<seed>.json   the source model on another
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heba import artifact, methods
from heba.clip.features import BATCH_SIZE
from heba.clip.preprocess import normalise, preprocess_of
from heba.data.images import Images
from heba.data.protocols import PROTOCOLS
from heba.data.splits import base_labels
from heba.evaluation.record import Group, Record, read_record, write_record
from heba.evaluation.report import classification_report
from pipeline.core import code
from pipeline.core.params import Params
from pipeline.core.paths import keep_only, new_file, writable
from pipeline.core.trainings import Evaluation, Training, stage_folder, tested_on, tests, train_folder
from pipeline.stages.backbone import computing, device, load_backbone, use_bf16
from pipeline.stages.precompute import TestImages, precompute_folder, read_classes, read_test
from pipeline.stages.train import counted, progress
from pipeline.tracking import log


def run(params: Params, dataset: str) -> str:
    """Evaluate all trainings on `dataset` that are tested on it too; returns a line about it."""
    found = [t for t in trained_on(params, dataset) if not PROTOCOLS[t.protocol].transfer]
    return evaluate_all(
        params, [Evaluation(t.protocol, dataset, t) for t in found], stage_folder("base_to_novel") / dataset
    )


def run_transfer(params: Params, protocol: str, seed: int) -> str:
    """Evaluate the source's trainings of `seed` on the test images of all targets or variants; returns a line."""
    source, trained_as = params.transfer.source, PROTOCOLS[protocol].trained_as
    found = [
        t
        for t in trained_on(params, source)
        if (t.protocol, t.seed) == (trained_as, seed) and tests(t.method, protocol)
    ]
    jobs = [Evaluation(protocol, d, t) for d in tested_on(params, protocol, source) for t in found]
    return evaluate_all(params, jobs, stage_folder(protocol) / str(seed))


def trained_on(params: Params, dataset: str) -> list[Training]:
    """The trainings on a data set, without those of a method that an earlier params.yaml had."""
    configs = train_folder(dataset).glob(f"*/[!.]*/{artifact.CONFIG_FILE}")
    found = sorted(Training.of_folder(config.parent) for config in configs)
    return [training for training in found if training.method in params.methods]


def evaluate_all(params: Params, jobs: list[Evaluation], folder: Path) -> str:
    """Bring the records under `folder` up to date with `jobs`, and log them; returns a line about those made."""
    with writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        keep_only(folder, [job.path for job in jobs])
    clip = None
    made: dict[str, Record] = {}
    try:
        for job in jobs:
            config = artifact.read_config(job.training.folder)
            digest = inputs_sha256(params, job)
            if kept(job.path, digest):
                continue
            clip = clip or load_backbone(params)[0]
            record = evaluate(params, clip, job, config, digest)
            with new_file(job.path) as path:
                write_record(record, path)
            made[job.path.relative_to(folder).with_suffix("").as_posix()] = record
    finally:  # the next run keeps these records, and would not log them
        if made:
            log.log_evaluations(list(made.values()))
    return counted(list(made), len(jobs), "evaluations") + means(list(made.values()))


def means(records: list[Record]) -> str:
    """By protocol and method, the mean over `records` of the accuracy that sums one up: h, or of all classes."""
    found: dict[str, dict[str, list[float]]] = {}
    for record in records:
        name, value = list(record.accuracies().items())[-1]
        found.setdefault(f"{record.protocol} {name}", {}).setdefault(record.method, []).append(value)
    shown = {
        what: " ".join(f"{method} {sum(values) / len(values):.1f}" for method, values in methods.items())
        for what, methods in found.items()
    }
    return "".join(f", {what} {values}" for what, values in shown.items())


def kept(path: Path, digest: str) -> bool:
    """Whether the record at `path` is of these inputs."""
    try:
        return read_record(path).evaluated_sha256 == digest
    except ValueError:  # none, or a damaged one
        return False


def inputs_sha256(params: Params, job: Evaluation) -> str:
    """The hash of all that a record depends on."""
    what = [job.protocol, job.dataset, params.backbone.model_dump(), use_bf16(params), params.threads]
    what.append(code.sha256(*code.EVALUATE, code.of_method(job.training.method)))
    digest = hashlib.sha256(json.dumps(what).encode())
    trained, precomputed = job.training.folder, precompute_folder(job.dataset)
    files = [trained / name for name in artifact.FILES]
    files += [precomputed / name for name in ("prompts.json", "text.safetensors", "test.safetensors")]
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:32]


def groups_of(protocol: str, n_classes: int) -> dict[str, tuple[range, bool]]:
    """By group: the labels of its classes, and whether the training was on these."""
    if protocol == "base_to_novel":
        n_base = len(base_labels(n_classes))
        return {"base": (range(n_base), True), "novel": (range(n_base, n_classes), False)}
    return {"all": (range(n_classes), not PROTOCOLS[protocol].new_classes)}


def columns_of(dataset: str, names: list[str], trained: list[str]) -> Tensor:
    """[n], where each of the class `names` stands among those of the training; ImageNet-A and -R have a part.

    ValueError when one is not there.
    """
    place = {name: column for column, name in enumerate(trained)}
    missing = [name for name in names if name not in place]
    if missing:
        raise ValueError(f"{dataset}: the model was not trained on its classes {', '.join(missing[:5])}")
    return torch.tensor([place[name] for name in names])


def evaluate(params: Params, clip: Any, job: Evaluation, config: artifact.Config, digest: str) -> Record:
    """The record of one training on one data set's test images."""
    training = job.training
    about, method = methods.part(config.method, "settings"), methods.part(config.method, "method")
    settings, test = config.method_settings(), read_test(job.dataset, preprocess_of(clip))
    classes = read_classes(job.dataset, settings.prompts)
    model, _ = artifact.load(clip, training.folder)
    groups = {}
    try:
        for group, (labels, trained) in groups_of(job.protocol, len(classes.names)).items():
            if not trained and not about.NEW_CLASSES:
                continue
            part = classes.select(labels)
            with computing(params):
                if trained:
                    classifier = artifact.read_classifier(training.folder, len(config.class_names))
                    columns = columns_of(job.dataset, part.names, config.class_names)
                else:
                    classifier = method.classifier(model, part, settings, False, progress)
                    columns = torch.arange(len(labels))
                where = device(params)
                predicted, targets = predict(model, config.method, classifier, test, labels, columns, where)
            groups[group] = Group(**classification_report(predicted, targets, part.names))
    finally:
        method.detach(model)
    return Record(
        protocol=job.protocol,
        dataset=job.dataset,
        method=training.method,
        shots=training.shots,
        seed=training.seed,
        source=training.dataset if PROTOCOLS[job.protocol].transfer else None,
        suite=params.suite,
        backbone=params.backbone.model_dump(),
        settings={key: config.settings[key] for key in sorted(about.EVALUATION)},
        adapter_sha256=artifact.sha256(training.folder),
        inputs_sha256=config.inputs_sha256 or "",
        evaluated_sha256=digest,
        groups=groups,
    )


def predict(
    model: Any,
    name: str,
    classifier: dict[str, Tensor],
    test: TestImages,
    labels: range,
    columns: Tensor,
    where: torch.device,
) -> tuple[Tensor, Tensor]:
    """The predicted and the true labels [n], from 0, of the test images of the classes `labels`, by the method
    `name`; `columns` are those of its logits that are about these classes."""
    method, reads = methods.part(name, "method"), methods.part(name, "settings").READS
    rows = torch.isin(test.labels, torch.tensor(labels)).nonzero().flatten()
    classifier, columns = {key: tensor.to(where) for key, tensor in classifier.items()}, columns.to(where)
    found = []
    with progress(len(rows), "test images") as done:
        for batch in rows.split(BATCH_SIZE.get(where.type, 256)):
            if reads == "pixels":
                pixels = torch.from_numpy(test.packed[batch.numpy()]).to(where)
                images = Images.of_pixels(normalise(pixels, test.preprocess))
            else:
                images = Images.of_features(test.features[batch].to(where), test.hidden[batch].to(where))
            found.append(method.logits(model, classifier, images)[:, columns].argmax(dim=-1).cpu())
            done(len(batch))
    return torch.cat(found), test.labels[rows] - labels.start
