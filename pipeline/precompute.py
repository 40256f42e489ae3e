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
from safetensors.torch import save_file
from tqdm import tqdm

from heba.evaluation import encode_images
from heba.images import decode, resize_and_crop
from heba.model import class_features, cut_after_eot, embed_tokens, run_text_blocks
from heba.prompts import build_prompts, read_descriptions, tokenize
from heba.splits import class_names, read_split
from pipeline.backbone import device, load_backbone, use_bf16
from pipeline.download import template_of, verified_folder
from pipeline.params import Params
from pipeline.paths import OUT, new_folder

TEXT_BATCH = 256


def folder_of(dataset: str) -> Path:
    return OUT / "precompute" / dataset


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
    _check_vocabulary(params, tokens)
    tokens = cut_after_eot(tokens)
    index = torch.tensor(prompts.class_index)
    starts = {params.adapter.start}
    if dataset == params.transfer.source or dataset not in params.datasets:
        starts.add(params.transfer.adapter.start)
    starts |= {params.transfer.adapter.start} if dataset in params.transfer.targets else set()
    features = []
    hidden: dict[int, list[torch.Tensor]] = {start: [] for start in sorted(starts) if start > 1}
    with torch.no_grad():
        for first in tqdm(range(0, len(tokens), TEXT_BATCH), desc=f"texts of {dataset}", delay=2):
            batch = tokens[first : first + TEXT_BATCH].to(device(params))
            with torch.autocast(device(params).type, torch.bfloat16, enabled=use_bf16(params)):
                features.append(run_text_blocks(clip, embed_tokens(clip, batch, 0), batch, 0).float().cpu())
            for start, chunks in hidden.items():
                chunks.append(embed_tokens(clip, batch, start - 1).float().cpu())
    all_features = torch.cat(features)
    tensors = {
        "tokens": tokens.contiguous(),
        "class_index": index,
        "features": all_features,
        "classifier": class_features(all_features, index, len(names)),
    } | {f"hidden.{start}": torch.cat(chunks) for start, chunks in hidden.items()}
    save_file(tensors, out / "text.safetensors")
    info = {"class_names": names, "prompts": prompts.texts, "fallback": prompts.fallback, "cut": cut}
    (out / "prompts.json").write_text(json.dumps(info, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _check_vocabulary(params: Params, tokens: torch.Tensor) -> None:
    if params.backbone.name == "tiny":
        from heba.embedded.model import known_tokens

        unknown = set(tokens.flatten().tolist()) - known_tokens() - {0}
        if unknown:
            raise ValueError(f"the tiny CLIP has no embedding for the tokens {sorted(unknown)}; use other words")


def _images(params: Params, test: list, folder: Path, clip, out: Path) -> None:
    size = clip.visual.image_size
    size = size[0] if isinstance(size, tuple | list) else size
    packed = np.lib.format.open_memmap(
        out / "images.npy", mode="w+", dtype=np.uint8, shape=(len(test), 3, size, size)
    )
    for i, (file, _, _) in enumerate(tqdm(test, desc="pack test images", delay=2, unit="image")):
        packed[i] = resize_and_crop(decode(folder / file), size)
    packed.flush()

    def encode(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=use_bf16(params)):
            return clip.encode_image(images)

    with tqdm(total=len(test), desc="zero-shot image features", delay=2, unit="image") as bar:
        features = encode_images(packed, encode, device(params), progress=bar.update)
    labels = torch.tensor([label for _, label, _ in test])
    save_file({"labels": labels, "features": features}, out / "test.safetensors")
