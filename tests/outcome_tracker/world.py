"""Windows, runs and facts on a real broker and a real database, and a tracker that works on them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
from ratchet_sdk.events import uuid7

from services.outcome_tracker.handlers import subscribe
from services.outcome_tracker.pull_store import PullStore
from services.outcome_tracker.pulling import Pulling, Source
from services.outcome_tracker.service import Facts
from services.outcome_tracker.settings import TrackerSettings
from services.outcome_tracker.settlement_store import SettlementStore
from services.outcome_tracker.settling import Settling
from services.outcome_tracker.store import OutcomeStore
from services.outcome_tracker.stream import OutcomeDoor, OutcomeStream
from services.outcome_tracker.sync import Sync
from shared.bus import Bus
from shared.database import Pool
from shared.delivery import Delivery
from shared.events import WindowClosed, WindowResolved

STARTS = datetime(2026, 11, 20, 10, tzinfo=UTC)
ENDS = STARTS + timedelta(hours=1)
WINDOW = "2026-11-20T10:00"


def outcome(kind: str, content: dict[str, Any], occurred_at: datetime = STARTS, event_id: str | None = None) -> bytes:
    head = {"schema": 1, "event_id": event_id or str(uuid7()), "occurred_at": occurred_at.isoformat()}
    return json.dumps({**head, "kind": kind, kind: content}).encode()


def price(symbol: str, value: float, minute: float = 0, **more: Any) -> bytes:
    return outcome("price", {"symbol": symbol, "price": value, **more}, STARTS + timedelta(minutes=minute))


def metric(name: str, value: float, minute: float = 0) -> bytes:
    return outcome("metric", {"name": name, "value": value}, STARTS + timedelta(minutes=minute))


def resolution(market: str, said: str, minute: float = 0) -> bytes:
    content = {"market_id": market, "question": "?", "outcome": said}
    return outcome("resolution", content, STARTS + timedelta(minutes=minute))


def about(agent_id: str, name: str, value: float, minute: float = 0) -> bytes:
    content = {"agent_id": agent_id, "trajectory_id": "t", "name": name, "value": value}
    return outcome("trajectory", content, STARTS + timedelta(minutes=minute))


def reward(agent_id: str, value: float, minute: float = 0) -> bytes:
    return about(agent_id, "reward", value, minute)


def knowledge(about_what: Mapping[str, str], **data: Any) -> bytes:
    return outcome("knowledge", {**about_what, "data": data}, ENDS)


def delivery(data: bytes, sequence: int = 1, subject: str = "outcomes.market") -> Delivery:
    return Delivery(subject, data, {}, sequence, datetime.now(UTC), 1)


def deliveries(*facts: bytes, first: int = 1) -> list[Delivery]:
    return [delivery(data, first + n) for n, data in enumerate(facts)]


async def add_window(pool: Pool, *agents: str, window_id: str = WINDOW, starts_at: datetime = STARTS) -> None:
    await pool.execute(
        """insert into windows (window_id, starts_at, ends_at, length_s, state, revision, closed_at)
           values ($1, $2, $3, 3600, 'closed', 1, now())""",
        window_id,
        starts_at,
        starts_at + timedelta(hours=1),
    )
    for agent_id in agents:
        await add_run(pool, agent_id, window_id=window_id)


async def add_run(
    pool: Pool, agent_id: str, *, window_id: str = WINDOW, late: bool = False, expects: Sequence[str] = ()
) -> None:
    await pool.execute(
        """insert into trajectories (agent_id, trajectory_id, policy, window_id, scenario_id, started_at,
                                     status, first_sequence, late, expects)
           values ($1, 't', 'default', $2, 's', $3, 'completed', 1, $4, $5)""",
        agent_id,
        window_id,
        STARTS,
        late,
        list(expects),
    )


@dataclass(frozen=True)
class Tracker:
    bus: Bus
    facts: Facts
    settling: Settling
    pulling: Pulling
    sync: Sync

    async def listen(self) -> None:
        subscribe(self.bus, self.facts, self.settling, self.sync)
        await self.bus.broker.start()


def tracker(pool: Pool, bus: Bus, *, sources: Collection[Source] = (), **settings: Any) -> Tracker:
    """One replica, with settlements that wait for nothing unless ``settings`` says so."""
    chosen = TrackerSettings(**{"settle_min_s": 0.0, "settle_max_s": 3600.0, **settings})
    named = {source.name: source for source in sources}
    outcomes, pulls, stream = OutcomeStore(pool), PullStore(pool), OutcomeStream(bus)
    settling = Settling(SettlementStore(pool), stream, bus, chosen, named)
    pulling = Pulling(named, outcomes, OutcomeDoor(bus), pulls, every_s=chosen.pull_every_s)
    return Tracker(bus, Facts(outcomes), settling, pulling, Sync(pulls, pulling, settling, stream))


async def until(condition: Callable[[], Awaitable[object]]) -> None:
    async with asyncio.timeout(20):
        while not await condition():
            await asyncio.sleep(0.01)


async def messages(bus: Bus, stream: str) -> list[bytes]:
    info = await bus.js.stream_info(stream)
    return [(await bus.js.get_msg(stream, n)).data or b"" for n in range(1, info.state.last_seq + 1)]


async def reasons(bus: Bus) -> list[str]:
    """Why each dead letter died, in order."""
    info = await bus.js.stream_info("DEAD")
    letters = [await bus.js.get_msg("DEAD", n) for n in range(1, info.state.last_seq + 1)]
    return [(letter.headers or {})["Ratchet-Reason"] for letter in letters]


async def resolved(bus: Bus) -> list[WindowResolved]:
    found = [json.loads(data) for data in await messages(bus, "LOOP")]
    return [WindowResolved.model_validate(event) for event in found if "close_revision" in event]


def closed(window_id: str = WINDOW, starts_at: datetime = STARTS) -> WindowClosed:
    ends_at = starts_at + timedelta(hours=1)
    return WindowClosed(window_id=window_id, starts_at=starts_at, ends_at=ends_at, agents=1, trajectories=1, late=0)


async def settlement(pool: Pool, revision: int = 1) -> asyncpg.Record:
    row = await pool.fetchrow("select * from settlements where revision = $1", revision)
    assert row is not None
    return row


async def settled(pool: Pool, bus: Bus, *facts: bytes, **settings: Any) -> Tracker:
    """A tracker that has settled WINDOW with these facts."""
    made = tracker(pool, bus, **settings)
    await made.facts.take_in(deliveries(*facts))
    await made.settling.window_closed(closed())
    await made.settling.tick()
    assert (await settlement(pool))["state"] == "settled"
    return made


async def let_time_pass(pool: Pool, seconds: float) -> None:
    """As far as facts that touched a settled window are concerned."""
    await pool.execute("update corrections_due set touched_at = touched_at - make_interval(secs => $1)", seconds)
