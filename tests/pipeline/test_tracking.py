"""MLflow runs under ctrl-C, side by side, and when the store is down."""

import itertools
import json
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from filelock import FileLock

from pipeline.tracking import background
from pipeline.tracking import log as tracking
from pipeline.tracking.store import client
from tests.pipeline.repository import ROOT, environment, stage, wait_for
from tests.pipeline.test_report import record

CONFIG = {"protocol": "base_to_novel", "dataset": "dtd", "shots": 2, "seed": 1, "train": {"lr": 0.1}}
CONFIG |= {"inputs_sha256": "of its inputs"}
RECORD = {"epoch": 0, "loss": 1.0, "lr": 0.1}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    return tmp_path


@contextmanager
def alarm(action, seconds, interval=0.0):
    """Do `action` in the main thread after some seconds, and then every `interval`."""
    before = signal.signal(signal.SIGALRM, lambda number, frame: action())
    signal.setitimer(signal.ITIMER_REAL, seconds, interval)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def press_ctrl_c():
    signal.raise_signal(signal.SIGINT)


def statuses():
    store = client()
    return [run.info.status for run in store.search_runs([e.experiment_id for e in store.search_experiments()])]


def train_for_ever(run):
    for epoch in itertools.count():
        run.epoch(RECORD | {"epoch": epoch})
        time.sleep(0.01)


def test_ctrl_c_at_any_moment_of_a_training_leaves_a_run_that_is_closed(folder):
    for part in range(5):
        run = tracking.start_training(CONFIG)
        with pytest.raises(KeyboardInterrupt), alarm(press_ctrl_c, 0.001 + 0.3 * part):
            train_for_ever(run)
        run.fail()
    assert statuses() == ["FAILED"] * 5


def test_ctrl_c_while_a_stage_waits_for_mlflow_lets_it_be_done(folder):
    lock = FileLock(folder / ".heba-mlflow.lock")
    lock.acquire()  # nothing can be done before ctrl-C

    def press():
        lock.release()
        press_ctrl_c()

    run = tracking.start_training(CONFIG)
    with pytest.raises(KeyboardInterrupt), alarm(press, 0.5):
        run.finish(trained(folder))
    assert statuses() == ["FINISHED"]


def test_a_second_ctrl_c_ends_the_wait_for_mlflow(folder):
    with FileLock(folder / ".heba-mlflow.lock"):
        run = tracking.start_training(CONFIG)
        begin = time.monotonic()
        with pytest.raises(KeyboardInterrupt), alarm(press_ctrl_c, 0.5, 0.5):
            run.finish(trained(folder))
        assert time.monotonic() - begin < background.PATIENCE / 2


def test_epochs_that_a_slow_store_could_not_take_at_once_are_all_logged(folder):
    lock = FileLock(folder / ".heba-mlflow.lock")
    lock.acquire()
    run = tracking.start_training(CONFIG)
    for epoch in range(300):
        run.epoch(RECORD | {"epoch": epoch})
    lock.release()
    run.finish(trained(folder))
    store = client()
    (found,) = store.search_runs([e.experiment_id for e in store.search_experiments()])
    history = store.get_metric_history(found.info.run_id, "seconds")
    assert [metric.step for metric in history] == list(range(300))
    assert found.info.start_time <= min(metric.timestamp for metric in history)
    assert found.info.status == "FINISHED"


def trained(folder):
    """An adapter's folder as a training leaves it."""
    out = folder / "out" / "train" / "dtd" / "base_to_novel-1"
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(CONFIG))
    (out / "adapter.safetensors").write_bytes(b"weights")
    (out / "history.csv").write_text("epoch,loss,lr\n0,1.0,0.1\n")
    return out


def test_evaluations_side_by_side_make_one_run_of_a_training(folder):
    out = trained(folder)
    client()
    code = (
        "import sys, pathlib\n"
        "from pipeline import tracking, store\n"
        "found = store.client()\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "print(tracking.find_or_create_run(found, pathlib.Path(sys.argv[1])))\n"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(out)],
            cwd=folder,
            env=environment(PYTHONPATH=str(ROOT)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    assert [process.stdout.readline() for process in both] == ["ready\n", "ready\n"]
    ids = set()
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in both:
        ids.add(process.communicate(timeout=120)[0])
        assert process.returncode == 0
    assert len(ids) == 1


def test_a_kill_while_the_store_is_made_leaves_none(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", "from pipeline.tracking.store import client; client()"],
        env=environment(PYTHONPATH=str(ROOT)),
    )
    wait_for(lambda: any(path.stat().st_size for path in folder.rglob("mlflow.db")))
    process.kill()
    process.wait()
    assert not (folder / "mlflow.db").exists()
    client()
    assert list(folder.glob("*mlflow.db*")) == [folder / "mlflow.db"]
    assert statuses() == []


def test_track_names_what_is_wrong(folder, tmp_path_factory):
    down = stage(folder, "track", MLFLOW_TRACKING_URI="http://me:secret@127.0.0.1:9", PYTHONPATH=str(ROOT))
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    lost = stage(elsewhere, "track", PYTHONPATH=str(ROOT))
    config = trained(folder) / "config.json"
    config.write_text("{")
    damaged = stage(folder, "track", PYTHONPATH=str(ROOT))
    config.write_text(json.dumps(CONFIG))
    history = config.with_name("history.csv")
    history.write_text("nothing,of,it\n1,2,3\n")
    no_epochs = stage(folder, "track", PYTHONPATH=str(ROOT))
    history.write_text("epoch,loss,lr\n0,1.0,0.1\n")
    record = folder / "out" / "evaluate" / "dtd" / "base_to_novel-1.json"
    record.parent.mkdir(parents=True)
    record.write_text("{}")
    empty = stage(folder, "track", PYTHONPATH=str(ROOT))
    for done, named in (
        (down, "MLflow's store http://127.0.0.1:9"),
        (lost, "params.yaml is not here"),
        (damaged, "config.json is damaged"),
        (no_epochs, "history.csv is damaged"),
        (empty, f"{record.relative_to(folder)}: key 'protocol' is missing"),
    ):
        assert done.returncode == 1
        assert done.stderr.startswith("error: ") or "\nerror: " in done.stderr
        assert named in done.stderr
        assert "Traceback" not in done.stderr
        assert "secret" not in done.stdout + done.stderr
    assert list(elsewhere.iterdir()) == []


def test_an_evaluation_of_an_adapter_that_is_no_more_is_left_out(folder):
    trained(folder)
    path = folder / "out" / "evaluate" / "dtd" / "base_to_novel-1.json"
    path.parent.mkdir(parents=True)
    other = record("dtd", 1, (50.0, 60.0), (70.0, 60.0)) | {"adapter_sha256": "of another", "scale_novel": 0.1}
    path.write_text(json.dumps(other))
    done = stage(folder, "track", PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("0 evaluations")
    assert f"{path.relative_to(folder)}: left out" in done.stderr
