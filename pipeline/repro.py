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
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from pipeline.params import Params

MOST_JOBS = 4  # by default: a process takes about 1 GB
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


def run(root: Path, jobs: int) -> None:
    """Run what is to be run; raises StageError with the stages that failed and those that were not reached."""
    waiting = to_run(root)
    total, began, ran = len(waiting), time.monotonic(), 0
    done: set[str] = set()
    failed: set[str] = set()
    processes: set[subprocess.Popen] = set()

    def work(batch: list[str]) -> tuple[list[str], set[str]]:
        """Reproduce `batch` in one process of DVC; returns it with the stages that failed."""
        nonlocal ran
        command = [*DVC, "repro", "--single-item", "--keep-going", *batch]
        process = subprocess.Popen(
            command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        processes.add(process)
        output, running, since = [], "", 0.0
        assert process.stdout is not None
        for line in process.stdout:
            output.append(line)
            if found := re.match(r"Running stage '(.+)':", line):
                running, since = found[1], time.monotonic()
            elif "lock file 'dvc.lock'" in line and running:
                ran += 1
                say(f"{running} took {time.monotonic() - since:.1f} s")
                running = ""
        code = process.wait()
        processes.discard(process)
        bad = set(re.findall(r"failed to reproduce '([^']+)'", "".join(output))) & set(batch)
        if code and not bad:
            bad = set(batch)
        if bad:
            print("".join(output), file=sys.stderr)
        return batch, bad

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:4.0f} s, {ran} of {total}] {text}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        running: set[Future] = set()
        try:
            while waiting or running:
                ready = sorted(stage for stage, needs in waiting.items() if needs <= done)
                while ready and len(running) < jobs:
                    # Fewer at a time towards the end, so that all processes end together.
                    size = -(-len(ready) // (2 * jobs))
                    batch, ready = ready[:size], ready[size:]
                    for stage in batch:
                        del waiting[stage]
                    running.add(pool.submit(work, batch))
                if not running:
                    break  # what is left depends on a stage that failed
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    batch, bad = future.result()
                    done |= set(batch) - bad
                    failed |= bad
        except BaseException:
            for process in list(processes):
                process.send_signal(signal.SIGINT)
            raise
    if failed:
        left = f"; not reached: {', '.join(sorted(waiting))}" if waiting else ""
        raise StageError(f"failed: {', '.join(sorted(failed))}{left}. The output of each stands above.")
    subprocess.run([*DVC, "repro"], cwd=root, check=True, stdout=subprocess.DEVNULL)
    say("dvc repro is up to date")
