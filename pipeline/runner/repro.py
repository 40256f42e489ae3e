"""`python -m pipeline repro`: `dvc repro` with the DAG's independent stages side by side.

DVC runs one stage at a time. Here several `dvc repro --single-item` run next to each other, each over some stages
whose dependencies are done; `--wait-for-lock` keeps dvc.lock whole. A plain `dvc repro` at the end finds nothing
to do. Where the processes run is the engine's business: this machine, or a cluster (ray_executor.py).
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

from pipeline.core.params import Params, ParamsError
from pipeline.runner import machine
from pipeline.runner.dvc_inside import WAIT, Plan, failed_stages, make_plan, stage_of_line
from pipeline.runner.locks import alone, ordered_lock
from pipeline.runner.processes import Child, Job, dvc, stop
from pipeline.runner.progress import Progress
from pipeline.runner.warm import stage_server

MOST_JOBS = 4  # by default: a process takes about 1 GB
LONGEST_BATCH = 16
NODE = "runs on node "  # before its address, in the log of a task on a cluster


class StageError(ValueError):
    """Stages that failed."""


class Slot(NamedTuple):
    """A place for one job at a time: its name for people, and what it adds to the environment."""

    where: str
    env: dict[str, str]


Start = Callable[[list[str], bool, Slot, Path], Job]  # stages, do they use a GPU, slot, log file
Engine = Callable[[Plan], AbstractContextManager[Start]]


def local_slots(params: Params, jobs: int | None, gpus: list[str]) -> list[Slot]:
    """One slot per job. Jobs go round the `gpus`, one each by default. Where params.yaml leaves the threads open,
    the CPUs are divided among the jobs, unless OMP_NUM_THREADS is set already.

    ParamsError when a GPU is not there, or not ours by CUDA_VISIBLE_DEVICES: torch would run on the CPU.
    """
    if gpus:
        _check_gpus(params, gpus)
        jobs = jobs or len(gpus)
        if jobs < len(gpus):
            raise ParamsError(f"--jobs {jobs}: fewer than the {len(gpus)} of --gpus, of which some would idle")
    if jobs is None:
        jobs = max(1, min(MOST_JOBS, machine.cpus() // params.threads)) if params.threads else 1
    env = {}
    if params.threads is None and jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
        env["OMP_NUM_THREADS"] = str(max(1, machine.cpus() // jobs))
    if not gpus:
        return [Slot("", env)] * jobs
    return [Slot(f"GPU {gpu}", env | {"CUDA_VISIBLE_DEVICES": gpu}) for gpu in (gpus * jobs)[:jobs]]


def _check_gpus(params: Params, gpus: list[str]) -> None:
    if params.device == "cpu":
        raise ParamsError("--gpus: device is cpu in params.yaml; set it to auto or cuda")
    there = machine.gpus()
    ours = os.environ.get("CUDA_VISIBLE_DEVICES")
    known = {name for gpu in there for name in (gpu.number, gpu.uuid)} if ours is None else set(ours.split(","))
    for gpu in gpus:
        if not there or gpu not in known:
            listed = ", ".join(gpu.number for gpu in there) if ours is None else f"{ours} by CUDA_VISIBLE_DEVICES"
            raise ParamsError(f"--gpus {gpu}: there is no such GPU here; there are {listed if there else 'none'}")
        if gpus.count(gpu) > 1:
            raise ParamsError(f"--gpus {gpu}: named twice; for more jobs per GPU, set --jobs")


@contextmanager
def start_local(root: Path, plan: Plan) -> Iterator[Start]:
    """Jobs as processes on this machine. Stages that read the param `device` import torch: where one is to run,
    all are forks of a process that has it."""
    environment = {} if plan.gpu.isdisjoint(plan.needs) else stage_server(root)
    yield lambda stages, gpu, slot, log: Child(root, stages, log, slot.env | environment)


def waves(plan: Plan) -> list[list[str]]:
    """The stages to run in waves: those of a wave need only what is in the waves before."""
    left, done, found = dict(plan.needs), set[str](), []
    while left:
        wave = [stage for stage in plan.order if stage in left and left[stage] <= done]
        found.append(wave)
        done.update(wave)
        for stage in wave:
            del left[stage]
    return found


def next_batch(
    needs: dict[str, set[str]], waiting: set[str], done: set[str], jobs: int, longest: int
) -> list[str]:
    """Take from `waiting` some stages that can run one after the other: DVC takes seconds to start.

    Each follows on those before it where it can, so that a data set's stages go to one process. Fewer at a time
    towards the end, so that all processes end together.
    """
    size = max(1, min(longest, len(waiting) // (2 * jobs)))
    batch: list[str] = []
    while len(batch) < size:
        ready = [stage for stage in sorted(waiting) if needs[stage] <= done.union(batch)]
        if not ready:
            break
        stage = max(ready, key=lambda s: len(needs[s].intersection(batch)))
        waiting.remove(stage)
        batch.append(stage)
    return batch


class Batch:
    """Stages that one job runs one after the other, and how far it is, by what DVC prints."""

    def __init__(self, stages: list[str], job: Job, log: Path, slot: Slot) -> None:
        self.stages, self.job, self.log, self.slot = stages, job, log, slot
        self.where, self.stage, self.rest = slot.where, "", ""
        self.output = log.open(encoding="utf-8", errors="replace")

    def follow(self, progress: Progress) -> None:
        """Pass to `progress` what was printed since the last call."""
        *lines, self.rest = (self.rest + self.output.read()).split("\n")
        for line in lines:
            if line.startswith(NODE):
                self.where = line.removeprefix(NODE)
            elif (said := stage_of_line(line)) and said[0] in self.stages:
                stage, fate = said
                if self.stage and self.stage != stage:
                    progress.ends(self.stage, "done")
                self.stage = "" if fate else stage
                if fate:
                    progress.ends(stage, fate)
                else:
                    progress.starts(stage, self.where)

    def ended(self, code: int, progress: Progress) -> str:
        """Record the end of a job with exit code `code`; returns the stage that failed, if one did."""
        self.follow(progress)
        self.output.close()
        bad = ""
        if code:
            text = self.log.read_text(encoding="utf-8", errors="replace")
            named = [stage for stage in failed_stages(text) if stage in self.stages]
            left = [stage for stage in self.stages if progress.state[stage] in ("waits", "runs")]
            bad = named[-1] if named else self.stage or next(iter(left), self.stages[-1])
        if self.stage and self.stage != bad:
            progress.ends(self.stage, "done")
        if bad:
            progress.ends(bad, "failed")
        if code:
            print(text, file=sys.stderr)
            return bad
        for stage in self.stages:
            if progress.state[stage] == "waits":  # the log of another machine may come late
                progress.ends(stage, "done")
        return ""


def run(root: Path, slots: list[Slot], engine: Engine, longest: int = LONGEST_BATCH) -> None:
    """Run what is to be run, at most `longest` stages in a job.

    Raises:
        StageError: with the stages that failed and those that were not reached.
        ValueError: with what DVC cannot read.
        KeyboardInterrupt: at ctrl-C or SIGTERM, when all that was started has ended.
    """
    # SIGINT too: in the background of a script it is ignored, and those whom we start would inherit that.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    with alone(root):
        plan = make_plan(root)
        with ordered_lock(root, plan.order), engine(plan) as start:
            failed, left = _run(root, plan, slots, start, longest)
            if failed:
                rest = f"; not reached: {', '.join(sorted(left))}" if left else ""
                raise StageError(f"failed: {', '.join(sorted(failed))}{rest}. The output of each stands above.")
        last = dvc([WAIT, "repro"], root)
        if last.returncode:
            raise StageError(f"the `dvc repro` that follows failed:\n{last.stdout}{last.stderr}")
        print("dvc repro is up to date")


def _run(root: Path, plan: Plan, slots: list[Slot], start: Start, longest: int) -> tuple[set[str], set[str]]:
    """Run the plan; returns the stages that failed and those that were not reached."""
    logs = root / ".heba" / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    waiting, done, failed = set(plan.needs), set[str](), set[str]()
    free, running = list(slots), list[Batch]()
    with Progress([stage for stage in plan.order if stage in plan.needs]) as progress:
        try:
            while True:
                while free and (stages := next_batch(plan.needs, waiting, done, len(slots), longest)):
                    log, slot = logs / f"{stages[0]}.log", free.pop(0)
                    log.write_bytes(b"")
                    running.append(
                        Batch(stages, start(stages, not plan.gpu.isdisjoint(stages), slot, log), log, slot)
                    )
                if not running:
                    break  # what waits depends on a stage that failed
                time.sleep(0.1)
                for batch in list(running):
                    code = batch.job.poll()
                    if code is None:
                        batch.follow(progress)
                        continue
                    running.remove(batch)
                    free.append(batch.slot)
                    bad = batch.ended(code, progress)
                    whole = batch.stages.index(bad) if bad else len(batch.stages)
                    done |= set(batch.stages[:whole])
                    failed |= set(batch.stages[whole : whole + 1])
                    waiting |= set(batch.stages[whole + 1 :])
        finally:
            stop([batch.job for batch in running])
            for batch in running:
                batch.follow(progress)
                batch.output.close()
                if batch.stage:
                    progress.ends(batch.stage, "interrupted")
        for stage in sorted(waiting):
            progress.ends(stage, "not reached")
    return failed, waiting
