"""Stage `views`: what the frozen CLIP makes of the few-shot images, for all methods that train on frozen features.

out/views/<dataset>/<shots>-<seed>.safetensors   of train and val, as `heba.data.images.Views` has them
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from heba import methods
from heba.clip.features import BATCH_SIZE, image_features
from heba.clip.preprocess import preprocess_of
from heba.clip.towers import feature_width
from heba.data.datasets import as_seen
from heba.data.images import Views, for_each_image, make_views
from pipeline.core import code
from pipeline.core.params import Params, stage_of
from pipeline.core.paths import OUT, keep_only, new_file, reading, writable
from pipeline.core.trainings import counted, samples
from pipeline.stages.backbone import computing, device, load_backbone, read_record, use_bf16
from pipeline.stages.download import manifest_path, verified_folder
from pipeline.stages.split import read_sample, sample_path

INPUTS = "inputs"  # in a file's metadata, the hash of all it was made of


def views_path(dataset: str, shots: int, seed: int) -> Path:
    return OUT / "views" / dataset / f"{shots}-{seed}.safetensors"


def needs_views(method: str) -> bool:
    """Whether a method trains on frozen features."""
    about = methods.part(method, "settings")
    return about.READS == "features" and about.DRAWS


def views_sha256(dataset: str, shots: int, seed: int) -> str:
    """The hash of a sample's file."""
    path = views_path(dataset, shots, seed)
    with reading(path, stage_of("views", dataset)):
        return hashlib.sha256(path.read_bytes()).hexdigest()


def read_views(dataset: str, shots: int, seed: int) -> dict[str, Views]:
    """The frozen features of a few-shot sample's images, of train and of val."""
    path = views_path(dataset, shots, seed)
    names = [field.name for field in fields(Views)]
    with reading(path, stage_of("views", dataset)), safe_open(path, "pt") as file:
        return {part: Views(*(file.get_tensor(f"{part}.{name}") for name in names)) for part in ("train", "val")}


def run(params: Params, dataset: str) -> str:
    """Bring the views of all samples of `dataset` up to date; none where no method trains on frozen features.
    Returns a line about it."""
    wanted = sorted({(shots, seed) for _, shots, seed in samples(params, dataset)})
    if not any(map(needs_views, params.methods)):
        wanted = []
    folder = OUT / "views" / dataset
    with writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        keep_only(folder, [views_path(dataset, shots, seed) for shots, seed in wanted])
    clip = None
    made: list[str] = []
    for shots, seed in wanted:
        path, digest = views_path(dataset, shots, seed), inputs_sha256(params, dataset, shots, seed)
        if not kept(path, digest):
            clip = clip or load_backbone(params)[0]
            tensors = encode_sample(params, clip, dataset, shots, seed)
            with new_file(path) as file:
                save_file(tensors, file, {INPUTS: digest})
            made.append(path.stem)
    return counted(made, len(wanted), "samples") if wanted else "no method trains on frozen features"


def kept(path: Path, digest: str) -> bool:
    """Whether the file at `path` is of these inputs."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get(INPUTS) == digest
    except (SafetensorError, OSError):  # none, or a damaged one
        return False


def inputs_sha256(params: Params, dataset: str, shots: int, seed: int) -> str:
    """The hash of all that the views of a sample depend on."""
    what = [seed, params.views.model_dump(), read_record(), use_bf16(params), params.threads]
    what.append(code.sha256(*code.VIEWS))
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode())
    for file in (manifest_path(dataset), sample_path(dataset, shots, seed)):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:32]


def encode_sample(params: Params, clip: Any, dataset: str, shots: int, seed: int) -> dict[str, Tensor]:
    """The tensors of a sample's file."""
    sample, folder = read_sample(dataset, shots, seed), verified_folder(params, dataset) / "images"
    tensors: dict[str, Tensor] = {}
    for part in ("train", "val"):
        files = [file for file, _, _ in sample[part]]
        passes = params.views.passes if part == "train" else 0
        views = encode_views(params, clip, folder, files, as_seen(dataset), seed, passes)
        tensors |= {f"{part}.{field.name}": getattr(views, field.name).contiguous() for field in fields(Views)}
    return tensors


def encode_views(
    params: Params, clip: Any, folder: Path, files: list[str], seen: bool, seed: int, passes: int
) -> Views:
    """The views of `files` below `folder`, opened as seen or not, `passes` random ones of each."""
    preprocess, where = preprocess_of(clip), device(params)
    make = partial(
        make_views,
        folder,
        preprocess=preprocess,
        seed=seed,
        passes=passes,
        smallest=params.views.crop,
        as_seen=seen,
    )
    size = max(1, BATCH_SIZE.get(where.type, 256) // (2 + passes))
    features: list[Tensor] = []
    hidden: list[Tensor] = []
    with tqdm(total=len(files), desc="views of few-shot images", delay=2, unit="image") as bar, computing(params):
        for batch in batches(for_each_image(make, files), size):
            found = image_features(clip, torch.cat(batch).to(where))
            for parts, tensor in zip((features, hidden), found, strict=True):
                parts.append(tensor.float().cpu().unflatten(0, (len(batch), 2 + passes)))
            bar.update(len(batch))
    if not files:  # a data set without val images
        features, hidden = [torch.zeros(0, 2 + passes, feature_width(clip))], [torch.zeros(0, 2 + passes, 0)]
    views, below = torch.cat(features).transpose(0, 1), torch.cat(hidden).transpose(0, 1)
    return Views(views[0], views[1], views[2:], below[0], below[1], below[2:])


def batches(items: Iterator[Tensor], size: int) -> Iterator[list[Tensor]]:
    """`items`, `size` at a time."""
    batch: list[Tensor] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
