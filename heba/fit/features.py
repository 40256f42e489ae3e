"""Training on frozen features."""

from heba.fit.loop import cosine


def dassl_lr(lr: float, epoch: int, epochs: int) -> float:
    """The learning rate of an epoch (0-based) in Dassl: 1e-5 in the first, then a cosine that begins one epoch late
    and so does not reach 0."""
    return 1e-5 if epoch == 0 else cosine(lr, epoch - 1, epochs)
