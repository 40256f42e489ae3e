"""Checkpoints as Dassl saves them."""

import numpy as np
import torch


def save(path, state, epoch, warmup=False):
    """With the states of SGD and of a cosine schedule and a NumPy accuracy; after a `warmup` it has the schedule
    itself."""
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.0075, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, float(epoch))
    parameter.sum().backward()
    optimizer.step()
    schedule.step()
    content = {
        "state_dict": state,
        "epoch": epoch,
        "optimizer": optimizer.state_dict(),
        "scheduler": {"last_epoch": 1, "successor": schedule} if warmup else schedule.state_dict(),
        "val_result": np.float64(71.5),
    }
    torch.save(content, path)
