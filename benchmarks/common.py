"""What the benchmarks share: a model with random weights, prompts of real length, timing in turn, the table."""

import ctypes
import gc
import json
import logging
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from PIL import Image
from torch import Tensor

from heba.fit.memory import keep_freed_memory
from heba.methods.heba.model import AdaptedCLIP

PROMPT_LENGTHS = Path(__file__).with_name("prompt_lengths.json")
STATUS = Path("/proc/self/status")

Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Precision = Annotated[str, typer.Option(help="fp32, bf16 or fp16, the last two as autocast.")]
Backbone = Annotated[str, typer.Option(help="A model of open_clip; its weights are random.")]
Rounds = Annotated[int, typer.Option(min=1, help="How often each way is timed, in turn, after a warm-up.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes of the plain path's DataLoader; 0: none.")]
Classes = Annotated[int, typer.Option(min=2, help="Number of classes.")]


def tiny_clip(layers: int = 12) -> Any:
    """A narrow one, as deep as ViT-B/16."""
    import open_clip

    torch.manual_seed(0)
    return open_clip.CLIP(
        embed_dim=32,
        vision_cfg={"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": layers},
        text_cfg={"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": layers},
        quick_gelu=True,
    ).eval()


def make_clip(backbone: str, device: str) -> Any:
    """`backbone` with random weights; "tiny" is a `tiny_clip` of three blocks."""
    import open_clip

    if backbone == "tiny":
        return tiny_clip(3).to(device)

    logging.getLogger().setLevel(logging.ERROR)  # open_clip warns of random weights
    torch.manual_seed(0)
    return open_clip.create_model(backbone, load_weights=False, pretrained=None).to(device).eval()


def make_model(backbone: str, device: str, start: int = 1, end: int | None = None) -> AdaptedCLIP:
    """`backbone` with random weights and adapters in all blocks, or in `start` to `end`."""
    clip = make_clip(backbone, device)
    text = getattr(clip, "text", clip)
    deepest = min(len(text.transformer.resblocks), len(clip.visual.transformer.resblocks))
    return AdaptedCLIP(clip, start, end or deepest, 0.025).to(device).eval()


def prompt_tokens(model: AdaptedCLIP, n: int, generator: torch.Generator) -> Tensor:
    """Tokens [n, 77] of made-up prompts. Their lengths follow those of the 43,820 prompts of the eleven data sets
    (prompt_lengths.json: number of prompts by tokens, SOT and EOT included)."""
    histogram = json.loads(PROMPT_LENGTHS.read_text())
    weights = torch.tensor(list(histogram.values()), dtype=torch.float64)
    lengths = torch.tensor([int(k) for k in histogram])[torch.multinomial(weights, n, True, generator=generator)]
    text = getattr(model.clip, "text", model.clip)
    eot = text.token_embedding.num_embeddings - 1
    tokens = torch.randint(1, eot - 1, (n, text.context_length), generator=generator)
    tokens[:, 0] = eot - 1
    position = torch.arange(text.context_length)
    tokens[position == lengths[:, None] - 1] = eot
    tokens[position >= lengths[:, None]] = 0
    return tokens.to(model.clip.logit_scale.device)


def write_images(folder: Path, n: int) -> list[Path]:
    """`n` JPEG files of 500 x 375 pixels, smooth enough to be of a photograph's size."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    paths = [folder / f"{i:06d}.jpg" for i in range(n)]
    for path in paths:
        small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        small.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)
    return paths


def autocast(device: str, precision: str) -> torch.autocast:
    """The autocast of a precision; off for fp32."""
    if precision not in ("fp32", "bf16", "fp16"):
        raise typer.BadParameter(f"{precision!r} is not fp32, bf16 or fp16")
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device, dtype, enabled=precision != "fp32")


def check(name: str, difference: float, limit: float) -> None:
    """Stop when two ways do not give the same numbers; nothing is timed then."""
    print(f"{name}: largest difference {difference:.1e}", file=sys.stderr)
    if not difference <= limit:
        sys.exit(f"{name}: the ways differ by {difference:.1e}, more than {limit:.0e}")


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest value of `b`."""
    return ((a.float() - b.float()).abs().max() / b.float().abs().max().clamp_min(1e-12)).item()


def peak_reset(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif STATUS.exists():
        if platform.libc_ver()[0] == "glibc":
            ctypes.CDLL(None).malloc_trim(0)  # what the way before has kept is not this one's
        Path("/proc/self/clear_refs").write_text("5")


def peak_gb(device: str) -> float | None:
    """Largest memory since `peak_reset`: of the GPU's allocator, or of the whole process; None where unknown."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    if not STATUS.exists():
        return None
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9


def way(function: Callable[[], object], keep: bool = True) -> Callable[[], object]:
    """`function` with the allocator set as our stages set it, or as the system has it."""

    def run() -> None:
        keep_freed_memory(keep)
        function()

    return run


def in_turn(ways: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, dict[str, Any]]:
    """Time all `ways` `rounds` times, one after the other in each round, after a warm-up of each.

    Returns for each: `seconds` of every round, `ratio` to the first way (the median over the rounds, so that
    a machine that gets slower in between changes nothing), `peak` memory in GB.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    peak: dict[str, float | None] = {}
    for i in range(rounds + 1):
        for name, way in ways.items():
            peak_reset(device)
            if device == "cuda":
                torch.cuda.synchronize()
            begin = time.perf_counter()
            way()
            if device == "cuda":
                torch.cuda.synchronize()
            if i:
                seconds[name].append(time.perf_counter() - begin)
                peak[name] = peak_gb(device)
            print(f"round {i}: {name} {time.perf_counter() - begin:.3f} s", file=sys.stderr)
    first = seconds[next(iter(ways))]
    return {
        name: {
            "seconds": values,
            "ratio": statistics.median(a / b for a, b in zip(first, values, strict=True)),
            "peak": peak[name],
        }
        for name, values in seconds.items()
    }


def table(results: dict[str, dict[str, Any]], count: int, unit: str, device: str, title: str) -> str:
    """The results as Markdown: median time, `unit` per second, peak memory, ratio to the first way."""
    rows = []
    for name, result in results.items():
        median = statistics.median(result["seconds"])
        rows.append(
            {
                "": name,
                "time, ms": f"{1e3 * median:.1f}",
                f"{unit}/s": f"{count / median:.1f}",
                "peak, GB": "" if result["peak"] is None else f"{result['peak']:.2f}",
                "ratio": f"{result['ratio']:.2f}",
            }
        )
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    head = f"{title}; {name}, {platform.machine()}, torch {torch.__version__}"
    return head + "\n\n" + pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)
