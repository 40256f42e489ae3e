"""Stages as tasks of a Ray cluster over a shared file system, for `python -m pipeline repro --executor ray`.

A task runs the command that a local job runs. The repository, its data and DVC's cache lie under the same path on
all nodes, and so does the Python that runs this. Ray runs a task again whose node or worker died.
"""

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.core.params import Params, ParamsError
from pipeline.runner.dvc_locks import release
from pipeline.runner.processes import Child, Job, stop
from pipeline.runner.repro import NODE, Slot, Start

RETRIES = 3  # of a stage whose node or worker died
MOST_JOBS = 24  # by default: as many DVC processes share their lock files well


class RayError(ValueError):
    """Ray is not installed, or its cluster cannot be reached."""


class Task:
    """A job (pipeline.runner.processes.Job) that is a task of Ray."""

    def __init__(self, ray: Any, reference: Any, log: Path) -> None:
        self.ray, self.reference, self.log = ray, reference, log
        self.code: int | None = None

    def poll(self) -> int | None:
        if self.code is None and self.ray.wait([self.reference], timeout=0)[0]:
            try:
                self.code = self.ray.get(self.reference)
            except self.ray.exceptions.RayError as error:
                with self.log.open("a", encoding="utf-8") as file:
                    file.write(f"{error}\n")
                self.code = 1
        return self.code

    def interrupt(self) -> None:
        if self.poll() is None:
            self.ray.cancel(self.reference)

    def kill(self) -> None:
        if self.poll() is None:
            self.ray.cancel(self.reference, force=True)


def reproduce(root: Path, stages: list[str], log: Path, env: dict[str, str]) -> int:
    """The task: runs on a node, returns DVC's exit code."""
    import ray

    with log.open("a", encoding="utf-8") as file:
        file.write(f"{NODE}{ray.util.get_node_ip_address()}\n")
    release(root, stages)  # of the node that died before
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # Ray blocks it, which the child would inherit
    child = Child(root, stages, log, env)
    try:
        while (code := child.poll()) is None:
            time.sleep(0.1)
    finally:
        stop([child])
    return code


@contextmanager
def cluster(
    root: Path, params: Params, address: str, jobs: int | None, gpu_share: float
) -> Iterator[tuple[list[Slot], Start]]:
    """Connect to the cluster; gives the slots and what starts a job.

    A stage that reads the param `device` gets `gpu_share` GPUs where the cluster has any and `device` is not cpu.
    A stage gets `threads` of params.yaml as CPUs, by default its part of them. `jobs` is by default as many as the
    cluster has room for.
    """
    try:
        import ray
    except ModuleNotFoundError:
        raise RayError(
            "--executor ray: the package ray is missing; pip install -c constraints.txt -e '.[ray]'"
        ) from None
    try:
        host, _, port = address.rpartition(":")
        if port.isdecimal():  # Ray would try for minutes
            socket.create_connection((host.rpartition("/")[2], int(port)), timeout=10).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise RayError(
            f"--address {address}: no Ray cluster can be reached ({str(error).splitlines()[0]}); "
            "start one with `ray start --head` and give the address that it prints; if it asks for a token, set "
            "RAY_AUTH_MODE=token and have the token in ~/.ray/auth_token"
        ) from None
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        total = sum(int(node.get("CPU", 0)) for node in nodes)
        gpus = 0.0 if params.device == "cpu" else sum(node.get("GPU", 0.0) for node in nodes)
        if params.device == "cuda" and not gpus:
            raise ParamsError("device: cuda, but no node of the Ray cluster has a GPU; set it to auto or cpu")
        if gpus and gpu_share > max(node.get("GPU", 0.0) for node in nodes):
            raise ParamsError(f"--gpu-share {gpu_share:g}: no node of the Ray cluster has as many GPUs")
        if jobs is None:
            room = gpus / gpu_share if gpus else total / params.threads if params.threads else len(nodes)
            jobs = min(MOST_JOBS, int(room))
        jobs = max(1, jobs)
        most = max(int(node.get("CPU", 0)) for node in nodes)
        each = params.threads or max(1, min(total // jobs, most))
        if each > most:
            raise ParamsError(f"threads: {each}, but no node of the Ray cluster has more than {most} CPUs")
        if len(nodes) > 1 and not os.environ.get("MLFLOW_TRACKING_URI"):
            print(
                "warning: MLFLOW_TRACKING_URI is not set, and several nodes would write to one SQLite file, which "
                "a shared file system may damage; set it to an MLflow server's address",
                file=sys.stderr,
            )
        env = {key: value for key, value in os.environ.items() if key.startswith("MLFLOW_")}
        if params.threads is None:
            env["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(each))
        task = ray.remote(max_retries=RETRIES, num_cpus=each)(reproduce)

        def start(stages: list[str], gpu: bool, slot: Slot, log: Path) -> Job:
            options = task.options(num_gpus=gpu_share if gpu and gpus else 0, name=" ".join(stages))
            return Task(ray, options.remote(root, stages, log, slot.env), log)

        yield [Slot("", env)] * jobs, start
    finally:
        ray.shutdown()
