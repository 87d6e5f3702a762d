"""The database restarted, killed, away, and out of connections: the broker keeps what it cannot take yet."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from contextlib import ExitStack

import psycopg

from tests.faults.agent import Load
from tests.faults.site import Site, until

RESTARTS = 3


async def test_a_restarted_and_a_killed_database(place: Site, told: Callable[..., None]) -> None:
    recorder = await place.recorder()
    while_storing = 0
    async with Load(place) as load:
        for number in range(2 * RESTARTS):
            await load.more()
            await asyncio.sleep(place.rng.random() * 0.3)
            while_storing += bool(await place.unsettled())
            await end_postgres(place, gently=bool(number % 2))
            await place.restart_postgres()
        await recorder.ready()
    failed = recorder.words().count("batch_failed")
    told(restarts=2 * RESTARTS, while_storing=while_storing, batches_failed=failed, **await place.settle())
    assert while_storing > 0
    assert failed > 0


async def test_a_database_that_refuses_connections(place: Site, told: Callable[..., None]) -> None:
    recorder = await place.recorder()
    async with Load(place, backlog=20_000) as load:
        await load.more()
        await end_postgres(place, gently=True)
        before = load.offered
        try:

            async def some_failed() -> bool:
                return recorder.words().count("batch_failed") >= 3

            await until(some_failed)
            faults = await recorder.faults()
            await load.more(since=before)
            unsettled = await place.unsettled()
        finally:
            await place.restart_postgres()
        await recorder.ready()
    told(unsettled=unsettled, faults=faults, **await place.settle())
    assert any("Postgres" in fault for fault in faults)
    assert unsettled


async def test_a_database_out_of_connections(place: Site, told: Callable[..., None]) -> None:
    """Somebody else holds every one of them; the recorder's own are ended, and it gets none again."""
    recorder = await place.recorder()
    async with Load(place, backlog=20_000) as load:
        await load.more()
        with ExitStack() as held:
            taken = await asyncio.to_thread(take_all_connections, place, held)
            before = load.offered  # the backlog may be full by the time that the recorder says what is wrong

            async def some_failed() -> bool:
                return "too many clients" in recorder.words()

            await until(some_failed)
            await load.more(since=before)
            unsettled = await place.unsettled()
        await recorder.ready()
    told(connections_taken=taken, unsettled=unsettled, **await place.settle())
    assert unsettled


async def end_postgres(place: Site, *, gently: bool) -> None:
    """Fast shutdown, or kill -9 of the postmaster: its children see that it is gone, and recovery follows."""
    process = place.postgres.process
    assert process is not None
    process.send_signal(signal.SIGINT if gently else signal.SIGKILL)
    await asyncio.to_thread(process.wait)


def take_all_connections(place: Site, held: ExitStack) -> int:
    """Until there are none, ending the recorder's own: what it had is taken before it comes back."""
    taken = 0
    others: psycopg.Connection | None = None
    while True:
        try:
            connection = held.enter_context(psycopg.connect(place.database_url, autocommit=True))
        except psycopg.OperationalError:
            assert others is not None
            ended = others.execute(
                "select pg_terminate_backend(pid, 1000) from pg_stat_activity where application_name = 'recorder'"
            ).fetchall()
            if not ended:
                return taken
            continue
        others = others or connection
        taken += 1
