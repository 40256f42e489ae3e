"""The pictures of the documentation: `python -m tests.pictures FOLDER`, in the root of a repository in which

    python -m pipeline repro
    dvc exp run -n 4shot -S shots=4

have run. Those of docs/pictures are of the demo. It needs Chromium (apt-get install chromium).
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.tracking import experiments
from pipeline.tracking.store import client
from tests import browser
from tests.pipeline.serving import free_port, mlflow_server

WIDTH, COLOURS = 1400, 128
# What a reader has chosen before: the pages for trainings, and no assistant at the side.
CHOSEN = """
localStorage.setItem("mlflow.workflowType_v1", '"machine_learning"');
localStorage.setItem("mlflow.assistant.panelOpen_v1", "false");
localStorage.setItem("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true");
"""
DIFFERENCES = "[...document.querySelectorAll('button[role=switch]')].forEach((e) => e.click())"
REST = 3.0  # seconds for a page to come to rest


def take(page: browser.Page, path: Path) -> None:
    time.sleep(REST)
    page.picture(path)
    Image.open(path).convert("RGB").quantize(COLOURS).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def leaderboard(page: browser.Page, folder: Path) -> None:
    page.open(Path("reports/index.html").resolve().as_uri(), 1000, 1320)
    page.wait_for("HeBA: results")
    take(page, folder / "leaderboard.png")


def pages(page: browser.Page, address: str, folder: Path) -> None:
    """Those of MLflow: the runs, a run, the newest two summaries, and their comparison."""
    store = client()

    def runs(name: str, query: str = "") -> tuple[str, list[Any]]:
        experiment = store.get_experiment_by_name(name).experiment_id
        return experiment, store.search_runs([experiment], query)

    page.open(address, WIDTH, 800)
    page.wait_for("Experiments")
    page.run(CHOSEN)
    experiment, found = runs("base_to_novel", "params.method = 'heba'")
    page.open(f"{address}/{experiments.table(experiment, viewStateShareKey=experiments.VIEW)}", WIDTH, 800)
    page.wait_for("Metrics", found[0].info.run_name)
    take(page, folder / "runs.png")
    page.open(f"{address}/#/experiments/{experiment}/runs/{found[0].info.run_id}", WIDTH, 1100)
    page.wait_for("harmonic mean, h")
    take(page, folder / "run.png")
    experiment, (new, old, *_) = runs(experiments.SUMMARY)
    page.open(f"{address}/#/experiments/{experiment}/runs/{old.info.run_id}", WIDTH, 1000)
    page.wait_for("Averages over the benchmarks")
    take(page, folder / "summary.png")
    chosen = f'runs=["{new.info.run_id}","{old.info.run_id}"]&experiments=["{experiment}"]'
    page.open(f"{address}/#/compare-runs?{chosen}", WIDTH, 1100)
    page.wait_for("Comparing 2 Runs", "shots")
    page.click("Visualizations", "*")
    page.run(DIFFERENCES)
    take(page, folder / "comparison.png")


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    with tempfile.TemporaryDirectory() as own, browser.page(Path(own)) as page:
        leaderboard(page, folder)
        with mlflow_server(Path.cwd(), port):
            pages(page, f"http://127.0.0.1:{port}", folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
