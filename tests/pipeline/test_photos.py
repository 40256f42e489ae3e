"""`python -m pipeline compare FOLDER`: splits, how sure an answer is, the page, and the whole of it."""

import math
import re
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import stats
from sklearn.datasets import load_digits
from typer.testing import CliRunner

from heba.data.splits import PARTS
from heba.evaluation.metrics import wilson
from pipeline.commands.cli import app
from pipeline.commands.photos import page, project, results, run, verdict
from pipeline.commands.photos.choose import Choice, one_by_one, sentences
from pipeline.commands.photos.splits import Plan, make_plan
from pipeline.core.params import ParamsError, load_params
from tests.heba.test_own import folder_of_classes, image
from tests.pipeline.repository import ROOT, call, environment, wait_for
from tests.pipeline.test_params import write


def folder_split(counts, part="train"):
    """As a folder per class gives it; the parts do not matter."""
    items = [(f"{name}/{i:03}.png", label, name) for label, name in enumerate(counts) for i in range(counts[name])]
    return {"train": [], "val": [], "test": []} | {part: items}


def files(split, part, name=None):
    return {file for file, _, own in split[part] if name in (None, own)}


def test_repeated_splits_are_stratified_whole_and_the_same_each_time():
    split = folder_split({"a": 20, "b": 30})
    plan = make_plan(split, [], 4)
    assert (plan.kind, list(plan.splits), plan.seeds) == ("repeated", [f"split-{i}" for i in range(1, 5)], [1])
    for one in plan.splits.values():
        for name, n in (("a", 20), ("b", 30)):
            counts = [len(files(one, part, name)) for part in PARTS]
            assert counts == [n // 2, n // 5, n - n // 2 - n // 5]
        assert len(set().union(*(files(one, part) for part in PARTS))) == 50
    assert len({frozenset(files(one, "test")) for one in plan.splits.values()}) == 4
    backwards = {part: items[::-1] for part, items in split.items()}
    assert make_plan(backwards, [], 4) == plan
    more = make_plan(folder_split({"a": 20, "b": 30, "c": 10}), [], 4)
    first, second = plan.splits["split-2"], more.splits["split-2"]
    assert all(files(first, part, "a") == files(second, part, "a") for part in PARTS)
    assert plan.test_ratio() == 15 / 35


def test_small_classes_are_tested_once_each_by_cross_validation():
    plan = make_plan(folder_split({"a": 4, "b": 9, "c": 60}), [], 5)
    assert (plan.kind, len(plan.splits)) == ("folds", 4)
    tested = [file for one in plan.splits.values() for file in files(one, "test")]
    assert len(tested) == len(set(tested)) == 73
    sizes = [len(one["test"]) for one in plan.splits.values()]
    assert max(sizes) - min(sizes) <= 1
    for one in plan.splits.values():
        assert all(files(one, part, name) for part in ("train", "test") for name in "abc")
    two = make_plan(folder_split({"a": 2, "b": 2}), [], 5)
    assert all(not one["val"] for one in two.splits.values())
    assert make_plan(folder_split({"a": 4, "b": 9}), [], 1).kind == "repeated"


@pytest.mark.parametrize("counts", [{"a": 6, "b": 7}, {"a": 24, "b": 25}])
def test_the_same_picture_is_on_one_side(counts):
    split = folder_split(counts)
    same = [["a/000.png", "a/003.png", "a/004.png"], ["a/001.png", "b/001.png"]]
    plan = make_plan(split, same, 5)
    for one in plan.splits.values():
        for group in same:
            assert sum(not files(one, part).isdisjoint(group) for part in PARTS) == 1
    seen = [group for group in same for one in plan.splits.values() if set(group) <= files(one, "test")]
    assert seen, "no group was ever tested, and the test above could not fail"


def test_a_class_needs_two_different_pictures():
    with pytest.raises(ValueError, match=r"two images that do not show the same picture.*fewer have: a$"):
        make_plan(folder_split({"a": 2, "b": 5}), [["a/000.png", "a/001.png"]], 5)


def test_a_given_test_part_stays_and_its_copies_go_from_training():
    split = {
        part: [(f"{part}/{name}/{i}.png", label, name) for label, name in enumerate("ab") for i in range(n)]
        for part, n in (("train", 4), ("val", 2), ("test", 3))
    }
    same = [["test/a/0.png", "train/a/0.png", "val/a/0.png"], ["train/b/1.png", "val/b/1.png"]]
    plan = make_plan(split, same, 3)
    assert (plan.kind, list(plan.splits), plan.seeds) == ("given", ["images"], [1, 2, 3])
    assert plan.left_out == ["val/a/0.png", "train/a/0.png", "train/b/1.png"]
    one = plan.splits["images"]
    assert files(one, "test") == files(split, "test")
    assert len(files(one, "train")) == 6
    with pytest.raises(ValueError, match="no image is left to train for a"):
        make_plan(split, [["test/a/0.png", *(f"train/a/{i}.png" for i in range(4))]], 3)


def test_wilson_is_that_of_scipy():
    for right, n in ((0, 7), (3, 9), (60, 60)):
        theirs = stats.binomtest(right, n).proportion_ci(method="wilson")
        assert wilson(right / n, n) == pytest.approx((theirs.low, theirs.high))


def test_samples_on_the_same_test_images_widen_the_interval():
    assert verdict.same_test([0.8, 0.8, 0.8], 100) == pytest.approx(wilson(0.8, 100))
    assert verdict.same_test([1.0, 1.0], 50) == pytest.approx(wilson(1.0, 50))
    # Variance 0.16 / 100 of the images and 0.01 / 3 of the samples: as of 0.16 / 0.004933 images.
    assert verdict.same_test([0.7, 0.8, 0.9], 100) == pytest.approx(wilson(0.8, 0.16 / (0.0016 + 0.01 / 3)))


def test_the_corrected_resampled_t_by_hand():
    # Mean 0.8, s^2 = 0.01; (1/3 + 3/7) s^2 = 0.0076190; t(2) at 97.5 % = 4.302653.
    half = 4.302653 * math.sqrt(0.01 * (1 / 3 + 3 / 7))
    low, high = verdict.resampled([0.7, 0.8, 0.9], 3 / 7, 1000)
    assert (low, high) == (pytest.approx(0.8 - half), 1.0)
    assert verdict.resampled([0.8] * 3, 3 / 7, 30) == pytest.approx(wilson(0.8, 30))
    assert verdict.resampled([0.7, 0.9], 3 / 7, 30) == pytest.approx(wilson(0.8, 30))


def test_images_that_one_method_alone_gets_right():
    # McNemar: 9 against 1 of the 10 that differ, 2 * (1 + 10) / 2^10.
    assert verdict.images_differ([1] * 9 + [-1] + [0] * 50) == pytest.approx(22 / 1024)
    assert verdict.images_differ([0.0] * 5) == 1.0
    # Where images were tested twice, signs are flipped; of 8 equal halves, 2 of 2^8 are as far.
    assert verdict.images_differ([0.5] * 8 + [1.0]) == pytest.approx(2 / 2**9, abs=0.002)
    assert verdict.images_differ([0.5, -0.5, 1.0, -1.0]) == 1.0


TITLES = {"plain": "Plain", "quick": "Quick", "slow": "Slow"}


@pytest.mark.parametrize(
    ("shares", "ps", "text"),
    [
        ({"plain": 0.5}, {}, "Only Plain ran: 50.0 % on 60 test images."),
        (
            {"plain": 0.5, "quick": 0.7, "slow": 0.9},
            {"plain": 0.001, "quick": 0.004},
            "Take Slow: 90.0 % on 60 test images, 20.0 points above Quick, the next (p = 0.004).",
        ),
        (
            {"plain": 0.5, "quick": 0.88, "slow": 0.9},
            {"plain": 0.001, "quick": 0.4},
            "Take Quick: Quick and Slow can't be told apart with these 60 test images (p = 0.40), and it is the "
            "simplest of them; it trains in 0.04 s, Slow in 90 s. Slow measured 2.0 points more, which more test "
            "images may confirm or not.",
        ),
        (
            {"plain": 0.5, "quick": 0.9, "slow": 0.88},
            {"plain": 0.001, "slow": 0.4},
            "Take Quick: 90.0 % on 60 test images, the highest, and the simplest of its like: Quick and Slow "
            "can't be told apart with these 60 test images (p = 0.40).",
        ),
        # Holm: of two, the smaller p counts twice; 0.03 alone would tell them apart.
        (
            {"plain": 0.5, "quick": 0.88, "slow": 0.9},
            {"plain": 0.03, "quick": 0.4},
            "Take Plain: Plain, Quick and Slow can't be told apart with these 60 test images (p = 0.06), and it "
            "is the simplest of them. Slow measured 40.0 points more, which more test images may confirm or not.",
        ),
    ],
)
def test_what_to_take_and_how_sure_that_is(shares, ps, text):
    seconds = {"plain": None, "quick": 0.04, "slow": 90.0}
    assert verdict.advise(shares, ps, TITLES, seconds, 60).text == text


NAMES = ['<script>alert("a")</script>', "b & b"]


def frame(right, shots):
    """Tests of two methods on ten images; `right`: by method, how many of them."""
    rows = [
        (method, "split-1", k, 1, f"x<y>{i}.png", i % 2, i % 2 if i < n else 1 - i % 2)
        for method, n in right.items()
        for k in shots
        for i in range(10)
    ]
    return pd.DataFrame(rows, columns=list(results.TESTS))


@pytest.fixture
def summary(tmp_path):
    def change(raw):
        raw |= {"datasets": [], "own": {"split-1": {"kind": "folder", "path": "photos"}}}
        raw["methods"] = ["zero_shot", "gda"]
        raw["transfer"] |= {"protocols": [], "variants": []}
        raw["few_shot"] = {"datasets": ["split-1"], "seeds": [1], "shots": [1, 2]}

    params = load_params(write(tmp_path, change))
    items = [(f"x<y>{i}.png", i % 2, NAMES[i % 2]) for i in range(10)]
    plan = Plan("repeated", {"split-1": {"train": items[:0], "val": items[:4], "test": items}}, [1], [])
    tests = frame({"zero_shot": 2, "gda": 9}, (1, 2))
    return params, results.summarise(params, plan, tests, {"gda": 0.5})


def test_the_table_has_what_was_measured(summary):
    _, found = summary
    first, second = found.lines
    assert (first.accuracy, second.accuracy, first.seconds, second.seconds) == (20.0, 90.0, None, 0.5)
    assert (second.low, second.high) == pytest.approx(tuple(100 * x for x in wilson(0.9, 10)))
    assert second.confused == f"{NAMES[1]} taken for {NAMES[0]} (20 %)"
    # Seven images that GDA alone got right: 2 / 2^7.
    assert "(p = 0.016)" in found.advice.text
    text = results.table(found)
    assert text.splitlines()[2].split()[:3] == ["GDA", "90.0", "59.6"]


def test_names_are_text_in_the_page(summary, tmp_path):
    params, found = summary
    Image.fromarray(np.zeros((40, 20, 3), np.uint8)).save(tmp_path / "x<y>9.png")
    choice = Choice([({"scale": 0.1}, 0.5), ({"scale": 0.4}, 0.75)], {"scale": 0.4}, 4)
    settings = sentences({"HeBA": {"split-1": choice}})
    html = page.render(
        found, params, tmp_path, "how <it> was", ["note <n>"], ["file <f>.png"], settings, "versions", "<warning>"
    )
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert" in html
    assert not any(f"<{tag}>" in html for tag in ("it", "n", "f", "y", "warning"))
    assert html.count("data:image/jpeg;base64,") == 1
    assert "https://" not in html.replace("http://www.w3.org", "").replace("https://matplotlib.org", "")
    assert "<svg" in html
    assert (
        "HeBA, split-1: scale 0.4, the best on 4 validation images (scale 0.1: 50.0 %; scale 0.4: 75.0 %)." in html
    )


def test_a_folder_that_is_no_project_is_left_alone(tmp_path):
    images, other = tmp_path / "images", tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="no project of `compare`"):
        project.make(other, images)
    with pytest.raises(ValueError, match="lies in the folder of the images"):
        project.make(images / "x", images)
    project.make(tmp_path / "new", images)
    project.make(tmp_path / "new", images)
    with pytest.raises(ValueError, match="the images of another folder"):
        project.make(tmp_path / "new", other)
    assert [path.name for path in other.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("text", ["a: [1\n", "", "- 1\n", "suite: embedded\n", "methods: gda\n"])
def test_a_damaged_params_file_of_a_project_counts_as_no_earlier_call(tmp_path, text):
    (tmp_path / "params.yaml").write_text(text)
    assert project.methods_done(tmp_path, {"suite": "embedded", "own": {}, "backbone": {}, "few_shot": {}}) == []


def test_the_accuracy_is_the_mean_of_the_splits():
    """Of which one has fewer images than the other."""
    one = frame({"gda": 9}, (1,))
    other = frame({"gda": 0}, (1,)).head(4).assign(split="split-2")
    assert results.shares_at(pd.concat([one, other]), 1) == {"gda": pytest.approx(0.45)}


def test_a_folder_that_cannot_be_compared_says_why(tmp_path):
    folder_of_classes(tmp_path / "one", {"star": 4})
    folder_of_classes(tmp_path / "mixed", {"star": 4, "fish": 4})
    image(tmp_path / "mixed" / "a.png", 1)
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("none", "there is no such folder"),
        ("empty", "holds no folders; each class needs one"),
        ("one", "one class alone"),
        ("mixed", r"images in no class's folder: a\.png"),
        ("one/star/0.png", "is a file"),
    ):
        result = CliRunner().invoke(app, ["compare", str(tmp_path / name), "--out", str(tmp_path / "made")])
        assert re.search(message, str(result.exception)), (name, result.exception)
    assert not (tmp_path / "made").exists()


def test_files_that_cannot_be_read_are_left_out_where_that_is_asked_for(tmp_path):
    folder_of_classes(tmp_path, {"star": 4, "fish": 4})
    (tmp_path / "fish" / "broken.jpg").write_text("no image")
    kept, left = (run.read(tmp_path, skip) for skip in (False, True))
    assert (kept.skipped, left.skipped) == ([], ["fish/broken.jpg"])
    listed = [{file for part in data.split.values() for file, *_ in part} for data in (kept, left)]
    assert listed[0] - listed[1] == {"fish/broken.jpg"}


def test_the_budget_has_a_unit():
    assert [project.seconds_of(text) for text in ("90s", "10m", "0.5h")] == [90, 600, 1800]
    with pytest.raises(ParamsError, match="--budget 10: write a number and s, m or h"):
        project.seconds_of("10")


def test_settings_are_chosen_one_by_one_and_none_twice():
    scores = {(1, 3): 0.5, (2, 3): 0.7, (4, 3): 0.7, (2, 5): 0.7, (2, 6): 0.9}
    tried, best = one_by_one({"a": [1, 2, 4], "b": [3, 5, 6]}, lambda s: scores[s["a"], s["b"]])
    assert best == {"a": 2, "b": 6}
    assert tried == [({"a": a, "b": b}, share) for (a, b), share in scores.items()]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Twelve images each of three of scikit-learn's digits."""
    folder = tmp_path_factory.mktemp("some images") / "möwen & co"
    there = load_digits()
    for digit, name in enumerate(("zero", "one", "two")):
        (folder / name).mkdir(parents=True)
        for i, picture in enumerate(there.images[there.target == digit][:12]):
            pixels = Image.fromarray((picture * 15).astype(np.uint8))
            pixels.resize((32, 32)).save(folder / name / f"{i}.png")
    return folder


def command(digits, *more):
    fast = ("--methods", "gda", "--seeds", "2", "--shots", "4", "--jobs", "1")
    return [sys.executable, "-m", "pipeline", "compare", str(digits), *fast, *more]


@pytest.mark.slow
def test_a_folder_a_stop_an_answer_and_an_adapter(digits, tmp_path):
    env = environment(PYTHONPATH=str(ROOT))
    made = tmp_path / "compare" / digits.name
    process = subprocess.Popen(
        command(digits), cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lock = made / "dvc.lock"
    wait_for(lambda: lock.is_file() and "precompute-own@split-1" in lock.read_text())
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate()
    assert process.returncode == 130, said
    assert "The same command goes on from here" in said
    done = subprocess.run(command(digits), cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "precompute-own@split-1: done" not in done.stdout
    assert "3 classes; 2 splits" in done.stdout
    assert "numbers say little about these images" in done.stderr
    first, second = (line.split() for line in done.stdout.splitlines() if line.startswith(("CLIP ", "GDA  ")))
    assert float(second[1]) > float(first[1])
    assert "möwen &amp; co" in (made / "report.html").read_text()
    assert not (digits / ".dvc").exists()
    again = subprocess.run(command(digits), cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert "train-own" not in again.stdout
    assert again.stdout[-2000:].splitlines()[-3:] == done.stdout[-2000:].splitlines()[-3:]
    assert call(made, "git", "status", "--porcelain").stdout == ""
    # What the last line says, on images that are there.
    word = done.stdout.splitlines()[-1].split()
    assert word[:3] == ["heba", "predict", "NEW_IMAGES"]
    told = call(
        tmp_path,
        *(sys.executable, "-m", "pipeline.commands.use", "predict", str(digits / "zero"), "--top", "1"),
        *("--adapter", str(made / "best")),
        PYTHONPATH=str(ROOT),
    )
    assert told.stdout.count("zero ") > 6, told.stdout + told.stderr
