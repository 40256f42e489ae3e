"""The one table of data sets, in the order of the papers: names, titles, and the prompt of a class that has no
description. Nothing here imports torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DataSet:
    """A benchmark.

    Attributes:
        title: its name in tables.
        template: the prompt of a class without descriptions, after CoOp; {} is the class name.
        drawn: the template of its stand-in in the embedded suite, where that is another one.
        variant: a shifted test set of ImageNet, for domain generalisation alone.
    """

    title: str
    template: str = "a photo of a {}."
    drawn: str | None = None
    variant: bool = False


TABLE = {
    "imagenet": DataSet("ImageNet"),
    "caltech101": DataSet("Caltech101"),
    "oxford_pets": DataSet("OxfordPets", "a photo of a {}, a type of pet."),
    "stanford_cars": DataSet("StanfordCars"),
    "oxford_flowers": DataSet("Flowers102", "a photo of a {}, a type of flower."),
    "food101": DataSet("Food101", "a photo of {}, a type of food."),
    "fgvc_aircraft": DataSet(
        "FGVCAircraft", "a photo of a {}, a type of aircraft.", drawn="a photo of the digit {}."
    ),
    "sun397": DataSet("SUN397"),
    "dtd": DataSet("DTD", "{} texture.", drawn="a photo of a {} texture."),
    "eurosat": DataSet("EuroSAT", "a centered satellite photo of {}.", drawn="a satellite photo of {}."),
    "ucf101": DataSet("UCF101", "a photo of a person doing {}."),
    "imagenetv2": DataSet("ImageNetV2", variant=True),
    "imagenet_sketch": DataSet("ImageNet-Sketch", variant=True),
    "imagenet_a": DataSet("ImageNet-A", variant=True),
    "imagenet_r": DataSet("ImageNet-R", variant=True),
}
# CoOp's selection of CLIP's 80 templates for ImageNet, to which the data set's own is added; and what stands for
# it where the embedded suite's CLIP, which knows few words, reads the prompts.
ENSEMBLE = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
DRAWN_ENSEMBLE = ("a photo of a {}.", "a picture of a {}.", "a {}.")
BENCHMARKS = tuple(name for name, about in TABLE.items() if not about.variant)
VARIANTS = tuple(name for name, about in TABLE.items() if about.variant)


def as_seen(name: str) -> bool:
    """How the images of a data set are opened (`heba.clip.preprocess.to_rgb`): own ones as a viewer shows them,
    those of a benchmark as its official code opens them."""
    return name not in TABLE


def title(name: str) -> str:
    """The name of a data set in tables; own data has none but its name."""
    return TABLE[name].title if name in TABLE else name


def order(name: str) -> tuple[int, str]:
    """Sort key of data sets: the papers' order, then own data by name."""
    return list(TABLE).index(name) if name in TABLE else len(TABLE), name


def ensemble(own: str, embedded: bool) -> list[str]:
    """The templates of an ensemble: those of all data sets, and a data set's `own`."""
    return list(dict.fromkeys([*(DRAWN_ENSEMBLE if embedded else ENSEMBLE), own]))


def template(name: str, embedded: bool) -> str:
    """The prompt of classes without a description, for real images or for the embedded suite's stand-in."""
    about = TABLE[name]
    return about.drawn if embedded and about.drawn else about.template
