"""What events say about runs, calls and agents, in any order."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.recorder import domain
from services.recorder.domain import (
    agents_of,
    calls_of,
    day_of,
    publisher,
    runs_of,
    steps_of,
)
from shared.calls import mentions, merge_calls
from shared.errors import GiveUpError
from shared.windows import EARLIEST, MAX_CLOCK_AHEAD_S
from tests.recorder.events import (
    START,
    WINDOW_ID,
    WINDOW_S,
    call_made,
    ended,
    numbered,
    received,
    reply,
    started,
    step,
)


def test_the_agent_is_the_last_token_of_the_subject() -> None:
    assert publisher("steps.agent-1_x") == ("agent-1_x", False)
    assert publisher("calls.agent-1_x") == ("agent-1_x", True)
    for subject in (
        "steps.a.b",
        "steps.",
        "other.a",
        "steps.a b",
        "steps." + "a" * 65,
        "steps.é",
        "steps.a\n",
        "calls",
    ):
        with pytest.raises(GiveUpError, match=r"steps\.<agent_id>"):
            publisher(subject)


def test_a_day_is_of_the_id_and_of_nothing_else() -> None:
    event = step().model_copy(update={"event_id": UUID("00000000-0000-7000-8000-000000000000")})
    assert day_of(event.event_id) == date(1970, 1, 1)


HISTORY = [
    started(scenario_id="sunny", model={"name": "traders", "version": "v1"}),
    step(0, action={"type": "buy", "success": True, "result": 1}, reward=0.5),
    call_made(
        "c", response=reply(token_ids=[1]), prompt_token_ids=[2], usage={"prompt_tokens": 3, "completion_tokens": 1}
    ),
    step(1, llm_calls=[{"call_id": "c", "purpose": "reasoning"}]),
    ended(step_count=2),
    ended(status="failed", step_count=9),
]


@given(st.permutations(numbered(*HISTORY)))
def test_a_run_does_not_depend_on_the_order_of_arrival(events: list[domain.Received]) -> None:
    run = runs_of(events, WINDOW_S)["a", "t"]
    assert run.window.window_id == WINDOW_ID
    assert (run.started, run.scenario_id, run.model_name, run.model_version) == (True, "sunny", "traders", "v1")
    assert (run.status, run.step_count, run.ended_sequence) == ("completed", 2, 5)
    assert run.first_sequence == 1
    assert [row.step for row in steps_of(events)] == [0, 1]
    assert calls_of(events) == calls_of(sorted(events, key=lambda e: e.sequence))


def test_a_run_that_only_began_in_the_middle_has_what_is_known() -> None:
    [run] = runs_of(numbered(step(3)), WINDOW_S).values()
    assert (run.started, run.scenario_id, run.status, run.clock_skewed) == (False, None, "open", False)
    [run] = runs_of(numbered(started()), WINDOW_S).values()
    assert (run.started, run.model_name) == (True, None)


def test_the_first_event_in_the_stream_places_a_run() -> None:
    ahead = step(0, started_at=START + timedelta(hours=1))
    other = step(1, started_at=START + timedelta(minutes=2))
    [run] = runs_of([received(other, 2), received(ahead, 1)], WINDOW_S).values()
    assert run.clock_skewed
    assert (run.window.window_id, run.started_at) == (WINDOW_ID, START)
    [run] = runs_of([received(other, 2)], WINDOW_S).values()
    assert (run.window.starts_at, run.clock_skewed) == (START.replace(minute=2, second=0), False)


ENDS_OF_TIME = (datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC))


@given(st.datetimes(timezones=st.just(UTC)) | st.sampled_from(ENDS_OF_TIME), st.integers(1, 7 * 86_400))
def test_any_time_of_the_contract_gives_rows_that_can_be_worked_with(said: datetime, window_s: int) -> None:
    times: dict[str, Any] = {"started_at": said, "occurred_at": said}
    events = numbered(step(0, llm_calls=[{"call_id": "c"}], **times), ended(**times))
    [run] = runs_of(events, window_s).values()
    [done], [call] = steps_of(events), calls_of(events).values()
    for instant in (run.started_at, run.ended_at, done.occurred_at, call.occurred_at):
        assert instant is not None
        assert EARLIEST <= instant <= START + timedelta(seconds=MAX_CLOCK_AHEAD_S)
    assert run.window.starts_at <= run.started_at < run.window.ends_at
    assert run.clock_skewed == (not run.consistent) == (run.started_at != said)


def test_one_event_with_an_impossible_time_marks_its_run() -> None:
    [run] = runs_of(numbered(started(), step(0, occurred_at=ENDS_OF_TIME[0])), WINDOW_S).values()
    assert (run.clock_skewed, run.consistent, run.started_at) == (False, False, START)


def test_a_step_says_what_was_done_and_whether_it_was_answered() -> None:
    done, failed, unanswered, idle = steps_of(
        numbered(
            step(0, action={"type": "buy", "success": True, "result": 0}, reward=1),
            step(1, action={"type": "buy", "success": False, "error": "broke"}),
            step(2, action={"type": "buy"}),
            step(3),
        )
    )
    assert (done.action_type, done.success, done.answered, done.reward) == ("buy", True, True, 1.0)
    assert (failed.success, failed.answered) == (False, True)
    assert (unanswered.success, unanswered.answered) == (None, False)
    assert (idle.action_type, idle.answered) == (None, None)


def test_a_call_is_one_row_whichever_way_it_came() -> None:
    made = call_made("c", response=reply(token_ids=[7]), prompt_token_ids=[5], model_version="v2", latency_ms=4.0)
    hint = step(0, llm_calls=[{"call_id": "c", "purpose": "evaluation", "model": "traders", "base_call_id": "b"}])
    for events in (numbered(made, hint), numbered(hint, made)):
        [call] = calls_of(events).values()
        assert (call.recorded, call.event_id) == (True, made.event_id)
        assert (call.purpose, call.model, call.model_version) == ("evaluation", "traders", "v2")
        assert call.base_call_id is None
        assert (call.has_token_ids, call.latency_ms) == (True, 4.0)
    [call] = calls_of(numbered(hint)).values()
    assert (call.recorded, call.base_call_id) == (False, "b")


WITNESSED = numbered(
    call_made(
        "c", response=reply("invented", token_ids=[9]), prompt_token_ids=[8], model_version="v9", purpose="response"
    ),
    call_made("c", response=reply("seen"), model="traders"),
    step(0, llm_calls=[{"call_id": "c", "response": reply("told"), "model_version": "v8"}]),
)
WITNESSED[1] = WITNESSED[1]._replace(witnessed=True)


@given(st.permutations([0, 1, 2]))
def test_what_was_witnessed_is_the_call_whatever_its_agent_says_before_or_after(order: list[int]) -> None:
    [call] = calls_of([WITNESSED[n]._replace(sequence=place) for place, n in enumerate(order)]).values()
    assert (call.witnessed, call.event_id) == (True, WITNESSED[1].event.event_id)
    assert (call.has_token_ids, call.model, call.model_version) == (False, "traders", None)
    assert call.purpose == "response"


def test_a_claim_gives_a_call_that_failed_no_reply() -> None:
    [call] = calls_of([*WITNESSED[::2], received(call_made("c"), 9)._replace(witnessed=True)]).values()
    assert (call.witnessed, call.recorded) == (True, False)


@pytest.mark.parametrize("usage", [{"prompt_tokens": n} for n in (-1, 2**31, "7", True, 1.5, None, [])])
def test_usage_that_is_no_count_is_not_kept(usage: dict[str, object]) -> None:
    [call] = calls_of(numbered(call_made("c", response=reply(), usage=usage))).values()
    assert call.prompt_tokens is None


def test_token_ids_need_both_sides() -> None:
    for more in (
        {"prompt_token_ids": [1]},
        {"response": reply(token_ids=[1])},
        {"prompt_token_ids": [1], "response": reply()},
    ):
        [call] = calls_of(numbered(call_made("c", **more))).values()
        assert not call.has_token_ids


def test_an_agent_is_seen_by_the_brokers_clock_with_its_versions() -> None:
    later = START + timedelta(hours=1)
    versions = started(model={"name": "m", "version": "v1"}), call_made("c", model_version="v2")
    events = [
        received(step(llm_calls=[{"call_id": "d", "model_version": "v3"}, {"call_id": "e"}]), 3, published_at=later),
        received(versions[0], 1),
        received(versions[1], 2),
        received(ended(), 4),
        received(started("t2", model={"name": "m"}), 5, agent_id="b"),
        received(call_made("f", "t2"), 6, agent_id="b"),
    ]
    agents = agents_of(events)
    assert agents["a"] == domain.AgentSeen("a", START, later, frozenset({"v1", "v2", "v3"}))
    assert agents["b"].versions == frozenset()


# the table and whoever reads the run --------------------------------------------------------------
told = st.builds(
    lambda call_id, text, step_number, more: call_made(
        call_id, number=step_number, **({} if text is None else {"response": reply(text)}), **more
    ),
    st.sampled_from("ab"),
    st.sampled_from([None, "buy", "sell"]),
    st.integers(0, 2),
    st.fixed_dictionaries(
        {},
        optional={
            "purpose": st.sampled_from(["action", "evaluation", "reasoning"]),
            "model": st.sampled_from("mn"),
            "model_version": st.sampled_from(["v1", "v2"]),
            "base_call_id": st.sampled_from("xy"),
        },
    ),
)


@given(st.lists(st.tuples(told, st.booleans()), max_size=5))
def test_the_table_counts_the_same_of_two_mentions_as_whoever_reads_the_run(events: list[tuple[Any, bool]]) -> None:
    """One call id, told of in several ways: SQL, the page and the trainer speak of the same call."""
    rows = calls_of([received(e, n)._replace(witnessed=seen) for n, (e, seen) in enumerate(events)])
    found, _ = merge_calls(m for event, seen in events for m in mentions(event, witnessed=seen))
    read = {m.call.call_id: m for m in found}
    assert {
        call_id: (r.recorded, r.purpose, r.model, r.model_version, r.base_call_id, r.step, r.occurred_at, r.witnessed)
        for (_, _, call_id), r in rows.items()
    } == {
        call_id: (
            m.call.response is not None,
            None if m.call.purpose == "action" else m.call.purpose,
            *(m.call.model, m.call.model_version, m.call.base_call_id),
            *(m.step, m.occurred_at, m.witnessed),
        )
        for call_id, m in read.items()
    }
