"""Stage `precompute`: what the frozen CLIP makes of a data set, once for all seeds, shots and ablations.

out/precompute/<dataset>/
    prompts.json       class names, prompts, classes without descriptions, prompts that had to be cut
    text.safetensors   tokens, class_index, features of all prompts, the zero-shot classifier, and
                       hidden.<start>: frozen states of all prompts below the first adapted block
    images.npy         [n, 3, size, size] uint8: test images, decoded, resized and cropped
    test.safetensors   labels and the zero-shot image features of the test images
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from heba.clip.features import class_features, encode_images, encode_prompts
from heba.clip.preprocess import preprocess_of
from heba.clip.towers import cut_texts, embed_tokens, encode_text_plain
from heba.data.images import open_packed, pack_images
from heba.data.prompts import build_prompts, read_descriptions, tokenize
from heba.data.splits import class_names, read_split
from pipeline.core.params import Params, stage_of
from pipeline.core.paths import OUT, new_folder, reading
from pipeline.stages.backbone import device, load_backbone, use_bf16
from pipeline.stages.download import template_of, verified_folder

TEXT_BATCH = 256


def folder_of(dataset: str) -> Path:
    return OUT / "precompute" / dataset


def read_names(dataset: str) -> list[str]:
    """The names of all classes."""
    path = folder_of(dataset) / "prompts.json"
    with reading(path, stage_of("precompute", dataset)):
        names = json.loads(path.read_text(encoding="utf-8"))["class_names"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("class_names must be a list of names")
    return names


def read_texts(dataset: str) -> dict[str, torch.Tensor]:
    """The tensors of text.safetensors."""
    path = folder_of(dataset) / "text.safetensors"
    with reading(path, stage_of("precompute", dataset)):
        tensors = load_file(path)
        n = len(tensors["class_index"])
        if len(tensors["tokens"]) != n or len(tensors["features"]) != n:
            raise ValueError("tokens, class_index and features have different lengths")
    return tensors


def read_test(dataset: str, size: int) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
    """The packed test images [n, 3, size, size], and the tensors of test.safetensors."""
    packed, path = folder_of(dataset) / "images.npy", folder_of(dataset) / "test.safetensors"
    with reading(path, stage_of("precompute", dataset)):
        test = load_file(path)
        n = len(test["labels"])
        if len(test["features"]) != n:
            raise ValueError("labels and features have different lengths")
    with reading(packed, stage_of("precompute", dataset)):
        images = open_packed(packed)
        if images.shape != (n, 3, size, size) or images.dtype != np.uint8:
            raise ValueError(f"{images.dtype} {images.shape}, for {n} images of {size} x {size} pixels")
    return images, test


def run(params: Params, dataset: str) -> None:
    """Write out/precompute/<dataset> (see the module's docstring)."""
    data = verified_folder(params, dataset, images=True)
    split = read_split(data / "split.json")
    names = class_names(split)
    clip, tokenizer = load_backbone(params)
    with new_folder(folder_of(dataset)) as out:
        _texts(params, dataset, names, data, clip, tokenizer, out)
        _images(params, split["test"], data / "images", clip, out)


def _texts(params: Params, dataset: str, names: list[str], data: Path, clip, tokenizer, out: Path) -> None:
    prompts = build_prompts(names, read_descriptions(data / "descriptions.json"), template_of(params, dataset))
    if prompts.fallback:
        print(f"{dataset}: no description, template used: {', '.join(prompts.fallback)}", file=sys.stderr)
    tokens, cut = tokenize(prompts.texts, tokenizer)
    for text in cut:
        print(f"{dataset}: longer than {tokens.shape[1]} tokens, cut: {text!r}", file=sys.stderr)
    tokens = cut_texts(clip, tokens)
    index = torch.tensor(prompts.class_index)
    where = device(params)

    def encode(batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast(where.type, torch.bfloat16, enabled=use_bf16(params)):
            return encode_text_plain(clip, batch)

    with tqdm(total=len(tokens), desc=f"texts of {dataset}", delay=2, unit="prompt") as bar:
        features = encode_prompts(clip, tokens, encode, where, progress=bar.update)
    tensors = {
        "tokens": tokens.contiguous(),
        "class_index": index,
        "features": features,
        "classifier": class_features(features, index, len(names)),
    } | {f"hidden.{start}": frozen_states(clip, tokens, start, where) for start in trained_from(params, dataset)}
    save_file(tensors, out / "text.safetensors")
    info = {"class_names": names, "prompts": prompts.texts, "fallback": prompts.fallback, "cut": cut}
    (out / "prompts.json").write_text(json.dumps(info, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def trained_from(params: Params, dataset: str) -> list[int]:
    """The first adapted blocks, above 1, of the trainings on `dataset`."""
    starts = {params.adapter.start} if dataset in [*params.datasets, *params.own] else set()
    if dataset == params.transfer.source:
        starts.add(params.transfer.adapter.start)
    return sorted(start for start in starts if start > 1)


@torch.no_grad()
def frozen_states(clip, tokens: torch.Tensor, start: int, where: torch.device) -> torch.Tensor:
    """Hidden states [n, length, width] (fp32, on the CPU) of `tokens` [n, length] below block `start`."""
    parts = [embed_tokens(clip, batch.to(where), start - 1).float().cpu() for batch in tokens.split(TEXT_BATCH)]
    return torch.cat(parts)


def _images(params: Params, test: list, folder: Path, clip, out: Path) -> None:
    preprocess = preprocess_of(clip)
    packed = out / "images.npy"
    with tqdm(total=len(test), desc="pack test images", delay=2, unit="image") as bar:
        pack_images([folder / file for file, _, _ in test], preprocess, packed, bar.update)

    def encode(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=use_bf16(params)):
            return clip.encode_image(images)

    with tqdm(total=len(test), desc="zero-shot image features", delay=2, unit="image") as bar:
        features = encode_images(open_packed(packed), preprocess, encode, device(params), progress=bar.update)
    labels = torch.tensor([label for _, label, _ in test])
    save_file({"labels": labels, "features": features}, out / "test.safetensors")
