"""Official checkpoints, as the official trainer pickles them, to our adapters and back."""

from collections import OrderedDict

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file

from heba import artifact
from heba.methods.heba.adapters import Variant
from heba.methods.heba.convert import from_official, read_official, to_official
from heba.methods.heba.model import AdaptedCLIP
from tests.heba import artifacts
from tests.heba.test_model import batch, make_clip


def official_state(model):
    """What the official AdapterLearner has: its prompts in a buffer, and the adapters."""
    prompts = torch.randint(0, 90, (5, 3, 16))
    return OrderedDict(tk_prompts=prompts, **{k: v.clone() for k, v in model.adapters.state_dict().items()})


@pytest.fixture
def model():
    model = AdaptedCLIP(make_clip(open_clip.CLIP), 2, 2, 0.025)
    for parameter in model.adapters.parameters():
        torch.nn.init.normal_(parameter)
    return model


@pytest.fixture
def checkpoint(model, tmp_path):
    """As Dassl saves it, with the states of SGD and of a cosine schedule and a NumPy accuracy."""
    optimizer = torch.optim.SGD(model.adapters.parameters(), lr=0.0075, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30.0)
    sum(p.sum() for p in model.adapters.parameters()).backward()
    optimizer.step()
    schedule.step()
    path = tmp_path / "model.pth.tar-30"
    content = {
        "state_dict": official_state(model),
        "epoch": 30,
        "optimizer": optimizer.state_dict(),
        "scheduler": schedule.state_dict(),
        "val_result": np.float64(71.5),
    }
    torch.save(content, path)
    return path


@torch.no_grad()
def test_an_official_checkpoint_becomes_an_adapter_with_the_same_features(model, checkpoint, tmp_path):
    tensors, settings = from_official(checkpoint, 0.025)
    wanted = {"start": 2, "end": 2, "ratio": 4, "scale": 0.025, "epochs": 30}
    assert wanted.items() <= settings.items()
    artifacts.save(model, tmp_path / "ours", settings=settings)
    artifact.write_tensors(tensors, tmp_path / "ours", torch.float32)
    again, _ = artifact.load(make_clip(open_clip.CLIP), tmp_path / "ours")
    images, tokens = batch()
    assert torch.equal(again.encode_image(images), model.encode_image(images))
    assert torch.equal(again.encode_text(tokens), model.encode_text(tokens))


def test_there_and_back_nothing_is_lost(model, checkpoint, tmp_path):
    tensors, settings = from_official(checkpoint, 0.025)
    path = to_official(tensors, settings, tmp_path / "run", checkpoint)
    assert path == tmp_path / "run" / "adapter_learner" / "model.pth.tar-30"
    back, epoch, scale = read_official(path)
    assert (epoch, scale) == (30, 0.025)
    wanted, _, untold = read_official(checkpoint)
    assert untold is None
    assert back.keys() == wanted.keys() == model.adapters.state_dict().keys()
    assert all(torch.equal(back[k], wanted[k]) for k in wanted)
    again, same = from_official(path, None)
    assert same == settings
    assert all(torch.equal(again[k], tensors[k]) for k in wanted)


def test_a_scale_that_is_not_told_must_be_given(model, checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"model\.pth\.tar-30: does not tell its scale; .* \(--scale\)"):
        from_official(checkpoint, None)
    for wrong in (float("nan"), -1.0, "1", True):
        torch.save({"state_dict": official_state(model), "epoch": 1, "scale": wrong}, tmp_path / "c")
        with pytest.raises(ValueError, match="its scale is no number"):
            from_official(tmp_path / "c", None)


def test_ours_loads_in_the_official_model(model, tmp_path):
    """The official code loads with strict=False, so every name must be one of its own."""
    artifacts.save(model, tmp_path / "ours", torch.float16)
    settings = artifacts.settings_of(model).model_dump()
    path = to_official(artifact.read_tensors(tmp_path / "ours"), settings, tmp_path, tmp_path / "ours")
    state = torch.load(path, weights_only=True)["state_dict"]
    assert set(state) == set(official_state(model)) - {"tk_prompts"}
    stored = load_file(tmp_path / "ours" / artifact.ADAPTER_FILE)
    assert all(v.dtype == torch.float32 and torch.equal(v, stored[k].float()) for k, v in state.items())


def test_the_prefixes_of_wrapped_models_are_understood(model, tmp_path):
    state = {f"module.adapter_learner.{k}": v for k, v in official_state(model).items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "c")
    assert read_official(tmp_path / "c")[0].keys() == model.adapters.state_dict().keys()


class Evil:
    def __reduce__(self):
        return print, ("run",)


def test_code_in_a_checkpoint_is_refused_and_never_run(tmp_path, capsys):
    path = tmp_path / "model.pth.tar-1"
    torch.save({"state_dict": {}, "epoch": 1, "extra": Evil()}, path)
    with pytest.raises(ValueError, match=r"model\.pth\.tar-1: not a checkpoint of tensors .* it holds \S*print$"):
        read_official(path)
    assert capsys.readouterr().out == ""


def test_what_is_no_official_checkpoint_is_named(model, tmp_path):
    path = tmp_path / "c"
    with pytest.raises(ValueError, match=r"no file .*c;"):
        read_official(path)
    for content, message in (
        (b"junk", "not a checkpoint of tensors and numbers alone: it is of another kind or damaged$"),
        (b"# A text\n", "it is of another kind or damaged$"),
        ({"weights": 1}, "no state_dict"),
        ({"state_dict": {"a": torch.ones(1)}, "epoch": 1}, "no adapters"),
        ({"state_dict": official_state(model) | {"b": torch.ones(1)}, "epoch": 1}, "unexpected b"),
    ):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(ValueError, match=message) as error:
            read_official(path)
        assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("ratio", "variant", "message"),
    [
        (4, Variant(text_block="conv1d"), "unexpected text_adapter.2.att_conv.mid.weight"),
        (4, Variant(towers="image"), "missing text_adapter.2.att_conv.down.weight"),
        (8, Variant(), "ratio 4"),
    ],
)
def test_what_the_official_code_can_not_have_is_refused(ratio, variant, message, tmp_path):
    model = AdaptedCLIP(make_clip(open_clip.CLIP), 2, 2, 0.1, ratio, variant=variant)
    settings = artifacts.settings_of(model).model_dump()
    with pytest.raises(ValueError, match=message):
        to_official(model.adapters.state_dict(), settings, tmp_path, tmp_path)
