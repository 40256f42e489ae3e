"""Every family of backbones, built from open_clip's own configs at a reduced size with random weights."""

import functools
import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from heba import artifact
from heba.clip import backbone
from heba.clip.architecture import depth, read_architecture
from heba.clip.features import encode_prompts
from heba.clip.preprocess import Preprocess, preprocess_of
from heba.clip.towers import check_towers, cut_texts, encode_text_plain, image_blocks, text_lengths
from heba.data.prompts import tokenize
from heba.fit.draws import TextBank
from heba.fit.run import Run
from heba.methods.heba.model import AdaptedCLIP
from heba.methods.heba.settings import Settings
from heba.methods.heba.training import train
from tests.heba import artifacts

VISION = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2}
TEXT = {"width": 32, "heads": 2, "layers": 2, "vocab_size": 100, "context_length": 12}
CREATE = timm.create_model
TIMM = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}
# Per family: a model, what its trunk in timm needs besides, tokens before the patches, whether only CLS is read.
FAMILIES = {
    "OpenAI": ("ViT-B-16-quickgelu", {}, 1, True),
    "LAION": ("ViT-bigG-14", {}, 1, True),
    "layer scale": ("ViT-M-16-alt", {}, 1, True),
    "CLIPA": ("ViT-L-14-CLIPA", {}, 1, False),
    "worldwide": ("ViT-L-14-worldwide", {}, 1, True),
    "EVA01": ("EVA01-g-14", {"patch_size": 8}, 1, True),
    "EVA02": ("EVA02-L-14", {"patch_size": 8}, 1, True),
    "SigLIP": ("ViT-B-16-SigLIP", {"patch_size": 8}, 0, False),
    "SigLIP2": ("ViT-SO400M-16-SigLIP2-256", {"patch_size": 8}, 0, False),
    "registers": ("ViT-B-16-SigLIP", {"patch_size": 8, "reg_tokens": 3, "class_token": True}, 4, False),
    "i18n": ("ViT-SO400M-16-SigLIP-i18n-256", {"patch_size": 8}, 0, False),
    "PE-Core": ("PE-Core-T-16-384", {"patch_size": 8, "attn_pool_num_heads": 2}, 1, False),
    "MobileCLIP": ("MobileCLIP-B", {"embed_dim": 768, "num_heads": 12}, 1, True),
    "MobileCLIP2": ("MobileCLIP2-L-14", {"patch_size": 8}, 1, True),
    "ViTamin": ("ViTamin-S", {"embed_dim": 384}, 0, False),
    "relative positions": ("vit_relpos_medium_patch16_cls_224", {"patch_size": 8}, 1, True),
    "average": ("vit_medium_patch16_gap_256", {"patch_size": 8}, 0, False),
}


def reduced(family, monkeypatch):
    """The config of a family's model, small enough for a test; timm's own part of it is made small on creation."""
    name, changes, _, _ = FAMILIES[family]
    config = json.loads(json.dumps(read_architecture(name, Path())))
    config["embed_dim"] = 32
    config["vision_cfg"] |= VISION if "timm_model_name" not in config["vision_cfg"] else {"image_size": 32}
    config["text_cfg"] |= TEXT
    small = functools.partial(CREATE, **TIMM | changes)
    monkeypatch.setattr(open_clip.timm_model.timm, "create_model", small)
    return config


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def make(family, monkeypatch):
    config = reduced(family, monkeypatch)

    def clip():
        torch.manual_seed(0)
        built = backbone.build(config)
        # Gates, layer scales and some projections start at or near zero, where a gradient would vanish.
        with torch.no_grad():
            for parameter in built.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.15)
                elif parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.3)
        return built.eval()

    return clip


def batch(clip):
    """Three images, and five texts that end at different places, of which two with the same words before EOT."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 90, (5, 12), generator=generator)
    eos = getattr(clip, "text_eos_id", 2) if getattr(clip, "text_pool_type", "") == "eos" else 99
    for i, end in enumerate((3, 5, 4, 11, 6)):
        tokens[i, end], tokens[i, end + 1 :] = eos, 0
    return torch.randn(3, 3, 32, 32, generator=generator), tokens


def logits(model, images, tokens, scale=None):
    image, text = model.encode_image(images, scale), model.encode_text(tokens, scale)
    return model.logit_factor() * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T


@torch.no_grad()
def test_scale_0_is_the_plain_model_whose_weights_are_untouched(make):
    clip = make()
    images, tokens = batch(clip)
    weights = {k: v.clone() for k, v in clip.state_dict().items()}
    plain = clip.encode_image(images), clip.encode_text(tokens)
    model = AdaptedCLIP(clip, 1, 2, 0.1)
    for encode, value, expected in (
        (model.encode_image, images, plain[0]),
        (model.encode_text, tokens, plain[1]),
    ):
        torch.testing.assert_close(encode(value, 0.0), expected, atol=1e-5, rtol=1e-5)
        assert (encode(value) - expected).abs().max() > 1e-3
    torch.testing.assert_close(encode_text_plain(clip, tokens), plain[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(clip.encode_image(images), plain[0], atol=1e-5, rtol=1e-5)
    assert clip.state_dict().keys() == weights.keys()
    assert all(torch.equal(weights[k], v) for k, v in clip.state_dict().items())


def test_gradients_reach_every_adapter_that_can_have_one(family, make):
    clip = make()
    _, _, _, cls_only = FAMILIES[family]
    model = AdaptedCLIP(clip, 1, 2, 0.1)
    logits(model, *batch(clip)).square().sum().backward()
    assert all(p.grad is None for p in clip.parameters())
    for name, parameter in model.adapters.named_parameters():
        # Where CLS alone is read, what the last MLP makes of the patches has no effect.
        dead = cls_only and name.startswith("visual_adapter.2.mlp_conv")
        assert (parameter.grad is None) == dead, name
        assert dead or parameter.grad.any(), name


@torch.no_grad()
def test_save_and_load_give_identical_logits(make, tmp_path):
    model = AdaptedCLIP(make(), 2, 2, 0.1)
    artifacts.save(model, tmp_path)
    again, _ = artifact.load(make(), tmp_path)
    assert torch.equal(logits(model, *batch(model.clip)), logits(again, *batch(again.clip)))


@torch.no_grad()
def test_what_precedes_the_patches_gets_no_adapter(family, make):
    clip = make()
    images, _ = batch(clip)
    streams = []
    handle = image_blocks(clip).norms[0].register_forward_hook(lambda module, inputs, out: streams.append(out))
    clip.encode_image(images)
    handle.remove()
    model = AdaptedCLIP(clip, 1, 2, 0.1)
    patches, before = model.grid[0] * model.grid[1], FAMILIES[family][2]
    adapted = model.adapters.visual_adapter["1"]["att_conv"](streams[0], torch.tensor(0.1), model.grid)
    moved = (adapted - streams[0]).abs().amax(dim=(0, 2)) > 0
    assert moved.tolist() == [False] * before + [True] * patches


def test_texts_are_cut_only_where_nothing_depends_on_it(family, make):
    clip = make()
    _, tokens = batch(clip)
    bidirectional = family in ("CLIPA", "SigLIP", "SigLIP2", "registers", "i18n", "MobileCLIP2")
    short = tokens[[0, 2]]
    assert cut_texts(clip, short).shape[1] == (12 if bidirectional else 5)
    with torch.no_grad():
        expected = clip.encode_text(short)
        found = encode_prompts(clip, short, functools.partial(encode_text_plain, clip), torch.device("cpu"), 1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["CLIPA", "SigLIP", "EVA02", "MobileCLIP2"], indirect=True)
def test_training_learns(make):
    clip = make()
    _, tokens = batch(clip)
    torch.manual_seed(5)
    model = AdaptedCLIP(clip, 1, 2, 0.1)
    bank = TextBank(tokens, text_lengths(clip, tokens), [0, 1, 2, 3, 4, 5], None)
    images = [torch.full((3, 36, 40), 50 * (i % 5), dtype=torch.uint8) for i in range(10)]
    settings = Settings(epochs=6, batch_size=5, lr=0.01, scale_factor=2.0, neg_ratio=0)
    history = train(model, images, [i % 5 for i in range(10)], bank, settings, Run(seed=3))
    losses = [record["loss"] for record in history]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("family", ["CLIPA", "SigLIP", "EVA02", "ViTamin"], indirect=True)
def test_mixed_precision(make):
    model = AdaptedCLIP(make(), 1, 2, 0.1)
    exact = logits(model, *batch(model.clip))
    with torch.autocast("cpu", torch.bfloat16):
        rough = logits(model, *batch(model.clip))
    rough.float().square().sum().backward()
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.adapters.parameters())


def test_every_model_of_open_clip_is_taken_or_refused_with_a_reason():
    refused = {}
    for name in open_clip.list_models():
        try:
            assert depth(read_architecture(name, Path())) >= 10
        except ValueError as error:
            refused[name] = str(error)
    for text in refused.values():
        assert "SigLIP2" in text  # what is supported
    for start, reason in (
        ("RN", "ResNet"),
        ("coca", "CoCa"),
        ("convnext", "no plain vision transformer"),
        ("swin", "no plain vision transformer"),
        ("MobileCLIP-S", "no plain vision transformer"),
        ("EVA02-E", "after the attention"),
        ("xlm-roberta", "Hugging Face"),
    ):
        assert [n for n in refused if n.startswith(start) and reason in refused[n]], start
    taken = set(open_clip.list_models()) - set(refused)
    assert {name for name, *_ in FAMILIES.values()} <= taken
    assert not [n for n in refused if n.startswith(("ViT-", "PE-", "ViTamin"))]


@pytest.mark.slow
def test_the_names_of_timms_towers_do_not_deceive():
    """Every image tower that a config of a supported model names, at its full size but without memory for it."""
    seen = set()
    for name in open_clip.list_models():
        try:
            config = read_architecture(name, Path())
        except ValueError:
            continue
        if config["vision_cfg"].get("timm_model_name") not in {None, *seen}:
            seen.add(config["vision_cfg"]["timm_model_name"])
            with torch.device("meta"):
                clip = backbone.build(config | {"text_cfg": config["text_cfg"] | {"layers": 1}})
            check_towers(clip)
    assert len(seen) > 30


def test_towers_that_only_show_when_built_are_refused(monkeypatch):
    config = reduced("EVA02", monkeypatch)
    glu = functools.partial(CREATE, scale_mlp=False, **TIMM, patch_size=8)
    for trunk, message in (
        (glu("eva02_base_patch16_clip_224"), "GluMlp"),
        (glu("eva02_base_patch16_clip_224", use_post_norm=True), "EvaBlockPostNorm"),
        (CREATE("resnet18"), "ResNet of timm"),
    ):
        clip = backbone.build(config)
        clip.visual.trunk = trunk
        with pytest.raises(ValueError, match=message):
            AdaptedCLIP(clip, 1, 1, 0.1)


def test_blocks_beyond_the_depth_of_a_timm_tower_are_refused(monkeypatch):
    clip = backbone.build(reduced("SigLIP", monkeypatch))
    with pytest.raises(ValueError, match=r"end 3 .* <= 2"):
        AdaptedCLIP(clip, 1, 3, 0.1)


def test_cuda_graphs_are_refused_for_timms_towers(monkeypatch):
    clip = backbone.build(reduced("SigLIP", monkeypatch)).eval()
    _, tokens = batch(clip)
    bank = TextBank(tokens, text_lengths(clip, tokens), [0, 5], None)
    settings = Settings(epochs=1, batch_size=2)
    model, image = AdaptedCLIP(clip, 1, 2, 0.1), torch.zeros(3, 32, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match="cuda_graphs"):
        train(model, [image] * 2, [0, 0], bank, settings, Run(seed=3, cuda_graphs=True))


SMALL = {"embed_dim": 32, "vision_cfg": VISION, "text_cfg": TEXT}


def test_a_config_and_weights_from_files(tmp_path):
    cfg = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "resize_mode": "squash"}
    (tmp_path / "small.json").write_text(json.dumps(SMALL | {"preprocess_cfg": cfg}))
    torch.manual_seed(0)
    clip = backbone.build(SMALL)
    save_file(clip.state_dict(), tmp_path / "w.safetensors")
    loaded = backbone.load("small.json", "w.safetensors", tmp_path)
    assert loaded.preprocess == Preprocess(32, (0.5,) * 3, (0.5,) * 3, "bicubic", "squash")
    assert loaded.tokenizer(["a cat"]).shape == (1, 12)
    assert all(torch.equal(v, clip.state_dict()[k]) for k, v in loaded.clip.state_dict().items())
    assert (
        backbone.sha256(backbone.weights_file("small.json", "w.safetensors", tmp_path))
        == hashlib.sha256((tmp_path / "w.safetensors").read_bytes()).hexdigest()
    )
    for changes, message in (
        ({"resize_mode": "longest"}, "resize_mode must be shortest or squash"),
        ({"mean": 0.5}, "mean must have three values"),
    ):
        (tmp_path / "small.json").write_text(json.dumps(SMALL | {"preprocess_cfg": cfg | changes}))
        with pytest.raises(ValueError, match=message):
            backbone.load("small.json", "w.safetensors", tmp_path)


def test_images_are_made_as_the_published_weights_want_them(tmp_path, monkeypatch):
    """Also for a local file, of which open_clip knows nothing."""
    for family, expected in (
        ("OpenAI", Preprocess(32)),
        ("SigLIP", Preprocess(32, (0.5,) * 3, (0.5,) * 3, "bicubic", "squash")),
        ("MobileCLIP", Preprocess(32, (0.0,) * 3, (1.0,) * 3, "bilinear", "shortest")),
    ):
        config = reduced(family, monkeypatch)
        monkeypatch.setattr(backbone, "read_architecture", lambda name, root, c=config: c)
        monkeypatch.setattr(backbone, "load_tokenizer", lambda name, root: None)
        save_file(
            {k: v.contiguous() for k, v in backbone.build(config).state_dict().items()}, tmp_path / "w.safetensors"
        )
        loaded = backbone.load(FAMILIES[family][0], "w.safetensors", tmp_path)
        assert loaded.preprocess == preprocess_of(loaded.clip) == expected


def test_what_can_not_be_loaded_is_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"neither a file .* open_clip has for ViT-B-32, which are: openai"):
        backbone.weights_file("ViT-B-32", "nonsense", tmp_path)
    with pytest.raises(ValueError, match="open_clip has no model 'nonsense'"):
        backbone.load("nonsense", "openai", tmp_path)
    with pytest.raises(ValueError, match="RN50 has a ResNet as its image tower; HeBA takes vision transformers"):
        backbone.load("RN50", "openai", tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"the tokenizer of ViT-B-16-SigLIP .*pip install transformers"):
        backbone.load("ViT-B-16-SigLIP", "webli", tmp_path)


def test_texts_cut_by_a_tokenizer_of_hugging_face_are_reported():
    """Its wrapper in open_clip pads with what may be the largest id, so EOT is no guide."""

    class Inner:
        def __call__(self, texts):
            return SimpleNamespace(input_ids=[[*range(len(text.split())), 1] for text in texts])

    class Wrapper:
        tokenizer = Inner()

        def clean_fn(self, text):
            return text.strip()

        def __call__(self, texts):
            rows = [(ids + [1] * 4)[:4] for ids in self.tokenizer(texts).input_ids]
            return torch.tensor(rows)

    tokens, cut = tokenize(["a b c", "a b c d", "a"], Wrapper())
    assert (tokens.shape, cut) == ((3, 4), ["a b c d"])
