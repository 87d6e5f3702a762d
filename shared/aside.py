"""One row that cannot be handled stops only itself: it is set aside with its reason, and the rest goes on.

For sweeps and ticks, which look at row after row; a message of the bus has its own dispositions. A server that is away
is no row's fault: that is raised, and the whole round waits for it.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from prometheus_client import Counter
from pydantic import ValidationError

from shared.database import UNAVAILABLE, Pool
from shared.errors import RetryLaterError, reason
from shared.telemetry import logger

R = TypeVar("R")
T = TypeVar("T")

PAUSE_MAX_S = 60.0
REMEMBERED = 10_000
OVER_AFTER = timedelta(
    hours=1
)  # what is still wrong is noted anew each minute; an older note is of something that is over

SET_ASIDE = Counter("ratchet_set_aside_total", "Times that a row could not be handled, and was set aside", ["kind"])


def servers_fault(error: Exception) -> bool:
    """Whether a server is away or busy. What asyncpg raises for a value that it cannot write looks like that too."""
    return isinstance(error, (RetryLaterError, *UNAVAILABLE)) and not isinstance(error, ValueError)


def reason_of(error: Exception) -> str:
    """One line for operators, that a database can hold. What was sent stays out of it."""
    if isinstance(error, ValidationError):
        return reason(error)
    said = f"{type(error).__name__}: {error}".replace("\x00", "").encode("utf-8", "replace").decode()
    return " ".join(said.split()).removesuffix(":")[:500]


@dataclass
class _Failed:
    """``rests_until``: by the monotonic clock; what a server's absence stopped does not rest, it only comes last."""

    count: int = 0
    reason: str = ""
    rests_until: float = 0.0


class Aside:
    """What one service could not handle. Without a ``pool`` it is only logged and counted."""

    def __init__(self, service: str, pool: Pool | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._service = service
        self._pool = pool
        self._clock = clock
        self._failed: dict[tuple[str, str], _Failed] = {}

    async def each(
        self, kind: str, rows: Iterable[T], key: Callable[[T], str], work: Callable[[T], Awaitable[R]]
    ) -> list[R]:
        """Handle rows one after another; gives what came of those that could be handled.

        One that fails is tried again after a pause of a second, then twice as long, up to a minute. Raises what says
        that a server is away; the row that met it comes last the next time, so that it cannot hold the others up.
        """
        SET_ASIDE.labels(kind)  # from 0, so that the first one is seen as an increase
        results = []
        for row in sorted(rows, key=lambda row: (kind, key(row)) in self._failed):
            if not self._rests(kind, key(row)):
                async with self.row(kind, key(row)):
                    results.append(await work(row))
        return results

    def resting(self, kind: str) -> list[str]:
        """Keys that are not to be tried yet: for a query with a limit, which they would fill."""
        return [key for of, key in self._failed if of == kind and self._rests(of, key)]

    def _rests(self, kind: str, key: str) -> bool:
        failed = self._failed.get((kind, key))
        return failed is not None and self._clock() < failed.rests_until

    @asynccontextmanager
    async def row(self, kind: str, key: str) -> AsyncIterator[None]:
        """Around the work on one row: what it raises is noted and goes no further, unless a server is away."""
        try:
            yield
        except Exception as error:
            failed = self._failed.setdefault((kind, key), _Failed())
            if servers_fault(error):
                raise
            await self._note(kind, key, failed, error)
        else:
            failed = self._failed.pop((kind, key), _Failed())
            if failed.count and self._pool:
                await clear(self._pool, self._service, kind, key)

    async def _note(self, kind: str, key: str, failed: _Failed, error: Exception) -> None:
        why = reason_of(error)
        (logger().warning if why == failed.reason else logger().exception)("set_aside", kind=kind, key=key, reason=why)
        SET_ASIDE.labels(kind).inc()
        failed.count, failed.reason = failed.count + 1, why
        failed.rests_until = self._clock() + min(PAUSE_MAX_S, 2.0 ** min(failed.count - 1, 10))
        while len(self._failed) > REMEMBERED:  # those that nobody comes back to
            del self._failed[next(iter(self._failed))]
        if self._pool:
            try:
                await note(self._pool, self._service, kind, key, why)
            except UNAVAILABLE:
                raise
            except Exception:  # that it cannot be noted must not stop what setting it aside was to keep going
                logger().exception("not_noted", kind=kind, key=key)


# SQL ----------------------------------------------------------------------------------------------
async def note(pool: Pool, service: str, kind: str, key: str, reason: str) -> None:
    """Keep why a row is set aside, and let go of the service's notes that nobody has renewed."""
    await pool.execute(
        """with over as (delete from set_aside
                          where service = $1 and last_at < now() - $5::interval and (kind, key) <> ($2, $3))
           insert into set_aside as s (service, kind, key, reason) values ($1, $2, $3, $4)
           on conflict (service, kind, key) do update set
              reason = excluded.reason, last_at = now(), count = s.count + 1""",
        service,
        kind,
        key,
        reason,
        OVER_AFTER,
    )


async def clear(pool: Pool, service: str, kind: str, key: str) -> None:
    await pool.execute("delete from set_aside where (service, kind, key) = ($1, $2, $3)", service, kind, key)
