"""The stages that tests run start in forks of one process that has imported everything (pipeline/warm.py)."""

import os
from pathlib import Path

import pytest

from pipeline.warm import SERVER, stage_server
from tests.pipeline.repository import ROOT, wait_for


@pytest.fixture(scope="session", autouse=True)
def warm_stages():
    with stage_server(ROOT) as environment:
        if environment:
            wait_for(Path(environment[SERVER]).exists)
        os.environ.update(environment)
        yield
        os.environ.pop(SERVER, None)
