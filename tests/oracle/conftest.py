"""The device of the oracle's tests."""

import pytest
import torch

from tests.oracle.device import DEVICE, MeetOnGPU


@pytest.fixture(autouse=True)
def on_the_device(monkeypatch):
    """On a GPU all in fp32, without TF32."""
    if DEVICE.type == "cpu":
        yield
        return
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with MeetOnGPU():
        yield
