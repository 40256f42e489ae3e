"""Checkpoints with the names and values of the official code: converted, they give its logits."""

import pytest
import torch

from heba import artifact, methods
from heba.clip.towers import text_tower
from heba.data.images import Images
from heba.fit import official
from tests.heba import checkpoints
from tests.oracle import prompts

METHODS = ("coop", "cocoop", "kgcoop", "maple", "promptsrc", "prograd", "tcp", "vpt")


def given(name, case):
    """What a checkpoint does not tell."""
    config = {key.rpartition(".")[2]: value for key, value in case.config.items()}
    if name == "coop":
        return {"position": config.get("CLASS_TOKEN_POSITION", "end")}
    if name == "prograd" and config["CTX_INIT"]:
        return {"words": case.about["prograd_template"].removesuffix(" {}.")}
    if name == "tcp":
        text = case.about["tcp_prompt_template"].split(" ", config["N_CTX"])[-1]
        return {"text": text, "after": case.about["tcp_layer_index"]}
    return {}


def saved(case, values):
    """The official state: trained tensors, with the embeddings of the texts where there is a context."""
    state = dict(case.part(values))
    name = next((name for name in state if name.endswith("ctx")), None)
    if name is not None:
        prefix, m = name.removesuffix("ctx"), state[name].shape[-2]
        with torch.no_grad():
            embedded = text_tower(case.clip).token_embedding(case.own["tokens"].long())
        state |= {f"{prefix}token_prefix": embedded[:, :1], f"{prefix}token_suffix": embedded[:, 1 + m :]}
    return state


def variants():
    """Those of all methods, with their names."""
    marked = [(name, prompts.variants(name)) for name in METHODS]
    found = [(name, variant) for name, mark in marked for variant in mark.args[1]]
    return [pytest.param(name, *p.values, id=p.id, marks=p.marks) for name, p in found]


@pytest.mark.parametrize(("name", "case"), variants())
def test_a_converted_checkpoint_gives_the_official_logits(name, case, tmp_path):
    path = tmp_path / f"model.pth.tar-{case.about['epochs']}"
    values, kind = ("final", "final_logits") if "final_logits" in case.own else ("init", "logits")
    checkpoints.save(path, saved(case, values), epoch=case.about["epochs"])
    checkpoint = official.read(path)
    converter, method = methods.part(name, "convert"), methods.part(name, "method")
    assert converter.fits(checkpoint.tensors)
    tensors, settings = converter.from_official(checkpoint, given(name, case))
    settings = methods.part(name, "settings").Settings(**settings)
    template = case.about.get("zero_shot_template")
    classes = case.classes_of(template) if template else case.classes()
    model = method.build(case.clip, len(classes.names), settings, seed=0)
    artifact.load_tensors(method.trained(model), tensors, "converted")
    texts = converter.texts_of(model, classes, settings)
    assert (texts is None) == (checkpoint.suffix is None)
    if texts is not None:
        official.check_texts(checkpoint, texts, text_tower(case.clip).context_length)
    pixels = case.shared["images"]
    if methods.part(name, "settings").READS == "pixels":
        images = Images.of_pixels(pixels)
    else:
        with torch.no_grad():
            features = case.clip.encode_image(pixels)
        images = Images.of_features(features, features[:, :0])
    found = method.logits(model, method.classifier(model, classes, settings, True), images)
    prompts.close(name, "converted logits", found, case.own[kind], prompts.FINAL_LOGITS)
