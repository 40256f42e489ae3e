"""MLflow runs under ctrl-C, side by side, and when the store is down."""

import csv
import itertools
import json
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
from filelock import FileLock

from heba import artifact
from heba.evaluation.record import Group, Record, write_record
from pipeline.commands import use
from pipeline.core.trainings import Evaluation, Training
from pipeline.tracking import background, experiments, origin, runs, summary
from pipeline.tracking import log as tracking
from pipeline.tracking.store import INPUTS_TAG, client
from tests.pipeline.repository import ROOT, call, environment, initialise, stage, wait_for

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


def begun(inputs=CONFIG.inputs_sha256, **about):
    """What a stage logs its trainings by, with one that has begun."""
    log = tracking.StageLog()
    log.begin(CONFIG.model_copy(update={"inputs_sha256": inputs} | about), "CPU")
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


def all_runs(store):
    return store.search_runs([e.experiment_id for e in store.search_experiments()])


def statuses():
    return [run.info.status for run in all_runs(client())]


def train_for_ever(run):
    for epoch in itertools.count():
        run.epoch(EPOCH | {"epoch": epoch})
        time.sleep(0.01)


def stopped(run, train):
    """A stage trains until ctrl-C is pressed."""
    try:
        train()
    finally:
        run.finish()


def test_ctrl_c_at_any_moment_of_a_training_leaves_a_run_that_is_closed(folder):
    for part in range(5):
        run = begun(f"inputs {part}")
        with pytest.raises(KeyboardInterrupt), alarm(press_ctrl_c, 0.001 + 0.3 * part):
            stopped(run, partial(train_for_ever, run))
    assert statuses() == ["KILLED"] * 5


def test_a_training_that_goes_on_in_another_experiment_goes_on_with_its_run(folder, monkeypatch):
    monkeypatch.setenv("DVC_EXP_NAME", "first")
    run = begun()
    for epoch in range(3):
        run.epoch(EPOCH | {"epoch": epoch})
    with pytest.raises(KeyboardInterrupt):
        stopped(run, press_ctrl_c)
    store = client()
    (before,) = all_runs(store)
    assert (before.info.status, before.info.run_name[-6:]) == ("KILLED", "-first")
    monkeypatch.setenv("DVC_EXP_NAME", "second")
    run = begun(settings={"prompts": "template"})  # as if only an evaluation read it
    for epoch in range(2, 6):  # the checkpoint was of the second epoch
        run.epoch(EPOCH | {"epoch": epoch})
    run.outs(trained(folder))
    run.finish()
    (after,) = all_runs(store)
    assert after.info.run_id == before.info.run_id
    assert (after.info.status, after.info.run_name[-7:]) == ("FINISHED", "-second")
    assert after.data.tags["dvc.experiment"] == "second"
    assert [metric.step for metric in store.get_metric_history(after.info.run_id, "loss")] == list(range(6))
    assert tracking.SECONDS not in after.data.metrics  # they would be of its end alone
    begun("other inputs").finish()
    assert len(all_runs(store)) == 2


def test_a_training_that_is_done_again_is_one_run_unless_it_differs(folder, monkeypatch):
    """As where DVC was killed before it noted the first, and the next experiment begins without its outs."""
    for experiment, inputs in (("killed", "same"), ("next", "same"), ("next", "other")):
        monkeypatch.setenv("DVC_EXP_NAME", experiment)
        run = begun(inputs)
        run.epoch(EPOCH)
        config = CONFIG.model_copy(update={"inputs_sha256": inputs})
        run.outs(trained(folder / experiment / inputs, config=config))
        run.finish()
    found = all_runs(client())
    assert {(run.data.tags[INPUTS_TAG], run.data.tags["dvc.experiment"]) for run in found} == {
        ("same", "killed"),
        ("other", "next"),
    }
    assert statuses() == ["FINISHED"] * 2
    assert not list((folder / ".heba" / "runs").glob("*.lock"))


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
        f"dtd-zero_shot-2shot-seed{seed}-of see": status
        for seed, status in ((1, "FINISHED"), (2, "FINISHED"), (3, "FAILED"))
    }
    for run in found:
        seed = int(run.data.params["seed"])
        assert run.data.tags[INPUTS_TAG] == f"of seed {seed}"
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


def report(folder, *seeds, **about):
    """A report under `folder` of the trainings of some seeds, as the stage leaves it."""
    reports = folder / "reports"
    reports.mkdir(exist_ok=True)
    with (reports / "evaluations.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        columns = ["protocol", "dataset", "method", "shots", "seed", "group", "accuracy"]
        writer.writerow([*columns, "adapter_sha256", "inputs_sha256"])
        for seed in seeds:
            out = folder / replace(TRAINING, seed=seed).folder
            hashes = artifact.sha256(out), artifact.read_config(out).inputs_sha256
            writer.writerow(["base_to_novel", "dtd", "zero_shot", 2, seed, "base", 50.0, *hashes])
    numbers = {"base_to_novel": {"average": {"zero_shot": {"base": 50.0} | about}}}
    (reports / "metrics.json").write_text(json.dumps(numbers))
    (reports / "README.md").write_text(
        "# Results\n\n| Method | Base |\n| :-- | --: |\n| CLIP | 50.00 |\n\n## More\n"
    )
    return reports


def summaries(store):
    found = store.get_experiment_by_name("summary")
    return store.search_runs([found.experiment_id]) if found else []


@pytest.fixture
def two(folder):
    """Two trainings, with their runs; gives the store, and the runs' ids."""
    store = client()
    ids = []
    for seed in (1, 2):
        config = CONFIG.model_copy(update={"seed": seed, "inputs_sha256": f"of seed {seed}"})
        out = trained(folder, replace(TRAINING, seed=seed), config)
        ids.append(tracking.find_or_create_run(store, out))
    return store, ids


def test_the_same_results_are_one_summary_in_any_experiment(folder, two, monkeypatch):
    store, ids = two
    reports = report(folder, 1, 2)
    for experiment in ("one", "two"):
        monkeypatch.setenv("DVC_EXP_NAME", experiment)
        tracking.log_report(reports)
    (run,) = summaries(store)
    assert run.info.status == "FINISHED"
    assert run.info.run_name.startswith("one-2shot-")
    assert run.data.metrics == {"base_to_novel.zero_shot.base": 50.0}
    assert "| CLIP | 50.00 |" in run.data.tags["mlflow.note.content"]
    assert "More" not in run.data.tags["mlflow.note.content"]
    assert {store.get_run(one).data.tags["mlflow.parentRunId"] for one in ids} == {run.info.run_id}
    report(folder, 1, 2, novel=40.0)  # the same results, of which more is shown
    tracking.log_report(reports)
    (again,) = summaries(store)
    assert again.info.run_id == run.info.run_id
    assert again.data.metrics["base_to_novel.zero_shot.novel"] == 40.0


def test_a_training_of_two_summaries_is_below_the_later_and_in_the_lists_of_both(folder, two):
    store, ids = two

    def listed(run_id):
        with open(store.download_artifacts(run_id, "trainings.csv"), newline="") as file:
            return [row["run_id"] for row in csv.DictReader(file)]

    def parents():
        return [store.get_run(one).data.tags.get("mlflow.parentRunId") for one in ids]

    first = summary.bring_up_to_date(store, report(folder, 1))
    assert parents() == [first, None]
    second = summary.bring_up_to_date(store, report(folder, 1, 2))
    assert first != second
    assert parents() == [second, second]
    assert (listed(first), listed(second)) == (ids[:1], ids)
    assert summary.bring_up_to_date(store, report(folder, 1)) == first  # `dvc repro` with the first settings
    assert parents() == [first, second]


def test_a_summary_that_was_cut_off_is_completed(folder, two):
    store, _ = two
    reports = report(folder, 1, 2)
    text = (reports / "README.md").read_text()
    (reports / "README.md").unlink()
    with pytest.raises(FileNotFoundError):
        summary.bring_up_to_date(store, reports)
    runs.close_abandoned(store)
    (before,) = summaries(store)
    assert before.info.status == "KILLED"
    (reports / "README.md").write_text(text)
    assert summary.bring_up_to_date(store, reports) == before.info.run_id
    assert summaries(store)[0].info.status == "FINISHED"


def test_a_report_without_evaluations_is_no_summary(folder):
    assert summary.bring_up_to_date(client(), report(folder)) is None
    assert summary.bring_up_to_date(client(), folder / "nothing") is None
    assert summaries(client()) == []


def test_a_run_says_what_differs_from_its_commit(folder):
    assert not {"git.dirty", "mlflow.source.git.commit"} & set(origin.tags())  # no git here
    (folder / "heba").mkdir()
    (folder / "dvc.lock").write_text("")
    initialise(folder)
    out = trained(folder)
    store = client()
    tracking.find_or_create_run(store, out)
    commit = call(folder, "git", "rev-parse", "HEAD").stdout.strip()
    assert use.about(out)["git commit"] == commit
    for name in ("params.yaml", "dvc.lock", "heba/new.py"):  # the pipeline itself writes dvc.lock
        (folder / name).write_text("# changed\n")
    assert origin.tags()["git.dirty"] == "params.yaml, heba/new.py"
    (out / "config.json").write_text((out / "config.json").read_text().replace("of its inputs", "of others"))
    tracking.find_or_create_run(store, out)
    assert use.about(out)["git commit"] == f"{commit}, dirty (params.yaml, heba/new.py)"


def test_experiments_open_on_the_runs_and_have_a_view_with_the_accuracy(folder):
    store = client()
    made = store.create_experiment("few_shot", tags={"mlflow.note.content": "my own words"})
    assert experiments.experiment_id(store, "few_shot") == made
    for name, metric in (("few_shot", "accuracy"), ("base_to_novel", "h")):
        tags = store.get_experiment(experiments.experiment_id(store, name)).tags
        assert tags["mlflow.experimentKind"] == "custom_model_development"
        assert (
            f"metrics.`{metric}`"
            in json.loads(json.loads(tags["mlflow.sharedViewState.accuracy"])["state"])["selectedColumns"]
        )
    assert store.get_experiment(made).tags["mlflow.note.content"] == "my own words"
