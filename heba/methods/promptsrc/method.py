"""PromptSRC (Khattak et al. 2023b): learned tokens in both towers, held near frozen CLIP, as the official code has
them.

With e the token embeddings of "<words> <name>.", and for the first blocks j of each tower a context P_j of texts
and Q_j of images,

    a text enters as [e_0, P_0, e_{1+M}, ...], an image as [CLS, patches, Q_0];
    before block j > 0, P_j and Q_j take the places of these tokens; after the last of them, they run through;
    p = exp(logit_scale) cos(I(x), T_k)

for the normalised features I(x) of an image and T_k of the text of a class. P_0 begins as the first tokens of
`words`, all others as N(0, 0.02^2). With I0(x) of the frozen tower, Z_k the normalised mean of its features of an
ensemble of texts (not normalised before the mean), and q = exp(logit_scale) cos(I0(x), Z_k), the loss is

    CE(p) + text_weight mean|T - Z| + image_weight mean|I - I0| + KL(softmax(q) || softmax(p)) / n_classes

with means over all elements, and the KL's over images. What counts in the end is the mean of the prompts at the
ends of the epochs e = 1, 2, ..., weighted in proportion to exp(-(e - gpa_mean)^2 / (2 gpa_std^2)). The training
itself goes on from the last prompts, not from their mean.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heba.clip.context import (
    Texts,
    check_image_context,
    check_text_context,
    embed_texts,
    encode_deep_texts,
    encode_embedded,
    encode_images,
    image_width,
    text_width,
)
from heba.clip.features import Classes, cosine_logits, encode_prompts, raw_class_features
from heba.clip.towers import embed_images, encode_text_plain, run_image_blocks
from heba.data.images import Images, LabelledImages
from heba.data.prompts import spoken_class_name
from heba.fit.average import Average, gaussian
from heba.fit.batches import Training, crops, descend, train_batches
from heba.fit.loop import dassl_schedule, make_optimizer
from heba.fit.prompts import begin_with_first, class_texts, count_words, draw_prompts
from heba.fit.run import Progress, Run, silent
from heba.fit.work import steps_per_epoch
from heba.methods.promptsrc.settings import Settings

TEMPLATES = 60  # the first of OpenAI's, "a photo of a {}." among them


class Prompts(nn.Module):
    """P_j, `text`, and Q_j, `image`."""

    def __init__(self, clip: Any, settings: Settings) -> None:
        super().__init__()
        self.text = draw_prompts(settings.text_depth, settings.text_context, text_width(clip))
        self.image = draw_prompts(settings.image_depth, settings.image_context, image_width(clip))


class Model(nn.Module):
    """A frozen CLIP and the prompts that are learned."""

    def __init__(self, clip: Any, settings: Settings) -> None:
        super().__init__()
        check_text_context(clip, "promptsrc", settings.text_depth, settings.text_context)
        check_image_context(clip, "promptsrc", settings.image_depth)
        self.clip = clip.requires_grad_(False).eval()
        self.learned = Prompts(clip, settings)

    def encode_image(self, images: Tensor) -> Tensor:
        """Features [n, E], not normalised, of preprocessed `images` [n, 3, size, size]."""
        return encode_images(self.clip, images, list(self.learned.image))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Features [n, E], not normalised, of `tokens` [n, context], those at 1 to M without effect."""
        return encode_deep_texts(self.clip, embed_texts(self.clip, tokens), list(self.learned.text))

    def weights(self, texts: Texts) -> Tensor:
        """T [n, E], the normalised features of `texts`."""
        return F.normalize(encode_deep_texts(self.clip, texts, list(self.learned.text)).float(), dim=-1)

    def features(self, hidden: Tensor) -> Tensor:
        """I [n, E], the normalised features of images from what enters the first block."""
        return F.normalize(encode_embedded(self.clip, hidden, list(self.learned.image)).float(), dim=-1)


def texts_of(clip: Any, classes: Classes, settings: Settings) -> Texts:
    m = count_words(settings.words) or settings.text_context
    return class_texts(clip, classes.names, classes.tokenizer, settings.words, m)


def openai_texts(names: list[str]) -> list[str]:
    """The texts of class names, class by class."""
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    spoken = [spoken_class_name(name) for name in names]
    return [template(name) for name in spoken for template in OPENAI_IMAGENET_TEMPLATES[:TEMPLATES]]


def teacher_of(clip: Any, classes: Classes, settings: Settings, run: Run) -> Tensor:
    """Z [n_classes, E], normalised."""
    where, n = clip.logit_scale.device, len(classes.names)
    features, index = classes.features, classes.index
    if settings.ensemble == "openai":
        tokens = classes.tokenizer(openai_texts(classes.names))
        encode, index = partial(encode_text_plain, clip), torch.arange(n).repeat_interleave(TEMPLATES)
        with (
            run.progress(len(tokens), "prompts of the teacher") as done,
            torch.autocast(where.type, torch.bfloat16, enabled=run.bf16),
        ):
            features = encode_prompts(clip, tokens, encode, where, progress=done)
    return F.normalize(raw_class_features(features, index, n), dim=-1).to(where)


def build(clip: Any, n_classes: int, settings: Settings, seed: int) -> Model:
    """The prompts as they are before the training, at random; `fit` puts `words` into their place."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Model(clip, settings)
    return model.to(clip.logit_scale.device)


def trained(model: Model) -> nn.Module:
    return model.learned


def fit(
    model: Model, train: LabelledImages, val: LabelledImages, classes: Classes, settings: Settings, run: Run
) -> dict[str, float]:
    if settings.words:
        begin_with_first(model.learned.text[0], model.clip, classes.tokenizer, settings.words)
    average = Average(model.learned, gaussian(settings.epochs, settings.gpa_mean, settings.gpa_std))
    source = crops(model.clip, train, settings.batch_size, run)
    train_batches(training_of(model, average, len(train.labels), classes, settings, run), source, run)
    average.settle()
    return {}


def loss_of(
    model: Model, texts: Texts, teacher: Tensor, settings: Settings, images: Tensor, labels: Tensor
) -> Tensor:
    """The loss of preprocessed `images`; their patches are embedded once for both towers."""
    hidden, factor = embed_images(model.clip, images, 0), model.clip.logit_scale.exp()
    with torch.no_grad():
        frozen = F.normalize(run_image_blocks(model.clip, hidden, 0).float(), dim=-1)
        q = cosine_logits(factor, frozen, teacher).log_softmax(dim=-1)
    image, text = model.features(hidden), model.weights(texts)
    p = cosine_logits(factor, image, text)
    far = settings.text_weight * F.l1_loss(text, teacher) + settings.image_weight * F.l1_loss(image, frozen)
    divergence = F.kl_div(p.log_softmax(dim=-1), q, reduction="sum", log_target=True) / p.numel()
    return F.cross_entropy(p, labels) + far + divergence


def training_of(
    model: Model, average: Average, n_images: int, classes: Classes, settings: Settings, run: Run
) -> Training:
    texts = texts_of(model.clip, classes, settings)
    teacher = teacher_of(model.clip, classes, settings, run)
    optimizer = make_optimizer(average, settings.lr, settings.momentum, settings.weight_decay)
    steps = steps_per_epoch(n_images, settings.batch_size)
    schedule = dassl_schedule(settings.lr, settings.epochs, steps)
    take = descend(average, optimizer, partial(loss_of, model, texts, teacher, settings), run.bf16)
    return Training(average, optimizer, schedule, take, end=average.add)


@torch.no_grad()
def classifier(
    model: Model, classes: Classes, settings: Settings, trained: bool, progress: Progress = silent
) -> dict[str, Tensor]:
    """weights [n_classes, E], normalised."""
    return {"weights": model.weights(texts_of(model.clip, classes, settings))}


@torch.no_grad()
def logits(model: Model, classifier: dict[str, Tensor], images: Images) -> Tensor:
    features = model.features(images.after_blocks(model.clip, 0))
    return cosine_logits(model.clip.logit_scale.exp(), features, classifier["weights"])


def detach(model: Model) -> None:
    """Nothing is attached."""
