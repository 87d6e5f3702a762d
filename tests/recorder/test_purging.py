"""What the recorder lets go of in its stream: nothing that is not stored, nothing young while there is room."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

from services.recorder.purging import STAYS, Purging
from services.recorder.stream import StepStream
from shared import subjects
from shared.bus import Bus
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


async def first(bus: Bus) -> int:
    return int((await bus.js.stream_info("STEPS")).state.first_seq)


async def test_what_is_stored_and_a_day_old_goes(bus: Bus) -> None:
    times = await stored(bus, 8)
    await bus.js.delete_msg("STEPS", 3)
    await bus.js.delete_msg("STEPS", 6)
    for at, expected in ((0, 1), (4, 5), (6, 7), (COUNT - 1, 9)):
        await Purging(StepStream(bus), lambda at=at: times[at] + STAYS).round()  # type: ignore[misc]  # bound now
        assert await first(bus) == expected
    await Purging(StepStream(bus), lambda: times[-1] + 2 * STAYS).round()
    assert await first(bus) == 9, "what nobody has acknowledged stays, however old it is"


async def test_a_stream_that_fills_up_lets_go_of_all_that_is_stored(bus: Bus) -> None:
    await stored(bus, 8)
    config = (await bus.js.stream_info("STEPS")).config
    await bus.js.update_stream(config, max_bytes=(await bus.js.stream_info("STEPS")).state.bytes + 10)
    await Purging(StepStream(bus), lambda: datetime.now(UTC) - timedelta(days=9)).round()
    assert await first(bus) == 9


async def test_nothing_is_purged_before_anything_is_stored(bus: Bus) -> None:
    await Purging(StepStream(bus)).round()
    times = await stored(bus, 0)
    await Purging(StepStream(bus), lambda: times[-1] + 2 * STAYS).round()
    assert await first(bus) == 1
