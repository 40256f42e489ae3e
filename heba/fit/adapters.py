"""Training of adapters in both towers, as HeBA and LwEIB have it: SGD on the classes that a step draws, with
slow-fast scales."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from heba.clip.hooks import HookedCLIP
from heba.clip.preprocess import preprocess_of
from heba.clip.towers import embed_tokens
from heba.data.images import crop_batch, keep_images
from heba.fit.draws import Recipe, Step, TextBank, plan_epoch
from heba.fit.loop import History, Schedule, cosine, finite, make_optimizer, train_epochs, update
from heba.fit.run import Run
from heba.fit.static import StaticStep
from heba.fit.work import steps_per_epoch


def step_loss(
    model: HookedCLIP, images: Tensor, bank: TextBank, step: Step, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Label-smoothed cross-entropy over exp(logit_scale) * cos(image, text) of the selected classes. SigLIP's
    logit_bias is the same for all of them and has no effect in a softmax.

    Args:
        images: [batch, 3, size, size], preprocessed.
    Returns:
        The loss (0-dim) and the logits [batch, n_selected], in fp32.
    """
    length = step.packing.length
    if bank.hidden is None:
        with torch.no_grad():
            hidden = embed_tokens(model.clip, bank.tokens[step.prompts, :length], model.start - 1)
    else:
        hidden = bank.hidden[step.prompts, :length]
    image = F.normalize(model.encode_image(images, step.visual_scales).float(), dim=-1)
    text = F.normalize(model.encode_text_from(hidden, step.packing, step.text_scales).float(), dim=-1)
    logits = model.logit_factor() * image @ text.T
    return F.cross_entropy(logits, step.targets, label_smoothing=label_smoothing), logits


def eager_step(
    model: HookedCLIP, optimizer: torch.optim.Optimizer, bank: TextBank, label_smoothing: float, bf16: bool
) -> Callable[[Tensor, Step], Tensor]:
    """A function of preprocessed images and a `Step` that takes the step and returns its loss (0-dim)."""

    def take(images: Tensor, step: Step) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            loss, _ = step_loss(model, images, bank, step, label_smoothing)
        update(model.adapters, optimizer, loss)
        return loss.detach()

    return take


def graph_step(
    optimizer: torch.optim.Optimizer, gradients: Callable[[Tensor, Step], Tensor]
) -> Callable[[Tensor, Step], Tensor]:
    """The same, with loss and gradients by a `StaticStep`."""

    def take(images: Tensor, step: Step) -> Tensor:
        loss = gradients(images, step)
        optimizer.step()
        return loss

    return take


def train(
    model: HookedCLIP, images: Sequence[Tensor], labels: list[int], bank: TextBank, recipe: Recipe, run: Run
) -> History:
    """Train the adapters of `model` in place.

    Args:
        images: uint8 [3, height, width] each, of any size. labels: 0..n_classes-1.
    Returns:
        One {"epoch", "loss", "lr"} per epoch; loss is the mean over the steps.
    Raises:
        FloatingPointError: a loss that is not finite. ValueError: a damaged checkpoint.
    """
    device = model.logit_factor().device
    preprocess = preprocess_of(model.clip)
    data = keep_images(images, preprocess, device)
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    optimizer = make_optimizer(model.adapters, recipe.lr, recipe.momentum, recipe.weight_decay)
    if run.cuda_graphs:
        batch_size = min(recipe.batch_size, len(images))
        static = StaticStep(model, bank, batch_size, preprocess.size, recipe, run.bf16)
        take = graph_step(optimizer, static)
    else:
        take = eager_step(model, optimizer, bank, recipe.label_smoothing, run.bf16)

    def run_epoch(_: int, generator: torch.Generator, done: Callable[[int], object]) -> list[float]:
        losses = []
        for step in plan_epoch(labels, sizes, bank, model, recipe, generator):
            batch = crop_batch([data[j] for j in step.images], step.boxes, step.flips, preprocess, device)
            losses.append(take(batch, step))
            done(1)
        return finite(losses)

    steps = steps_per_epoch(len(images), recipe.batch_size)
    schedule = Schedule(recipe.epochs, steps, lambda epoch: cosine(recipe.lr, epoch, recipe.epochs))
    remedy = "lower lr or scale, or set precision to fp32"
    return train_epochs(model.adapters, optimizer, schedule, run_epoch, run, remedy)
