"""The real benchmarks' archives, over replicas and a local HTTP server with faults."""

import hashlib
import http.server
import io
import re
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heba.data.benchmarks import parse_descriptions, prepare
from heba.data.catalog import File, load_catalog
from heba.data.fetch import FetchError, obtain
from heba.data.unpack import ArchiveError, unpack
from heba.splits import class_names, read_split
from tests import replicas


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `files`; `faults` by path: "404", "cut" (drops the connection in the middle, once), "whole" (knows no
    ranges) or "wrong" (other bytes)."""

    files: dict[str, bytes]
    faults: dict[str, str]
    requests: list[tuple[str, str | None]]

    def do_GET(self):
        name, wanted = self.path.lstrip("/"), self.headers.get("Range")
        self.requests.append((name, wanted))
        fault = self.faults.get(name)
        if fault == "404" or name not in self.files:
            self.send_error(404)
            return
        content = self.files[name] if fault != "wrong" else b"x" * len(self.files[name])
        start = 0
        if wanted and fault != "whole":
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = len(content)
        if fault in ("cut", "whole") and len(self.requests) == 1:
            end = start + (end - start) // 2
        self.wfile.write(content[start:end])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    handler = type("Own", (Handler,), {"files": {}, "faults": {}, "requests": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        handler.url = f"http://127.0.0.1:{running.server_address[1]}"
        yield handler
        running.shutdown()


CONTENT = bytes(range(256)) * 5000


def described(url, content=CONTENT, name="a.bin", **changes):
    return File(file=name, url=url, sha256=hashlib.sha256(content).hexdigest(), **changes)


@pytest.mark.parametrize(("fault", "ranges"), [(None, 0), ("cut", 1), ("whole", 1)])
def test_a_broken_download_goes_on_and_ends_right(server, tmp_path, fault, ranges):
    server.files["a.bin"] = CONTENT
    if fault:
        server.faults["a.bin"] = fault
    ((_, path),) = obtain([[described(server.url + "/a.bin")]], tmp_path, "dtd", say=print)
    assert path.read_bytes() == CONTENT
    assert sum(r is not None for _, r in server.requests) == ranges
    assert [p.name for p in (tmp_path / "dtd").iterdir()] == ["a.bin"]


def test_an_interrupted_download_is_resumed_by_the_next_run(server, tmp_path):
    server.files["a.bin"] = CONTENT
    (tmp_path / "dtd").mkdir()
    (tmp_path / "dtd" / "a.bin.part").write_bytes(CONTENT[:700_000])
    ((_, path),) = obtain([[described(server.url + "/a.bin")]], tmp_path, "dtd", say=print)
    assert path.read_bytes() == CONTENT
    assert server.requests == [("a.bin", "bytes=700000-")]


@pytest.mark.parametrize("fault", ["404", "wrong"])
def test_the_next_mirror_is_taken(server, tmp_path, fault):
    server.files |= {"first/a.bin": CONTENT, "b.zip": CONTENT}
    server.faults["first/a.bin"] = fault
    said = []
    alternatives = [[described(server.url + "/first/a.bin")], [described(server.url + "/b.zip", name="b.zip")]]
    ((file, path),) = obtain(alternatives, tmp_path, "dtd", say=said.append)
    assert (file.file, path.read_bytes()) == ("b.zip", CONTENT)
    assert any("first/a.bin" in s and ("404" in s or "checksum" in s) for s in said)
    assert [p.name for p in (tmp_path / "dtd").iterdir()] == ["b.zip"]


def test_nothing_to_be_had_lists_what_was_tried(server, tmp_path):
    server.files["a.bin"] = CONTENT
    server.faults["a.bin"] = "wrong"
    with pytest.raises(FetchError, match="checksum") as error:
        obtain([[described(server.url + "/a.bin"), described(None, name="c")]], tmp_path, "dtd", say=print)
    assert server.url in str(error.value)
    assert list(tmp_path.rglob("*.*")) == []


@pytest.mark.parametrize("place", ["archives/a.bin", "archives/dtd/a.bin", "mirror/dtd/a.bin"])
def test_a_placed_file_needs_no_network(tmp_path, place):
    path = tmp_path / place
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    mirror = str(tmp_path / "mirror")
    ((_, found),) = obtain([[described(None)]], tmp_path / "archives", "dtd", mirror, say=print)
    assert found == path
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(FetchError, match="sha256"):
        obtain([[described(None)]], tmp_path / "archives", "dtd", mirror, say=print)


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
)
def test_evil_and_damaged_archives_are_refused(tmp_path, content):
    archive = tmp_path / "archive"
    archive.write_bytes(content)
    with pytest.raises(ArchiveError, match="archive"):
        unpack(archive, tmp_path / "in" / "here")
    left = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")}
    assert left <= {"archive", "in", "in/here", "in/here/a"}


@pytest.mark.parametrize("name", list(load_catalog()))
def test_every_layout_becomes_images_and_a_split(tmp_path, name):
    entry = load_catalog(replicas.build_all(tmp_path / "mirror", [name]))[name]
    mirror = str(tmp_path / "mirror")

    def get(files):
        return obtain([files], tmp_path / "archives", name, mirror, say=print)

    split_file = get([entry.split])[0][1] if entry.split else None
    prepare(entry, get(entry.sources[0]), split_file, get([entry.descriptions])[0][1], tmp_path / "out")
    split = read_split(tmp_path / "out" / "split.json")
    assert len(class_names(split)) == load_catalog()[name].classes
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["descriptions.json", "images", "split.json"]
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
    files = [(entry.sources[0][0], archive)]
    with pytest.raises(ValueError, match="47 classes instead of 46") as error:
        prepare(bad, files, tmp_path / "dtd" / entry.split.file, Path("none"), tmp_path / "out")
    assert "instead of 7" in str(error.value)
    assert split["test"][0][0] in str(error.value)


def test_the_committed_catalogue_is_complete():
    catalog = load_catalog()
    assert len(catalog) == 15
    for entry in catalog.values():
        files = [entry.descriptions, *([entry.split] if entry.split else [])]
        assert all(f.url and (f.sha256 or f.git_sha1) for f in files)
        for file in (f for source in entry.sources for f in source):
            assert (
                file.url is None
                or "/resolve/main/" not in file.url
                or file.sha256
                or file.file.startswith("ImageNet")
            )


def test_a_malformed_catalogue_lists_its_problems(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("dtd: {title: 3, layout: odd}\nx: []\n")
    with pytest.raises(ValueError, match=r"dtd\.title") as error:
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
