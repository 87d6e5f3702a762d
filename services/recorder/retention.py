"""The recorder's use cases for what is not kept: runs that are forgotten on command, and days that are over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict
from datetime import UTC, date, datetime, timedelta
from typing import Any, Protocol

from prometheus_client import Counter

from services.recorder.domain import RunKey
from services.recorder.forget_store import Forgotten
from services.recorder.retention_domain import (
    AHEAD_DAYS,
    Drop,
    Erase,
    Keep,
    Lives,
    fate,
    partitions_wanted,
)
from services.recorder.settings import RecorderSettings
from shared.aside import Aside
from shared.telemetry import logger

ERASED = Counter("ratchet_recorder_bodies_erased_total", "Events whose body was erased", ["why"])


class Store(Protocol):
    def alone(self) -> AbstractAsyncContextManager[bool]: ...
    async def move_on(self, gone_through: Mapping[str, date | None]) -> dict[str, date]: ...
    async def partitions(self) -> list[date]: ...
    async def days_in_default(self, first: date, last: date) -> list[date]: ...
    async def make_partition(self, day: date, after: date) -> None: ...
    async def policies_of(self, day: date) -> list[str]: ...
    async def expired_runs(self, day: date, policies: Sequence[str] | None) -> list[RunKey]: ...
    async def expired_in_default(self) -> list[RunKey]: ...
    async def bury(self, runs: Sequence[RunKey], reason: str, *, spared: date | None = None) -> Forgotten: ...
    async def drop(self, day: date) -> None: ...


class Tombstones(Protocol):
    async def forget(self, runs: Sequence[RunKey], who: str, reason: str | None) -> Forgotten: ...
    async def rewrite(self, table: str) -> None: ...


def _today() -> date:
    return datetime.now(UTC).date()


class Retention:
    """Days that outlived their policies. Without a setting nothing is partitioned, and nothing goes."""

    def __init__(
        self,
        store: Store,
        settings: RecorderSettings,
        today: Callable[[], date] = _today,
        aside: Aside | None = None,
    ) -> None:
        self._store = store
        self._lives = Lives(settings.retention_days, settings.retention_days_by_policy)
        self._today = today
        self._aside = aside or Aside("recorder")
        self._looked: dict[date, Mapping[str, date]] = {}  # a day that somebody keeps is scanned once for each change

    async def round(self) -> None:
        """Partitions ahead, then what is over. May stop anywhere: the next round does what is left."""
        if not self._lives.bounded:
            return
        async with self._store.alone() as mine:
            if mine:
                today = self._today()
                gone_through = await self._store.move_on(self._lives.gone_through(today))
                await self._make_partitions(today)
                days = await self._store.partitions()
                await self._aside.each("expire day", days, str, lambda day: self._expire(day, gone_through))
                await self._expire_default()

    async def _make_partitions(self, today: date) -> None:
        there = set(await self._store.partitions())
        oldest, last = today - timedelta(days=self._lives.longest_days), today + timedelta(days=AHEAD_DAYS)
        in_default = await self._store.days_in_default(oldest, last)
        wanted = [day for day in partitions_wanted(today, in_default, oldest) if day not in there]
        make = self._store.make_partition
        await self._aside.each("make partition", wanted, str, lambda day: make(day, day + timedelta(days=1)))

    async def _expire(self, day: date, gone_through: Mapping[str, date]) -> None:
        if day > max(gone_through.values()) or self._looked.get(day) == gone_through:
            return
        match fate(day, await self._store.policies_of(day), gone_through):
            case Drop():
                while runs := await self._store.expired_runs(day, None):
                    self._count(await self._store.bury(runs, _reason(day), spared=day))
                await self._store.drop(day)
                logger().info("day_dropped", day=str(day))
            case Erase(policies):
                while runs := await self._store.expired_runs(day, policies):
                    self._count(await self._store.bury(runs, _reason(day)))
                self._looked[day] = gone_through
            case Keep():
                self._looked[day] = gone_through

    async def _expire_default(self) -> None:
        while runs := await self._store.expired_in_default():
            self._count(await self._store.bury(runs, "its events were past their retention"))

    def _count(self, done: Forgotten) -> None:
        ERASED.labels("retention").inc(done.events)


def _reason(day: date) -> str:
    return f"events of {day} were past their retention"


class Forgetting:
    """Runs that somebody asked to have forgotten."""

    def __init__(self, store: Tombstones) -> None:
        self._store = store

    async def forget(self, runs: Sequence[RunKey], who: str, reason: str | None) -> dict[str, Any]:
        done = await self._store.forget(runs, who, reason)
        ERASED.labels("forgotten").inc(done.events)
        logger().info("forgotten", runs=done.runs, events=done.events)
        return asdict(done)

    async def rewrite(self, table: str) -> dict[str, Any]:
        await self._store.rewrite(table)
        return {"table": table}
