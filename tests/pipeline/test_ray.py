"""`python -m pipeline repro --executor ray` on a Ray cluster of two node processes on this machine."""

import json
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager

import psutil
import pytest

from pipeline.runner import processes
from tests.pipeline import small
from tests.pipeline.repository import ROOT, wait_for, working_in


def hold(repo):
    for name in ("b1", "b2", "b3"):
        (repo / f"hold-{name}").touch()


@contextmanager
def cluster_of_two():
    """A Ray cluster of two node processes, and the second node."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")
    from ray.cluster_utils import Cluster

    about = {"num_cpus": 1, "object_store_memory": 100_000_000, "include_dashboard": False}
    env = {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    # Not 127.0.0.1, which Ray takes for the machine's own address.
    head = about | {"node_ip_address": "127.0.0.2", "env_vars": env | {"NODE": "head"}}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        second = cluster.add_node(**about, node_ip_address="127.0.0.3", env_vars=env | {"NODE": "second"})
        cluster.wait_for_nodes()
        yield cluster, second
    finally:
        cluster.shutdown()


@contextmanager
def repro(repo, cluster):
    """`python -m pipeline repro` on the cluster, at work on both nodes, and what it has started there."""
    command = [sys.executable, "-m", "pipeline", "repro", "--executor", "ray", "--address", cluster.address]
    run = subprocess.Popen(
        command, cwd=repo, env=small.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )

    def both_nodes_work():
        assert run.poll() is None, run.communicate()
        held = [start for start in small.starts(repo) if start[0].startswith("b")]
        return held if {node for *_, node in held} == {"head", "second"} else None

    try:
        yield run, wait_for(both_nodes_work, 120)
    finally:
        run.kill()


@pytest.mark.slow
def test_a_node_is_killed_and_its_stages_run_again_with_the_same_result(tmp_path, tmp_path_factory):
    expected = small.outs(small.reproduced(tmp_path_factory))
    repo = small.make(tmp_path / "repo")
    hold(repo)
    with cluster_of_two() as (cluster, second), repro(repo, cluster) as (run, held):
        ((lost, process),) = [start[:2] for start in held if start[-1] == "second"]
        cluster.remove_node(second, allow_graceful=False)
        wait_for(lambda: not psutil.pid_exists(int(process)))  # else it might end by itself
        for path in repo.glob("hold-*"):
            path.unlink()
        stdout, stderr = run.communicate(timeout=300)
    assert run.returncode == 0, stdout + stderr
    assert small.outs(repo) == expected
    assert [node for name, *_, node in small.starts(repo) if name == lost] == ["second", "head"]
    others = [name for name, *_ in small.starts(repo) if name != lost]
    assert len(others) == len(set(others)) == 7
    assert "on 127.0.0.2" in stdout
    assert "MLFLOW_TRACKING_URI is not set" in stderr
    assert not working_in(repo)


@pytest.mark.slow
def test_ctrl_c_ends_the_stages_on_all_nodes(tmp_path):
    repo = small.make(tmp_path / "repo")
    hold(repo)
    with cluster_of_two() as (cluster, _), repro(repo, cluster) as (run, _):
        run.send_signal(signal.SIGINT)
        stdout, stderr = run.communicate(timeout=processes.GRACE)  # else they were killed
        assert run.returncode == 130, stdout + stderr
        assert stdout.count("interrupted") == 2
        wait_for(lambda: not working_in(repo))
        lock = json.loads((repo / ".dvc" / "tmp" / "rwlock").read_text())
        assert not any(lock.values())


def test_what_is_missing_for_ray_is_named(tmp_path):
    repo = small.make(tmp_path / "repo")
    hidden = tmp_path / "hidden" / "ray.py"
    hidden.parent.mkdir()
    hidden.write_text("raise ModuleNotFoundError(\"No module named 'ray'\", name='ray')\n")
    path = f"{hidden.parent}:{ROOT}"
    missing = small.repro(repo, "--executor", "ray", PYTHONPATH=path)
    assert missing.returncode == 1
    assert missing.stderr.startswith("error: --executor ray: the package ray is missing; pip install")
    assert "'.[ray]'" in missing.stderr
    pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")
    closed = small.repro(repo, "--executor", "ray", "--address", "127.0.0.1:9")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        no_token = small.repro(
            repo, "--executor", "ray", "--address", address, RAY_AUTH_MODE="token", HOME=str(repo)
        )
    for done in (closed, no_token):
        assert done.returncode == 1
        assert "no Ray cluster can be reached" in done.stderr
        assert "RAY_AUTH_MODE=token" in done.stderr
        assert "Traceback" not in done.stderr
