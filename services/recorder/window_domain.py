"""When a window may close: pure functions of the clock, the stream's place and what is known of the window's runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from shared.windows import Window, window_at

IDLE_WINDOWS = 1000  # how far back quiet windows are filled in after a pause


@dataclass(frozen=True)
class OpenWindow:
    """What is known of a window that has not closed. Runs that are late count for nothing here."""

    window_id: str
    ends_at: datetime
    close_requested: bool = False
    barrier_created: datetime | None = None
    barrier_sequence: int | None = None
    newest_open_start: datetime | None = None  # of its runs that have not ended, the last to start
    last_end_sequence: int = 0  # of its runs that have ended, the last end's place in the stream


@dataclass(frozen=True)
class Wait:
    """Not yet; ``why`` is for the log and for operators."""

    why: str


@dataclass(frozen=True)
class ReadBarrier:
    """The deadline has passed: what the stream holds now belongs to the window, what comes later is late."""


@dataclass(frozen=True)
class Close:
    pass


Move = Wait | ReadBarrier | Close


def deadline_passed(window: OpenWindow, now: datetime, *, grace_s: float, limit_s: float) -> Wait | None:
    """None when ``now >= end + grace`` (or closing was asked for) and each run has ended or had its time."""
    if not window.close_requested and now < window.ends_at + timedelta(seconds=grace_s):
        return Wait("its end and the grace after it have not passed")
    if window.newest_open_start is not None and now < window.newest_open_start + timedelta(seconds=limit_s):
        return Wait("a run has neither ended nor reached its time limit")
    return None


def next_move(
    window: OpenWindow, now: datetime, *, grace_s: float, limit_s: float, stream_created: datetime, floor: int
) -> Move:
    """Invariant 4: deadline, then the barrier, then ``floor >= max(barrier, last end)``, then closed.

    ``floor``: every event up to it is stored or dead. The last end may lie beyond the barrier where a run of the
    backlog became known only after it was read; what that run sent before its end is then below the floor too.
    """
    if wait := deadline_passed(window, now, grace_s=grace_s, limit_s=limit_s):
        return wait
    if window.barrier_sequence is None or window.barrier_created != stream_created:
        return ReadBarrier()
    if floor < max(window.barrier_sequence, window.last_end_sequence):
        return Wait("events below its barrier are not all stored")
    return Close()


def missing_windows(first: datetime, known: Iterable[datetime], now: datetime, length_s: int) -> list[Window]:
    """The windows from that of ``first`` to that of ``now`` without a ``known`` start, IDLE_WINDOWS back at most."""
    current = window_at(now, length_s)
    horizon = current.starts_at - timedelta(seconds=length_s * IDLE_WINDOWS)
    window, starts = window_at(max(first, horizon), length_s), set(known)
    missing = []
    while window <= current:
        if window.starts_at not in starts:
            missing.append(window)
        window = window.next()
    return missing
