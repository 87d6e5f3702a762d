"""Records on their way to a broker that does not take them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from ratchet_sdk.events import MAX_EVENT_BYTES, LlmCall, LlmCallMade

from services.gateway import recording
from services.gateway.recording import Records
from shared.bus import Bus

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)


def event(content: str = "hi") -> LlmCallMade:
    call = LlmCall(call_id="c", messages=[{"role": "user", "content": content}])
    return LlmCallMade(trajectory_id="t", started_at=NOW, occurred_at=NOW, step=0, call=call)


def counted(outcome: str) -> float:
    return recording.RECORDS.labels(outcome)._value.get()


async def stored(bus: Bus) -> int:
    return (await bus.js.stream_info("STEPS")).state.messages


async def test_what_a_full_stream_refuses_is_kept_and_goes_later(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    info = await bus.js.stream_info("STEPS")
    config = info.config
    await bus.js.delete_stream("STEPS")
    records = Records(bus, wait_s=0.2, backlog=2)
    lost = counted("lost")
    for _ in range(3):
        await records.put("a", event())
    assert counted("lost") == lost + 1
    await records.drain()
    monkeypatch.setattr(recording, "FLUSH_S", 0.2)
    await records.flush()
    assert counted("lost") == lost + 3

    config.allow_direct = True
    await bus.js.add_stream(config)
    await records.flush()
    assert await stored(bus) == 2


async def test_an_event_over_the_limit_is_counted_and_not_sent(bus: Bus) -> None:
    too_large = counted("too_large")
    records: Any = Records(bus, wait_s=0.2, backlog=2)
    await records.put("a", event("x" * MAX_EVENT_BYTES))
    assert counted("too_large") == too_large + 1
    assert await stored(bus) == 0
