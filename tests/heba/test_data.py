"""The real benchmarks' archives, over replicas and a local HTTP server with faults."""

import gzip
import hashlib
import io
import tarfile
import tracemalloc
import zipfile
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heba.data.splits import class_names, read_split
from heba.sources.benchmarks import parse_descriptions, prepare
from heba.sources.catalog import File, load_catalog
from heba.sources.fetch import FetchError, Local, bytes_to_fetch, check, obtain, partial_path
from heba.sources.unpack import ArchiveError, unpack
from tests import replicas
from tests.server import serve


@pytest.fixture
def server():
    with serve() as running:
        yield running


CONTENT = bytes(range(256)) * 5000


def described(url, content=CONTENT, name="a.bin", **changes):
    return File(file=name, url=url, sha256=hashlib.sha256(content).hexdigest(), **changes)


@pytest.mark.parametrize(("fault", "ranges"), [(None, 0), ("cut", 1), ("whole", 1), ("busy", 0), ("slow", 3)])
def test_a_broken_download_goes_on_and_ends_right(server, tmp_path, fault, ranges):
    server.files["a.bin"] = CONTENT
    if fault:
        server.faults["a.bin"] = fault
    ((_, path, sha256),) = obtain([[described(server.url + "/a.bin")]], tmp_path, "dtd", say=print)
    assert path.read_bytes() == CONTENT
    assert sha256 == hashlib.sha256(CONTENT).hexdigest()
    assert sum(r is not None for _, r in server.requests) == ranges
    assert [p.name for p in (tmp_path / "dtd").iterdir()] == ["a.bin"]


def test_an_interrupted_download_is_resumed_by_the_next_run_and_only_from_its_own_place(server, tmp_path):
    server.files |= {"a.bin": CONTENT, "other/a.bin": CONTENT}
    file = described(server.url + "/a.bin", size=len(CONTENT))
    (tmp_path / "dtd").mkdir()
    partial_path(tmp_path / "dtd", file, server.url + "/a.bin").write_bytes(CONTENT[:700_000])
    foreign = partial_path(tmp_path / "dtd", file, server.url + "/other/a.bin")
    foreign.write_bytes(b"foreign")
    assert bytes_to_fetch([file], tmp_path, "dtd", None) == len(CONTENT) - 700_000
    ((_, path, _),) = obtain([[file]], tmp_path, "dtd", say=print)
    assert path.read_bytes() == CONTENT
    assert server.requests == [("a.bin", "bytes=700000-")]
    assert not foreign.exists()
    assert bytes_to_fetch([file], tmp_path, "dtd", None) == 0


WAITS = {
    "trickle": "too slow: ",
    "trickled head": "nothing came in 1 s",
    "silent": "nothing came in 1 s",
    "crumbs": "IncompleteRead",
}


@pytest.mark.parametrize("fault", WAITS)
def test_a_server_that_keeps_us_waiting_gives_way_to_the_next(server, tmp_path, monkeypatch, fault):
    monkeypatch.setattr("heba.sources.fetch.WINDOW", 1)
    monkeypatch.setattr("heba.sources.fetch.ATTEMPTS", 2)
    server.files |= {"first/a.bin": CONTENT, "b.bin": CONTENT}
    server.faults["first/a.bin"] = fault
    said = []
    file = described(server.url + "/first/a.bin", mirrors=[server.url + "/b.bin"])
    ((_, path, _),) = obtain([[file]], tmp_path, "dtd", say=said.append)
    assert path.read_bytes() == CONTENT
    assert any(f"{server.url}/first/a.bin: " in s and WAITS[fault] in s for s in said)
    assert [p.name for p in (tmp_path / "dtd").iterdir()] == ["a.bin"]


def test_a_file_without_an_end_is_refused_and_removed(server, tmp_path):
    server.files["a.bin"] = CONTENT
    server.faults["a.bin"] = "endless"
    with pytest.raises(FetchError, match="more than 100 MB; if that is right, correct its size in the catalogue"):
        obtain([[described(server.url + "/a.bin")]], tmp_path, "dtd", say=print)
    assert list((tmp_path / "dtd").iterdir()) == []


ZIP, TAR = replicas.zip_of({"a": CONTENT}), replicas.tar_of({"a": CONTENT}, "w:gz")


@pytest.mark.parametrize("fault", ["gzip", "labelled"])
@pytest.mark.parametrize("checksum", [True, False])
@pytest.mark.parametrize(("name", "content"), [("a.zip", ZIP), ("a.tar.gz", TAR)], ids=["zip", "tar.gz"])
def test_what_a_server_compresses_or_only_says_so_lands_as_published(
    server, tmp_path, fault, checksum, name, content
):
    server.files[name] = content
    server.faults[name] = fault
    url = f"{server.url}/{name}"
    file = described(url, content, name, size=len(content)) if checksum else File(file=name, url=url)
    ((_, path, sha256),) = obtain([[file]], tmp_path, "dtd", say=print)
    assert path.read_bytes() == content
    assert sha256 == hashlib.sha256(content).hexdigest()
    assert [p.name for p in (tmp_path / "dtd").iterdir()] == [name]


@pytest.mark.parametrize(("fault", "reason"), [("br", "compressed by br"), ("gzip", "wrong checksum")])
def test_what_a_server_compresses_beyond_use_is_refused(server, tmp_path, fault, reason):
    server.files["a.bin"] = bytes(101_000_000)  # more than a file of no known size may have
    server.faults["a.bin"] = fault
    with pytest.raises(FetchError, match=reason):
        obtain([[described(server.url + "/a.bin")]], tmp_path, "dtd", say=print)
    assert list((tmp_path / "dtd").iterdir()) == []


@pytest.mark.parametrize("fault", ["404", "wrong", "html"])
def test_the_next_mirror_is_taken(server, tmp_path, fault):
    server.files |= {"first/a.bin": CONTENT, "b.zip": CONTENT}
    server.faults["first/a.bin"] = fault
    said = []
    alternatives = [[described(server.url + "/first/a.bin")], [described(server.url + "/b.zip", name="b.zip")]]
    ((file, path, _),) = obtain(alternatives, tmp_path, "dtd", say=said.append)
    assert (file.file, path.read_bytes()) == ("b.zip", CONTENT)
    reason = {"404": "404", "wrong": "checksum", "html": "web page"}[fault]
    assert any("first/a.bin" in s and reason in s for s in said)
    assert [p.name for p in (tmp_path / "dtd").iterdir()] == ["b.zip"]


def test_a_file_has_mirrors_of_its_own(server, tmp_path):
    server.files["there/a.bin"] = CONTENT
    obtain([[described(server.url + "/a.bin", mirrors=[server.url + "/there/a.bin"])]], tmp_path, "dtd", say=print)
    assert [name for name, _ in server.requests] == ["a.bin", "there/a.bin"]


def test_nothing_to_be_had_lists_what_was_tried(server, tmp_path):
    server.files["a.bin"] = CONTENT
    server.faults["a.bin"] = "wrong"
    with pytest.raises(FetchError, match="checksum") as error:
        obtain([[described(server.url + "/a.bin"), described(None, name="c")]], tmp_path, "dtd", say=print)
    assert server.url in str(error.value)
    assert error.value.missing == [["a.bin", "c"]]
    assert list(tmp_path.rglob("*.*")) == []


@pytest.mark.parametrize("place", ["archives/a.bin", "archives/dtd/a.bin", "mirror/dtd/a.bin"])
def test_a_placed_file_needs_no_network(tmp_path, place):
    path = tmp_path / place
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    mirror = str(tmp_path / "mirror")
    ((_, found, _),) = obtain([[described(None)]], tmp_path / "archives", "dtd", mirror, say=print)
    assert found == path
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(FetchError, match="sha256"):
        obtain([[described(None)]], tmp_path / "archives", "dtd", mirror, say=print)


def test_a_placed_file_with_another_checksum_is_kept_and_reported(server, tmp_path):
    server.files["a.bin"] = CONTENT
    placed = tmp_path / "dtd" / "a.bin"
    placed.parent.mkdir()
    placed.write_bytes(b"the user's")
    said = []
    ((_, path, _),) = obtain([[described(server.url + "/a.bin")]], tmp_path, "dtd", say=said.append)
    assert path.read_bytes() == CONTENT
    assert (tmp_path / "dtd" / "a.bin.bad").read_bytes() == b"the user's"
    assert any("wrong checksum" in s for s in said)
    assert any("kept as a.bin.bad" in s for s in said)


def test_an_archive_without_checksum_that_is_of_no_use_is_fetched_from_the_next_place(server, tmp_path):
    good, bad = replicas.zip_of({"a": b"right"}), replicas.zip_of({"a": b"wrong"})
    server.files |= {"1/a.zip": b"plain text", "2/a.zip": bad, "3/a.zip": good}
    alternatives = [[File(file="a.zip", url=f"{server.url}/{i}/a.zip")] for i in (1, 2, 3)]
    said = []

    def use(files):
        unpack(files[0].path, tmp_path / "out")
        if (tmp_path / "out" / "a").read_bytes() != b"right":
            raise ValueError("wrong images")

    ((file, path, _),) = obtain(alternatives, tmp_path, "dtd", say=said.append, use=use)
    assert file is alternatives[2][0]
    assert path.read_bytes() == good
    assert any("neither a tar nor a zip" in s for s in said)
    assert any("wrong images" in s for s in said)
    assert [p.name for p in (tmp_path / "dtd").iterdir()] == ["a.zip"]
    # What lies there from the start may be the user's.
    path.write_bytes(bad)
    obtain(alternatives[2:], tmp_path, "dtd", say=print, use=use)
    assert path.read_bytes() == good
    assert path.with_name("a.zip.bad").read_bytes() == bad


def test_a_mirror_comes_before_the_official_host_and_git_hashes_are_checked(server, tmp_path):
    server.files |= {"dtd/s.json": b"[]", "official.json": b"[]"}
    file = File(
        file="s.json", url=server.url + "/official.json", git_sha1="0637a088a01e8ddab3bf3fa98dbe804cbde1a0dc"
    )
    obtain([[file]], tmp_path, "dtd", server.url, say=print)
    assert [name for name, _ in server.requests] == ["dtd/s.json"]
    wrong = file.model_copy(update={"git_sha1": "0" * 40, "file": "t.json"})
    with pytest.raises(FetchError, match="git_sha1"):
        obtain([[wrong]], tmp_path, "dtd", say=print)


def evil_tar(**attributes):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        member = tarfile.TarInfo(attributes.pop("name", "member"))
        for key, value in attributes.items():
            setattr(member, key, value)
        tar.addfile(member)
    return buffer.getvalue()


def evil_zip(name):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, b"x")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        evil_tar(name="../outside"),
        evil_tar(type=tarfile.SYMTYPE, linkname="../../outside"),
        evil_tar(type=tarfile.LNKTYPE, linkname="../outside"),
        evil_tar(type=tarfile.CHRTYPE),
        evil_zip("../outside"),
        evil_zip("a/../../outside"),
        evil_zip("C:\\outside"),
        replicas.tar_of({"a": b"1" * 4000}, "w:gz")[:-20],
        b"no archive at all",
    ],
    ids=range(9),  # not their bytes: gzip's have the time in them, and the names of tests must be the same
)
def test_evil_and_damaged_archives_are_refused(tmp_path, content):
    archive = tmp_path / "archive"
    archive.write_bytes(content)
    with pytest.raises(ArchiveError, match="archive"):
        unpack(archive, tmp_path / "in" / "here")
    left = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")}
    assert left <= {"archive", "in", "in/here", "in/here/a"}


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE], ids=["name", "pax"])
def test_a_header_does_not_fill_the_memory(tmp_path, kind):
    member = tarfile.TarInfo("member")
    member.type, member.size = kind, 60_000_000
    path = tmp_path / "a.tar.gz"
    with gzip.open(path, "wb", compresslevel=1) as out:
        out.write(member.tobuf() + bytes(member.size) + replicas.tar_of({"a": b"x"}))
    tracemalloc.start()
    with suppress(ArchiveError):
        unpack(path, tmp_path / "out")
    check(path, File(file="a.tar.gz", url=None))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < member.size / 3


def test_an_archive_without_checksum_that_breaks_off_in_its_first_bytes_is_named(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(replicas.tar_of({"a": CONTENT}, "w:gz")[:30])
    with pytest.raises(FetchError, match="neither a tar nor a zip archive, or is cut off"):
        obtain([[File(file="a.tar.gz", url=None)]], tmp_path, "dtd", say=print)


@pytest.mark.parametrize("name", list(load_catalog()))
def test_every_layout_becomes_images_and_a_split(tmp_path, name):
    entry = load_catalog(replicas.build_all(tmp_path / "mirror", [name]))[name]
    mirror = str(tmp_path / "mirror")

    def get(files):
        return obtain([files], tmp_path / "archives", name, mirror, say=print)

    given = read_split(get([entry.split])[0].path) if entry.split else None
    prepare(entry, get(entry.sources[0]), given, tmp_path / "out")
    split = read_split(tmp_path / "out" / "split.json")
    assert len(class_names(split)) == load_catalog()[name].classes
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["images", "split.json"]
    # The picture of a class tells its label, so an image under a wrong label would be seen.
    ids = range(0, 1000, 1000 // entry.classes) if name in ("imagenet_a", "imagenet_r") else range(entry.classes)
    for part in ("train", "test"):
        for file, label, _ in split[part]:
            assert (tmp_path / "out" / "images" / file).read_bytes() == replicas.jpeg(ids[label])
    assert [f for f, label, _ in split["test"] if label == 0] == sorted(
        f for f, label, _ in split["test"] if not label
    )


def test_missing_images_and_wrong_counts_are_named(tmp_path):
    path = replicas.build_all(tmp_path, ["dtd"])
    entry = load_catalog(path)["dtd"]
    bad = entry.model_copy(update={"classes": 46, "counts": entry.counts.model_copy(update={"test": 7})})
    archive = tmp_path / "dtd" / "dtd-r1.0.1.tar.gz"
    split = read_split(tmp_path / "dtd" / entry.split.file)
    with tarfile.open(archive) as tar:
        kept = {m.name: tar.extractfile(m).read() for m in tar}
    gone = next(n for n in kept if n.endswith(split["test"][0][0]))
    del kept[gone]
    archive.write_bytes(replicas.tar_of(kept, "w:gz"))
    files = [Local(entry.sources[0][0], archive, "")]
    with pytest.raises(ValueError, match="47 classes instead of 46") as error:
        prepare(bad, files, split, tmp_path / "out")
    assert "instead of 7" in str(error.value)
    assert split["test"][0][0] in str(error.value)


def test_cars_from_their_two_official_archives(tmp_path):
    entry = load_catalog(replicas.build_all(tmp_path / "mirror", ["stanford_cars"]))["stanford_cars"]
    split = read_split(tmp_path / "mirror" / "stanford_cars" / entry.split.file)
    files = []
    for file in load_catalog()["stanford_cars"].sources[1]:
        content = {
            path: replicas.jpeg(label)
            for items in split.values()
            for path, label, _ in items
            if path.startswith(file.file.removesuffix(".tgz") + "/")
        }
        assert content
        (tmp_path / file.file).write_bytes(replicas.tar_of(content, "w:gz"))
        files.append(Local(file, tmp_path / file.file, ""))
    (tmp_path / "out").mkdir()
    prepare(entry, files, split, tmp_path / "out")
    path, label, _ = split["test"][0]
    assert (tmp_path / "out" / "images" / path).read_bytes() == replicas.jpeg(label)


def test_what_macos_packs_beside_the_images_is_left_out(tmp_path):
    files = {"a/1.jpg": b"x", "a/._1.jpg": b"junk", "__MACOSX/a/1.jpg": b"junk"}
    for name, content in (("z", replicas.zip_of({"./": b""} | files)), ("t", replicas.tar_of(files))):
        (tmp_path / name).write_bytes(content)
        unpack(tmp_path / name, tmp_path / f"{name}-out")
        left = [p.relative_to(tmp_path / f"{name}-out") for p in (tmp_path / f"{name}-out").rglob("*")]
        assert sorted(p.as_posix() for p in left) == ["a", "a/1.jpg"]


def test_the_committed_catalogue_is_complete():
    catalog = load_catalog()
    assert len(catalog) == 15
    for entry in catalog.values():
        files = [entry.descriptions, *([entry.split] if entry.split else [])]
        assert all(f.url and f.has_checksum for f in files)
        assert entry.descriptions.mirrors
        archives = [file for source in entry.sources for file in source]
        checked = {file.file for file in archives if file.has_checksum}
        # A placed file that fails its checksum must not pass for one without.
        assert not checked & {file.file for file in archives if not file.has_checksum}
    # Whose images come from an archive that nothing but its content vouches for, unless the user has another.
    first = {name for name, e in catalog.items() if not all(f.has_checksum for f in e.sources[0])}
    assert first == {"stanford_cars"}
    assert "/resolve/main/" not in catalog["stanford_cars"].sources[0][0].url


def test_a_malformed_catalogue_lists_its_problems(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("dtd: {terms: 3, layout: odd}\nx: []\n")
    with pytest.raises(ValueError, match=r"dtd\.terms") as error:
        load_catalog(path)
    assert "dtd.layout" in str(error.value)


def test_descriptions_are_parsed_and_never_run(tmp_path):
    assert parse_descriptions('x = {"a": ["b",\n "c"]}\n', "f") == {"a": ["b", "c"]}
    target = tmp_path / "ran"
    for source in (
        f"x = open({str(target)!r}, 'w')",
        "x = {'a': 'b'}",
        "x = {'a': [b]}",
        "import os",
        "(" * 400,
        "{",
    ):
        with pytest.raises(ValueError, match="f: "):
            parse_descriptions(source, "f")
    assert not target.exists()


@given(st.text(max_size=60))
def test_any_text_is_descriptions_or_an_error(text):
    try:
        found = parse_descriptions(text, "f")
    except ValueError:
        return
    assert isinstance(found, dict)
