"""The settings of CLIP-Adapter: a block of params.yaml."""

from pydantic import BaseModel, ConfigDict

from heba.data.prompts import Kind
from heba.fit.bounds import Below1, Count, Fraction, NotNegative, Positive
from heba.fit.work import Work, epochs_by_shots

TITLE = "CLIP-Adapter"
FAMILY = "adapter"
READS = "features"
NEW_CLASSES = True
DRAWS = True
EVALUATION: frozenset[str] = frozenset()


class Settings(BaseModel):
    """CLIP-Adapter. Its code has no configuration and names CoOp's command; these are CoOp's for ViT-B/16, which
    has 50 epochs on ImageNet with any number of shots.

    Attributes:
        prompts: what names a class; officially the data set's template.
        ratio: the share of the adapter's output in the feature.
        reduction: width of the features over width of the bottleneck.
        epochs: with 8 shots and more. epochs_few: with 2 to 7. epochs_one: with one.
        batch_size, lr, momentum, weight_decay: of SGD, with Dassl's schedule per epoch and drop_last.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompts: Kind = "template"
    ratio: Fraction = 0.2
    reduction: Count = 4
    epochs: Count = 200
    epochs_few: Count = 100
    epochs_one: Count = 50
    batch_size: Count = 32
    lr: Positive = 0.002
    momentum: Below1 = 0.9
    weight_decay: NotNegative = 0.0005


def epochs_of(settings: Settings, shots: int) -> int:
    return epochs_by_shots(shots, settings.epochs, settings.epochs_few, settings.epochs_one)


def problems(settings: Settings, depth: int | None, width: int | None) -> dict[str, str]:
    return {}


def work(settings: Settings, n_images: int, n_classes: int) -> Work:
    epochs = epochs_of(settings, n_images // n_classes)
    return Work(steps=epochs * max(1, n_images // settings.batch_size), images=0, prompts=0)
