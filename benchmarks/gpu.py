"""`python -m benchmarks.gpu --out FOLDER`: all that is to be known of a GPU, in one call and a given time.

Correctness first, then speed, memory and a profile. Each part is a process of its own with a limit; what it has
found is written at once, so that being cut off loses nothing but the rows of `oracle`, which pytest tells last:

    FOLDER/README.md        all tables
    FOLDER/<part>.json      a part's rows, and what went wrong
    FOLDER/speed.json       what `python -m pipeline cost --speed` reads
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any
from xml.etree import ElementTree

import pandas as pd
import torch
import typer

from benchmarks import images, step, text
from heba import methods
from heba.fit.run import Run

ROOT = Path(__file__).parents[1]
B16, L14, TINY = "ViT-B-16-quickgelu", "ViT-L-14-quickgelu", "tiny"
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}  # of losses, relative
Row = dict[str, Any]


class Part:
    """What a part finds: rows, each written as it comes."""

    def __init__(self, out: Path, name: str, device: str, tiny: bool) -> None:
        self.path, self.device, self.tiny = out / f"{name}.json", device, tiny
        self.rows: list[Row] = []

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.rows, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.path)

    def attempt(self, work: Callable[[], Row], **about: Any) -> None:
        """Add the row that `work` finds, or why it found none."""
        try:
            found = work()
        except (Exception, SystemExit) as error:
            print(traceback.format_exc(), file=sys.stderr)
            found = {"ok": False, "error": " ".join(str(error).split())[:300]}
        self.add(**about, **found)


def oracle(part: Part) -> None:
    """The numbers of the official codes, in fp32 without TF32, to 1e-4."""
    report = part.path.with_name("oracle.xml")
    which = ["tests/oracle/test_oracle.py", "-k", "gradients"] if part.tiny else ["tests/oracle"]
    more = ["-n", "6", "--dist", "loadfile"] if importlib.util.find_spec("xdist") and not part.tiny else []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", *more, *which]
    env = os.environ | {"HEBA_TEST_DEVICE": part.device}
    report.unlink(missing_ok=True)  # of an earlier call
    done = subprocess.run([*command, f"--junitxml={report}"], cwd=ROOT, env=env, check=False)
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    for case in cases:
        bad = [child for child in case if child.tag in ("failure", "error")]
        if bad:
            name = f"{case.get('classname', '').rpartition('.')[2]}: {case.get('name')}"
            part.add(test=name, ok=False, error=(bad[0].get("message") or "")[:300])
    failed, skipped = len(part.rows), sum(any(child.tag == "skipped" for child in case) for case in cases)
    part.add(
        test="all",
        ok=not failed and done.returncode == 0,
        passed=len(cases) - failed - skipped,
        failed=failed,
        skipped=skipped,
    )


def losses(name: str, folder: Path, device: str, epochs: int = 2, **run: Any) -> tuple[list[float], bytes]:
    """The losses of the epochs of a small training, and what it has trained."""
    from heba.clip.device import in_bf16
    from tests.heba.test_methods import N_CLASSES, SHOTS, Data, settings_of

    data, method, settings = Data(folder), methods.part(name, "method"), settings_of(name)
    short = {key: epochs for key in ("epochs", "epochs_few") if hasattr(settings, key)}
    settings = settings.model_copy(
        update=short | ({"steps_per_shot": 2} if hasattr(settings, "steps_per_shot") else {})
    )
    data.clip.to(device)
    if run.get("bf16"):
        in_bf16(data.clip)
    records: list[dict[str, float]] = []
    model = method.build(data.clip, N_CLASSES, settings, seed=1)
    method.fit(
        model,
        data.train,
        data.val,
        data.classes,
        settings,
        Run(seed=1, shots=SHOTS, on_epoch=records.append, **run),
    )
    trained = method.trained(model).state_dict()
    return [r["loss"] for r in records], b"".join(t.detach().cpu().numpy().tobytes() for t in trained.values())


def compared(one: list[float], other: list[float], precision: str) -> Row:
    far = max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True))
    return {"ok": far <= TOLERANCE[precision], "losses": one, "others": other, "relative": far}


def in_towers() -> list[str]:
    from tests.heba.test_methods import NAMES
    from tests.heba.test_methods import in_towers as goes_in

    return [name for name in NAMES if goes_in(name)]


def steps(part: Part) -> None:
    """A short training of every method in the towers: in fp32 against the CPU, and in bf16 against fp32."""
    names = ["heba", "coop"] if part.tiny else in_towers()
    with tempfile.TemporaryDirectory() as folder:
        for name in names:

            def on_both(name: str = name) -> Row:
                # Dropout draws its masks where it is.
                drawn = "dropout" in methods.part(name, "settings").Settings.model_fields
                own, cpu = (losses(name, Path(folder), where)[0] for where in (part.device, "cpu"))
                return compared(own, cpu, "bf16" if drawn else "fp32")

            def in_both(name: str = name) -> Row:
                fast, whole = (losses(name, Path(folder), part.device, bf16=bf16)[0] for bf16 in (True, False))
                return compared(fast, whole, "bf16")

            if part.device != "cpu":
                part.attempt(on_both, method=name, what="fp32, GPU and CPU")
            part.attempt(in_both, method=name, what="bf16 and fp32")


def graphs(part: Part) -> None:
    """CUDA graphs against eager steps."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("heba", "lweib"):
            for precision in ("fp32", "bf16"):
                run = {"bf16": precision == "bf16", "epochs": 2 if part.tiny else 6}

                def work(name: str = name, run: Row = run, precision: str = precision) -> Row:
                    eager = losses(name, Path(folder), part.device, **run)[0]
                    # On a CPU the same shapes without a graph.
                    return compared(
                        losses(name, Path(folder), part.device, cuda_graphs=True, **run)[0], eager, precision
                    )

                part.attempt(work, method=name, precision=precision)


def deterministic(part: Part) -> None:
    """`deterministic: true` twice: the same bytes."""
    from tests.heba.test_methods import NAMES

    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
    names = ["heba", "clip_lora"] if part.tiny else NAMES
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            for run in ({"bf16": True}, {"bf16": True, "cuda_graphs": True}):
                if len(run) > 1 and name not in ("heba", "lweib"):
                    continue

                def work(name: str = name, run: Row = run) -> Row:
                    one, other = (losses(name, Path(folder), part.device, **run)[1] for _ in range(2))
                    return {"ok": one == other, "bytes": len(one)}

                part.attempt(work, method=name, cuda_graphs=len(run) > 1)


def ways(part: Part, results: dict[str, Row], count: int, unit: str, **about: Any) -> None:
    """Add a row for each of `results` (`benchmarks.common.in_turn`)."""
    for name, result in results.items():
        seconds = median(result["seconds"])
        row = {"way": name, "ms": 1e3 * seconds, f"{unit}/s": count / seconds, "ratio": result["ratio"]}
        part.add(**about, **row, peak_gb=result["peak"])


def training(part: Part) -> None:
    """A training step: the official way in fp16, ours in bf16, and as a CUDA graph."""
    fast = part.device == "cuda"
    sizes = [(B16, 16, 50), (B16, 16, 96), (B16, 4, 50), (B16, 32, 50), (L14, 16, 50)]
    for backbone, n, classes in [(TINY, 4, 5)] if part.tiny else sizes:

        def work(backbone: str = backbone, n: int = n, classes: int = classes) -> Row:
            plain, own = ("fp16", "bf16") if fast else ("fp32", "fp32")
            found, flops = step.measure(
                part.device, own, plain, backbone, n, classes, 10 if fast else 1, graphs=True
            )
            ways(part, found, n, "images", backbone=backbone, images=n, classes=classes, tflop=flops / 1e12)
            return {"ok": True}

        part.attempt(work, backbone=backbone, images=n, classes=classes)


def evaluation(part: Part) -> None:
    """Test images, the official way from the files and ours from the packed images; and the texts of classes."""
    fast = part.device == "cuda"
    precision, rounds = ("bf16", 3) if fast else ("fp32", 1)
    n, workers = (2048, 8) if fast and not part.tiny else (4, 0)
    classes, prompts = (50, 20) if fast and not part.tiny else (2, 2)
    for backbone in [TINY] if part.tiny else [B16, L14]:

        def pictures(backbone: str = backbone) -> Row:
            found = images.measure(part.device, precision, backbone, n, 0, workers, rounds)
            ways(part, found, n, "images", what="test images", backbone=backbone)
            return {"ok": True}

        def sentences(backbone: str = backbone) -> Row:
            found = text.measure(part.device, precision, backbone, classes, prompts, rounds)
            ways(part, found, classes * prompts, "prompts", what="texts of classes", backbone=backbone)
            return {"ok": True}

        part.attempt(pictures, what="test images", backbone=backbone)
        part.attempt(sentences, what="texts of classes", backbone=backbone)


def profile(part: Part) -> None:
    """A step's time by kernel, its launches, and how long the GPU had nothing to do."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    fast, n = part.device == "cuda", 1 if part.tiny else 10
    shape = (TINY, 4, 5) if part.tiny else (B16, 16, 50)
    activities = [ProfilerActivity.CUDA if fast else ProfilerActivity.CPU]
    model, pixels, _, bank, one = step.prepare(part.device, *shape)
    for way, take in step.ways_of_ours(model, pixels, bank, one, bf16=fast).items():

        def work(way: str = way, take: Callable[[], object] = take) -> Row:
            for _ in range(3):
                take()
            if fast:
                torch.cuda.synchronize()
            begin = time.perf_counter()
            with torch.profiler.profile(activities=activities) as found:
                for _ in range(n):
                    take()
                if fast:
                    torch.cuda.synchronize()
            wall = time.perf_counter() - begin
            # Of a GPU its kernels and copies alone, without the calls that launch them.
            events = [e for e in found.key_averages() if not fast or e.device_type == DeviceType.CUDA]
            own = {e.key: e.self_device_time_total if fast else e.self_cpu_time_total for e in events}
            busy = sum(own.values()) / 1e6
            for event in sorted(events, key=lambda e: -own[e.key])[:25]:
                share = own[event.key] / 1e6 / busy
                part.add(
                    way=way,
                    kernel=event.key[:100],
                    calls=event.count / n,
                    ms=own[event.key] / 1e3 / n,
                    share=share,
                )
            launches = sum(e.count for e in events) / n
            return {"ms": 1e3 * wall / n, "busy_ms": 1e3 * busy / n, "launches": launches, "idle": 1 - busy / wall}

        part.attempt(work, way=way)


def suite(part: Part) -> None:
    """The DAG of the embedded suite with `--gpus 0`, in a clone of this repository."""
    missing = [name for name in ("dvc", "mlflow") if importlib.util.find_spec(name) is None]
    if missing:
        part.add(ok=None, error=f"{' and '.join(missing)} not installed")
        return
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        more = ["--gpus", "0"] if part.device == "cuda" else []
        command = [sys.executable, "-m", "pipeline", *(["waves"] if part.tiny else ["repro", *more])]
        begin = time.perf_counter()
        done = subprocess.run(command, cwd=clone, env=os.environ | {"PYTHONPATH": str(clone)}, check=False)
        part.add(ok=done.returncode == 0, command=" ".join(command[1:]), seconds=time.perf_counter() - begin)
        for name in ("README.md", "cost.md"):
            page = clone / "reports" / name
            if page.is_file() and done.returncode == 0:
                shutil.copy(page, part.path.with_name(f"suite-{name}"))


# In this order; each gets at most its share of the whole time.
PARTS: dict[str, tuple[Callable[[Part], None], float]] = {
    "steps": (steps, 0.15),
    "oracle": (oracle, 0.35),
    "graphs": (graphs, 0.1),
    "deterministic": (deterministic, 0.15),
    "training": (training, 0.3),
    "profile": (profile, 0.15),
    "evaluation": (evaluation, 0.2),
    "suite": (suite, 1.0),
}


def speed(rows: list[Row], device: str) -> Row | None:
    """Throughput and overhead of a step, by least squares over our fastest way at each size of ViT-B/16."""
    best: dict[tuple[int, int], tuple[float, float]] = {}
    for row in rows:
        if row.get("backbone") == B16 and row.get("way", "").startswith("ours"):
            key, found = (row["images"], row["classes"]), (row["tflop"], row["ms"] / 1e3)
            best[key] = min(best.get(key, found), found, key=lambda pair: pair[1])
    if len(best) < 2:
        return None
    work, seconds = zip(*best.values(), strict=True)
    n, mean_work, mean_seconds = len(best), sum(work) / len(best), sum(seconds) / len(best)
    slope = sum((w - mean_work) * (s - mean_seconds) for w, s in best.values())
    slope /= sum((w - mean_work) ** 2 for w in work)
    slope = max(slope, 1e-6)
    overhead = max(0.0, mean_seconds - slope * mean_work)
    return {"device": device, "tflops": 1 / slope, "overhead_ms": 1e3 * overhead, "sizes": n}


def page(out: Path, notes: dict[str, str], device: str) -> None:
    """Write README.md from what the parts have found until now, and speed.json."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    lines = [f"# {name}, torch {torch.__version__}\n"]
    for part, note in notes.items():
        doc = PARTS[part][0].__doc__ or ""
        lines.append(f"## {part}\n\n{doc}\n\n{note}\n")
        file = out / f"{part}.json"
        if file.is_file():
            rows = pd.DataFrame(json.loads(file.read_text(encoding="utf-8")))
            lines.append(rows.map(shown).to_markdown(index=False, disable_numparse=True) + "\n")
    (out / "README.md").write_text("\n".join(lines), encoding="utf-8")
    file = out / "training.json"
    found = speed(json.loads(file.read_text(encoding="utf-8")), name) if file.is_file() else None
    if found:
        (out / "speed.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(f"{x:.5g}" for x in value)
    if value is None or value != value:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else re.sub(r"\|", "/", str(value))


def run_part(name: str, out: Path, device: str, tiny: bool, limit: float) -> str:
    """Run a part in a process of its own; returns how it went."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(out), "--part", name, "--device", device]
    begin, log = time.perf_counter(), out / f"{name}.log"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command + ["--tiny"] * tiny, stdout=file, stderr=file, cwd=ROOT, env=env, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # with what it has started
            process.wait()
            return f"cut off after {limit:.0f} s; what was found until then:"
        except BaseException:  # ctrl-C, which the part's own session does not get
            os.killpg(process.pid, 9)
            raise
    seconds = time.perf_counter() - begin
    if code:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        return f"failed after {seconds:.0f} s: {' '.join(last)[:300]}"
    return f"{seconds:.0f} s"


def main(
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    minutes: Annotated[float, typer.Option(min=0.1, help="For all parts together.")] = 8.0,
    parts: Annotated[str, typer.Option(help=f"Of {','.join(PARTS)}; empty: all.")] = "",
    device: Annotated[str, typer.Option(help="cuda, or cpu to try it.")] = "cuda",
    tiny: Annotated[bool, typer.Option("--tiny", help="A tiny CLIP and few images: does it run?")] = False,
    part: Annotated[str, typer.Option(help="This one alone, in this process, without a limit.")] = "",
) -> None:
    """Check and measure HeBA on a GPU."""
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if part:
        if part not in PARTS:
            raise typer.BadParameter(f"--part: {part}; there are {', '.join(PARTS)}")
        PARTS[part][0](Part(out, part, device, tiny))
        return
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("torch finds no GPU; --device cpu --tiny tries it without one")
    wanted = [name.strip() for name in parts.split(",")] if parts else list(PARTS)
    unknown = sorted(set(wanted) - set(PARTS))
    if unknown:
        raise typer.BadParameter(f"--parts: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    for name in wanted:
        (out / f"{name}.json").unlink(missing_ok=True)
    (out / "speed.json").unlink(missing_ok=True)
    end, notes = time.monotonic() + 60 * minutes, {}
    for name in wanted:
        left = end - time.monotonic()
        if left < 1:
            notes[name] = "not begun: no time was left"
        else:
            print(f"{name} ...", file=sys.stderr, flush=True)
            notes[name] = run_part(name, out, device, tiny, min(left, 60 * minutes * PARTS[name][1]))
        print(f"{name}: {notes[name]}", file=sys.stderr, flush=True)
        page(out, notes, device)
    print((out / "README.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    typer.run(main)
