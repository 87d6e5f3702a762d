"""Use cases of windows: begin to wait for a closed one, settle it, say so, and correct what later facts change."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from prometheus_client import Counter, Gauge

from services.outcome_tracker.joined_store import content as content_now
from services.outcome_tracker.settings import TrackerSettings
from services.outcome_tracker.settlement_store import SettlementStore, Touched, Waiting, content_of
from services.outcome_tracker.settling_domain import (
    Correct,
    Position,
    Settle,
    TakeBarrier,
    TooLate,
    Wait,
    changed,
    correction_move,
    next_move,
    not_pulled,
)
from shared.aside import Aside
from shared.database import Record
from shared.errors import GiveUpError
from shared.events import LoopEvent, WindowClosed, WindowResolved
from shared.telemetry import logger

SETTLED = Counter("ratchet_settlements_total", "Windows settled, by whether their barrier was reached", ["barrier"])
CORRECTIONS = Counter(
    "ratchet_settlement_corrections_total",
    "Looks at settled windows that later facts touched, by what came of it",
    ["result"],
)
for result in ("corrected", "unchanged", "too_late"):
    CORRECTIONS.labels(result)
OLDEST_WAIT = Gauge("ratchet_settlement_oldest_wait_seconds", "How long the longest waiting window has waited")


class Stream(Protocol):
    async def position(self) -> Position:
        """The end of the stream of outcomes and up to where it is stored. Raises RetryLaterError."""


class Outbox(Protocol):
    async def announce(self, event: LoopEvent) -> None:
        """Publish an event and wait until it is kept; twice is once. Raises RetryLaterError."""


@dataclass(frozen=True)
class Corrected:
    """A new revision of a window's settlement, and what is new in it."""

    window_id: str
    revision: int
    changed: tuple[str, ...]


class Settling:
    def __init__(
        self,
        store: SettlementStore,
        stream: Stream,
        outbox: Outbox,
        settings: TrackerSettings,
        sources: Collection[str] = (),
        aside: Aside | None = None,
    ) -> None:
        """``sources`` are the names of the pull sources: a window is not settled before each was read for it."""
        self.store = store
        self.stream = stream
        self.outbox = outbox
        self.settings = settings
        self.sources = sources
        self.aside = aside or Aside("outcome_tracker")

    async def window_closed(self, event: WindowClosed) -> None:
        """Begin to wait for the outcomes of a closed window. Raises GiveUpError for a window that is not there."""
        if not await self.store.wait_for(event.window_id, event.revision):
            raise GiveUpError(f"window {event.window_id[:60]!r} was said to be closed but is not in the database")

    async def tick(self) -> None:
        """Settle what has waited long enough, correct what later facts touched, and announce both."""
        OLDEST_WAIT.set(await self.store.oldest_wait_s())
        waiting = await self.store.due(self.settings.settle_min_s)
        if waiting:
            position = await self.stream.position()
            await self.aside.each("settle window", waiting, _window_id, partial(self._advance, position))
        touched = await self.store.touched(but=self.aside.resting("correct window"))
        await self.aside.each("correct window", touched, _window_id, self._look_again)
        await self.announce()

    # settling -----------------------------------------------------------------------------------
    async def _advance(self, position: Position, window: Waiting) -> None:
        unmet = await self.store.unmet(window.window_id)
        unread = not_pulled(self.sources, window.pulled)
        what_next = partial(
            next_move,
            window.waited_s,
            position=position,
            unread=bool(unread),
            unmet=bool(unmet),
            min_s=self.settings.settle_min_s,
            max_s=self.settings.settle_max_s,
        )
        move = what_next(window.barrier)
        if isinstance(move, TakeBarrier):
            move = what_next(await self.store.set_barrier(window.window_id, window.revision, move.mark))
        match move:
            case Settle(missing):
                await self._settle(window, (*missing, *unread), reached=not missing)
            case Wait() | TakeBarrier():
                pass

    async def _settle(self, window: Waiting, missing: Sequence[str], *, reached: bool) -> None:
        async with self.store.looking_at(window.window_id, "waiting") as held:
            if held is None:
                return
            connection, _ = held
            content = await content_now(connection, window.window_id, window.starts_at, window.ends_at)
            content = replace(content, missing=(*missing, *content.missing))
            await self.store.settle(window.window_id, window.revision, content, connection)
        SETTLED.labels("reached" if reached else "missed").inc()
        logger().info("settled", window_id=window.window_id, outcomes=content.outcomes, missing=len(content.missing))

    # correcting ---------------------------------------------------------------------------------
    async def correct(self, window_ids: Sequence[str]) -> list[Corrected]:
        """Look again at those of these windows that later facts touched and whose time it is; announce what is new."""
        found = [await self._look_again(touched) for touched in await self.store.touched(window_ids)]
        await self.announce()
        return [one for one in found if one is not None]

    async def _look_again(self, window: Touched) -> Corrected | None:
        limits = {"after_s": self.settings.correct_after_s, "within_s": self.settings.correct_within_s}
        match correction_move(window.revision, window.touched_s, window.age_s, forced=window.forced, **limits):
            case Correct():
                return await self._correct(window)
            case TooLate():
                await self.store.forget_touch(window.window_id)
                CORRECTIONS.labels("too_late").inc()
                logger().warning("too_late_to_correct", window_id=window.window_id, age_s=round(window.age_s))
        return None

    async def _correct(self, window: Touched) -> Corrected | None:
        async with self.store.looking_at(window.window_id, "settled") as held:
            if held is None:
                return None
            connection, before = held
            content = await content_now(connection, window.window_id, window.starts_at, window.ends_at)
            new = changed(content_of(before), content)
            if not new:
                CORRECTIONS.labels("unchanged").inc()
                return None
            revision = await self.store.correct(connection, before, content, new)
        CORRECTIONS.labels("corrected").inc()
        logger().info("corrected", window_id=window.window_id, revision=revision, changed=new)
        return Corrected(window.window_id, revision, new)

    async def announce(self) -> None:
        """Publish ``window.resolved`` for every settlement that was not announced yet, corrections too."""
        rows = await self.store.unannounced(self.aside.resting("announce settlement"))
        await self.aside.each("announce settlement", rows, lambda row: str(row["key"]), self._announce)

    async def _announce(self, row: Record) -> None:
        event = WindowResolved(**dict(row))
        await self.outbox.announce(event)
        await self.store.set_announced(event.window_id, event.revision)


def _window_id(window: Waiting | Touched) -> str:
    return window.window_id
