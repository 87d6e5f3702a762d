"""What an agent hands over is kept, or marked, or counted with its reason: nothing vanishes without a word."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic_core import from_json
from ratchet_sdk import Recorder
from ratchet_sdk.compat import TrajectoryRecorder
from ratchet_sdk.events import LlmCall
from ratchet_sdk.redact import Redaction, secrets
from ratchet_sdk.values import encoded, mended, plain

NOBODY = "nats://127.0.0.1:1"
CARD = "4111111111111111"


@pytest.fixture
async def recorder() -> Recorder:
    return Recorder(NOBODY, "agent-1", spool_dir="")


def queued(recorder: Recorder) -> list[dict[str, Any]]:
    return [json.loads(item.data) for item in recorder.publisher._queue]


# values -------------------------------------------------------------------------------------------
halves = st.text(st.characters(categories=["Cs", "Lu", "So"]), max_size=4)
free = st.recursive(
    st.none() | st.booleans() | st.floats() | halves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(halves, inner, max_size=3),
    max_leaves=8,
)


def as_marked(value: Any) -> Any:
    """What JSON cannot hold, in words."""
    match value:
        case float() if not math.isfinite(value):
            return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        case str():
            return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        case dict():
            return [as_marked(inner) for inner in value.values()]
        case list():
            return [as_marked(inner) for inner in value]
    return value


def names_aside(value: Any) -> Any:
    if isinstance(value, dict):
        return [names_aside(inner) for inner in value.values()]
    return [names_aside(inner) for inner in value] if isinstance(value, list) else value


@given(free)
def test_what_json_cannot_hold_is_marked_and_nothing_else_changes(value: Any) -> None:
    told = from_json(encoded(plain(value)), allow_inf_nan=False)
    assert names_aside(told) == as_marked(value)
    call = LlmCall(call_id="c", response={"value": plain(value)})
    assert names_aside(from_json(encoded(call), allow_inf_nan=False)["response"]["value"]) == as_marked(value)


def test_halves_that_a_stream_has_parted_are_put_together_and_names_are_told_apart() -> None:
    assert mended("a \ud83d" + "\ude00 \ud83d") == "a \U0001f600 \ufffd"
    halves = {chr(0xD83D): 1, chr(0xD83E): 2, "b": [("\udc00",)]}
    assert mended(halves) == {"\ufffd": 1, "\ufffd (2)": 2, "b": [["\ufffd"]]}


# redaction ----------------------------------------------------------------------------------------
def redacted(event: dict[str, Any]) -> Any:
    return json.loads(Redaction(secrets)(json.dumps(event).encode()))


def test_an_id_that_looks_like_a_card_number_stays_and_a_text_loses_it() -> None:
    calls = [{"id": f"call_{CARD}", "type": "function", "function": {"name": "f", "arguments": f'{{"n": "{CARD}"}}'}}]
    event = {
        "kind": "step",
        "scenario_id": CARD,
        "environment": {"order_ids": [CARD], "orderId": CARD, "card": CARD, "user_id": {"note": CARD}, "paid": CARD},
        "llm_calls": [
            {
                "call_id": CARD,
                "messages": [{"role": "tool", "tool_call_id": f"call_{CARD}", "content": f"paid with {CARD}"}],
                "response": {"id": CARD, "message": {"tool_calls": calls}},
            }
        ],
    }
    clean = redacted(event)
    assert clean["scenario_id"] == CARD
    assert clean["environment"] == {
        **{"order_ids": [CARD], "orderId": CARD},
        **{"card": "[card]", "user_id": {"note": "[card]"}, "paid": "[card]"},
    }
    [call] = clean["llm_calls"]
    assert call["messages"] == [{"role": "tool", "tool_call_id": f"call_{CARD}", "content": "paid with [card]"}]
    assert call["response"]["id"] == CARD
    [tool] = call["response"]["message"]["tool_calls"]
    assert (tool["id"], tool["function"]["arguments"]) == (f"call_{CARD}", '{"n": "[card]"}')
    assert redacted({"a_id": "me@example.org", "id": f"sk-{'a1' * 20}"}) == {"a_id": "[email]", "id": "[key]"}


def test_names_that_become_the_same_are_told_apart() -> None:
    event = {"environment": {"a@example.org": 1, "b@example.org": 2}}
    assert redacted(event)["environment"] == {"[email]": 1, "[email] (2)": 2}


def test_a_call_whose_tokens_were_taken_says_so() -> None:
    call = {"call_id": "c", "prompt_token_ids": [1], "messages": [{"content": f"it is {CARD}"}]}
    assert redacted({"trajectory_id": "t", "call": call})["call"]["tokens_redacted"] is True
    bare = {"call_id": "c", "messages": [{"content": f"it is {CARD}"}]}
    assert "tokens_redacted" not in redacted({"trajectory_id": "t", "call": bare})["call"]


# what comes twice, or too late --------------------------------------------------------------------
async def test_a_second_call_of_one_id_is_kept_under_another(recorder: Recorder) -> None:
    run = recorder.trajectory().start()
    with run.step() as step:
        first = step.llm_call(messages=[], response="buy", call_id="c")
        again = step.llm_call(messages=[], response="buy", call_id="c")
        second = step.llm_call(messages=[], response="sell", call_id="c")
    assert (first, again) == ("c", "c")
    assert second != "c"
    assert recorder.counts.refused == 1
    assert "'c'" in str(recorder.counts.last_error)
    calls = queued(recorder)[1]["llm_calls"]
    assert [(c["call_id"], c["response"]["message"]["content"]) for c in calls] == [
        *(("c", "buy"), ("c", "buy")),
        (second, "sell"),
    ]


async def test_what_comes_after_its_step_or_its_run_is_counted(recorder: Recorder) -> None:
    run = recorder.trajectory().start()
    with run.step() as step:
        pass
    step.action("buy")
    step.reward(1)
    step.provider_access("prices")
    step.failed_call(TimeoutError("slow"))
    assert recorder.counts.refused == 4
    assert "its step is recorded already" in str(recorder.counts.last_error)
    run.end()
    run.final(balance=1)
    run.metrics(trades=1)
    assert recorder.counts.refused == 6
    assert "the run's end is recorded already" in str(recorder.counts.last_error)


async def test_a_word_that_the_contract_has_not_is_replaced_and_counted(recorder: Recorder) -> None:
    old = TrajectoryRecorder(recorder)
    trajectory_id = old.start_trajectory()
    step_id = old.start_step(trajectory_id)
    old.log_llm_call(step_id, model="m", system_prompt=None, user_prompt="?", response="!", purpose="fun")
    old.complete_step(trajectory_id, step_id, action_type="buy")
    old.end_trajectory(trajectory_id, "won")
    assert recorder.counts.refused == 2
    assert "status 'won' is not known" in str(recorder.counts.last_error)
    assert queued(recorder)[-1]["status"] == "failed"
