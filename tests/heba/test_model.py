"""Adapters on open_clip's two text layouts; what the official code gets wrong."""

from collections import Counter

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from heba import artifact
from heba.artifact import ADAPTER_FILE
from heba.clip.features import class_features, encode_prompts
from heba.data.images import Images
from heba.fit.draws import step_classes
from heba.methods.heba import method
from heba.methods.heba.adapters import BottleneckAdapter
from heba.methods.heba.model import AdaptedCLIP
from heba.methods.heba.settings import Settings
from tests.heba import artifacts

VISION = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
TEXT = {"context_length": 16, "vocab_size": 100, "width": 64, "heads": 2, "layers": 2}


def make_clip(layout):
    torch.manual_seed(0)
    return layout(embed_dim=32, vision_cfg=dict(VISION), text_cfg=dict(TEXT), quick_gelu=True)


@pytest.fixture(params=[open_clip.CLIP, open_clip.CustomTextCLIP])
def clip(request):
    return make_clip(request.param)


def batch():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 90, (5, 16), generator=generator)
    for i, eot in enumerate((3, 5, 4, 7, 6)):
        tokens[i, eot], tokens[i, eot + 1 :] = 99, 0
    return torch.randn(3, 3, 32, 32, generator=generator), tokens


@torch.no_grad()
def test_the_plain_model_is_untouched_and_texts_are_cut_exactly(clip):
    images, tokens = batch()
    plain_image, plain_text = clip.encode_image(images), clip.encode_text(tokens)
    weights = {k: v.clone() for k, v in clip.state_dict().items()}
    model = AdaptedCLIP(clip, 1, 2, 0.1)
    # Scale 0 is the plain model, through the hooks and on the cut texts.
    assert torch.allclose(model.encode_image(images, 0.0), plain_image, atol=1e-5)
    assert torch.allclose(model.encode_text(tokens, 0.0), plain_text, atol=1e-5)
    assert not torch.allclose(model.encode_image(images), plain_image, atol=1e-3)
    assert not torch.allclose(model.encode_text(tokens), plain_text, atol=1e-3)
    # Outside of the adapted calls, the CLIP that was given is as it was.
    assert torch.allclose(clip.encode_image(images), plain_image, atol=1e-5)
    assert all(torch.equal(weights[k], v) for k, v in clip.state_dict().items())


@torch.no_grad()
def test_models_share_what_the_blocks_below_their_adapters_make_of_images():
    pixels, _ = batch()
    clip = open_clip.CLIP(embed_dim=32, vision_cfg=VISION | {"layers": 4}, text_cfg=TEXT | {"layers": 4})
    models = [AdaptedCLIP(clip, start, 4, 0.1) for start in (3, 1, 4, 3)]
    settings = [Settings(start=model.start, end=4, scale=0.1) for model in models]
    weights = torch.eye(32)
    alone = [model.encode_image(pixels, 0.1) for model in models]
    runs = []
    for i, block in enumerate(clip.visual.transformer.resblocks):
        block.ln_1.register_forward_hook(lambda *_, i=i: runs.append(i))
    images = Images.of_pixels(pixels)
    for model, one, features in zip(models, settings, alone, strict=True):
        classifier = {"weights": weights, "scale": torch.tensor(one.scale)}
        cosines = F.normalize(features, dim=-1) @ weights.T
        assert torch.equal(method.logits(model, classifier, images), model.logit_factor() * cosines)
    # All four for the first model and for the second, which changes them; then the last two, frozen or changed.
    assert Counter(runs) == {0: 2, 1: 2, 2: 4, 3: 4}


@torch.no_grad()
def test_detached_adapters_leave_the_plain_model_and_make_room_for_others(clip):
    images, _ = batch()
    plain = clip.encode_image(images)
    first = AdaptedCLIP(clip, 1, 2, 0.1)
    adapted = first.encode_image(images)
    first.detach()
    second = AdaptedCLIP(clip, 1, 2, 0.1)
    second.adapters.load_state_dict(first.adapters.state_dict())
    assert torch.equal(second.encode_image(images), adapted)
    second.detach()
    assert torch.allclose(clip.encode_image(images), plain, atol=1e-5)


@torch.no_grad()
def test_prompts_are_encoded_once_and_in_any_order_the_same(clip):
    _, tokens = batch()
    model = AdaptedCLIP(clip, 1, 2, 0.1)
    seen = []

    def encode(part):
        seen.append(part.shape)
        return model.encode_text(part)

    repeated = tokens[[3, 0, 3, 1, 4, 2, 0]]
    features = encode_prompts(clip, repeated, encode, torch.device("cpu"), batch_size=2)
    assert sum(n for n, _ in seen) == 5
    # Each batch is as long as its longest text: lengths 4, 5 | 6, 7 | 8.
    assert [length for _, length in seen] == [5, 7, 8]
    for row, expected in zip(repeated, features, strict=True):
        torch.testing.assert_close(model.encode_text(row[None])[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("visual", [True, False])
def test_the_adapters_own_backward_is_that_of_autograd(visual):
    """Against the block as the paper writes it, in double precision; parameters get the gradient times 1/s."""
    torch.manual_seed(0)
    adapter = BottleneckAdapter(8, visual, ratio=2).double()
    scale, grid = torch.tensor(0.3, dtype=torch.double), (2, 3)
    h = torch.randn(2, 7, 8, dtype=torch.double, requires_grad=True)
    weight = torch.randn_like(h)
    out = adapter(h, scale, grid if visual else None)
    (out * weight).sum().backward()
    x = h.detach().clone().requires_grad_()
    y = x @ adapter.down.weight.flatten(1).T
    if visual:
        image = y[:, 1:].transpose(1, 2).unflatten(2, grid)
        image = torch.nn.functional.conv2d(image, adapter.mid.weight, padding=1, groups=4)
        y = torch.cat([y[:, :1], image.flatten(2).transpose(1, 2)], dim=1)
    y = torch.nn.functional.gelu(y) @ adapter.up.weight.flatten(1).T
    a = torch.nn.functional.layer_norm(x + y, (8,), adapter.norm.weight, adapter.norm.bias)
    if visual:
        a = torch.cat([torch.zeros_like(a[:, :1]), a[:, 1:]], dim=1)
    expected = x + scale * a
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-12)
    names, parameters = zip(*adapter.named_parameters(), strict=True)
    true = torch.autograd.grad((expected * weight).sum(), [x, *parameters])
    torch.testing.assert_close(h.grad, true[0], rtol=1e-9, atol=1e-12)
    for name, parameter, gradient in zip(names, parameters, true[1:], strict=True):
        torch.testing.assert_close(parameter.grad, gradient / scale, rtol=1e-9, atol=1e-12, msg=name)


def test_gradients_reach_the_adapters_only(clip):
    images, tokens = batch()
    model = AdaptedCLIP(clip, 2, 2, 0.1)
    (model.encode_image(images).sum() + model.encode_text(tokens).sum()).backward()
    assert all(p.grad is None for p in clip.parameters())
    for name, parameter in model.adapters.named_parameters():
        # After the last image block only CLS is read, so its MLP adapter has no effect.
        dead = name.startswith("visual_adapter.2.mlp_conv")
        assert (parameter.grad is None or not parameter.grad.any()) == dead, name


@torch.no_grad()
def test_save_and_load_give_identical_features(clip, tmp_path):
    images, _ = batch()
    model = AdaptedCLIP(clip, 1, 2, 0.1)
    artifacts.save(model, tmp_path, seed=1)
    again, config = artifact.load(make_clip(type(clip)), tmp_path)
    assert config.seed == 1
    assert torch.equal(model.encode_image(images), again.encode_image(images))


def test_missing_extra_and_misshapen_tensors_are_all_named(tmp_path):
    model = AdaptedCLIP(make_clip(open_clip.CLIP), 1, 2, 0.1)
    artifacts.save(model, tmp_path)
    tensors = load_file(tmp_path / ADAPTER_FILE)
    del tensors["text_adapter.1.att_conv.down.weight"]
    tensors["stranger"] = torch.zeros(1)
    tensors["text_adapter.2.att_conv.norm.bias"] = torch.zeros(7)
    save_file(tensors, tmp_path / ADAPTER_FILE)
    with pytest.raises(ValueError, match="does not fit") as error:
        artifact.load(make_clip(open_clip.CLIP), tmp_path)
    for part in ("missing text_adapter.1.att_conv.down", "unexpected stranger", "norm.bias has shape (7,)"):
        assert part in str(error.value)


@pytest.mark.parametrize(("start", "end"), [(1, 3), (0, 2), (2, 1)])
def test_impossible_blocks_are_refused(start, end):
    with pytest.raises(ValueError, match=r"start \d"):
        AdaptedCLIP(make_clip(open_clip.CLIP), start, end, 0.1)


def test_exactly_one_negative_class_works():
    selected, targets = step_classes([0, 2], 3, 1, torch.Generator())
    assert (selected, targets) == ([0, 2, 1], [0, 1])


def test_no_batch_class_is_missing_or_doubled():
    generator = torch.Generator().manual_seed(0)
    for ratio in (None, 0, 1, 5):
        selected, targets = step_classes([7, 3, 7, 1], 12, ratio, generator)
        assert len(set(selected)) == len(selected) == {None: 12, 0: 3, 1: 6, 5: 12}[ratio]
        assert [selected[t] for t in targets] == [7, 3, 7, 1]


def test_a_class_without_prompts_is_an_error():
    with pytest.raises(ValueError, match=r"\[1\] have no prompt"):
        class_features(torch.randn(2, 4), torch.tensor([0, 2]), 3)


def test_half_precision_on_disk(tmp_path):
    from heba.clip.tiny import load_tiny_clip

    clip, _ = load_tiny_clip()
    model = AdaptedCLIP(clip, 1, 2, 0.1)
    for name, dtype in (("full", torch.float32), ("half", torch.float16)):
        artifacts.save(model, tmp_path / name, dtype)
    size = {name: (tmp_path / name / "adapter.safetensors").stat().st_size for name in ("full", "half")}
    assert size["half"] < 0.6 * size["full"]
    wanted = {k: v.clone() for k, v in model.adapters.state_dict().items()}
    loaded, _ = artifact.load(load_tiny_clip()[0], tmp_path / "half")
    for name, value in loaded.adapters.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, wanted[name], rtol=1e-3, atol=1e-7)
    with torch.no_grad():
        next(model.adapters.parameters()).flatten()[0] = 1e6
    with pytest.raises(ValueError, match="fp32"):
        artifacts.save(model, tmp_path / "overflow", torch.float16)
    assert not list((tmp_path / "overflow").iterdir())


def test_the_seed_of_build_is_that_of_the_initialisation():
    """Whatever drew random numbers before, and without a trace in torch's own generator."""

    def initial(seed, before):
        torch.manual_seed(before)
        built = method.build(make_clip(open_clip.CLIP), 2, Settings(start=1, end=2), seed)
        return built.adapters.state_dict()["text_adapter.1.att_conv.down.weight"]

    assert torch.equal(initial(1, before=5), initial(1, before=6))
    assert not torch.equal(initial(1, before=5), initial(2, before=5))
    torch.manual_seed(7)
    expected = torch.rand(3)
    clip = make_clip(open_clip.CLIP)
    torch.manual_seed(7)
    method.build(clip, 2, Settings(start=1, end=2), 1)
    assert torch.equal(torch.rand(3), expected)
