"""An MLflow server on PostgreSQL, as a team has it, with four writers at the same time."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from pipeline.tracking.store import SHA_TAG
from tests.pipeline import small
from tests.pipeline.repository import wait_for

EPOCHS = 5
FILES = ("adapter.safetensors", "config.json", "history.csv")
WRITER = """
import sys
from pathlib import Path
from heba import artifact
from pipeline.tracking.log import StageLog
from tests.pipeline.test_tracking import CONFIG

log, config = StageLog(), CONFIG.model_copy(update={"seed": int(sys.argv[1]), "inputs_sha256": sys.argv[1]})
log.begin(config, "CPU")
for epoch in range(int(sys.argv[2])):
    log.epoch({"epoch": epoch, "loss": 1 / (epoch + 1), "lr": 0.1})
folder = Path("adapter")
folder.mkdir()
artifact.write_config(config, folder)
(folder / "adapter.safetensors").write_bytes(b"weights of seed " + sys.argv[1].encode())
(folder / "history.csv").write_text("epoch,loss,lr")
log.outs(folder)
log.finish()
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def postgres():
    """The URI of a PostgreSQL of our own in a temporary folder, on the loopback address."""
    tools = [*sorted(Path("/usr/lib/postgresql").glob("*/bin")), *Path("/usr/local/pgsql").glob("bin")]
    found = shutil.which("initdb", path=os.pathsep.join([os.environ["PATH"], *map(str, tools)]))
    if found is None:
        pytest.skip("PostgreSQL is not installed: no initdb (apt-get install postgresql)")
    programs = Path(found).resolve().parent
    # PostgreSQL refuses to run as root.
    user = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.getuid() == 0 else {}
    folder = Path(tempfile.mkdtemp(prefix="heba-postgres-"))
    if user:
        shutil.chown(folder, "postgres", "postgres")
    port = free_port()
    data = folder / "data"
    setup = ["-D", str(data), "-U", "heba", "-A", "trust", "-E", "UTF8", "--no-sync"]
    subprocess.run([programs / "initdb", *setup], cwd=folder, check=True, capture_output=True, **user)
    options = ["-D", str(data), "-h", "127.0.0.1", "-p", str(port), "-k", str(folder), "-F"]
    server = subprocess.Popen([programs / "postgres", *options], cwd=folder, stderr=subprocess.DEVNULL, **user)
    try:
        ready = [programs / "pg_isready", "-h", "127.0.0.1", "-p", str(port), "-q"]
        wait_for(lambda: subprocess.run(ready, check=False).returncode == 0)
        yield f"postgresql+psycopg2://heba@127.0.0.1:{port}/postgres"
    finally:
        server.send_signal(signal.SIGINT)  # its fast shutdown
        server.wait(timeout=60)
        shutil.rmtree(folder)


@contextmanager
def mlflow_server(folder, store):
    port = free_port()
    options = ["--backend-store-uri", store, "--artifacts-destination", str(folder / "artifacts")]
    command = [sys.executable, "-m", "mlflow", "server", *options, "--host", "127.0.0.1", "--port", str(port)]
    log = (folder / "server.log").open("w")
    env = small.environment(MLFLOW_DISABLE_TELEMETRY="true")
    server = subprocess.Popen(
        [*command, "--workers", "2"], cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True
    )

    def answers():
        assert server.poll() is None, (folder / "server.log").read_text()
        try:
            return requests.get(f"http://127.0.0.1:{port}/health", timeout=5).ok
        except requests.RequestException:
            return False

    try:
        wait_for(answers, 180)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(timeout=60)
        log.close()


@pytest.mark.slow
def test_four_writers_on_one_server_leave_four_complete_runs(tmp_path):
    pytest.importorskip("psycopg2", reason="psycopg2 is not installed: pip install '.[postgres]'")
    with postgres() as store, mlflow_server(tmp_path, store) as uri:
        writers = []
        for seed in range(1, 5):
            # Each as on a machine of its own: no lock file is shared.
            root = tmp_path / f"machine{seed}"
            root.mkdir()
            command = [sys.executable, "-c", WRITER, str(seed), str(EPOCHS)]
            env = small.environment(MLFLOW_TRACKING_URI=uri, MLFLOW_HTTP_REQUEST_TIMEOUT="60")
            writers.append(subprocess.Popen(command, cwd=root, env=env, stderr=subprocess.PIPE, text=True))
        for writer in writers:
            _, stderr = writer.communicate(timeout=300)
            assert writer.returncode == 0, stderr
            assert "tracking failed" not in stderr

        from mlflow.tracking import MlflowClient

        client = MlflowClient(uri)
        experiment = client.get_experiment_by_name("base_to_novel")
        runs = client.search_runs([experiment.experiment_id])
        names = sorted(run.info.run_name.rpartition("-")[0] for run in runs)
        assert names == [f"dtd-zero_shot-2shot-seed{seed}" for seed in range(1, 5)]
        for run in runs:
            assert run.info.status == "FINISHED"
            assert run.data.params["backbone.name"] == "tiny"
            for key in ("loss", "lr", "seconds"):
                assert [m.step for m in client.get_metric_history(run.info.run_id, key)] == list(range(EPOCHS))
            (output,) = run.outputs.model_outputs
            assert client.get_logged_model(output.model_id).status == "READY"
            names = {
                file.path for file in client.list_logged_model_artifacts(output.model_id, "artifacts/adapter")
            }
            assert names == {f"artifacts/adapter/{name}" for name in FILES}
            assert run.data.tags[SHA_TAG]
