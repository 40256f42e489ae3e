"""What comes from outside, changed at random: it is taken, or refused with a ValueError that names it."""

import copy
import io
import json
import struct
import zipfile
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import open_clip
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from heba import artifact
from heba.clip.architecture import read_architecture
from heba.data.prompts import read_descriptions
from heba.data.splits import read_split
from heba.fit.loop import make_optimizer, save_checkpoint
from heba.methods.heba.model import AdaptedCLIP
from heba.methods.heba.training import train
from heba.sources.benchmarks import parse_descriptions
from heba.sources.catalog import CATALOG, load_catalog
from heba.sources.unpack import ArchiveError, unpack
from pipeline.core.params import load_params
from tests.heba import artifacts
from tests.heba.test_model import make_clip
from tests.heba.test_training import setup
from tests.replicas import tar_of

ROOT = Path(__file__).parents[1]
fuzz = settings(
    deadline=timedelta(seconds=5),
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
leaves = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.integers(10**18, 10**30)
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["../..", "/etc/passwd", "a\0b", "{}", "{0.__class__}", "\ud800", "tiny", "1e-3"])
)
values = st.recursive(
    leaves, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=4), v, max_size=3), max_leaves=6
)


@st.composite
def changed(draw, whole):
    """`whole`, made of dictionaries and lists, with one to three places replaced, left out or doubled."""
    found = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        place, at = found, None
        while isinstance(place, dict | list) and place and (at is None or draw(st.booleans())):
            parent = place
            at = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            place = parent[at]
        if at is None:
            return draw(values)
        how = draw(st.sampled_from(["replace", "remove", "add"]))
        if how == "replace":
            parent[at] = draw(values)
        elif how == "remove":
            del parent[at]
        elif isinstance(parent, list):
            parent.append(copy.deepcopy(parent[at]))
        else:
            parent[draw(st.text(max_size=5))] = draw(values)
    return found


def scrambled(content):
    """Bytes of a file of which some were replaced, cut out or put in."""
    part = st.tuples(st.integers(0, len(content)), st.integers(0, 40), st.binary(max_size=12))
    cuts = part.map(lambda p: content[: p[0]] + p[2] + content[p[0] + p[1] :])
    return cuts | st.binary(max_size=80) | st.sampled_from([b"", b"\xff\xfe", b"[" * 600, b"\x00" * 9])


def refused_or_read(read, path, content):
    """Only a ValueError that names the file may come out."""
    path.write_bytes(content)
    try:
        return read(path)
    except ValueError as error:
        message = str(error)
    assert path.name in message
    return None


def as_json(value):
    return json.dumps(value).encode()


def as_yaml(value):
    return yaml.safe_dump(value).encode()


PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
SPLIT = {
    "train": [["a/1.jpg", 0, "cat"], ["b/2.jpg", 1, "dog"]],
    "val": [["a/3.jpg", 0, "cat"]],
    "test": [["b/4.jpg", 1, "dog"]],
}
DESCRIPTIONS = {"cat": ["which purrs.", "which sleeps."], "dog": ["which barks."]}


@fuzz
@given(changed(PARAMS).map(as_yaml) | scrambled((ROOT / "params.yaml").read_bytes()))
def test_params(tmp_path, content):
    params = refused_or_read(load_params, tmp_path / "params.yaml", content)
    if params:
        assert all(abs(number) < 2**32 for number in numbers(params.model_dump()))


def numbers(value):
    """All numbers in a structure of dictionaries and lists."""
    if isinstance(value, dict | list):
        return [n for inner in (value.values() if isinstance(value, dict) else value) for n in numbers(inner)]
    return [value] if isinstance(value, int | float) else []


@fuzz
@given(st.data())
def test_aliases(tmp_path, data):
    """Sections that are one another, or hold themselves: PyYAML writes and reads them as aliases."""
    params = copy.deepcopy(PARAMS)
    sections = [key for key in sorted(params) if isinstance(params[key], dict)]
    for _ in range(data.draw(st.integers(1, 4))):
        holder = params[data.draw(st.sampled_from(sections))]
        other = params if data.draw(st.booleans()) else params[data.draw(st.sampled_from(sections))]
        holder[data.draw(st.sampled_from(["heba", "overrides", "cross_dataset", "seeds", "x", "root"]))] = other
    refused_or_read(load_params, tmp_path / "params.yaml", as_yaml(params))


@fuzz
@given(changed(SPLIT).map(as_json) | scrambled(as_json(SPLIT)))
def test_splits(tmp_path, content):
    split = refused_or_read(read_split, tmp_path / "split.json", content)
    for file in (file for part in (split or {}).values() for file, _, _ in part):
        assert not Path(file).is_absolute()
        assert ".." not in Path(file).parts


@fuzz
@given(changed(DESCRIPTIONS).map(as_json) | scrambled(as_json(DESCRIPTIONS)))
def test_descriptions(tmp_path, content):
    refused_or_read(read_descriptions, tmp_path / "descriptions.json", content)


@fuzz
@given(
    changed(DESCRIPTIONS).map(lambda d: f"prompts = {d!r}".encode()) | scrambled(b"p = {'cat': ['which purrs.']}")
)
def test_descriptions_as_python(tmp_path, content):
    def read(path):
        return parse_descriptions(path.read_text(encoding="utf-8", errors="replace"), str(path))

    refused_or_read(read, tmp_path / "prompts.py", content)


def catalogue():
    whole = yaml.safe_load(CATALOG.read_text())
    return {name: whole[name] for name in ("eurosat", "imagenet", "imagenet_a")}


@fuzz
@given(changed(catalogue()).map(as_yaml) | scrambled(as_yaml(catalogue())))
def test_catalogues(tmp_path, content):
    load_catalog.cache_clear()
    refused_or_read(load_catalog, tmp_path / "catalog.yaml", content)
    load_catalog.cache_clear()


ARCHITECTURE = {"embed_dim": 16, "vision_cfg": {"layers": 2, "width": 32}, "text_cfg": {"layers": 2, "width": 32}}


@fuzz
@given(changed(ARCHITECTURE).map(as_json) | scrambled(as_json(ARCHITECTURE)))
def test_architectures(tmp_path, content):
    refused_or_read(lambda path: read_architecture(path.name, tmp_path), tmp_path / "model.json", content)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """The files of a saved adapter, and the plain model."""
    folder = tmp_path_factory.mktemp("adapter")
    model = AdaptedCLIP(make_clip(open_clip.CLIP), 1, 2, 0.1)
    artifacts.save(model, folder)
    return folder, make_clip(open_clip.CLIP)


@fuzz
@given(data=st.data())
def test_configs_of_adapters(adapter, data):
    folder, clip = adapter
    path = folder / "config.json"
    kept = path.read_bytes()
    content = data.draw(changed(json.loads(kept)).map(as_json) | scrambled(kept))
    refused_or_read(lambda path: artifact.read_config(path.parent), path, content)
    found = refused_or_read(lambda path: artifact.load(clip, path.parent), path, content)
    if found:
        found[0].detach()
    path.write_bytes(kept)


def with_header(content, change):
    """A safetensors file whose header was changed."""
    (length,) = struct.unpack("<Q", content[:8])
    header = as_json(change(json.loads(content[8 : 8 + length])))
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


@fuzz
@given(data=st.data())
def test_tensors_of_adapters(adapter, data):
    folder, clip = adapter
    path = folder / "adapter.safetensors"
    kept = path.read_bytes()
    headers = changed(header_of(kept)).map(lambda header: with_header(kept, lambda _: header))
    content = data.draw(scrambled(kept) | headers)
    # A new file, since the tensors of the one before may still be mapped.
    path.unlink()
    found = refused_or_read(lambda path: artifact.load(clip, path.parent), path, content)
    if found:
        found[0].detach()
    path.unlink()
    path.write_bytes(kept)


def header_of(content):
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "c.safetensors"
    whole = setup(epochs=1)
    optimizer = make_optimizer(whole[0].adapters, 0.01, 0.9, 5e-4)
    for parameter in whole[0].adapters.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    save_checkpoint(path, whole[0].adapters, optimizer, torch.Generator(), [{"epoch": 1, "loss": 1.0, "lr": 0.1}])
    return path, path.read_bytes()


@settings(fuzz, max_examples=40)
@given(data=st.data())
def test_checkpoints(checkpoint, data):
    path, kept = checkpoint
    headers = changed(header_of(kept)).map(lambda header: with_header(kept, lambda _: header))
    content = data.draw(scrambled(kept) | headers)
    path.unlink(missing_ok=True)
    refused_or_read(lambda path: train(*setup(epochs=1, run={"checkpoint": path})), path, content)


def archives():
    """Small archives of every kind that a data set comes in, and of those that zip may be compressed with."""
    files = {f"images/{i}.txt": bytes(range(256)) * 4 + bytes([i]) for i in range(4)}
    found = [tar_of(files, mode) for mode in ("w", "w:gz", "w:bz2", "w:xz")]
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", compression) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        found.append(buffer.getvalue())
    return found


@settings(fuzz, max_examples=300)
@given(content=st.sampled_from(archives()).flatmap(scrambled))
def test_archives(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("archive")
    archive = folder / "archive"
    archive.write_bytes(content)
    with suppress(ArchiveError):
        unpack(archive, folder / "in")
    assert {path.name for path in folder.iterdir()} <= {"archive", "in"}
