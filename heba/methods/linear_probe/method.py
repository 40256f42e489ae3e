"""Linear probe (Radford et al. 2021; the baseline of CoOp, lpclip): logistic regression on frozen features.

With x the feature of an image, not normalised, the logits are W x + b. W and b minimise, in float64,
C sum_i CE(W x_i + b, y_i) + |W|^2 / 2. C is the first best on the validation images of 1e6, 1e4, ..., 1e-6, and
then of halvings of the range from C/10 to 10 C in the exponent: its upper end is taken where it is strictly better
than the lower one, and the other end moves to the middle. The last end that was taken is C.

The official code stops its L-BFGS early, up to 1 % from the minimum. Here Newton's method goes to the minimum, on
the CPU, and so the search may end at another C.
"""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from heba.clip.features import Classes
from heba.clip.towers import feature_width
from heba.data.images import Images, LabelledImages
from heba.fit.run import Progress, Run, silent
from heba.fit.search import accuracy, first_best
from heba.methods.linear_probe.settings import Settings

EXPONENTS = (6, 4, 2, 0, -2, -4, -6)  # of C
TOLERANCE = 1e-11  # of the gradient of the mean loss: far below what changes a prediction, and above rounding
MOST_ITERATIONS = 1000

Weights = tuple[Tensor, Tensor]  # W [n_classes, E] and b [n_classes]


class LinearProbe(nn.Module):
    def __init__(self, clip: Any, n_classes: int) -> None:
        super().__init__()
        where = clip.logit_scale.device
        self.weight = nn.Parameter(torch.zeros(n_classes, feature_width(clip), device=where))
        self.bias = nn.Parameter(torch.zeros(n_classes, device=where))


def build(clip: Any, n_classes: int, settings: Settings, seed: int) -> LinearProbe:
    return LinearProbe(clip, n_classes)


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
    """Without validation images C is `settings.c`."""
    assert train.views is not None
    assert val.views is not None
    features, labels = train.views.plain.cpu().double(), torch.tensor(train.labels)
    images, targets = val.views.plain.cpu().double(), torch.tensor(val.labels)
    with run.progress(len(EXPONENTS) + 2 * settings.steps, "train") as done:

        @cache
        def solved(exponent: float) -> Weights:
            return solve(features, labels, 10.0**exponent)

        def score(exponent: float) -> float:
            weight, bias = solved(exponent)
            done(1)
            return accuracy(images @ weight.T + bias, targets)

        if val.labels:
            exponent = search(score, settings.steps)
            c, (weight, bias) = 10.0**exponent, solved(exponent)
        else:
            c, (weight, bias) = settings.c, solve(features, labels, settings.c)
    with torch.no_grad():
        model.weight.copy_(weight)
        model.bias.copy_(bias)
    return {"c": c}


def search(score: Callable[[float], float], steps: int) -> float:
    """The exponent of C that the search ends at."""
    best: float = first_best(EXPONENTS, score)
    left, right = best - 1, best + 1
    for _ in range(steps):
        middle = (left + right) / 2
        if score(right) > score(left):
            best, left = right, middle
        else:
            best, right = left, middle
    return best


def solve(features: Tensor, labels: Tensor, c: float) -> Weights:
    """The minimum, in float64, for `features` [n, E] and `labels` [n] of two or more classes."""
    from sklearn.linear_model import LogisticRegression

    # Of two classes scikit-learn fits one weight, w = W_1 - W_0, and |w|^2 / 2 is twice |W|^2 / 2.
    two = len(labels.unique()) == 2
    c = 2 * c if two else c
    regression = LogisticRegression(C=c, solver="newton-cg", tol=TOLERANCE, max_iter=MOST_ITERATIONS)
    with warnings.catch_warnings():
        # Where rounding ends the last line search, the minimum is as near as float64 comes to it.
        warnings.filterwarnings("ignore", "(?i).*line search")
        regression.fit(features.numpy(), labels.numpy())
    weight, bias = torch.from_numpy(regression.coef_), torch.from_numpy(regression.intercept_)
    if two:
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    return weight, bias


def classifier(
    model: LinearProbe, classes: Classes, settings: Settings, trained: bool, progress: Progress = silent
) -> dict[str, Tensor]:
    """weights [n_classes, E], bias [n_classes]."""
    return {"weights": model.weight.detach(), "bias": model.bias.detach()}


def logits(model: LinearProbe, classifier: dict[str, Tensor], images: Images) -> Tensor:
    with torch.autocast(images.features.device.type, enabled=False):
        return images.features.float() @ classifier["weights"].T + classifier["bias"]


def detach(model: LinearProbe) -> None:
    """Nothing is attached."""
