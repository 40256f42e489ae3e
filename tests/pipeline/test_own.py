"""Own data from params.yaml to the report, with real DVC."""

import json
import sys

import numpy as np
import pytest
import yaml
from PIL import ExifTags, Image
from typer.testing import CliRunner

from heba.data.splits import read_split
from heba.evaluation.record import write_record
from pipeline.commands.cli import app
from pipeline.core.params import ParamsError, load_params
from pipeline.core.trainings import Evaluation, Training
from pipeline.report import render, selection, tables
from tests.heba.test_own import folder_of_classes, image
from tests.pipeline.records import METHODS, RECORDS, pair, record
from tests.pipeline.repository import ROOT, call, copy_code, initialise, stage
from tests.pipeline.test_params import write

OWN = {"kind": "folder", "path": "photos"}


def only_own(raw, **entry):
    """params.yaml of someone who has own data and wants nothing else."""
    raw |= {"datasets": [], "own": {"my-set": OWN | entry}}
    raw["transfer"] |= {"protocols": [], "variants": []}
    raw["few_shot"]["datasets"] = ["my-set"]


def test_one_entry_is_enough_and_benchmarks_may_be_left_out(tmp_path):
    params = load_params(write(tmp_path, only_own))
    entry = params.own["my-set"]
    assert (entry.template, entry.descriptions, entry.file, entry.allow_leaks) == (
        "a photo of a {}.",
        None,
        None,
        False,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(own={}), "datasets: empty, and so is own"),
        (lambda raw: raw.update(own={"dtd": OWN}), "own: the name 'dtd' is taken"),
        (lambda raw: raw.update(own={"average": OWN}), "own: the name 'average' is taken"),
        (lambda raw: raw.update(own={"../x": OWN}), r"own: '\.\./x' must be letters, digits"),
        (lambda raw: raw["own"]["my-set"].update(kind="zip"), r"own\.my-set\.kind: .*'folder', 'csv' or 'coop'"),
        (lambda raw: raw["own"]["my-set"].update(template="a photo"), r"own\.my-set\.template"),
        (lambda raw: raw["own"]["my-set"].update(descriptions="../x.json"), r"own\.my-set\.descriptions"),
        (lambda raw: raw["own"]["my-set"].update(pth="x"), r"own\.my-set\.pth: unknown key"),
        (lambda raw: raw["own"]["my-set"].update(path="data/x"), r"own\.my-set\.path: 'data/x' lies in data/"),
        (
            lambda raw: raw["few_shot"].update(datasets=["mine"]),
            "there is no data set 'mine'; known are .*, my-set",
        ),
        (
            lambda raw: raw["transfer"].update(protocols=["cross_dataset"]),
            "transfer.source: 'imagenet' must be one of datasets",
        ),
    ],
)
def test_entries_that_can_not_be_are_named(tmp_path, change, message):
    def both(raw):
        only_own(raw)
        change(raw)

    with pytest.raises(ParamsError, match=message):
        load_params(write(tmp_path, both))


def few(dataset, shots, heba):
    return pair(dataset, 1, (40.0,), (heba,), "few_shot", shots=shots)


MINE = [*pair("my_set", 1, (10.0, 10.0), (20.0, 10.0)), *few("my_set", 1, 50.0), *few("my_set", 16, 70.0)]


def test_own_data_is_in_the_tables_and_in_no_average(tmp_path):
    records = [*RECORDS, *few("dtd", 1, 60.0), *MINE]
    table, alone = (tables.tidy_table(tables.long_table(r), "base_to_novel", METHODS) for r in (records, RECORDS))
    assert list(dict.fromkeys(table["dataset"])) == ["dtd", "eurosat", "my_set", "average"]
    assert table[table["dataset"] != "my_set"].reset_index(drop=True).equals(alone)
    shots = tables.tidy_table(tables.long_table(records), "few_shot", METHODS)
    accuracy = shots.set_index(["dataset", "method", "shots"])["accuracy"]
    assert accuracy["average", "heba", 1] == 60
    assert accuracy["my_set", "heba", 16] == 70
    render.render_report(records, METHODS, tmp_path, published=False)
    text = (tmp_path / "base_to_novel.md").read_text()
    assert "## my_set" in text
    assert "Average of 2 benchmarks" in text
    assert "Own data, in no average: my_set." in text
    assert "my\\_set" in (tmp_path / "base_to_novel.tex").read_text()
    page = (tmp_path / "index.html").read_text()
    assert "<summary>my_set</summary>" in page
    assert "DTD*" in page
    averages = json.loads((tmp_path / "averages.json").read_text())
    assert averages["base_to_novel"]["my_set"]["heba"]["base"] == 20
    assert averages["base_to_novel"]["average"]["heba"]["base"] == 81


def test_a_report_of_own_data_alone_has_no_average_and_no_published_figures(tmp_path):
    records = [r.model_copy(update={"suite": "real"}) for r in MINE]
    render.render_report(records, METHODS, tmp_path, published=True)
    text = (tmp_path / "README.md").read_text()
    assert "my_set" in text
    assert "Average" not in text
    assert "ublished" not in text
    assert "Not in this table" not in text
    assert set(json.loads((tmp_path / "averages.json").read_text())["base_to_novel"]) == {"my_set"}


def test_the_report_is_of_the_own_data_that_params_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = load_params(write(tmp_path, lambda raw: only_own(raw, base_to_novel=True)))
    paths = []
    for name in ("my-set", "once-mine"):
        training = Training("base_to_novel", name, "heba", 16, 1)
        paths.append(Evaluation("base_to_novel", name, training).path)
        paths[-1].parent.mkdir(parents=True)
        write_record(record("heba", name, 1, (20.0, 10.0)), paths[-1])
    records, left_out = selection.select(params)
    assert [r.dataset for r in records] == ["my-set"]
    assert left_out == paths[1:]


def turned(path):
    """Darken the upper half of an image, and save it as a camera that was held sideways does."""
    picture = Image.open(path)
    picture.paste("black", (0, 0, 8, 4))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    """A repository with own data only: `listed` lies in it and goes all the way, `drawn` as far as its split."""
    folder = tmp_path_factory.mktemp("own data")
    copy_code(folder)
    outside = folder_of_classes(tmp_path_factory.mktemp("größe"), {"star": 9, "fish": 9, "clock": 9})
    (outside / "texts.json").write_text(json.dumps({"star": ["a yellow shape"]}))
    folder_of_classes(folder / "my photos", {"a": 6, "b": 6}, 100)
    rows = [f"{d}/{i}.png,{name}\n" for d, name in (("a", "dog"), ("b", "cat")) for i in range(6)]
    for path in sorted((folder / "my photos").rglob("*.png")):
        turned(path)
    (folder / "my photos" / "list.csv").write_text("path,label\n" + "".join(rows))
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    only_own(params)
    params["own"] = {
        "drawn": {"kind": "folder", "path": str(outside), "descriptions": "texts.json", "base_to_novel": True},
        "listed": {"kind": "csv", "path": "my photos", "base_to_novel": True},
    }
    params |= {"seeds": [1], "shots": 2}
    params["methods"] = ["zero_shot", "heba"]
    params["few_shot"] = {"datasets": [], "seeds": [], "shots": [1]}
    params["heba"] |= {"epochs": 1, "batch_size": 4}
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    initialise(folder)
    for command in (
        ["dvc", "repro", "evaluate-own@listed", "split-own@drawn"],
        [sys.executable, "-m", "pipeline", "report"],
    ):
        done = call(folder, *command)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def run(repo, monkeypatch):
    """A command in `repo`, in this process: (exit code, what it printed and its error)."""
    monkeypatch.chdir(repo)

    def invoke(*args):
        result = CliRunner().invoke(app, list(args))
        assert result.exception is None or isinstance(result.exception, SystemExit | ValueError)
        return result.exit_code, f"{result.output}\n{result.exception}"

    return invoke


def outside_of(repo):
    return (repo / "data" / "own" / "drawn" / "images").resolve()


def test_own_data_goes_to_the_report_and_is_not_copied(repo):
    averages = json.loads((repo / "reports" / "averages.json").read_text())
    assert set(averages["base_to_novel"]) == set(averages["few_shot"]) == {"listed"}
    prompts = json.loads((repo / "out" / "precompute-own" / "listed" / "prompts.json").read_text())
    assert prompts["prompts"]["descriptions"] == ["a photo of a cat.", "a photo of a dog."]
    assert json.loads((repo / "data" / "own" / "drawn" / "descriptions.json").read_text()) == {
        "star": ["a yellow shape"]
    }
    assert (repo / "data" / "own" / "listed" / "images").resolve() == repo / "my photos"
    manifest = (repo / "out" / "download" / "drawn.json").read_text()
    assert json.loads(manifest)["images"] == 27
    assert str(outside_of(repo)) not in manifest


def test_own_test_images_are_upright(repo):
    packed = np.load(repo / "out" / "precompute-own" / "listed" / "images.npy").astype(int)
    side = packed.shape[-1]
    assert packed[:, :, : side // 3].max() < 10
    assert packed[:, 2, -side // 3 :].min() > 80


def test_an_experiment_in_a_copy_of_the_repository(repo):
    for command in (
        ["git", "add", "-A"],
        ["git", "commit", "-qm", "all"],
        ["dvc", "exp", "run", "--temp", "-S", "shots=3", "split-own"],
    ):
        done = call(repo, *command)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "Running stage 'split-own@listed'" in done.stdout
    assert "Running stage 'download-own" not in done.stdout


def test_dvc_notices_changed_images_and_goes_back(repo):
    """Back at the old images DVC takes the manifest from its cache, and data/own/ must follow."""
    before = (repo / "data" / "own" / "drawn" / "split.json").read_bytes()
    new = image(outside_of(repo) / "star" / "new.png", 500)
    done = call(repo, "dvc", "repro", "split-own@drawn")
    assert done.returncode == 0, done.stderr
    assert "Running stage 'download-own@drawn'" in done.stdout
    assert (repo / "data" / "own" / "drawn" / "split.json").read_bytes() != before
    new.unlink()
    done = call(repo, "dvc", "repro", "split-own@drawn")
    assert "'download-own@drawn' is cached - skipping run" in done.stdout
    assert stage(repo, "split", "--dataset", "drawn").returncode == 0
    assert (repo / "data" / "own" / "drawn" / "split.json").read_bytes() == before


def test_other_training_images_under_the_same_names_are_trained_on(repo):
    # Of two classes one is base, and there is nothing to learn: the adapter stays, what it was made of does not.
    trained = repo / "out" / "train" / "listed" / "heba" / "base_to_novel-2-1" / "config.json"
    before = trained.read_bytes()
    sample = read_split(repo / "out" / "split" / "listed" / "2-1.json")["train"]
    kept = {repo / "my photos" / file: (repo / "my photos" / file).read_bytes() for file, _, _ in sample}
    for number, path in enumerate(kept):
        image(path, 900 + number)
    done = call(repo, "dvc", "repro", "train-own@listed-heba")
    assert done.returncode == 0, done.stderr
    assert "Running stage 'train-own@listed-heba'" in done.stdout
    assert trained.read_bytes() != before
    for path, content in kept.items():
        path.write_bytes(content)
    assert call(repo, "dvc", "repro", "train-own@listed-heba").returncode == 0
    assert trained.read_bytes() == before


def test_check_data(repo, run):
    code, text = run("check-data", "drawn")
    assert code == 0
    assert text.startswith("3 classes, 27 images: 12 train, 6 val, 9 test")
    assert "use the template:\n  clock\n  fish\n" in text
    assert (
        "note: base_to_novel of 3 classes trains on 2 of them, and the novel half has only one, so that its "
        "accuracy is always 100 %:\n"
        "  base: clock, fish\n  novel: star\n"
    ) in text
    assert "no problems" in text
    assert "each half has only one" in run("check-data", "listed")[1]
    unknown = stage(repo, "check-data", "mnist")
    assert unknown.returncode == 1
    assert unknown.stderr.startswith("error: NAME mnist: not in params.yaml, which has drawn, listed")


@pytest.fixture
def pair_of_images(repo):
    """(train image, test image); mended afterwards."""
    split = read_split(repo / "data" / "own" / "drawn" / "split.json")
    (train, _, _), (test, _, _) = split["train"][0], split["test"][0]
    paths = [outside_of(repo) / train, outside_of(repo) / test]
    kept = [path.read_bytes() for path in paths]
    yield train, test
    for path, content in zip(paths, kept, strict=True):
        path.write_bytes(content)


@pytest.fixture
def edit_params(repo):
    """Replace text in params.yaml until the test ends."""
    path = repo / "params.yaml"
    kept = path.read_text()
    yield lambda old, new: path.write_text(path.read_text().replace(old, new))
    path.write_text(kept)


def test_base_to_novel_is_noted_only_where_it_runs(repo, run, edit_params):
    edit_params("seeds:\n- 1\n", "seeds: []\n")
    assert yaml.safe_load((repo / "params.yaml").read_text())["seeds"] == []
    assert "base_to_novel" not in run("check-data", "drawn")[1]


def test_an_image_in_two_classes_stops_the_stage(repo, run, pair_of_images):
    train, _ = pair_of_images
    star = outside_of(repo) / "star" / "0.png"
    (outside_of(repo) / train).write_bytes(star.read_bytes())
    code, text = run("download", "--dataset", "drawn")
    assert code == 1
    assert "own.drawn: the same image, byte for byte, in different classes:\n" in text
    assert "star/0.png" in text
    assert "Mend these, or set own.drawn.allow_leaks: true for the same bytes. `python" not in text
    assert "Mend these. `python" in text


def test_damaged_and_missing_images_stop_the_stage(repo, run, pair_of_images):
    _, test = pair_of_images
    (outside_of(repo) / test).write_bytes(b"broken")
    code, text = run("download", "--dataset", "drawn")
    assert code == 1
    assert f"own.drawn: images that are missing or cannot be decoded:\n  {test}\n" in text
    lost = repo / "my photos" / "a" / "0.png"
    kept = lost.read_bytes()
    lost.unlink()
    code, text = run("download", "--dataset", "listed")
    lost.write_bytes(kept)
    assert code == 1
    assert "own.listed: images that are missing or cannot be decoded:\n  a/0.png\n" in text


def test_a_folder_that_is_not_there_is_told_before_anything_runs(repo, run, edit_params):
    edit_params("path: my photos\n", "path: my fotos\n")
    for command in ("check-params", "repro"):
        code, text = run(command)
        assert code == 1
        assert f"own.listed.path: there is no folder {repo / 'my fotos'}; set it in params.yaml to the" in text


def test_check_data_of_a_benchmark(run, edit_params):
    edit_params("datasets: []", "datasets: [dtd]")
    code, text = run("check-data", "dtd")
    assert code == 1
    assert "run `dvc repro download@dtd` first" in text
    assert run("download", "--dataset", "dtd")[0] == 0
    code, text = run("check-data", "dtd")
    assert code == 0
    assert text.startswith("10 classes, 480 images: 240 train, 40 val, 200 test")


def test_words_that_the_tiny_clip_does_not_know_are_named(run, edit_params):
    edit_params("kind: csv", "kind: csv\n    template: a zebra crossing {}.")
    code, text = run("download", "--dataset", "listed")
    assert code == 1
    assert "the tiny CLIP does not know" in text
    assert "\n  crossing; near is cross" in text
    assert "\n  zebra" in text


def test_no_own_data_makes_no_stages(tmp_path):
    copy_code(tmp_path)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    initialise(tmp_path)
    listed = call(tmp_path, "dvc", "stage", "list", "--name-only")
    assert listed.returncode == 0, listed.stderr
    assert "train@dtd-heba" in listed.stdout
    assert "-own" not in listed.stdout
