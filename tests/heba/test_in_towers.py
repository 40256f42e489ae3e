"""Methods inside the towers, beyond the numbers of their official codes."""

import copy
import math
from contextlib import contextmanager

import open_clip
import pytest
import torch
from PIL import Image

from heba.clip.features import Classes
from heba.data.images import LabelledImages
from heba.fit.batches import crops
from heba.fit.run import Run
from heba.methods.clip_lora import method as clip_lora
from heba.methods.clip_lora import settings as lora_settings
from heba.methods.mma import method as mma
from heba.methods.mma import settings as mma_settings

tokenizer = open_clip.SimpleTokenizer(context_length=77)


def small():
    return open_clip.CLIP(
        embed_dim=16,
        vision_cfg={"image_size": 8, "patch_size": 4, "width": 32, "head_width": 16, "layers": 3},
        text_cfg={"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 4},
    ).eval()


def classes_of(n):
    names = [f"class {k}" for k in range(n)]
    tokens = tokenizer(names)
    return Classes(names, tokens, torch.arange(n), torch.zeros(n, 16), tokenizer)


def test_the_official_number_of_steps_in_epochs_of_which_the_last_is_cut():
    """16 shots of 37 classes: 18 whole batches of 32 and one of 16 in an epoch, 8000 steps."""
    clip, chosen = small(), lora_settings.Settings()
    model = clip_lora.build(clip, 37, chosen, seed=0)
    training = clip_lora.training_of(model, 37 * 16, classes_of(37), chosen, Run(seed=1, shots=16))
    assert (training.schedule.epochs, training.schedule.steps, training.schedule.total()) == (422, 19, 8000)
    assert training.step_lr(0) == 2e-4
    assert training.step_lr(8000) == pytest.approx(1e-6)
    assert lora_settings.work(chosen, 37 * 16, 37).steps == 8000


def counted_in(counted):
    """The steps of a training that were announced, and those that were counted."""
    [start] = [i for i, value in enumerate(counted) if isinstance(value, tuple) and value[1] == "train"]
    return [counted[start][0], sum(counted[start + 1 :])]


def test_an_epoch_has_all_images_and_the_last_step_is_the_last_one(tmp_path):
    files = [tmp_path / f"{i}.png" for i in range(5)]
    for file in files:
        Image.new("RGB", (9, 9)).save(file)
    train, taken, counted = LabelledImages(files, [0, 1, 0, 1, 0]), [], []
    chosen = lora_settings.Settings(steps_per_shot=7, batch_size=2)
    model = clip_lora.build(small(), 2, chosen, seed=0)

    @contextmanager
    def progress(total, what):
        counted.append((total, what))
        yield lambda n: counted.append(n)

    checkpoint = tmp_path / "checkpoint.safetensors"
    run = Run(seed=1, shots=1, on_epoch=taken.append, progress=progress, checkpoint=checkpoint)
    clip_lora.fit(model, train, train, classes_of(2), chosen, run)
    assert len(taken) == 3  # of 3, 3 and 1 steps
    assert counted_in(counted) == [7, 7]
    counted.clear()
    clip_lora.fit(model, train, train, classes_of(2), chosen, run)  # nothing is left of it
    assert counted_in(counted) == [7, 7]
    sizes = [len(labels) for _, labels in crops(model.clip, train, 2, run, keep_last=True)(0, torch.Generator())]
    assert sizes == [2, 2, 1]


def changed(model):
    """Let no change be zero."""
    for parameter in model.lora.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("which", ["both", "image", "text"])
@pytest.mark.parametrize("projections", [["q"], ["v", "out"], ["q", "k", "v", "out"]])
@torch.no_grad()
def test_what_is_added_is_what_changed_weights_would_give(which, projections):
    """Against open_clip's own towers with W + s B A in place of W."""
    torch.manual_seed(0)
    clip = small()
    chosen = lora_settings.Settings(towers=which, start=2, projections=projections, rank=3, alpha=2.0)
    model = changed(clip_lora.build(clip, 2, chosen, seed=0))
    images, tokens = torch.randn(4, 3, 8, 8), tokenizer(["a cat", "a photo of a large dog", "b"])
    other = copy.deepcopy(clip)
    for tower, blocks in (("text", other.transformer.resblocks), ("image", other.visual.transformer.resblocks)):
        for layer, parts in model.lora[tower].items():
            attn = blocks[int(layer) - 1].attn
            for projection, lora in parts.items():
                delta = 2 / math.sqrt(3) * lora.B @ lora.A
                if projection == "out":
                    attn.out_proj.weight += delta
                else:
                    attn.in_proj_weight.chunk(3)["qkv".index(projection)].add_(delta)
    torch.testing.assert_close(model.encode_image(images), other.encode_image(images), rtol=0, atol=1e-5)
    torch.testing.assert_close(model.encode_text(tokens), other.encode_text(tokens), rtol=0, atol=1e-5)
    plain = clip.encode_image(images), clip.encode_text(tokens)
    found = model.encode_image(images), model.encode_text(tokens)
    for tower, one, before in zip(("image", "text"), found, plain, strict=True):
        assert ((one - before).abs().max() > 1e-3) == (which in ("both", tower))


def test_dropout_leaves_the_mean_and_is_that_of_its_seed():
    z = torch.ones(500, 40)
    drop, same, other = (clip_lora.dropout(0.25, seed, z.device) for seed in (1, 1, 2))
    first, second = drop(z), drop(z)
    assert first.unique().tolist() == pytest.approx([0, 4 / 3])
    assert first.mean().item() == pytest.approx(1, abs=0.02)
    assert not torch.equal(first, second)
    assert torch.equal(same(z), first)
    assert not torch.equal(other(z), first)


def test_each_step_has_a_seed_of_its_own_from_the_generator_of_the_training():
    source = clip_lora.with_seeds(lambda epoch, generator: iter([(torch.zeros(1), torch.zeros(1))] * 3))

    def seeds(seed):
        return [batch[1] for batch, _ in source(0, torch.Generator().manual_seed(seed))]

    assert len(set(seeds(1))) == 3
    assert seeds(1) == seeds(1) != seeds(2)


def test_blocks_that_a_tower_lacks_are_refused():
    with pytest.raises(ValueError, match=r"clip_lora: layers 2 to 4, and the image tower has 3"):
        clip_lora.build(small(), 2, lora_settings.Settings(start=2, end=4), seed=0)
    with pytest.raises(ValueError, match=r"mma: start 2 and end 4 .* <= 3, .* \(text 4, image 3\)"):
        mma.build(small(), 2, mma_settings.Settings(start=2, end=4), seed=0)


def test_mma_learns_in_an_image_tower_of_fewer_blocks_than_the_text_tower():
    model = mma.build(small(), 2, mma_settings.Settings(start=2, end=3), seed=0)
    loss = mma.loss_of(model, classes_of(2))
    loss(torch.randn(2, 3, 8, 8), torch.tensor([0, 1])).backward()
    assert all(parameter.grad.any() for parameter in model.adapters.parameters())
