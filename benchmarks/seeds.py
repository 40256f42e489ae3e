"""`python -m benchmarks.seeds`: features of test images by the models of several seeds, apart and at once."""

import numpy as np
import torch
import torch.nn.functional as F
import typer

from benchmarks.common import Backbone, Device, Precision, Rounds, autocast, check, in_turn, make_model, table, way
from heba.clip.features import encode_images
from heba.clip.preprocess import normalise, preprocess_of
from heba.data.images import Images
from heba.methods.heba.model import AdaptedCLIP


def main(
    device: Device = "cpu",
    precision: Precision = "fp32",
    backbone: Backbone = "ViT-B-16-quickgelu",
    seeds: int = typer.Option(3, min=1, help="Number of models."),
    start: int = typer.Option(9, min=1, help="Their first adapted block; in the paper's transfer protocols 9."),
    images: int = typer.Option(16, min=1, help="Number of test images."),
    rounds: Rounds = 3,
) -> None:
    """Time the image side for several seeds: each by itself, and with the blocks below `start` shared."""
    first = make_model(backbone, device, start)
    models = [
        first,
        *(AdaptedCLIP(first.clip, start, first.end, 0.025).to(device).eval() for _ in range(seeds - 1)),
    ]
    preprocess = preprocess_of(first.clip)
    shape = (images, 3, preprocess.size, preprocess.size)
    packed = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    where = torch.device(device)

    def apart() -> torch.Tensor:
        with autocast(device, precision):
            return torch.stack([encode_images(packed, preprocess, one.encode_image, where) for one in models])

    @torch.no_grad()
    def at_once() -> torch.Tensor:
        batch = Images.of_pixels(normalise(torch.from_numpy(packed).to(device), preprocess))
        with autocast(device, precision):
            hidden = [one.encode_image_from(batch.after_blocks(one.clip, start - 1)) for one in models]
        return torch.stack([F.normalize(x.float(), dim=-1).cpu() for x in hidden])

    check("image features", (apart() - at_once()).abs().max().item(), 0.0)
    results = in_turn({"apart": way(apart), "at once": way(at_once)}, rounds, device)
    what = f"{images} test images by {seeds} models with adapters from block {start}"
    title = f"features of {what}, {backbone}, {precision}"
    print(table(results, images * seeds, "images", device, title))


if __name__ == "__main__":
    typer.run(main)
