"""The stages `evaluate*`: every training on the test images of a data set; records whose inputs are
unchanged stay.

out/evaluate/<dataset>/<method>/<protocol>-<shots>-<seed>.json              tested on the data set it trained on
out/evaluate-transfer/<protocol>/<dataset>/<method>/<protocol>-<shots>-<seed>.json   the source model on another
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heba import artifact, methods
from heba.clip.device import send, sent
from heba.clip.features import BATCH_SIZE
from heba.clip.preprocess import normalise, preprocess_of
from heba.data.images import Images
from heba.data.protocols import PROTOCOLS
from heba.data.splits import base_labels
from heba.evaluation.record import Group, Record, read_record, write_record
from heba.evaluation.report import classification_report
from pipeline.core import code
from pipeline.core.params import Params, stage_of
from pipeline.core.paths import keep_only, new_file, writable
from pipeline.core.trainings import Evaluation, Training, counted, stage_folder, tested_on, tests, train_folder
from pipeline.stages.backbone import Tokenizer, computing, device, load_backbone, use_bf16
from pipeline.stages.precompute import TestImages, precompute_folder, read_classes, read_test
from pipeline.stages.train import progress
from pipeline.tracking import log

# Models on the CLIP at the same time: one of HeBA on ViT-B/16 takes 350 MB.
AT_ONCE = 4


def run(params: Params, dataset: str) -> str:
    """Evaluate all trainings on `dataset` that are tested on it too; returns a line about it."""
    found = [t for t in trained_on(params, dataset) if not PROTOCOLS[t.protocol].transfer]
    return evaluate_all(
        params, [Evaluation(t.protocol, dataset, t) for t in found], stage_folder("base_to_novel") / dataset
    )


def run_transfer(params: Params, protocol: str) -> str:
    """Evaluate the source's trainings on the test images of all targets or variants; returns a line."""
    source, trained_as = params.transfer.source, PROTOCOLS[protocol].trained_as
    found = [t for t in trained_on(params, source) if t.protocol == trained_as and tests(t.method, protocol)]
    jobs = [Evaluation(protocol, d, t) for d in tested_on(params, protocol, source) for t in found]
    return evaluate_all(params, jobs, stage_folder(protocol))


def trained_on(params: Params, dataset: str) -> list[Training]:
    """The trainings on a data set that are there, without those of a method that an earlier params.yaml had. What
    methods have none is said."""
    for method in params.methods:
        if not (folder := train_folder(dataset) / method).is_dir():
            made = f"dvc repro {stage_of('train', dataset)}-{method}"
            print(f"note: {folder} is not there, and {method} is left out; `{made}` trains it", file=sys.stderr)
    configs = train_folder(dataset).glob(f"*/[!.]*/{artifact.CONFIG_FILE}")
    found = sorted(Training.of_folder(config.parent) for config in configs)
    return [training for training in found if training.method in params.methods]


def evaluate_all(params: Params, jobs: list[Evaluation], folder: Path) -> str:
    """Bring the records under `folder` up to date with `jobs`, and log them; returns a line about those made."""
    with writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        keep_only(folder, [job.path for job in jobs])
    backbone = None
    made: dict[str, Record] = {}
    try:
        for found in together(jobs):
            configs = {job: artifact.read_config(job.training.folder) for job in found}
            digests = {job: inputs_sha256(params, job) for job in found}
            alike = [job for job in found if not kept(job.path, digests[job])]
            if not alike:
                continue
            backbone = backbone or load_backbone(params)
            for job, (trained, groups) in zip(alike, evaluate(params, *backbone, alike), strict=True):
                record = record_of(params, job, configs[job], trained, groups, digests[job])
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


def together(jobs: list[Evaluation]) -> Iterator[list[Evaluation]]:
    """Some of `jobs` at a time, of one method and on the same test images: their models share what the frozen
    blocks make of these. No other method is on the CLIP then, so a record depends on none."""
    alike: dict[tuple[str, str, str], list[Evaluation]] = {}
    for job in jobs:
        alike.setdefault((job.protocol, job.dataset, job.training.method), []).append(job)
    for found in alike.values():
        for i in range(0, len(found), AT_ONCE):
            yield found[i : i + AT_ONCE]


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


def evaluate(
    params: Params, clip: Any, tokenizer: Tokenizer, jobs: list[Evaluation]
) -> list[tuple[int, dict[str, Group]]]:
    """For each of `jobs`, which are `together`, the number of trained parameters and its groups."""
    protocol, dataset, name = jobs[0].protocol, jobs[0].dataset, jobs[0].training.method
    about, method = methods.part(name, "settings"), methods.part(name, "method")
    test, where = read_test(dataset, preprocess_of(clip)), device(params)
    models: list[Any] = []
    found: list[dict[str, Group]] = [{} for _ in jobs]
    try:
        configs = []
        for job in jobs:
            model, config = artifact.load(clip, job.training.folder)
            models.append(model)
            configs.append(config)
        classes = read_classes(dataset, configs[0].method_settings().prompts, tokenizer)
        for group, (labels, trained) in groups_of(protocol, len(classes.names)).items():
            if not trained and not about.NEW_CLASSES:
                continue
            part = classes.select(labels)
            with computing(params):
                if trained:
                    known = configs[0].class_names
                    classifiers = [artifact.read_classifier(job.training.folder, len(known)) for job in jobs]
                    columns = columns_of(dataset, part.names, known)
                else:
                    classifiers = [
                        method.classifier(model, part, config.method_settings(), False, progress)
                        for model, config in zip(models, configs, strict=True)
                    ]
                    columns = torch.arange(len(labels))
                predicted, targets = predict(models, name, classifiers, test, labels, columns, where)
            for groups, by_one in zip(found, predicted, strict=True):
                listed = by_one.tolist() if dataset in params.own else None
                report = classification_report(by_one, targets, part.names)
                groups[group] = Group(**report, predicted=listed)
    finally:
        for model in models:
            method.detach(model)
    return [(trained_parameters(method.trained(model)), g) for model, g in zip(models, found, strict=True)]


def trained_parameters(module: Any) -> int:
    """The number of parameters of a trained module; what it keeps besides, such as a cache, is no parameter."""
    return sum(parameter.numel() for parameter in module.parameters())


def record_of(
    params: Params,
    job: Evaluation,
    config: artifact.Config,
    trained: int,
    groups: dict[str, Group],
    digest: str,
) -> Record:
    training = job.training
    evaluation = methods.part(training.method, "settings").EVALUATION
    return Record(
        protocol=job.protocol,
        dataset=job.dataset,
        method=training.method,
        shots=training.shots,
        seed=training.seed,
        source=training.dataset if PROTOCOLS[job.protocol].transfer else None,
        suite=params.suite,
        backbone=params.backbone.model_dump(),
        settings={key: config.settings[key] for key in sorted(evaluation)},
        trained_parameters=trained,
        adapter_bytes=(training.folder / artifact.ADAPTER_FILE).stat().st_size,
        adapter_sha256=artifact.sha256(training.folder),
        inputs_sha256=config.inputs_sha256 or "",
        evaluated_sha256=digest,
        groups=groups,
    )


def predict(
    models: list[Any],
    name: str,
    classifiers: list[dict[str, Tensor]],
    test: TestImages,
    labels: range,
    columns: Tensor,
    where: torch.device,
) -> tuple[Tensor, Tensor]:
    """The predicted labels [models, n] and the true ones [n], from 0, of the test images of the classes `labels`,
    by models of the method `name`, each with its classifier; `columns` are those of their logits that are about
    these classes."""
    method, reads = methods.part(name, "method"), methods.part(name, "settings").READS
    rows = torch.isin(test.labels, torch.tensor(labels)).nonzero().flatten()
    classifiers = [{key: tensor.to(where) for key, tensor in one.items()} for one in classifiers]
    columns = columns.to(where)
    found = []
    with progress(len(rows), "test images") as done:
        for images in test_batches(test, rows, reads, where):
            logits = [method.logits(*of, images) for of in zip(models, classifiers, strict=True)]
            found.append(torch.stack([one[:, columns].argmax(dim=-1) for one in logits]))
            done(found[-1].shape[1])
    return torch.cat(found, dim=1).cpu(), test.labels[rows] - labels.start


def test_batches(test: TestImages, rows: Tensor, reads: str, where: torch.device) -> Iterator[Images]:
    """The test images `rows` as a method reads them, in batches on `where`, one ahead."""
    batches = rows.split(BATCH_SIZE.get(where.type, 256))
    if reads == "pixels":
        for pixels in sent((torch.from_numpy(test.packed[batch.numpy()]) for batch in batches), where):
            yield Images.of_pixels(normalise(pixels, test.preprocess))
    else:
        for batch in batches:
            yield Images.of_features(send(test.features[batch], where), send(test.hidden[batch], where))
