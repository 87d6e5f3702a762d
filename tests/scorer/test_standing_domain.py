"""Who is judged, who ranks last and who is left out: what a policy can bring about is never a way out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ratchet_sdk.events import LlmCall, LlmCallMade, TrajectoryEnded

from services.scorer.standing_domain import (
    Checks,
    Judged,
    LeftOut,
    RanksLast,
    Run,
    broken_by_infrastructure,
    checked,
    reasons,
    standing,
)
from shared.trajectories import Stored, Trajectory, assemble
from tests.scorer.runs import STARTS, events

WHOLE = Checks(steps=2, steps_expected=2)
GOOD = Run("a", "t", "p", "s", "completed", late=False, called=True, rewarded=True, signature="s", checks=WHOLE)

records = st.builds(Checks, *[st.integers(0, 2)] * 4)
runs = st.builds(
    Run,
    agent_id=st.just("a"),
    trajectory_id=st.just("t"),
    policy=st.just("p"),
    scenario_id=st.just("s"),
    status=st.sampled_from(["completed", "failed", "truncated", "open"]),
    late=st.booleans(),
    called=st.booleans(),
    rewarded=st.booleans(),
    signature=st.sampled_from(["s", None]),
    broken=st.sampled_from(["it ended with NatsError", None]),
    checks=st.none() | records,
)


@given(runs, st.booleans())
def test_what_the_world_did_leaves_out_and_what_the_agent_did_makes_last(run: Run, by_outcome: bool) -> None:
    whose = {who for who, _ in reasons(run, by_outcome=by_outcome)}
    match standing(run, by_outcome=by_outcome):
        case LeftOut():
            assert "world" in whose
        case RanksLast():
            assert whose == {"agent"}
        case Judged():
            assert not whose


@given(
    runs, st.booleans(), st.sampled_from(["open", "failed", "truncated"]), st.builds(Checks, *[st.integers(0, 2)] * 4)
)
def test_breaking_itself_leads_no_run_out_of_its_group(run: Run, by_outcome: bool, status: str, checks: Checks) -> None:
    """Whatever a policy does to a run that would count: it counts still."""
    if isinstance(standing(run, by_outcome=by_outcome), LeftOut):
        return
    assert not isinstance(standing(replace(run, status=status, checks=checks), by_outcome=by_outcome), LeftOut)


@pytest.mark.parametrize(
    ("change", "by_outcome", "expected"),
    [
        ({}, True, Judged()),
        ({"late": True}, True, LeftOut("late: it was stored after its window had closed")),
        ({"called": False}, False, LeftOut("no model call of it was recorded")),
        ({"signature": None}, False, LeftOut("its events are not stored any more")),
        ({"broken": "it ended with NatsError"}, False, LeftOut("infrastructure broke it: it ended with NatsError")),
        ({"rewarded": False}, True, LeftOut("no reward of record")),
        ({"rewarded": False}, False, Judged()),
        ({"rewarded": False, "status": "truncated"}, True, Judged()),
        ({"rewarded": False, "status": "failed"}, True, Judged()),
        ({"status": "open"}, True, RanksLast("it never ended")),
        ({"status": "open", "rewarded": False}, True, RanksLast("it never ended")),
        ({"status": "open", "late": True}, True, LeftOut("late: it was stored after its window had closed")),
        ({"checks": None}, True, Judged()),
        ({"checks": replace(WHOLE, steps=0, steps_expected=0)}, True, Judged()),
        ({"checks": replace(WHOLE, steps=0)}, True, Judged()),
        ({"checks": replace(WHOLE, steps=1)}, True, RanksLast("its record has a hole: 1 of its 2 steps are stored")),
        ({"checks": replace(WHOLE, unreadable=1)}, True, RanksLast("replies that cannot be read: 1 of its calls")),
        ({"checks": replace(WHOLE, promptless=3)}, True, RanksLast("replies to no prompt: 3 of its calls")),
    ],
)
def test_each_reason_is_somebodys(change: dict[str, Any], by_outcome: bool, expected: Any) -> None:
    assert standing(replace(GOOD, **change), by_outcome=by_outcome) == expected


# what the events tell ---------------------------------------------------------------------------
def run_of(*changes: Any, witnessed: bool = False) -> Trajectory:
    sent: list[Any] = events("t")
    for change in changes:
        change(sent)
    if witnessed:
        call = LlmCall(call_id="seen", messages=[{"role": "user", "content": "?"}], response={"message": {}})
        sent.append(LlmCallMade(trajectory_id="t", started_at=STARTS, occurred_at=STARTS, step=9, call=call))
    bodies = [event.model_dump_json(by_alias=True).encode() for event in sent]
    return assemble("a", "t", [Stored(body, b"llm_call" in body and b"seen" in body) for body in bodies])


def ended(status: str, error: str | None = None) -> Any:
    def change(sent: list[Any]) -> None:
        sent[2] = TrajectoryEnded.model_validate({**sent[2].model_dump(), "status": status, "error": error})

    return change


def broken_off(*calls: str) -> Any:
    def change(sent: list[Any]) -> None:
        call = sent[1].llm_calls[0]
        more = [call.model_copy(update={"call_id": name, "response": None}) for name in calls]
        sent[1].llm_calls = [LlmCall.model_validate({**call.model_dump(), "broken_off": True}), *more]

    return change


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ((), None),
        ((ended("failed", "ValueError: no such symbol"),), None),
        ((ended("failed", "InternalServerError: Error code: 502 - neither v2 nor the best"),), "InternalServerError"),
        ((ended("failed", "APIConnectionError: Connection error."),), "APIConnectionError"),
        ((ended("failed", "ConnectionResetError: [Errno 104]"),), "ConnectionResetError"),
        ((ended("failed", "APITimeoutError: Request timed out."),), None),
        ((ended("failed", "ValueError: it said InternalServerError"),), None),
        ((ended("completed", "InternalServerError: 502"),), None),
        ((ended("truncated", "CancelledError: "),), None),
        ((broken_off(),), "broke off its reply in step 0"),
        ((broken_off("again"),), None),
    ],
)
def test_what_infrastructure_broke_is_told_from_what_the_policy_did(changes: Any, words: str | None) -> None:
    found = broken_by_infrastructure(run_of(*changes))
    assert found is None if words is None else words in (found or "")
    assert broken_by_infrastructure(run_of(*changes, witnessed=True)) is None, "an agent's word is no witness"


def test_what_the_gateway_saw_break_is_believed() -> None:
    def seen(**more: Any) -> Trajectory:
        call = LlmCall(call_id="c", messages=[{"role": "user", "content": "?"}], response={"message": "half"}, **more)
        made = LlmCallMade(trajectory_id="t", started_at=STARTS, occurred_at=STARTS, step=3, call=call)
        return assemble("a", "t", [Stored(made.model_dump_json(by_alias=True).encode(), witnessed=True)])

    assert broken_by_infrastructure(seen()) is None
    assert broken_by_infrastructure(seen(broken_off=True)) == "the model's server broke off its reply in step 3"
    assert checked(WHOLE, seen()) == WHOLE, "nor is what a server wrote its agent's doing"


def test_what_is_stored_and_no_longer_read_is_no_agents_fault() -> None:
    found = broken_by_infrastructure(assemble("a", "t", [b'{"kind": "step", "schema": 0}']))
    assert (found or "").startswith("a stored event is not of the contract")


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, WHOLE),
        ({"messages": []}, replace(WHOLE, promptless=1)),
        ({"messages": [], "prompt_token_ids": [1]}, WHOLE),
        ({"base_call_id": "gone"}, replace(WHOLE, promptless=1)),
        ({"base_call_id": "gone", "prompt_token_ids": [1]}, WHOLE),
        ({"response": {"message": "text"}}, replace(WHOLE, unreadable=1)),
        ({"response": None, "messages": []}, WHOLE),
    ],
)
def test_calls_are_asked_only_that_they_fit_together(changed: dict[str, Any], expected: Checks) -> None:
    def change(sent: list[Any]) -> None:
        sent[1].llm_calls[0] = sent[1].llm_calls[0].model_copy(update=changed)

    assert checked(WHOLE, run_of(change)) == expected
