"""A service that was stopped in the middle says nothing: real processes, stopped by a signal, are found by it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from datetime import datetime, timedelta

import pytest

from services.admin import watch as watching
from services.admin.domain import Presence, verdict
from services.admin.watch import Watch, lag_of, watched
from services.local.embedded import NatsServer
from shared import subjects
from shared.bus import Bus
from shared.service import presence


@contextlib.asynccontextmanager
async def running(service: str, **environment: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        f"services.{service}",
        env={**os.environ, **environment},
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGCONT)
            process.kill()
        await process.wait()


def of(watch: Watch, service: str) -> Presence:
    return next(one for one in watch.services() if one.service == service)


async def until(watch: Watch, service: str, state: str, replicas: int) -> Presence:
    while True:
        await watch.look()
        said = of(watch, service)
        if (said.state, said.replicas) == (state, replicas):
            return said
        await asyncio.sleep(0.05)


@pytest.mark.e2e
async def test_a_stopped_replica_is_found_beside_one_that_works_and_one_that_ended_is_gone(
    bus: Bus, nats_server: NatsServer, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "PATIENCE_S", 0.5)
    environment = {"RATCHET_NATS_URL": nats_server.url, "RATCHET_DATABASE_URL": database_url}
    watch = Watch(bus)
    await watch.look()
    assert {one.state for one in watch.services()} == {"absent"}
    async with running("outcome_tracker", **environment) as first, running("outcome_tracker", **environment) as second:
        await until(watch, "outcome_tracker", "ok", 2)
        first.send_signal(signal.SIGSTOP)
        said = await until(watch, "outcome_tracker", "hung", 2)
        assert isinstance(said.since, datetime)
        assert f":{first.pid} is connected and does not answer" in said.detail
        second.kill()
        await second.wait()
        assert "is connected" in (await until(watch, "outcome_tracker", "hung", 1)).detail
        stranger = Watch(bus)  # one that never heard it: its silence is enough
        await stranger.look()
        assert of(stranger, "outcome_tracker") == Presence(
            "outcome_tracker", "hung", 1, "it is connected and does not answer"
        )
        first.send_signal(signal.SIGCONT)
        await until(watch, "outcome_tracker", "ok", 1)
        first.kill()
        await first.wait()
        await until(watch, "outcome_tracker", "absent", 0)


async def test_what_is_wrong_with_a_service_is_in_its_answer(bus: Bus) -> None:
    faults: list[str | None] = [None]

    async def check() -> str | None:
        return faults[0]

    await bus.answer(("ready.scorer", "ready.scorer.x"), presence("scorer", [check]))
    watch = await watched(bus)
    assert (of(watch, "scorer").state, of(watch, "trainer").state) == ("ok", "absent")
    faults[0] = "Postgres did not answer"
    await watch.look()
    assert of(watch, "scorer").state == "not ready"
    assert of(watch, "scorer").detail.endswith(": Postgres did not answer")


async def test_a_broker_that_is_away_raises_nothing(bus: Bus, nats_server: NatsServer) -> None:
    gone = Bus(nats_server.url, name="gone", on_closed=lambda: None)
    await gone.connect()
    await gone.nc.close()
    watch = Watch(gone)
    await watch.look()
    assert {one.state for one in watch.services()} == {"absent"}
    assert {row["verdict"] for row in watch.consumers()} == {"missing"}


async def test_the_server_tells_when_a_consumer_last_moved(bus: Bus) -> None:
    """What the verdict of a stuck consumer rests on."""
    consumer = subjects.TRACKER_OUTCOMES
    assert (await lag_of(bus, consumer)).active_at is None
    for n in range(2):
        await bus.publish("outcomes.market", b"{}", str(n))
    pulled = await bus.js.pull_subscribe_bind(consumer.durable, consumer.stream)
    first, second = await pulled.fetch(2)
    await first.ack_sync()
    there = await lag_of(bus, consumer)
    assert (there.pending, there.unacknowledged, there.floor) == (0, 1, 1)
    assert there.active_at is not None
    later = there.active_at + timedelta(seconds=consumer.ack_wait_s + 1)
    assert verdict(await lag_of(bus, consumer), there, later) == "stuck"
    await second.ack_sync()
    assert verdict(await lag_of(bus, consumer), there, later) == "ok"


async def test_an_answer_of_another_release_is_no_answer(bus: Bus) -> None:
    async def said() -> dict[str, object]:
        return {"service": 5}

    await bus.answer(("ready.scorer",), said)
    watch = Watch(bus)
    watching_patience, watching.PATIENCE_S = watching.PATIENCE_S, 0.3
    await watch.look()
    watching.PATIENCE_S = watching_patience
    assert of(watch, "scorer").state == "hung"
