"""`python -m benchmarks.dvc_scale`: what DVC itself takes in DAGs of 83 to 1,300 stages, plain and ours.

The DAG is that of dvc.yaml. Its commands write a line into each out and no more.
"""

import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
import yaml

from pipeline.runner.dvc_files import LOCK
from pipeline.runner.dvc_inside import Plan, make_plan
from pipeline.runner.dvc_locks import SINGLE
from pipeline.runner.processes import DVC, Child, dvc
from pipeline.runner.repro import Slot, Start, run

ROOT = Path(__file__).parents[1]
PLAIN = [sys.executable, "-m", "dvc"]
DEFAULT = [18, 23, 50, 113]
FEW = 3  # stages that are timed at the full size of dvc.lock


def main(
    methods: Annotated[list[int], typer.Option(help="Numbers of methods of the paper preset.")] = DEFAULT,
) -> None:
    """CPU seconds for the demo preset, and for the paper preset with each number of methods."""
    rows = []
    for preset, count in [("demo", None), *(("paper", number) for number in methods)]:
        # DVC names stages as seen from there.
        with tempfile.TemporaryDirectory() as folder, chdir(folder):
            rows.append(measure(Path.cwd(), preset, count))
        print(rows[-1], file=sys.stderr)
    print(pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True))


def measure(root: Path, preset: str, count: int | None) -> dict[str, str]:
    """A row of the table."""
    make(root, preset, count)
    with redirect_stdout(sys.stderr):
        whole = cpu(lambda: run(root, [Slot("", {})], processes))
    plan = cpu(lambda: make_plan(root))
    again = cpu(lambda: dvc(["repro"], root))
    names = list(yaml.safe_load((root / LOCK).read_text(encoding="utf-8"))["stages"])
    stages = [name for name in names if name.startswith("train@")][-FEW - 1 :]

    def each(command: list[str]) -> float:
        """Seconds a stage: of some without those of one, so that what DVC takes once does not count."""

        def seconds(some: list[str]) -> float:
            done = [*command, *SINGLE, "--force", *some]
            return cpu(lambda: subprocess.run(done, cwd=root, check=True, capture_output=True))

        return (seconds(stages) - seconds(stages[:1])) / FEW

    plain, ours = each(PLAIN), each(DVC)
    return {
        "stages": f"{len(names):,}",
        "methods": preset if count is None else f"{preset}, {count}",
        "dvc.lock, kB": f"{(root / LOCK).stat().st_size / 1e3:.0f}",
        "a stage, plain": f"{plain:.2f}",
        "a stage, ours": f"{ours:.2f}",
        "all, plain (computed)": f"{plain * len(names) / 2:.0f}",
        "all, ours": f"{whole:.0f}",
        "of it the plan": f"{plan:.0f}",
        "and the last `dvc repro`": f"{again:.0f}",
    }


@contextmanager
def processes(plan: Plan) -> Iterator[Start]:
    """Jobs as processes, without the server for stages that import torch."""
    yield lambda stages, gpu, slot, log: Child(log.parents[2], stages, log, slot.env)


def cpu(work: Callable[[], object]) -> float:
    """CPU seconds of this process, and of those that it started and that have ended, during `work`."""

    def now() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(u.ru_utime + u.ru_stime for u in used)

    before = now()
    work()
    return now() - before


def make(root: Path, preset: str, count: int | None) -> None:
    """A repository with the DAG of dvc.yaml for a preset, or for as many made-up methods with HeBA's settings."""
    params = yaml.safe_load((ROOT / "pipeline" / "presets" / f"{preset}.yaml").read_text())
    if count is not None:
        params["methods"] = [f"method_{i}" for i in range(count)]
        params |= dict.fromkeys(params["methods"], params["heba"])
    Dumper.ignore_aliases = lambda *_: True  # type: ignore[method-assign]
    (root / "params.yaml").write_text(yaml.dump(params, Dumper=Dumper, sort_keys=False))
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    for stage in stages.values():
        body = stage.get("do", stage)
        body["cmd"] = " && ".join(map(writes, names(body, "outs", "metrics", "plots")))
        for dep in names(body, "deps"):
            for path in {dep.replace("${item.method}", method) for method in params["methods"]}:
                if not path.startswith("out/") and "$" not in path:
                    file = root / path if Path(path).suffix else root / path / "code.py"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_text(path)
    (root / "dvc.yaml").write_text(yaml.dump({"stages": stages}, Dumper=Dumper, sort_keys=False))
    for command in (["git", "init", "-q"], [*PLAIN, "init", "-q"]):
        subprocess.run(command, cwd=root, check=True)


class Dumper(yaml.SafeDumper):
    """Without anchors, which DVC would take over into dvc.lock."""


def names(stage: dict[str, Any], *keys: str) -> list[str]:
    """The paths that a stage lists under `keys`."""
    listed = [item for key in keys for item in stage.get(key, [])]
    return [item if isinstance(item, str) else next(iter(item)) for item in listed]


def writes(out: str) -> str:
    """A shell command that makes `out`, a file or a folder."""
    file = out if re.search(r"\.\w+$", out) else f"{out}/file"
    return f"mkdir -p $(dirname {file}) && echo {file} > {file}"


if __name__ == "__main__":
    typer.run(main)
