"""`python -m benchmarks.adapter_dtype`: are the predictions of adapters that were rounded to fp16 the same?

Reads params.yaml and out/, so run it after `dvc repro` with `adapter_dtype: fp32`; compares the confusion matrices
of base_to_novel with and without rounding. (After a repro with fp16 both are the rounded ones.)
"""

from typing import Any

import torch
import typer

from heba import artifact, methods
from heba.clip.preprocess import preprocess_of
from heba.evaluation.report import classification_report
from pipeline.commands.common import run_app
from pipeline.core.params import Params, ParamsError, load_params
from pipeline.core.trainings import Training, can, trainings
from pipeline.stages.backbone import Tokenizer, computing, device, load_backbone
from pipeline.stages.evaluate import groups_of, predict
from pipeline.stages.precompute import read_classes, read_test

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def full_and_rounded(
    clip: Any, tokenizer: Tokenizer, params: Params, training: Training
) -> list[tuple[dict, dict]]:
    """What a training predicts, as it is on disk and rounded to fp16: the reports of
    heba.evaluation.report.classification_report for base classes, and for novel ones where the method can."""
    method = methods.part(training.method, "method")
    model, config = artifact.load(clip, training.folder)
    classes = read_classes(training.dataset, config.method_settings().prompts, tokenizer)
    test = read_test(training.dataset, preprocess_of(clip))

    def reports() -> list[dict]:
        found = []
        for group, (labels, trained) in groups_of(training.protocol, len(classes.names)).items():
            if not can(training.method, training.protocol, group):
                continue
            part = classes.select(labels)
            with computing(params):
                classifier = method.classifier(model, part, config.method_settings(), trained)
                one, where = ([model], training.method, [classifier]), device(params)
                (predicted,), targets = predict(*one, test, labels, torch.arange(len(labels)), where)
            found.append(classification_report(predicted, targets, part.names))
        return found

    full = reports()
    with torch.no_grad():
        for parameter in method.trained(model).parameters():
            parameter.copy_(parameter.half())
    rounded = reports()
    method.detach(model)
    return list(zip(full, rounded, strict=True))


@app.command()
def main() -> None:
    """Compare the predictions of all adapters of base_to_novel with those of the same in fp16."""
    params = load_params()
    if params.adapter_dtype != "fp32":
        raise ParamsError("adapter_dtype: run `dvc repro` with fp32 first, else both sides are rounded")
    backbone = load_backbone(params)
    wanted = [t for t in trainings(params) if t.protocol == "base_to_novel" and artifact.read_tensors(t.folder)]
    pairs = [pair for training in wanted for pair in full_and_rounded(*backbone, params, training)]
    differ = sum(full["confusion"] != rounded["confusion"] for full, rounded in pairs)
    worst = max((abs(full["accuracy"] - rounded["accuracy"]) for full, rounded in pairs), default=0.0)
    print(
        f"{len(pairs)} test sets; {differ} with another confusion matrix; "
        f"accuracy differs by at most {worst:.2f} points"
    )


if __name__ == "__main__":
    run_app(app)
