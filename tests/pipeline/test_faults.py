"""What breaks a pipeline: each test does it, and looks at what is left."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import requests
import yaml

from pipeline.runner.warm import stage_server
from pipeline.tracking.background import PATIENCE
from tests.pipeline import breakable
from tests.pipeline.breakable import TRAIN, TRAINED
from tests.pipeline.repository import ROOT, call, stage, wait_for, working_in
from tests.pipeline.test_real import repository
from tests.pipeline.test_stalls import broken_file, faulty
from tests.server import serve

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc, and stages run in forks")
CHECKPOINTS = ".heba/checkpoints"


@pytest.fixture(scope="module")
def server():
    with stage_server(ROOT) as environment:
        breakable.wait_for_server(environment)
        yield environment


@pytest.fixture(scope="module")
def whole(tmp_path_factory, server):
    """A repository in which `dvc repro` ran without a break."""
    repo = breakable.make(tmp_path_factory.mktemp("faults") / "täst repo")
    done = call(repo, "dvc", "repro", **server)
    assert done.returncode == 0, done.stdout + done.stderr
    assert breakable.runs(repo) == ["FINISHED"]
    assert not breakable.left_over(repo)
    return repo


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
    """The adapter is there, and the run is still open."""
    return (repo / TRAINED).exists() and any(repo.glob(".heba/runs/*.lock"))


def is_training(repo):
    """An epoch is kept, and the run is open."""
    return any(repo.glob(f"{CHECKPOINTS}/*.safetensors")) and breakable.runs(repo) == ["RUNNING"]


MOMENTS = {
    "training": (TRAIN, is_training),
    "packing": ("precompute@dtd", exists("out/precompute/.dtd.*.tmp/images.npy")),
    "drawing": ("download@dtd", exists("data/embedded/.dtd.*.tmp/images/*/*")),
    "logging": (TRAIN, is_logging),
}


def interrupt(repo, server, name, reached, number):
    """Start `dvc repro` and send `number` to all its processes once `reached(repo)`."""
    process = breakable.start(repo, "dvc", "repro", name, **server)
    wait_for(lambda: reached(repo) or process.poll() is not None)
    assert process.poll() is None, process.stdout.read()
    os.killpg(process.pid, number)
    process.communicate(timeout=60)
    wait_for(lambda: not working_in(repo))
    assert process.returncode != 0


def complete(repo, whole, server):
    """`dvc repro` again ends as if nothing had been."""
    done = call(repo, "dvc", "repro", **server)
    assert done.returncode == 0, done.stdout + done.stderr
    assert breakable.outs(repo) == breakable.outs(whole)
    assert breakable.left_over(repo) == []
    assert not any((repo / CHECKPOINTS).glob("*"))
    assert "RUNNING" not in breakable.runs(repo)
    return done


@pytest.mark.parametrize("moment", MOMENTS)
def test_after_a_kill_the_next_run_ends_with_the_same_bytes(whole, server, empty_store, tmp_path, moment):
    name, reached = MOMENTS[moment]
    repo = breakable.copy(whole, tmp_path / "repo", but=[name])
    shutil.copy(empty_store, repo)
    if moment == "drawing":
        (repo / "data").rename(tmp_path / "drawn before")
    interrupt(repo, server, name, reached, signal.SIGKILL)
    if moment in ("packing", "drawing"):
        assert breakable.left_over(repo)  # so it did break in the middle
    done = complete(repo, whole, server)
    if moment == "training":
        assert "resuming from" in done.stderr + done.stdout
        assert breakable.runs(repo) == ["KILLED", "FINISHED"]
    if moment == "logging":
        assert len(breakable.runs(repo)) == 2


def test_a_kill_while_an_archive_is_unpacked_leaves_no_half_data_set(server, tmp_path):
    repo = repository(tmp_path / "repo", ["eurosat", "dtd"], [])
    download = [sys.executable, "-m", "pipeline", "download", "--dataset", "eurosat"]
    folder, manifest = repo / "data" / "real" / "eurosat", repo / "out" / "download" / "eurosat.json"
    done = call(repo, *download, **server)
    assert done.returncode == 0, done.stderr
    wanted = manifest.read_bytes()

    def killed():
        """Whether the kill came in time."""
        shutil.rmtree(folder)
        manifest.unlink()
        process = breakable.start(repo, *download, **server)
        wait_for(lambda: any(folder.parent.glob(".eurosat.*.tmp/raw")) or process.poll() is not None)
        process.kill()
        process.communicate()
        wait_for(lambda: not working_in(repo))
        return not manifest.exists() and not folder.exists()

    assert any(killed() for _ in range(5))
    assert breakable.left_over(repo)
    done = call(repo, *download, **server)
    assert done.returncode == 0, done.stderr
    assert manifest.read_bytes() == wanted
    assert breakable.left_over(repo) == []


def test_after_ctrl_c_the_next_run_ends_with_the_same_bytes(whole, server, empty_store, tmp_path):
    repo = breakable.copy(whole, tmp_path / "repo", but=[TRAIN])
    shutil.copy(empty_store, repo)
    interrupt(repo, server, *MOMENTS["training"], signal.SIGINT)
    assert breakable.runs(repo) == ["FAILED"]
    assert "resuming from" in complete(repo, whole, server).stderr


@pytest.mark.slow
def test_ctrl_c_stops_the_parallel_repro(whole, tmp_path):
    repo = breakable.copy(whole, tmp_path / "repo", but=[TRAIN])
    process = breakable.start(repo, sys.executable, "-m", "pipeline", "repro", "--jobs", "2")
    wait_for(lambda: any(repo.glob(f"{CHECKPOINTS}/*.safetensors")))
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    wait_for(lambda: not working_in(repo))
    assert process.returncode == 130
    complete(repo, whole, {})


@pytest.mark.slow
def test_a_run_whose_training_is_never_repeated_is_closed_too(whole, server, empty_store, tmp_path):
    repo = breakable.copy(whole, tmp_path / "repo", but=[TRAIN])
    shutil.copy(empty_store, repo)
    interrupt(repo, server, *MOMENTS["training"], signal.SIGKILL)
    assert breakable.runs(repo) == ["RUNNING"]
    params = (repo / "params.yaml").read_text()
    (repo / "params.yaml").write_text(params.replace("lr: 0.0075", "lr: 0.005", 1))
    done = stage(repo, "train", "--dataset", "dtd", "--seed", "1", **server)
    assert done.returncode == 0, done.stderr
    assert breakable.runs(repo) == ["KILLED", "FINISHED"]


@pytest.mark.slow
def test_two_dvc_repro_at_once(whole, server, tmp_path):
    repo = breakable.copy(whole, tmp_path / "repo", but=["precompute@dtd", TRAIN, "evaluate@dtd"])
    both = [breakable.start(repo, "dvc", "repro", **server) for _ in range(2)]
    outputs = [process.communicate(timeout=300)[0] for process in both]
    for process, output in zip(both, outputs, strict=True):
        assert process.returncode == 0 or "Unable to acquire lock" in output or "is busy" in output, output
        assert "Traceback" not in output
    complete(repo, whole, server)


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
    ("out/train/dtd/trainings.json", "evaluate", "split@dtd"),
    (f"{TRAINED}/adapter.safetensors", "evaluate", "train again"),
    (f"{TRAINED}/config.json", "evaluate", "train again"),
]


@pytest.fixture(scope="module")
def broken(whole, tmp_path_factory):
    return breakable.copy(whole, tmp_path_factory.mktemp("broken") / "repo")


@pytest.mark.parametrize(("file", "command", "remedy"), DAMAGES)
def test_a_damaged_out_is_named_with_the_remedy(broken, server, file, command, remedy):
    path = broken / file
    kept = path.read_bytes()
    options = ["--seed", "1"] if command == "train" else []
    try:
        for how in ("half", "nonsense", "empty"):
            damage(path, how)
            done = stage(broken, command, "--dataset", "dtd", *options, **server)
            assert done.returncode == 1, how
            assert file in done.stderr
            assert remedy in done.stderr
            assert "Traceback" not in done.stderr
    finally:
        path.write_bytes(kept)


def test_a_damaged_checkpoint_is_named(broken, server):
    train = ["train", "--dataset", "dtd", "--seed", "1"]
    process = breakable.start(broken, sys.executable, "-m", "pipeline", *train, **server)
    (path,) = wait_for(lambda: list((broken / CHECKPOINTS).glob("*.safetensors")))
    process.kill()
    process.communicate()
    wait_for(lambda: not working_in(broken))
    damage(path, "half")
    done = stage(broken, *train, **server)
    assert done.returncode == 1
    assert f"{path}: damaged checkpoint" in done.stderr
    assert "delete it" in done.stderr
    path.unlink()


@pytest.mark.parametrize("part", ["test", "train"])
def test_a_truncated_image_is_named(broken, server, part):
    from heba.data.splits import read_split

    images = broken / "data" / "embedded" / "dtd" / "images"
    sample = broken / ("out/split/dtd/2-1.json" if part == "train" else "data/embedded/dtd/split.json")
    file = read_split(sample)[part][0][0]
    kept = (images / file).read_bytes()
    damage(images / file, "half")
    command = (
        ["train", "--dataset", "dtd", "--seed", "1"] if part == "train" else ["precompute", "--dataset", "dtd"]
    )
    done = stage(broken, *command, **server)
    (images / file).write_bytes(kept)
    assert done.returncode == 1
    assert file in done.stderr
    assert "download@dtd" in done.stderr or "restore the file" in done.stderr
    assert "Traceback" not in done.stderr


def test_mend_removes_what_dvc_would_trust(whole, server, tmp_path):
    repo = breakable.copy(whole, tmp_path / "repo")
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
    complete(repo, whole, server)
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
    complete(repo, whole, server)


def test_an_evaluation_that_is_repeated_leaves_nothing_beside_the_model(whole, server, tmp_path):
    repo = breakable.copy(whole, tmp_path / "repo")
    evaluate = ["evaluate", "--dataset", "dtd"]
    assert stage(repo, *evaluate, **server).returncode == 0
    (copy,) = repo.glob("mlartifacts/*/models/*/artifacts/artifacts/*/adapter.safetensors")
    assert copy.stat().st_nlink > 1
    ended = breakable.start(repo, "true")
    ended.communicate()
    copy.with_name(f".{copy.name}.{ended.pid}.tmp").write_bytes(b"of a killed process")
    done = stage(repo, *evaluate, **server)
    assert done.returncode == 0
    assert "MLflow tracking failed" not in done.stderr
    assert breakable.left_over(repo) == []
    assert copy.samefile(repo / TRAINED / copy.name)


def files_of(folder):
    """Every file under `folder`, with what a write to it or a link to it would change."""
    states = ((p, p.lstat()) for p in sorted(folder.rglob("*")) if p.is_file())
    return {p: (state.st_ino, state.st_size, state.st_mtime_ns, state.st_nlink) for p, state in states}


def test_a_copied_repository_writes_nothing_into_the_original(whole, server, tmp_path):
    original, repo = breakable.copy(whole, tmp_path / "original"), tmp_path / "the copy"
    adapter = ["--dataset", "dtd"]
    assert stage(original, "evaluate", *adapter, **server).returncode == 0  # makes the training's run, too
    assert stage(original, "register", TRAINED, "--name", "textures", **server).returncode == 0
    shutil.copytree(original, repo, symlinks=True)
    before = files_of(original)
    evaluated = stage(repo, "evaluate", *adapter, **server)
    assert evaluated.returncode == 0, evaluated.stderr
    assert files_of(original) == before
    trained = stage(repo, "train", *adapter, "--seed", "1", **server)
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


@contextmanager
def mlflow_server(folder, port):
    options = {
        "--host": "127.0.0.1",
        "--port": str(port),
        "--workers": "1",
        "--backend-store-uri": f"sqlite:///{folder / 'mlflow.db'}",
        "--artifacts-destination": str(folder / "artifacts"),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *(part for option in options.items() for part in option)],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )

    def answers():
        with suppress(requests.RequestException):
            return requests.get(f"http://127.0.0.1:{port}/health", timeout=1).ok

    try:
        wait_for(answers)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_a_tracking_server_that_is_down_goes_down_and_comes_back(whole, server, tmp_path):
    repo = breakable.copy(whole, tmp_path / "repo", but=[TRAIN])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path / "store"
    folder.mkdir()
    env = server | {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"}
    train = [sys.executable, "-m", "pipeline", "train", "--dataset", "dtd", "--seed", "1"]
    wanted = (whole / TRAINED / "adapter.safetensors").read_bytes()

    def status():
        return breakable.runs(folder)

    # Down from the start.
    done = call(repo, *train, **env)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("MLflow tracking failed") == 1
    # Down in the middle.
    with mlflow_server(folder, port):
        process = breakable.start(repo, *train, **env)
        wait_for(lambda: any(repo.glob(f"{CHECKPOINTS}/*.safetensors")) and status() == ["RUNNING"])
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert output.count("MLflow tracking failed") == 1
    assert (repo / TRAINED / "adapter.safetensors").read_bytes() == wanted
    assert status() == ["RUNNING"]
    # And back: the next stage closes the run that was cut off, and logs what is missing.
    with mlflow_server(folder, port):
        done = stage(repo, "evaluate", "--dataset", "dtd", **env)
        assert done.returncode == 0, done.stderr
        assert "MLflow tracking failed" not in done.stderr
        assert status() == ["KILLED", "FINISHED"]
    assert not list((repo / ".heba" / "runs").glob("*.lock"))


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["drip", "lock held"])
def test_a_tracking_server_that_hangs_costs_a_stage_half_a_minute(whole, server, tmp_path, fault):
    repo = breakable.copy(whole, tmp_path / "repo", but=[TRAIN])
    with ExitStack() as until:
        if fault == "drip":
            env = server | {"MLFLOW_TRACKING_URI": until.enter_context(faulty(fault))}
        else:
            until.enter_context(broken_file(fault, repo))
            env = server
        for command in (["train", "--dataset", "dtd", "--seed", "1"], ["evaluate", "--dataset", "dtd"]):
            begin = time.monotonic()
            done = stage(repo, *command, **env)
            assert time.monotonic() - begin < 3 * PATIENCE
            assert done.returncode == 0, done.stderr
            assert done.stderr.count("MLflow tracking failed") == 1
    wait_for(lambda: not working_in(repo))
    done = stage(repo, "track", **server)
    assert done.returncode == 0, done.stderr
    assert breakable.runs(repo) == ["FINISHED"]
    complete(repo, whole, server)


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
        pytest.param("out/train/dtd", TRAIN, marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_is_a_clear_error_and_nothing_is_lost(whole, server, tmp_path, mounted, full, name):
    repo = breakable.copy(whole, tmp_path / "repo", but=[name])
    kept = {p.name: p.read_bytes() for p in (repo / full).glob("*") if p.is_file()}
    mounted(repo / full, "-t", "tmpfs", "-o", "size=64k", "tmpfs")
    for file, content in kept.items():
        (repo / full / file).write_bytes(content)
    done = call(repo, "dvc", "repro", name, **server)
    assert done.returncode != 0
    assert "cannot be written (No space left on device); make room and run the same again" in done.stderr
    assert "Traceback" not in done.stderr
    assert not breakable.left_over(repo)
    subprocess.run(["mount", "-o", "remount,size=64m", str(repo / full)], check=True)
    complete(repo, whole, server)


def test_a_full_disk_while_downloading_is_a_clear_error(server, tmp_path, mounted):
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
        done = stage(repo, *download, **server)
        assert done.returncode == 1
        assert f"{archives} cannot be written (No space left on device); make room" in done.stderr
        assert "Traceback" not in done.stderr
        assert len(list(archives.glob("*.part"))) == 1
        subprocess.run(["mount", "-o", "remount,size=64m", str(archives)], check=True)
        done = stage(repo, *download, **server)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_read_only_data_folder_is_enough_for_all_but_the_download(whole, server, tmp_path, mounted):
    repo = breakable.copy(whole, tmp_path / "repo", but=["precompute@dtd", TRAIN])
    data = repo / "data"
    mounted(data, "--bind", str(data))
    subprocess.run(["mount", "-o", "remount,ro,bind", str(data)], check=True)
    complete(repo, whole, server)
    done = stage(repo, "download", "--dataset", "dtd", **server)
    assert done.returncode == 1
    assert f"{data / 'embedded' / 'dtd'} cannot be written (Read-only file system)" in done.stderr
    assert "Traceback" not in done.stderr
