"""What MLflow runs to serve an adapter. MLflow copies this file into each model, so it knows nothing but heba.

A backbone from files of one's own is looked for from the folder in which the server is started.

Input: a column `image`, each the bytes of an image file in base64, or the name of a file in the folder that the
operator names for that. What a request may cost is in `Limits`, and is known before an image is decoded.
Output, a row per image: `label`, its `probability`, and the `top` likeliest `labels` with their `probabilities`.
An error is one line, in `message`.
"""

import base64
import binascii
import io
import json
import logging
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel
from PIL import Image

import heba
from heba.clip.preprocess import UNREADABLE, DeepImage, LongImage, resize_and_crop, to_rgb

# Not TIFF: a small file of it may ask for tiles of any size.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "WEBP")
# Each scan of a JPEG goes through all of its pixels and may have 75 bytes. Progressive JPEGs have about ten.
MAX_SCANS = 100


class Refused(MlflowException):
    """A request that gets no answer, and why, in one line. To a message of its own MLflow adds the request."""

    def __init__(self, reason: str, code: int = INVALID_PARAMETER_VALUE) -> None:
        super().__init__(reason, code)
        self.reason = " ".join(reason.split())

    def serialize_as_json(self) -> str:
        return json.dumps({"error_code": self.error_code, "message": self.reason})


@dataclass(frozen=True)
class Limits:
    """What a request may cost.

    Attributes:
        folder: whose files clients may name; None: of no folder.
        images: in a request.
        bytes: of an image's file.
        pixels: of an image. request_pixels: of all images of a request.
        decoders: threads that decode for all requests. Each takes up to 8 bytes a pixel of an image.
    """

    folder: Path | None
    images: int
    bytes: int
    pixels: int
    request_pixels: int
    decoders: int


def limits_of(environment: Mapping[str, str]) -> Limits:
    """The limits that the operator has set, or the usual ones; ValueError names a variable that is wrong."""

    def number(name: str, usual: int) -> int:
        text = environment.get(name, str(usual))
        if not (text.isdecimal() and int(text) > 0):
            raise ValueError(f"{name}: {text!r} must be a whole number from 1 on")
        return int(text)

    named = environment.get("HEBA_SERVE_IMAGES")
    folder = Path(os.path.abspath(named)) if named else None
    if folder is not None and not folder.is_dir():
        raise ValueError(f"HEBA_SERVE_IMAGES: {named!r} is no folder")
    return Limits(
        folder,
        images=number("HEBA_SERVE_MAX_IMAGES", 64),
        bytes=number("HEBA_SERVE_MAX_BYTES", 20_000_000),
        pixels=number("HEBA_SERVE_MAX_PIXELS", 50_000_000),
        request_pixels=number("HEBA_SERVE_MAX_REQUEST_PIXELS", 200_000_000),
        decoders=number("HEBA_SERVE_DECODERS", 2),
    )


class ServedAdapter(PythonModel):
    """A trained adapter, in the folder that is the artifact `adapter`. The server calls it in many threads."""

    def load_context(self, context: Any) -> None:
        self.limits = limits_of(os.environ)
        self.decoders = ThreadPoolExecutor(self.limits.decoders)
        self.classifier = heba.load(context.artifacts["adapter"])

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        try:
            return self._predict(list(model_input["image"]), int((params or {}).get("top", heba.TOP)))
        except Refused:
            raise
        except Exception:
            logging.getLogger("heba").exception("a request failed")
            raise Refused("this request failed in the server, whose log tells why", INTERNAL_ERROR) from None

    def _predict(self, texts: list[Any], top: int) -> pd.DataFrame:
        if top < 1:
            raise Refused(f"top must be a whole number from 1 on, not {top}")
        check_request(texts, self.limits)
        found = list(self.classifier.predict(self.decoders.map(self._small, range(len(texts)), texts), top))
        return pd.DataFrame(
            {
                "label": [p.classes[0] for p in found],
                "probability": [p.probabilities[0] for p in found],
                "labels": [p.classes for p in found],
                "probabilities": [p.probabilities for p in found],
            }
        )

    def _small(self, row: int, text: Any) -> Image.Image:
        """An image as the model takes it, so that no large one is kept."""
        image = open_image(text, row, self.limits)
        try:
            pixels = resize_and_crop(to_rgb(image, as_seen=True), self.classifier.preprocess)
        except (DeepImage, LongImage) as error:
            raise Refused(f"image {row}: {error}") from None
        except UNREADABLE:
            raise _no_image(row) from None
        return Image.fromarray(pixels.transpose(1, 2, 0))


def check_request(texts: list[Any], limits: Limits) -> None:
    """Refused where the images, by their headers, are more than the `limits` allow."""
    if len(texts) > limits.images:
        raise Refused(f"{len(texts)} images in a request, of which {limits.images} are allowed")
    pixels = 0
    for row, text in enumerate(texts):
        image = open_image(text, row, limits)
        pixels += image.width * image.height
        if pixels > limits.request_pixels:
            raise Refused(f"images 0 to {row} have {pixels} pixels; a request may have {limits.request_pixels}")


def open_image(text: Any, row: int, limits: Limits) -> Image.Image:
    """The image that `text` is or names, of which no more than the header is decoded."""
    content = _content(text, row, limits)
    if len(content) > limits.bytes:
        raise Refused(f"image {row}: more than the {limits.bytes} bytes that an image may have")
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError:
        raise _too_large(row, limits) from None
    except UNREADABLE:
        raise _no_image(row) from None
    if image.width * image.height > limits.pixels:
        raise _too_large(row, limits)
    if image.format in ("JPEG", "MPO") and content.count(b"\xff\xda") > MAX_SCANS:
        raise Refused(f"image {row}: a JPEG of more than {MAX_SCANS} scans")
    return image


def _content(text: Any, row: int, limits: Limits) -> bytes:
    """The bytes of an image's file, or more of them than the limit."""
    if not isinstance(text, str):
        raise _no_image(row)
    if "." not in text:  # base64 has no dot, and the name of an image's file has one
        if len(text) // 4 * 3 > limits.bytes + 3:
            return bytes(limits.bytes + 1)
        try:
            return base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            raise _no_image(row) from None
    if limits.folder is None:
        raise Refused(
            f"image {row}: a file's name, and this server has no folder of images (HEBA_SERVE_IMAGES); "
            "send the file in base64"
        )
    try:
        # By its name alone at first: nothing outside of the folder is looked for.
        path = Path(os.path.normpath(limits.folder / text))
        if path.is_relative_to(limits.folder):
            path = path.resolve(strict=True)
            if path.is_relative_to(limits.folder.resolve()) and path.is_file():
                with path.open("rb") as file:
                    return file.read(limits.bytes + 1)
    except (OSError, ValueError, RuntimeError):  # no such file, a name that no file can have, a loop of links
        pass
    raise Refused(f"image {row}: no file in this server's folder of images")


def _no_image(row: int) -> Refused:
    return Refused(f"image {row}: no image file in base64, or a damaged one; formats: {', '.join(FORMATS)}")


def _too_large(row: int, limits: Limits) -> Refused:
    return Refused(f"image {row}: more than the {limits.pixels} pixels that an image may have")


set_model(ServedAdapter())
