"""Time windows: which one an instant lies in, and what it is called. Used by whoever groups or routes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from shared.errors import GiveUpError

DEFAULT_LENGTH_S = 3600
MAX_CLOCK_AHEAD_S = 300.0
EARLIEST = datetime(2000, 1, 1, tzinfo=UTC)  # nothing that is recorded happened before


@dataclass(frozen=True, order=True)
class Window:
    """[starts_at, ends_at), UTC."""

    starts_at: datetime
    length_s: int

    @property
    def ends_at(self) -> datetime:
        return self.starts_at + timedelta(seconds=self.length_s)

    @property
    def window_id(self) -> str:
        """``2026-11-20T10:00`` where windows are hourly; any other length stands in the id, ``...~900s``.

        A changed length can therefore never reuse an id. Seconds appear where windows are not whole minutes.
        """
        timespec = "seconds" if self.length_s % 60 else "minutes"
        stamp = self.starts_at.replace(tzinfo=None).isoformat(timespec=timespec)
        return stamp if self.length_s == DEFAULT_LENGTH_S else f"{stamp}~{self.length_s}s"

    def next(self) -> Window:
        return Window(self.ends_at, self.length_s)

    def previous(self) -> Window:
        return Window(self.starts_at - timedelta(seconds=self.length_s), self.length_s)


def window_at(instant: datetime, length_s: int) -> Window:
    """The window that holds ``instant``: UTC seconds since 1970, floored to a multiple of ``length_s``."""
    seconds = math.floor(instant.timestamp() / length_s) * length_s
    return Window(datetime.fromtimestamp(seconds, UTC), length_s)


def window_of_id(window_id: str) -> Window:
    """The window that an id names. Raises GiveUpError for what is no window id."""
    stamp, _, length = window_id.partition("~")
    try:
        length_s = int(length.removesuffix("s")) if length else DEFAULT_LENGTH_S
        window = window_at(datetime.fromisoformat(stamp).replace(tzinfo=UTC), length_s)
        named = window.window_id == window_id and max(EARLIEST, window.starts_at) < window.ends_at
    except (ValueError, OverflowError, ZeroDivisionError):
        named = False
    if not named:
        raise GiveUpError(f"{window_id[:60]!r} is no window id; one looks like 2026-11-20T10:00")
    return window


def placed_at(said_at: datetime, received_at: datetime) -> tuple[datetime, bool]:
    """When something counts as begun or done, and whether the clock that told it was wrong.

    A clock more than five minutes ahead of the broker's, or before EARLIEST, is placed by the broker's time and
    flagged: any instant of the contract may be said, and some (year 1) no window and no database can work with.
    """
    if said_at < EARLIEST or (said_at - received_at).total_seconds() > MAX_CLOCK_AHEAD_S:
        return received_at, True
    return said_at, False
