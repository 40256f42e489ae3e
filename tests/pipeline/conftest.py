"""The stages that tests run start in forks of one process that has imported all (pipeline/runner/warm.py)."""

import os
import signal
from pathlib import Path

import pytest

from pipeline.runner.warm import SERVER, stage_server
from tests.pipeline.repository import ROOT, wait_for

# Where the tests run in the background of a script, ctrl-C is ignored, and what they start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def warm_stages():
    with stage_server(ROOT) as environment:
        if environment:
            wait_for(Path(environment[SERVER]).exists)
        os.environ.update(environment)
        yield
        os.environ.pop(SERVER, None)
