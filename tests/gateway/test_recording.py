"""Records on their way to a broker that does not take them."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from ratchet_sdk.events import MAX_EVENT_BYTES, LlmCall, LlmCallMade, step_events
from ratchet_sdk.spool import Spool
from ratchet_sdk.values import encoded

from services.gateway import recording
from services.gateway.backlog import opened
from services.gateway.recording import Records
from services.local.embedded import NatsServer
from shared.bus import Bus
from shared.errors import ConfigurationError

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)


def event(content: str = "hi", **call: Any) -> LlmCallMade:
    made = LlmCall(call_id="c", messages=[{"role": "user", "content": content}], **call)
    return LlmCallMade(trajectory_id="t", started_at=NOW, occurred_at=NOW, step=0, call=made)


def counted(outcome: str) -> float:
    return recording.RECORDS.labels(outcome)._value.get()


async def stored(bus: Bus) -> int:
    return (await bus.js.stream_info("STEPS")).state.messages


def records_over(bus: Bus, directory: Path, *, spool_bytes: int = 2**20, memory_bytes: int = 2**20) -> Records:
    return Records(bus, opened(directory, spool_bytes), wait_s=0.2, memory_bytes=memory_bytes)


def segments(directory: Path) -> list[Path]:
    return list(directory.rglob("*.events"))


async def without_broker(bus: Bus, nats_server: NatsServer) -> None:
    nats_server.stop()
    while bus.nc.is_connected:
        await asyncio.sleep(0.01)


async def with_broker(bus: Bus, nats_server: NatsServer) -> None:
    nats_server.start()
    while not bus.nc.is_connected:
        await asyncio.sleep(0.02)


async def test_a_process_that_is_killed_loses_no_record_of_what_it_answered(
    bus: Bus, nats_server: NatsServer, tmp_path: Path
) -> None:
    await without_broker(bus, nats_server)
    events = [event("x" * 40_000), *(event(f"{n}") for n in range(99))]
    first = records_over(bus, tmp_path)
    await asyncio.gather(*(first.put("a", each) for each in events))
    first.close()  # as the kernel would: nothing else is done
    await with_broker(bus, nats_server)
    second = records_over(bus, tmp_path)
    await second.drain()
    assert await stored(bus) == 100
    await second.drain()
    second.close()
    third = records_over(bus, tmp_path)
    assert third._backlog.pending == 0
    third.close()
    message = await bus.js.get_msg("STEPS", 1)
    assert message.subject == "calls.a"
    ids = {(await bus.js.get_msg("STEPS", n)).headers["Nats-Msg-Id"] for n in range(1, 101)}  # type: ignore[index]  # each has one
    assert ids == {f"a:{each.event_id}" for each in events}


async def test_what_a_stream_refuses_is_kept_and_goes_later(bus: Bus, tmp_path: Path) -> None:
    config = (await bus.js.stream_info("STEPS")).config
    await bus.js.delete_stream("STEPS")
    records = records_over(bus, tmp_path)
    for _ in range(3):
        await records.put("a", event())
    await records.drain()
    await records.flush()
    config.allow_direct = True
    await bus.js.add_stream(config)
    await records.drain()
    assert await stored(bus) == 3
    records.close()


async def test_disk_and_memory_are_bounded_and_what_is_over_is_counted(
    bus: Bus, nats_server: NatsServer, tmp_path: Path
) -> None:
    await without_broker(bus, nats_server)
    size = len(encoded(event()))
    records = records_over(bus, tmp_path, spool_bytes=3 * size, memory_bytes=2 * size)
    lost = counted("lost")
    for _ in range(9):
        await records.put("a", event())
    assert counted("lost") == lost + 9 - 2 - 2
    assert records._held_bytes <= 2 * size
    assert sum(path.stat().st_size for path in segments(tmp_path)) <= 3 * size
    await with_broker(bus, nats_server)
    await records.drain()
    assert await stored(bus) == 4
    assert records._held_bytes == 0
    records.close()


async def test_a_disk_that_refuses_leaves_memory(
    bus: Bus, nats_server: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    await without_broker(bus, nats_server)
    records = records_over(bus, tmp_path)
    monkeypatch.setattr(Spool, "append", full)
    monkeypatch.setattr(Spool, "read", full)
    await asyncio.gather(*(records.put("a", event()) for _ in range(5)))
    await with_broker(bus, nats_server)
    await records.flush()
    assert await stored(bus) == 5
    records.close()


async def test_a_spool_whose_files_are_gone_holds_nothing_up(bus: Bus, nats_server: NatsServer, tmp_path: Path) -> None:
    await without_broker(bus, nats_server)
    records = records_over(bus, tmp_path)
    await records.put("a", event())
    for path in segments(tmp_path):
        path.unlink()
    await with_broker(bus, nats_server)
    await records.drain()
    await records.put("a", event())
    assert await stored(bus) == 1
    records.close()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="RATCHET_GATEWAY_SPOOL_DIR"):
        opened(tmp_path / "file", 1024)


async def test_a_reply_that_is_too_large_is_recorded_without_what_makes_it_so(bus: Bus, tmp_path: Path) -> None:
    records = records_over(bus, tmp_path, memory_bytes=2 * MAX_EVENT_BYTES)
    large = "x" * MAX_EVENT_BYTES
    message = {"role": "assistant", "content": "yo"}
    too_large = counted("too_large")
    await records.put("a", event(response={"message": message, "logprobs": {"content": [large]}, "token_ids": [1]}))
    await records.put("a", event(response={"message": message | {"content": large}}, prompt_token_ids=[1]))
    await records.put("a", event(large))
    assert counted("too_large") == too_large + 1
    first, second = [step_events.validate_json((await bus.js.get_msg("STEPS", n)).data or b"") for n in (1, 2)]
    assert isinstance(first, LlmCallMade)
    assert isinstance(second, LlmCallMade)
    assert first.call.response == {"message": message, "token_ids": [1]}
    assert first.call.model_extra == {"left_out": ["logprobs: too large"]}
    assert second.call.response is None
    assert (second.call.model_extra or {})["left_out"][-1] == "reply: too large"
    assert await stored(bus) == 2
    records.close()
