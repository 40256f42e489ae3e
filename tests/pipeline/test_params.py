"""params.yaml: every problem in one message; presets."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline import presets
from pipeline.params import ParamsError, load_params
from tests.pipeline.repository import ROOT


def write(tmp_path, change):
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    change(raw)
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.mark.parametrize("name", ["demo", "paper"])
def test_presets_are_valid(name):
    load_params(presets.FOLDER / f"{name}.yaml")


def test_the_committed_params_are_the_demo():
    assert (ROOT / "params.yaml").read_bytes() == (presets.FOLDER / "demo.yaml").read_bytes()


def test_all_problems_are_listed_at_once(tmp_path):
    def change(raw):
        raw["shots"] = 0
        raw["typo"] = 1
        raw["adapter"]["end"] = 5
        raw["adapter"]["ratio"] = 1000
        raw["datasets"].append("mnist")
        raw["train"]["lr"] = "1e-3"
        raw["seeds"] = [1, 1]
        raw["transfer"]["adapter"]["scale_novel"] = 0.01
        del raw["precision"]

    with pytest.raises(ParamsError) as error:
        load_params(write(tmp_path, change))
    text = str(error.value)
    for part in (
        "shots:",
        "typo: unknown key",
        "adapter.end: 5 is beyond the last layer, 4",
        "no data set 'mnist'",
        "train.lr:",
        "1.0e-3",
        "seeds: 1 is listed twice",
        "precision: missing",
        "transfer.adapter.scale_novel: must be null",
        "adapter.ratio: 1000 leaves nothing of the width 128 of tiny",
    ):
        assert part in text


def test_openais_weights_in_the_plain_gelu_model_are_refused(tmp_path):
    def change(raw):
        raw["suite"] = "real"
        raw["backbone"] = {"name": "ViT-B-16", "pretrained": "openai"}

    with pytest.raises(ParamsError, match="QuickGELU"):
        load_params(write(tmp_path, change))


@pytest.mark.parametrize("name", ["RN50", "coca_ViT-L-14", "convnext_base", "nonsense", "../x"])
def test_unusable_backbones_are_refused(tmp_path, name):
    def change(raw):
        raw["suite"] = "real"
        raw["backbone"]["name"] = name

    with pytest.raises(ParamsError, match=r"backbone\.name"):
        load_params(write(tmp_path, change))


def test_the_depth_of_timms_towers_is_only_bounded_by_the_text_tower(tmp_path):
    def change(raw, end):
        raw["suite"] = "real"
        raw["backbone"] = {"name": "ViT-B-16-SigLIP2", "pretrained": "webli"}
        raw["adapter"]["end"] = end

    load_params(write(tmp_path, lambda raw: change(raw, 12)))
    with pytest.raises(ParamsError, match=r"adapter\.end: 13 is beyond the last layer, 12"):
        load_params(write(tmp_path, lambda raw: change(raw, 13)))


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(list(yaml.safe_load((ROOT / "params.yaml").read_text()))), junk)
def test_junk_gives_a_message_and_never_a_traceback(tmp_path_factory, key, value):
    path = write(tmp_path_factory.mktemp("p"), lambda raw: raw.update({key: value}))
    try:
        load_params(path)
    except ParamsError as error:
        assert str(path) in str(error)  # noqa: PT017 (valid values raise nothing)


def test_writing_a_preset_shows_the_difference(tmp_path):
    target = tmp_path / "params.yaml"
    presets.write("demo", target)
    assert "already" in presets.write("demo", target)
    assert "+suite: real" in presets.write("paper", target)
    with pytest.raises(ParamsError, match="known are demo, paper"):
        presets.write("nope", target)
