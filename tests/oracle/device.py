"""Where the oracle's tests compute: on the CPU, or on what HEBA_TEST_DEVICE names."""

import os

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device(os.environ.get("HEBA_TEST_DEVICE", "cpu"))
GPU_TOLERANCE = 1e-4  # the kernels of a GPU add up in another order


class MeetOnGPU(TorchFunctionMode):
    """Tensors that meet are brought to the GPU, where the CLIP is; a test's own are on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if any(x.device.type == "cuda" for x in tensors) and any(x.device.type == "cpu" for x in tensors):
            args, kwargs = tree_map_only(Tensor, lambda x: x.to(DEVICE), (args, kwargs))
        return func(*args, **kwargs)


def tolerance(limit: float) -> float:
    """How far a number may be from the official one, on a CPU by `limit`."""
    return limit if DEVICE.type == "cpu" else max(limit, GPU_TOLERANCE)
