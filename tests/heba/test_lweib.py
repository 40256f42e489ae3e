"""LwEIB: texts that are cut where nothing depends on it any more, and convolutions that stay in their text."""

from dataclasses import replace

import open_clip
import pytest
import torch

from heba.clip.blocks import Packing, is_plain
from heba.clip.features import encode_prompts
from heba.clip.hooks import Call, going_on
from heba.clip.towers import cut_texts, embed_tokens, padded_texts, text_lengths
from heba.data.images import LabelledImages
from heba.fit.draws import text_bank
from heba.fit.run import Run
from heba.methods.lweib import method
from heba.methods.lweib.settings import Settings
from tests.heba.test_methods import Data

CONTEXT, EOT = 16, 99
SPANS = [(1, 1), (2, 2), (3, 3), (1, 2), (2, 3), (1, 3)]


def make(start, end, scale=0.9, layout=open_clip.CLIP, **text):
    """A model in double precision, whose convolutions are strong."""
    torch.manual_seed(0)
    vision = {"image_size": 16, "layers": 3, "width": 16, "head_width": 8, "patch_size": 8}
    text = {"context_length": CONTEXT, "vocab_size": 100, "width": 16, "heads": 2, "layers": 3, **text}
    clip = layout(embed_dim=8, vision_cfg=vision, text_cfg=text, quick_gelu=True).double()
    return method.build(clip, 2, Settings(start=start, end=end, scale=scale), seed=1).double()


def texts(ends=(3, 7, 5, 14, 15)):
    """Tokens of texts that are read at `ends`; some have less context behind them than a convolution reaches."""
    tokens = torch.randint(1, 90, (len(ends), CONTEXT), generator=torch.Generator().manual_seed(1))
    for row, end in zip(tokens, ends, strict=True):
        row[end], row[end + 1 :] = EOT, 0
    return tokens


def whole(model, tokens):
    """Text features by open_clip's own forward with the same hooks: no cut, no packing."""
    with going_on(Call(model, "text", model.fixed_scales())):
        return model.clip.encode_text(tokens)


@pytest.mark.parametrize(("start", "end"), SPANS)
@pytest.mark.parametrize("layout", [open_clip.CLIP, open_clip.CustomTextCLIP])
@torch.no_grad()
def test_texts_are_cut_behind_eot_without_any_difference(start, end, layout):
    model, tokens = make(start, end, layout=layout), texts()
    expected = whole(model, tokens)
    torch.testing.assert_close(model.encode_text(tokens), expected, rtol=1e-12, atol=1e-13)
    found = encode_prompts(model.clip, tokens, model.encode_text, torch.device("cpu"), 2, reach=model.reach)
    torch.testing.assert_close(found, expected.float())
    for row, one in zip(tokens, expected, strict=True):
        torch.testing.assert_close(model.encode_text(row[None])[0], one, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("start", "end"), SPANS)
@torch.no_grad()
def test_a_token_less_would_be_another_feature(start, end):
    model, tokens = make(start, end), texts()[:1]
    expected = model.encode_text(tokens)
    assert model.reach == 2 * (end - start + 1)
    model.reach -= 1
    assert (model.encode_text(tokens) - expected).abs().max() > 1e-9


@pytest.mark.parametrize(("start", "end"), SPANS)
def test_a_feature_depends_on_what_is_kept_and_on_nothing_else(start, end):
    model, (eot,) = make(start, end), [3]
    hidden = embed_tokens(model.clip, texts([eot]), start - 1).requires_grad_()
    packing = Packing(None, torch.tensor([eot]), torch.tensor([eot]), CONTEXT)
    model.encode_text_from(hidden, packing).square().sum().backward()
    moved = hidden.grad[0].abs().amax(dim=-1) > 0
    assert moved.tolist() == [position <= eot + model.reach for position in range(CONTEXT)]
    assert model.pack([eot + 1]).length == eot + 1 + model.reach


@torch.no_grad()
def test_blocks_of_another_kind_run_as_a_whole():
    model, tokens = make(1, 2, block_type="custom"), texts()
    assert not is_plain(model.clip.transformer.resblocks[0])
    torch.testing.assert_close(model.encode_text(tokens), whole(model, tokens), rtol=1e-12, atol=1e-13)


@torch.no_grad()
def test_no_text_reads_its_neighbours_in_a_packing():
    model, tokens = make(1, 3), texts()
    others = torch.where((tokens > 0) & (tokens < EOT), 90 - tokens, tokens)
    for i in range(len(tokens)):
        mixed = others.clone()
        mixed[i] = tokens[i]
        assert torch.equal(model.encode_text(mixed)[i], model.encode_text(tokens)[i])
        assert not torch.equal(model.encode_text(mixed), model.encode_text(tokens))


@torch.no_grad()
def test_texts_that_are_cut_too_short_are_refused():
    model, tokens = make(1, 2), texts((3, 7))
    assert torch.equal(model.encode_text(tokens[:, :12]), model.encode_text(tokens))
    with pytest.raises(ValueError, match="depend on 12 tokens, not 11"):
        model.encode_text(tokens[:, :11])


@pytest.mark.parametrize("start", [1, 3])
def test_a_training_and_its_classifier_need_no_padding_in_the_prompts(start, tmp_path):
    """The stage precompute cuts prompts at the last EOT of a data set."""
    data, found = Data(tmp_path), []
    settings = Settings(start=start, end=3, epochs=1, batch_size=4)
    cut = replace(data.classes, tokens=cut_texts(data.clip, data.classes.tokens))
    assert cut.tokens.shape[1] < data.classes.tokens.shape[1]
    for classes in (data.classes, cut):
        model = method.build(data.clip, 3, settings, seed=1)
        method.fit(model, data.train, LabelledImages([], []), classes, settings, Run(seed=1))
        found.append({**model.adapters.state_dict(), **method.classifier(model, classes, settings, True)})
        method.detach(model)
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        torch.testing.assert_close(value, found[1][key], rtol=1e-5, atol=1e-6, msg=key)


def test_the_padding_of_a_tokenizer_is_appended_as_far_as_it_counts():
    clip = make(1, 1).clip
    tokens = texts((3, 7))[:, :8]

    def tokenizer(names):
        return torch.tensor([[98, EOT] + [5] * (CONTEXT - 2)] * len(names))

    found = padded_texts(clip, tokens, 3, tokenizer)
    assert torch.equal(found[:, :8], tokens)
    assert found[:, 8:].tolist() == [[5] * 3] * 2
    assert padded_texts(clip, tokens, 99, tokenizer).shape == (2, CONTEXT)
    assert padded_texts(clip, tokens, 0, tokenizer) is tokens
    assert text_lengths(clip, found) == text_lengths(clip, tokens) == [4, 8]


def test_a_bank_has_the_tokens_that_count(tmp_path):
    data = Data(tmp_path)
    model = method.build(data.clip, 3, Settings(start=2, end=2), seed=1)
    classes = replace(data.classes, tokens=cut_texts(data.clip, data.classes.tokens))
    bank = text_bank(model, classes)
    assert bank.tokens.shape[1] == bank.hidden.shape[1] == max(bank.lengths) + 2


@pytest.mark.parametrize("visual", [True, False])
def test_gradients_are_the_true_ones_over_s(visual):
    torch.manual_seed(0)
    adapter, scale = method.Convolution(4, visual).double(), torch.tensor(0.3, dtype=torch.double)
    h = torch.randn(2, 7, 4, dtype=torch.double, requires_grad=True)
    weight = torch.randn_like(h)
    out = adapter(h, scale, (2, 3) if visual else None)
    if visual:  # the first token is CLS
        a = adapter.conv(h[:, 1:].unflatten(1, (2, 3)).permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
        expected = torch.cat([h[:, :1], h[:, 1:] + scale * a], dim=1)
    else:
        expected = h + scale * adapter.conv(h.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-13)
    found = torch.autograd.grad((out * weight).sum(), [h, adapter.conv.weight])
    true = torch.autograd.grad((expected * weight).sum(), [h, adapter.conv.weight])
    torch.testing.assert_close(found[0], true[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found[1], true[1] / scale, rtol=1e-12, atol=1e-13)


def test_blocks_that_a_tower_has_not_are_refused():
    with pytest.raises(ValueError, match="end 4 must satisfy"):
        make(1, 4)
