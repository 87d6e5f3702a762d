"""The recorder's use cases for windows: let them close, once each, and announce them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Protocol

from prometheus_client import Counter

from services.recorder import window_domain as domain
from services.recorder.settings import RecorderSettings
from services.recorder.window_domain import Close, OpenWindow, ReadBarrier
from shared.aside import Aside
from shared.database import Record
from shared.events import LoopEvent, WindowClosed
from shared.streams import Barrier
from shared.telemetry import logger
from shared.windows import Window, window_at, window_of_id

CLOSED = Counter("ratchet_recorder_windows_closed_total", "Windows closed")


class Store(Protocol):
    async def make_windows(self, windows: Iterable[Window]) -> None: ...
    async def first_start(self, length_s: int) -> datetime | None: ...
    async def starts_since(self, length_s: int, since: datetime) -> list[datetime]: ...
    async def request_close(self, window: Window) -> str: ...
    async def due(self, ended_before: datetime, but: Sequence[str]) -> list[OpenWindow]: ...
    async def write_barrier(self, window_id: str, barrier: Barrier) -> None: ...
    async def close(self, window_id: str, *, floor: int, opened_before: datetime) -> Record | None: ...
    async def truncate_late(self, limit_s: float) -> None: ...
    async def unannounced(self, but: Sequence[str]) -> list[Record]: ...
    async def announced(self, window_id: str, revision: int) -> None: ...


class Stream(Protocol):
    """Where the events lie: its end, and how far the recorders together have stored it."""

    async def end(self) -> Barrier: ...
    async def floor(self) -> int: ...


class Announcer(Protocol):
    async def announce(self, event: LoopEvent) -> None: ...


def _now() -> datetime:
    return datetime.now(UTC)


class _Place:
    """The stream's end and floor, read once a round and only where a window asks. The end comes first."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._read: tuple[Barrier, int] | None = None

    async def read(self) -> tuple[Barrier, int]:
        if self._read is None:
            self._read = await self._stream.end(), await self._stream.floor()
        return self._read


class Closing:
    def __init__(
        self,
        store: Store,
        stream: Stream,
        announcer: Announcer,
        settings: RecorderSettings,
        now: Callable[[], datetime] = _now,
        aside: Aside | None = None,
    ) -> None:
        self._store = store
        self._stream = stream
        self._announcer = announcer
        self._settings = settings
        self._now = now
        self._aside = aside or Aside("recorder")
        self._filled: Window | None = None

    async def request_close(self, window_id: str) -> dict[str, Any]:
        """Let a window close without waiting for its end and grace. Raises GiveUpError for what is no window."""
        state = await self._store.request_close(window_of_id(window_id))
        return {"window_id": window_id, "state": state}

    async def tick(self) -> None:
        """One round of any replica: quiet windows get their rows, barriers are read, what may close is closed."""
        now = self._now()
        await self._aside.each("fill windows", ["all"], str, lambda _: self._fill(now))
        if await self._round(now):  # what lies below the new barriers may be stored already
            await self._round(now)

    async def _round(self, now: datetime) -> bool:
        """Each window that is due makes its next move. Gives whether one wrote its barrier."""
        ended_before = now - timedelta(seconds=self._settings.grace_s)
        due = await self._store.due(ended_before, self._aside.resting("close window"))
        work = partial(self._move, now, _Place(self._stream))
        return any(await self._aside.each("close window", due, lambda window: window.window_id, work))

    async def _move(self, now: datetime, place: _Place, window: OpenWindow) -> bool:
        times = {"grace_s": self._settings.grace_s, "limit_s": self._settings.trajectory_limit_s}
        if domain.deadline_passed(window, now, **times):
            return False
        end, floor = await place.read()
        match domain.next_move(window, now, **times, stream_created=end.created, floor=floor):
            case ReadBarrier():
                await self._store.write_barrier(window.window_id, end)
                return True
            case Close():
                await self._close(window, now, floor)
        return False

    async def _close(self, window: OpenWindow, now: datetime, floor: int) -> None:
        opened_before = now - timedelta(seconds=self._settings.trajectory_limit_s)
        closed = await self._store.close(window.window_id, floor=floor, opened_before=opened_before)
        if closed is None:  # another replica was faster, or an event came in between: the next round looks again
            return
        CLOSED.inc()
        logger().info(
            "window_closed",
            window=window.window_id,
            agents=closed["agents"],
            trajectories=closed["trajectories"],
            late=closed["late"],
            quality=closed["quality"],
        )
        async with self._aside.row("announce window", window.window_id):
            await self._announce(closed)

    async def _fill(self, now: datetime) -> None:
        """Quiet windows get a row once a window is known at all, so that they close and what hangs on them resolves."""
        length_s = self._settings.window_s
        current = window_at(now, length_s)
        if self._filled == current:
            return
        first = await self._store.first_start(length_s)
        if first is None:
            return
        horizon = current.starts_at - timedelta(seconds=length_s * (domain.IDLE_WINDOWS + 1))
        known = await self._store.starts_since(length_s, horizon)
        await self._store.make_windows(domain.missing_windows(first, known, now, length_s))
        self._filled = current

    async def sweep(self) -> None:
        """Announce what was closed and not announced, and end late runs that never did."""
        rows = await self._store.unannounced(self._aside.resting("announce window"))
        await self._aside.each("announce window", rows, lambda row: str(row["window_id"]), self._announce)
        await self._store.truncate_late(self._settings.trajectory_limit_s)

    async def _announce(self, row: Record) -> None:
        event = WindowClosed.model_validate(dict(row))
        await self._announcer.announce(event)
        await self._store.announced(event.window_id, event.revision)
