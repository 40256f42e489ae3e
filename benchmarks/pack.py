"""`python -m benchmarks.pack`: decoding, resizing and cropping test images, plain and ours."""

import tempfile
from pathlib import Path

import open_clip
import torch
import typer
from torch.utils.data import DataLoader

from benchmarks import plain
from benchmarks.common import Rounds, Workers, check, in_turn, relative, table, way, write_images
from heba.clip.preprocess import Preprocess, normalise
from heba.data.images import open_packed, pack_images


def main(
    images: int = typer.Option(400, min=1, help="Number of images, 500 x 375 pixels each."),
    size: int = typer.Option(224, min=1, help="Side of the packed images."),
    workers: Workers = 0,
    rounds: Rounds = 3,
) -> None:
    """Time the packing of test images: a DataLoader with open_clip's transform, and ours, in turn."""
    preprocess = Preprocess(size)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_images(Path(folder), images)
        files = plain.ImageFiles(paths, [0] * images, open_clip.image_transform(size, is_train=False))
        loader: DataLoader = DataLoader(files, 100, num_workers=workers)
        out = Path(folder) / "images.npy"

        def run_plain() -> torch.Tensor:
            return torch.cat([batch for batch, _ in loader])

        def run_ours() -> None:
            pack_images(paths, preprocess, out, lambda n: None)

        run_ours()
        check("pixels", relative(normalise(torch.from_numpy(open_packed(out)), preprocess), run_plain()), 1e-6)
        results = in_turn({"plain": way(run_plain, keep=False), "ours": way(run_ours)}, rounds, "cpu")
    print(table(results, images, "images", "cpu", f"packing of {images} images at {size} pixels"))


if __name__ == "__main__":
    typer.run(main)
