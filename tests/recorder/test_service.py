"""The whole recorder on a real broker and a real database: published with the SDK, stored, closed, announced."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from ratchet_sdk import Recorder
from ratchet_sdk.events import MAX_EVENT_BYTES, message_id

from services.cli.embedded import NatsServer
from services.recorder.domain import Received
from services.recorder.handlers import subscribe
from services.recorder.service import Kept, Recording
from services.recorder.settings import RecorderSettings
from services.recorder.store import EventStore
from services.recorder.stream import StepStream
from shared import database
from shared.bus import Bus
from shared.database import Pool
from shared.delivery import Ack, Dead
from shared.errors import GiveUpError, RetryLaterError
from shared.events import LoopEvent, WindowClosed
from shared.streams import Barrier
from shared.trajectories import load
from shared.windows import window_at
from tests.recorder.events import WINDOW_S, call_made, delivery, encoded, ended, reply, started, step


async def until(condition: Callable[[], Awaitable[object]]) -> None:
    async with asyncio.timeout(20):
        while not await condition():
            await asyncio.sleep(0.02)


class Silent:
    """Announces nothing; a stream that is never asked."""

    async def announce(self, event: LoopEvent) -> None: ...
    async def end(self) -> Barrier:
        return Barrier(datetime.now(UTC), 0)

    async def floor(self) -> int:
        return 0


def settings(**more: Any) -> RecorderSettings:
    return RecorderSettings(**{"window_s": WINDOW_S, "grace_s": 0, "trajectory_limit_s": 5, **more})


def recording(pool: Pool, **more: Any) -> Recording:
    return Recording(EventStore(pool), Silent(), Silent(), settings(**more))


# a batch ----------------------------------------------------------------------------------------
STEP = step(0)
GOOD = encoded(STEP)
HOSTILE = {
    "not JSON": b"{",
    "nothing": b"",
    "no object": b"[]",
    "half a surrogate": GOOD.replace(b'"t"', b'"\\ud800"'),
    "not UTF-8": GOOD.replace(b'"t"', b'"\xff"'),
    "another schema": GOOD.replace(b'"schema":1', b'"schema":2'),
    "another kind": GOOD.replace(b'"kind":"step"', b'"kind":"hop"'),
    "an id that is no UUIDv7": GOOD.replace(str(STEP.event_id).encode(), b"00000000-0000-4000-8000-000000000000"),
    "no id": GOOD.replace(b'"event_id"', b'"other_id"'),
    "a NUL in an id": GOOD.replace(b'"t"', b'"t\\u0000"'),
    "no zone": GOOD.replace(b"Z", b""),
    "a step beyond int4": GOOD.replace(b'"step":0', b'"step":2147483648'),
    "a reward that is no number": GOOD.replace(b'"step":0', b'"step":0,"reward":NaN'),
    "deep": b'{"a":' * 100_000,
    "no window": encoded(step(0, started_at=datetime(1, 1, 1, tzinfo=UTC))),
}


async def test_bad_events_are_dead_and_their_neighbours_pass(pool: Pool) -> None:
    deliveries = [delivery(data, 2 * place + 2) for place, data in enumerate(HOSTILE.values())]
    good = [delivery(encoded(step(n)), 2 * n + 1) for n in range(len(HOSTILE) + 1)]
    mixed = sorted([*good, *deliveries], key=lambda d: d.sequence)
    verdicts = await recording(pool, window_s=7 * 86_400).take_in(mixed)
    dead = {d.sequence: v for d, v in zip(mixed, verdicts, strict=True) if isinstance(v, Dead)}
    assert sorted(dead) == [d.sequence for d in deliveries]
    assert await pool.fetchval("select count(*) from steps") == len(good)
    for verdict in dead.values():
        assert verdict.reason.isprintable()


async def test_encodings_sizes_and_subjects_are_checked(pool: Pool) -> None:
    large = encoded(step(1, environment={"x": "y" * MAX_EVENT_BYTES}))
    mixed = [
        delivery(gzip.compress(GOOD), 1, Content_Encoding="gzip"),
        delivery(GOOD, 2, Content_Encoding="br"),
        delivery(GOOD, 3, Content_Encoding="gzip"),
        delivery(large, 4),
        delivery(gzip.compress(large), 5, Content_Encoding="gzip"),
        delivery(GOOD, 6, "steps.a.b"),
    ]
    verdicts = await recording(pool).take_in(mixed)
    assert [type(v) for v in verdicts] == [Ack, Dead, Dead, Dead, Dead, Dead]
    body = await pool.fetchrow("select sha256, size_bytes from bodies")
    assert body is not None
    assert (body["sha256"], body["size_bytes"]) == (hashlib.sha256(GOOD).digest(), len(GOOD))


async def test_an_odd_but_lawful_event_is_stored(pool: Pool) -> None:
    ancient = UUID("00000000-0001-7000-8000-000000000000")
    odd = [
        encoded(step(0, environment={"\u0000": "\u0000", "n": 1e308}, action={"type": "😀", "error": "\u0000"})),
        encoded(started(goal="\u0000", metadata={"a": {"b": ["\u0000"]}})),
        encoded(step(1).model_copy(update={"event_id": ancient})),
        encoded(call_made("c", response=reply("\u0000"), usage={"prompt_tokens": 10**30, "completion_tokens": "x"})),
        encoded(ended(started_at=datetime(1970, 1, 1, tzinfo=UTC))),
        encoded(step(2, started_at=datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC), trajectory_id="future")),
        encoded(step(3)).replace(b'"step":3', b'"step":3,"unknown":{"kept":[1,2]}'),
    ]
    verdicts = await recording(pool).take_in([delivery(data, n + 1) for n, data in enumerate(odd)])
    assert verdicts == [Ack()] * len(odd)
    stored = {zlib.decompress(row["body"]) for row in await pool.fetch("select body from bodies")}
    assert stored == set(odd)
    assert await pool.fetchval("select clock_skewed from trajectories where trajectory_id = 'future'") is True


async def test_a_value_that_only_the_database_refuses_is_dead_alone(pool: Pool) -> None:
    await pool.execute("alter table steps add check (action_type <> 'poison')")
    batch = [delivery(encoded(step(n, action={"type": "poison" if n in (3, 17) else "buy"})), n + 1) for n in range(20)]
    verdicts = await recording(pool).take_in(batch)
    assert [n for n, verdict in enumerate(verdicts) if isinstance(verdict, Dead)] == [3, 17]
    assert await pool.fetchval("select count(*) from steps") == 18


class Away:
    async def keep(self, events: Sequence[Received], window_s: int) -> Kept:
        raise RetryLaterError("Postgres is away")


async def test_an_absent_database_is_nobodys_fault() -> None:
    service = Recording(Away(), Silent(), Silent(), settings())  # type: ignore[arg-type]  # only keep is reached
    with pytest.raises(RetryLaterError):
        await service.take_in([delivery(GOOD, 1)])


# the service ------------------------------------------------------------------------------------
@asynccontextmanager
async def replica(nats_url: str, pool: Pool, chosen: RecorderSettings) -> AsyncIterator[tuple[Bus, Recording]]:
    """A recorder as app.py wires it; its ticks are run by the test."""
    bus = Bus(nats_url, name="recorder")
    await bus.connect()
    service = Recording(EventStore(pool), StepStream(bus), bus, chosen)
    subscribe(bus, service, gather_s=0.05)
    await bus.broker.start()
    try:
        yield bus, service
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
        assert {message_id(r["agent_id"], r["event_id"]): zlib.decompress(r["body"]) for r in rows} == sent
        assert all(hashlib.sha256(zlib.decompress(r["body"])).digest() == r["sha256"] for r in rows)

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
    async with replica(nats_server.url, pool, chosen) as (_, service):
        service._now = lambda: clock[0]

        async def stored() -> bool:
            return bool(await pool.fetchval("select count(*) = 1 from trajectories where status = 'completed'"))

        await until(stored)
        clock[0] = window_at(datetime.now(UTC), 2).ends_at

        async def closed() -> bool:
            await service.tick()
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
    async with replica(nats_server.url, pool, settings(window_s=3600, grace_s=3600)) as (_, service):
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
            await service.tick()  # a run is open, and has time left
            assert await pool.fetchval("select state from windows where window_id = $1", window_id) == "open"

        async def closed() -> bool:
            await service.tick()
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
    async with replica(nats_server.url, pool, settings(window_s=1, trajectory_limit_s=600)) as (_, service):
        service._now = lambda: clock[0]

        async def state() -> str | None:
            await service.tick()
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


async def test_a_row_that_was_not_announced_is_announced_by_the_sweep(bus: Bus, pool: Pool) -> None:
    service = Recording(EventStore(pool), StepStream(bus), bus, settings())
    store = EventStore(pool)
    window = window_at(datetime.now(UTC), WINDOW_S)
    await store.make_windows([window])
    await store.write_barrier(window.window_id, Barrier(datetime.now(UTC), 0))
    assert await store.close(window.window_id, floor=0, opened_before=datetime.now(UTC)) is not None
    await service.sweep()
    await service.sweep()
    assert [event.window_id for event in await closed_windows(bus)] == [window.window_id]
