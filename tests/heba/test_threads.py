"""Calls at the same time, in threads and within each other, and several models on one CLIP."""

import io
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from heba.clip.tiny import load_tiny_clip
from heba.methods.heba.adapters import Variant
from heba.methods.heba.model import AdaptedCLIP
from heba.predict import load
from tests.heba import artifacts
from tests.heba.test_model import batch, make_clip

# The second has an adapter that reads the packing of texts, which is another call's state too.
VARIANTS = [Variant(), Variant(text_block="conv1d")]


def in_the_middle_of(module, action):
    """Do `action` in the first call of `module`, once it has its output."""
    first = iter([action])

    def hook(*_):
        for act in first:
            act()

    return module.register_forward_hook(hook, prepend=True)


def norms(clip):
    """A layer before the first adapter of each tower."""
    return {"visual": clip.visual.transformer.resblocks[0].ln_1, "text": clip.transformer.resblocks[0].ln_1}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tower", ["visual", "text"])
@torch.no_grad()
def test_a_call_keeps_its_scales_while_another_thread_begins_and_ends_one(tower, variant):
    images, tokens = batch()
    model = AdaptedCLIP(make_clip(open_clip.CLIP), 1, 2, 0.3, variant=variant)
    inputs, encode = (images, model.encode_image) if tower == "visual" else (tokens, model.encode_text)
    alone, other = encode(inputs), encode(inputs[:2], 0.7)
    found = []

    def another_thread():
        thread = threading.Thread(target=lambda: found.append(encode(inputs[:2], 0.7)))
        with torch.no_grad():
            thread.start()
            thread.join()

    handle = in_the_middle_of(norms(model.clip)[tower], another_thread)
    assert torch.equal(encode(inputs), alone)
    handle.remove()
    torch.testing.assert_close(found[0], other, rtol=0, atol=0)


@torch.no_grad()
def test_each_model_on_one_clip_has_its_own_adapters_also_within_a_call_of_another():
    images, _ = batch()
    clip = make_clip(open_clip.CLIP)
    plain = clip.encode_image(images)
    first, second = AdaptedCLIP(clip, 1, 2, 0.3), AdaptedCLIP(clip, 1, 1, 0.9)
    alone = [model.encode_image(images) for model in (first, second)]
    assert not torch.allclose(alone[0], alone[1], atol=1e-3)
    found = []
    handle = in_the_middle_of(
        norms(clip)["visual"],
        lambda: found.extend([second.encode_image(images), first.encode_image(images, 0.0)]),
    )
    assert torch.equal(first.encode_image(images), alone[0])
    handle.remove()
    assert torch.equal(found[0], alone[1])
    torch.testing.assert_close(found[1], plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@torch.no_grad()
def test_detaching_gives_back_the_clip_when_the_last_model_has_left(order):
    images, tokens = batch()
    clip = make_clip(open_clip.CLIP).requires_grad_(False).eval()
    modules = dict(clip.named_modules())
    plain = clip.encode_image(images), clip.encode_text(tokens)
    models = [AdaptedCLIP(clip, 1, 2, 0.3), AdaptedCLIP(clip, 2, 2, 0.9)]
    left, staying = (models[i] for i in order)
    before = staying.encode_image(images)
    left.detach()
    left.detach()
    assert torch.equal(staying.encode_image(images), before)
    staying.detach()
    assert dict(clip.named_modules()) == modules
    assert torch.equal(clip.encode_image(images), plain[0])
    assert torch.equal(clip.encode_text(tokens), plain[1])
    assert not any(module._forward_hooks for module in clip.modules())


def test_eight_threads_have_the_gradients_of_one():
    images, tokens = batch()
    model = AdaptedCLIP(make_clip(open_clip.CLIP), 1, 2, 0.3)
    parameters = list(model.adapters.parameters())

    def gradients(i):
        scale = 0.1 * (1 + i % 4)
        loss = model.encode_image(images, scale).sum() + model.encode_text(tokens, scale).square().sum()
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    alone = [gradients(i) for i in range(4)]
    with ThreadPoolExecutor(8) as threads:
        for i, found in enumerate(threads.map(gradients, range(64))):
            for one, many in zip(alone[i % 4], found, strict=True):
                assert (one is None) == (many is None)
                if one is not None:
                    torch.testing.assert_close(many, one, rtol=1e-5, atol=1e-6)


def pictures(n, side):
    generator = np.random.default_rng(0)
    files = []
    for _ in range(n):
        file = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file, "PNG")
        files.append(file.getvalue())
    return files


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A classifier that many threads use."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("shared") / "adapter"
    names = [f"class {i}" for i in range(20)]
    artifacts.save(AdaptedCLIP(load_tiny_clip()[0], 1, 4, 0.3), folder, class_names=names, backbone=artifacts.TINY)
    artifacts.save_classifier(torch.randn(20, 128), folder, scale=0.3)
    return load(folder)


def test_eight_threads_share_a_classifier(shared):
    files = pictures(30, 40)

    def predict(i):
        (found,) = shared.predict(Image.open(io.BytesIO(files[i % 30])))
        return found

    alone = [predict(i) for i in range(30)]
    with ThreadPoolExecutor(8) as threads:
        for i, found in enumerate(threads.map(predict, range(240))):
            assert found.classes == alone[i % 30].classes
            assert found.probabilities == pytest.approx(alone[i % 30].probabilities, abs=1e-6)


def test_threads_share_an_image_that_no_one_has_read_yet(shared):
    """Also the threads of one call, which is given the same image twice."""
    (file,) = pictures(1, 600)
    (alone,) = shared.predict(Image.open(io.BytesIO(file)))
    for _ in range(5):
        image = Image.open(io.BytesIO(file))
        with ThreadPoolExecutor(8) as threads:
            for found in threads.map(lambda opened: list(shared.predict([opened] * 4)), [image] * 8):
                assert [p.error for p in found] == [None] * 4
                assert [p.classes for p in found] == [alone.classes] * 4
