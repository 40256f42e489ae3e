"""A third method for tests, which learns from the images of its own classes alone, and cannot name others."""

import sys
from contextlib import contextmanager

from heba import methods

SETTINGS = """
from pydantic import BaseModel, ConfigDict

from heba.fit.work import Work

TITLE = "Probe"
FAMILY = "linear"
READS = "features"
NEW_CLASSES = False
DRAWS = True
EVALUATION = frozenset()


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    lr: float = 0.1


def problems(settings, depth, width):
    return {"lr": "must be above 0"} if settings.lr <= 0 else {}


def work(settings, n_images, n_classes):
    return Work(steps=0, images=0, prompts=0)
"""
METHOD = """
import torch
import torch.nn.functional as F
from torch import nn

from heba.clip.features import cosine_logits


class Probe(nn.Module):
    def __init__(self, clip, n_classes):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(n_classes, clip.text_projection.shape[1]))
        self.factor = clip.logit_scale.detach().exp()


def build(clip, n_classes, settings, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Probe(clip, n_classes)


def trained(model):
    return model


def fit(model, train, val, classes, settings, run):
    pass


def classifier(model, classes, settings, trained, progress=None):
    return {"weights": F.normalize(model.weights.detach(), dim=-1)}


def logits(model, classifier, images):
    return cosine_logits(model.factor, images.features, classifier["weights"])


def detach(model):
    pass
"""


@contextmanager
def installed(folder):
    """The method `probe`, in a folder of methods of its own."""
    (folder / "probe").mkdir(parents=True)
    for name, text in (("__init__", ""), ("settings", SETTINGS), ("method", METHOD)):
        (folder / "probe" / f"{name}.py").write_text(text)
    methods.__path__.append(str(folder))
    try:
        yield "probe"
    finally:
        methods.__path__.remove(str(folder))
        for name in [name for name in sys.modules if name.startswith("heba.methods.probe")]:
            del sys.modules[name]
