"""A user's own images: folders, CSV and split files as people have them, and what is wrong with them."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from heba.data.splits import PARTS, class_names, read_split, write_split
from heba.sources.check import Rules, check
from heba.sources.duplicates import same_pictures
from heba.sources.look import look_at
from heba.sources.own import IMAGE_SUFFIXES, given_split, make_split, read_own
from pipeline.commands.use import find_images


def image(path, value=0):
    """A small picture, different for each value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = "JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else None
    Image.new("RGB", (8, 8), (value % 256, value // 256, 90)).save(path, kind)
    return path


def folder_of_classes(root, counts, start=0):
    for name, n in counts.items():
        for i in range(n):
            image(root / name / f"{i}.png", start := start + 1)
    return root


def counts(split):
    return {
        part: [sum(label == i for _, label, _ in split[part]) for i in range(len(class_names(split)))]
        for part in PARTS
    }


def paths(split):
    return [path for part in PARTS for path, _, _ in split[part]]


names = st.text("abcü _-", min_size=1, max_size=4)
classes = st.dictionaries(names, st.sets(names, min_size=2, max_size=12), min_size=1, max_size=4)


@given(classes, st.randoms(use_true_random=False))
def test_the_split_is_disjoint_complete_and_whatever_the_order_the_same(found, rng):
    files = {name: sorted(f"{name}/{file}" for file in inside) for name, inside in found.items()}
    split = make_split(files)
    assert sorted(paths(split)) == sorted(path for inside in files.values() for path in inside)
    assert len(set(paths(split))) == len(paths(split))
    assert class_names(split) == sorted(files)
    assert all(n >= 1 for part in ("train", "test") for n in counts(split)[part])
    listed = list(files.items())
    rng.shuffle(listed)
    assert make_split({name: rng.sample(inside, len(inside)) for name, inside in listed}) == split
    # A class's split is its own affair.
    one = sorted(files)[0]
    alone = make_split({one: files[one]})
    assert all([i[0] for i in alone[part]] == [i[0] for i in split[part] if i[2] == one] for part in PARTS)


@given(classes)
def test_val_is_cut_from_train_only_where_it_is_not_given(found):
    items = [(f"{name}/{file}", name) for name, inside in found.items() for file in inside]
    test = [(f"test/{path}", name) for path, name in items]
    split = given_split({"train": items, "test": test})
    assert sorted(i[0] for part in ("train", "val") for i in split[part]) == sorted(path for path, _ in items)
    assert all(n >= 1 for n in counts(split)["train"])
    assert {i[0] for i in split["test"]} == {path for path, _ in test}
    given = given_split({"train": items, "val": test[:1], "test": test[1:]})
    assert [len(given[part]) for part in PARTS] == [len(items), 1, len(test) - 1]


def test_coops_proportions():
    split = make_split({"a": [f"{i:02}" for i in range(20)], "b": ["0", "1"], "c": ["0", "1", "2"]})
    assert counts(split) == {"train": [10, 1, 2], "val": [4, 0, 0], "test": [6, 1, 1]}


def test_a_folder_per_class(tmp_path):
    root = folder_of_classes(tmp_path / "with space", {"Zebra": 4, "été à la plage": 2})
    image(root / "Zebra" / "UPPER.JPEG", 700)
    hidden = (".DS_Store", "Zebra/.hidden.png", "Zebra/Thumbs.db", "Desktop.ini", "__MACOSX/x.png")
    for junk in (*hidden, "Zebra/about.doc", "notes.txt", "texts.json"):
        (root / junk).parent.mkdir(exist_ok=True)
        (root / junk).write_bytes(b"")
    data = read_own(root, "folder", aside="texts.json")
    assert class_names(data.split) == ["Zebra", "été à la plage"]
    assert sorted(data.left_out) == ["Zebra/about.doc", "notes.txt"]
    assert sorted(paths(data.split))[-3:] == ["Zebra/UPPER.JPEG", "été à la plage/0.png", "été à la plage/1.png"]
    assert all((root / path).is_file() for path in paths(data.split))
    write_split(data.split, tmp_path / "split.json")
    assert read_split(tmp_path / "split.json") == data.split


@pytest.mark.parametrize("val", [None, "val", "Validation"])
def test_folders_below_train_val_and_test(tmp_path, val):
    for i, part in enumerate(filter(None, ["train", val, "test"])):
        folder_of_classes(tmp_path / part, {"a": 5, "b": 5}, 100 * i)
    split = read_own(tmp_path, "folder").split
    assert counts(split) == {"train": [5, 5] if val else [4, 4], "val": [5, 5] if val else [1, 1], "test": [5, 5]}
    assert all(path.startswith("test/") for path, _, _ in split["test"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        ({}, "holds no folders"),
        ({"a": 3, "b": 1, "c": 1}, "fewer than 2 have: b, c"),
        ({"train/a": 2, "val/a": 2}, r"no test"),
        ({"train/a": 2, "test/a": 2, "more/a": 2}, r"more holds folders: a\. .* above the classes"),
        ({"train": 2, "test": 2}, r"test: images in no class's folder: 0\.png, 1\.png"),
        ({"a": 2, "b": 2, ".": 1}, r"images in no class's folder: 0\.png"),
        ({"a": 2, "b/deep": 2}, r"b holds folders: deep"),
    ],
)
def test_folders_that_are_no_data_set(tmp_path, make, message):
    folder_of_classes(tmp_path, make)
    with pytest.raises(ValueError, match=message) as error:
        read_own(tmp_path, "folder")
    assert str(tmp_path) in str(error.value) or "fewer than 2" in message


def test_what_counts_as_an_image_is_the_same_for_own_data_and_for_prediction(tmp_path):
    for i, suffix in enumerate(sorted(IMAGE_SUFFIXES)):
        image(tmp_path / "a" / f"{i}{suffix}", i)
        image(tmp_path / "b" / f"{i}{suffix.upper()}", 100 + i)
    image(tmp_path / "b" / "._0.png")
    data = read_own(tmp_path, "folder")
    assert len(paths(data.split)) == 2 * len(IMAGE_SUFFIXES)
    assert data.left_out == []
    assert sorted(paths(data.split)) == [p.relative_to(tmp_path).as_posix() for p in find_images([tmp_path])]


def test_an_empty_class_and_a_missing_folder(tmp_path):
    folder_of_classes(tmp_path, {"a": 2})
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match=r"b holds no images"):
        read_own(tmp_path, "folder")
    with pytest.raises(ValueError, match="no such folder"):
        read_own(tmp_path / "nowhere", "folder")


@pytest.mark.parametrize("kind", ["folder", "csv"])
def test_a_pipe_is_refused_before_anything_waits_for_it(tmp_path, kind):
    root = folder_of_classes(tmp_path / "in", {"a": 3, "b": 3})
    names = ["a/0.png", "a/1.png", "b/0.png", "b/1.png", "a/pipe.png"]
    (root / "list.csv").write_text("path,label\n" + "".join(f"{name},{name[0]}\n" for name in names))
    os.mkfifo(root / "a" / "pipe.png")
    with pytest.raises(ValueError, match=r"'a/pipe\.png' is no file but a folder, a pipe or the like; remove it"):
        read_own(root, kind)


def test_links_out_of_the_folder_are_refused(tmp_path):
    root = folder_of_classes(tmp_path / "in", {"a": 2, "b": 2})
    (root / "a" / "again.png").symlink_to(root / "a" / "0.png")
    assert len(paths(read_own(root, "folder").split)) == 5
    (root / "a" / "out.png").symlink_to(image(tmp_path / "out.png"))
    with pytest.raises(ValueError, match=r"'a/out\.png' leads out of the folder"):
        read_own(root, "folder")


def write_csv(root, text, name="list.csv"):
    folder_of_classes(root, {"a b": 4, "ü": 4})
    (root / name).write_bytes(text.encode())
    return root


def test_a_csv_file_without_a_split(tmp_path):
    rows = [f"{d}/{i}.png,{label}" for d, label in (("a b", '"cat, tabby"'), ("./ü", "dog")) for i in range(4)]
    root = write_csv(tmp_path, "\ufeffpath, label\r\n" + "\r\n".join([*rows, "", ""]))
    split = read_own(root, "csv").split
    assert class_names(split) == ["cat, tabby", "dog"]
    assert counts(split) == {"train": [2, 2], "val": [1, 1], "test": [1, 1]}
    assert sorted(paths(split))[-1] == "ü/3.png"
    write_csv(root, "path,label\n" + "\n".join(reversed(rows)))
    assert read_own(root, "csv").split == split


def test_a_csv_file_with_a_split_and_more_columns(tmp_path):
    text = "label,who,path,split\ncat,me,a b/0.png,train\ncat,,a b/1.png,Test\ndog,,ü/0.png,train\n"
    root = write_csv(tmp_path, text + f"dog,,{tmp_path}/ü/1.png,test\ndog,,ü/2.png,validation\n")
    split = read_own(root, "csv").split
    assert split["train"] == [("a b/0.png", 0, "cat"), ("ü/0.png", 1, "dog")]
    assert split["val"] == [("ü/2.png", 1, "dog")]
    assert split["test"] == [("a b/1.png", 0, "cat"), ("ü/1.png", 1, "dog")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"list\.csv: the first line must name"),
        ("path;label\na;b\n", r"it is 'path;label'"),
        ("path,label\n", "names no images"),
        ("path,label\nx.png,cat\n,cat\n", r"list\.csv, line 3: no path"),
        ("path,label\nx.png\n", "line 2: no label"),
        ("path,label\nx,1.png,cat\n", "line 2: more values than columns"),
        ("path,label\n../x.png,cat\n", r"line 2: '\.\./x\.png' leads out"),
        ("path,label\n/etc/passwd,cat\n", "line 2: '/etc/passwd' leads out"),
        ("path,label,split\nx.png,cat,train\ny.png,cat,dev\n", "line 3: split is 'dev', not one of train, val"),
        ("path,label,split\nx.png,cat,train\n", r"list\.csv: .* no test"),
        ('path,label\n"x.png,cat\n', "not a readable CSV"),
    ],
)
def test_a_bad_csv_file_is_named_with_the_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_own(write_csv(tmp_path, text), "csv")


def test_a_csv_file_in_another_encoding(tmp_path):
    root = write_csv(tmp_path, "")
    (root / "list.csv").write_bytes("path,label\nü,é\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"list\.csv: not a readable CSV file in UTF-8"):
        read_own(root, "csv")


def test_which_csv_file(tmp_path):
    root = write_csv(tmp_path, "path,label\na b/0.png,x\na b/1.png,x\n")
    (root / "other.csv").write_text("path,label\nü/0.png,y\nü/1.png,y\n")
    with pytest.raises(ValueError, match=r"has 2 files \.csv; .* key `file`"):
        read_own(root, "csv")
    assert class_names(read_own(root, "csv", "other.csv").split) == ["y"]
    with pytest.raises(ValueError, match=r"third\.csv: there is no such file"):
        read_own(root, "csv", "third.csv")
    with pytest.raises(ValueError, match=r"has no \.json file"):
        read_own(root, "coop")


def test_a_split_file_keeps_its_labels(tmp_path):
    folder_of_classes(tmp_path, {"a": 4, "b": 4})
    split = {
        "train": [["b/0.png", 0, "zebra"], ["a/0.png", 1, "ant"]],
        "val": [],
        "test": [["b/1.png", 0, "zebra"], ["./a/1.png", 1, "ant"]],
    }
    (tmp_path / "split_zhou.json").write_text(json.dumps(split))
    (tmp_path / "texts.json").write_text("{}")
    found = read_own(tmp_path, "coop", aside="texts.json").split
    assert class_names(found) == ["zebra", "ant"]
    assert found["test"][1] == ("a/1.png", 1, "ant")
    split["test"][0][0] = "../b/1.png"
    (tmp_path / "split_zhou.json").write_text(json.dumps(split))
    with pytest.raises(ValueError, match=r"split_zhou\.json: test\[0\]: '\.\./b/1\.png' is no path below"):
        read_own(tmp_path, "coop", aside="texts.json")


def report(root, split=None, **options):
    split = split or read_own(root, "folder").split
    looks = look_at(root, paths(split), options.pop("progress", lambda n: None))
    descriptions = options.pop("descriptions", {})
    rules = Rules(**{"shots": 1, "allow_leaks": False} | options)
    return check(split, looks, same_pictures(looks), descriptions, rules)


def found(findings):
    return {finding.text: finding.items for finding in findings}


def test_a_good_data_set_has_no_problems(tmp_path):
    root = folder_of_classes(tmp_path, {"big_cat": 10, "dog": 4})
    seen = []
    good = report(root, descriptions={"Big cat": ["which roars"], "dog": ["x", "y"]}, progress=seen.append)
    assert good.errors == good.notes == []
    assert list(good.table.loc["big_cat"]) == [5, 2, 3, 10, 1]
    assert list(good.table.loc["dog"]) == [2, 1, 1, 4, 2]
    assert sum(seen) == 14
    assert good.text().startswith("2 classes, 14 images: 7 train, 3 val, 4 test\n")
    assert good.text().endswith("no problems")


def test_every_problem_is_reported_at_once(tmp_path):
    root = folder_of_classes(tmp_path, {"cat": 8, "dog": 8})
    split = read_own(root, "folder").split
    train, test = split["train"], split["test"]
    (root / train[0][0]).write_bytes((root / train[0][0]).read_bytes()[:50])
    (root / train[1][0]).unlink()
    (root / test[-1][0]).write_bytes((root / train[-1][0]).read_bytes())
    (root / train[-3][0]).write_bytes((root / train[-2][0]).read_bytes())
    bad = report(root, split, shots=5, descriptions={"cat": ["x"], "mouse": ["y"]})
    errors, notes = found(bad.errors), found(bad.notes)
    assert errors["images that are missing or cannot be decoded"] == [train[0][0], train[1][0]]
    (leak,) = errors["the same bytes in more than one of train, val and test"]
    assert leak == f"{train[-1][0]} (train, dog) = {test[-1][0]} (test, dog)"
    (twice,) = notes["the same bytes more than once"]
    assert train[-3][0] in twice
    assert train[-2][0] in twice
    assert notes["classes with fewer train images than the 5 shots, which give all that they have"] == [
        "cat: 4",
        "dog: 4",
    ]
    assert notes["classes without descriptions, which use the template"] == ["dog"]
    assert notes["descriptions of no class"] == ["mouse"]
    for items in [*errors.values(), *notes.values()]:
        assert all(item in bad.text() for item in items)
    allowed = report(root, split, allow_leaks=True)
    assert set(found(allowed.errors)) == {"images that are missing or cannot be decoded"}
    assert leak in found(allowed.notes)["the same bytes in more than one of train, val and test"]


def test_one_image_in_two_classes_is_an_error(tmp_path):
    root = folder_of_classes(tmp_path, {"cat": 8, "dog": 8})
    split = read_own(root, "folder").split
    cat, dog = (next(path for path, _, name in split["train"] if name == wanted) for wanted in ("cat", "dog"))
    (root / dog).write_bytes((root / cat).read_bytes())
    text, items = (
        "the same image, byte for byte, in different classes",
        [f"{cat} (train, cat) = {dog} (train, dog)"],
    )
    assert found(report(root, split).errors) == {text: items}
    assert text in found(report(root, split, allow_leaks=True).errors)
    fixed = report(root, split, allow_conflicts=True)
    assert fixed.errors == []
    assert found(fixed.notes)[text] == items
    # One file that a list names twice.
    split["test"].append((cat, 1, "dog"))
    assert f"{cat} (test, dog)" in found(report(root, split).errors)[text][0]


def test_class_names_that_a_prompt_does_not_tell_apart_are_noted(tmp_path):
    root = folder_of_classes(tmp_path, {"Big_star": 3, "big star": 3, "dog": 3, "Dog": 3, "cat": 3})
    notes = found(report(root).notes)
    assert notes["classes whose names are the same in a prompt"] == ["'Big_star' = 'big star'", "'Dog' = 'dog'"]


def test_images_of_16_bits_are_an_error(tmp_path):
    root = folder_of_classes(tmp_path, {"cat": 4, "dog": 4})
    Image.new("I;16", (8, 8), 900).save(root / "dog" / "2.png")
    errors = found(report(root).errors)
    assert errors == {
        "images of 16 or more bits a channel, of an unknown range; convert them to 8 bit": ["dog/2.png"]
    }


def test_classes_that_can_not_be_trained_or_tested(tmp_path):
    folder_of_classes(tmp_path, {"a": 2, "b": 2})
    split = {"train": [("a/0.png", 0, "a")], "val": [], "test": [("b/0.png", 1, "b")]}
    errors = found(report(tmp_path, split).errors)
    assert errors == {"classes without test images": ["a"], "classes without train images": ["b"]}
    # As the test sets of domain generalisation are.
    split = {"train": [], "val": [], "test": [("a/0.png", 0, "a"), ("b/0.png", 1, "b")]}
    assert report(tmp_path, split).errors == []
    split = {part: [("a/0.png", 0, "a")] for part in PARTS}
    assert "fewer than two classes, so that there is nothing to tell apart" in found(
        report(tmp_path, split).errors
    )


def test_a_finding_shows_some_and_says_how_many_more(tmp_path):
    root = folder_of_classes(tmp_path, {f"class {i}": 2 for i in range(9)})
    (note,) = report(root).notes
    assert note.shown(2).splitlines()[1:] == ["  class 0", "  class 1", "  ... and 7 more"]
    assert len(note.shown().splitlines()) == 10


pictures = st.lists(st.integers(0, 3), min_size=2, max_size=14)


@given(st.lists(pictures, min_size=1, max_size=3))
def test_images_of_the_same_picture_are_on_one_side(shown):
    """A class has images of pictures 0 to 3; those of picture 0 are alone each."""
    picture_of = {f"{c}/{i}": (c, p, i if p == 0 else 0) for c, ps in enumerate(shown) for i, p in enumerate(ps)}
    files = {str(c): [path for path in picture_of if path.startswith(f"{c}/")] for c in range(len(shown))}
    groups = [[path for path, own in picture_of.items() if own == one] for one in sorted(set(picture_of.values()))]
    items = [(path, name) for name, inside in files.items() for path in inside]
    split = make_split(files, groups)
    given = given_split({"train": items, "test": [("x", name) for name in files]}, groups)
    for made, needed in ((split, ("train", "test")), (given, ("train",))):
        of_part = {part: [item for item in made[part] if item[0] != "x"] for part in PARTS}
        assert sorted(item[0] for part in PARTS for item in of_part[part]) == sorted(picture_of)
        for name, inside in files.items():
            assert all(any(item[2] == name for item in of_part[part]) for part in needed)
            parts = [{picture_of[item[0]] for item in of_part[part] if item[2] == name} for part in PARTS]
            if len({picture_of[path] for path in inside}) > 1:
                assert sum(map(len, parts)) == len(set.union(*parts))


def test_pictures_take_the_shares_of_images():
    files = [f"{i:02}" for i in range(40)]
    groups = [files[i : i + 2] for i in range(0, 40, 2)]
    assert counts(make_split({"a": files}, groups)) == {"train": [20], "val": [8], "test": [12]}


def test_a_split_file_may_lie_elsewhere(tmp_path):
    folder = folder_of_classes(tmp_path / "images", {"a": 2, "b": 2})
    split = {
        part: [(f"{name}/{i}.png", label, name) for label, name in enumerate("ab")]
        for part, i in (("train", 0), ("test", 1))
    }
    write_split(split | {"val": []}, tmp_path / "split.json")
    assert read_own(folder, "coop", split=tmp_path / "split.json").split == split | {"val": []}
    with pytest.raises(ValueError, match="there is no such split file"):
        read_own(folder, "coop", split=tmp_path / "none.json")
