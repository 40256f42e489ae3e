"""A classifier as one ONNX file, for use where there is no torch: resizing, normalisation, the image tower with
what was trained in it, and the classifier. The text side is folded into the classifier's tensors.

input     images         uint8 [n, height, width, 3], RGB, of any size: Pillow's images as `numpy.asarray` has them
outputs   logits         float [n, n_classes]
          probabilities  float [n, n_classes], their softmax

The file's metadata has `classes` and `preprocess` (JSON), and of an adapter `method`, `backbone` and
`adapter_sha256`. Needs the extra `onnx`.
"""

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from heba import artifact, methods
from heba.clip.preprocess import Preprocess, normalise, resize_and_crop
from heba.files import new_file
from heba.predict import Classifier, load

OPSET = 18
MOST_BYTES = 2**31 - 1  # of a file of protobuf
TOLERANCE = 1e-4  # of the logits, relative to the largest where that is more than 1
EXTRA = "pip install '.[onnx]' in the repository"
BITS = 2**22  # Pillow's weights are whole multiples of 1 / BITS


@dataclass(frozen=True)
class Export:
    """An ONNX file that was written.

    Attributes:
        path, bytes: the file, and its size.
        difference: the largest of the file's logits from torch's, as `TOLERANCE` counts; None where onnxruntime,
            which would tell, is not installed.
    """

    path: Path
    bytes: int
    difference: float | None


def export_onnx(
    adapter: Path | str,
    path: Path | str,
    force: bool = False,
    root: Path | str = Path(),
    name: str | None = None,
    pretrained: str | None = None,
) -> Export:
    """Write the adapter in the folder `adapter` as the ONNX file `path`.

    Args:
        force: replace `path` where it exists.
        root, name, pretrained: of the backbone, as in `heba.load`.
    Raises:
        ValueError: what `heba.load` and `write_onnx` raise.
    """
    classifier = load(adapter, device="cpu", root=root, name=name, pretrained=pretrained)
    return write_onnx(classifier, path, force, artifact.sha256(Path(adapter)))


def write_onnx(
    classifier: Classifier, path: Path | str, force: bool = False, adapter_sha256: str | None = None
) -> Export:
    """Write `classifier`, which is on the CPU, as the ONNX file `path`; where onnxruntime is installed, not before
    it gives the logits that torch gives.

    Raises:
        ValueError: `path` exists and `force` is not set; a package is missing; the method makes texts of its own
            for each image; the file would be larger than protobuf's 2 GB; its logits are not torch's.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file in it")
    if path.exists() and not force:
        raise ValueError(f"{path} exists already; name another file, or replace it with `force` (--force)")
    _check(classifier)
    proto = _proto(classifier)
    _describe(proto, classifier, adapter_sha256)
    if proto.ByteSize() > MOST_BYTES:
        raise ValueError(
            f"{path}: {proto.ByteSize() / 1e9:.1f} GB, and an ONNX file of its own holds 2.1 GB; take a smaller "
            "backbone"
        )
    difference = None
    with new_file(path) as new:
        new.write_bytes(proto.SerializeToString())
        if find_spec("onnxruntime"):
            difference = largest_difference(classifier, new)
            if not difference <= TOLERANCE:
                raise ValueError(
                    f"{path}: not written, since its logits differ from torch's by {difference:.1e}, and may by "
                    f"{TOLERANCE:.0e}; try other versions of torch and onnxscript"
                )
    return Export(path, path.stat().st_size, difference)


def _check(classifier: Classifier) -> None:
    missing = [package for package in ("onnx", "onnxscript") if not find_spec(package)]
    if missing:
        raise ValueError(f"the package {' and '.join(missing)} is missing; {EXTRA}")
    if classifier.device.type != "cpu":
        raise ValueError("load the classifier with device='cpu'; an ONNX file is written from there")
    if classifier.config is None:
        return
    about, n = methods.part(classifier.config.method, "settings"), len(classifier.classes)
    if about.work(classifier.config.method_settings(), n, n).tested:
        raise ValueError(
            f"{about.TITLE} makes texts of its own for each image, which its file would need the text tower for; "
            "only methods whose classes are the same for all images are exported"
        )


class _Whole(nn.Module):
    """Images [n, height, width, 3] uint8 to logits and probabilities."""

    def __init__(self, logits: Callable[[Tensor], Tensor], preprocess: Preprocess) -> None:
        super().__init__()
        # A function, not the model: torch.export puts proxies in the place of submodules, whose type is another.
        self.logits, self.preprocess = logits, preprocess

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logits(normalise(resize(images, self.preprocess), self.preprocess))
        return logits, logits.softmax(dim=-1)


def _proto(classifier: Classifier) -> Any:
    """The onnx.ModelProto of a classifier."""
    size = classifier.preprocess.size
    example = torch.zeros(2, size + 8, size + 24, 3, dtype=torch.uint8)
    dims = {i: torch.export.Dim(name) for i, name in enumerate(("n", "height", "width"))}
    whole = _Whole(classifier.logits, classifier.preprocess).eval()
    with torch.no_grad(), _quiet():
        program = torch.export.export(whole, (example,), dynamic_shapes={"images": dims}, strict=False)
        found = torch.onnx.export(
            program,
            (example,),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["logits", "probabilities"],
            opset_version=OPSET,
        )
    assert found is not None
    return found.model_proto


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch and onnxscript tell their developers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _describe(proto: Any, classifier: Classifier, adapter_sha256: str | None) -> None:
    """Write the metadata, and the names of the dimensions."""
    import onnx

    config = classifier.config
    metadata = {
        "classes": json.dumps(classifier.classes, ensure_ascii=False),
        "preprocess": json.dumps(asdict(classifier.preprocess)),
    }
    if config is not None:
        metadata |= {"method": config.method, "backbone": f"{config.backbone.name}, {config.backbone.pretrained}"}
    if adapter_sha256 is not None:
        metadata["adapter_sha256"] = adapter_sha256
    onnx.helper.set_model_props(proto, metadata)
    proto.producer_name = "heba"
    proto.doc_string = (__doc__ or "").partition("\n\n")[2]
    del proto.graph.value_info[:]  # of the inner tensors; their dimensions have names of torch's
    for value, names in (
        (proto.graph.input[0], ("n", "height", "width")),
        *((output, ("n",)) for output in proto.graph.output),
    ):
        for dim, name in zip(value.type.tensor_type.shape.dim, names, strict=False):
            dim.dim_param = name


@torch.no_grad()
def largest_difference(classifier: Classifier, path: Path) -> float:
    """The largest difference of the file's logits from those of `classifier`, relative to the largest logit where
    that is more than 1, on images of noise of the model's size, larger ones, and smaller ones."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    size, found = classifier.preprocess.size, 0.0
    for n, height, width in ((3, size, size), (2, size + 20, 2 * size), (1, size // 2, size // 2 + 3)):
        images = np.random.default_rng(n).integers(0, 256, (n, height, width, 3), dtype=np.uint8)
        pixels = np.stack([resize_and_crop(Image.fromarray(image), classifier.preprocess) for image in images])
        expected = classifier.logits(normalise(torch.from_numpy(pixels), classifier.preprocess)).numpy()
        difference = np.abs(session.run(["logits"], {"images": images})[0] - expected).max()
        found = max(found, float(difference) / max(1.0, float(np.abs(expected).max())))
    return found


def resize(images: Tensor, preprocess: Preprocess) -> Tensor:
    """`heba.clip.preprocess.resize_and_crop`, level for level, of `images` [n, height, width, 3] uint8: to
    [n, 3, size, size] of whole numbers in 0..255, in double precision.

    Pillow's algorithm: the weights of each output pixel, rounded to multiples of 1 / BITS, along the rows and then
    along the columns, with whole levels in between. Pillow 13 takes the columns first where most of the shrinking
    is theirs; earlier ones never do, which changes some levels of tall images by one.
    """
    _, height, width, _ = images.shape
    size = preprocess.size
    new_height: Any = size
    new_width: Any = size
    if preprocess.resize_mode == "shortest":
        shorter = torch.sym_min(height, width)
        new_height, new_width = size * height // shorter, size * width // shorter
    across = _weights(width, new_width, preprocess)
    down = _weights(height, new_height, preprocess).T
    columns_first = height - new_height > 2 * torch.sym_max(width - new_width, 0)
    planes = images.permute(0, 3, 1, 2)
    # A branch in the file, taken by each image's size.
    return torch.cond(columns_first, _columns_first, _rows_first, (planes, across, down))


def _rows_first(planes: Tensor, across: Tensor, down: Tensor) -> Tensor:
    return _levels(down @ _levels(planes.double() @ across))


def _columns_first(planes: Tensor, across: Tensor, down: Tensor) -> Tensor:
    return _levels(_levels(down @ planes.double()) @ across)


def _levels(sums: Tensor) -> Tensor:
    return (sums + 0.5).floor().clamp(0, 255)


def _weights(length: Any, new_length: Any, preprocess: Preprocess) -> Tensor:
    """[length, size], what each pixel of a side counts for those in the centre of the resized side."""
    kernel, reach = (_cubic, 2) if preprocess.interpolation == "bicubic" else (_linear, 1)
    beyond = new_length - preprocess.size
    first = beyond // 2 + beyond % 2 * (beyond // 2 % 2)  # the half, rounded as Python rounds
    old, new = (torch.scalar_tensor(side, dtype=torch.float64) for side in (length, new_length))
    scale = old / new
    wide = scale.clamp(min=1)
    centre = (torch.arange(preprocess.size, dtype=torch.float64) + first + 0.5) * scale
    taps = torch.arange(length, dtype=torch.float64)[:, None]
    inside = (taps >= (centre - reach * wide + 0.5).floor()) & (taps < (centre + reach * wide + 0.5).floor())
    weights = kernel(((taps - centre + 0.5) * (1 / wide)).abs()) * inside
    weights = weights / weights.sum(dim=0)
    return weights.sign() * (weights.abs() * BITS + 0.5).floor() / BITS


def _cubic(x: Tensor) -> Tensor:
    near = ((1.5 * x - 2.5) * x) * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _linear(x: Tensor) -> Tensor:
    return (1 - x).clamp(min=0)
