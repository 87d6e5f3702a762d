"""Use cases of the outcome tracker: keep facts, begin to wait for a closed window, settle it, say so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import asyncpg
from prometheus_client import Counter, Gauge
from pydantic import ValidationError
from ratchet_sdk.events import outcomes

from services.outcome_tracker.domain import (
    FactRow,
    Position,
    Settle,
    TakeBarrier,
    Wait,
    fact_row,
    missing_rewards,
    next_move,
    source_of,
    window_facts,
)
from services.outcome_tracker.settings import TrackerSettings
from services.outcome_tracker.store import OutcomeStore, Waiting
from shared.database import UNAVAILABLE
from shared.delivery import Ack, Dead, Delivery, Disposition
from shared.errors import GiveUpError, RetryLaterError, reason
from shared.events import LoopEvent, WindowClosed
from shared.telemetry import logger

FACTS = Counter("ratchet_outcomes_total", "Facts about the world that were taken in, repeats included", ["kind"])
SETTLED = Counter("ratchet_settlements_total", "Windows settled, by whether their barrier was reached", ["barrier"])
OLDEST_WAIT = Gauge("ratchet_settlement_oldest_wait_seconds", "How long the longest waiting window has waited")


class Stream(Protocol):
    async def position(self) -> Position:
        """The end of the stream of outcomes and up to where it is stored. Raises RetryLaterError."""


class Outbox(Protocol):
    async def announce(self, event: LoopEvent) -> None:
        """Publish an event and wait until it is kept; twice is once. Raises RetryLaterError."""


class OutcomeTracker:
    def __init__(self, store: OutcomeStore, stream: Stream, outbox: Outbox, settings: TrackerSettings) -> None:
        self.store = store
        self.stream = stream
        self.outbox = outbox
        self.settings = settings

    # facts --------------------------------------------------------------------------------------
    async def take_in(self, deliveries: Sequence[Delivery]) -> list[Disposition]:
        """Store a batch of facts. A bad one is dead with its reason and its neighbours are stored."""
        read = [_read(delivery) for delivery in deliveries]
        facts = [row for row in read if isinstance(row, FactRow)]
        refused = await self._store(facts)
        for fact in facts:
            if (fact.source, fact.sequence) not in refused:
                FACTS.labels(fact.kind).inc()
        return [row if isinstance(row, Dead) else refused.get((row.source, row.sequence), Ack()) for row in read]

    async def _store(self, facts: Sequence[FactRow]) -> dict[tuple[str, int], Dead]:
        """Store all, or halve the batch until what the database refuses stands alone."""
        if not facts:
            return {}
        try:
            await self.store.add(facts)
        except (asyncpg.DataError, ValueError) as error:  # the server's word, and the driver's before it asks
            if len(facts) == 1:
                return {(facts[0].source, facts[0].sequence): Dead(f"the database refuses it: {type(error).__name__}")}
            middle = len(facts) // 2
            return {**await self._store(facts[:middle]), **await self._store(facts[middle:])}
        return {}

    async def forget(self, runs: Sequence[tuple[str, str]]) -> dict[str, int]:
        """Take the words out of what is known about runs: notes and knowledge. Names and values stay."""
        agents, trajectories = [agent_id for agent_id, _ in runs], [trajectory_id for _, trajectory_id in runs]
        return {"facts": await self.store.forget(agents, trajectories)}

    async def rewrite(self, table: str) -> dict[str, str]:
        await self.store.rewrite(table)
        return {"table": table}

    # windows ------------------------------------------------------------------------------------
    async def window_closed(self, event: WindowClosed) -> None:
        """Begin to wait for the outcomes of a closed window. Raises GiveUpError for a window that is not there."""
        if not await self.store.wait_for(event.window_id, event.revision):
            raise GiveUpError(f"window {event.window_id[:60]!r} was said to be closed but is not in the database")

    async def tick(self) -> None:
        """Look at every window that has waited long enough, settle what can be settled, and announce it."""
        OLDEST_WAIT.set(await self.store.oldest_wait_s())
        waiting = await self.store.due(self.settings.settle_min_s)
        if not waiting:
            return
        position = await self.stream.position()
        for window in waiting:
            try:
                await self._advance(window, position)
            except (RetryLaterError, *UNAVAILABLE):
                raise
            except Exception:
                logger().exception("not_settled", window_id=window.window_id)
        await self.announce()

    async def _advance(self, window: Waiting, position: Position) -> None:
        limits = {"min_s": self.settings.settle_min_s, "max_s": self.settings.settle_max_s}
        move = next_move(window.waited_s, window.barrier, position, **limits)
        if isinstance(move, TakeBarrier):
            barrier = await self.store.set_barrier(window.window_id, window.revision, move.mark)
            move = next_move(window.waited_s, barrier, position, **limits)
        match move:
            case Settle(missing):
                await self._settle(window, missing)
            case Wait() | TakeBarrier():
                pass

    async def _settle(self, window: Waiting, missing: Sequence[str]) -> None:
        seen = await self.store.seen_in(window.starts_at, window.ends_at)
        about_runs, knowledge, unrewarded = await self.store.about_runs(window.window_id)
        facts = window_facts(seen, knowledge=knowledge)
        outcomes_count = len(seen) + about_runs + knowledge
        missing = (*missing, *missing_rewards(unrewarded))
        if await self.store.settle(window.window_id, window.revision, facts, outcomes_count, missing):
            SETTLED.labels("missed" if any("barrier" in what for what in missing) else "reached").inc()
            logger().info("settled", window_id=window.window_id, outcomes=outcomes_count, missing=missing)

    async def announce(self) -> None:
        """Publish ``window.resolved`` for every settled window that was not announced yet."""
        for event in await self.store.unannounced():
            await self.outbox.announce(event)
            await self.store.set_announced(event.window_id, event.revision)


def _read(delivery: Delivery) -> FactRow | Dead:
    try:
        outcome = outcomes.validate_json(delivery.content())
        if "event_id" not in outcome.model_fields_set:  # the default is for those who publish
            return Dead("event_id: a fact without one cannot be known again when it comes twice; send a UUIDv7")
        return fact_row(
            outcome,
            source=source_of(delivery.subject),
            sequence=delivery.sequence,
            published_at=delivery.published_at,
        )
    except ValidationError as error:
        return Dead(f"not an outcome: {reason(error)}")
    except GiveUpError as error:
        return Dead(str(error))
