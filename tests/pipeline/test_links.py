"""Outs are links to DVC's cache: what runs again writes new files, and never through a link."""

import pytest

from pipeline.commands import links
from pipeline.runner import dvc_inside
from tests.pipeline import breakable
from tests.pipeline.repository import ROOT, call, stage

COMMANDS = [
    ["check-params"],
    ["backbone"],
    ["download", "--dataset", "dtd"],
    ["split", "--dataset", "dtd"],
    ["precompute", "--dataset", "dtd"],
    ["train", "--dataset", "dtd", "--method", "heba"],
    ["evaluate", "--dataset", "dtd"],
    ["protocols"],
]
STAGES = ["params", "backbone", "download@dtd", "split@dtd", "precompute@dtd", "train@dtd-heba", "evaluate@dtd"]


def dvc(repo, *arguments):
    done = call(repo, "dvc", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr


def objects(repo):
    """The objects of the cache, each with the content that its name says."""
    with dvc_inside.repository(repo) as opened:
        found = dvc_inside.cached_objects(dvc_inside.cache_folder(opened))
    assert {path: breakable.md5(path) for path in found} == found
    return set(found)


def files(repo, folder="out"):
    return [path for path in sorted((repo / folder).rglob("*")) if path.is_file()]


def is_linked(path, kind):
    """Empty files are never hard links."""
    return path.is_symlink() if kind == "symlink" else path.stat().st_nlink > 1 or not path.stat().st_size


@pytest.mark.parametrize("kind", ["hardlink", "symlink"])
def test_nothing_writes_through_a_link_into_the_cache(finished, tmp_path, warm_stages, kind):
    repo = breakable.copy(finished, tmp_path / "repo")
    dvc(repo, "config", "cache.type", kind)
    dvc(repo, "checkout", "--relink", "--quiet")
    assert all(is_linked(path, kind) for path in files(repo))
    before, adapter = objects(repo), repo / breakable.TRAINED / "adapter.safetensors"
    first = adapter.read_bytes()
    with breakable.changed_params(repo) as params:
        params["shots"] = 1
        params["heba"]["epochs"] = 2
    new = repo / breakable.TRAINED.replace("-2-1", "-1-1") / "adapter.safetensors"
    for command in COMMANDS:  # without DVC, which makes copies of outs that persist
        done = stage(repo, *command)
        assert done.returncode == 0, (command, done.stderr)
    assert new.read_bytes() != first
    assert objects(repo) == before

    dvc(repo, "repro", "--quiet", "--single-item", *STAGES)
    assert objects(repo) > before
    changed = [
        path for out in ("split/dtd", "train/dtd/heba", "evaluate/dtd") for path in files(repo, f"out/{out}")
    ]
    assert new in changed
    assert all(is_linked(path, kind) for path in changed)
    assert any(path.samefile(new) for path in objects(repo))


def test_the_committed_config_takes_no_disk_twice(tmp_path):
    """Were reflink the first, DVC would leave copies on a disk without: it cannot tell one from a copy."""
    repo = breakable.make(tmp_path / "repo", breakable.small_params())
    (repo / ".dvc" / "config").write_bytes((ROOT / ".dvc" / "config").read_bytes())
    with dvc_inside.repository(repo) as opened:
        assert opened.config["cache"]["type"] == ["hardlink", "symlink"]
    (repo / "dvc.yaml").write_text("stages: {big: {cmd: echo big > big.txt, outs: [big.txt]}}")
    dvc(repo, "repro", "--quiet")  # `dvc add` makes links even with reflink first
    assert is_linked(repo / "big.txt", "hardlink")
    assert links.examine(repo)[0] == "ok"


@pytest.mark.parametrize("kinds", ["copy", "reflink,copy", "reflink,hardlink,symlink"])
def test_doctor_says_what_makes_copies_and_how_to_end_it(tmp_path, kinds):
    repo = breakable.make(tmp_path / "repo", breakable.small_params())
    dvc(repo, "config", "cache.type", kinds)
    state, found, remedy = links.examine(repo)
    if kinds != "copy" and state == "ok":
        assert "reflink" in found
        pytest.skip("a file system with reflinks")
    assert (state, kinds in found.replace(" ", "")) == ("warn", True)
    call(repo, *remedy.split(" && ")[0].split())
    assert links.examine(repo)[0] == "ok"
