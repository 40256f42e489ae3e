"""What a training of HeBA leaves, written without one, and folders of images."""

from dataclasses import asdict

import torch
import torch.nn.functional as F

from heba import artifact
from heba.clip import backbone
from heba.embedded.suite import benchmark_image
from heba.methods.heba.settings import Settings

SHA256 = backbone.sha256(backbone.weights_file("tiny", "embedded"))
TINY = artifact.Backbone(name="tiny", pretrained="embedded", sha256=SHA256)


def settings_of(model):
    """The settings that a model was built with; the training's are the defaults."""
    blocks = {"start": model.start, "end": model.end, "ratio": model.ratio, "scale": model.scale}
    return Settings(**blocks, **asdict(model.variant))


def save(model, folder, dtype=torch.float32, **config):
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "method": "heba",
        "settings": settings_of(model).model_dump(),
        "class_names": ["cat", "dog"],
        "backbone": artifact.Backbone(name="tiny", pretrained="embedded", sha256="0" * 64),
        "protocol": "few_shot",
        "dataset": "eurosat",
        "suite": "embedded",
        "bf16": False,
    }
    artifact.write_tensors(model.adapters.state_dict(), folder, dtype)
    artifact.write_config(artifact.Config(**about | config), folder)


def save_classifier(weights, folder, **more):
    """Weights [n_classes, E], and numbers such as HeBA's scale."""
    numbers = {name: torch.tensor(value) for name, value in more.items()}
    artifact.write_classifier({"weights": F.normalize(weights, dim=-1)} | numbers, folder)


def photos_of(folder, classes, n):
    """`folder`, with a folder of `n` drawings for each of some classes of the embedded ImageNet."""
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(n):
            benchmark_image("imagenet", name, i).save(folder / name / f"{i:02}.png")
    return folder
