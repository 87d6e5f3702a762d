"""The demo's live display on a terminal; a line now and then where there is none."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Self

from services.demo.progress import Progress, Running

if TYPE_CHECKING:
    from rich.console import RenderableType

LINE_EVERY_S = 10.0


class Screen:
    """Shows phases, what dies and starts again, and progress. On stderr, so that ``--json`` owns stdout."""

    def __init__(self, windows: int, agents: int, *, quiet: bool = False) -> None:
        from rich.console import Console
        from rich.live import Live

        self.windows = windows
        self.agents = agents
        self.quiet = quiet
        self.console = Console(stderr=True, highlight=False)
        self._live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal and not quiet else None
        self._phase = "starting broker, database and eight services"
        self._progress = Progress()
        self._restarts: Mapping[str, int] = {}
        self._began: tuple[float, int] | None = None
        self._said_at = 0.0

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        self.phase(self._phase)
        return self

    def __exit__(self, *exception: object) -> None:
        self.finish()

    def finish(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def say(self, text: str) -> None:
        """A line that stays: restarts and whatever else one should have seen."""
        self.console.print(text, markup=False)

    def phase(self, words: str) -> None:
        self._phase = words
        if self._live:
            self._refresh()
        elif not self.quiet:
            self.say(f"- {words}")

    def begin(self, begin: float, window_s: int) -> None:
        """The first window's start and the windows' length: the progress bar runs by the clock."""
        self._began = (begin, window_s)

    def show(self, progress: Progress, restarts: Mapping[str, int]) -> None:
        changed = _standing(progress) != _standing(self._progress)
        self._progress, self._restarts = progress, dict(restarts)
        if self._live:
            self._refresh()
        elif not self.quiet and (changed or time.monotonic() - self._said_at > LINE_EVERY_S):
            self._said_at = time.monotonic()
            self.say(f"  window {self.window_now}/{self.windows}: {one_line(progress)}")

    @property
    def window_now(self) -> int:
        if self._began is None:
            return 0
        return max(0, min(self.windows, int((time.time() - self._began[0]) // self._began[1]) + 1))

    def _refresh(self) -> None:
        assert self._live is not None
        self._live.update(self.picture(), refresh=True)

    def picture(self) -> RenderableType:
        """Everything at once: the loop's counters, and a row a version."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        p = self._progress
        head = Table.grid(padding=(0, 2))
        head.add_row(Text("Ratchet", style="bold"), self._phase)
        bar = Table.grid(padding=(0, 2))
        bar.add_row(
            f"windows {self.window_now}/{self.windows}", ProgressBar(total=self.windows, completed=p.measured, width=40)
        )
        training = f"training {p.training}" if p.training else f"{p.batches} trained"
        counts = Table.grid(padding=(0, 3))
        counts.add_row(
            f"closed {p.closed}, resolved {p.settled}, measured {p.measured}",
            f"trajectories {p.trajectories}",
            f"groups {p.groups} ({p.ties} ties)",
            f"judge {p.judge or '-'}",
            f"batches: {training}",
        )
        table = Table(box=None, pad_edge=False, padding=(0, 2))
        for column in ("version", "state", "share", "windows", "reward", "95 %", "against its control"):
            table.add_column(column, justify="left" if column in ("version", "state") else "right")
        for version in p.versions:
            table.add_row(*_row(version))
        died = ", ".join(f"{name} {count}x" for name, count in self._restarts.items())
        parts: list[RenderableType] = [head, bar, counts, table]
        if died:
            parts.append(Text(f"started again: {died}", style="yellow"))
        return Group(*parts)


def _row(version: Running) -> tuple[str, ...]:
    interval = version.reward
    return (
        version.version,
        version.state if version.state != "rolled_back" else f"rolled back: {version.reason}",
        f"{version.share:.0%}",
        str(version.windows),
        "-" if version.mean is None else f"{version.mean:+.3f}",
        f"[{interval.lower:+.3f}, {interval.upper:+.3f}]" if interval else "-",
        against(version),
    )


def against(version: Running) -> str:
    """A candidate's evidence: its difference to the control and the interval that holds at every look."""
    evidence = version.evidence
    if not evidence.get("n"):
        return "-"
    lower, upper = evidence.get("lower"), evidence.get("upper")
    bounds = "" if lower is None or upper is None else f" [{lower:+.3f}, {upper:+.3f}]"
    return f"{evidence['mean']:+.3f}{bounds} in {evidence['n']} windows"


def _standing(progress: Progress) -> list[tuple[str, str]]:
    return [(version.version, version.state) for version in progress.versions]


def one_line(progress: Progress) -> str:
    versions = "; ".join(
        f"{v.version} {v.state} {v.share:.0%} {'-' if v.mean is None else format(v.mean, '+.3f')}"
        for v in progress.versions
    )
    judge = progress.judge or "-"
    return (
        f"{progress.trajectories} trajectories, {progress.groups} groups judged by {judge}, "
        f"{progress.batches} batches; {versions}"
    )
