"""params.yaml: every problem in one message; presets."""

import re
import subprocess
import sys

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline.commands import presets
from pipeline.core.params import ParamsError, load_params
from tests.pipeline.repository import ROOT, environment, stage


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


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        ("adapter.expansion", 10**20, "adapter.expansion: .* less than or equal to 64"),
        ("adapter.scale", 1e300, "adapter.scale: .* less than or equal to 1000000"),
        ("adapter.scale", 1e-300, "adapter.scale: .* greater than or equal to 0.000000001"),
        ("seeds", [2**64], "seeds.0: .* less than or equal to 4294967295"),
        ("threads", 10**12, "threads: .* less than or equal to 1024"),
        ("train.epochs", 10**12, "train.epochs: .* less than or equal to 1000000"),
        ("data.root", "a\0b", "data.root: .*"),
        ("data.root", "a" * 5000, "data.root: .* at most 4096 characters"),
        ("own", {"a" * 300: {"kind": "folder", "path": "photos"}}, "own: 'a+' must be .* at most 64: .*"),
        ("own", {"mine": {"kind": "folder", "path": "http://host/x"}}, "own.mine.path: .* is an address; .*"),
    ],
)
def test_what_is_out_of_bounds_is_one_line_with_the_key_and_the_bound(tmp_path, keys, value, message):
    def change(raw):
        *sections, key = keys.split(".")
        for section in sections:
            raw = raw[section]
        raw[key] = value

    with pytest.raises(ParamsError) as error:
        load_params(write(tmp_path, change))
    first, *lines = str(error.value).splitlines()
    assert first.endswith("params.yaml has 1 problem:")
    assert len(lines) == 1
    assert re.match(rf"  {message}", lines[0])
    assert len(lines[0]) < 500


def test_of_very_many_problems_the_first_are_listed(tmp_path):
    with pytest.raises(ParamsError) as error:
        load_params(write(tmp_path, lambda raw: raw.update(datasets=[f"no-{i}" for i in range(2000)])))
    assert len(str(error.value).splitlines()) < 60
    assert "problems:" in str(error.value)


@pytest.mark.parametrize(
    "options", [["--seed", str(2**64)], ["--seed", "-1"], ["--seed", "1", "--shots", str(10**9)]]
)
def test_the_command_line_has_the_same_bounds(options):
    done = stage(ROOT, "train", "--dataset", "dtd", *options)
    assert done.returncode == 2
    assert options[-2] in done.stderr
    assert "than or equal to" in done.stderr


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 30)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 60))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("seeds: [&a [*a], &b [*b]]\n", "seeds.0.0: contains itself, by an alias to line 1"),
        ("seeds: 1\nown: &own {mine: *own}\n", "own.mine: contains itself, by an alias to line 2"),
        (f"seeds: 1\n{BOMB}", "a4: more than 100000 values, with the aliases written out"),
        (f"seeds: 1\n{MERGES}", "more than 100000 values, with the aliases written out"),
        ("shots: 1\nadapter:\n  scale: 1\n  scale: 2\n", "adapter.scale: there twice, in lines 3 and 4"),
        (f"shots: 0x{'f' * 5000}\n", "shots: a number of more than 1000 digits"),
        ('shots: !!int ""\n', "cannot be read"),
        ("shots: !!timestamp x\n", "cannot be read"),
        ("shots: !!bool x\n", "cannot be read"),
        ("[" * 5000, "cannot be read"),
    ],
)
def test_the_traps_of_yaml_are_problems_with_a_name(tmp_path, text, problem):
    """In a process with 1 GB and a minute: aliases written out would take more, of both, than there is."""
    (tmp_path / "params.yaml").write_text(text)
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30)); from pipeline import cli; "
    )
    done = subprocess.run(
        [sys.executable, "-c", limited + "sys.argv = ['pipeline', 'check-params']; cli.main()"],
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: params.yaml cannot be read")
    assert problem in done.stderr
    assert "Traceback" not in done.stderr


def test_an_anchor_that_is_used_with_measure_is_taken(tmp_path):
    text = (ROOT / "params.yaml").read_text()
    head, tail = text.split("\ntransfer:\n")
    head = head.replace("\nadapter:\n", "\nadapter: &adapter\n")
    before, after = tail.split("  adapter:\n")
    after = after[after.index("  train:\n") :]
    changed = f"{head}\ntransfer:\n{before}  adapter:\n    <<: *adapter\n    scale: 0.05\n{after}"
    (tmp_path / "params.yaml").write_text(changed)
    params = load_params(tmp_path / "params.yaml")
    assert (params.adapter.scale, params.transfer.adapter.scale) == (0.1, 0.05)
    assert params.transfer.adapter.start == params.adapter.start


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
