"""`python -m benchmarks.run`: one data set from image files to base and novel accuracy, plain and ours."""

import tempfile
from pathlib import Path

import numpy as np
import open_clip
import torch
import typer
from torch.utils.data import DataLoader

from benchmarks import plain
from benchmarks.common import (
    Backbone,
    Classes,
    Device,
    Precision,
    Rounds,
    Workers,
    autocast,
    check,
    in_turn,
    make_model,
    prompt_tokens,
    relative,
    table,
    way,
    write_images,
)
from heba.clip.features import class_features, encode_images, encode_prompts
from heba.clip.preprocess import decode, preprocess_of
from heba.clip.towers import text_lengths
from heba.data.images import for_each_image, open_packed, pack_images
from heba.data.splits import base_labels
from heba.fit.draws import TextBank, step_classes
from heba.fit.run import Run
from heba.methods.heba.settings import Settings
from heba.methods.heba.training import train


def main(
    device: Device = "cpu",
    precision: Precision = "fp32",
    backbone: Backbone = "ViT-B-16-quickgelu",
    classes: Classes = 8,
    prompts: int = typer.Option(20, min=1, help="Prompts per class."),
    shots: int = typer.Option(4, min=1, help="Training images per base class."),
    test: int = typer.Option(4, min=1, help="Test images per class."),
    epochs: int = typer.Option(1, min=1, help="Epochs of 16-image steps."),
    workers: Workers = 0,
    rounds: Rounds = 1,
) -> None:
    """Time a training and its evaluation, plain and ours, in turn."""
    if precision == "fp16":
        raise typer.BadParameter("ours trains in fp32 or bf16")
    model = make_model(backbone, device)
    preprocess = preprocess_of(model.clip)
    size = preprocess.size
    generator = torch.Generator().manual_seed(1)
    tokens = prompt_tokens(model, classes * prompts, generator).cpu()
    by_class = tokens.unflatten(0, (classes, prompts)).to(device)
    n_base = len(base_labels(classes))
    halves = [range(n_base), range(n_base, classes)]
    labels = [c for c in halves[0] for _ in range(shots)]
    test_labels = torch.arange(classes).repeat_interleave(test)
    settings = Settings(epochs=epochs)
    n_blocks = model.end - model.start + 1
    fixed = torch.full((n_blocks,), model.scale, device=device)
    start = {k: v.clone() for k, v in model.adapters.state_dict().items()}

    def accuracy(images: torch.Tensor, classifier: torch.Tensor, targets: torch.Tensor) -> float:
        return ((images @ classifier.T).argmax(-1) == targets).float().mean().item()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_paths = write_images(folder / "train", len(labels))
        test_paths = write_images(folder / "test", len(test_labels))

        def evaluate_plain() -> list[torch.Tensor]:
            features = []
            for half in halves:
                paths = [p for p, c in zip(test_paths, test_labels.tolist(), strict=True) if c in half]
                files = plain.ImageFiles(paths, [0] * len(paths), open_clip.image_transform(size, is_train=False))
                loader: DataLoader = DataLoader(files, 100, num_workers=workers)
                images = plain.image_features(model, loader, fixed, device)
                classifier = plain.classifier(model, by_class[half.start : half.stop], fixed)
                wanted = torch.tensor([c - half.start for c in test_labels.tolist() if c in half])
                accuracy(images, classifier, wanted)
                features += [images, classifier]
            return features

        def run_plain() -> None:
            model.adapters.load_state_dict(start)
            optimizer = torch.optim.SGD(model.adapters.parameters(), lr=0.0075, momentum=0.9, weight_decay=5e-4)
            files = plain.ImageFiles(train_paths, labels, plain.train_transform(size))
            loader: DataLoader = DataLoader(
                files, min(16, len(files)), shuffle=True, drop_last=True, num_workers=workers
            )
            for _ in range(epochs):
                for images, batch_labels in loader:
                    selected, targets = step_classes(batch_labels.tolist(), n_base, 5, generator)
                    scales = [torch.where(torch.rand(n_blocks) > 0.8, 2.25, 1.0).to(device) * 0.025 for _ in "ab"]
                    chosen = by_class[selected, torch.randint(0, prompts, (len(selected),))]
                    optimizer.zero_grad()
                    with autocast(device, precision):
                        loss = plain.step_loss(
                            model,
                            images.to(device),
                            chosen,
                            torch.tensor(targets, device=device),
                            (scales[0], scales[1]),
                            0.1,
                        )
                    loss.backward()
                    optimizer.step()
            evaluate_plain()

        def encode(function, batch: torch.Tensor) -> torch.Tensor:
            with autocast(device, precision):
                return function(batch)

        def evaluate_ours() -> list[torch.Tensor]:
            pack_images(test_paths, preprocess, folder / "images.npy", lambda n: None)
            packed = open_packed(folder / "images.npy")
            where = torch.device(device)
            images = encode_images(packed, preprocess, lambda x: encode(model.encode_image, x), where)
            texts = encode_prompts(model.clip, tokens, lambda x: encode(model.encode_text, x), where)
            features = []
            for half in halves:
                rows = (test_labels >= half.start) & (test_labels < half.stop)
                of_half = texts[half.start * prompts : half.stop * prompts]
                index = torch.arange(len(half)).repeat_interleave(prompts)
                classifier = class_features(of_half, index, len(half))
                accuracy(images[rows], classifier, test_labels[rows] - half.start)
                features += [images[rows], classifier]
            return features

        def run_ours() -> None:
            model.adapters.load_state_dict(start)
            pixels = for_each_image(
                lambda path: torch.from_numpy(np.array(decode(path)).transpose(2, 0, 1)), train_paths
            )
            base = tokens[: n_base * prompts]
            bank = TextBank(
                base.to(device), text_lengths(model.clip, base), list(range(0, len(base) + 1, prompts)), None
            )
            train(model, list(pixels), labels, bank, settings, Run(seed=1, bf16=precision == "bf16"))
            evaluate_ours()

        limit = 1e-4 if precision == "fp32" else 3e-2
        for ours, theirs in zip(evaluate_ours(), evaluate_plain(), strict=True):
            check("features after no training", relative(ours, theirs), limit)
        results = in_turn({"plain": way(run_plain, keep=False), "ours": way(run_ours)}, rounds, device)
    title = (
        f"{classes} classes x {prompts} prompts, {len(labels)} training images x {epochs} epochs, "
        f"{len(test_labels)} test images, {backbone}, {precision}"
    )
    seen = len(labels) * epochs + len(test_labels)
    print(table(results, seen, "images", device, title))


if __name__ == "__main__":
    typer.run(main)
