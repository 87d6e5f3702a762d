"""The broker killed, away, full, and without the consumer or the stream that the recorder reads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from nats.js.errors import APIError

from shared.subjects import RECORDER_STEPS
from tests.faults.agent import Load, Wire, run_of
from tests.faults.site import RecorderProcess, Site, until

KILLS = 8
WINDOW_S = 1.0
FULL = 10077  # "maximum bytes exceeded"
SMALL_STREAM_BYTES = 2 * 1024 * 1024
NOTICED_WITHIN_S = 30.0  # promised: a deadline, not a measurement


async def test_a_killed_broker(place: Site, told: Callable[..., None]) -> None:
    await place.recorder()
    while_publishing = while_storing = 0
    async with Load(place) as load:
        for _ in range(KILLS):
            await load.more()
            await asyncio.sleep(place.rng.random() * 0.5)
            while_storing += bool(await place.unsettled())
            while_publishing += load.unsent > 0
            place.kill_nats()
            await place.restart_nats()
    told(kills=KILLS, while_publishing=while_publishing, while_storing=while_storing, **await place.settle())
    assert while_publishing > 0
    assert while_storing > 0


async def test_a_broker_that_is_away_for_longer_than_it_remembers_ids(place: Site, told: Callable[..., None]) -> None:
    await place.change_stream("STEPS", duplicate_window=int(WINDOW_S * 1e9))
    await place.recorder()
    agent = place.agent("a")
    agent.offer(run_of(place.rng, 300))
    assert await agent.acknowledged()
    place.kill_nats()
    agent.offer(run_of(place.rng, 300))
    assert not await agent.acknowledged(2 * WINDOW_S)
    waited = agent.publisher.counts.unsent
    await place.restart_nats()
    agent.offer_again()
    assert await agent.acknowledged()
    counts = await place.settle()
    twice = await place.messages() - counts["events"]
    told(waited=waited, twice_in_the_stream=twice, **counts)
    assert waited > 0
    assert twice >= 300


async def test_a_full_stream_refuses_and_drops_nothing(place: Site, told: Callable[..., None]) -> None:
    await place.change_stream("STEPS", max_bytes=SMALL_STREAM_BYTES)
    await place.recorder()
    agent = place.agent("a")
    wire = Wire(place.bus, "wire", place.home)
    for _ in range(60):
        agent.offer(run_of(place.rng, 50))
    assert not await agent.acknowledged(3.0)
    refused = 0
    for event in run_of(place.rng, 20, text_bytes=4000):
        with pytest.raises(APIError) as error:
            await wire.good(event)
        refused += error.value.err_code == FULL
    state = (await place.bus.js.stream_info("STEPS")).state
    unsent = agent.publisher.counts.unsent
    await place.change_stream("STEPS", max_bytes=100 * SMALL_STREAM_BYTES)
    assert await agent.acknowledged()
    told(unsent=unsent, refused=refused, **await place.settle())
    assert unsent > 0
    assert refused > 0
    assert state.first_seq == 1
    assert state.messages == state.last_seq


async def test_a_deleted_consumer(place: Site, told: Callable[..., None]) -> None:
    recorder = await place.recorder()
    async with Load(place) as load:
        await load.more()
        unsettled = await place.unsettled()
        await place.bus.js.delete_consumer(RECORDER_STEPS.stream, RECORDER_STEPS.durable)
        faults = await not_ready(recorder)
        await load.more()
        await place.provision()
        await recorder.ready()
        await load.more()
    told(unsettled=unsettled, faults=faults, **await place.settle())
    assert RECORDER_STEPS.durable in faults[0]


async def test_a_deleted_stream(place: Site, told: Callable[..., None]) -> None:
    """What lay unread in it is gone with it, so it is read first. What is published meanwhile waits with the agents.

    The new stream counts from 1 again: a bad event at a number that a dead letter of the old one bears is another.
    """
    recorder = await place.recorder()
    wire = Wire(place.bus, "wire", place.home)
    for _ in range(5):
        await wire.publish(place.rng.randbytes(50), bad=True)
    agent = place.agent("a")
    agent.offer(run_of(place.rng, 200))
    assert await agent.acknowledged()
    await place.drained()
    await place.bus.js.delete_stream("STEPS")
    faults = await not_ready(recorder)
    agent.offer(run_of(place.rng, 200))
    assert not await agent.acknowledged(1.0)
    unsent = agent.publisher.counts.unsent
    await place.provision()
    for _ in range(5):
        await wire.publish(place.rng.randbytes(50), bad=True)
    await recorder.ready()
    assert await agent.acknowledged()
    told(unsent=unsent, faults=faults, **await place.settle())
    assert unsent > 0


async def not_ready(recorder: RecorderProcess) -> list[str]:
    """Why, as it says within the promised time."""

    async def says_so() -> bool:
        return bool(await recorder.faults())

    await until(says_so, NOTICED_WITHIN_S)
    return await recorder.faults()
