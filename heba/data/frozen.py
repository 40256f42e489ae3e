"""What the frozen towers make of class names and of few-shot images, for all methods.

The callers say in which precision, by autocast, and show the progress.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heba.clip.features import BATCH_SIZE, Classes, encode_prompts, image_features
from heba.clip.preprocess import preprocess_of
from heba.clip.towers import cut_texts, encode_text_plain, feature_width
from heba.data.images import Views, for_each_image, make_views
from heba.data.prompts import KINDS, PARTS, Kind, Prompts

Progress = Callable[[int], object]


def encode_texts(
    clip: Any, prompts: Mapping[str, Prompts], tokens: Tensor, done: Progress = lambda n: None
) -> dict[str, Tensor]:
    """Encode the prompts of all `PARTS`, and say of each what it is.

    All are encoded together: a feature depends in its last bits on the texts beside it.

    Args:
        prompts: by part. tokens: [n_prompts, context], of their texts, part by part.
    Returns:
        tokens: [n_prompts, length], cut to what the tower reads. features: [n_prompts, E], not normalised.
        index, part: [n_prompts], the class, and the place in `PARTS`, of each.
    """
    tokens = cut_texts(clip, tokens)
    features = encode_prompts(
        clip, tokens, partial(encode_text_plain, clip), clip.logit_scale.device, progress=done
    )
    return {
        "tokens": tokens.contiguous(),
        "features": features,
        "index": torch.tensor([i for part in PARTS for i in prompts[part].class_index]),
        "part": torch.tensor([i for i, part in enumerate(PARTS) for _ in prompts[part].texts]),
    }


def classes_of(
    names: list[str], texts: Mapping[str, Tensor], kind: Kind, tokenizer: Callable[[list[str]], Tensor]
) -> Classes:
    """The classes `names` by their prompts of one kind, of what `encode_texts` gave."""
    parts = torch.tensor([PARTS.index(part) for part in KINDS[kind]])
    rows = torch.isin(texts["part"], parts).nonzero().flatten()
    rows = rows[texts["index"][rows].argsort(stable=True)]
    tokens, index, features = (texts[key][rows] for key in ("tokens", "index", "features"))
    return Classes(names, tokens, index, features, tokenizer)


def encode_views(
    clip: Any,
    folder: Path,
    files: Sequence[str],
    seed: int,
    passes: int,
    smallest: float,
    as_seen: bool,
    done: Progress = lambda n: None,
) -> Views:
    """Encode images and random crops of them (`heba.data.images.make_views`).

    Args:
        clip: An open_clip model, on the device that encodes.
        folder: The folder of the images.
        files: Their paths below it.
        seed: Of the crops.
        passes: Crops of each image.
        smallest: Of a crop, the smallest part of the image's area, 0 to 1.
        as_seen: How the files are opened (`heba.clip.preprocess.to_rgb`).
        done: Called after each batch with its number of images.
    """
    where, n = clip.logit_scale.device, 2 + passes
    make = partial(
        make_views,
        folder,
        preprocess=preprocess_of(clip),
        seed=seed,
        passes=passes,
        smallest=smallest,
        as_seen=as_seen,
    )
    images, size = for_each_image(make, list(files)), max(1, BATCH_SIZE.get(where.type, 256) // n)
    # Without files, as of the val images of some data sets, there are no features, of the same width.
    found = [[], []] if files else [[torch.zeros(0, n, feature_width(clip))], [torch.zeros(0, n, 0)]]
    while batch := list(islice(images, size)):
        for kept, tensor in zip(found, image_features(clip, torch.cat(batch).to(where)), strict=True):
            kept.append(tensor.float().cpu().unflatten(0, (len(batch), n)))
        done(len(batch))
    views, below = (torch.cat(kept).transpose(0, 1) for kept in found)
    return Views(views[0], views[1], views[2:], below[0], below[1], below[2:])
