"""`python -m pipeline repro --jobs N`: `dvc repro` with the DAG's independent stages side by side.

DVC runs one stage at a time. Here N `dvc repro --single-item` run next to each other, each over some stages whose
dependencies are done; `--wait-for-lock` keeps dvc.lock whole. A plain `dvc repro` at the end finds nothing to do.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from pipeline.params import Params
from pipeline.warm import stage_server

MOST_JOBS = 4  # by default: a process takes about 1 GB
LONGEST_BATCH = 16
DVC = [sys.executable, "-m", "dvc", "--wait-for-lock"]


class StageError(ValueError):
    """Stages that failed."""


def default_jobs(params: Params) -> int:
    """As many processes as there are CPUs for their threads; one where a stage takes all CPUs or a GPU."""
    return max(1, min(MOST_JOBS, (os.cpu_count() or 1) // params.threads)) if params.threads else 1


def to_run(root: Path) -> dict[str, set[str]]:
    """The stages that changed and all that depend on them, each with those of them that it depends on itself."""
    import networkx as nx
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        graph = nx.relabel_nodes(repo.index.graph, lambda stage: stage.addressing)  # edges to dependencies
        changed = set(repo.status()) & set(graph)
        stages = changed.union(*(nx.ancestors(graph, stage) for stage in changed))
        return {stage: set(graph.successors(stage)) & stages for stage in stages}


def next_batch(needs: dict[str, set[str]], waiting: set[str], done: set[str], jobs: int) -> list[str]:
    """Take from `waiting` some stages that can run one after the other: DVC takes seconds to start.

    Each follows on those before it where it can, so that a data set's stages go to one process. Fewer at a time
    towards the end, so that all processes end together.
    """
    size = max(1, min(LONGEST_BATCH, len(waiting) // (2 * jobs)))
    batch: list[str] = []
    while len(batch) < size:
        ready = [stage for stage in sorted(waiting) if needs[stage] <= done.union(batch)]
        if not ready:
            break
        stage = max(ready, key=lambda s: len(needs[s].intersection(batch)))
        waiting.remove(stage)
        batch.append(stage)
    return batch


def run(root: Path, jobs: int) -> None:
    """Run what is to be run; raises StageError with the stages that failed and those that were not reached."""
    with stage_server(root) as environment:
        _run(root, jobs, os.environ | environment)


def _run(root: Path, jobs: int, environment: Mapping[str, str]) -> None:
    needs = to_run(root)
    waiting = set(needs)
    total, began, ran = len(needs), time.monotonic(), 0
    done: set[str] = set()
    failed: set[str] = set()
    processes: set[subprocess.Popen] = set()

    def ended(stage: str, since: float, how: str = "took") -> None:
        nonlocal ran
        if stage:
            ran += 1
            say(f"{stage} {how} {time.monotonic() - since:.1f} s")

    def work(batch: list[str]) -> tuple[list[str], str]:
        """Reproduce `batch` in one process of DVC; returns it with the stage that failed, where it stopped."""
        command = [*DVC, "repro", "--single-item", *batch]
        process = subprocess.Popen(
            command,
            cwd=root,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        processes.add(process)
        output, running, since = [], "", 0.0
        assert process.stdout is not None
        for line in process.stdout:
            output.append(line)
            if found := re.match(r"Running stage '(.+)':", line):
                ended(running, since)
                running, since = found[1], time.monotonic()
        code = process.wait()
        ended(running, since, "failed after" if code else "took")
        processes.discard(process)
        if code == 0:
            return batch, ""
        print("".join(output), file=sys.stderr)
        found = re.search(r"failed to reproduce '([^']+)'", "".join(output))
        return batch, found[1] if found and found[1] in batch else batch[0]

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:4.0f} s, {ran} of {total}] {text}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        running: set[Future] = set()
        try:
            while waiting or running:
                while len(running) < jobs and (batch := next_batch(needs, waiting, done, jobs)):
                    running.add(pool.submit(work, batch))
                if not running:
                    break  # what is left depends on a stage that failed
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    batch, bad = future.result()
                    whole = batch.index(bad) if bad else len(batch)
                    done |= set(batch[:whole])
                    failed |= set(batch[whole : whole + 1])
                    waiting |= set(batch[whole + 1 :])
        except BaseException:
            for process in list(processes):
                process.send_signal(signal.SIGINT)
            raise
    if failed:
        left = f"; not reached: {', '.join(sorted(waiting))}" if waiting else ""
        raise StageError(f"failed: {', '.join(sorted(failed))}{left}. The output of each stands above.")
    subprocess.run([*DVC, "repro"], cwd=root, check=True, stdout=subprocess.DEVNULL)
    say("dvc repro is up to date")
