"""Learned vectors in the place of tokens: what they begin as, and what is refused."""

from functools import partial
from pathlib import Path

import pytest
import torch

from heba.clip import backbone, context
from heba.clip.architecture import read_architecture
from heba.clip.tiny import new_tiny_clip
from heba.fit.prompts import begin_with_first, class_texts


@pytest.fixture(scope="module")
def tiny():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip, tokenizer = new_tiny_clip()
    return clip.requires_grad_(False).eval(), tokenizer


def test_free_places_are_as_filler_words(tiny):
    clip, tokenizer = tiny
    names, vectors = ["cat", "red stop sign"], torch.randn(3, context.text_width(clip))

    def features(words):
        texts = class_texts(clip, names, tokenizer, words, 3)
        return context.encode_texts(clip, texts, context.with_context(texts, vectors))

    assert torch.equal(features(None), features("X X X"))


def test_a_context_begins_as_the_first_of_the_words(tiny):
    clip, tokenizer = tiny
    vectors = torch.zeros(2, context.text_width(clip))
    begin_with_first(vectors, clip, tokenizer, "a photo of a")
    tokens = torch.tensor([tokenizer.encode(word)[0] for word in ("a", "photo")])
    assert torch.equal(vectors, clip.token_embedding(tokens))
    with pytest.raises(ValueError, match="a context of 2 tokens begins as 'photo', which has 1"):
        begin_with_first(vectors, clip, tokenizer, "photo")


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (partial(context.check_text_context, blocks=5), "m: prompts in 5 blocks, and the text tower has 4"),
        (partial(context.check_image_context, blocks=5), "m: prompts in 5 blocks, and the image tower has 4"),
        (partial(context.check_text_context, context=30), "m: a context of 30 tokens leaves no place for a class"),
    ],
)
def test_what_the_towers_have_no_room_for_is_refused(tiny, check, message):
    with pytest.raises(ValueError, match=message):
        check(tiny[0], "m")
    context.check_text_context(tiny[0], "m", blocks=4, context=29)
    context.check_image_context(tiny[0], "m", blocks=4)


@pytest.mark.parametrize(
    ("name", "check", "message"),
    [
        ("ViT-B-16-SigLIP", context.check_text_context, "m puts its context behind the token that begins a text"),
        ("ViT-B-16-SigLIP", context.check_image_context, "m needs an image tower of open_clip's own"),
        ("ViT-L-14-CLIPA", context.check_image_context, "m needs an image tower of open_clip's own"),
    ],
)
def test_other_towers_are_refused(name, check, message):
    with torch.device("meta"):
        clip = backbone.build(read_architecture(name, Path()))
    with pytest.raises(ValueError, match=message):
        check(clip, "m")
