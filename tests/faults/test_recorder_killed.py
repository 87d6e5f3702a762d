"""kill -9 of the recorder, at random moments and right after a commit."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import psycopg

from tests.faults.agent import Load
from tests.faults.site import RecorderProcess, Site

KILLS = 50


async def test_a_killed_recorder_loses_and_repeats_nothing(place: Site, told: Callable[..., None]) -> None:
    """Half of the kills come at any moment, half as soon as a batch is seen to be committed.

    What earlier kills left comes again after the ack wait, so a kill counts as a hit only where it left more than that.
    """
    in_a_batch = before_the_ack = 0
    async with Load(place):
        before = await place.left_behind()
        for number in range(KILLS):
            recorder = await place.recorder()
            if number % 2:
                await asyncio.sleep(place.rng.random() * 0.4)
                recorder.kill()
            else:
                await asyncio.to_thread(kill_after_commit, place.database_url, recorder)
            after = await place.left_behind()
            in_a_batch += after.uncommitted > before.uncommitted
            before_the_ack += after.unacked > before.unacked
            before = after
        await place.recorder()
    told(kills=KILLS, in_a_batch=in_a_batch, between_commit_and_ack=before_the_ack, **await place.settle())
    assert in_a_batch > 0
    assert before_the_ack > 0


def kill_after_commit(database_url: str, recorder: RecorderProcess, patience_s: float = 20.0) -> None:
    """In a thread, for the moment is short. Every batch moves its agents' ``last_seen`` on."""
    deadline = time.monotonic() + patience_s
    with psycopg.connect(database_url, autocommit=True) as connection:
        before = newest(connection)
        while newest(connection) == before:
            assert time.monotonic() < deadline, "the recorder commits nothing"
    recorder.kill()


def newest(connection: psycopg.Connection) -> object:
    return connection.execute("select max(last_seen) from seen_agents").fetchone()
