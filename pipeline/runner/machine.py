"""The CPUs and GPUs that this process may use."""

import os
import subprocess
from typing import NamedTuple


class Gpu(NamedTuple):
    number: str
    uuid: str
    name: str


def cpus() -> int:
    """CPUs of the affinity mask, which schedulers such as Slurm set, where the system has one."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus() -> list[Gpu]:
    """What nvidia-smi lists; nothing where it is missing or fails."""
    command = ["nvidia-smi", "--query-gpu=index,uuid,name", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [
        Gpu(*(part.strip() for part in line.split(",", 2))) for line in listed.splitlines() if line.count(",") > 1
    ]
