"""The settings of ProGrad: a block of params.yaml."""

from pydantic import BaseModel, ConfigDict

from heba.data.prompts import Kind
from heba.fit.bounds import Below1, Context, Count, NotNegative, Positive, Words
from heba.fit.work import Work, epochs_by_shots, steps_per_epoch

TITLE = "ProGrad"
FAMILY = "prompt"
READS = "features"
NEW_CLASSES = True
DRAWS = True
EVALUATION: frozenset[str] = frozenset()


class Settings(BaseModel):
    """ProGrad for few-shot learning (rn50.yaml, _ep100, _ep50); it has no configuration for a ViT.

    Attributes:
        prompts: what frozen CLIP, the teacher, reads; officially the data set's template.
        words: where the last vectors of the context begin, one vector a word; the others begin at zero. None: all
            begin at random.
        context: M, the number of vectors.
        share: lambda, the share of the conflict with the teacher that a step leaves out; with 8 shots and more.
        share_few: with fewer.
        temperature: T, of teacher and learner.
        epochs: with 8 shots and more. epochs_few: with 2 to 7. epochs_one: with one.
        batch_size, lr, momentum, weight_decay: of SGD, with Dassl's schedule per epoch and drop_last.
        views: train on the views that are there already, in place of crops drawn anew in every epoch.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompts: Kind = "template"
    words: Words | None = "a photo of a"
    context: Context = 16
    share: NotNegative = 1.0
    share_few: NotNegative = 1.0
    temperature: Positive = 1.0
    epochs: Count = 200
    epochs_few: Count = 100
    epochs_one: Count = 50
    batch_size: Count = 32
    lr: Positive = 0.002
    momentum: Below1 = 0.9
    weight_decay: NotNegative = 0.0005
    views: bool = False


def epochs_of(settings: Settings, shots: int) -> int:
    """The epochs of a training with so many images a class."""
    return epochs_by_shots(shots, settings.epochs, settings.epochs_few, settings.epochs_one)


def share_of(settings: Settings, shots: int) -> float:
    """The share of a training with so many images a class."""
    return settings.share if shots >= 8 else settings.share_few


def problems(settings: Settings, depth: int | None, width: int | None) -> dict[str, str]:
    """What does not fit together, by setting."""
    n = len(settings.words.split()) if settings.words else 0
    if n > settings.context:
        return {"words": f"{n} words do not fit into a context of {settings.context}"}
    return {}


def work(settings: Settings, n_images: int, n_classes: int) -> Work:
    """Both gradients of a step go back through the texts."""
    epochs = epochs_of(settings, n_images // n_classes)
    images = 0 if settings.views else settings.batch_size
    return Work(epochs * steps_per_epoch(n_images, settings.batch_size), images, 2 * n_classes)
