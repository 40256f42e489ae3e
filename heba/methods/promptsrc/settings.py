"""The settings of PromptSRC: a block of params.yaml."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from heba.data.prompts import Kind
from heba.fit.bounds import Below1, Context, Count, NotNegative, Positive, Words
from heba.fit.work import Work, steps_per_epoch

TITLE = "PromptSRC"
FAMILY = "prompt"
READS = "pixels"
NEW_CLASSES = True
DRAWS = True
EVALUATION: frozenset[str] = frozenset()


class Settings(BaseModel):
    """PromptSRC for ViT-B/16, for few-shot learning (vit_b16_c2_ep50_batch4_4+4ctx_few_shot.yaml).

    Attributes:
        ensemble: the texts of the frozen teacher: 60 of OpenAI's templates, or those that `prompts` names.
        prompts: of no effect but there; the context is learned.
        words: before a class name; the context begins as their first `text_context` tokens, and the others stay.
            None: it begins at random, alone before the name.
        text_context, image_context: M, the tokens of a context, in texts and in images.
        text_depth, image_depth: J, the first blocks of each tower that have a context of their own.
        text_weight, image_weight: of the distances from the teacher's features, in the loss.
        gpa_mean, gpa_std: of the Gaussian over the epochs, which count from 1, that the prompts are averaged by.
        epochs, batch_size, lr, momentum, weight_decay: of SGD, with Dassl's schedule per epoch and drop_last.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    ensemble: Literal["openai", "prompts"] = "openai"
    prompts: Kind = "template"
    words: Words | None = "a photo of a"
    text_context: Context = 4
    image_context: Context = 4
    text_depth: Count = 9
    image_depth: Count = 9
    text_weight: NotNegative = 25.0
    image_weight: NotNegative = 10.0
    gpa_mean: NotNegative = 30.0
    gpa_std: Annotated[float, Field(ge=1e-3, le=1e6, allow_inf_nan=False)] = 30.0
    epochs: Count = 50
    batch_size: Count = 4
    lr: Positive = 0.0025
    momentum: Below1 = 0.9
    weight_decay: NotNegative = 0.0005


def problems(settings: Settings, depth: int | None, width: int | None) -> dict[str, str]:
    depths = {"text_depth": settings.text_depth, "image_depth": settings.image_depth}
    return {
        name: f"{value} is beyond the last layer, {depth}, of the backbone"
        for name, value in depths.items()
        if depth and value > depth
    }


def work(settings: Settings, n_images: int, n_classes: int) -> Work:
    steps = steps_per_epoch(n_images, settings.batch_size)
    return Work(settings.epochs * steps, settings.batch_size, n_classes)
