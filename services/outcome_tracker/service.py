"""Use case of what comes in: each fact of the world is stored once, and a bad one says what is wrong with it."""

from __future__ import annotations

from collections.abc import Sequence

import asyncpg
from prometheus_client import Counter
from pydantic import ValidationError
from ratchet_sdk.outcomes import outcomes

from services.outcome_tracker.domain import CONTRADICTION, FAULTS, FactRow, fact_row, fault_of, source_of
from services.outcome_tracker.store import OutcomeStore
from shared.delivery import Ack, Dead, Delivery, Disposition
from shared.errors import GiveUpError, reason

FACTS = Counter("ratchet_outcomes_total", "Facts about the world that were taken in, repeats included", ["kind"])
BAD = Counter("ratchet_bad_outcomes_total", "What was published as a fact and is none, by what is wrong", ["fault"])
for fault in FAULTS:  # from 0, so that the first one is seen as an increase
    BAD.labels(fault)

NO_ID = "event_id: a fact without one cannot be known again when it comes twice; send a UUIDv7"


class Facts:
    def __init__(self, store: OutcomeStore) -> None:
        self.store = store

    async def take_in(self, deliveries: Sequence[Delivery]) -> list[Disposition]:
        """Store a batch of facts. A bad one is dead with its reason and its neighbours are stored."""
        read = [_read(delivery) for delivery in deliveries]
        facts = [row for row in read if isinstance(row, FactRow)]
        refused = await self._store(facts)
        for fact in facts:
            if fact.sequence not in refused:
                FACTS.labels(fact.kind).inc()
        return [row if isinstance(row, Dead) else refused.get(row.sequence, Ack()) for row in read]

    async def _store(self, facts: Sequence[FactRow]) -> dict[int, Dead]:
        """Store all, or halve the batch until what the database refuses stands alone. Gives the dead by sequence."""
        if not facts:
            return {}
        try:
            contradicting = await self.store.add(facts)
        except (asyncpg.DataError, ValueError) as error:  # the server's word, and the driver's before it asks
            if len(facts) == 1:
                refused = _dead("refused by the database", f"the database refuses it: {type(error).__name__}")
                return {facts[0].sequence: refused}
            middle = len(facts) // 2
            return {**await self._store(facts[:middle]), **await self._store(facts[middle:])}
        return {sequence: _dead("contradiction", CONTRADICTION) for sequence in contradicting}

    async def forget(self, runs: Sequence[tuple[str, str]]) -> dict[str, int]:
        """Take the words out of what is known about runs: notes and knowledge. Names and values stay."""
        agents, trajectories = [agent_id for agent_id, _ in runs], [trajectory_id for _, trajectory_id in runs]
        return {"facts": await self.store.forget(agents, trajectories)}

    async def rewrite(self, table: str) -> dict[str, str]:
        await self.store.rewrite(table)
        return {"table": table}


def _read(delivery: Delivery) -> FactRow | Dead:
    try:
        outcome = outcomes.validate_json(delivery.content())
        if "event_id" not in outcome.model_fields_set:  # the default is for those who publish
            return _dead("no event id", NO_ID)
        return fact_row(
            outcome,
            source=source_of(delivery.subject),
            sequence=delivery.sequence,
            published_at=delivery.published_at,
        )
    except ValidationError as error:
        return _dead(fault_of(error), f"not an outcome: {reason(error)}")
    except GiveUpError as error:
        return _dead(fault_of(error), str(error))


def _dead(fault: str, why: str) -> Dead:
    BAD.labels(fault).inc()
    return Dead(why)
