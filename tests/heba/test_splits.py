"""CoOp's sampling and the reading of split files."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heba.data import splits

counts = st.lists(st.integers(1, 9), min_size=1, max_size=8)


def make_split(per_class):
    items = [(f"{c}/{i}.png", c, f"class {c}") for c, n in enumerate(per_class) for i in range(n)]
    return {"train": items, "val": items, "test": items}


@given(counts, st.integers(1, 20), st.integers(0, 99))
def test_sample_has_the_right_images_and_repeats(per_class, shots, seed):
    split = make_split(per_class)
    sample = splits.sample_few_shot(split, shots, seed)
    assert sample == splits.sample_few_shot(split, shots, seed)
    for part, k in (("train", shots), ("val", min(shots, 4))):
        assert set(sample[part]) <= set(split[part])
        assert len(set(sample[part])) == len(sample[part])
        for label, n in enumerate(per_class):
            assert sum(item[1] == label for item in sample[part]) == min(k, n)
    assert sample["test"] == split["test"]


def test_a_class_with_too_few_images_costs_no_draw():
    split = make_split([3, 9])
    rng = random.Random(5)
    expected = rng.sample([item for item in split["train"] if item[1] == 1], 4)
    assert splits.sample_few_shot(split, 4, 5)["train"][3:] == expected


def test_sampling_leaves_the_global_random_state_alone():
    random.seed(3)
    state = random.getstate()
    splits.sample_few_shot(make_split([5]), 2, 1)
    assert random.getstate() == state


@given(counts)
def test_base_and_novel_are_halves(per_class):
    n = len(per_class)
    base = splits.base_labels(n)
    novel = range(len(base), n)
    assert len(base) - len(novel) in (0, 1)
    split = make_split(per_class)
    kept = splits.select_classes(split, novel)
    assert {item[1] for item in kept["train"]} == set(range(len(novel)))
    assert all(name == f"class {label + len(base)}" for _, label, name in kept["train"])


def test_shots_zero_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        splits.sample_few_shot(make_split([3]), 0, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "not a readable split"),
        ("[]", "an object with the keys"),
        ('{"train": []}', "'val'"),
        ('{"train": [["a", 0]], "val": [], "test": []}', r"train\[0\]"),
        ('{"train": [["a", true, "x"]], "val": [], "test": []}', r"train\[0\]"),
        ('{"train": [["a", 0, "x"], ["b", 0, "y"]], "val": [], "test": []}', "both 'x' and 'y'"),
        ('{"train": [["a", 1, "x"]], "val": [], "test": []}', "without gaps"),
    ],
)
def test_a_bad_split_file_is_named(tmp_path, content, message):
    path = tmp_path / "split.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        splits.read_split(path)
    assert str(path) in str(error.value)


def test_write_and_read_back(tmp_path):
    split = make_split([2, 2])
    splits.write_split(split, tmp_path / "s.json")
    assert splits.read_split(tmp_path / "s.json") == split
    assert isinstance(json.loads((tmp_path / "s.json").read_text())["train"][0], list)
