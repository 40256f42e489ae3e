"""LP++ (Huang et al. 2024), as in the official code: a linear probe, and a learned weight of each class's text.

With f the normalised feature of an image, and T_k the normalised mean of the normalised prompts of class k:

    logits_k = W_k . f + b_k + a_k (T_k . f)

W_k starts as the sum of the features of the class, b as torch draws it for a linear layer, every a_k as 250 times
the mean over the classes of the mean f . T_k of their images. The loss is the cross-entropy over all n images, one
random crop of each. W and b: SGD with momentum and the step 4 n / (largest eigenvalue of F'F); a: after the epochs
10, 20, ..., the step n / (4 max_k sum_i (f_i . T_k)^2). The epoch is the last best on the validation images.

As in the official code, and not in the paper: there is a bias, and a's gradient is summed over all epochs so far
instead of those since its last step.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heba.clip.features import Classes, class_features
from heba.clip.towers import feature_width
from heba.data.images import Images, LabelledImages
from heba.fit.features import RECORDS, passes
from heba.fit.loop import finite
from heba.fit.run import Progress, Run, silent
from heba.fit.search import accuracy
from heba.methods.lp_plus_plus.settings import Settings


class LinearProbe(nn.Module):
    """W [n_classes, E], b [n_classes] and a [n_classes]."""

    def __init__(self, dim: int, n_classes: int, seed: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(dim)
        generator = torch.Generator().manual_seed(seed)
        # A linear layer draws its weight first.
        torch.empty(n_classes, dim).uniform_(generator=generator)
        self.weight = nn.Parameter(torch.zeros(n_classes, dim))
        self.bias = nn.Parameter(torch.empty(n_classes).uniform_(-bound, bound, generator=generator))
        self.alpha = nn.Parameter(torch.zeros(n_classes))

    def forward(self, features: Tensor, texts: Tensor) -> Tensor:
        """The logits of `features` [n, E] and `texts` [n_classes, E], both normalised."""
        return features @ self.weight.T + self.bias + self.alpha * (features @ texts.T)


def build(clip: Any, n_classes: int, settings: Settings, seed: int) -> LinearProbe:
    return LinearProbe(feature_width(clip), n_classes, seed).to(clip.logit_scale.device)


def trained(model: LinearProbe) -> nn.Module:
    return model


def fit(
    model: LinearProbe,
    train: LabelledImages,
    val: LabelledImages,
    classes: Classes,
    settings: Settings,
    run: Run,
) -> dict[str, float]:
    """Without validation images the epoch is the last."""
    assert train.views is not None
    assert val.views is not None
    where = model.weight.device
    features = F.normalize(passes(train.views.augmented, train.views.plain)[0].to(where), dim=-1)
    images = F.normalize(val.views.plain.to(where), dim=-1)
    labels, targets = (torch.tensor(part.labels, dtype=torch.long, device=where) for part in (train, val))
    texts = class_features(classes.features, classes.index, len(classes.names)).to(where)
    with torch.autocast(where.type, enabled=False):
        start(model, features, labels, texts, settings.scale)
        epoch = train_epochs(model, (features, labels), (images, targets), texts, settings, run)
    return {"epoch": epoch}


@torch.no_grad()
def start(model: LinearProbe, features: Tensor, labels: Tensor, texts: Tensor, scale: float) -> None:
    """Set W and a to their start; `features` [n, E] and `texts` [n_classes, E] are normalised."""
    members = F.one_hot(labels, len(texts)).float()
    model.weight.copy_(members.T @ features)
    cosines = (members * (features @ texts.T)).sum(dim=0) / members.sum(dim=0).clamp(min=1)
    model.alpha.copy_(scale * cosines.mean())


def steps(features: Tensor, texts: Tensor) -> tuple[float, float]:
    """The learning rates of W and b, and of a; `features` [n, E] and `texts` [n_classes, E] are normalised."""
    f, t = features.double(), texts.double()
    largest = torch.linalg.eigvalsh(f.T @ f)[-1].item()
    return 4 * len(f) / largest, len(f) / (4 * (f @ t.T).square().sum(dim=0).max().item())


def train_epochs(
    model: LinearProbe,
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    texts: Tensor,
    settings: Settings,
    run: Run,
) -> int:
    """Train from where the model stands, on normalised features and labels, and leave it as it was after the last
    best epoch on `val`, which is returned (from 1 on). FloatingPointError: a loss that is not finite."""
    lr, lr_alpha = steps(train[0], texts)
    optimizer = torch.optim.SGD([model.weight, model.bias], lr, momentum=settings.momentum)
    optimizer_alpha = torch.optim.SGD([model.alpha], lr_alpha)
    chosen, best, kept = 0, -1.0, model.state_dict()
    losses: list[Tensor] = []
    with run.progress(settings.epochs, "train") as done:
        for epoch in range(1, settings.epochs + 1):
            loss = F.cross_entropy(model(train[0], texts), train[1])
            optimizer.zero_grad()  # a's gradient stays: it sums up
            loss.backward()
            optimizer.step()
            if epoch % settings.every == 0:
                optimizer_alpha.step()
            with torch.no_grad():
                score = accuracy(model(val[0], texts), val[1])
            if score >= best:
                chosen, best = epoch, score
                kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            losses.append(loss.detach())
            if len(losses) == RECORDS or epoch == settings.epochs:
                try:
                    mean = sum(finite(losses)) / len(losses)
                except FloatingPointError as error:
                    raise FloatingPointError(f"after epoch {epoch - len(losses)}: {error}; lower scale") from None
                run.on_epoch({"epoch": epoch, "loss": mean, "lr": lr})
                losses = []
            done(1)
    model.load_state_dict(kept)
    model.alpha.grad = None
    return chosen


@torch.no_grad()
def classifier(
    model: LinearProbe, classes: Classes, settings: Settings, trained: bool, progress: Progress = silent
) -> dict[str, Tensor]:
    """weights [n_classes, E], those of W and of the texts together; bias [n_classes]."""
    texts = class_features(classes.features, classes.index, len(classes.names)).to(model.weight.device)
    return {"weights": model.weight + model.alpha[:, None] * texts, "bias": model.bias.detach()}


def logits(model: LinearProbe, classifier: dict[str, Tensor], images: Images) -> Tensor:
    with torch.autocast(images.features.device.type, enabled=False):
        features = F.normalize(images.features.float(), dim=-1)
        return features @ classifier["weights"].T + classifier["bias"]


def detach(model: LinearProbe) -> None:
    """Nothing is attached."""
