"""The progress of a run's stages: a live table on a terminal, lines elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

STYLES = {
    "failed": "bold red",
    "runs": "bold green",
    "waits": "dim",
    "not reached": "yellow",
    "interrupted": "yellow",
}
ORDER = ["failed", "runs", "interrupted", "waits", "not reached", "done", "from the cache", "unchanged"]


class Progress:
    """The state of every stage and its seconds, shown while the block of `with` runs."""

    def __init__(self, stages: list[str]) -> None:
        self.console = Console()
        self.began = time.monotonic()
        self.state = dict.fromkeys(stages, "waits")
        self.where = dict.fromkeys(stages, "")
        self.since: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        self.live = Live(get_renderable=self.table, console=self.console, refresh_per_second=2, transient=True)

    def __enter__(self) -> "Progress":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.console.is_terminal:
            self.live.stop()
            self.console.print(self.table(rows=len(self.state)))

    def starts(self, stage: str, where: str) -> None:
        """`stage` runs; it may have been lost with its node and start again."""
        self.state[stage], self.where[stage], self.since[stage] = "runs", where, time.monotonic()

    def ends(self, stage: str, how: str) -> None:
        """`stage` is done, failed, from the cache, unchanged or not reached."""
        self.state[stage] = how
        took = ""
        if stage in self.since:
            self.seconds[stage] = time.monotonic() - self.since.pop(stage)
            took = f", {self.seconds[stage]:.1f} s" + (f" on {self.where[stage]}" if self.where[stage] else "")
        self.say(f"{stage}: {how}{took}")

    def say(self, text: str) -> None:
        """One line, where there is no table."""
        if not self.console.is_terminal:
            print(
                f"[{time.monotonic() - self.began:4.0f} s, {self.ended()} of {len(self.state)}] {text}", flush=True
            )

    def ended(self) -> int:
        return sum(how not in ("waits", "runs") for how in self.state.values())

    def table(self, rows: int | None = None) -> Table:
        """The stages that fit on the terminal: those that run, then those that wait."""
        rows = max(1, self.console.height - 6) if rows is None else rows
        now = time.monotonic()
        table = Table(
            title=f"{self.ended()} of {len(self.state)} stages, {now - self.began:.0f} s", title_justify="left"
        )
        for name in ("Stage", "State", "Where"):
            table.add_column(name, no_wrap=True)
        table.add_column("Seconds", justify="right")
        stages = sorted(self.state, key=lambda stage: ORDER.index(self.state[stage]))
        for stage in stages[:rows]:
            since = self.since.get(stage)
            seconds = self.seconds.get(stage) if since is None else now - since
            shown = "" if seconds is None else f"{seconds:.1f}"
            style = STYLES.get(self.state[stage])
            table.add_row(stage, self.state[stage], self.where[stage], shown, style=style)
        if len(stages) > rows:
            table.add_row(f"... and {len(stages) - rows} more", style="dim")
        return table
