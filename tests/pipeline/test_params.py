"""params.yaml: every problem in one message; presets."""

import re
import subprocess
import sys

import pytest
import torch
import yaml
from dvc.utils.hydra import apply_overrides
from dvc.utils.serialize import modify_yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.commands import presets
from pipeline.core.params import ParamsError, load_params, settings_of
from pipeline.core.trainings import samples, trainings
from pipeline.stages.backbone import computing, use_bf16
from tests.heba import third
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


@pytest.mark.parametrize("name", ["demo", "paper"])
@pytest.mark.parametrize(
    ("override", "line"),
    [("shots=5", "shots: 5"), ("heba.scale=0.5", "scale: 0.5"), ("data.mirror=archives", "mirror: archives")],
)
def test_an_experiment_changes_one_line_of_a_preset(tmp_path, name, override, line):
    """A preset is written as DVC writes it: a list has a line per item, and after it no comment or empty
    line, which DVC would leave out."""
    path = tmp_path / "params.yaml"
    presets.write(name, path)
    before = path.read_text().splitlines()
    with modify_yaml(path):
        pass
    assert path.read_text().splitlines() == before
    apply_overrides(path, [override])  # what `dvc exp run -S` does
    after = path.read_text().splitlines()
    [changed] = [new for old, new in zip(before, after, strict=True) if old != new]
    assert changed.split("#")[0].strip() == line


def test_all_problems_are_listed_at_once(tmp_path):
    def change(raw):
        raw["shots"] = 0
        raw["typo"] = 1
        raw["heba"]["end"] = 5
        raw["heba"]["ratio"] = 1000
        raw["datasets"].append("mnist")
        raw["heba"]["overrides"]["cross_dataset"]["lr"] = "1e-3"
        raw["seeds"] = [1, 1]
        raw["heba"]["overrides"]["few_shot"] = {"start": 6}
        raw["methods"].append("flamingo")
        del raw["precision"]

    with pytest.raises(ParamsError) as error:
        load_params(write(tmp_path, change))
    text = str(error.value)
    for part in (
        "shots:",
        "typo: unknown key",
        "heba.end: 5 is beyond the last layer, 4",
        "no data set 'mnist'",
        "heba.overrides.cross_dataset.lr:",
        "1.0e-3",
        "seeds: 1 is listed twice",
        "precision: missing",
        "heba.overrides.few_shot.start: 6 is above end 5",
        "methods: there is no method 'flamingo'; known are ",
        "heba.ratio: 1000 leaves nothing of the width 128 of the backbone",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        ("heba.expansion", 10**20, "heba.expansion: .* less than or equal to 64"),
        ("heba.scale", 1e300, "heba.scale: .* less than or equal to 1000000"),
        ("heba.scale", 1e-300, "heba.scale: .* greater than or equal to 0.000000001"),
        ("heba.scale", "0.1", "heba.scale: .* valid number"),
        ("heba.towers", "all", "heba.towers: .*'both', 'image' or 'text'"),
        ("heba.depth", 3, "heba.depth: unknown key"),
        ("heba.start", 5, "heba.start: 5 is above end 4"),
        ("zero_shot.scale", 1.0, "zero_shot.scale: unknown key"),
        ("heba", None, "heba: must map settings to values, and heba.overrides protocols or data sets to"),
        ("heba", [1], "heba: must map settings to values"),
        ("heba.overrides", 1, "heba: must map settings to values, and heba.overrides protocols or data sets to"),
        (
            "heba.overrides.few_shot",
            1,
            "heba: must map settings to values, and heba.overrides protocols or data sets to",
        ),
        (
            "heba.overrides.domain_generalization",
            {"scale": 1.0},
            "heba.overrides: 'domain_generalization' is neither a protocol",
        ),
        ("heba.overrides.cross_dataset.scale", -1.0, "heba.overrides.cross_dataset.scale: .* greater than"),
        ("heba.overrides.cross_dataset.end", 5, "heba.overrides.cross_dataset.end: 5 is beyond the last layer, 4"),
        ("heba.overrides.cross_dataset.typo", 1, "heba.overrides.cross_dataset.typo: unknown key"),
        ("methods", ["heba", "flamingo"], "methods: there is no method 'flamingo'; known are "),
        ("methods", ["heba", "heba"], "methods: 'heba' is listed twice"),
        ("methods", [], "methods: .* at least 1 item"),
        ("methods", [1], "methods.0: .* valid string"),
        ("train", {"epochs": 1}, "train: unknown key"),
        ("seeds", [2**64], "seeds.0: .* less than or equal to 4294967295"),
        ("threads", 10**12, "threads: .* less than or equal to 1024"),
        ("heba.epochs", 10**12, "heba.epochs: .* less than or equal to 1000000"),
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


def test_a_method_that_is_listed_needs_a_block(tmp_path):
    path = write(tmp_path, lambda raw: raw.pop("zero_shot"))
    with pytest.raises(ParamsError) as error:
        load_params(path)
    assert str(error.value).splitlines() == [
        f"{path} has 1 problem:",
        "  zero_shot: missing; it is listed in methods and needs a block, {} for its defaults",
    ]
    raw = yaml.safe_load(path.read_text()) | {"methods": ["heba"]}
    path.write_text(yaml.safe_dump(raw))
    assert load_params(path).methods == ["heba"]


def test_the_block_of_a_method_that_is_not_listed_is_checked_too(tmp_path):
    def change(raw):
        raw["methods"] = ["zero_shot"]
        raw["heba"]["lr"] = 0

    with pytest.raises(ParamsError, match=r"heba\.lr: "):
        load_params(write(tmp_path, change))


def test_settings_are_a_blocks_with_the_overrides_of_the_protocol(tmp_path):
    def change(raw):
        raw["heba"] = {"scale": 0.3, "end": 2, "overrides": {"few_shot": {"scale": 0.4}}}

    params = load_params(write(tmp_path, change))
    found = {protocol: settings_of(params, "heba", protocol) for protocol in ("base_to_novel", "few_shot")}
    assert [s.scale for s in found.values()] == [0.3, 0.4]
    assert [s.end for s in found.values()] == [2, 2]
    assert found["few_shot"].epochs == type(found["few_shot"])().epochs


def test_a_new_method_is_one_like_the_others(tmp_path):
    def change(lr):
        return lambda raw: raw.update(methods=["zero_shot", "probe"], probe={"lr": lr})

    with third.installed(tmp_path / "methods"):
        assert settings_of(load_params(write(tmp_path, change(0.2))), "probe", "few_shot").lr == 0.2
        with pytest.raises(ParamsError, match=r"\n  probe\.lr: must be above 0$"):
            load_params(write(tmp_path, change(-0.2)))
    with pytest.raises(ParamsError, match="there is no method 'probe'"):
        load_params(write(tmp_path, change(0.2)))


def test_of_very_many_problems_the_first_are_listed(tmp_path):
    with pytest.raises(ParamsError) as error:
        load_params(write(tmp_path, lambda raw: raw.update(datasets=[f"no-{i}" for i in range(2000)])))
    assert len(str(error.value).splitlines()) < 60
    assert "problems:" in str(error.value)


@pytest.mark.parametrize(
    "options", [["--seed", str(2**64)], ["--seed", "-1"], ["--seed", "1", "--shots", str(10**9)]]
)
def test_the_command_line_has_the_same_bounds(options):
    done = stage(ROOT, "train", "--dataset", "dtd", "--method", "heba", *options)
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
        ("shots: 1\nheba:\n  scale: 1\n  scale: 2\n", "heba.scale: there twice, in lines 3 and 4"),
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
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30)); "
    limited += "from pipeline.commands import cli; "
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
    before, block = text.split("\nheba:\n")
    block = block.replace("  momentum: 0.9\n", "")
    block = block.replace("    cross_dataset:\n", "    cross_dataset:\n      <<: *block\n", 1)
    changed = f"{before}\nheba:\n  <<: &block\n    momentum: 0.5\n{block}"
    (tmp_path / "params.yaml").write_text(changed)
    params = load_params(tmp_path / "params.yaml")
    for protocol, scale in (("base_to_novel", 0.1), ("cross_dataset", 0.05)):
        settings = settings_of(params, "heba", protocol)
        assert (settings.momentum, settings.scale) == (0.5, scale)


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


def test_a_misspelt_backbone_is_one_problem_with_the_names_near_it(tmp_path):
    def change(raw):
        raw["suite"] = "real"
        raw["backbone"] = {"name": "ViT-B-99", "pretrained": "openai"}

    with pytest.raises(ParamsError, match=r"has no model 'ViT-B-99'; near it are .*ViT-B-16") as refused:
        load_params(write(tmp_path, change))
    assert str(refused.value).count("backbone.name") == 1


def test_the_depth_of_timms_towers_is_only_bounded_by_the_text_tower(tmp_path):
    def change(raw, end):
        raw["suite"] = "real"
        raw["backbone"] = {"name": "ViT-B-16-SigLIP2", "pretrained": "webli"}
        raw["heba"]["end"] = end

    load_params(write(tmp_path, lambda raw: change(raw, 12)))
    with pytest.raises(ParamsError, match=r"heba\.end: 13 is beyond the last layer, 12"):
        load_params(write(tmp_path, lambda raw: change(raw, 13)))


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None)
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
    with pytest.raises(ParamsError, match="known are demo, paper, own"):
        presets.write("nope", target)


OWN = """own:   # of mine
  flowers:
    kind: folder
    path: photos   # as they are
"""


@pytest.mark.parametrize("name", ["demo", "paper", "own"])
def test_every_preset_keeps_the_entries_of_own(tmp_path, name):
    target = tmp_path / "params.yaml"
    target.write_text((ROOT / "params.yaml").read_text().replace("own: {}\n", OWN))
    assert presets.write(name, target).endswith("\nkept in own: flowers")
    assert OWN in target.read_text()
    params = load_params(target)
    assert list(params.own) == ["flowers"]
    assert params.own["flowers"].path == "photos"
    assert "\nbackbone:\n" in target.read_text()
    assert presets.write(name, target).startswith(f"{target} is the preset {name} already")


def test_the_preset_own_leaves_all_but_the_benchmarks(tmp_path):
    target = tmp_path / "params.yaml"
    assert "no entry in own yet" in presets.write("own", target)
    with pytest.raises(ParamsError, match="datasets: empty, and so is own"):
        load_params(target)
    text = target.read_text().replace("own: {}\n", OWN).replace("shots: 16 ", "shots: 5  # of mine ", 1)
    target.write_text(text.replace("few_shot:\n  datasets: []", "few_shot:\n  datasets: [flowers]"))
    presets.write("own", target)
    params, demo = load_params(target), load_params(presets.FOLDER / "demo.yaml")
    assert "shots: 5  # of mine" in target.read_text()
    assert (params.shots, params.few_shot.datasets) == (5, ["flowers"])
    assert (params.datasets, params.transfer.protocols, params.transfer.variants) == ([], [], [])
    assert params.blocks == demo.blocks
    assert {training.dataset for training in trainings(params)} == {"flowers"}


@pytest.mark.parametrize("text", ["own: {}\n", "few_shot:\n", "few_shot: [1]\n", "few_shot:\n  datasets: 3\n"])
def test_the_preset_own_needs_a_whole_few_shot(tmp_path, text):
    target = tmp_path / "params.yaml"
    target.write_text(text)
    with pytest.raises(ParamsError, match=r"few_shot\.datasets: .*restore it with `preset demo`"):
        presets.write("own", target)
    assert target.read_text() == text


def test_a_preset_never_overwrites_entries_that_it_cannot_read(tmp_path):
    target = tmp_path / "params.yaml"
    target.write_text("own: {flowers: [\n")
    with pytest.raises(ParamsError, match="Mend it, or move it away"):
        presets.write("demo", target)
    assert target.read_text() == "own: {flowers: [\n"


def test_own_data_is_trained_on_all_classes_and_in_base_to_novel_where_asked(tmp_path):
    def change(raw):
        entry = {"kind": "folder", "path": "photos"}
        raw["own"] = {"plain": entry, "named": entry, "both": entry | {"base_to_novel": True}}
        raw |= {"shots": 8, "seeds": [1, 2]}
        raw["few_shot"] |= {"datasets": ["named"], "shots": [1, 4], "seeds": [3]}

    params = load_params(write(tmp_path, change))
    assert samples(params, "plain") == [("few_shot", 8, 1), ("few_shot", 8, 2)]
    assert samples(params, "named") == [("few_shot", 1, 3), ("few_shot", 4, 3)]
    assert {protocol for protocol, _, _ in samples(params, "both")} == {"base_to_novel", "few_shot"}


@pytest.mark.parametrize(("precision", "bf16"), [("auto", False), ("fp32", False), ("bf16", True)])
def test_a_cpu_computes_in_bf16_only_where_that_is_asked_for(tmp_path, precision, bf16):
    params = load_params(write(tmp_path, lambda raw: raw.update(precision=precision, device="cpu")))
    assert use_bf16(params) == bf16
    with computing(params):
        found = torch.ones(2, 2) @ torch.ones(2, 2)
    assert found.dtype == (torch.bfloat16 if bf16 else torch.float32)
