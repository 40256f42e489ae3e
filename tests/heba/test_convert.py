"""Official checkpoints, as the official trainer pickles them, to our adapters and back."""

from collections import OrderedDict

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from heba import artifact
from heba.fit import official
from heba.methods.heba.adapters import Variant
from heba.methods.heba.convert import fits, from_official, to_official
from heba.methods.heba.model import AdaptedCLIP
from heba.methods.heba.settings import Settings
from tests.heba import artifacts, checkpoints
from tests.heba.test_model import batch, make_clip

SCALE = {"scale": 0.025}


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
    path = tmp_path / "model.pth.tar-30"
    checkpoints.save(path, official_state(model), epoch=30)
    return path


@torch.no_grad()
def test_an_official_checkpoint_becomes_an_adapter_with_the_same_features(model, checkpoint, tmp_path):
    tensors, settings = from_official(official.read(checkpoint), SCALE)
    wanted = {"start": 2, "end": 2, "ratio": 4, "scale": 0.025, "epochs": 30}
    assert wanted.items() <= settings.items()
    artifacts.save(model, tmp_path / "ours", settings=settings)
    artifact.write_tensors(tensors, tmp_path / "ours", torch.float32)
    again, _ = artifact.load(make_clip(open_clip.CLIP), tmp_path / "ours")
    images, tokens = batch()
    assert torch.equal(again.encode_image(images), model.encode_image(images))
    assert torch.equal(again.encode_text(tokens), model.encode_text(tokens))


def test_there_and_back_nothing_is_lost(model, checkpoint, tmp_path):
    tensors, settings = from_official(official.read(checkpoint), SCALE)
    path = to_official(tensors, Settings(**settings), None, tmp_path / "run", checkpoint)
    assert path == tmp_path / "run" / "adapter_learner" / "model.pth.tar-30"
    back = official.read(path)
    assert (back.epoch, back.content["scale"]) == (30, 0.025)
    wanted = model.adapters.state_dict()
    assert back.tensors.keys() == tensors.keys() == wanted.keys()
    assert all(torch.equal(back.tensors[k], wanted[k]) for k in wanted)
    again, same = from_official(official.read(path), {})
    assert same == settings
    assert all(torch.equal(again[k], tensors[k]) for k in wanted)


def test_a_scale_that_is_not_told_must_be_given(model, checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"model\.pth\.tar-30: does not tell its scale; .* \(--scale\)"):
        from_official(official.read(checkpoint), {})
    for wrong in (float("nan"), -1.0, "1", True):
        torch.save({"state_dict": official_state(model), "epoch": 1, "scale": wrong}, tmp_path / "c")
        with pytest.raises(ValueError, match="its scale is no number"):
            from_official(official.read(tmp_path / "c"), {})


def test_ours_loads_in_the_official_model(model, tmp_path):
    """The official code loads with strict=False, so every name must be one of its own."""
    artifacts.save(model, tmp_path / "ours", torch.float16)
    settings = artifacts.settings_of(model)
    path = to_official(artifact.read_tensors(tmp_path / "ours"), settings, None, tmp_path, tmp_path / "ours")
    state = torch.load(path, weights_only=True)["state_dict"]
    assert set(state) == set(official_state(model)) - {"tk_prompts"}
    stored = load_file(tmp_path / "ours" / artifact.ADAPTER_FILE)
    assert all(v.dtype == torch.float32 and torch.equal(v, stored[k].float()) for k, v in state.items())


def test_the_prefixes_of_wrapped_models_are_understood(model, tmp_path):
    state = {f"module.adapter_learner.{k}": v for k, v in official_state(model).items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "c")
    checkpoint = official.read(tmp_path / "c")
    assert fits(checkpoint.tensors)
    assert from_official(checkpoint, SCALE)[0].keys() == model.adapters.state_dict().keys()


def test_what_are_no_adapters_is_named(model, tmp_path):
    path = tmp_path / "c"
    for state, message in (
        ({"a": torch.ones(1)}, "no adapters"),
        (official_state(model) | {"b": torch.ones(1)}, "unexpected b"),
    ):
        torch.save({"state_dict": state, "epoch": 1}, path)
        with pytest.raises(ValueError, match=message) as error:
            from_official(official.read(path), {"scale": 0.025})
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
    with pytest.raises(ValueError, match=message):
        to_official(model.adapters.state_dict(), artifacts.settings_of(model), None, tmp_path, tmp_path)
