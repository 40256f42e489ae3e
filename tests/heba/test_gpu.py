"""What can be known of a GPU without one: types, devices, and that nothing waits for it within an epoch
(`benchmarks.fake`)."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from benchmarks.fake import fake_gpu, move
from heba import methods
from heba.clip.blocks import Packing, pack, take_rows
from heba.clip.device import in_bf16, send, sent
from heba.clip.preprocess import Preprocess, normalise
from heba.data import images as data_images
from heba.data.images import crop_batch, keep_images
from heba.fit.draws import plan_epoch
from heba.fit.run import Run
from heba.fit.static import StaticStep
from heba.methods.heba.training import recipe
from tests.heba.test_methods import N_CLASSES, NAMES, SHOTS, Data, fitted, in_towers, logits, settings_of
from tests.heba.test_training import setup

GPU = torch.device("cuda")
# Which methods' set-up reads values, of which the fake GPU has none.
READ = {"ape", "gda", "tip_adapter", "tip_adapter_f"}
# Those with a solver or a search that reads its values from step to step.
SOLVERS = {"cross_modal", "linear_probe", "lp_plus_plus"}
IN_TOWERS = [name for name in NAMES if in_towers(name)]


def train_on(gpu, name, data, bf16):
    """Train on the fake GPU; returns the model, its settings, and what waited, by the place in the code."""
    move(data.clip)
    if bf16:
        in_bf16(data.clip)
    settings, method = settings_of(name), methods.part(name, "method")
    # No dropout, for a generator on the GPU needs one.
    short = {"epochs": 2, "epochs_few": 2, "steps_per_shot": 1, "dropout": 0.0}
    settings = settings.model_copy(update={k: v for k, v in short.items() if hasattr(settings, k)})
    records = []
    model = method.build(data.clip, N_CLASSES, settings, seed=1)
    run = Run(seed=1, shots=SHOTS, bf16=bf16, on_epoch=records.append)
    gpu.clear()
    method.fit(model, data.train, data.val, data.classes, settings, run)
    places = Counter(wait.partition(":")[0] for wait in gpu.waits)
    places.pop("data/images.py keep", None)  # of each image once, before the training
    return model, settings, records, places


@pytest.mark.parametrize(
    "bf16", [pytest.param(False, id="fp32", marks=pytest.mark.slow), pytest.param(True, id="bf16")]
)
@pytest.mark.parametrize("name", IN_TOWERS)
def test_a_training_in_the_towers_and_an_evaluation(name, bf16, tmp_path):
    """Types and devices fit; losses are fetched at the end of an epoch; what is sent within it is pinned."""
    data, method = Data(tmp_path), methods.part(name, "method")
    images = data.test_images()
    with fake_gpu() as gpu:
        model, settings, records, places = train_on(gpu, name, data, bf16)
        steps = 4 if name == "clip_lora" else 6
        assert places.pop("fit/loop.py finite") == steps  # their losses, at the end of each epoch
        assert len(records) == 2
        # Nothing else waits at every step; what is prepared does, once.
        assert not [place for place, n in places.items() if n >= steps], places
        if name == "cocoop":  # it reads the lengths of the texts that it has for each image
            return
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            classifier = method.classifier(model, data.classes, settings, True)
            classifier = {key: send(tensor, GPU) for key, tensor in classifier.items()}
            gpu.clear()
            images = replace(images, pixels=send(images.pixels, GPU), features=send(images.features, GPU))
            found = method.logits(model, classifier, images)
        assert (found.device.type, found.dtype, found.shape) == ("cuda", torch.float32, (30, N_CLASSES))
        assert not gpu.waits
        method.detach(model)


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(IN_TOWERS) - READ - SOLVERS))
def test_a_training_on_features(name, tmp_path):
    with fake_gpu() as gpu:
        _, _, records, places = train_on(gpu, name, Data(tmp_path), False)
    assert records
    assert places.pop("fit/loop.py finite") >= 6
    assert not [place for place, n in places.items() if n >= 6], places


def test_what_the_fake_gpu_refuses():
    with fake_gpu() as gpu:
        x = torch.zeros(4, 8, device=GPU)
        with pytest.raises(TypeError, match=r"native_layer_norm: torch\.bfloat16, torch\.float32"):
            torch.nn.functional.layer_norm(x.bfloat16(), (8,), torch.ones(8, device=GPU))
        with pytest.raises(TypeError, match="on the CPU"):
            x[torch.tensor([0, 1])]
        gpu.clear()
        x.to("cpu")
        torch.zeros(3).to(GPU)
        torch.zeros(3).pin_memory().to(GPU)
        x.sum().item()
        assert len(gpu.waits) == 4
        gpu.clear()
        send(torch.zeros(3), GPU)
        assert not gpu.waits


@pytest.mark.parametrize("name", IN_TOWERS)
def test_weights_in_bf16_change_no_bit(name, tmp_path):
    """They are what autocast makes of them at every use."""
    found = []
    for convert in (lambda clip: clip, in_bf16):
        data = Data(tmp_path)
        convert(data.clip)
        model = fitted(name, data, bf16=True)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            classifier = methods.part(name, "method").classifier(model, data.classes, settings_of(name), True)
            predicted = logits(name, data, model, classifier, data.test_images())
        trained = methods.part(name, "method").trained(model).state_dict()
        found.append([*trained.values(), *classifier.values(), predicted])
    assert data.clip.visual.conv1.weight.dtype == torch.bfloat16
    assert data.clip.logit_scale.dtype == data.clip.ln_final.weight.dtype == torch.float32
    assert all(map(torch.equal, *found))


def test_a_step_in_static_shapes_accumulates_nothing():
    model, _, labels, bank, settings, _ = setup(neg_ratio=1, batch_size=3)
    generator, size = torch.Generator().manual_seed(0), 16
    with fake_gpu() as gpu:
        move(model)
        bank = replace(bank, tokens=bank.tokens.to(GPU))
        step = plan_epoch(labels, [(36, 40)] * 10, bank, model, recipe(settings), generator)[0]
        size = model.clip.visual.image_size[0]
        static = StaticStep(model, bank, 3, size, recipe(settings), bf16=True)
        tokens = static.fill(torch.zeros(3, 3, size, size, device=GPU), step)
        gpu.clear()
        static.compute(tokens)
        assert not gpu.waits
        assert gpu.kernels["zero_"] == 0
        assert gpu.kernels["_foreach_copy_"] == 1


def test_the_steps_of_an_epoch_are_sent_in_two_copies():
    model, _, labels, bank, settings, _ = setup(neg_ratio=1, batch_size=3)
    sizes = [(36, 40)] * 10
    here = plan_epoch(labels, sizes, bank, model, recipe(settings), torch.Generator().manual_seed(0))
    with fake_gpu() as gpu:
        move(model)
        there = plan_epoch(labels, sizes, bank, model, recipe(settings), torch.Generator().manual_seed(0))
        assert gpu.kernels["_to_copy"] <= 2 + len(list(model.parameters())) + len(list(model.buffers()))
        for one, other in zip(here, there, strict=True):
            assert one.packing.length == other.packing.length
            for key in ("targets", "prompts", "text_scales", "visual_scales"):
                a, b = getattr(one, key), getattr(other, key)
                assert (b.device.type, b.shape, b.dtype) == ("cuda", a.shape, a.dtype), key
            assert (one.packing.rows is None) == (other.packing.rows is None)


def test_rows_that_differ_go_back_by_a_copy():
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([5, 0, 6])
    assert torch.equal(take_rows(x, rows), x[rows])
    assert torch.autograd.gradcheck(lambda x: take_rows(x, rows), x)
    with fake_gpu() as gpu:
        x = torch.zeros(7, 3, device=GPU, requires_grad=True)
        take_rows(x, rows.to(GPU)).sum().backward()
        assert x.grad.shape == (7, 3)
        assert gpu.kernels["index_put_"] + gpu.kernels["_index_put_impl_"] + gpu.kernels["index_add_"] == 0


def test_packing_and_back():
    packing = pack([2, 4, 1], torch.device("cpu"))
    x = torch.randn(3, 4, 2)
    inside = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    assert torch.equal(packing.unpack(packing.pack(x)), x * inside.unsqueeze(-1))
    assert isinstance(packing, Packing)


def test_batches_come_in_their_order():
    batches = [torch.full((2,), float(i)) for i in range(5)]
    assert [b.tolist() for b in sent(iter(batches), torch.device("cpu"))] == [b.tolist() for b in batches]
    assert not list(sent([], torch.device("cpu")))
    taken = []
    with fake_gpu() as gpu:
        coming = sent((taken.append(i) or b for i, b in enumerate(batches)), GPU)
        assert next(coming).device.type == "cuda"
        assert taken == [0, 1]  # the next one is on its way
        assert not gpu.waits


def test_normalising_sends_nothing():
    with fake_gpu() as gpu:
        x = torch.zeros(2, 3, 4, 4, device=GPU, dtype=torch.uint8)
        normalise(x, Preprocess(4))
        gpu.clear()
        normalise(x, Preprocess(4))
        assert not gpu.waits


def test_where_training_images_are_kept(monkeypatch):
    preprocess = Preprocess(4)
    small, large = torch.zeros(3, 9, 9, dtype=torch.uint8), torch.zeros(3, 5, 4 * 32 + 1, dtype=torch.uint8)
    boxes, flips = [(0, 0, 5, 5), (0, 2, 5, 100)], [False, True]
    here = crop_batch(keep_images([small, large], preprocess, torch.device("cpu")), boxes, flips, preprocess)
    for most, place in ((1e9, "cuda"), (100, "cpu")):
        monkeypatch.setattr(data_images, "MOST_ON_GPU", most)
        with fake_gpu() as gpu:
            kept = keep_images([small, large], preprocess, GPU)
            assert [image.device.type for image in kept] == [place, "cpu"]
            gpu.clear()
            found = crop_batch(kept, boxes, flips, preprocess, GPU)
            assert (found.device.type, found.shape) == ("cuda", here.shape)
            assert not [wait for wait in gpu.waits if "preprocess.py" not in wait]
