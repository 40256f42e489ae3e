"""Kill random processes at random times: `python -m tests.torture --rounds 100 --seed 0`.

A round starts a command in a copy of a small repository in which four stages have not run, sends a signal to one
of the processes that work there, does what `doctor` says, and gives the same command again. Then every out must
have the bytes of a run without a fault, every training its MLflow run, and nothing may be left over. What a round
did stands in a line; `--only 7` does round 7 alone. Linux only.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import yaml
from mlflow.tracking import MlflowClient

from pipeline.runner import dvc_locks, gitlock, lockfile
from pipeline.runner.warm import SERVER, stage_server
from tests.pipeline import breakable
from tests.pipeline.repository import ROOT, call, stage, wait_for

LEFT_TO_DO = ["precompute@dtd", "train@dtd-heba", "evaluate@dtd", "report"]
CHANGE = ["-S", "heba.lr=0.007"]
PIPELINE = [sys.executable, "-m", "pipeline"]
COMMANDS = {
    "dvc repro": ["dvc", "repro"],
    "dvc exp run": ["dvc", "exp", "run", *CHANGE],
    "dvc queue": ["dvc", "queue", "start", "-j", "1"],
    "pipeline repro": [*PIPELINE, "repro", "--jobs", "2"],
}
QUEUE = ["dvc", "exp", "run", "--queue", *CHANGE]
STATES = ("Queued", "Running", "Success", "Failed")
EXPERIMENT = re.compile(r" refs/exps/[0-9a-f]{2}/")
SIGNALS = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
PATIENCE = 240.0  # seconds for a command to end
SOCKETS = "heba-*"  # folders of stage servers in the temporary folder


class Result(NamedTuple):
    """What a run without a fault, or a round, leaves behind."""

    outs: dict
    finished: int  # MLflow runs
    open_runs: int
    left: list[str]


def working_under(folder: Path) -> list[psutil.Process]:
    """Processes whose working folder is `folder` or below."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if Path(process.cwd()).is_relative_to(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def left_files(repo: Path) -> list[str]:
    """What lies in .dvc/tmp, .git and beside the outs, without what each run names anew."""
    lasting = {"lock", "rwlock", "rwlock.lock", "btime", "cache", "dag.md"}
    tmp = repo / ".dvc" / "tmp"
    found = [f"tmp {p.name}" for p in tmp.glob("*") if p.name not in lasting and p.name != "exps"]
    found += [f"workspace {p.name}" for p in (tmp / "exps").glob("*") if p.name.startswith(("tmp", "exec"))]
    found += [str(p.relative_to(repo)) for p in breakable.left_over(repo)]
    found += [f"tmp {p.name}" for p in tmp.glob(".*.tmp")]
    found += [f"checkpoint {p.name}" for p in (repo / ".heba" / "checkpoints").glob("*")]
    found += [f"run {p.name}" for p in (repo / ".heba" / "runs").glob("*.lock")]
    found += [f"git {p.name}" for p in (repo / ".git").glob("*.lock")]
    refs = call(repo, "git", "for-each-ref", "--format=%(refname)").stdout.split()
    found += [ref for ref in refs if ref.startswith(("refs/exps/exec", "refs/stash", "refs/exps/stash"))]
    held = json.loads((tmp / "rwlock").read_text() or "{}") if (tmp / "rwlock").exists() else {}
    # DVC removes what a dead process held when somebody wants it.
    held = [
        by for kind in held.values() for one in kind.values() for by in (one if isinstance(one, list) else [one])
    ]
    found += [f"rwlock {by['pid']}" for by in held if psutil.pid_exists(by["pid"])]
    return sorted(found)


def result(repo: Path, name: str) -> Result:
    runs = Counter(breakable.runs(repo))
    outs = breakable.outs(repo)
    if name in ("dvc exp run", "dvc queue"):
        shown = call(repo, "git", "for-each-ref", "--format=%(objectname) %(refname)", "refs/exps").stdout
        shown = [line.split()[0] for line in shown.splitlines() if EXPERIMENT.search(line)]
        locks = [call(repo, "git", "show", f"{commit}:dvc.lock").stdout for commit in shown]
        found = {
            json.dumps([entry["outs"] for entry in yaml.safe_load(lock)["stages"].values()]) for lock in locks
        }
        outs = {"experiments": found} | ({} if name == "dvc queue" else outs)
    return Result(outs, runs["FINISHED"], runs["RUNNING"], left_files(repo))


def fresh(base: Path, repo: Path, name: str) -> None:
    """A copy in which LEFT_TO_DO has not run, committed, and with the experiment queued."""
    breakable.copy(base, repo, but=LEFT_TO_DO)
    shutil.copy(base.parent / "mlflow.db", repo)
    for command in (["git", "add", "-A"], ["git", "commit", "-qm", "to do"]):
        call(repo, *command)
    if name == "dvc queue":
        queued = call(repo, *QUEUE)
        assert queued.returncode == 0, queued.stderr


def tasks(repo: Path) -> list[str]:
    """The states of the queued experiments."""
    lines = call(repo, "dvc", "queue", "status").stdout.splitlines()
    return [line.split()[-1] for line in lines if line.strip().endswith(STATES)]


def begin(repo: Path, name: str) -> subprocess.Popen:
    with (repo.parent / f"{repo.name}.log").open("ab") as log:
        return subprocess.Popen(
            COMMANDS[name],
            cwd=repo,
            env=breakable.environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def ended(process: subprocess.Popen, repo: Path) -> bool:
    """Whether the command and all that it started have come to their end, in time."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(PATIENCE)
        until = time.monotonic() + PATIENCE
        while working_under(repo):
            if time.monotonic() > until:
                return False
            time.sleep(0.1)
        return True
    return False


def unbroken(base: Path, folder: Path, name: str) -> tuple[Result, float]:
    """What the command leaves without a fault, and the seconds that it takes."""
    repo = folder / f"unbroken {name}"
    fresh(base, repo, name)
    start = time.monotonic()
    process = begin(repo, name)
    assert ended(process, repo), name
    seconds = time.monotonic() - start
    assert process.returncode == 0, (folder / f"{repo.name}.log").read_text()
    found = result(repo, name)
    shutil.rmtree(repo)
    return found, seconds


def strike(repo: Path, process: subprocess.Popen, draw: random.Random, seconds: float, plain: bool) -> str:
    """Send a random signal to a random process at a random time; or kill plain DVC while it writes dvc.lock."""
    lock = repo / "dvc.lock"
    start = time.monotonic()
    if plain and draw.random() < 0.3:  # by itself, this moment is rarely met
        writes, size = draw.randint(1, 3), lock.stat().st_size
        while process.poll() is None and time.monotonic() - start < seconds:
            with suppress(FileNotFoundError):
                now = lock.stat().st_size
                writes -= now < size
                size = now
            if writes <= 0:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
                return f"SIGKILL {process.pid} while dvc.lock has {lock.stat().st_size} bytes"
        return "came too late"
    wait = draw.uniform(0, 0.8 * seconds)
    number = draw.choice(SIGNALS)
    while process.poll() is None and time.monotonic() - start < wait:
        time.sleep(0.005)
    found = working_under(repo)
    if not found:
        return "came too late"
    target = draw.choice(sorted(found, key=lambda one: one.pid))
    with suppress(psutil.Error, OSError):
        words = " ".join(word.rpartition("/")[2] for word in target.cmdline()[:6])
        target.send_signal(number)
        return f"{number.name} at {time.monotonic() - start:.1f} s to {words}"
    return "came too late"


def again(repo: Path, name: str) -> tuple[bool, str]:
    """What a user does: look, mend if doctor says so, and the same command. Whether it mended, and what failed."""
    mended = needs_mending(repo)
    if mended and (done := stage(repo, "mend")).returncode:
        return True, f"mend: {done.stderr.strip()}"
    if name == "dvc queue":
        requeue(repo)
    process = begin(repo, name)
    if not ended(process, repo):
        return mended, "it did not end: " + ", ".join(" ".join(one.cmdline()[:6]) for one in working_under(repo))
    if process.returncode:
        said = (repo.parent / f"{repo.name}.log").read_text().strip().splitlines()
        return mended, " / ".join(line for line in said if "rror" in line)[-400:]
    return mended, ""


def needs_mending(repo: Path) -> bool:
    """What doctor says; it takes long, so that it is asked in half of the rounds in which nothing is wrong."""
    damaged = lockfile.damage(repo) or dvc_locks.rwlock_damage(repo) or gitlock.damage(repo)
    if repo.stat().st_ino % 2 and not damaged:
        return False
    seen = stage(repo, "doctor").stdout
    return "pipeline mend" in next(line for line in seen.splitlines() if line[6:].startswith("DVC:"))


def requeue(repo: Path) -> None:
    """A task that a killed worker had is neither done nor waiting: it is queued again."""
    states = tasks(repo)
    if "Success" in states or "Queued" in states:
        return
    call(repo, "dvc", "queue", "remove", "--all")
    queued = call(repo, *QUEUE)
    assert queued.returncode == 0, queued.stderr


def one(base: Path, folder: Path, name: str, wanted: Result, seconds: float, draw: random.Random) -> tuple:
    """A round: what was done, whether it needed mending, and what is wrong in the end."""
    repo = folder / "round"
    shutil.rmtree(repo, ignore_errors=True)
    repo.with_name("round.log").unlink(missing_ok=True)
    fresh(base, repo, name)
    sockets = set(Path(tempfile.gettempdir()).glob(SOCKETS))
    process = begin(repo, name)
    struck = strike(repo, process, draw, seconds, name in ("dvc repro", "dvc exp run"))
    if not ended(process, repo):
        left = working_under(repo)
        for process_ in left:
            process_.kill()
        return struck, False, f"{len(left)} processes did not end"
    mended, failed = again(repo, name)
    if failed:
        return struck, mended, failed
    if Counter(breakable.runs(repo))["FINISHED"] < wanted.finished:  # it was struck while it logged
        stage(repo, "track")
        struck += ", tracked"
    problems = []
    found = result(repo, name)
    if found.outs != wanted.outs:
        both = found.outs.keys() | wanted.outs.keys()
        other = sorted(key for key in both if found.outs.get(key) != wanted.outs.get(key))
        problems.append(f"other bytes: {other[:5]}")
    if (found.finished, found.open_runs) != (wanted.finished, 0):
        problems.append(f"{found.finished} of {wanted.finished} MLflow runs, {found.open_runs} open")
    if more := sorted(set(found.left) - set(wanted.left)):
        problems.append(f"left over: {more[:5]}")
    if more := set(Path(tempfile.gettempdir()).glob(SOCKETS)) - sockets:
        problems.append(f"sockets: {sorted(map(str, more))}")
    return struck, mended, "; ".join(problems)


def torture(folder: Path, rounds: list[int], seed: int, names: list[str]) -> list[str]:
    """Do these rounds in `folder` and print a line each and a table; returns what failed."""
    base = folder / "base"
    if not base.exists():
        params = breakable.alone(breakable.small_params())
        params["heba"]["epochs"] = 8
        breakable.make(base, params)
        MlflowClient(f"sqlite:///{folder / 'mlflow.db'}").search_experiments()  # a store without runs
        done = stage(base, "repro", "--jobs", "2")
        assert done.returncode == 0, done.stderr
    known = {name: unbroken(base, folder, name) for name in names}
    for name, (wanted, seconds) in known.items():
        print(f"{name}: {seconds:.0f} s, {wanted.finished} runs, left {wanted.left}", flush=True)
    table = {name: Counter() for name in names}
    failures = []
    for number in rounds:
        name = names[number % len(names)]
        draw = random.Random(f"{seed} {number}")
        struck, mended, failed = one(base, folder, name, *known[name], draw)
        print(f"seed {seed} round {number} {name}: {struck}{', mended' * mended}: {failed or 'ok'}", flush=True)
        counts = {"rounds": 1, "kills": struck != "came too late", "mends": mended, "failures": bool(failed)}
        table[name].update({key: int(value) for key, value in counts.items()})
        if failed:
            failures.append(f"round {number}: {failed}")
            shutil.copytree(folder / "round", folder / f"failed {number}", symlinks=True)
            shutil.copy(folder / "round.log", folder / f"failed {number}.log")
    print(f"{'command':16}{'rounds':>8}{'kills':>8}{'mends':>8}{'failures':>10}")
    for name, row in table.items():
        print(f"{name:16}{row['rounds']:8}{row['kills']:8}{row['mends']:8}{row['failures']:10}")
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="number of the first round")
    parser.add_argument("--only", type=int, help="this round alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", default=",".join(COMMANDS), help="some of these, with commas between")
    parser.add_argument(
        "--own-servers", action="store_true", help="each DVC starts a server for its stages; slower"
    )
    parser.add_argument("--folder", type=Path, help="is kept; default: a temporary one")
    args = parser.parse_args()
    rounds = [args.only] if args.only is not None else list(range(args.first, args.first + args.rounds))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what starts in the background ignores it
    with tempfile.TemporaryDirectory(prefix="torture-") as temporary:
        if not args.own_servers:
            environment = stage_server(ROOT)
            wait_for(Path(environment[SERVER]).exists)
            os.environ.update(environment)
        folder = (args.folder or Path(temporary)).absolute()
        folder.mkdir(exist_ok=True)
        tempfile.tempdir = os.environ["TMPDIR"] = str(folder / "tmp")  # what lies there is ours
        Path(tempfile.tempdir).mkdir(exist_ok=True)
        failures = torture(folder, rounds, args.seed, args.commands.split(","))
    sys.exit("\n".join(failures) or 0)


if __name__ == "__main__":
    main()
