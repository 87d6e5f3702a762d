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

from shared.calls import Mention, mentions, merge_calls, written_out
from shared.database import Pool
from shared.errors import GiveUpError
from shared.trajectories import Fault, Stored, assemble, load

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


def told(*events: StepEvent) -> list[Mention]:
    return [mention for event in events for mention in mentions(event)]


def test_a_call_that_came_both_ways_is_there_once_with_what_each_knew() -> None:
    made = LlmCallMade(**head(1), step=0, call=call("c", reply="buy", messages=[user("?")]))
    step = Step(**head(2), step=0, llm_calls=[call("c", purpose="reasoning", action_type="trade")])
    orders: list[list[StepEvent]] = [[made, step], [step, made]]
    for order in orders:
        [found], faults = merge_calls(told(*order))
        assert (found.call.purpose, found.call.action_type) == ("reasoning", "trade")
        assert found.call.messages == [user("?")]
        assert found.call.response == made.call.response
        assert (found.step, found.occurred_at) == (0, made.occurred_at)
        assert faults == []


def test_calls_of_one_step_keep_their_order() -> None:
    step = Step(**head(1), step=0, llm_calls=[call(name, reply=name) for name in ("z", "a", "m")])
    assert [found.call.call_id for found in merge_calls(told(step))[0]] == ["z", "a", "m"]


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
    assert run.steps == [step]
    assert run.ended is not None
    assert run.ended.status == "failed"
    assert await load(pool, []) == {}


def claims(*, reply: str | None, second: float = 2, **more: Any) -> bytes:
    return raw(Step(**head(second), step=0, llm_calls=[call("c", reply=reply, **more)]))[0]


@given(st.permutations(range(3)))
def test_what_the_gateway_saw_is_the_content_whatever_an_agent_claims(order: list[int]) -> None:
    """An agent may say what a call was for; not what was asked, what came back, or from which tokens."""
    seen = LlmCallMade(**head(1), step=0, call=call("c", reply="hold", messages=[user("?")], model_version="v1"))
    forged = claims(reply="buy", model_version="v2", prompt_token_ids=[1], purpose="reasoning", second=0)
    stored: list[bytes | Stored] = [Stored(raw(seen)[0], witnessed=True), forged, claims(reply=None)]
    run = assemble("x", "t", [stored[place] for place in order])
    [found] = run.calls
    assert found.witnessed
    assert found.reply == {"role": "assistant", "content": "hold"}
    assert (found.messages, found.call.model_version, found.call.prompt_token_ids) == ([user("?")], "v1", None)
    assert found.call.purpose == "reasoning"
    assert run.faults == [Fault("c", "it came more than once with different contents; kept is what the gateway saw")]


def test_a_call_id_that_comes_twice_with_different_contents_is_marked() -> None:
    def faults(*bodies: bytes) -> list[Fault]:
        return assemble("x", "t", bodies).faults

    first, other = claims(reply="buy"), claims(reply="sell", second=3)
    assert faults(first, first, claims(reply=None)) == []
    assert faults(first, other, other) == [
        Fault("c", "it came more than once with different contents; kept is the first with a reply")
    ]
    assert [c.reply for c in assemble("x", "t", [first, other]).calls] == [{"role": "assistant", "content": "buy"}]


def test_what_cannot_be_used_is_left_out_with_its_reason() -> None:
    good = Step(**head(1), step=0, llm_calls=[call("a", reply="x"), call("b", reply="y", base="gone")])
    odd = LlmCall(call_id="c", response={"message": "text", "logprobs": [1]})
    run = assemble("x", "t", [b'{"kind":"step","schema":0}', b"", *raw(good, LlmCallMade(**head(2), step=1, call=odd))])
    assert [(c.call.call_id, c.reply is not None) for c in run.calls] == [("a", True), ("b", True), ("c", False)]
    assert [(fault.call_id, fault.reason.partition(":")[0]) for fault in run.faults] == [
        (None, "a stored event is not of the contract"),
        (None, "a stored event is not of the contract"),
        ("b", "call b extends gone, which is not a call of this run"),
        ("c", "response.message is text, expected an object"),
        ("c", "response.logprobs is a list, expected an object with a list `content`"),
    ]
