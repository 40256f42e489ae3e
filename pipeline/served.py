"""What MLflow runs to serve an adapter. MLflow copies this file into each model, so it knows nothing but heba.

A backbone from files of one's own is looked for from the folder in which the server is started.

Input: a column `image`, each a path on the server or the bytes of an image file in base64.
Output, a row per image: `label`, its `probability`, and the `top` likeliest `labels` with their `probabilities`.
"""

import base64
import binascii
import io
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel
from PIL import Image

import heba
from heba.images import UNREADABLE


class ServedAdapter(PythonModel):
    """A trained adapter, in the folder that is the artifact `adapter`."""

    def load_context(self, context: Any) -> None:
        self.classifier = heba.load(context.artifacts["adapter"])

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        images = [read_image(text, row) for row, text in enumerate(model_input["image"])]
        found = list(self.classifier.predict(images, int((params or {}).get("top", heba.TOP))))
        errors = [f"image {row}: {p.error}" for row, p in enumerate(found) if p.error]
        if errors:
            raise ValueError("; ".join(errors))
        return pd.DataFrame(
            {
                "label": [p.classes[0] for p in found],
                "probability": [p.probabilities[0] for p in found],
                "labels": [p.classes for p in found],
                "probabilities": [p.probabilities for p in found],
            }
        )


def read_image(text: str, row: int) -> Path | Image.Image:
    """The image that `text` is: a path, or base64."""
    if len(text) < 4096 and "\0" not in text and Path(text).is_file():
        return Path(text)
    try:
        return Image.open(io.BytesIO(base64.b64decode(text, validate=True)))
    except (binascii.Error, *UNREADABLE):
        raise ValueError(
            f"image {row}: {text[:60]!r} is neither a file of this machine nor an image in base64"
        ) from None


set_model(ServedAdapter())
