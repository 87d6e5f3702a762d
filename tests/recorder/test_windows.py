"""The whole recorder on a real broker and a real database: published with the SDK, stored, closed, announced."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from ratchet_sdk import Recorder
from ratchet_sdk.events import message_id

from services.local.embedded import NatsServer
from services.recorder.handlers import subscribe
from services.recorder.service import Recording
from services.recorder.settings import RecorderSettings
from services.recorder.store import EventStore
from services.recorder.stream import StepStream
from services.recorder.window_store import WindowStore
from services.recorder.windows import Closing
from shared import database
from shared.aside import Aside
from shared.bodies import unpacked
from shared.bus import Bus
from shared.database import Pool, Record
from shared.errors import GiveUpError
from shared.events import WindowClosed
from shared.streams import Barrier
from shared.trajectories import load
from shared.windows import window_at
from tests.recorder.events import START, WINDOW_S, ended, numbered, step


async def until(condition: Callable[[], Awaitable[object]]) -> None:
    async with asyncio.timeout(20):
        while not await condition():
            await asyncio.sleep(0.02)


def settings(**more: Any) -> RecorderSettings:
    return RecorderSettings(**{"window_s": WINDOW_S, "grace_s": 0, "trajectory_limit_s": 5, **more})


@asynccontextmanager
async def replica(nats_url: str, pool: Pool, chosen: RecorderSettings) -> AsyncIterator[tuple[Bus, Closing]]:
    """A recorder as app.py wires it; its ticks are run by the test."""
    bus = Bus(nats_url, name="recorder")
    await bus.connect()
    closing = Closing(WindowStore(pool), StepStream(bus), bus, chosen)
    subscribe(bus, Recording(EventStore(pool), chosen), closing, gather_s=0.05)
    await bus.broker.start()
    try:
        yield bus, closing
    finally:
        await bus.close()


async def closed_windows(bus: Bus) -> list[WindowClosed]:
    info = await bus.js.stream_info("LOOP")
    messages = [await bus.js.get_msg("LOOP", n) for n in range(1, info.state.last_seq + 1)]
    return [WindowClosed.model_validate_json(m.data or b"") for m in messages if m.subject == "window.closed"]


async def record_runs(url: str, agents: int) -> list[tuple[str, str]]:
    keys = []
    for number in range(agents):
        async with Recorder(url, f"agent-{number}") as recorder:
            async with recorder.trajectory(scenario_id="sunny", model="default") as run:
                for price in (1, 2):
                    async with run.step(environment={"price": price}) as now:
                        now.llm_call(messages=[{"role": "user", "content": f"price {price}?"}], response="buy")
                        now.action("buy", parameters={"n": price}, success=True, result={"paid": price})
            keys.append((recorder.agent_id, run.trajectory_id))
            assert await recorder.flush() == 0
    return keys


async def test_two_recorders_close_each_window_once_with_all_that_was_sent(
    nats_server: NatsServer, bus: Bus, database_url: str
) -> None:
    chosen = settings(window_s=1)
    async with database.pool(database_url) as pool, database.pool(database_url) as other:
        async with (
            replica(nats_server.url, pool, chosen) as (_, one),
            replica(nats_server.url, other, chosen) as (_, two),
        ):
            keys = await record_runs(nats_server.url, 4)

            async def all_closed() -> bool:
                await asyncio.gather(one.tick(), two.tick(), one.sweep(), two.sweep())
                return bool(
                    await pool.fetchval(
                        """select count(*) = 4 from trajectories join windows using (window_id)
                            where state = 'closed' and announced_at is not null"""
                    )
                )

            await until(all_closed)
        events = await closed_windows(bus)
        assert len({event.window_id for event in events}) == len(events)
        assert sum(event.trajectories for event in events) == 4
        assert {event.quality for event in events if event.trajectories} == {1.0}
        assert all(event.late == 0 for event in events)

        sent = {}
        for sequence in range(1, (await bus.js.stream_info("STEPS")).state.last_seq + 1):
            message = await bus.js.get_msg("STEPS", sequence)
            assert message.headers is not None
            sent[message.headers["Nats-Msg-Id"]] = message.data or b""
        rows = await pool.fetch("select agent_id, event_id, sha256, body from bodies")
        assert {message_id(r["agent_id"], r["event_id"]): unpacked(r["body"]) for r in rows} == sent
        assert all(hashlib.sha256(unpacked(r["body"])).digest() == r["sha256"] for r in rows)

        runs = await load(pool, keys)
        assert list(runs) == sorted(keys)
        run = runs[keys[0]]
        assert [s.environment for s in run.steps] == [{"price": 1}, {"price": 2}]
        assert [call.messages[0]["content"] for call in run.calls] == ["price 1?", "price 2?"]
        assert [call.reply for call in run.calls] == [{"role": "assistant", "content": "buy"}] * 2
        assert run.started is not None
        assert run.ended is not None
        assert (run.started.scenario_id, run.ended.status, run.ended.step_count) == ("sunny", "completed", 2)


async def test_quiet_windows_close_and_backlog_is_not_lateness(nats_server: NatsServer, bus: Bus, pool: Pool) -> None:
    """What was published while no recorder ran belongs to its window, however long ago the window ended."""
    await record_runs(nats_server.url, 1)
    clock = [datetime.now(UTC)]
    chosen = settings(window_s=2)
    began = window_at(clock[0], 2)
    async with replica(nats_server.url, pool, chosen) as (_, closing):
        closing._now = lambda: clock[0]

        async def stored() -> bool:
            return bool(await pool.fetchval("select count(*) = 1 from trajectories where status = 'completed'"))

        await until(stored)
        clock[0] = window_at(datetime.now(UTC), 2).ends_at

        async def closed() -> bool:
            await closing.tick()
            return bool(
                await pool.fetchval("select bool_and(state = 'closed') from windows where starts_at < $1", clock[0])
            )

        await until(closed)
        clock[0] = window_at(clock[0], 2).next().next().starts_at
        await until(closed)
    events = await closed_windows(bus)
    assert [event.trajectories for event in events if event.trajectories] == [1]
    assert [event.late for event in events] == [0] * len(events)
    starts = [event.starts_at for event in events]
    assert starts == sorted(starts)
    assert len(events) >= 3
    assert all(event.starts_at >= began.previous().starts_at for event in events)


async def test_a_window_closes_on_request_and_what_follows_is_late(
    nats_server: NatsServer, bus: Bus, pool: Pool
) -> None:
    async with replica(nats_server.url, pool, settings(window_s=3600, grace_s=3600)) as (_, closing):
        async with Recorder(nats_server.url, "a") as recorder, recorder.trajectory() as run:
            window_id = window_at(run.started_at, 3600).window_id
            assert await recorder.flush() == 0
            assert await bus.command("recorder", "close_window", {"window_id": window_id}) == {
                "window_id": window_id,
                "state": "open",
            }

            async def stored() -> bool:
                return bool(await pool.fetchval("select count(*) = 1 from trajectories"))

            await until(stored)
            await closing.tick()  # a run is open, and has time left
            assert await pool.fetchval("select state from windows where window_id = $1", window_id) == "open"

        async def closed() -> bool:
            await closing.tick()
            return bool(await pool.fetchval("select state = 'closed' from windows where window_id = $1", window_id))

        await until(closed)
        async with Recorder(nats_server.url, "b") as recorder, recorder.trajectory(started_at=run.started_at):
            pass

        async def counted() -> bool:
            return bool(await pool.fetchval("select late = 1 from windows where window_id = $1", window_id))

        await until(counted)
        assert (await bus.command("recorder", "close_window", {"window_id": window_id}))["state"] == "closed"
        with pytest.raises(GiveUpError, match="is no window id"):
            await bus.command("recorder", "close_window", {"window_id": "yesterday"})
    assert [(e.trajectories, e.late) for e in await closed_windows(bus) if e.window_id == window_id] == [(1, 0)]


async def test_a_run_that_never_ends_is_cut_at_its_limit(nats_server: NatsServer, bus: Bus, pool: Pool) -> None:
    recorder = Recorder(nats_server.url, "a")
    run = recorder.trajectory().start()
    assert await recorder.close() == 0
    clock = [datetime.now(UTC)]
    async with replica(nats_server.url, pool, settings(window_s=1, trajectory_limit_s=600)) as (_, closing):
        closing._now = lambda: clock[0]

        async def state() -> str | None:
            await closing.tick()
            state: str | None = await pool.fetchval(
                "select w.state from trajectories join windows w using (window_id) where trajectory_id = $1",
                run.trajectory_id,
            )
            return state

        await until(state)
        clock[0] = run.started_at + timedelta(seconds=599)
        assert await state() == "open"
        clock[0] = run.started_at + timedelta(seconds=600)

        async def closed() -> bool:
            return await state() == "closed"

        await until(closed)
    assert await pool.fetchval("select status from trajectories") == "truncated"


class StoredThrough:
    """A stream that ends at a sequence, with all of it stored."""

    def __init__(self, sequence: int) -> None:
        self.sequence = sequence

    async def end(self) -> Barrier:
        return Barrier(START, self.sequence)

    async def floor(self) -> int:
        return self.sequence


@pytest.mark.parametrize("window_s", [1, 3600, 7 * 86_400])
async def test_a_run_with_an_impossible_start_holds_no_window_up(bus: Bus, pool: Pool, window_s: int) -> None:
    """datetime.min is what asyncpg writes as -infinity, and reads back without a zone."""
    said = [datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC), datetime(1, 1, 1, 5, tzinfo=UTC)]
    odd = [step(0, f"odd-{n}", started_at=at, occurred_at=at) for n, at in enumerate(said)]
    await EventStore(pool).keep(numbered(*odd, ended(step_count=0)), window_s)
    window, later = window_at(START, window_s), window_at(START, window_s).ends_at + timedelta(seconds=10)
    closing = Closing(WindowStore(pool), StoredThrough(9), bus, settings(window_s=window_s), lambda: later)
    await closing.tick()
    placed = await pool.fetch("select distinct window_id, started_at from trajectories where clock_skewed")
    assert [tuple(row) for row in placed] == [(window.window_id, START)]
    told = {event.window_id: event.trajectories for event in await closed_windows(bus)}
    assert told[window.window_id] == 4
    assert sum(told.values()) == 4
    assert await pool.fetchval("select max(ends_at) from windows where state = 'closed'") >= window.ends_at


class Faulty(WindowStore):
    """Cannot write one window's barrier, nor close another."""

    def __init__(self, pool: Pool, unbarred: str, unclosed: str) -> None:
        super().__init__(pool)
        self.faults = {unbarred, unclosed}
        self.unbarred = unbarred

    async def write_barrier(self, window_id: str, barrier: Barrier) -> None:
        if window_id == self.unbarred and window_id in self.faults:
            raise TypeError("a naive datetime")
        await super().write_barrier(window_id, barrier)

    async def close(self, window_id: str, *, floor: int, opened_before: datetime) -> Record | None:
        if window_id in self.faults:
            raise ZeroDivisionError
        return await super().close(window_id, floor=floor, opened_before=opened_before)


async def test_a_window_that_cannot_be_closed_holds_up_no_other(bus: Bus, pool: Pool) -> None:
    windows = [window_at(START + timedelta(seconds=n * WINDOW_S), WINDOW_S) for n in range(4)]
    ids = [window.window_id for window in windows]
    store = Faulty(pool, *ids[:2])
    await store.make_windows(windows)
    aside = Aside("recorder", pool)
    closing = Closing(store, StoredThrough(9), bus, settings(), lambda: windows[-1].ends_at, aside)
    await closing.tick()
    assert [event.window_id for event in await closed_windows(bus)] == ids[2:]
    notes = await pool.fetch("select kind, key, reason from set_aside order by key")
    assert [tuple(note) for note in notes] == [
        ("close window", ids[0], "TypeError: a naive datetime"),
        ("close window", ids[1], "ZeroDivisionError"),
    ]
    assert [window.window_id for window in await store.due(windows[-1].ends_at, aside.resting("close window"))] == []

    store.faults.clear()
    aside = Aside("recorder", pool)
    await Closing(store, StoredThrough(9), bus, settings(), lambda: windows[-1].ends_at, aside).tick()
    assert sorted(event.window_id for event in await closed_windows(bus)) == ids


async def test_a_row_that_was_not_announced_is_announced_by_the_sweep(bus: Bus, pool: Pool) -> None:
    store = WindowStore(pool)
    closing = Closing(store, StepStream(bus), bus, settings())
    window = window_at(datetime.now(UTC), WINDOW_S)
    await store.make_windows([window])
    await store.write_barrier(window.window_id, Barrier(datetime.now(UTC), 0))
    assert await store.close(window.window_id, floor=0, opened_before=datetime.now(UTC)) is not None
    await closing.sweep()
    await closing.sweep()
    assert [event.window_id for event in await closed_windows(bus)] == [window.window_id]
