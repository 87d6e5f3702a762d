"""The other faces of the recorder: without an event loop, and with ids instead of objects. The same events come out."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from ratchet_sdk import Recorder, SyncRecorder
from ratchet_sdk.compat import TrajectoryRecorder

from services.local.embedded import NatsServer
from shared.bus import Bus
from tests.sdk.stored import stored

MESSAGES = [{"role": "system", "content": "trade"}, {"role": "user", "content": "now?"}]
MORE = [*MESSAGES, {"role": "assistant", "content": "buy"}, {"role": "user", "content": "and now?"}]
VOLATILE = {"event_id", "started_at", "occurred_at", "call_id", "base_call_id"}  # ids are compared where they link


async def with_the_recorder(url: str, agent_id: str = "agent-1") -> None:
    async with (
        Recorder(url, agent_id) as recorder,
        recorder.trajectory(trajectory_id="t", scenario_id="sunny", goal="win", metadata={"batch": 7}) as run,
    ):
        async with run.step(environment={"balance": 100}) as step:
            step.provider_access("prices", query={"of": "iron"}, purpose="decide", data={"iron": 3})
            step.llm_call(messages=MESSAGES, response="buy", model="m", purpose="reasoning", usage={"prompt_tokens": 3})
            step.action("buy", parameters={"of": "iron"}, success=True, result={"order": 1}, reasoning="cheap")
            step.reward(0.5)
        async with run.step(environment={"balance": 90}) as step:
            step.llm_call(messages=MORE, response="sell", model="m", purpose="action", usage={"prompt_tokens": 9})
            step.action("sell", parameters={"of": "iron"}, success=False, error="nobody buys")
        run.final(balance=101)
        run.metrics(trades=1)


def without_a_loop(url: str, agent_id: str = "agent-1") -> None:
    with (
        SyncRecorder(url, agent_id) as recorder,
        recorder.trajectory(trajectory_id="t", scenario_id="sunny", goal="win", metadata={"batch": 7}) as run,
    ):
        with run.step(environment={"balance": 100}) as step:
            step.provider_access("prices", query={"of": "iron"}, purpose="decide", data={"iron": 3})
            step.llm_call(messages=MESSAGES, response="buy", model="m", purpose="reasoning", usage={"prompt_tokens": 3})
            step.action("buy", parameters={"of": "iron"}, success=True, result={"order": 1}, reasoning="cheap")
            step.reward(0.5)
        with run.step(environment={"balance": 90}) as step:
            step.llm_call(messages=MORE, response="sell", model="m", purpose="action", usage={"prompt_tokens": 9})
            step.action("sell", parameters={"of": "iron"}, success=False, error="nobody buys")
        run.final(balance=101)
        run.metrics(trades=1)


def with_ids(url: str, agent_id: str = "agent-1") -> None:
    with SyncRecorder(url, agent_id) as recorder:
        logger = TrajectoryRecorder(recorder)
        t = logger.start_trajectory(trajectory_id="t", scenario_id="sunny", goal="win", batch=7)
        step = logger.start_step(t, {"balance": 100})
        logger.log_provider_access(
            step, provider_name="prices", query={"of": "iron"}, purpose="decide", data={"iron": 3}
        )
        logger.log_llm_call(
            step,
            model="m",
            system_prompt="trade",
            user_prompt="now?",
            response="buy",
            purpose="reasoning",
            prompt_tokens=3,
        )
        logger.complete_step(
            t,
            step,
            action_type="buy",
            parameters={"of": "iron"},
            success=True,
            result={"order": 1},
            reasoning="cheap",
            reward=0.5,
        )
        step = logger.start_step(t, {"balance": 90})
        logger.log_llm_call(
            step,
            model="m",
            system_prompt="trade",
            user_prompt="and now?",
            messages=MORE,
            response="sell",
            purpose="action",
            prompt_tokens=9,
        )
        logger.complete_step(t, step, action_type="sell", parameters={"of": "iron"}, success=False, error="nobody buys")
        logger.end_trajectory(t, final_balance=101, trades=1)


def without(value: Any, names: set[str]) -> Any:
    match value:
        case dict():
            return {name: without(inner, names) for name, inner in value.items() if name not in names}
        case list():
            return [without(inner, names) for inner in value]
        case _:
            return value


@pytest.mark.parametrize("face", [without_a_loop, with_ids])
async def test_each_face_records_the_same(nats_server: NatsServer, bus: Bus, face: Callable[[str], None]) -> None:
    await with_the_recorder(nats_server.url)
    await asyncio.to_thread(face, nats_server.url)
    events = [without(message.event.model_dump(mode="json"), VOLATILE) for message in await stored(bus)]
    assert [event["kind"] for event in events[:4]] == ["trajectory.started", "step", "step", "trajectory.ended"]
    assert events[:4] == events[4:]
    assert [
        [message["content"] for call in event["llm_calls"] for message in call["messages"]] for event in events[1:3]
    ] == [
        ["trade", "now?"],
        ["and now?"],
    ], "a call that extends another is sent as what it added"
    assert events[3]["final"] == {"balance": 101}


async def test_ids_that_nobody_gave_out_are_refused_and_raise_nothing(nats_server: NatsServer, bus: Bus) -> None:
    async with Recorder(nats_server.url, "agent-1") as recorder:
        logger = TrajectoryRecorder(recorder)
        step = logger.start_step("nowhere")
        logger.log_provider_access(step, provider_name="p", data={})
        assert logger.log_llm_call("x/3", model="m", system_prompt=None, user_prompt="u", response="r") is None
        logger.complete_step("nowhere", action_type="buy")
        logger.end_trajectory("nowhere")
        assert recorder.counts.refused == 5
        t = logger.start_trajectory()
        first, second = logger.start_step(t), logger.start_step(t)
        logger.complete_step(t, first, action_type="late")  # it was left when the second began
        logger.complete_step(t, action_type="buy")
        logger.end_trajectory(t, "terminated")
        assert recorder.counts.refused == 6
        assert first != second
    _, _, step_1, end = [message.event for message in await stored(bus)]
    assert (step_1.action.type, end.status, end.step_count) == ("buy", "truncated", 2)  # type: ignore[union-attr]


def test_what_was_not_closed_is_sent_when_the_interpreter_ends(nats_server: NatsServer, bus: Bus) -> None:
    code = "import sys; from ratchet_sdk import SyncRecorder; SyncRecorder(sys.argv[1], 'a').trajectory().start()"
    subprocess.run([sys.executable, "-c", code, nats_server.url], check=True, timeout=30)

    async def count() -> int:
        other = Bus(nats_server.url, name="count")
        await other.connect()
        try:
            return (await other.js.stream_info("STEPS")).state.messages
        finally:
            await other.close()

    assert asyncio.run(count()) == 1


def test_a_sync_recorder_blocks_nothing_without_a_broker() -> None:
    with SyncRecorder("nats://127.0.0.1:1", "agent-1", spool_dir="") as recorder:
        with recorder.trajectory() as run, run.step():
            pass
        assert recorder.flush(0.1) == 3
        assert recorder.close(0.1) == 3
        assert recorder.close() == 3
        assert recorder.trajectory().start()
