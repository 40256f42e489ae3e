"""The stages that tests run start in forks of one process that has imported all (pipeline/runner/warm.py), and one
small DAG, which has run, is shared by the tests."""

import os
import signal
from pathlib import Path

import pytest
from filelock import FileLock

from pipeline.runner.warm import SERVER, stage_server
from tests.pipeline import breakable
from tests.pipeline.repository import ROOT, stage, wait_for

# Where the tests run in the background of a script, ctrl-C is ignored, and what they start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def warm_stages():
    environment = stage_server(ROOT)
    if environment:
        wait_for(Path(environment[SERVER]).exists)
    os.environ.update(environment)
    yield
    os.environ.pop(SERVER, None)


@pytest.fixture(scope="session")
def finished(tmp_path_factory, warm_stages):
    """A repository in which `python -m pipeline repro` ran once, for all test processes. Who changes it copies it
    first (`breakable.copy`)."""
    base = tmp_path_factory.getbasetemp()
    folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    repo, done = folder / "täst repo", folder / "finished"
    with FileLock(folder / "finished.lock"):
        if not done.exists():
            breakable.make(repo, breakable.small_params())
            ran = stage(repo, "repro", "--jobs", "2")
            assert ran.returncode == 0, ran.stdout + ran.stderr
            done.touch()
    return repo
