"""Requests to a served adapter: many at once, too large ones, files of the server, and what an error tells."""

import base64
import io
import os
import re
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import heba
from heba.clip.tiny import load_tiny_clip
from heba.methods.heba.model import AdaptedCLIP
from pipeline.tracking import served
from pipeline.tracking.models import save_model
from tests.heba import artifacts
from tests.pipeline.serving import serving

NAMES = [f"class {i}" for i in range(20)]


def coded(image, kind="PNG", **options):
    """An image file in base64."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return base64.b64encode(file.getvalue()).decode()


def picture(seed, side=40):
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """The folder of an adapter on the tiny CLIP, as a training writes it."""
    folder = tmp_path_factory.mktemp("served") / "adapter"
    torch.manual_seed(0)
    model = AdaptedCLIP(load_tiny_clip()[0], 1, 4, 0.3)
    artifacts.save(model, folder, class_names=NAMES, backbone=artifacts.TINY)
    artifacts.save_classifier(torch.randn(len(NAMES), 128), folder, scale=0.3)
    return folder


@pytest.fixture(scope="module")
def images(adapter):
    """The folder of images that clients may name."""
    folder = adapter.parent / "images"
    (folder / "deeper").mkdir(parents=True)
    picture(1).save(folder / "deeper" / "a.png")
    (adapter.parent / "secret.png").write_bytes((folder / "deeper" / "a.png").read_bytes())
    (folder / "out.png").symlink_to(adapter.parent / "secret.png")
    (folder / "nowhere.png").symlink_to(adapter.parent / "missing.png")
    (folder / "circle.png").symlink_to(folder / "circle.png")
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    return folder


@pytest.fixture(scope="module")
def server(adapter, images):
    save_model(adapter, adapter.parent / "model", "run", "model")
    with serving(str(adapter.parent / "model"), adapter.parent, HEBA_SERVE_IMAGES=str(images)) as running:
        yield running


def refusal(answer):
    """The message of an error: one line, and nothing else in the answer but a code."""
    assert answer.status_code == 400, answer.text
    error = answer.json()
    assert set(error) == {"error_code", "message"}
    assert "\n" not in error["message"]
    return error["message"]


def test_32_clients_get_the_answers_of_one(adapter, server):
    expected = [next(heba.load(adapter).predict(picture(i))) for i in range(8)]

    def client(i):
        return [server.ask([coded(picture(j % 8)) for j in range(i, i + 3)]) for _ in range(3)]

    with ThreadPoolExecutor(32) as clients:
        for i, answers in enumerate(clients.map(client, range(32))):
            for answer in answers:
                assert answer.ok, answer.text
                for j, found in enumerate(answer.json()["predictions"], start=i):
                    assert found["labels"] == expected[j % 8].classes
                    assert found["probabilities"] == pytest.approx(expected[j % 8].probabilities, abs=1e-5)


def test_8_images_of_169_megapixels_are_refused_by_their_headers(server):
    large = coded(Image.new("1", (13000, 13000)))
    server.ask([coded(picture(0))])
    before = server.peak_memory()
    assert "image 0: more than the 50000000 pixels" in refusal(server.ask([large] * 8))
    assert server.peak_memory() - before < 200e6


def test_32_requests_of_large_images_at_once_take_the_memory_of_two(server):
    large = coded(Image.new("1", (4000, 3000)))
    assert server.ask([large] * 2).ok
    before = server.peak_memory()
    with ThreadPoolExecutor(32) as clients:
        answers = list(clients.map(server.ask, [[large] * 2] * 32))
    assert {answer.status_code for answer in answers} == {200}
    # Such an image takes 60 MB, and a decoder keeps what it had for the one before.
    assert server.peak_memory() - before < 150e6


def many_scans():
    """A progressive JPEG whose last scan comes again and again."""
    file = io.BytesIO()
    Image.new("L", (64, 64)).save(file, "JPEG", progressive=True)
    content = file.getvalue()
    last = content[content.rindex(b"\xff\xda") : -2]
    return base64.b64encode(content[:-2] + 200 * last + content[-2:]).decode()


def truncated():
    whole = base64.b64decode(coded(picture(0)))
    return base64.b64encode(whole[: len(whole) // 2]).decode()


@pytest.mark.parametrize(
    ("request_of", "message"),
    [
        (lambda: [coded(picture(0))] * 65, "65 images in a request, of which 64 are allowed"),
        (lambda: ["A" * 26_666_680], "image 0: more than the 20000000 bytes"),
        (lambda: [coded(Image.new("1", (7000, 7000)))] * 5, "images 0 to 4 have 245000000 pixels"),
        (lambda: [coded(Image.new("1", (20000, 10000)))], "image 0: more than the 50000000 pixels"),
        (lambda: [coded(Image.new("L", (1, 65500)))], "image 0: 1 x 65500 pixels, one side more than 100 times"),
        (lambda: [coded(picture(0)), coded(Image.new("I;16", (8, 8)))], "image 1: an image of 16 or more bits"),
        (lambda: [many_scans()], "image 0: a JPEG of more than 100 scans"),
        (lambda: [coded(picture(0), "TIFF")], "image 0: no image file in base64, or a damaged one; formats: BMP"),
        (lambda: [coded(picture(0)), truncated()], "image 1: no image file in base64, or a damaged one"),
        (lambda: ["no image"], "image 0: no image file in base64"),
        (lambda: ["/etc/passwd"], "image 0: no image file in base64"),
        (lambda: [None], "image 0: no image file in base64"),
    ],
)
def test_a_refusal_is_one_line(server, request_of, message):
    assert message in refusal(server.ask(request_of()))


def test_top_must_be_a_number_from_1_on(server):
    assert refusal(server.ask([coded(picture(0))], top=0)) == "top must be a whole number from 1 on, not 0"
    assert len(server.ask([coded(picture(0))], top=10**6).json()["predictions"][0]["labels"]) == len(NAMES)


def test_files_of_the_folder_alone_are_read_and_no_others_are_told_of(server, images):
    (expected,) = server.ask([coded(picture(1))]).json()["predictions"]
    for name in ("deeper/a.png", "deeper/../deeper/a.png", str(images / "deeper" / "a.png")):
        assert server.ask([name]).json()["predictions"] == [expected]
    secret = images.parent / "secret.png"
    assert secret.is_file()
    told = {
        refusal(server.ask([name]))
        for name in (
            *(str(secret), str(secret.with_name("missing.png")), "../secret.png", "../missing.png"),
            *("out.png", "nowhere.png", "circle.png", "folder.png", "pipe.png", "missing.png"),
            *("/etc/host.conf", "/proc/self/mem.x", "a.png\0", "x" * 5000 + ".png", "~/a.png"),
        )
    }
    assert told == {"image 0: no file in this server's folder of images"}


@pytest.fixture
def model(adapter, monkeypatch):
    """The adapter as the server has it, in this process, without a folder of images."""
    monkeypatch.delenv("HEBA_SERVE_IMAGES", raising=False)
    model = served.ServedAdapter()
    model.load_context(SimpleNamespace(artifacts={"adapter": str(adapter)}))
    return model


def test_without_a_folder_no_file_is_read(model, images):
    told = set()
    for path in (images / "deeper" / "a.png", images / "missing.png"):
        with pytest.raises(served.Refused) as error:
            model.predict(None, pd.DataFrame({"image": [str(path)]}))
        told.add(str(error.value))
    (text,) = told
    assert re.search(r"no folder of images \(HEBA_SERVE_IMAGES\)", text)


def test_what_fails_in_the_server_is_for_its_log(model, caplog):
    model.classifier = None
    with pytest.raises(served.Refused) as error:
        model.predict(None, pd.DataFrame({"image": [coded(picture(0))]}))
    assert error.value.get_http_status_code() == 500
    assert "NoneType" not in error.value.serialize_as_json()
    assert "'NoneType' object has no attribute" in caplog.text


def test_limits_are_read_from_the_environment(tmp_path):
    limits = served.limits_of({"HEBA_SERVE_MAX_IMAGES": "3", "HEBA_SERVE_IMAGES": str(tmp_path)})
    assert (limits.images, limits.folder, limits.bytes) == (3, tmp_path, 20_000_000)
    for wrong in ({"HEBA_SERVE_MAX_PIXELS": "many"}, {"HEBA_SERVE_MAX_PIXELS": "0"}, {"HEBA_SERVE_IMAGES": "/no"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            served.limits_of(wrong)
