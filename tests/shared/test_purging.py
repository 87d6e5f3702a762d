"""What is let go of in a stream: nothing that is not settled by all, nothing young while there is room."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from shared import subjects
from shared.bus import Bus
from shared.errors import RetryLaterError
from shared.purging import STAYS, Purging
from shared.streams import ack_floor

COUNT = 12


async def stored(bus: Bus, count: int) -> list[datetime]:
    """Publish events and have the first ``count`` of them acknowledged; gives the times of all."""
    for number in range(COUNT):
        await bus.publish("steps.a", b"{}", f"m{number}")
    if count:
        pulled = await bus.js.pull_subscribe_bind(durable="recorder", stream="STEPS")
        for message in await pulled.fetch(count, timeout=5):
            await message.ack()
    async with asyncio.timeout(10):
        while await ack_floor(bus, subjects.RECORDER_STEPS) < count:
            await asyncio.sleep(0.02)
    times = [(await bus.js.get_msg("STEPS", n)).time for n in range(1, COUNT + 1)]
    return [time.astimezone(UTC) for time in times if time is not None]


async def first(bus: Bus, stream: str = "STEPS") -> int:
    return int((await bus.js.stream_info(stream)).state.first_seq)


async def test_what_is_stored_and_a_day_old_goes(bus: Bus) -> None:
    times = await stored(bus, 8)
    await bus.js.delete_msg("STEPS", 3)
    await bus.js.delete_msg("STEPS", 6)
    for at, expected in ((0, 1), (4, 5), (6, 7), (COUNT - 1, 9)):
        await Purging(bus, "STEPS", lambda at=at: times[at] + STAYS).round()  # type: ignore[misc]  # bound now
        assert await first(bus) == expected
    await Purging(bus, "STEPS", lambda: times[-1] + 2 * STAYS).round()
    assert await first(bus) == 9, "what nobody has acknowledged stays, however old it is"


async def test_a_stream_that_fills_up_lets_go_of_all_that_is_stored(bus: Bus) -> None:
    await stored(bus, 8)
    config = (await bus.js.stream_info("STEPS")).config
    await bus.js.update_stream(config, max_bytes=(await bus.js.stream_info("STEPS")).state.bytes + 10)
    await Purging(bus, "STEPS", lambda: datetime.now(UTC) - timedelta(days=9)).round()
    assert await first(bus) == 9


async def test_nothing_is_purged_before_anything_is_stored(bus: Bus) -> None:
    await Purging(bus, "STEPS").round()
    times = await stored(bus, 0)
    await Purging(bus, "STEPS", lambda: times[-1] + 2 * STAYS).round()
    assert await first(bus) == 1


async def test_of_a_stream_with_several_consumers_only_what_the_slowest_has_settled_goes(bus: Bus) -> None:
    """One that is missing may have to hear all of it once it is back: nothing goes meanwhile."""
    for number in range(4):
        await bus.publish(subjects.WINDOW_RESOLVED, b"{}", f"r{number}")
    purging = Purging(bus, "LOOP", lambda: datetime.now(UTC) + 2 * STAYS)
    for durable, count in (("scorer_window_resolved", 4), ("deployer_window_resolved", 2)):
        pulled = await bus.js.pull_subscribe_bind(durable=durable, stream="LOOP")
        for message in await pulled.fetch(count, timeout=5):
            await message.ack_sync()
    await purging.round()
    assert await first(bus, "LOOP") == 1, "an idle consumer counts from the second round on"
    await purging.round()
    assert await first(bus, "LOOP") == 3
    for message in await pulled.fetch(2, timeout=5):
        await message.ack_sync()
    config = (await bus.js.consumer_info("LOOP", "trainer_group_scored")).config
    await bus.js.delete_consumer("LOOP", "trainer_group_scored")
    with pytest.raises(RetryLaterError, match="trainer_group_scored"):
        await purging.round()
    assert await first(bus, "LOOP") == 3
    await bus.js.add_consumer("LOOP", config)
    await purging.round()
    assert await first(bus, "LOOP") == 5
