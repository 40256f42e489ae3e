"""Stage `views`: what the frozen CLIP makes of the few-shot images, for all methods that train on frozen features.

out/views/<dataset>/<shots>-<seed>.safetensors   of train and val, as `heba.data.images.Views` has them
"""

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from heba import methods
from heba.data.datasets import as_seen
from heba.data.frozen import encode_views
from heba.data.images import Views
from pipeline.core import code
from pipeline.core.params import Params, stage_of
from pipeline.core.paths import OUT, keep_only, new_file, reading, writable
from pipeline.core.trainings import counted, samples
from pipeline.stages.backbone import computing, load_backbone, read_record, use_bf16
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
        with (
            tqdm(total=len(files), desc="views of few-shot images", delay=2, unit="image") as bar,
            computing(params),
        ):
            views = encode_views(
                clip, folder, files, seed, passes, params.views.crop, as_seen(dataset), bar.update
            )
        tensors |= {f"{part}.{field.name}": getattr(views, field.name).contiguous() for field in fields(Views)}
    return tensors
