"""What breaks a pipeline: each test does it, and looks at what is left."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest
import yaml

from heba import artifact
from pipeline.tracking.background import PATIENCE
from tests.pipeline import breakable
from tests.pipeline.breakable import ONE, TRAIN, TRAINED, changed_params
from tests.pipeline.repository import call, stage, wait_for, working_in
from tests.pipeline.serving import free_port, mlflow_server
from tests.pipeline.test_real import repository
from tests.pipeline.test_stalls import broken_file, faulty
from tests.server import serve

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc, and stages run in forks")
CHECKPOINTS = ".heba/checkpoints"
SECOND = "out/train/dtd/heba/few_shot-1-1"  # what TRAIN makes after TRAINED
EVALUATE, RECORD = "evaluate@dtd", "out/evaluate/dtd/heba/base_to_novel-2-1.json"


def test_a_run_without_a_fault_leaves_nothing_over(finished):
    assert set(breakable.runs(finished)) == {"FINISHED"}
    assert not breakable.left_over(finished)
    assert not any((finished / CHECKPOINTS).glob("*"))
    assert not any((finished / ".heba" / "runs").glob("*.lock"))


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    """An MLflow store without runs: with it, a run is open soon after its training begins."""
    from mlflow.tracking import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


def exists(pattern):
    return lambda repo: any(repo.glob(pattern))


def is_logging(repo):
    """All is trained, and a run is still open."""
    return (repo / SECOND).exists() and any(repo.glob(".heba/runs/*.lock"))


def is_training(repo):
    """An epoch is kept, and a run is open."""
    return any(repo.glob(f"{CHECKPOINTS}/*.safetensors")) and "RUNNING" in breakable.runs(repo)


def is_in_second(repo):
    """The first training is done, and an epoch of the second is kept."""
    if not (repo / TRAINED).exists():
        return False
    first = artifact.read_config(repo / TRAINED).inputs_sha256
    return any(path.stem != first for path in repo.glob(f"{CHECKPOINTS}/*.safetensors"))


# By moment: the stages that have not run yet, of which the first is broken off, and when that is.
MOMENTS = {
    "training": ([TRAIN, EVALUATE], is_training),
    "second training": ([TRAIN, EVALUATE], is_in_second),
    "packing": (["precompute@dtd"], exists("out/precompute/.dtd.*.tmp/new/images.npy")),
    "drawing": (["download@dtd"], exists("data/embedded/.dtd.*.tmp/new/images/*/*")),
    "logging": ([TRAIN, EVALUATE], is_logging),
}


def broken_off(finished, folder, empty_store, moment, number):
    """A copy of the finished repository in `folder`, in which `dvc repro` got the signal `number` at `moment`."""
    stages, reached = MOMENTS[moment]
    repo = breakable.copy(finished, folder, but=stages)
    shutil.copy(empty_store, repo)
    if moment == "drawing":
        (repo / "data" / "embedded" / "dtd").rename(folder.with_name("drawn before"))
    process = breakable.start(repo, "dvc", "repro", stages[0])
    wait_for(lambda: reached(repo) or process.poll() is not None)
    assert process.poll() is None, process.stdout.read()
    os.killpg(process.pid, number)
    process.communicate(timeout=60)
    wait_for(lambda: not working_in(repo))
    assert process.returncode != 0
    return repo


def complete(repo, finished):
    """`dvc repro` again ends as if nothing had been."""
    done = call(repo, "dvc", "repro")
    assert done.returncode == 0, done.stdout + done.stderr
    assert breakable.outs(repo) == breakable.outs(finished)
    assert breakable.left_over(repo) == []
    assert not any((repo / CHECKPOINTS).glob("*"))
    assert "RUNNING" not in breakable.runs(repo)
    return done


def all_are_runs(repo):
    """Each training of the two methods on dtd is a run, whatever had been logged before the kill."""
    runs = breakable.runs(repo)
    return runs.count("FINISHED") == 4 and set(runs) <= {"FINISHED", "KILLED"}


@pytest.mark.parametrize("moment", ["training", "packing", "drawing", "logging"])
def test_after_a_kill_the_next_run_ends_with_the_same_bytes(finished, empty_store, tmp_path, moment):
    repo = broken_off(finished, tmp_path / "repo", empty_store, moment, signal.SIGKILL)
    if moment in ("packing", "drawing"):
        assert breakable.left_over(repo)  # so it did break in the middle
    done = complete(repo, finished)
    if moment == "training":
        assert "resuming from" in done.stderr + done.stdout
    if moment in ("training", "logging"):
        assert all_are_runs(repo)


def test_a_killed_stage_goes_on_with_the_training_that_was_running(finished, empty_store, tmp_path):
    repo = broken_off(finished, tmp_path / "repo", empty_store, "second training", signal.SIGKILL)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (repo / TRAINED).iterdir()}
    assert not (repo / SECOND).exists()
    done = call(repo, "dvc", "repro", TRAIN)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("resuming from") == 1
    assert f"train dtd heba: 1 of 2 trainings ({Path(SECOND).name}), loss " in done.stdout
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (repo / TRAINED).iterdir()} == before
    complete(repo, finished)
    assert all_are_runs(repo)


def test_a_kill_while_an_archive_is_unpacked_leaves_no_half_data_set(tmp_path):
    repo = repository(tmp_path / "repo", ["eurosat", "dtd"], [])
    download = [sys.executable, "-m", "pipeline", "download", "--dataset", "eurosat"]
    folder, manifest = repo / "data" / "real" / "eurosat", repo / "out" / "download" / "eurosat.json"
    done = call(repo, *download)
    assert done.returncode == 0, done.stderr
    wanted = manifest.read_bytes()

    def killed():
        """Whether the kill came in time."""
        shutil.rmtree(folder, ignore_errors=True)
        manifest.unlink(missing_ok=True)  # the last kill may have come before it was written
        process = breakable.start(repo, *download)
        wait_for(lambda: any(folder.parent.glob(".eurosat.*.tmp/new/raw")) or process.poll() is not None)
        process.kill()
        process.communicate()
        wait_for(lambda: not working_in(repo))
        return not manifest.exists() and not folder.exists()

    assert any(killed() for _ in range(50))
    assert breakable.left_over(repo)
    done = call(repo, *download)
    assert done.returncode == 0, done.stderr
    assert manifest.read_bytes() == wanted
    assert breakable.left_over(repo) == []


def test_after_ctrl_c_the_next_run_ends_with_the_same_bytes(finished, empty_store, tmp_path):
    repo = broken_off(finished, tmp_path / "repo", empty_store, "training", signal.SIGINT)
    assert breakable.runs(repo)[-1] == "KILLED"
    assert "RUNNING" not in breakable.runs(repo)
    assert "resuming from" in complete(repo, finished).stderr


@pytest.mark.slow
def test_ctrl_c_stops_the_parallel_repro(finished, tmp_path):
    repo = breakable.copy(finished, tmp_path / "repo", but=[TRAIN])
    process = breakable.start(repo, sys.executable, "-m", "pipeline", "repro", "--jobs", "2")
    wait_for(lambda: any(repo.glob(f"{CHECKPOINTS}/*.safetensors")))
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    wait_for(lambda: not working_in(repo))
    assert process.returncode == 130
    complete(repo, finished)


def test_right_after_a_kill_the_parallel_repro_works_at_once(finished, tmp_path):
    """What the first one started still dies, and DVC calls busy what that holds."""
    repo = breakable.copy(finished, tmp_path / "repo", but=[TRAIN])
    command = [sys.executable, "-m", "pipeline", "repro", "--jobs", "2"]
    first = breakable.start(repo, *command)
    wait_for(lambda: any(repo.glob(f"{CHECKPOINTS}/*.safetensors")))
    (job,) = (pid for pid in working_in(repo) if "--single-item" in psutil.Process(pid).cmdline())
    os.kill(job, signal.SIGSTOP)  # it is slow to die: only SIGKILL ends it now
    first.kill()
    second = call(repo, *command)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "busy" not in second.stderr
    assert not psutil.pid_exists(job) or psutil.Process(job).status() == psutil.STATUS_ZOMBIE
    first.communicate(timeout=60)
    complete(repo, finished)


@pytest.mark.slow
def test_a_run_whose_training_is_never_repeated_is_closed_too(finished, empty_store, tmp_path):
    repo = broken_off(finished, tmp_path / "repo", empty_store, "training", signal.SIGKILL)
    before = breakable.runs(repo)
    assert before.count("RUNNING") == 1
    with changed_params(repo) as params:
        params["heba"]["lr"] = 0.005
    done = stage(repo, "train", *ONE)
    assert done.returncode == 0, done.stderr
    assert breakable.runs(repo) == [status.replace("RUNNING", "KILLED") for status in before] + ["FINISHED"]


@pytest.mark.slow
def test_two_dvc_repro_at_once(finished, tmp_path):
    repo = breakable.copy(finished, tmp_path / "repo", but=["precompute@dtd", TRAIN, EVALUATE])
    both = [breakable.start(repo, "dvc", "repro") for _ in range(2)]
    outputs = [process.communicate(timeout=300)[0] for process in both]
    for process, output in zip(both, outputs, strict=True):
        assert process.returncode == 0 or "Unable to acquire lock" in output or "is busy" in output, output
        assert "Traceback" not in output
    complete(repo, finished)


def damage(path, how):
    content = path.read_bytes()
    path.chmod(0o644)
    path.unlink()  # the cache may share its bytes
    path.write_bytes({"half": content[: len(content) // 2], "nonsense": b"\x00nonsense", "empty": b""}[how])


DAMAGES = [
    ("out/download/dtd.json", "split", "download@dtd"),
    ("out/backbone.json", "train", "backbone"),
    ("out/split/dtd/2-1.json", "train", "split@dtd"),
    ("out/precompute/dtd/text.safetensors", "train", "precompute@dtd"),
    ("out/precompute/dtd/text.safetensors", "evaluate", "precompute@dtd"),
    ("out/precompute/dtd/test.safetensors", "evaluate", "precompute@dtd"),
    ("out/precompute/dtd/images.npy", "evaluate", "precompute@dtd"),
    ("out/precompute/dtd/prompts.json", "evaluate", "precompute@dtd"),
    ("out/split/dtd/trainings.json", "train", "split@dtd"),
    (f"{TRAINED}/adapter.safetensors", "evaluate", "train again"),
    (f"{TRAINED}/classifier.safetensors", "evaluate", "train again"),
    (f"{TRAINED}/config.json", "evaluate", "train again"),
]


@pytest.fixture(scope="module")
def broken(finished, tmp_path_factory):
    """A copy for all damages, in which nothing is trained or evaluated by itself."""
    repo = breakable.copy(finished, tmp_path_factory.mktemp("broken") / "repo")
    shutil.rmtree(repo / "out" / "evaluate" / "dtd")
    return repo


@contextmanager
def untrained(repo):
    """Without TRAINED, which would stay as it is."""
    aside = repo / "aside"
    (repo / TRAINED).rename(aside)
    yield
    shutil.rmtree(repo / TRAINED, ignore_errors=True)
    aside.rename(repo / TRAINED)


@pytest.mark.parametrize(("file", "command", "remedy"), DAMAGES)
def test_a_damaged_out_is_named_with_the_remedy(broken, file, command, remedy):
    path = broken / file
    kept = path.read_bytes()
    options = ONE if command == "train" else ("--dataset", "dtd")
    try:
        for how in ("half", "nonsense", "empty"):
            damage(path, how)
            done = stage(broken, command, *options)
            assert done.returncode == 1, how
            assert file in done.stderr
            assert remedy in done.stderr
            assert "Traceback" not in done.stderr
    finally:
        path.write_bytes(kept)


def test_a_damaged_checkpoint_is_named(broken):
    with untrained(broken):
        process = breakable.start(broken, sys.executable, "-m", "pipeline", "train", *ONE)
        (path,) = wait_for(lambda: list((broken / CHECKPOINTS).glob("*.safetensors")))
        process.kill()
        process.communicate()
        wait_for(lambda: not working_in(broken))
        damage(path, "half")
        done = stage(broken, "train", *ONE)
    assert done.returncode == 1
    assert f"{path}: damaged checkpoint" in done.stderr
    assert "delete it" in done.stderr
    path.unlink()


@pytest.mark.parametrize("part", ["test", "train"])
def test_a_truncated_image_is_named(broken, part):
    from heba.data.splits import read_split

    images = broken / "data" / "embedded" / "dtd" / "images"
    sample = broken / ("out/split/dtd/2-1.json" if part == "train" else "data/embedded/dtd/split.json")
    file = read_split(sample)[part][0][0]
    kept = (images / file).read_bytes()
    damage(images / file, "half")
    command = ["train", *ONE] if part == "train" else ["precompute", "--dataset", "dtd"]
    with untrained(broken):
        done = stage(broken, *command)
    (images / file).write_bytes(kept)
    assert done.returncode == 1
    assert file in done.stderr
    assert "download@dtd" in done.stderr or "restore the file" in done.stderr
    assert "Traceback" not in done.stderr


def test_mend_removes_what_dvc_would_trust(finished, tmp_path):
    repo = breakable.copy(finished, tmp_path / "repo")
    out = repo / "out" / "precompute" / "dtd" / "text.safetensors"
    kept = out.read_bytes()
    cached = [p for p in (repo / ".dvc" / "cache" / "files").rglob("*") if p.is_file() and p.read_bytes() == kept]
    assert len(cached) == 1
    # As after a damage of the disk: no time has changed, and out and cache are the same file.
    out.unlink()
    os.link(cached[0], out)
    before = out.stat()
    out.chmod(0o644)
    out.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    out.chmod(0o444)
    os.utime(out, ns=(before.st_atime_ns, before.st_mtime_ns))
    done = stage(repo, "mend")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        str(cached[0]),
        str(out),
        "2 damaged files are removed; `dvc repro` makes them again",
    ]
    complete(repo, finished)
    # What differs in a way that DVC sees stays: it may have been made just now.
    sample = repo / "out" / "split" / "dtd" / "2-1.json"
    content = sample.read_bytes()
    sample.unlink()
    sample.write_bytes(content + b" ")
    assert stage(repo, "mend").stdout == "nothing is damaged\n"
    assert sample.exists()
    # A copy that DVC has hashed, and that has changed in place since.
    sample.write_bytes(content)
    assert call(repo, "dvc", "status", "split@dtd").returncode == 0
    before = sample.stat()
    sample.write_bytes(content[:-2] + b" " + content[-1:])
    os.utime(sample, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert stage(repo, "mend").stdout.splitlines()[0] == str(sample)
    complete(repo, finished)


def evaluated_again(repo):
    """What `evaluate` says when the record of TRAINED alone is to be made, and logged."""
    (repo / RECORD).unlink()
    done = stage(repo, "evaluate", "--dataset", "dtd")
    assert done.returncode == 0, done.stderr
    assert "MLflow tracking failed" not in done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("evaluate dtd: 1 of 4 evaluations (heba/base_to_novel-2-1), base_to_novel h heba ")
    return done


def test_an_evaluation_that_is_repeated_leaves_nothing_beside_the_model(finished, tmp_path):
    repo = breakable.copy(finished, tmp_path / "repo")
    evaluated_again(repo)
    (copy,) = repo.glob("mlartifacts/*/models/*/artifacts/artifacts/*/adapter.safetensors")
    assert copy.stat().st_nlink > 1
    ended = breakable.start(repo, "true")
    ended.communicate()
    copy.with_name(f".{copy.name}.{ended.pid}.tmp").write_bytes(b"of a killed process")
    evaluated_again(repo)
    assert breakable.left_over(repo) == []
    assert copy.samefile(repo / TRAINED / copy.name)


def files_of(folder):
    """Every file under `folder`, with what a write to it or a link to it would change."""
    states = ((p, p.lstat()) for p in sorted(folder.rglob("*")) if p.is_file())
    return {p: (state.st_ino, state.st_size, state.st_mtime_ns, state.st_nlink) for p, state in states}


def test_a_copied_repository_writes_nothing_into_the_original(finished, tmp_path):
    original, repo = breakable.copy(finished, tmp_path / "original"), tmp_path / "the copy"
    evaluated_again(original)  # makes the training's run, too
    assert stage(original, "register", TRAINED, "--name", "textures").returncode == 0
    shutil.copytree(original, repo, symlinks=True)
    before = files_of(original)
    evaluated = evaluated_again(repo)
    assert files_of(original) == before
    shutil.rmtree((repo / TRAINED).with_name("few_shot-1-1"))  # which the original has not logged
    trained = stage(repo, "train", "--dataset", "dtd", "--method", "heba", "--protocol", "few_shot")
    assert trained.returncode == 0, trained.stderr
    assert files_of(original) == before
    assert evaluated.stderr.count("was made elsewhere") == 1
    assert "was made elsewhere" not in trained.stderr
    assert breakable.runs(repo) == ["FINISHED", "FINISHED"]
    copies = list(repo.glob("mlartifacts/*/models/*/artifacts/artifacts/*/adapter.safetensors"))
    assert len(copies) == 2
    # Also what was logged before is the copy's own: the original may go.
    shutil.rmtree(original)
    code = "from pipeline.tracking.models import fetch_adapter; print(fetch_adapter('models:/textures/1'))"
    fetched = call(repo, sys.executable, "-c", code)
    assert fetched.returncode == 0, fetched.stderr
    assert Path(fetched.stdout.strip()).is_relative_to(repo)


@pytest.mark.slow
def test_a_tracking_server_that_is_down_goes_down_and_comes_back(finished, tmp_path):
    repo = breakable.copy(finished, tmp_path / "repo", but=[TRAIN])
    port = free_port()
    folder = tmp_path / "store"
    folder.mkdir()
    env = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"}
    train = [sys.executable, "-m", "pipeline", "train", *ONE]
    wanted = (finished / TRAINED / "adapter.safetensors").read_bytes()

    def status():
        return breakable.runs(folder)

    # Down from the start.
    done = call(repo, *train, **env)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("MLflow tracking failed") == 1
    shutil.rmtree(repo / TRAINED)
    # Down in the middle.
    with mlflow_server(folder, port):
        process = breakable.start(repo, *train, **env)
        wait_for(lambda: any(repo.glob(f"{CHECKPOINTS}/*.safetensors")) and status() == ["RUNNING"])
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert output.count("MLflow tracking failed") == 1
    assert (repo / TRAINED / "adapter.safetensors").read_bytes() == wanted
    assert status() == ["RUNNING"]
    # And back: the next stage goes on with the run that was cut off.
    (repo / RECORD).unlink()
    with mlflow_server(folder, port):
        done = stage(repo, "evaluate", "--dataset", "dtd", **env)
        assert done.returncode == 0, done.stderr
        assert "MLflow tracking failed" not in done.stderr
        assert status() == ["FINISHED"]
    assert not list((repo / ".heba" / "runs").glob("*.lock"))


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["drip", "lock held"])
def test_a_tracking_server_that_hangs_costs_a_stage_half_a_minute(finished, tmp_path, fault):
    repo = breakable.copy(finished, tmp_path / "repo", but=[TRAIN, EVALUATE])
    with ExitStack() as until:
        env = {}
        if fault == "drip":
            env["MLFLOW_TRACKING_URI"] = until.enter_context(faulty(fault))
        else:
            until.enter_context(broken_file(fault, repo))
        for command in (["train", "--dataset", "dtd", "--method", "heba"], ["evaluate", "--dataset", "dtd"]):
            begin = time.monotonic()
            done = stage(repo, *command, **env)
            assert time.monotonic() - begin < 3 * PATIENCE
            assert done.returncode == 0, done.stderr
            assert done.stderr.count("MLflow tracking failed") == 1
    wait_for(lambda: not working_in(repo))
    done = stage(repo, "track")
    assert done.returncode == 0, done.stderr
    assert breakable.runs(repo) == ["FINISHED"] * 9  # one is the summary
    complete(repo, finished)


@pytest.fixture
def mounted(tmp_path):
    """A function that mounts something at a folder until the test is over."""
    folders = []

    def mount(folder, *options):
        folder.mkdir(exist_ok=True)
        done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"this needs the right to mount: {done.stderr.strip()}")
        folders.append(folder)

    yield mount
    for folder in reversed(folders):
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(
    ("full", "name"),
    [
        ("out/precompute", "precompute@dtd"),
        (".heba", TRAIN),
        pytest.param("out/train/dtd/heba", TRAIN, marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_is_a_clear_error_and_nothing_is_lost(finished, tmp_path, mounted, full, name):
    repo = breakable.copy(finished, tmp_path / "repo", but=[name])
    kept = {p.name: p.read_bytes() for p in (repo / full).glob("*") if p.is_file()}
    mounted(repo / full, "-t", "tmpfs", "-o", "size=64k", "tmpfs")
    for file, content in kept.items():
        (repo / full / file).write_bytes(content)
    done = call(repo, "dvc", "repro", name)
    assert done.returncode != 0
    assert "cannot be written (No space left on device); make room and run the same again" in done.stderr
    assert "Traceback" not in done.stderr
    assert not breakable.left_over(repo)
    subprocess.run(["mount", "-o", "remount,size=64m", str(repo / full)], check=True)
    complete(repo, finished)


def test_a_full_disk_while_downloading_is_a_clear_error(tmp_path, mounted):
    repo = repository(tmp_path / "repo", ["eurosat", "dtd"], [])
    archives = repo / "data" / "archives" / "eurosat"
    archives.mkdir(parents=True)
    mounted(archives, "-t", "tmpfs", "-o", "size=4k", "tmpfs")
    download = ["download", "--dataset", "eurosat"]
    with serve() as web:
        for path in (repo / "mirror" / "eurosat").iterdir():
            web.files[f"eurosat/{path.name}"] = path.read_bytes()
        params = yaml.safe_load((repo / "params.yaml").read_text())
        params["data"]["mirror"] = web.url
        (repo / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
        done = stage(repo, *download)
        assert done.returncode == 1
        assert f"{archives} cannot be written (No space left on device); make room" in done.stderr
        assert "Traceback" not in done.stderr
        assert len(list(archives.glob("*.part"))) == 1
        subprocess.run(["mount", "-o", "remount,size=64m", str(archives)], check=True)
        done = stage(repo, *download)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_read_only_data_folder_is_enough_for_all_but_the_download(finished, tmp_path, mounted):
    repo = breakable.copy(finished, tmp_path / "repo", but=["precompute@dtd", TRAIN])
    data = repo / "data"
    mounted(data, "--bind", str(data))
    subprocess.run(["mount", "-o", "remount,ro,bind", str(data)], check=True)
    complete(repo, finished)
    done = stage(repo, "download", "--dataset", "dtd")
    assert done.returncode == 1
    assert f"{data / 'embedded' / 'dtd'} cannot be written (Read-only file system)" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [
        {"command": ["env", "-u", "HOME", "dvc", "repro"]},
        {"HOME": "/nonexistent", "TMPDIR": "/nonexistent"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"folder": 'it\'s "a" $HOME repo'},
    ],
    ids=["no HOME", "no folders", "locale C", "quotes"],
)
def test_odd_surroundings_change_nothing(finished, tmp_path, given):
    env = dict(given)
    command, folder = env.pop("command", ["dvc", "repro"]), env.pop("folder", "repo")
    repo = breakable.copy(finished, tmp_path / folder, but=[TRAIN, EVALUATE])
    done = call(repo, *command, **env)
    assert done.returncode == 0, done.stderr
    complete(repo, finished)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["worktree", "shallow clone"])
def test_dvc_repro_and_exp_run_in_other_kinds_of_checkouts(finished, tmp_path, how):
    repo, other = breakable.copy(finished, tmp_path / "repo"), tmp_path / "other"
    commands = {
        "worktree": ["git", "worktree", "add", "-q", str(other)],
        "shallow clone": ["git", "clone", "-q", "--depth", "1", f"file://{repo}", str(other)],
    }
    for command in (["git", "add", "-A"], ["git", "commit", "-qm", "all"], commands[how]):
        done = call(repo, *command)
        assert done.returncode == 0, done.stderr
    complete(other, finished)
    for where in ([], ["--temp"]):
        done = call(other, "dvc", "exp", "run", *where, "-S", "heba.lr=0.006")
        assert done.returncode == 0, done.stderr
    assert len(call(other, "dvc", "exp", "list", "--name-only").stdout.split()) >= 1
