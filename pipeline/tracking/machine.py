"""How busy the machine is during a training: CPU and memory by psutil, GPUs by NVML where nvidia-ml-py is there.

It is looked at once an epoch, in the process beside the stage: the training knows nothing of it.
"""

import time
from contextlib import suppress
from typing import Any


class Monitors:
    """MLflow's own, whose names its pages know."""

    def __init__(self) -> None:
        self.monitors: list[Any] | None = None

    def begin(self) -> None:
        """Look for the first time; the use of the CPU is counted from here."""
        if self.monitors is None:
            from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
            from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

            self.monitors = [CPUMonitor()]
            with suppress(ImportError, RuntimeError):  # no NVML, or no GPU
                self.monitors.append(GPUMonitor())
        for monitor in self.monitors:
            monitor.collect_metrics()

    def log(self, store: Any, run_id: str, epoch: int) -> None:
        """Log what is used now, and of the CPU since the last time."""
        from mlflow.entities import Metric

        now, found = int(time.time() * 1000), []
        for monitor in self.monitors or []:
            monitor.clear_metrics()
            monitor.collect_metrics()
            used = monitor.aggregate_metrics()
            found += [Metric(f"system/{name}", value, now, epoch) for name, value in used.items()]
        store.log_batch(run_id, metrics=found)
