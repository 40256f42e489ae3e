"""The oracle of methods on frozen features, in the form in which a method gets its data.

Uses every case in $HEBA_SHARED/oracle/methods (default ../shared), or, where that is
not there, the copy in data/methods.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from heba.clip.features import Classes
from heba.data.images import Images, LabelledImages, Views
from tests.oracle.device import DEVICE, GPU_TOLERANCE

COPY = Path(__file__).parent / "data" / "methods"
SHARED = Path(os.environ.get("HEBA_SHARED", Path(__file__).parents[3] / "shared")) / "oracle" / "methods"
ROOT = SHARED if SHARED.is_dir() else COPY


def cases(method):
    """The folders of a method's cases: its own folder, and every other one of the same name with a suffix."""
    return sorted(
        path.parent for path in ROOT.glob(f"{method}*/oracle.json") if read(path.parent)["method"] == method
    )


def read(folder):
    return json.loads((folder / "oracle.json").read_text())


@dataclass
class Case:
    """A case: what oracle.json says, its tensors, and the frozen model that its features are of."""

    about: dict
    tensors: dict
    clip: SimpleNamespace


def load(folder):
    about, tensors = read(folder), load_file(folder / "oracle.safetensors")
    projection = tensors.get("projection")
    texts = [t for name, t in tensors.items() if name in ("text.raw", "base_text_features")]
    dim = (
        projection.shape[1]
        if projection is not None
        else about["settings"].get("dim", texts[0].shape[-1] if texts else 0)
    )
    visual = SimpleNamespace(proj=None if projection is None else projection.to(DEVICE))
    scale, text = torch.tensor(100.0).log().to(DEVICE), torch.zeros(1, dim, device=DEVICE)
    return Case(about, tensors, SimpleNamespace(visual=visual, logit_scale=scale, text_projection=text))


def train_images(case, hidden=False):
    """The training images of a case: `plain` and `flipped` are the first two of its passes."""
    views, labels = case.tensors["train.views"], case.tensors["train.labels"]
    return labelled(views, labels, hidden)


def val_images(case, hidden=False):
    return labelled(case.tensors["val.features"][None], case.tensors["val.labels"], hidden)


def labelled(views, labels, hidden=False):
    nothing = views.new_zeros(*views.shape[:2], 0)
    features, below = (nothing, views) if hidden else (views, nothing)
    flipped = min(1, len(views) - 1)
    made = Views(features[0], features[flipped], features, below[0], below[flipped], below)
    return LabelledImages([], labels.tolist(), made)


def images(features, hidden=False):
    """Test images as a method reads them."""
    nothing = features.new_zeros(len(features), 0)
    return Images.of_features(*((nothing, features) if hidden else (features, nothing)))


def no_tokenizer(texts):
    raise AssertionError("a method on frozen features has no prompts of its own")


def classes(raw):
    """The classes of raw text features [classes, prompts, dim]."""
    n, prompts, _ = raw.shape
    index = torch.arange(n).repeat_interleave(prompts)
    return Classes(
        [f"class {i}" for i in range(n)], torch.zeros(n * prompts, 1), index, raw.flatten(0, 1), no_tokenizer
    )


def relative(found, expected):
    """The largest difference, relative to the largest entry; `pytest -s` shows it. On a GPU 0 within its limit."""
    found, expected = found.double().cpu(), expected.double().cpu()
    far = ((found - expected).abs().max() / expected.abs().max()).item()
    print(f"{os.environ.get('PYTEST_CURRENT_TEST', '').rpartition(' ')[0]}: {far:.1e} relative")
    return 0.0 if DEVICE.type == "cuda" and far < GPU_TOLERANCE else far


def normalised(x):
    return F.normalize(x, dim=-1)
