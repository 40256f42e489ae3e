"""The embedded data sets: one small set for each of the 11 benchmarks and the 4 ImageNet variants.

All are drawn except one: `fgvc_aircraft` stands on scikit-learn's real handwritten digits. Nothing here
imports torch.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from heba.embedded import canvas, fields, objects

# One strength of the domain gap for all data sets, and for train, val and test alike.
SHIFT = 1.0
PER_CLASS = {"train": 24, "val": 4, "test": 20}


@dataclass(frozen=True)
class EmbeddedDataset:
    """What an embedded data set is: what it shows, and one drawing function per class."""

    title: str
    draw: dict[str, Callable[[np.random.Generator], Image.Image]]

    @property
    def class_names(self) -> list[str]:
        return list(self.draw)


def _painted(painters: dict[str, objects.Painter], upright: bool = False) -> dict[str, Callable]:
    return {name: objects.drawn(paint, upright) for name, paint in painters.items()}


def _filled(paint: Callable, names: list[str]) -> dict[str, Callable]:
    return {name: (lambda rng, n=name: paint(n, rng)) for name in names}


_O = objects
_GENERIC = _painted(
    {
        "fish": _O.fish,
        "mushroom": _O.mushroom,
        "balloon": _O.balloon,
        "lighthouse": _O.lighthouse,
        "clock": _O.clock,
        "snail": _O.snail,
        "spider web": _O.web,
        "traffic light": _O.traffic_light,
        "snowman": _O.snowman,
        "butterfly": _O.butterfly,
    }
)
_DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def _subset(names: list[str]) -> dict[str, Callable]:
    return {name: _GENERIC[name] for name in names}


DATASETS: dict[str, EmbeddedDataset] = {
    "imagenet": EmbeddedDataset("drawn generic things", _GENERIC),
    "caltech101": EmbeddedDataset(
        "more drawn things",
        _painted(
            {
                "star": _O.star,
                "anchor": _O.anchor,
                "chair": _O.chair,
                "mug": _O.mug,
                "umbrella": _O.umbrella,
                "lamp": _O.lamp,
                "pyramid": _O.pyramid,
                "scissors": _O.scissors,
                "stop sign": _O.stop_sign,
                "soccer ball": _O.soccer_ball,
            }
        ),
    ),
    "oxford_pets": EmbeddedDataset(
        "drawn faces of cats and dogs",
        _painted(
            {
                "orange tabby cat": _O.face("orange", False, "stripes"),
                "brown dog": _O.face("brown", True, ""),
                "grey cat": _O.face("grey", False, ""),
                "spotted white dog": _O.face("white", True, "spots"),
                "black cat": _O.face("black", False, ""),
                "white cat": _O.face("white", False, ""),
                "black dog": _O.face("black", True, ""),
                "masked cream cat": _O.face("cream", False, "mask"),
                "orange dog": _O.face("orange", True, ""),
                "masked grey dog": _O.face("grey", True, "mask"),
            }
        ),
    ),
    "stanford_cars": EmbeddedDataset(
        "drawn cars by colour and body",
        _painted(
            {
                f"{colour} {body}": _O.car(colour, body)
                for colour, body in (
                    ("red", "convertible"),
                    ("blue", "hatchback"),
                    ("green", "van"),
                    ("yellow", "truck"),
                    ("white", "sedan"),
                    ("blue", "truck"),
                    ("red", "van"),
                    ("green", "convertible"),
                    ("black", "hatchback"),
                    ("yellow", "sedan"),
                )
            }
        ),
    ),
    "oxford_flowers": EmbeddedDataset(
        "drawn flowers",
        _painted(
            {
                "white daisy": _O.flower("white", 10, "yellow"),
                "sunflower": _O.flower("yellow", 12, "brown"),
                "red poppy": _O.flower("red", 4, "black"),
                "blue pansy": _O.flower("blue", 5, "yellow"),
                "purple violet": _O.flower("purple", 5, "white"),
                "pink aster": _O.flower("pink", 11, "yellow"),
                "orange lily": _O.flower("orange", 6, "brown"),
                "white jasmine": _O.flower("white", 5, "orange"),
                "yellow primrose": _O.flower("yellow", 5, "orange"),
                "pink dogwood": _O.flower("pink", 4, "green"),
            }
        ),
    ),
    "food101": EmbeddedDataset(
        "drawn food",
        _painted(
            {
                "pizza": _O.pizza,
                "doughnut": _O.doughnut,
                "sushi": _O.sushi,
                "pancakes": _O.pancakes,
                "fried egg": _O.fried_egg,
                "ice cream": _O.ice_cream,
                "hamburger": _O.hamburger,
                "salad": _O.salad,
                "chocolate cake": _O.cake,
                "french fries": _O.french_fries,
            }
        ),
    ),
    "fgvc_aircraft": EmbeddedDataset(
        "scikit-learn's handwritten digits (real images)",
        # Pretraining draws printed digits; the data set itself has the handwritten ones.
        _painted({name: _O.digit(i) for i, name in enumerate(_DIGITS)}, upright=True),
    ),
    "sun397": EmbeddedDataset(
        "drawn scenes",
        _filled(
            fields.scene,
            [
                "beach",
                "mountain",
                "desert",
                "forest",
                "city",
                "harbour",
                "night sky",
                "road",
                "bridge",
                "house",
            ],
        ),
    ),
    "dtd": EmbeddedDataset(
        "generated textures",
        _filled(
            fields.texture,
            [
                "striped",
                "dotted",
                "chequered",
                "zigzag",
                "bubbly",
                "grid",
                "spiral",
                "rings",
                "woven",
                "cracked",
            ],
        ),
    ),
    "eurosat": EmbeddedDataset(
        "drawn satellite-like tiles",
        _filled(
            fields.tile,
            [
                "fields",
                "forest",
                "highway",
                "industrial buildings",
                "pasture",
                "orchard",
                "residential buildings",
                "river",
                "lake",
                "sand",
            ],
        ),
    ),
    "ucf101": EmbeddedDataset(
        "drawn people in action",
        _painted({name: _O.action(name) for name in _O.POSES}),
    ),
    "imagenetv2": EmbeddedDataset("generic things, drawn anew", _GENERIC),
    "imagenet_sketch": EmbeddedDataset("generic things as sketches", _GENERIC),
    "imagenet_a": EmbeddedDataset(
        "generic things behind boxes",
        _subset(["fish", "mushroom", "clock", "snail", "traffic light", "butterfly"]),
    ),
    "imagenet_r": EmbeddedDataset(
        "generic things as posters",
        _subset(["fish", "balloon", "lighthouse", "spider web", "snowman"]),
    ),
}
VARIANTS = ("imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r")


def descriptions(key: str) -> dict[str, list[str]]:
    """{class name: [description, ...]}; the variants use those of the generic set."""
    everything = json.loads(Path(__file__).with_name("descriptions.json").read_text(encoding="utf-8"))
    return everything["imagenet" if key in VARIANTS else key]


def _handwritten() -> dict[int, np.ndarray]:
    """scikit-learn's digits by value, [n, 8, 8] with values 0..16."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return {value: digits.images[digits.target == value] for value in range(10)}


def benchmark_image(key: str, name: str, index: int) -> Image.Image:
    """Image `index` of class `name` in the style of the benchmark; the same picture every time."""
    # Seeds must not depend on Python's hash(), which differs from process to process.
    seed = [sum(ord(ch) * 31**i for i, ch in enumerate(f"{key}/{name}")) % 2**31, index]
    rng = np.random.default_rng(seed)
    picture = DATASETS[key].draw[name](rng)
    if key == "imagenet_sketch":
        return canvas.shrink(canvas.sketch(picture))
    if key == "imagenet_r":
        picture = canvas.rendition(picture)
    elif key == "imagenet_a":
        picture = canvas.occlude(picture, rng)
    strength = SHIFT * (1.2 if key in ("imagenet_a", "imagenetv2") else 1.0)
    return canvas.shift(canvas.shrink(picture), rng, strength)


def generate(key: str, root: Path, progress: Callable[[int], object] = lambda n: None) -> None:
    """Write `root`/images/<class>/<number>.png and `root`/split.json (CoOp's format).

    The bytes are the same every time. The variants have test images only.
    """
    info = DATASETS[key]
    handwritten = _handwritten() if key == "fgvc_aircraft" else None
    split: dict[str, list] = {"train": [], "val": [], "test": []}
    for label, name in enumerate(info.class_names):
        folder = root / "images" / name.replace(" ", "_")
        folder.mkdir(parents=True)
        index = 0
        for part, count in PER_CLASS.items():
            if key in VARIANTS and part != "test":
                continue
            for _ in range(count):
                if handwritten is not None:
                    grey = 255 - (handwritten[label][index] * 15.9).astype(np.uint8)
                    picture = Image.fromarray(grey).convert("RGB")
                    picture = picture.resize((canvas.SIZE, canvas.SIZE), Image.Resampling.BICUBIC)
                else:
                    picture = benchmark_image(key, name, index)
                path = folder / f"{index:04d}.png"
                picture.save(path)
                split[part].append([path.relative_to(root / "images").as_posix(), label, name])
                index += 1
                progress(1)
    (root / "split.json").write_text(json.dumps(split, indent=0) + "\n", encoding="utf-8")
