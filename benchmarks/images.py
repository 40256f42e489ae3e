"""`python -m benchmarks.images`: features of test images, plain from the files and ours from the packed images."""

import tempfile
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
import typer
from torch.utils.data import DataLoader

from benchmarks import plain
from benchmarks.common import (
    Backbone,
    Device,
    Precision,
    Rounds,
    Workers,
    autocast,
    check,
    in_turn,
    make_model,
    relative,
    table,
    way,
    write_images,
)
from heba.clip.device import in_bf16
from heba.clip.features import encode_images
from heba.clip.preprocess import preprocess_of
from heba.data.images import open_packed, pack_images


def measure(
    device: str, precision: str, backbone: str, images: int, batch_size: int, workers: int, rounds: int
) -> dict[str, dict[str, Any]]:
    """What `in_turn` gives for the image side of an evaluation."""
    model = make_model(backbone, device)
    if precision == "bf16":
        in_bf16(model.clip)
    preprocess = preprocess_of(model.clip)
    size = preprocess.size
    scales = torch.full((model.end - model.start + 1,), model.scale, device=device)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_images(Path(folder), images)
        pack_images(paths, preprocess, Path(folder) / "images.npy", lambda n: None)
        packed = open_packed(Path(folder) / "images.npy")
        files = plain.ImageFiles(paths, [0] * images, open_clip.image_transform(size, is_train=False))
        loader: DataLoader = DataLoader(files, batch_size or 100, num_workers=workers)

        def run_plain() -> torch.Tensor:
            with autocast(device, precision):
                return plain.image_features(model, loader, scales, device)

        def encode(batch: torch.Tensor) -> torch.Tensor:
            with autocast(device, precision):
                return model.encode_image(batch)

        def run_ours() -> torch.Tensor:
            found = encode_images(packed, preprocess, encode, torch.device(device), batch_size=batch_size or None)
            return F.normalize(found, dim=-1)

        check("image features", relative(run_ours(), run_plain()), 1e-4 if precision == "fp32" else 3e-2)
        return in_turn({"plain": way(run_plain, keep=False), "ours": way(run_ours)}, rounds, device)


def main(
    device: Device = "cpu",
    precision: Precision = "fp32",
    backbone: Backbone = "ViT-B-16-quickgelu",
    images: int = typer.Option(32, min=1, help="Number of test images, 500 x 375 pixels each."),
    batch_size: int = typer.Option(0, min=0, help="0: 100 plain as in CoOp, ours as it is set."),
    workers: Workers = 0,
    rounds: Rounds = 3,
) -> None:
    """Time the image side of an evaluation, plain and ours, in turn."""
    results = measure(device, precision, backbone, images, batch_size, workers, rounds)
    title = f"features of {images} test images, {backbone}, {precision}"
    print(table(results, images, "images", device, title))


if __name__ == "__main__":
    typer.run(main)
