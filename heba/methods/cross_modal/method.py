"""Cross-modal adaptation (Lin et al. 2023): texts are training samples of a linear classifier, beside the images.

With f the normalised feature of a sample, an image, its mirror image or a prompt:

    logits = exp(logit_scale) f . w_k

The loss is the cross-entropy on batches of half images and half texts. w starts at the normalised mean of the
prompts of a class, of which none is normalised, and is not normalised again. Of the grid of lr, weight decay and
batch size, and of the looks at val in each training, the first best is kept; where there are no images in val, the
last step of the first point of the grid. With WiSE-FT, half of w is the zero-shot classifier.
"""

from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heba.clip.features import Classes, cosine_logits, raw_class_features
from heba.clip.towers import feature_width
from heba.data.images import Images, LabelledImages
from heba.fit.run import Progress, Run, silent
from heba.fit.search import first_best
from heba.methods.cross_modal.settings import Settings
from heba.methods.cross_modal.training import Samples, Trained, draw, sizes_of, train_side_by_side


class Linear(nn.Module):
    """w [n_classes, E]."""

    def __init__(self, clip: Any, n_classes: int) -> None:
        super().__init__()
        self.factor = clip.logit_scale.detach().exp()
        self.weight = nn.Parameter(nn.Linear(feature_width(clip), n_classes, bias=False).weight.detach())


def build(clip: Any, n_classes: int, settings: Settings, seed: int) -> Linear:
    """The classifier at random; the draws are those of `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Linear(clip, n_classes)
    return model.to(clip.logit_scale.device)


def trained(model: Linear) -> nn.Module:
    return model


def zero_shot_weights(classes: Classes) -> Tensor:
    """[n_classes, E], normalised."""
    return F.normalize(raw_class_features(classes.features, classes.index, len(classes.names)), dim=-1)


def samples(model: Linear, features: Tensor, labels: Tensor) -> Samples:
    where = model.factor.device
    return Samples(F.normalize(features.float(), dim=-1).to(where), labels.to(where))


def fit(
    model: Linear,
    train: LabelledImages,
    val: LabelledImages,
    classes: Classes,
    settings: Settings,
    run: Run,
) -> dict[str, float]:
    """Gives the point of the grid that was chosen, and the step that its weights are of."""
    assert train.views is not None
    n_images, n_texts = 2 * len(train.labels), len(classes.index)
    points = list(product(settings.lr, settings.weight_decay))
    sizes = sizes_of(settings, n_images, n_texts)
    if not val.labels:
        points, sizes = points[:1], sizes[:1]
    generator = torch.Generator().manual_seed(run.seed)
    rows = {
        size: torch.stack([draw(n_images, n_texts, size, settings.steps, generator) for _ in points], dim=1)
        for size in sizes
    }
    (lr, decay, size), best = search(model, train, val, classes, settings, points, rows, run)
    for record in best.history:
        run.on_epoch(record)
    with torch.no_grad():
        model.weight.copy_(best.weight)
    return {"lr": lr, "weight_decay": decay, "batch_size": float(size), "step": float(best.step)}


def search(
    model: Linear,
    train: LabelledImages,
    val: LabelledImages,
    classes: Classes,
    settings: Settings,
    points: list[tuple[float, float]],
    rows: dict[int, Tensor],
    run: Run,
) -> tuple[tuple[float, float, int], Trained]:
    """The first best point (lr, weight decay, batch size) of the grid, and its training.

    Args:
        points: pairs of lr and weight decay.
        rows: by batch size, the rows [steps, points, size] of all batches: of images, their mirror images, and
            prompts, in this order.
    """
    assert train.views is not None
    assert val.views is not None
    labels = torch.tensor(train.labels)
    pool = samples(
        model,
        torch.cat([train.views.plain, train.views.flipped, classes.features]),
        torch.cat([labels, labels, classes.index]),
    )
    looks = samples(model, val.views.plain, torch.tensor(val.labels, dtype=torch.long))
    start = zero_shot_weights(classes) if settings.init == "zeroshot" else model.weight.detach()
    found: dict[tuple[float, float, int], Trained] = {}
    where = model.factor.device
    with (
        run.progress(len(points) * len(rows) * settings.steps, "train") as done,
        torch.autocast(where.type, enabled=False),
    ):
        for size, batches in rows.items():
            trainings = train_side_by_side(
                start.to(where), pool, looks, batches.to(where), points, model.factor, settings, done
            )
            found |= {(*point, size): one for point, one in zip(points, trainings, strict=True)}
    order = [(*point, size) for point in points for size in rows]
    best = first_best(order, lambda point: found[point].accuracy)
    return best, found[best]


@torch.no_grad()
def classifier(
    model: Linear, classes: Classes, settings: Settings, trained: bool, progress: Progress = silent
) -> dict[str, Tensor]:
    """weights [n_classes, E], not normalised."""
    zero_shot = zero_shot_weights(classes).to(model.factor.device)
    return {"weights": torch.lerp(model.weight.detach(), zero_shot, settings.wise_ft)}


def logits(model: Linear, classifier: dict[str, Tensor], images: Images) -> Tensor:
    features = F.normalize(images.features.float(), dim=-1)
    return cosine_logits(model.factor, features, classifier["weights"])


def detach(model: Linear) -> None:
    """Nothing is attached."""
