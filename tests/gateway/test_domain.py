"""The gateway's rules, and the two pure helpers beside them."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from ratchet_sdk.assembly import StreamedReply
from ratchet_sdk.events import LlmCall, LlmCallMade
from ratchet_sdk.sampling import NAMES, NEUTRAL
from ratchet_sdk.sampling import asked as sampled

from services.gateway import domain, record_domain
from services.gateway.assembly import reply_of
from services.gateway.domain import Asked
from services.gateway.prefixes import Prefixes
from services.gateway.record_domain import Prompt
from shared.errors import GiveUpError
from shared.routing import Arm, Plan, RouteDocument, Target, assigned
from shared.windows import EARLIEST, placed_at, window_at

NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)
MESSAGES = [{"role": "user", "content": "hi"}]


def asked(**body: Any) -> Asked:
    return Asked("a", "default", {"model": "default", "messages": MESSAGES, **body}, None, NOON)


def document(quarantined: list[str]) -> RouteDocument:
    arms = [Arm(version="v1", share=0.5, role="best"), Arm(version="v2", share=0.5, role="candidate")]
    targets = {v: Target(base_url="http://x/v1", model=v, artifact_sha256=v) for v in ("v1", "v2")}
    plans = [Plan(effective_from=NOON - timedelta(days=1), arms=arms)]
    return RouteDocument(policy="default", revision=1, salt="s", plans=plans, targets=targets, quarantined=quarantined)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ([], "JSON object"),
        ({}, "model"),
        ({"model": "a b"}, "model"),
        ({"model": "p"}, "messages"),
        ({"model": "p", "messages": []}, "messages"),
        ({"model": "p", "messages": ["hi"]}, "messages"),
        ({"model": "p", "messages": MESSAGES, "n": 2}, "n must be 1"),
        ({"model": "p", "messages": MESSAGES, "temperature": "hot"}, "temperature"),
        ({"model": "p", "messages": MESSAGES, "temperature": True}, "temperature"),
        ({"model": "p", "messages": MESSAGES, "top_p": float("inf")}, "top_p"),
        ({"model": "p", "messages": MESSAGES, "seed": 0.5}, "seed"),
        ({"model": "p", "messages": MESSAGES, "seed": 2**63}, "seed"),
        ({"model": "p", "messages": MESSAGES, "max_tokens": True}, "max_tokens"),
        ({"model": "p", "messages": MESSAGES, "top_k": 1.5}, "top_k"),
        ({"model": "p", "messages": MESSAGES, "stream": 1}, "stream must be true or false"),
        ({"model": "p", "messages": MESSAGES, "logprobs": 3}, "logprobs must be true or false"),
        ({"model": "p", "messages": MESSAGES, "return_token_ids": "yes"}, "return_token_ids"),
        ({"model": "p", "messages": MESSAGES, "stream_options": 5}, "stream_options"),
        ({"model": "p", "messages": MESSAGES, "n": True}, "n must be an integer"),
        *[({"model": "p", "messages": MESSAGES, name: 10**400}, name) for name in NEUTRAL],
        ({"model": "p", "messages": MESSAGES, "tools": {}}, "tools"),
    ],
)
def test_a_wrong_body_is_named(body: Any, words: str) -> None:
    with pytest.raises(GiveUpError, match=words):
        domain.checked(body)


def test_a_right_body_passes_untouched() -> None:
    body = {"model": "p", "messages": MESSAGES, "n": 1, "temperature": 0, "response_format": {"type": "json_object"}}
    assert domain.checked(body) is body


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-ratchet-trajectory", "a b"),
        ("x-ratchet-step", "one"),
        ("x-ratchet-purpose", "fun"),
        ("x-ratchet-base-call-id", ""),
        ("x-ratchet-started-at", "yesterday"),
        ("x-ratchet-started-at", "2026-11-20T10:00:00"),
        ("x-ratchet-started-at", "0001-01-01T00:00:00+14:00"),
    ],
)
def test_a_wrong_header_is_named(name: str, value: str) -> None:
    with pytest.raises(GiveUpError, match="(?i)" + name):
        domain.run_of_headers({"x-ratchet-trajectory": "t", name: value}, NOON)


def test_headers_name_a_run() -> None:
    assert domain.run_of_headers({}, NOON) is None
    run = domain.run_of_headers({"x-ratchet-trajectory": "t"}, NOON)
    assert run == domain.Run("t", 0, NOON, "action", None)
    headers = {
        "x-ratchet-trajectory": "t",
        "x-ratchet-step": "7",
        "x-ratchet-started-at": "2026-11-20T13:00:00+01:00",
        "x-ratchet-purpose": "evaluation",
        "x-ratchet-base-call-id": "c",
    }
    assert domain.run_of_headers(headers, NOON + timedelta(days=1)) == domain.Run("t", 7, NOON, "evaluation", "c")


@given(st.datetimes(timezones=st.timezones()) | st.just(datetime.min.replace(tzinfo=UTC)), st.integers(1, 7 * 86_400))
def test_any_start_that_a_header_may_name_is_routed_as_the_recorder_places_it(said: datetime, window_s: int) -> None:
    try:
        started_at = domain.started_of_headers({"x-ratchet-started-at": said.isoformat()}, NOON)
    except GiveUpError:
        return  # UTC cannot hold it
    chosen = domain.route(document([]), "a", started_at, NOON, window_s)
    placed, skewed = placed_at(started_at, NOON)
    assert chosen.assigned == assigned(document([]), "a", window_at(placed, window_s).starts_at)
    assert skewed or placed >= EARLIEST


@given(st.integers(0, 10**6), st.text("abc", min_size=1, max_size=5))
def test_a_run_is_routed_by_its_window_alone(seconds: int, agent_id: str) -> None:
    started = NOON + timedelta(seconds=seconds)
    chosen = domain.route(document([]), agent_id, started, started + timedelta(days=9), 60)
    assert chosen.assigned == assigned(document([]), agent_id, window_at(started, 60).starts_at)
    assert chosen.attempts[0] == chosen.assigned
    assert chosen.attempts[-1] == "v1"
    assert chosen.role == ("best" if chosen.assigned == "v1" else "candidate")


def test_a_clock_far_ahead_is_placed_by_ours() -> None:
    agents = [f"a{n}" for n in range(50)]
    ahead = [domain.route(document([]), a, NOON + timedelta(hours=3), NOON, 60).assigned for a in agents]
    ours = [domain.route(document([]), a, NOON, NOON, 60).assigned for a in agents]
    assert ahead == ours
    there = [domain.route(document([]), a, NOON + timedelta(seconds=240), NOON, 60).assigned for a in agents]
    assert there != ours


def test_a_quarantined_version_is_not_asked_and_the_best_always_is() -> None:
    for n in range(20):
        chosen = domain.route(document(["v1", "v2"]), f"a{n}", NOON, NOON, 60)
        assert chosen.attempts == ("v1",)
    assert {domain.route(document(["v2"]), f"a{n}", NOON, NOON, 60).assigned for n in range(20)} == {"v1", "v2"}


def test_which_answers_are_the_target_s_fault() -> None:
    assert [s for s in (400, 401, 403, 404, 413, 422, 429, 500, 503) if domain.target_failed(s)] == [
        401,
        403,
        404,
        500,
        503,
    ]


TARGET = Target(base_url="http://x/v1", model="sha", artifact_sha256="sha")


def test_sampling_is_written_out() -> None:
    body = domain.upstream_body(asked(top_p=0.5, stream=True, stream_options={"x": 1}, stop=["."]), TARGET)
    assert {name: body[name] for name in NEUTRAL} == {**NEUTRAL, "top_p": 0.5}
    assert (body["stop"], body["model"]) == (["."], "sha")
    assert body["stream_options"] == {"x": 1, "include_usage": True}
    assert "stream_options" not in domain.upstream_body(asked(), TARGET)


@given(
    st.dictionaries(st.sampled_from(NAMES), st.none() | st.floats(0, 2) | st.text(max_size=3)),
    st.sets(st.sampled_from(sorted(NEUTRAL))),
)
def test_what_is_recorded_is_what_was_sent(given: dict[str, Any], known: set[str]) -> None:
    target = TARGET.model_copy(update={"neutral": sorted(known)})
    sent = domain.upstream_body(asked(**given), target)
    sampling = sampled(sent)
    named = {name: value for name, value in given.items() if value is not None}
    assert sampling == {**{name: NEUTRAL[name] for name in known}, **named}
    assert all(sent[name] == value for name, value in sampling.items())


def test_a_target_is_told_no_neutral_value_that_nobody_knows() -> None:
    with pytest.raises(ValidationError, match="top_z"):
        Target(base_url="http://x/v1", model="m", artifact_sha256="m", neutral=["top_z"])


def test_what_the_client_asked_for_stays() -> None:
    reply = {"id": "up", "prompt_token_ids": [1], "choices": [{"index": 0, "token_ids": [2], "logprobs": {}}]}
    bare = record_domain.for_client(asked(), reply, "c", "v1")
    assert bare == {"id": "c", "model": "v1", "choices": [{"index": 0}]}
    odd = {"choices": [{"index": 0}, 5]}
    assert record_domain.for_client(asked(), odd, "c", "v1")["choices"] == odd["choices"]
    full = record_domain.for_client(asked(logprobs=True, return_token_ids=True), reply, "c", "v1")
    assert full == {**reply, "id": "c", "model": "v1"}


def test_a_record_says_what_really_answered() -> None:
    request = asked(max_tokens=5, max_completion_tokens=7, seed=3)
    run = domain.Run("t", 1, NOON, "action", "c0")
    reply = {"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}
    sent = domain.upstream_body(request, TARGET)
    answered = record_domain.Answered(
        "c1", domain.Route("v2", "candidate", ("v2", "v1")), "v1", reply, 3.5, sent, incomplete=True, broken_off=True
    )
    event = record_domain.recorded(request, run, answered, Prompt([], "c0"), NOON)
    assert event.call.model_extra == {
        "assigned_version": "v2",
        "fallback": True,
        "incomplete": True,
        "broken_off": True,
    }
    assert (event.call.model_version, event.call.base_call_id) == ("v1", "c0")
    assert event.call.sampling == {**NEUTRAL, "max_tokens": 5, "max_completion_tokens": 7, "seed": 3}
    assert (event.call.max_tokens, event.call.seed, event.call.latency_ms) == (7, 3, 3.5)


def test_what_the_contract_does_not_take_of_a_reply_is_left_out_and_named() -> None:
    choice = {"message": {"content": "x"}, "finish_reason": "stop", "logprobs": [1]}
    reply = {"choices": [choice], "usage": [3], "prompt_token_ids": [1, "two"]}
    answered = record_domain.Answered("c1", domain.Route("v1", "best", ("v1",)), "v1", reply, 3.5, {})
    run = domain.Run("t", 1, NOON, "action", None)
    call = record_domain.recorded(asked(), run, answered, Prompt(MESSAGES), NOON).call
    assert (call.usage, call.prompt_token_ids, call.response) == (None, None, choice)
    named = [words.split(":")[0] for words in (call.model_extra or {})["left_out"]]
    assert named == ["prompt_token_ids.1", "usage"]
    nameless = replace(answered, call_id="")
    with pytest.raises(ValidationError):
        record_domain.recorded(asked(), run, nameless, Prompt(MESSAGES), NOON)


def test_what_makes_a_record_too_large_leaves_it_step_by_step_and_the_words_stay_longest() -> None:
    response = {"message": {"role": "assistant", "content": "x"}, "logprobs": {"content": []}, "token_ids": [1]}
    call = LlmCall(call_id="c", messages=MESSAGES, response=response, prompt_token_ids=[2], left_out=["usage: odd"])
    event = LlmCallMade(trajectory_id="t", started_at=NOON, occurred_at=NOON, step=0, call=call)
    ever_less = [one.call for one in record_domain.lighter(event)]
    kept = [(set(one.response or {}), one.prompt_token_ids) for one in ever_less]
    assert kept == [({"message", "token_ids"}, [2]), ({"message"}, [2]), ({"message"}, None), (set(), None)]
    names = ("logprobs", "token_ids", "prompt_token_ids", "reply")
    for number, one in enumerate(ever_less, 1):
        assert one.messages == MESSAGES
        said = ["usage: odd", *(f"{name}: too large" for name in names[:number])]
        assert (one.model_extra or {})["left_out"] == said


def test_a_prompt_is_told_by_what_it_adds_only_to_the_same_beginning() -> None:
    known = Prefixes(size=1)
    reply = {"role": "assistant", "content": "yo", "tool_calls": None}
    known.remember("a", "t", "c", [*MESSAGES, reply])
    more = [*MESSAGES, {"content": "yo", "role": "assistant"}, {"role": "user", "content": "?"}]
    assert known.prompt("a", "t", "c", more) == Prompt(more[2:], "c")
    assert known.prompt("a", "t", None, more) == Prompt(more)
    assert known.prompt("a", "other", "c", more) == Prompt(more)
    changed = [{"role": "user", "content": "hi!"}, *more[1:]]
    assert known.prompt("a", "t", "c", changed) == Prompt(changed)
    known.remember("a", "t", "d", MESSAGES)
    assert known.prompt("a", "t", "c", more) == Prompt(more)


def test_a_streamed_reply_is_recorded_as_one_that_was_not() -> None:
    streamed = StreamedReply()
    assert reply_of(streamed)["choices"][0]["message"] == {"role": "assistant", "content": None}
    streamed.add({"created": 5, "choices": [{"index": 0, "delta": {"content": "I sell"}}]})
    assert reply_of(streamed)["choices"][0]["finish_reason"] == "length"
    streamed.add({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}], "prompt_token_ids": [1]})
    streamed.add({"choices": [], "usage": {"total_tokens": 9}})
    reply = reply_of(streamed)
    assert (reply["created"], reply["usage"], reply["prompt_token_ids"]) == (5, {"total_tokens": 9}, [1])
    [choice] = reply["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", "I sell")
