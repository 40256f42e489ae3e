"""`python -m pipeline repro` and `waves`, in a small repository with the real DVC."""

import json
import os
import pty
import signal
import subprocess
import sys

import pytest
import yaml

from pipeline.runner import dvc_locks, processes
from tests.pipeline import small
from tests.pipeline.repository import call, noted, noting, wait_for, working_in


@pytest.fixture(scope="module")
def sequential(tmp_path_factory):
    return small.outs(small.reproduced(tmp_path_factory))


def test_side_by_side_gives_the_bytes_of_dvc_repro(tmp_path, sequential):
    repo = small.make(tmp_path / "repo")
    waves = subprocess.run(
        [sys.executable, "-m", "pipeline", "waves"],
        cwd=repo,
        env=small.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert waves.stdout == "a\nb@1 b@2 b@3\nc@1 c@2 c@3\nd\n"
    done = small.repro(repo, "--jobs", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert small.outs(repo) == sequential
    assert len(small.starts(repo)) == 8
    for stage in ("a", "b@1", "c@3", "d"):
        assert f"{stage}: done, " in done.stdout
    again = small.repro(repo, "--jobs", "3")
    assert again.returncode == 0, again.stderr
    assert len(small.starts(repo)) == 8
    assert small.outs(repo) == sequential


def test_dvc_by_our_command_is_dvc_with_the_same_bytes(tmp_path):
    repos = [small.make(tmp_path / name) for name in ("plain", "ours")]
    for repo, dvc in zip(repos, (["dvc"], [sys.executable, "-m", "pipeline", "dvc"]), strict=True):
        for command, code in (("repro", 0), ("exp run -n on-cpu -S device=cpu", 0), ("repro nowhere", 255)):
            done = subprocess.run(
                [*dvc, *command.split()],
                cwd=repo,
                env=small.environment(),
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == code, done.stdout + done.stderr
    plain, ours = ((repo / "dvc.lock").read_bytes() for repo in repos)
    assert ours == plain
    assert b"device: cpu" in ours
    names = [call(repo, "dvc", "exp", "list", "--name-only").stdout.split() for repo in repos]
    assert names == [["on-cpu"], ["on-cpu"]]


def test_gpus_and_threads_are_divided_among_the_jobs(tmp_path, sequential):
    repo = small.make(tmp_path / "repo", threads=None)
    tools = tmp_path / "tools"
    tools.mkdir()
    smi = tools / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '0, GPU-aa, Test'\necho '1, GPU-bb, Test'\n")
    smi.chmod(0o755)
    path = f"{tools}{os.pathsep}{small.environment()['PATH']}"
    for args, message in (
        (["--gpus", "0,2"], "--gpus 2: there is no such GPU here; there are 0, 1"),
        (["--gpus", "0,0"], "--gpus 0: named twice"),
        (["--gpus", "0,1", "--jobs", "1"], "--jobs 1: fewer than the 2 of --gpus"),
    ):
        refused = small.repro(repo, *args, PATH=path)
        assert refused.returncode == 1
        assert message in refused.stderr
    other = small.repro(repo, "--gpus", "0", PATH=path, CUDA_VISIBLE_DEVICES="1")
    assert "there are 1 by CUDA_VISIBLE_DEVICES" in other.stderr

    done = small.repro(repo, "--gpus", "0,1", PATH=path)
    assert done.returncode == 0, done.stderr
    assert "on GPU 0" in done.stdout
    assert "on GPU 1" in done.stdout
    ran = small.starts(repo)
    assert {gpu for _, _, gpu, *_ in ran} == {"0", "1"}
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert {n for _, _, _, n, *_ in ran} == {str(threads)}
    assert small.outs(repo) == sequential  # these stages do not look at their threads


def test_a_failed_stage_stops_what_needs_it_and_the_exit_code_says_so(tmp_path, sequential):
    repo = small.make(tmp_path / "repo")
    (repo / "fail-b2").touch()
    done = small.repro(repo, "--jobs", "2")
    assert done.returncode == 1
    assert "error: failed: b@2; not reached: c@2, d." in done.stderr
    assert "told to fail" in done.stderr
    assert (repo / "c1.txt").exists()
    assert (repo / "c3.txt").exists()
    (repo / "fail-b2").unlink()
    assert small.repro(repo, "--jobs", "2").returncode == 0
    assert sorted(name for name, *_ in small.starts(repo)) == ["a", "b1", "b2", "b2", "b3", "c1", "c2", "c3", "d"]
    assert small.outs(repo) == sequential  # the order of dvc.lock too, though c1 and c3 came before b2


def test_a_stage_that_can_not_begin_has_failed(tmp_path):
    repo = small.make(tmp_path / "repo")
    stages = yaml.safe_load((repo / "dvc.yaml").read_text())
    stages["stages"]["aa"] = {"cmd": "true", "deps": ["a.txt", "nothing.txt"]}
    (repo / "dvc.yaml").write_text(yaml.safe_dump(stages))
    done = small.repro(repo, "--jobs", "1")
    assert done.returncode == 1
    assert "error: failed: aa." in done.stderr
    assert "9 of 9] " in done.stdout
    assert "aa: failed" in done.stdout


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_no_process_and_no_lock_is_left_when_it_is_stopped(tmp_path, number):
    repo = small.make(tmp_path / "repo")
    for name in ("b1", "b2", "b3"):
        (repo / f"hold-{name}").touch()
    # In the background of a script ctrl-C is ignored, and what starts there inherits that.
    background = ["sh", "-c", 'trap "" INT; exec "$@"', "sh"] if number == signal.SIGTERM else []
    run = subprocess.Popen(
        [*background, sys.executable, "-m", "pipeline", "repro", "--jobs", "3"], cwd=repo, env=small.environment()
    )
    wait_for(lambda: sum(name.startswith("b") for name, *_ in small.starts(repo)) == 3)
    second = small.repro(repo)
    assert "another `python -m pipeline repro` runs in this repository" in second.stderr
    run.send_signal(number)
    code = run.wait(timeout=processes.GRACE)
    assert code == (130 if number != signal.SIGKILL else -number)
    wait_for(lambda: not working_in(repo))
    if number != signal.SIGKILL:
        lock = json.loads((repo / ".dvc" / "tmp" / "rwlock").read_text())
        assert not any(lock.values())
    for path in repo.glob("hold-*"):
        path.unlink()
    again = small.repro(repo, "--jobs", "2")
    assert again.returncode == 0, again.stdout + again.stderr


def test_mend_refuses_to_judge_outs_that_are_being_made(tmp_path):
    repo = small.make(tmp_path / "repo")
    (repo / "hold-b1").touch()
    run = subprocess.Popen(["dvc", "repro", "-q", "b@1"], cwd=repo, env=small.environment())
    wait_for(lambda: len(small.starts(repo)) == 2)
    refused = small.stage(repo, "mend")
    (repo / "hold-b1").unlink()
    assert run.wait(timeout=60) == 0
    assert refused.returncode == 1
    assert "repro -q b@1: runs here; wait for its end" in refused.stderr
    (repo / "dvc.lock").write_text("")
    damaged = small.stage(repo, "mend")
    assert damaged.returncode == 0, damaged.stderr
    assert "dvc.lock is empty" in damaged.stderr
    nowhere = small.stage(tmp_path, "mend")
    assert nowhere.returncode == 1
    assert "DVC repository" in nowhere.stderr


def test_on_a_terminal_there_is_one_table(tmp_path):
    repo = small.make(tmp_path / "repo")
    ours, theirs = pty.openpty()
    run = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "repro", "--jobs", "2"],
        cwd=repo,
        env=small.environment(TERM="xterm", COLUMNS="80", LINES="30"),
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 10000):
            shown += part
    except OSError:  # Linux's word for the end of a terminal
        pass
    os.close(ours)
    assert run.wait(timeout=60) == 0
    text = shown.decode()
    assert "runs" in text
    assert "waits" in text
    assert "8 of 8 stages" in text


AGAIN = """
import pathlib, time
path = pathlib.Path("again.txt")
path.write_text(path.read_text() + "x" if path.exists() else "x")
if path.read_text() != "x":
    time.sleep(600)
"""


def test_ctrl_c_lets_the_last_dvc_repro_end(tmp_path):
    """It is not one of our jobs; a kill would leave its locks and the stage that it runs."""
    repo, notes = small.make(tmp_path / "repo"), tmp_path / "notes"
    (repo / "again.py").write_text(AGAIN)
    (repo / "dvc.yaml").write_text("stages: {again: {cmd: python again.py, always_changed: true}}\n")
    run = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "repro"], cwd=repo, env=small.environment(**noting(notes))
    )
    wait_for(lambda: (repo / "again.txt").exists() and (repo / "again.txt").read_text() == "xx")
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=processes.ENDING) == 130
    assert noted(notes, "--wait-for-lock", "repro") == [True]
    assert not working_in(repo)
    assert not any(json.loads((repo / ".dvc" / "tmp" / "rwlock").read_text()).values())


KILLED_IN_THE_MIDDLE = """
import os, runpy, signal, sys

replace = os.replace

def killed(new, old):
    if os.path.basename(old) == "dvc.lock":
        os.kill(os.getpid(), signal.SIGKILL)
    replace(new, old)

os.replace = killed
sys.argv = ["dvc", "repro", "--single-item", "b@1"]
runpy.run_module("pipeline.runner.safe_dvc", run_name="__main__")
"""


def test_what_a_killed_process_leaves_of_dvcs_files_stops_nobody(tmp_path):
    repo = small.make(tmp_path / "repo")
    subprocess.run(["dvc", "repro", "-q", "a"], cwd=repo, env=small.environment(), check=True)
    before = (repo / "dvc.lock").read_bytes()
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_IN_THE_MIDDLE], cwd=repo, env=small.environment(), check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert (repo / "b1.txt").exists()
    assert (repo / "dvc.lock").read_bytes() == before

    # As from another machine, where the number of the dead process is one that lives here.
    path = repo / ".dvc" / "tmp" / "rwlock"
    lock = {
        "write": {str(repo / "b1.txt"): {"pid": os.getpid(), "cmd": "dvc --wait-for-lock repro --single-item b@1"}}
    }
    path.write_text(json.dumps(lock))
    other = json.loads(path.read_text())
    dvc_locks.release(repo, ["b@2"])
    assert json.loads(path.read_text()) == other
    busy = subprocess.run(
        ["dvc", "repro", "-s", "b@1"], cwd=repo, env=small.environment(), capture_output=True, text=True
    )
    assert "is busy" in busy.stderr
    dvc_locks.release(repo, ["b@1"])
    subprocess.run(["dvc", "repro", "-q", "-s", "b@1"], cwd=repo, env=small.environment(), check=True)


def test_the_next_run_removes_what_a_killed_process_left(tmp_path):
    repo = small.make(tmp_path / "repo")
    subprocess.run(["dvc", "repro", "-q", "a"], cwd=repo, env=small.environment(), check=True)
    again = [sys.executable, "-m", "pipeline.runner.safe_dvc", "repro", "-q", "--force", "--single-item", "b@1"]
    for clean in (
        lambda: subprocess.run(again, cwd=repo, env=small.environment(), check=True),
        lambda: small.repro(repo),
    ):
        subprocess.run(
            [sys.executable, "-c", KILLED_IN_THE_MIDDLE], cwd=repo, env=small.environment(), check=False
        )
        assert list(repo.rglob(".dvc.lock.*.tmp"))
        clean()
        assert list(repo.rglob(".dvc.lock.*.tmp")) == []
        (repo / "params.yaml").write_text(
            (repo / "params.yaml").read_text().replace("device: auto", "device: cpu")
        )
