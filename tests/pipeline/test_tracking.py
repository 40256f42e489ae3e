"""MLflow runs under ctrl-C, side by side, and when the store is down."""

import itertools
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest
from filelock import FileLock

from heba import artifact
from heba.evaluation.record import Group, Record, write_record
from pipeline.core.trainings import Evaluation, Training
from pipeline.tracking import background
from pipeline.tracking import log as tracking
from pipeline.tracking.store import client
from tests.pipeline.repository import ROOT, environment, stage, wait_for

TRAINING = Training("base_to_novel", "dtd", "zero_shot", shots=2, seed=1)
CONFIG = artifact.Config(
    method=TRAINING.method,
    settings={"prompts": "descriptions"},
    class_names=["grass"],
    backbone=artifact.Backbone(name="tiny", pretrained="embedded", sha256="0" * 64),
    protocol=TRAINING.protocol,
    dataset=TRAINING.dataset,
    suite="embedded",
    bf16=False,
    seed=TRAINING.seed,
    shots=TRAINING.shots,
    inputs_sha256="of its inputs",
)
EPOCH = {"epoch": 0, "loss": 1.0, "lr": 0.1}


def begun():
    """What a stage logs its trainings by, with one that has begun."""
    log = tracking.StageLog()
    log.begin(CONFIG, "CPU")
    return log


def trained(folder, training=TRAINING, config=CONFIG):
    """The folder of a training under `folder`, as the stage leaves it."""
    out = folder / training.folder
    out.mkdir(parents=True)
    artifact.write_config(config, out)
    (out / artifact.ADAPTER_FILE).write_bytes(b"weights")
    artifact.write_history([EPOCH], out)
    return out


def evaluation(**about):
    """A record of TRAINING."""
    group = Group(n=1, accuracy=100.0, class_names=["grass"], per_class=[100.0], confusion=[[1]])
    found = {
        "protocol": TRAINING.protocol,
        "dataset": TRAINING.dataset,
        "method": TRAINING.method,
        "shots": TRAINING.shots,
        "seed": TRAINING.seed,
        "source": None,
        "suite": CONFIG.suite,
        "backbone": {"name": "tiny", "pretrained": "embedded"},
        "settings": {"prompts": "descriptions"},
        "trained_parameters": 0,
        "adapter_bytes": 16,
        "adapter_sha256": "of its adapter",
        "inputs_sha256": CONFIG.inputs_sha256,
        "evaluated_sha256": "of its evaluation",
        "groups": {"base": group, "novel": group},
    }
    return Record(**found | about)


def evaluated(folder):
    """The path of a record of TRAINING under `folder`."""
    path = folder / Evaluation("base_to_novel", TRAINING.dataset, TRAINING).path
    path.parent.mkdir(parents=True)
    return path


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
        run.epoch(EPOCH | {"epoch": epoch})
        time.sleep(0.01)


def test_ctrl_c_at_any_moment_of_a_training_leaves_a_run_that_is_closed(folder):
    for part in range(5):
        run = begun()
        with pytest.raises(KeyboardInterrupt), alarm(press_ctrl_c, 0.001 + 0.3 * part):
            train_for_ever(run)
        run.finish()
    assert statuses() == ["FAILED"] * 5


def test_ctrl_c_while_a_stage_waits_for_mlflow_lets_it_be_done(folder):
    lock = FileLock(folder / ".heba-mlflow.lock")
    lock.acquire()  # nothing can be done before ctrl-C

    def press():
        lock.release()
        press_ctrl_c()

    run = begun()
    run.outs(trained(folder))
    with pytest.raises(KeyboardInterrupt), alarm(press, 0.5):
        run.finish()
    assert statuses() == ["FINISHED"]


def test_ctrl_c_just_before_a_stage_waits_for_mlflow_lets_it_be_done(folder, monkeypatch):
    run = begun()
    run.outs(trained(folder))
    send, presses = run.log.send, [press_ctrl_c]

    def send_end(name, argument):
        if presses:
            presses.pop()()
        send(name, argument)

    monkeypatch.setattr(run.log, "send", send_end)
    with pytest.raises(KeyboardInterrupt):
        run.finish()
    assert statuses() == ["FINISHED"]


def test_a_second_ctrl_c_ends_the_wait_for_mlflow(folder):
    with FileLock(folder / ".heba-mlflow.lock"):
        run = begun()
        run.outs(trained(folder))
        begin = time.monotonic()
        with pytest.raises(KeyboardInterrupt), alarm(press_ctrl_c, 0.5, 0.5):
            run.finish()
        assert time.monotonic() - begin < background.PATIENCE / 2


def test_epochs_that_a_slow_store_could_not_take_at_once_are_all_logged(folder):
    lock = FileLock(folder / ".heba-mlflow.lock")
    lock.acquire()
    run = begun()
    for epoch in range(300):
        run.epoch(EPOCH | {"epoch": epoch})
    lock.release()
    run.outs(trained(folder))
    run.finish()
    store = client()
    (found,) = store.search_runs([e.experiment_id for e in store.search_experiments()])
    history = store.get_metric_history(found.info.run_id, "seconds")
    assert [metric.step for metric in history] == list(range(300))
    assert found.info.start_time <= min(metric.timestamp for metric in history)
    assert found.info.status == "FINISHED"


def test_the_trainings_of_a_stage_are_runs_of_their_own_and_the_one_without_outs_has_failed(folder):
    """One process logs them all, in order; a stage that trains nothing starts none."""
    nothing = tracking.StageLog()
    nothing.finish()
    assert nothing.log is None
    log = tracking.StageLog()
    processes = set()
    for seed in (1, 2, 3):
        log.begin(CONFIG.model_copy(update={"seed": seed, "inputs_sha256": f"of seed {seed}"}), "CPU")
        processes.add(log.log.process.pid)
        for epoch in range(seed):
            log.epoch(EPOCH | {"epoch": epoch})
        if seed < 3:
            log.outs(trained(folder / str(seed)))
    log.finish()
    assert len(processes) == 1
    store = client()
    found = store.search_runs([e.experiment_id for e in store.search_experiments()])
    assert {run.info.run_name: run.info.status for run in found} == {
        f"dtd-zero_shot-2shot-seed{seed}": status
        for seed, status in ((1, "FINISHED"), (2, "FINISHED"), (3, "FAILED"))
    }
    for run in found:
        seed = int(run.data.params["seed"])
        assert run.data.tags[tracking.INPUTS_TAG] == f"of seed {seed}"
        assert [m.step for m in store.get_metric_history(run.info.run_id, "loss")] == list(range(seed))


def test_evaluations_side_by_side_make_one_run_of_a_training(folder):
    out = trained(folder)
    client()
    code = (
        "import sys, pathlib\n"
        "from pipeline.tracking import log, store\n"
        "found = store.client()\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "print(log.find_or_create_run(found, pathlib.Path(sys.argv[1])))\n"
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


def test_a_training_is_registered_by_its_own_run_where_others_have_the_same_adapter(folder):
    """All of zero-shot CLIP have."""
    trainings = [replace(TRAINING, shots=shots) for shots in (1, 2, 4)]
    for training in trainings:
        config = CONFIG.model_copy(update={"shots": training.shots, "inputs_sha256": f"of {training.shots} shots"})
        trained(folder, training, config)
    done = stage(folder, "track", PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    store = client()
    for training in trainings:
        name = f"{training.shots} shots"
        done = stage(folder, "register", str(training.folder), "--name", name, PYTHONPATH=str(ROOT))
        assert done.returncode == 0, done.stderr
        run = store.get_run(store.get_model_version(name, "1").run_id)
        assert run.data.params["shots"] == str(training.shots)


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
    out = trained(folder)
    (out / "config.json").write_text("{")
    damaged = stage(folder, "track", PYTHONPATH=str(ROOT))
    artifact.write_config(CONFIG, out)
    (out / "history.csv").write_text("nothing,of,it\n1,2,3\n")
    no_epochs = stage(folder, "track", PYTHONPATH=str(ROOT))
    artifact.write_history([EPOCH], out)
    record = evaluated(folder)
    record.write_text("{}")
    empty = stage(folder, "track", PYTHONPATH=str(ROOT))
    for done, named in (
        (down, "MLflow's store http://127.0.0.1:9"),
        (lost, "params.yaml is not here"),
        (damaged, f"{TRAINING.folder}/config.json: damaged (Invalid JSON: "),
        (no_epochs, f"{TRAINING.folder}/history.csv: damaged (its columns must be epoch, loss, lr)"),
        (empty, f"{record.relative_to(folder)}: not a record of an evaluation (key 'protocol': Field required"),
    ):
        assert done.returncode == 1
        assert done.stderr.startswith("error: ") or "\nerror: " in done.stderr
        assert named in done.stderr
        assert "Traceback" not in done.stderr
        assert "secret" not in done.stdout + done.stderr
    assert list(elsewhere.iterdir()) == []


def test_an_evaluation_of_an_adapter_that_is_no_more_is_left_out(folder):
    trained(folder)
    path = evaluated(folder)
    write_record(evaluation(inputs_sha256="of others"), path)
    done = stage(folder, "track", PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("0 evaluations")
    assert f"{path.relative_to(folder)}: left out" in done.stderr
