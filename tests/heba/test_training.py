"""The loop: resuming gives the same bytes, bad losses stop it."""

import signal
import subprocess
import sys

import open_clip
import pytest
import torch

from heba.clip.towers import cut_texts, text_lengths
from heba.files import remove_left
from heba.fit.draws import TextBank
from heba.fit.run import Run
from heba.fit.static import masked_cross_entropy
from heba.methods.heba.model import AdaptedCLIP
from heba.methods.heba.settings import Settings
from heba.methods.heba.training import train
from tests.heba.test_model import batch, make_clip

SETTINGS = {
    "epochs": 4,
    "batch_size": 4,
    "lr": 0.01,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "label_smoothing": 0.1,
    "scale_factor": 2.0,
    "slow_ratio": 0.5,
    "neg_ratio": 1,
}


def setup(seed=3, run=None, **changed):
    clip = make_clip(open_clip.CLIP)
    torch.manual_seed(5)
    model = AdaptedCLIP(clip, 1, 2, 0.1)
    tokens = cut_texts(clip, batch()[1])
    bank = TextBank(tokens, text_lengths(clip, tokens), [0, 1, 2, 3, 4, 5], None)
    images = [torch.randint(0, 256, (3, 36 + i, 40), dtype=torch.uint8) for i in range(10)]
    settings = Settings(**(SETTINGS | changed))
    return model, images, [i % 5 for i in range(10)], bank, settings, Run(seed, **(run or {}))


def test_a_step_in_static_shapes_is_the_same():
    """Padded classes and texts, which a GPU captures as a graph, change nothing."""
    plain = setup(neg_ratio=1, batch_size=3)
    padded = setup(neg_ratio=1, batch_size=3, run={"cuda_graphs": True})
    history, again = train(*plain), train(*padded)
    for a, b in zip(history, again, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    start = dict(setup()[0].adapters.named_parameters())
    moved = 0.0
    for name, a in plain[0].adapters.named_parameters():
        b = padded[0].adapters.get_parameter(name)
        assert (a - b).abs().max() < 1e-6, name
        moved = max(moved, (a - start[name]).abs().max().item())
    assert moved > 1e-3


def test_the_masked_loss_is_that_of_the_valid_columns():
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(4, 7, generator=generator, requires_grad=True), torch.tensor([0, 2, 4, 1])
    valid = torch.arange(7) < 5
    masked = masked_cross_entropy(logits, targets, valid, 0.1)
    (gradient,) = torch.autograd.grad(masked, logits)
    plain = torch.nn.functional.cross_entropy(logits[:, :5], targets, label_smoothing=0.1)
    (expected,) = torch.autograd.grad(plain, logits)
    torch.testing.assert_close(masked, plain)
    torch.testing.assert_close(gradient, expected)


class Stop(Exception):
    pass


def test_resuming_gives_the_same_bytes(tmp_path):
    whole = setup()
    history = train(*whole)

    def interrupt(record):
        if record["epoch"] == 2:
            raise Stop

    checkpoint = tmp_path / "c.safetensors"
    with pytest.raises(Stop):
        train(*setup(run={"checkpoint": checkpoint, "on_epoch": interrupt}))
    seen = []
    resumed = setup(run={"checkpoint": checkpoint, "on_epoch": seen.append})
    assert train(*resumed) == history == seen
    for a, b in zip(whole[0].adapters.parameters(), resumed[0].adapters.parameters(), strict=True):
        assert torch.equal(a, b)


KILLED_WHILE_WRITING = """
import resource, signal, sys
from pathlib import Path
import torch
from heba.fit.loop import save_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # a file that grows over the limit kills the process
module = torch.nn.Linear(100, 100)
optimizer = torch.optim.SGD(module.parameters(), 0.1)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
save_checkpoint(Path(sys.argv[1]), module, optimizer, torch.Generator(), [])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no limit on the size of a file")
def test_what_a_kill_leaves_of_a_checkpoint_is_found(tmp_path):
    path = tmp_path / "c.safetensors"
    killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, path], check=False)
    assert killed.returncode == -signal.SIGXFSZ
    assert any(tmp_path.iterdir())
    remove_left(path)
    assert not any(tmp_path.iterdir())


def test_it_learns_and_depends_on_the_seed():
    first = train(*setup(epochs=8))
    assert first[-1]["loss"] < first[0]["loss"]
    assert train(*setup(epochs=8, seed=4)) != first


def test_a_loss_that_is_not_finite_stops_the_run():
    model, *rest = setup()
    with torch.no_grad():
        next(iter(model.adapters.parameters())).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"epoch 1: .*lower lr"):
        train(model, *rest)


def test_fewer_images_than_a_batch_make_one_batch_of_all():
    small, exact = train(*setup(batch_size=11)), train(*setup(batch_size=10))
    assert small == exact
    assert len(small) == 4


def test_a_damaged_checkpoint_is_named(tmp_path):
    path = tmp_path / "c.safetensors"
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="delete it") as error:
        train(*setup(run={"checkpoint": path}))
    assert str(path) in str(error.value)
