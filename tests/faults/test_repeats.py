"""The same event several times, within and beyond the time for which the broker knows ids, and in reverse."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ratchet_sdk.events import message_id
from ratchet_sdk.values import encoded

from tests.faults.agent import Wire, run_of
from tests.faults.site import Site

TIMES = 5
WINDOW_S = 0.5


async def test_an_event_that_is_sent_five_times_is_stored_once(place: Site, told: Callable[..., None]) -> None:
    """Thrice within the broker's memory of its id, a fourth time beyond it, a fifth without a message id."""
    await place.change_stream("STEPS", duplicate_window=int(WINDOW_S * 1e9))
    await place.recorder()
    wire = Wire(place.bus, "a", place.home)
    events = run_of(place.rng, 40)
    acks = [await wire.good(event) for event in events for _ in range(TIMES - 2)]
    known = sum(bool(ack.duplicate) for ack in acks)
    await asyncio.sleep(2 * WINDOW_S)
    for event in reversed(events):
        acks.append(await wire.good(event))
        acks.append(await wire.publish(encoded(event), event_id=event.event_id))
    counts = await place.settle()
    in_the_stream = await place.messages()
    told(sent=len(acks), known_to_the_broker=known, in_the_stream=in_the_stream, **counts)
    assert known > 0
    assert in_the_stream >= 3 * len(events)
    assert counts["stored"] == len(events)


async def test_a_run_in_reverse_is_the_same_run(place: Site, told: Callable[..., None]) -> None:
    forwards, backwards = Wire(place.bus, "forwards", place.home), Wire(place.bus, "backwards", place.home)
    events = run_of(place.rng, 30)
    for event in events:
        await forwards.good(event)
    for event in reversed(events):
        await backwards.good(event)
    shuffled = Wire(place.bus, "shuffled", place.home)
    for event in place.rng.sample(events * TIMES, len(events) * TIMES):
        await shuffled.good(event)
    await place.recorder(batch_size=7)
    counts = await place.settle()
    rows = await place.pool.fetch(
        """select policy, window_id, scenario_id, started_at, started, ended_at, status, step_count, late,
                  (select count(*) from steps s where s.agent_id = t.agent_id) as steps,
                  (select count(*) from llm_calls c where c.agent_id = t.agent_id and recorded is not null) as calls
             from trajectories t"""
    )
    told(runs=len(rows), **counts)
    assert len(rows) == 3
    assert len(set(rows)) == 1
    assert counts["stored"] == 3 * len(events)


async def test_an_event_under_another_agents_message_id_suppresses_nothing(
    place: Site, told: Callable[..., None]
) -> None:
    """The thief's messages bear the ids that the victim will use; the SDK hears "duplicate" at a first try."""
    await place.recorder()
    thief, victim = Wire(place.bus, "thief", place.home), place.agent("victim")
    events, stolen = run_of(place.rng, 20), run_of(place.rng, 20)
    for event, mine in zip(events, stolen, strict=True):
        name = message_id("victim", event.event_id)
        await thief.publish(encoded(mine), event_id=mine.event_id, Nats_Msg_Id=name)
    victim.offer(events)
    assert await victim.acknowledged()
    counts = await place.settle()
    told(stolen=len(stolen), **counts)
    assert counts["stored"] == len(events) + len(stolen)
