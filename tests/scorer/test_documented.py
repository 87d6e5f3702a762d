"""The papers are true: the run in docs/events.md, published as it stands there, is stored whole and judged."""

from __future__ import annotations

import json
import re
from typing import Any

from docs.generate import HERE
from services.outcome_tracker.service import Facts
from services.outcome_tracker.store import OutcomeStore
from services.recorder.handlers import subscribe
from services.recorder.service import Recording
from services.recorder.settings import RecorderSettings
from services.recorder.store import EventStore
from services.recorder.stream import StepStream
from services.recorder.window_store import WindowStore
from services.recorder.windows import Closing
from shared import subjects
from shared.bus import Bus
from shared.database import Pool
from shared.delivery import Ack
from shared.streams import ack_floor
from tests.outcome_tracker.world import deliveries
from tests.scorer.test_service import Kept, Scripted, scorer

WINDOW_ID = "2026-11-20T10:00"


def examples(part: str) -> list[dict[str, Any]]:
    """The JSON of one part of docs/events.md, by its heading."""
    [text] = re.findall(rf"^## {re.escape(part)}[^\n]*\n(.*?)^## ", (HERE / "events.md").read_text(), re.M | re.S)
    return [json.loads(block) for block in re.findall(r"```json\n(.*?)```", text, re.S)]


def test_each_event_has_an_id_of_its_own() -> None:
    events = [*examples("From an agent"), *examples("From the world")]
    assert len({event["event_id"] for event in events}) == len(events) == 9


async def test_the_documented_facts_are_stored_and_reward_the_run(pool: Pool) -> None:
    facts = [json.dumps(fact).encode() for fact in examples("From the world")]
    assert await Facts(OutcomeStore(pool)).take_in(deliveries(*facts)) == [Ack()] * 5
    assert await pool.fetchval("select count(*) from outcomes") == 5
    row = await pool.fetchrow("select agent_id, trajectory_id, reward from rewards")
    assert row is not None
    assert tuple(row) == ("ada", "t-81f2", 0.62)


async def test_the_documented_run_is_stored_whole_and_judged(pool: Pool, bus: Bus) -> None:
    chosen = RecorderSettings()
    closing = Closing(WindowStore(pool), StepStream(bus), bus, chosen)
    subscribe(bus, Recording(EventStore(pool), chosen), closing, gather_s=0.02)
    await bus.broker.start()
    for agent_id in ("ada", "ben"):
        for event in examples("From an agent"):
            data = json.dumps(event).encode()
            await bus.publish(f"steps.{agent_id}", data, f"{agent_id}:{event['event_id']}")
    last = (await bus.js.stream_info("STEPS")).state.last_seq
    while await ack_floor(bus, subjects.RECORDER_STEPS) < last:
        pass
    assert (await bus.js.stream_info("DEAD")).state.messages == 0
    assert await pool.fetchval("select count(*) from bodies") == 8

    service = scorer(pool, Kept(), Scripted())
    await service.form(WINDOW_ID)
    await service.judge_waiting(WINDOW_ID)
    rows = await pool.fetch(
        "select agent_id, state, left_out, ranks_last from groups join group_members using (group_id) order by 1"
    )
    assert [tuple(row) for row in rows] == [(agent_id, "scored", None, None) for agent_id in ("ada", "ben")]
