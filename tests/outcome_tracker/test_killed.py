"""kill -9 of the tracker between settlement and announcement: each revision is announced exactly once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from pydantic_core import from_json, to_json

from services.local.embedded import NatsServer
from shared.bus import Bus
from shared.database import Pool
from tests.outcome_tracker.world import add_window, closed, resolved, reward, until

pytestmark = pytest.mark.e2e


@contextmanager
def process(nats_server: NatsServer, database_url: str) -> Iterator[subprocess.Popen[bytes]]:
    """The service as it is run, with its own rights at the broker."""
    settings = {
        "NATS_URL": nats_server.url_of("outcome_tracker"),
        "DATABASE_URL": database_url,
        "SETTLE_MIN_S": "0",
        "TICK_S": "0.05",
        "SWEEP_S": "0.05",
        "CORRECT_AFTER_S": "0.01",
    }
    environment = {**os.environ, **{f"RATCHET_{name}": value for name, value in settings.items()}}
    started = subprocess.Popen(
        [sys.executable, "-m", "services.outcome_tracker"], env=environment, stderr=subprocess.DEVNULL
    )
    try:
        yield started
    finally:
        started.send_signal(signal.SIGKILL)
        started.wait(20)


async def room_in_the_loop(bus: Bus, *, more: bool) -> None:
    """Let the stream take further messages, or refuse them all: then nothing can be announced."""
    info = from_json((await bus.nc.request("$JS.API.STREAM.INFO.LOOP", b"")).data)
    config: dict[str, Any] = {**info["config"], "max_msgs": -1 if more else info["state"]["messages"]}
    answer = from_json((await bus.nc.request("$JS.API.STREAM.UPDATE.LOOP", to_json(config))).data)
    assert "error" not in answer, answer


async def settled(pool: Pool, revision: int) -> None:
    async def is_settled() -> object:
        return await pool.fetchval(
            "select true from settlements where revision = $1 and state = 'settled' and announced_at is null", revision
        )

    await until(is_settled)


async def all_announced(pool: Pool) -> None:
    async def announced() -> object:
        return await pool.fetchval("select count(*) > 0 and bool_and(announced_at is not null) from settlements")

    await until(announced)


async def has_been_told(bus: Bus, revision: int) -> None:
    async def told() -> bool:
        return revision in {event.revision for event in await resolved(bus)}

    await until(told)


@pytest.mark.parametrize("moment", ["before it is published", "before that is noted"])
async def test_a_killed_tracker_announces_each_revision_once(
    pool: Pool, bus: Bus, nats_server: NatsServer, database_url: str, moment: str
) -> None:
    await add_window(pool, "a")
    for revision in (1, 2):
        if revision == 1:
            await bus.announce(closed())
        await room_in_the_loop(bus, more=False)
        with process(nats_server, database_url) as first:
            if revision == 2:  # a fact that comes after the settlement
                await bus.publish("outcomes.market", reward("a", 1), "a reward")
            await settled(pool, revision)
            assert revision not in {event.revision for event in await resolved(bus)}
            async with pool.acquire() as connection, connection.transaction():
                if moment == "before that is noted":
                    await connection.execute("select 1 from settlements where revision = $1 for update", revision)
                    await room_in_the_loop(bus, more=True)
                    await has_been_told(bus, revision)
                first.kill()
                first.wait(20)
                await pool.execute(  # what the dead process has asked of the database dies with it
                    """select pg_terminate_backend(pid) from pg_stat_activity
                        where application_name = 'outcome_tracker' and datname = current_database()"""
                )
        assert await pool.fetchval("select announced_at from settlements where revision = $1", revision) is None
        await room_in_the_loop(bus, more=True)
        with process(nats_server, database_url):
            await all_announced(pool)
        assert Counter(event.revision for event in await resolved(bus)) == Counter(range(1, revision + 1))
