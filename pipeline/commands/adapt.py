"""`heba adapt photos/`: progress, the result as a table, and what to type next."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.commands.common import predict_command, shown

if TYPE_CHECKING:
    from heba.adaptation import Adaptation

MISTAKES = 3  # pairs of classes that are told
TINY = (
    "note: the tiny CLIP sees little and knows few words; for photographs take --backbone ViT-B-16-quickgelu "
    "--pretrained openai"
)


def run(
    folder: Path,
    method: str,
    shots: int,
    seed: int,
    backbone: str,
    pretrained: str,
    settings: Mapping[str, Any],
    out: Path,
    device: str | None,
    root: Path,
) -> None:
    """Adapt, and print the result. Arguments as in `heba.adapt`."""
    if backbone == "tiny":
        print(TINY, file=sys.stderr)
    from heba.adaptation import adapt

    found = adapt(folder, method, shots, seed, backbone, pretrained, settings, out, device, root, progress)
    print(text(found, predict_command(out, backbone, pretrained, root)))


@contextmanager
def progress(total: int, what: str) -> Iterator[Callable[[int], object]]:
    """A bar, shown when it takes over two seconds (`heba.fit.run.Run.progress`)."""
    from tqdm import tqdm

    with tqdm(total=total, desc=what, delay=2) as bar:
        yield bar.update


def text(found: "Adaptation", following: str) -> str:
    """The result as lines for a terminal, and the command that comes next."""
    low, high = found.interval
    rows = {
        "method": f"{found.method}, {found.shots} shots, seed {found.seed}",
        "images": f"{found.n_train} to train, {found.n_val} to choose values, {found.n_test} to test",
        "accuracy": f"{found.accuracy:.1f} %, between {low:.1f} and {high:.1f} % (95 %, of the test images alone)",
        "confuses": mistakes(found),
        "training": f"{found.seconds:.1f} s",
        "adapter": str(found.path),
        "next": following,
    }
    return shown("\n".join(f"{key + ':':<10} {value}" for key, value in rows.items()))


def mistakes(found: "Adaptation") -> str:
    """The classes that were taken for others most often."""
    names = found.classes
    pairs = [
        (n, f"{names[i]} for {names[j]} ({n})")
        for i, row in enumerate(found.confusion)
        for j, n in enumerate(row)
        if n and i != j
    ]
    worst = sorted(pairs, key=lambda pair: -pair[0])[:MISTAKES]
    return "takes " + ", ".join(pair for _, pair in worst) if worst else "nothing"
