"""A run put together again: each call once, prompts written out, whatever the order its events are stored in."""

from __future__ import annotations

import hashlib
import zlib
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ratchet_sdk.events import LlmCall, LlmCallMade, Step, StepEvent, TrajectoryEnded, TrajectoryStarted

from shared.database import Pool
from shared.errors import GiveUpError
from shared.trajectories import assemble, load, merge_calls, written_out

START = datetime(2026, 11, 20, 10, tzinfo=UTC)
Message = dict[str, Any]


def head(second: float) -> dict[str, Any]:
    return {"trajectory_id": "t", "started_at": START, "occurred_at": START + timedelta(seconds=second)}


def call(call_id: str, *, reply: str | None = None, base: str | None = None, **more: Any) -> LlmCall:
    response = None if reply is None else {"message": {"role": "assistant", "content": reply}}
    return LlmCall(call_id=call_id, base_call_id=base, response=response, **more)


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def raw(*events: StepEvent) -> list[bytes]:
    return [event.model_dump_json(by_alias=True).encode() for event in events]


def test_a_call_that_came_both_ways_is_there_once_with_what_each_knew() -> None:
    made = LlmCallMade(**head(1), step=0, call=call("c", reply="buy", messages=[user("?")]))
    step = Step(**head(2), step=0, llm_calls=[call("c", purpose="reasoning", action_type="trade")])
    for order in ([made, step], [step, made]):
        [(found, number, occurred_at)] = merge_calls(order)
        assert (found.purpose, found.action_type) == ("reasoning", "trade")
        assert found.messages == [user("?")]
        assert found.response == made.call.response
        assert (number, occurred_at) == (0, made.occurred_at)


def test_calls_of_one_step_keep_their_order() -> None:
    step = Step(**head(1), step=0, llm_calls=[call(name, reply=name) for name in ("z", "a", "m")])
    assert [found.call_id for found, _, _ in merge_calls([step])] == ["z", "a", "m"]


@given(st.permutations(range(4)))
def test_the_order_of_storing_changes_nothing(order: list[int]) -> None:
    events: list[StepEvent] = [
        TrajectoryStarted(**head(0), goal="win"),
        LlmCallMade(**head(1), step=0, call=call("a", reply="1", messages=[user("one")])),
        Step(**head(2), step=0, llm_calls=[call("a", purpose="evaluation")]),
        TrajectoryEnded(**head(3), status="completed", step_count=1),
    ]
    straight = assemble("x", "t", raw(*events))
    shuffled = assemble("x", "t", raw(*(events[place] for place in order)))
    assert (shuffled.started, shuffled.steps, shuffled.calls, shuffled.ended) == (
        straight.started,
        straight.steps,
        straight.calls,
        straight.ended,
    )
    assert straight.key == ("x", "t")
    assert straight.calls[0].reply == {"role": "assistant", "content": "1"}


@given(st.lists(st.lists(st.text(max_size=5), max_size=3), min_size=1, max_size=6))
def test_a_chain_of_extensions_writes_out_as_the_whole_conversation(turns: list[list[str]]) -> None:
    """Each call brings its own messages; its prompt is all before it, replies included."""
    calls: list[LlmCall] = []
    whole: list[Message] = []
    for number, texts in enumerate(turns):
        own = [user(text) for text in texts]
        base = str(number - 1) if number else None
        calls.append(call(str(number), reply=f"r{number}", base=base, messages=own))
        whole += own
        assert written_out(calls[-1], {c.call_id: c for c in calls}) == whole
        whole.append({"role": "assistant", "content": f"r{number}"})


def test_a_broken_chain_is_said_and_keeps_what_it_has() -> None:
    lost = call("b", reply="x", base="gone", messages=[user("rest")])
    with pytest.raises(GiveUpError, match="extends gone"):
        written_out(lost, {"b": lost})
    one, two = call("1", base="2", messages=[user("a")]), call("2", base="1")
    with pytest.raises(GiveUpError, match="not a call of this run"):
        written_out(one, {"1": one, "2": two})
    itself = call("s", base="s")
    with pytest.raises(GiveUpError, match="not a call of this run"):
        written_out(itself, {"s": itself})
    found = assemble("x", "t", raw(Step(**head(1), step=0, llm_calls=[lost])))
    assert found.calls[0].messages == [user("rest")]


def test_a_base_without_a_reply_adds_its_messages_alone() -> None:
    base = call("1", messages=[user("a")])
    after = call("2", base="1", messages=[user("b")])
    assert written_out(after, {"1": base, "2": after}) == [user("a"), user("b")]
    assert assemble("x", "t", raw(Step(**head(1), step=0, llm_calls=[base]))).calls[0].reply is None


async def test_runs_are_loaded_from_their_bodies(pool: Pool) -> None:
    step = Step(**head(1), step=0, environment={"price": 3})
    bodies = raw(TrajectoryStarted(**head(0)), step, TrajectoryEnded(**head(2), status="failed", step_count=1))
    for sequence, (event_id, body) in enumerate(zip(("a", "b", "c"), bodies, strict=True)):
        await pool.execute(
            """insert into bodies (day, agent_id, event_id, trajectory_id, kind, sequence, sha256, size_bytes, body)
               values ('2026-11-20', 'x', $1, 't', 'step', $2, $3, $4, $5)""",
            f"0000000{sequence}-0000-7000-8000-00000000000{event_id}",
            10 - sequence,
            hashlib.sha256(body).digest(),
            len(body),
            zlib.compress(body),
        )
    await pool.execute(
        """insert into bodies (day, agent_id, event_id, trajectory_id, kind, sequence, sha256, size_bytes, body)
           values ('2026-11-20', 'x', '00000009-0000-7000-8000-000000000000', 'forgotten', 'step', 20, '', 0, null)"""
    )
    runs = await load(pool, [("x", "t"), ("x", "forgotten"), ("y", "t")])
    assert list(runs) == [("x", "t")]
    run = runs["x", "t"]
    assert run.raw == bodies[::-1]
    assert run.steps == [step]
    assert run.ended is not None
    assert run.ended.status == "failed"
    assert await load(pool, []) == {}
