"""Dead letters: listed with their reasons, shown as they came, and sent again with effect."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest
from ratchet_sdk.events import TrajectoryStarted

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
from shared.streams import ack_floor
from tests.cli.conftest import Ratchet

pytestmark = pytest.mark.usefixtures("servers")
NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)


async def buried(bus: Bus, subject: str, data: bytes, reason: str, **headers: str) -> None:
    told = {"Ratchet-Reason": reason, "Ratchet-Subject": subject, "Ratchet-Published-At": NOW.isoformat(), **headers}
    await bus.publish("dead.recorder", data, f"dead:{subject}:{reason}", told)


async def test_they_are_listed_and_shown(ratchet: Ratchet, bus: Bus) -> None:
    assert (await ratchet("dead", "--json")).json == []
    await buried(bus, "steps.a", b"{\x1b[31m", "not JSON")
    await buried(bus, "steps.b", b'{"a": "\xff"}', "not UTF-8")
    await bus.publish("dead.outcome_tracker", b"x", "d", {"Ratchet-Subject": "outcomes.m", "Ratchet-Reason": "late"})
    listed = (await ratchet("dead", "--json")).json
    assert [(one["sequence"], one["consumer"], one["reason"]) for one in listed] == [
        (1, "recorder", "not JSON"),
        (2, "recorder", "not UTF-8"),
        (3, "outcome_tracker", "late"),
    ]
    assert [one["sequence"] for one in (await ratchet("dead", "--consumer", "recorder", "--json")).json] == [1, 2]
    assert [one["sequence"] for one in (await ratchet("dead", "--limit", "1", "--json")).json] == [3]
    assert "not UTF-8" in (await ratchet("dead")).out
    assert (await ratchet("dead", "show", "2", "--json")).json["content"] == '{"a": "\\xff"}'
    assert "\x1b" not in (await ratchet("dead", "show", "1")).out
    said = await ratchet("dead", "show", "9")
    assert (said.code, said.err) == (2, "ratchet: there is no dead letter 9; `ratchet dead` lists them\n")


async def test_what_is_sent_again_is_stored_once_its_reason_is_gone(ratchet: Ratchet, bus: Bus, pool: Pool) -> None:
    event = TrajectoryStarted(trajectory_id="t", started_at=NOW, occurred_at=NOW)
    await buried(bus, "steps.a", event.model_dump_json(by_alias=True).encode(), "a bug, mended since")
    await buried(bus, "steps.a", b"no event", "not an event")
    chosen = RecorderSettings()
    closing = Closing(WindowStore(pool), StepStream(bus), bus, chosen)
    subscribe(bus, Recording(EventStore(pool), chosen), closing, gather_s=0.02)
    await bus.broker.start()
    assert (await ratchet("dead", "replay", "--all", "--json")).json == {"replayed": [1, 2]}
    while await ack_floor(bus, subjects.RECORDER_STEPS) < 2:
        pass
    assert [row["trajectory_id"] for row in await pool.fetch("select trajectory_id from trajectories")] == ["t"]
    [again] = (await ratchet("dead", "--json")).json
    assert (again["sequence"], again["subject"]) == (3, "steps.a")
    assert "not an event of schema 1" in again["reason"]


async def test_what_is_meant_must_be_said(ratchet: Ratchet, bus: Bus) -> None:
    for arguments in ((), ("1", "--all"), ("7",)):
        said = await ratchet("dead", "replay", *arguments)
        assert said.code == 2
        assert len(said.err.splitlines()) == 1
    await bus.publish("dead.nobody", b"", "d", {})
    assert (await ratchet("dead", "replay", "1")).code == 2
    await buried(bus, "steps.a", b"{", "over the limit", **{"Ratchet-Cut-From": "9000000"})
    assert "too large" in (await ratchet("dead", "replay", "2")).err
    assert json.loads((await ratchet("dead", "--json")).out)[0]["sequence"] == 1
