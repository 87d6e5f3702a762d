"""A batch stored, and what is in the tables then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from services.recorder.domain import Received
from services.recorder.store import EventStore
from shared.database import Pool, Record
from tests.recorder.events import (
    WINDOW_S,
    call_made,
    ended,
    numbered,
    reply,
    started,
    step,
)

TABLES = ("windows", "trajectories", "steps", "llm_calls", "bodies", "seen_agents")
VOLATILE = {"received_at", "first_stored_at"}
SENT = (
    started(
        scenario_id="sunny",
        model={"name": "traders", "version": "v1"},
        expects=["reward", "price:IRON, forged", "reward", "fact:a\u2028b"],
    ),
    call_made("c", response=reply(token_ids=[1]), prompt_token_ids=[2], model_version="v1", usage={"prompt_tokens": 3}),
    step(0, llm_calls=[{"call_id": "c", "purpose": "reasoning"}], action={"type": "buy", "result": 1}, reward=0.5),
    ended(),
)
RUN = numbered(*SENT)


async def keep(pool: Pool, events: Sequence[Received]) -> dict[int, str]:
    return dict((await EventStore(pool).keep(events, WINDOW_S)).dead)


async def everything(pool: Pool) -> dict[str, list[dict[str, Any]]]:
    return {
        table: sorted(
            ({k: v for k, v in row.items() if k not in VOLATILE} for row in await pool.fetch(f"select * from {table}")),
            key=repr,
        )
        for table in TABLES
    }


async def empty(pool: Pool) -> None:
    await pool.execute(f"truncate {', '.join(TABLES)} cascade")


async def one(pool: Pool, table: str) -> Record:
    [row] = await pool.fetch(f"select * from {table}")
    return row
