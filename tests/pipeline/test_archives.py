"""Archives that were packed to do harm: each test packs one, runs the stage over it, and looks at what is left."""

import io
import json
import os
import sys
import tarfile
import zipfile

import pytest
import yaml

from tests import replicas
from tests.pipeline.repository import call, stage
from tests.pipeline.test_real import change, repository

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="names and limits of Linux")
MB = 1_000_000


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    return repository(tmp_path_factory.mktemp("archives") / "repo", ["eurosat", "dtd"], [])


@pytest.fixture
def images(repo):
    """The files of the tar of dtd and of the zip of eurosat, whose replicas are put back when the test is over."""
    paths = [repo / "mirror" / "dtd" / "dtd-r1.0.1.tar.gz", repo / "mirror" / "eurosat" / "EuroSAT.zip"]
    kept = [path.read_bytes() for path in paths]
    catalog = (repo / "mirror" / "catalog.yaml").read_text()
    with tarfile.open(paths[0]) as tar, zipfile.ZipFile(paths[1]) as file:
        yield {
            "dtd": {m.name: tar.extractfile(m).read() for m in tar},
            "eurosat": {name: file.read(name) for name in file.namelist()},
        }
    for path, content in zip(paths, kept, strict=True):
        path.write_bytes(content)
    (repo / "mirror" / "catalog.yaml").write_text(catalog)


def entry(name, content=b"", **attributes):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in attributes.items():
        setattr(member, key, value)
    return member, io.BytesIO(content)


def link(name, target, kind=tarfile.SYMTYPE):
    return entry(name, type=kind, linkname=target)


def tar_of(files, before=(), after=(), **options):
    """A .tar.gz of `files`, with members before and after them."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1, **options) as tar:
        for member, content in (*before, *(entry(*item) for item in files.items()), *after):
            tar.addfile(member, content)
    return buffer.getvalue()


def zip_of(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name, content in files.items():
            file.writestr(name, content)
    return buffer.getvalue()


def download(repo, dataset, content, **env):
    """Run the stage over `content` in place of the archive that the catalogue has."""
    archive = yaml.safe_load((repo / "mirror" / "catalog.yaml").read_text())[dataset]["sources"][0][0]["file"]
    published = replicas.publish(repo / "mirror" / dataset, archive, content)
    change(repo, "mirror/catalog.yaml", lambda catalog: catalog[dataset].update(sources=[[published]]))
    # The memory is limited where no server of stages runs it.
    command = [sys.executable, "-m", "pipeline", "download", "--dataset", dataset]
    return call(repo, "bash", "-c", 'ulimit -v 8000000; exec "$@"', "bash", *command, **env)


def refused(repo, dataset, content, *reasons, **env):
    done = download(repo, dataset, content, **env)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    message = done.stderr[done.stderr.index("error:") :]
    for reason in reasons:
        assert reason in message
    assert not (repo / "out" / "download" / f"{dataset}.json").exists()
    assert not (repo / "data" / "real" / dataset).exists()
    assert not list((repo / "data" / "real").glob(f".{dataset}.*.tmp"))


def past_path_max(target):
    """Members that overwrite the file `target`, a path from where the archive is unpacked, as in CVE-2025-4517.

    The path through the links is longer when resolved than a path may be. os.path.realpath gives up there, and
    takes the rest for what it looks like: a folder in the archive, where the file system goes up sixteen folders.
    """
    long, steps, at = "d" * 247, "abcdefghijklmnop", ""
    for step in steps:
        yield entry(at + long, type=tarfile.DIRTYPE)
        yield link(at + step, long)
        at += f"{long}/"
    turn = f"{'/'.join(steps)}/{'l' * 254}"
    yield link(turn, "../" * len(steps))
    yield link("escape", f"{turn}/{os.path.dirname(target)}")
    yield link("victim", f"escape/{os.path.basename(target)}", tarfile.LNKTYPE)
    yield entry("victim", b"overwritten")


def test_no_member_leads_out_past_the_longest_path(repo, images):
    kept = repo / "kept" / "file.txt"
    kept.parent.mkdir()
    kept.write_text("kept")
    # It is unpacked into data/real/.dtd.PID.tmp/new/raw.
    content = tar_of(images["dtd"], past_path_max("../../../../../kept/file.txt"))
    refused(repo, "dtd", content, "'a' is a link", "Pack the archive again")
    assert kept.read_text() == "kept"


@pytest.mark.parametrize("target", ["etc/passwd", "dev/zero"])
def test_no_link_leads_out_after_the_images_are_moved_up(repo, images, target):
    # The link stays inside of as many folders as it goes up, until the images leave them.
    deep = "/".join("n" * 40)
    files = {f"{deep}/{name}": content for name, content in images["dtd"].items()}
    folder = f"{deep}/dtd/images/banded"
    content = tar_of(files, after=[link(f"{folder}/link.jpg", f"{'../' * 43}{target}")])
    refused(repo, "dtd", content, "link.jpg' is a link", HEBA_STAGE_SERVER="")


@pytest.mark.parametrize(
    ("kind", "mode"), [("link", 0o120777), ("pipe", 0o010644), ("device", 0o020644)], ids=lambda value: str(value)
)
def test_a_zip_has_files_and_folders_only(repo, images, kind, mode):
    files = images["eurosat"]
    buffer = io.BytesIO(zip_of(files))
    with zipfile.ZipFile(buffer, "a") as file:
        member = zipfile.ZipInfo(f"2750/{kind}.jpg")
        member.external_attr = mode << 16
        file.writestr(member, "/dev/zero")
    refused(repo, "eurosat", buffer.getvalue(), f"{kind}.jpg' is a link, a device or the like")


@pytest.mark.parametrize("time", ["inf", "nan", "1e300"])
def test_the_times_of_a_tar_are_not_believed(repo, images, time):
    odd = entry("dtd/images/odd.txt", b"odd", pax_headers={"mtime": time})
    done = download(repo, "dtd", tar_of(images["dtd"], [odd], format=tarfile.PAX_FORMAT))
    assert done.returncode == 0, done.stderr
    manifest = repo / "out" / "download" / "dtd.json"
    assert json.loads(manifest.read_text())["images"] == len(images["dtd"]) + 1
    manifest.unlink()
    call(repo, "rm", "-r", "data/real/dtd")


def test_a_name_that_is_not_in_utf8_is_named_with_the_remedy(repo, images):
    remedy = "is not in UTF-8; rename that file, or pack the archive again without it"
    name = "dtd/images/caf\udce9.jpg"
    content = tar_of(images["dtd"], [entry(name, b"x")], format=tarfile.GNU_FORMAT, encoding="utf-8")
    refused(repo, "dtd", content, r"caf\udce9.jpg", remedy)
    content = zip_of(images["eurosat"] | {"2750/café.jpg": b"x"})
    refused(repo, "eurosat", content.replace("café".encode(), b"caf\xe9\xe9"), r"caf\xe9\xe9.jpg", remedy)


@pytest.mark.parametrize("dataset", ["dtd", "eurosat"])
def test_zeros_do_not_fill_the_disk(repo, images, dataset):
    name = {"dtd": "dtd/images/zeros.jpg", "eurosat": "2750/zeros.jpg"}[dataset]
    files = images[dataset] | {name: bytes(200 * MB)}
    content = tar_of(files) if dataset == "dtd" else zip_of(files)
    assert len(content) < 2 * MB
    refused(repo, dataset, content, "zeros.jpg' it unpacks to more than 10", "pictures hardly compress")


def test_an_image_that_became_a_link_is_named(repo, images, tmp_path):
    for command in (["download", "--dataset", "dtd"], ["backbone"]):
        done = stage(repo, *command)
        assert done.returncode == 0, done.stderr
    folder = repo / "data" / "real" / "dtd" / "images"
    image = min(folder.glob("*/*.jpg"))
    image.rename(tmp_path / "away.jpg")
    image.symlink_to(tmp_path / "away.jpg")
    done = stage(repo, "precompute", "--dataset", "dtd")
    assert done.returncode == 1
    assert f"1 of the split are links: {image.relative_to(folder)}" in done.stderr
    call(repo, "rm", "-r", "data/real/dtd", "out/download/dtd.json")
