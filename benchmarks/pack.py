"""`python -m benchmarks.pack`: decoding, resizing and cropping test images, plain and ours.

With `--others` two ways that are not taken as well, and how many of their pixels differ from ours.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import open_clip
import torch
import typer
from PIL import Image
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader
from torchvision.io import ImageReadMode, read_image

from benchmarks import plain
from benchmarks.common import Rounds, Workers, check, in_turn, relative, table, way, write_images
from heba.clip.preprocess import Preprocess, decode, normalise
from heba.data.images import for_each_image, open_packed, pack_images


def of_box(path: Path, size: int) -> np.ndarray:
    """The crop alone resized, by Pillow's `box`, [3, size, size]. The bytes are not ours: Pillow keeps the box in
    fp32, and the order of rows and columns depends on it."""
    image = decode(path)
    new, (left, top) = crop_of(*image.size, size)
    x, y = image.width / new[0], image.height / new[1]
    box = (left * x, top * y, (left + size) * x, (top + size) * y)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box)).transpose(2, 0, 1)


def of_torch(path: Path, size: int) -> np.ndarray:
    """torchvision's decoder and torch's uint8 resize, [3, size, size]."""
    image = read_image(str(path), ImageReadMode.RGB)
    new, (left, top) = crop_of(image.shape[2], image.shape[1], size)
    image = interpolate(image[None], size=new[::-1], mode="bicubic", antialias=True)[0]
    return image[:, top : top + size, left : left + size].numpy()


def crop_of(width: int, height: int, size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """What an image is resized to, and left and top of the crop there, as in `preprocess.resize_and_crop`."""
    new = (int(size * width / min(width, height)), int(size * height / min(width, height)))
    return new, (round((new[0] - size) / 2), round((new[1] - size) / 2))


def main(
    images: int = typer.Option(400, min=1, help="Number of images, 500 x 375 pixels each."),
    size: int = typer.Option(224, min=1, help="Side of the packed images."),
    others: bool = typer.Option(False, help="Also the ways that are not taken."),
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
        ways = {"plain": way(run_plain, keep=False), "ours": way(run_ours)}
        for name, work in (("Pillow, box", of_box), ("torchvision", of_torch)) if others else ():

            def run_other(work=work) -> np.ndarray:
                return np.stack(list(for_each_image(lambda path: work(path, size), paths)))

            differ = 100 * float((run_other() != open_packed(out)).mean())
            print(f"{name}: {differ:.3g} % of the values are not ours", file=sys.stderr)
            ways[name] = way(run_other)
        results = in_turn(ways, rounds, "cpu")
    print(table(results, images, "images", "cpu", f"packing of {images} images at {size} pixels"))


if __name__ == "__main__":
    typer.run(main)
