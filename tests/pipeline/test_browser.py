"""MLflow's pages, as a reader sees them in a browser: the accuracy is on the screen."""

import shutil

import pytest

from tests import browser
from tests.pipeline.repository import call
from tests.pipeline.serving import free_port, mlflow_server
from tests.pipeline.test_stages import summaries

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser.CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def repo(finished, tmp_path_factory):
    """The finished repository with its store, and with a second pipeline run: one shot instead of two."""
    folder = tmp_path_factory.mktemp("browser") / "repo"
    shutil.copytree(finished, folder, symlinks=True, ignore=shutil.ignore_patterns(".heba"))
    done = call(folder, "dvc", "exp", "run", "-n", "one", "-S", "shots=1")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def address(repo):
    port = free_port()
    with mlflow_server(repo, port):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def page(tmp_path):
    with browser.page(tmp_path / "chromium") as page:
        yield page


@pytest.fixture(scope="module")
def client(repo):
    from mlflow.tracking import MlflowClient

    return MlflowClient(f"sqlite:///{repo / 'mlflow.db'}")


def training(client):
    """The run of HeBA on DTD for base_to_novel with two shots."""
    experiment = client.get_experiment_by_name("base_to_novel").experiment_id
    query = "params.method = 'heba' AND params.dataset = 'dtd' AND params.shots = '2'"
    (run,) = client.search_runs([experiment], query)
    return experiment, run


def shown(number):
    """A metric as MLflow's tables show it."""
    return f"{number:.4f}".rstrip("0").rstrip(".")


def test_the_table_of_runs_has_the_accuracy_after_one_click(client, address, page):
    experiment, run = training(client)
    page.open(f"{address}/#/experiments/{experiment}?workflowType=machine_learning")
    page.wait_for(run.info.run_name, "dvc repro train@dtd-heba", "dtd (")
    page.follow("The runs with their accuracy")
    page.wait_for(*(f"\n{shown(run.data.metrics[name])}\n" for name in ("base", "novel", "h")))


def test_an_experiment_that_opens_on_the_pages_for_genai_leads_there_too(client, address, page):
    """As MLflow opens it in a browser in which nothing was chosen yet."""
    experiment, run = training(client)
    page.open(f"{address}/#/experiments/{experiment}")
    page.follow("The runs with their accuracy")
    page.wait_for(run.info.run_name, f"\n{shown(run.data.metrics['h'])}\n")


def test_a_run_says_what_it_is(client, address, page):
    experiment, run = training(client)
    page.open(f"{address}/#/experiments/{experiment}/runs/{run.info.run_id}?workflowType=machine_learning")
    rows = [
        f"{what} classes\t100\t{run.data.metrics[name]:.2f}"
        for what, name in (("base", "base"), ("novel", "novel"))
    ]
    parent = client.get_run(run.data.tags["mlflow.parentRunId"]).info.run_name
    page.wait_for(
        f"HeBA on DTD, 2 shots, seed 1: base {run.data.metrics['base']:.2f} %, ",
        *rows,
        parent,
        "dtd (",
    )


def test_the_summary_shows_the_averages_and_the_report(client, address, page):
    (summary,) = [run for run in summaries(client) if run.data.params["shots"] == "2"]
    where = f"{address}/#/experiments/{summary.info.experiment_id}/runs/{summary.info.run_id}"
    h = f"{summary.data.metrics['base_to_novel.heba.h']:.2f}"
    page.open(f"{where}?workflowType=machine_learning")
    page.wait_for("Averages over the benchmarks, in percent.", h)
    page.follow("the report")
    page.wait_for("trainings.csv", "HeBA: results", "Base-to-novel generalisation\nLeaderboard")
    page.open(f"{where}?workflowType=machine_learning")
    page.follow("trainings for base_to_novel")
    page.wait_for(training(client)[1].info.run_name, "matching runs")


def test_two_summaries_are_compared_in_two_clicks(client, address, page):
    one, two = sorted(summaries(client), key=lambda run: run.data.params["shots"])
    assert (one.data.params["shots"], two.data.params["shots"]) == ("1", "2")
    page.open(f"{address}/#/experiments/{one.info.experiment_id}/runs?workflowType=machine_learning")
    page.wait_for(one.info.run_name, two.info.run_name)
    page.run("document.querySelector('input[aria-label=\"Select all runs\"]').click()")
    page.click("Compare")
    wanted = [run.data.metrics["base_to_novel.heba.h"] for run in (one, two)]
    page.wait_for("Comparing 2 Runs", "base_to_novel.heba.h", *map(shown, wanted), "shots\t1\t2")
