"""The stages that tests run start in forks of one process that has imported everything (pipeline/warm.py)."""

import os
import time
from pathlib import Path

import pytest

from pipeline.warm import SERVER, stage_server

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session", autouse=True)
def warm_stages():
    with stage_server(ROOT) as environment:
        deadline = time.monotonic() + 120
        while environment and not Path(environment[SERVER]).exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.environ.update(environment)
        yield
        os.environ.pop(SERVER, None)
