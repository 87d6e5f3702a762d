"""The recorder against a real broker: what is published, in which order, and what becomes of it when things break."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from ratchet_sdk import Recorder, connection
from ratchet_sdk import publisher as publishing
from ratchet_sdk.events import (
    MAX_EVENT_BYTES,
    LlmCallMade,
    Step,
    TrajectoryEnded,
    TrajectoryStarted,
    message_id,
)
from ratchet_sdk.publisher import Publisher
from ratchet_sdk.spool import Spool
from ratchet_sdk.step import RunStep
from ratchet_sdk.values import encoded

from services.local.embedded import NatsServer
from shared.bus import Bus
from shared.trajectories import assemble
from tests.sdk.stored import stored


@pytest.fixture
async def recorder(nats_server: NatsServer, bus: Bus) -> AsyncIterator[Recorder]:
    async with Recorder(nats_server.url, "agent-1", "traders") as opened:
        yield opened


async def test_a_run_is_published_as_the_contract_says(recorder: Recorder, bus: Bus) -> None:
    async with recorder.trajectory(scenario_id="sunny", goal="win", model="traders", metadata={"seed": 1}) as run:
        async with run.step(environment={"price": 3}) as step:
            step.provider_access("news", query="acme", purpose="context", data=["up"])
            call_id = step.llm_call(
                messages=[{"role": "user", "content": "?"}], response="buy", model="m", purpose="reasoning"
            )
            step.refer("call-9", purpose="evaluation", action_type="trade")
            step.action("buy", parameters={"n": 1}, success=True, result={"paid": 3}, reasoning="up")
            step.reward(0.5)
            step.failed_call(TimeoutError("slow"), model="m", half="\ud83d")
        step.llm_call(messages=[], response="late", call_id="c-\u00e4", latency_ms=float("nan"))
        step.llm_call(messages=[], response="late", call_id="c", note=None, temperature="0.5")
        run.final(balance=97)
        run.final({"profit": -3})
        run.metrics(steps=1)
    assert await recorder.flush() == 0

    messages = await stored(bus)
    events = [message.event for message in messages]
    assert [message.data for message in messages] == [encoded(event) for event in events], "as its model writes it"
    assert {message.subject for message in messages} == {"steps.agent-1"}
    assert [message.headers["Nats-Msg-Id"] for message in messages] == [
        message_id("agent-1", e.event_id) for e in events
    ]
    assert {(e.policy, e.trajectory_id, e.started_at) for e in events} == {
        ("traders", run.trajectory_id, run.started_at)
    }
    opening, first, late, end = events
    assert isinstance(opening, TrajectoryStarted)
    assert (opening.scenario_id, opening.goal, opening.metadata) == ("sunny", "win", {"seed": 1})
    assert opening.model is not None
    assert opening.model.name == "traders"
    assert isinstance(first, Step)
    assert (first.step, first.environment, first.reward) == (0, {"price": 3}, 0.5)
    assert first.model_extra == {"failed_calls": [{"model": "m", "half": "\ufffd", "error": "TimeoutError: slow"}]}
    assert isinstance(late, LlmCallMade)
    assert (late.call.call_id, late.call.temperature) == ("c", 0.5)
    [access] = first.provider_accesses
    assert (access.provider, access.query, access.purpose, access.data) == ("news", "acme", "context", ["up"])
    whole, hint = first.llm_calls
    assert (whole.call_id, whole.model, whole.purpose) == (call_id, "m", "reasoning")
    assert whole.response == {"finish_reason": "stop", "message": {"role": "assistant", "content": "buy"}}
    assert (hint.call_id, hint.purpose, hint.action_type, hint.response) == ("call-9", "evaluation", "trade", None)
    assert first.action is not None
    assert (first.action.type, first.action.result, first.action.error) == ("buy", {"paid": 3}, None)
    assert isinstance(end, TrajectoryEnded)
    assert (end.status, end.step_count) == ("completed", 1)
    assert (end.final, end.metrics) == ({"balance": 97, "profit": -3}, {"steps": 1})


async def test_a_run_says_what_the_world_will_tell_of_it(recorder: Recorder, bus: Bus) -> None:
    """What cannot be read is counted and costs the run nothing else."""
    everything = ["reward", "knowledge", "fact:reopened", "price:IRON", "metric:a b", "resolution:m-1"]
    given: list[Any] = [
        everything,
        (one for one in ["reward", "reward"]),
        "reward",
        None,
        ["luck", "price:", 7, "reward", "metric:a\nb", None],
        [f"fact:{n}" for n in range(40)],
        3.5,
    ]
    for expects in given:
        async with recorder.trajectory(expects=expects):
            pass
    assert await recorder.flush() == 0
    found = [m.event.expects for m in await stored(bus) if isinstance(m.event, TrajectoryStarted)]
    assert found == [everything, ["reward"], ["reward"], [], ["reward"], [f"fact:{n}" for n in range(32)], []]
    assert recorder.counts.refused == 5 + 8 + 1


async def test_an_exception_fails_the_run_and_passes_on(recorder: Recorder, bus: Bus) -> None:
    with pytest.raises(ZeroDivisionError):
        async with recorder.trajectory() as run, run.step():
            _ = 1 / 0

    async def agent() -> None:
        async with recorder.trajectory() as run, run.step() as step:
            step.action("buy", success=True)
            raise KeyError("x")

    with pytest.raises(KeyError):
        await agent()
    assert await recorder.flush() == 0
    _, first, end, _, second, _ = [message.event for message in await stored(bus)]
    assert isinstance(first, Step)
    assert first.action is not None
    assert (first.action.success, first.action.error) == (False, "ZeroDivisionError: division by zero")
    assert isinstance(end, TrajectoryEnded)
    assert (end.status, end.model_extra) == ("failed", {"error": "ZeroDivisionError: division by zero"})
    assert isinstance(second, Step)
    assert second.action is not None
    assert (second.action.type, second.action.success) == ("buy", True)


async def test_a_cancelled_run_is_truncated(recorder: Recorder, bus: Bus) -> None:
    began = asyncio.Event()

    async def agent() -> None:
        async with recorder.trajectory():
            began.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(agent())
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await recorder.flush() == 0
    end = (await stored(bus))[-1].event
    assert isinstance(end, TrajectoryEnded)
    assert end.status == "truncated"


async def test_what_was_handed_over_does_not_change_afterwards(recorder: Recorder, bus: Bus) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "text", "text": "one"}]}]
    environment = {"prices": {"acme": 1}}
    async with recorder.trajectory() as run, run.step(environment) as step:
        step.llm_call(messages=messages, response="ok")
        messages[0]["content"][0]["text"] = "two"
        messages.append({"role": "user", "content": "three"})
        environment["prices"]["acme"] = 2
    assert await recorder.flush() == 0
    first = (await stored(bus))[1].event
    assert isinstance(first, Step)
    assert first.environment == {"prices": {"acme": 1}}
    assert first.llm_calls[0].messages == [{"role": "user", "content": [{"type": "text", "text": "one"}]}]


def test_a_wrong_name_is_said_at_once() -> None:
    for agent_id, policy in (("a.b", "default"), ("", "default"), ("a" * 65, "default"), ("a", "two words")):
        with pytest.raises(ValueError, match="must be 1 to 64"):
            Recorder("nats://127.0.0.1:1", agent_id, policy)


async def test_large_events_travel_packed_and_larger_ones_are_refused(recorder: Recorder, bus: Bus) -> None:
    async with recorder.trajectory() as run:
        async with run.step(environment={"text": "x" * 100_000}):
            pass
        async with run.step(environment={"text": "x" * MAX_EVENT_BYTES}):
            pass
        async with run.step(environment={"text": "small"}):
            pass
    assert recorder.counts.refused == 1
    assert "over the limit" in (recorder.counts.last_error or "")
    assert await recorder.flush() == 0
    messages = await stored(bus)
    packed = [message.headers.get("Content-Encoding") for message in messages]
    assert packed == [None, "gzip", None, None]
    assert [message.event.kind for message in messages] == ["trajectory.started", "step", "step", "trajectory.ended"]
    assert len(messages[1].data) < 10_000
    assert isinstance(messages[1].event, Step)
    assert messages[1].event.environment == {"text": "x" * 100_000}


async def test_many_events_keep_their_order(recorder: Recorder, bus: Bus) -> None:
    async with recorder.trajectory() as run:
        for n in range(600):
            async with run.step(environment={"n": n}):
                pass
            if n % 100 == 0:
                await asyncio.sleep(0.005)
    assert await recorder.flush() == 0
    steps = [m.event.step for m in await stored(bus) if isinstance(m.event, Step)]
    assert steps == list(range(600))
    assert recorder.counts.published == recorder.counts.accepted == 602


async def test_another_agents_message_ids_suppress_nothing(recorder: Recorder, bus: Bus) -> None:
    run = recorder.trajectory()
    event = TrajectoryStarted(
        policy="traders", trajectory_id="t", started_at=run.started_at, occurred_at=run.started_at
    )
    await bus.publish("steps.enemy", b"{}", message_id("agent-1", event.event_id))
    assert recorder.record(event)
    assert await recorder.flush() == 0
    enemy, ours = await stored(bus)
    assert enemy.subject == "steps.enemy"
    assert (ours.subject, ours.event) == ("steps.agent-1", event)
    assert "Nats-Msg-Id" not in ours.headers


async def test_what_waits_together_is_stored_as_one_batch_or_each_alone(recorder: Recorder, bus: Bus) -> None:
    run = recorder.trajectory()
    events = [
        Step(policy="traders", trajectory_id="t", started_at=run.started_at, occurred_at=run.started_at, step=n)
        for n in range(20)
    ]
    assert all(recorder.record(event) for event in events[:10])
    assert await recorder.flush() == 0
    await bus.publish("steps.enemy", b"{}", message_id("agent-1", events[15].event_id))  # the broker refuses the batch
    assert all(recorder.record(event) for event in events[10:])
    assert await recorder.flush() == 0
    messages = [message for message in await stored(bus) if message.subject == "steps.agent-1"]
    assert [message.event for message in messages] == [*events[:15], *events[16:], events[15]]
    assert len({message.headers.get("Nats-Batch-Id") for message in messages[:10]}) == 1
    assert all("Nats-Batch-Id" in message.headers for message in messages[:10])
    assert not any("Nats-Batch-Id" in message.headers for message in messages[10:])
    assert recorder.counts.published == 20


async def test_a_broker_that_goes_and_comes_loses_and_repeats_nothing(nats_server: NatsServer, bus: Bus) -> None:
    async with Recorder(nats_server.url, "agent-1") as recorder, recorder.trajectory() as run:
        for n in range(300):
            if n == 100:
                nats_server.stop()
            if n == 200:
                assert await recorder.flush(0.2) > 0
                nats_server.start()
            async with run.step(environment={"n": n}):
                await asyncio.sleep(0.001)
        run.end()
        assert await recorder.flush(20) == 0
    while not bus.nc.is_connected:
        await asyncio.sleep(0.02)
    events = [message.event for message in await stored(bus)]
    assert [event.step for event in events if isinstance(event, Step)] == list(range(300))
    assert len(events) == 302


async def test_without_a_broker_nothing_blocks_and_what_is_unsent_is_said() -> None:
    recorder = Recorder("nats://127.0.0.1:1", "agent-1", queue_max=5)
    async with recorder.trajectory() as run:
        for _ in range(9):
            async with run.step():
                pass
    assert await recorder.flush(0.1) == 5
    assert (recorder.counts.accepted, recorder.counts.dropped) == (5, 6)
    assert await recorder.close(0.1) == 5
    assert not recorder.record(
        TrajectoryStarted(trajectory_id="t", started_at=run.started_at, occurred_at=run.started_at)
    )


async def test_events_wait_for_a_stream_that_is_not_there_yet(nats_server: NatsServer) -> None:
    from shared.streams import provision

    opened = Bus(nats_server.url, name="late")
    await opened.connect()
    async with Recorder(nats_server.url, "agent-1") as recorder:
        async with recorder.trajectory():
            pass
        assert await recorder.flush(0.3) == 2
        await provision(opened)
        assert await recorder.flush(20) == 0
    assert [m.event.kind for m in await stored(opened)] == ["trajectory.started", "trajectory.ended"]
    await opened.close()


async def test_a_payload_over_the_servers_own_limit_is_refused_and_the_rest_goes_on(
    nats_server: NatsServer, bus: Bus
) -> None:
    async with Recorder(nats_server.url, "agent-1") as recorder:
        async with recorder.trajectory():
            pass
        assert await recorder.flush() == 0
        client = recorder.publisher._connection._client
        assert client is not None
        client._max_payload = 2000
        async with recorder.trajectory(goal="x" * 2000):
            pass
        assert await recorder.flush() == 0
    assert recorder.counts.refused == 1
    assert "max_payload of 2000" in (recorder.counts.last_error or "")
    assert [m.event.kind for m in await stored(bus)] == ["trajectory.started", "trajectory.ended", "trajectory.ended"]


async def test_headers_name_the_step_to_the_gateway(recorder: Recorder) -> None:
    began = datetime(2026, 11, 20, 10, 0, 0, 123456, tzinfo=UTC)
    run = recorder.trajectory(trajectory_id="t-1", started_at=began + timedelta(0))
    run.step()
    headers = run.step().headers(purpose="reasoning", base_call_id="c-0")
    assert headers == {
        "X-Ratchet-Trajectory": "t-1",
        "X-Ratchet-Step": "1",
        "X-Ratchet-Started-At": "2026-11-20T10:00:00.123456+00:00",
        "X-Ratchet-Purpose": "reasoning",
        "X-Ratchet-Base-Call-Id": "c-0",
    }


async def test_what_is_known_only_after_a_step_is_an_event_of_its_own(recorder: Recorder, bus: Bus) -> None:
    async with recorder.trajectory() as run:
        async with run.step() as step:
            pass
        step.llm_call(messages=[], response="late", call_id="c")
    assert await recorder.flush() == 0
    event = (await stored(bus))[2].event
    assert isinstance(event, LlmCallMade)
    assert (event.step, event.call.call_id) == (0, "c")


def test_the_package_brings_nothing_that_an_agent_does_not_need() -> None:
    code = "import ratchet_sdk, ratchet_sdk.openai, sys; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert {"nats", "pydantic"} <= loaded
    assert not loaded & {"openai", "httpx", "shared", "services", "faststream", "asyncpg", "numpy", "torch"}


# long runs ------------------------------------------------------------------------------------------
async def test_a_long_run_costs_its_length_once_and_is_whole_again(recorder: Recorder, bus: Bus) -> None:
    messages: list[Any] = [{"role": "system", "content": "s" * 500}]
    prompts = []
    async with recorder.trajectory(trajectory_id="t") as run:
        for turn in range(60):
            async with run.step() as step:
                messages.append({"role": "user", "content": f"turn {turn} " + "u" * 500})
                prompts.append(list(messages))
                step.llm_call(messages=messages, response={"message": {"role": "assistant", "content": f"r{turn}"}})
                messages.append({"role": "assistant", "content": f"r{turn}", "refusal": None})
    assert await recorder.flush() == 0
    bodies = [message.data for message in await stored(bus)]
    assert sum(map(len, bodies)) < 60 * 1200
    calls = assemble("agent-1", "t", bodies).calls
    assert [call.messages for call in calls] == [[_without_nones(m) for m in prompt] for prompt in prompts]


def _without_nones(message: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in message.items() if value is not None}


async def test_nothing_is_built_upon_what_was_lost_or_differs(recorder: Recorder, bus: Bus) -> None:
    def ask(step: RunStep, *contents: str) -> None:
        roles = ("user", "assistant")
        messages = [{"role": roles[place % 2], "content": content} for place, content in enumerate(contents)]
        step.llm_call(messages=messages, response="ok")

    async with recorder.trajectory() as run:
        async with run.step() as step:
            ask(step, "one")
            ask(step, "one", "not what was said", "two")
            ask(step, "one", "ok", "two")
        async with run.step(environment={"large": "x" * MAX_EVENT_BYTES}) as step:
            ask(step, "one", "ok", "two", "ok", "three")
        async with run.step() as step:
            ask(step, "one", "ok", "two", "ok", "three", "ok", "four")
    assert recorder.counts.refused == 1
    assert await recorder.flush() == 0
    steps = [message.event for message in await stored(bus) if isinstance(message.event, Step)]
    found = [(len(call.messages), call.base_call_id is None) for step in steps for call in step.llm_calls]
    assert found == [(1, True), (3, True), (1, False), (7, True)]


# the spool ------------------------------------------------------------------------------------------
CRASHING = """
import asyncio, os, signal, sys
from ratchet_sdk import Recorder

async def main():
    recorder = Recorder(sys.argv[1], "agent-1")
    async with recorder.trajectory(trajectory_id="t") as run:
        for n in range(500):
            async with run.step(environment={"n": n, "secret": "sk-" + "a" * 30}):
                pass
        while recorder.counts.spooled < 501:
            await asyncio.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


def spooled_files() -> list[Path]:
    return list(Path(os.environ["RATCHET_SPOOL_DIR"]).rglob("*.events"))


async def test_what_a_killed_agent_had_spooled_goes_with_the_next_one(nats_server: NatsServer, bus: Bus) -> None:
    nats_server.stop()
    agent = await asyncio.create_subprocess_exec(sys.executable, "-c", CRASHING, nats_server.url)
    assert await asyncio.wait_for(agent.wait(), 60) == -signal.SIGKILL
    assert spooled_files()
    assert all(b"sk-aaa" not in file.read_bytes() for file in spooled_files())
    async with Recorder(nats_server.url, "agent-1") as recorder:
        assert await recorder.flush(0.2) == recorder.counts.spooled == 501
        nats_server.start()
        async with recorder.trajectory(trajectory_id="newer"):
            pass
        assert await recorder.flush(20) == 0
        assert recorder.counts.published == 503
    while not bus.nc.is_connected:
        await asyncio.sleep(0.02)
    messages = [message.event for message in await stored(bus)]
    assert [event.step for event in messages if isinstance(event, Step)] == list(range(500))
    assert [event.trajectory_id for event in messages] == ["t"] * 501 + ["newer"] * 2
    assert not spooled_files()


async def test_an_agent_that_ends_while_the_broker_is_away_leaves_all_in_the_spool(
    nats_server: NatsServer, bus: Bus
) -> None:
    nats_server.stop()
    recorder = Recorder(nats_server.url, "agent-1")
    async with recorder.trajectory() as run, run.step(environment={"text": "x" * 100_000}):
        pass
    assert await recorder.close(0.1) == 3
    assert recorder.counts.spooled == 3
    nats_server.start()
    async with Recorder(nats_server.url, "agent-1") as again:
        assert await again.flush(20) == 0
    while not bus.nc.is_connected:
        await asyncio.sleep(0.02)
    _, step, _ = await stored(bus)
    assert isinstance(step.event, Step)
    assert step.headers["Content-Encoding"] == "gzip"
    assert step.event.environment == {"text": "x" * 100_000}


async def test_a_large_event_waits_for_a_broker_that_was_never_there(
    nats_server: NatsServer, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = random.Random(7).randbytes(1_500_000).hex()  # zipped, over the megabyte that a client assumes of a server
    nats_server.stop()
    recorder = Recorder(nats_server.url, "agent-1")
    with monkeypatch.context() as impatient:
        impatient.setattr(connection, "CONNECT_PATIENCE_S", 0.05)
        async with recorder.trajectory(goal=noise):
            pass
        while recorder.counts.spooled < 2:
            assert recorder.counts.refused == 0
            await asyncio.sleep(0.01)
        assert await recorder.close(0) == 2
    nats_server.start()
    async with Recorder(nats_server.url, "agent-1") as again:
        assert await again.flush(20) == again.counts.refused == 0
    while not bus.nc.is_connected:
        await asyncio.sleep(0.02)
    opening, _ = await stored(bus)
    assert isinstance(opening.event, TrajectoryStarted)
    assert opening.event.goal == noise


async def test_a_full_spool_keeps_the_oldest_and_counts_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "CONNECT_PATIENCE_S", 0.05)
    monkeypatch.setattr(publishing, "MAX_PAUSE_S", 0.05)
    spool = Spool(tmp_path / "small", max_bytes=2_100)
    publisher = Publisher("nats://127.0.0.1:1", "steps.a", name="a", queue_max=10, spool=spool)
    sent = 0
    async with asyncio.timeout(60):
        while publisher.counts.dropped == 0:
            publisher.offer(f"a:{sent}", b"x" * 150)
            sent += 1
            while publisher.counts.spooled < min(sent, 12):  # a busy disk takes its time
                await asyncio.sleep(0.01)
    await publisher.close(0)
    counts = publisher.counts
    assert counts.spooled == 12  # of 170 bytes each
    assert counts.unsent == counts.accepted == 22
    spool.open()
    assert [event.message_id for event in spool.read(99, 10**9)] == [f"a:{n}" for n in range(12)]


async def test_files_that_somebody_took_away_are_counted_and_hold_nothing_up(nats_server: NatsServer, bus: Bus) -> None:
    nats_server.stop()
    async with Recorder(nats_server.url, "agent-1") as recorder, recorder.trajectory() as run:
        while recorder.counts.spooled < 1:
            await asyncio.sleep(0.01)
        [file] = spooled_files()
        file.unlink()
        async with run.step():
            pass
        while recorder.counts.spooled < 2:  # into the file that is gone
            await asyncio.sleep(0.01)
        nats_server.start()
        while recorder.counts.dropped < 2:
            await asyncio.sleep(0.01)
    assert recorder.counts.unsent == 0
    while not bus.nc.is_connected:
        await asyncio.sleep(0.02)
    [ended] = await stored(bus)
    assert isinstance(ended.event, TrajectoryEnded)


async def test_without_a_place_for_it_there_is_no_spool_and_no_harm(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    recorder = Recorder("nats://127.0.0.1:1", "agent-1", spool_dir=tmp_path / "file")
    async with recorder.trajectory():
        pass
    assert await recorder.close(0.3) == 2
    assert recorder.counts.spooled == 0
