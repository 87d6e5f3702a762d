"""Several recorders: one stopped past its ack wait and woken, and each told to end under load."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

import pytest

from tests.faults.agent import Load
from tests.faults.site import RecorderProcess, Site, until

ENDS = 8
STOPS = 3
PATIENCE_S = 60.0


@pytest.mark.parametrize("replicas", [2, 3])
async def test_one_is_stopped_past_its_ack_wait_and_woken(
    place: Site, told: Callable[..., None], replicas: int
) -> None:
    """Once in the middle of a transaction, then at any moment. The others store what it held while it sleeps."""
    held = []
    for number in range(STOPS):
        sleeper = await place.recorder()
        async with Load(place, name=f"round-{number}") as load:
            await load.more()
            await stopped_with_messages(place, sleeper, in_a_transaction=number == 0)
            held.append(await place.unacked())
            others = [await place.recorder() for _ in range(replicas - 1)]
            await load.more()
        await place.drained(PATIENCE_S)
        sleeper.signal(signal.SIGCONT)
        await sleeper.ready()
        for other in others:
            other.kill()
        async with Load(place, name=f"awake-{number}") as load:
            await load.more()
        await place.drained()
        sleeper.kill()
    await place.recorder()
    told(stops=STOPS, held=held, **await place.settle())
    assert all(held)


async def stopped_with_messages(place: Site, recorder: RecorderProcess, *, in_a_transaction: bool) -> None:
    """SIGSTOP, until it came at a moment when messages were given out (and, where asked, rows written and not yet
    committed)."""

    async def caught() -> bool:
        recorder.signal(signal.SIGSTOP)
        await until(place.database_is_still)
        wanted = not in_a_transaction or await place.open_transactions()
        if wanted and await place.unacked() and not await place.half_prepared():
            return True
        recorder.signal(signal.SIGCONT)
        await asyncio.sleep(place.rng.random() * 0.05)
        return False

    await until(caught)


async def test_a_recorder_that_is_told_to_end_under_load(place: Site, told: Callable[..., None]) -> None:
    under_load, codes = 0, set()
    async with Load(place) as load:
        for _ in range(ENDS):
            recorder = await place.recorder()
            await load.more(50)
            await asyncio.sleep(place.rng.random() * 0.2)
            under_load += bool(await place.unsettled())
            recorder.signal(signal.SIGTERM)
            codes.add(await asyncio.to_thread(recorder.process.wait, PATIENCE_S))
        await place.recorder()
    told(ends=ENDS, under_load=under_load, exit_codes=codes, **await place.settle())
    assert under_load > 0
    assert codes == {0}
