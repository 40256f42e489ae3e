"""Ablations: what each variant computes, its gradients, its start, and that a saved one comes back."""

import json

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from heba import artifact
from heba.artifact import ADAPTER_FILE, CONFIG_FILE
from heba.clip.features import encode_prompts
from heba.clip.hooks import Call, going_on
from heba.clip.towers import embed_images, encode_text_plain, run_image_blocks
from heba.fit.draws import TextBank
from heba.fit.loop import make_optimizer, update
from heba.fit.run import Run
from heba.methods.heba.adapters import HEBA, BottleneckAdapter, Variant
from heba.methods.heba.model import AdaptedCLIP
from heba.methods.heba.settings import Settings
from heba.methods.heba.training import train
from tests.heba import artifacts
from tests.heba.test_model import batch, make_clip
from tests.heba.test_training import SETTINGS

VARIANTS = {
    "init": Variant(init="zero"),
    "visual_block": Variant(visual_block="linear"),
    "text_block": Variant(text_block="conv1d"),
    "expansion": Variant(expansion=8),
    "gradient_scale": Variant(gradient_scale=False),
    "all": Variant("zero", "linear", "conv1d", 2, False, "text"),
}
GRID = (2, 3)


def by_hand(adapter, h, scale, grid, lengths):
    """h + s * A(h) in plain operations, texts one by one; no gradient scale."""
    x = h if grid is None else h[:, 1:]
    y = x @ adapter.down.weight.flatten(1).T
    if isinstance(adapter.mid, torch.nn.Conv2d):
        image = y.transpose(1, 2).unflatten(2, grid)
        image = F.conv2d(image, adapter.mid.weight, padding=1, groups=y.shape[-1])
        y = image.flatten(2).transpose(1, 2)
    if isinstance(adapter.mid, torch.nn.Conv1d):
        y = torch.cat(
            [
                F.conv1d(F.pad(text.T[None], (2, 0)), adapter.mid.weight, groups=y.shape[-1])[0].T
                for text in y.split(lengths)
            ]
        )
    a = adapter.norm(x + F.gelu(y) @ adapter.up.weight.flatten(1).T)
    if grid is not None:
        a = torch.cat([torch.zeros_like(h[:, :1]), a], dim=1)
    return h + scale * a


@pytest.mark.parametrize("visual", [True, False])
@pytest.mark.parametrize("gradient_scale", [True, False])
@pytest.mark.parametrize("blocks", [("conv", "linear"), ("linear", "conv1d")])
def test_outputs_and_gradients(visual, gradient_scale, blocks):
    torch.manual_seed(0)
    variant = Variant(visual_block=blocks[0], text_block=blocks[1], gradient_scale=gradient_scale, expansion=3)
    adapter = BottleneckAdapter(8, visual, 2, variant).double()
    assert adapter.down.weight.shape[0] == 12
    scale, lengths = torch.tensor(0.3, dtype=torch.double), [4, 1, 2]
    h = torch.randn(2, 7, 8, dtype=torch.double) if visual else torch.randn(7, 8, dtype=torch.double)
    weight, grid = torch.randn_like(h), GRID if visual else None
    positions = None if visual else torch.tensor([0, 1, 2, 3, 0, 0, 1])
    h.requires_grad_()
    out, expected = adapter(h, scale, grid, positions), by_hand(adapter, h, scale, grid, lengths)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-12)
    names, parameters = zip(*adapter.named_parameters(), strict=True)
    got = torch.autograd.grad((out * weight).sum(), [h, *parameters])
    true = torch.autograd.grad((expected * weight).sum(), [h, *parameters])
    torch.testing.assert_close(got[0], true[0], rtol=1e-9, atol=1e-12)
    for name, a, b in zip(names, got[1:], true[1:], strict=True):
        torch.testing.assert_close(a, b / scale if gradient_scale else b, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("variant", [Variant(gradient_scale=False), Variant(text_block="conv1d")])
def test_the_blocks_with_autograds_backward_are_those_with_their_own(variant):
    """HeBA's visual block, which both kinds have."""
    torch.manual_seed(0)
    own, plain = BottleneckAdapter(8, True), BottleneckAdapter(8, True, 4, variant)
    plain.load_state_dict(own.state_dict())
    h = torch.randn(2, 7, 8)
    torch.testing.assert_close(own(h, torch.tensor(0.3), GRID), plain(h, torch.tensor(0.3), GRID))


def learning_step(model):
    images, tokens = batch()
    optimizer = make_optimizer(model.adapters, 0.01, 0.9, 5e-4)
    logits = F.normalize(model.encode_image(images), dim=-1) @ F.normalize(model.encode_text(tokens), dim=-1).T
    update(model.adapters, optimizer, F.cross_entropy(10 * logits, torch.arange(3)))


@pytest.mark.parametrize("blocks", [("conv", "linear"), ("linear", "conv1d")])
def test_zero_starts_as_the_plain_model_exactly_and_learns(blocks):
    images, tokens = batch()
    variant = Variant("zero", *blocks)
    plain = AdaptedCLIP(make_clip(open_clip.CLIP), 1, 2, 0.1, variant=variant)
    plain.detach()
    model = AdaptedCLIP(make_clip(open_clip.CLIP), 1, 2, 0.1, variant=variant)
    assert torch.equal(model.encode_image(images), plain.encode_image(images))
    assert torch.equal(model.encode_text(tokens), plain.encode_text(tokens))
    before = {k: v.clone() for k, v in model.adapters.state_dict().items()}
    for moved in ("norm.weight", "up.weight", "down.weight"):
        learning_step(model)
        for name, value in model.adapters.state_dict().items():
            # Only CLS is read after the last image block, so its MLP adapter never has a gradient.
            if name.endswith(moved) and not name.startswith("visual_adapter.2.mlp_conv"):
                assert not torch.equal(value, before[name]), name
    assert not torch.allclose(model.encode_image(images), plain.encode_image(images), atol=1e-5)
    assert not torch.allclose(model.encode_text(tokens), plain.encode_text(tokens), atol=1e-5)


@pytest.mark.parametrize("layout", [open_clip.CLIP, open_clip.CustomTextCLIP])
@torch.no_grad()
def test_conv1d_on_packed_texts_is_that_of_each_text_alone(layout):
    """Neither the neighbours in a packing nor the padding after EOT have a part in a text's feature."""
    _, tokens = batch()
    model = AdaptedCLIP(make_clip(layout), 1, 2, 0.5, variant=Variant(text_block="conv1d"))
    together = model.encode_text(tokens)
    alone = torch.cat([model.encode_text(text[None]) for text in tokens])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encode_prompts(model.clip, tokens, model.encode_text, torch.device("cpu")), alone)
    # The whole context, by open_clip's own forward with the same hooks: no cut, no packing.
    with going_on(Call(model, "text", model.fixed_scales())):
        torch.testing.assert_close(model.clip.encode_text(tokens), alone, rtol=1e-4, atol=1e-5)
    linear = AdaptedCLIP(make_clip(layout), 1, 2, 0.5)
    assert not torch.allclose(linear.encode_text(tokens), together, atol=1e-3)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_trains_in_static_shapes_and_comes_back_from_disk(name, tmp_path):
    images, tokens = batch()
    bank = TextBank(tokens, (tokens.argmax(-1) + 1).tolist(), [0, 1, 2, 3, 4, 5], None)
    losses = []
    for static in (False, True):
        torch.manual_seed(5)
        model = AdaptedCLIP(make_clip(open_clip.CLIP), 1, 2, 0.1, variant=VARIANTS[name])
        pictures = [torch.randint(0, 256, (3, 36 + i, 40), dtype=torch.uint8) for i in range(10)]
        settings = Settings(**SETTINGS | {"batch_size": 3, "epochs": 2})
        history = train(model, pictures, [i % 5 for i in range(10)], bank, settings, Run(3, cuda_graphs=static))
        losses.append([record["loss"] for record in history])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0] != losses[0][:1] * 2
    artifacts.save(model, tmp_path, seed=1)
    again, config = artifact.load(make_clip(open_clip.CLIP), tmp_path)
    assert again.variant == VARIANTS[name]
    assert config.seed == 1
    with torch.no_grad():
        assert torch.equal(model.encode_image(images), again.encode_image(images))
        assert torch.equal(model.encode_text(tokens), again.encode_text(tokens))


@pytest.mark.parametrize("towers", ["image", "text"])
def test_the_other_tower_stays_plain(towers, tmp_path):
    images, tokens = batch()
    model = AdaptedCLIP(make_clip(open_clip.CLIP), 1, 2, 0.1, variant=Variant(towers=towers))
    kept = "visual_adapter" if towers == "image" else "text_adapter"
    assert {name.split(".")[0] for name in model.adapters.state_dict()} == {kept}
    with torch.no_grad():
        plain = run_image_blocks(model.clip, embed_images(model.clip, images, 0), 0)
        image_is_plain = torch.equal(model.encode_image(images), plain)
        text_is_plain = torch.equal(model.encode_text(tokens), encode_text_plain(model.clip, tokens))
    assert (image_is_plain, text_is_plain) == (towers == "text", towers == "image")
    artifacts.save(model, tmp_path)
    assert {name.split(".")[0] for name in load_file(tmp_path / ADAPTER_FILE)} == {kept}


@pytest.mark.parametrize("expansion", [1, 2])
@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 8])
def test_the_hidden_width(ratio, expansion):
    model = AdaptedCLIP(make_clip(open_clip.CLIP), 2, 2, 0.1, ratio, variant=Variant(expansion=expansion))
    shapes = {name: value.shape[0] for name, value in model.adapters.named_parameters() if "down" in name}
    for name, hidden in shapes.items():
        assert hidden == (64 if "att_conv" in name else 256) * expansion // ratio
    with pytest.raises(ValueError, match="ratio 999"):
        AdaptedCLIP(make_clip(open_clip.CLIP), 2, 2, 0.1, 999, variant=Variant(expansion=expansion))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("init", "xavier"),
        ("visual_block", "conv1d"),
        ("text_block", None),
        ("towers", []),
        ("expansion", 0),
        ("expansion", 1.5),
        ("gradient_scale", "false"),
        ("text_block", ...),
    ],
)
def test_a_config_that_is_not_known_is_refused(key, value, tmp_path):
    model = AdaptedCLIP(make_clip(open_clip.CLIP), 1, 2, 0.1)
    artifacts.save(model, tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    config["settings"][key] = value
    if value is ...:
        del config["settings"][key]
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"config\.json: .*{key}") as error:
        artifact.load(make_clip(open_clip.CLIP), tmp_path)
    assert str(tmp_path) in str(error.value)


def test_the_default_is_heba():
    model = AdaptedCLIP(make_clip(open_clip.CLIP), 1, 2, 0.1)
    assert model.variant == HEBA == Variant("kaiming", "conv", "linear", 1, True, "both")
